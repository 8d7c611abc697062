"""The catalogue of models for ``/v1/models``: names, limits, lifecycle. A request with a model that is not in it fails.

Dates and most limits are placeholders. The dated names of two 4.5 models, and the 64,000 answer tokens of Haiku 4.5, were recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

_MODELS = (
    ("claude-fable-5-2", "Claude Fable 5.2"),
    ("claude-mythos-5-2", "Claude Mythos 5.2"),
    ("claude-haiku-5-5", "Claude Haiku 5.5"),
    ("claude-sonnet-5-5", "Claude Sonnet 5.5"),
    ("claude-fable-5-1", "Claude Fable 5.1"),
    ("claude-opus-5-5", "Claude Opus 5.5"),
    ("claude-mythos-5-1", "Claude Mythos 5.1"),
    ("claude-sonnet-5", "Claude Sonnet 5"),
    ("claude-fable-5", "Claude Fable 5"),
    ("claude-mythos-5", "Claude Mythos 5"),
    ("claude-opus-5", "Claude Opus 5"),
    ("claude-opus-4-8", "Claude Opus 4.8"),
    ("claude-opus-4-7", "Claude Opus 4.7"),
    ("claude-opus-4-6", "Claude Opus 4.6"),
    ("claude-sonnet-4-6", "Claude Sonnet 4.6"),
    ("claude-haiku-4-5-20251001", "Claude Haiku 4.5"),
    ("claude-opus-4-5-20251101", "Claude Opus 4.5"),
    ("claude-sonnet-4-5-20250929", "Claude Sonnet 4.5"),
)
#: Short name → dated name, where that is known: for Haiku and Sonnet from recorded answers, for Opus from the SDK's list of models.
_DATED = {
    "claude-haiku-4-5": "claude-haiku-4-5-20251001",
    "claude-opus-4-5": "claude-opus-4-5-20251101",
    "claude-sonnet-4-5": "claude-sonnet-4-5-20250929",
}
#: Models that refuse ``thinking.type`` ``enabled``: Opus from 4.7 on; for Fable and Mythos it is a guess.
_ADAPTIVE_ONLY = ("claude-opus-4-7", "claude-opus-4-8", "claude-opus-5", "claude-fable-5", "claude-mythos-5")
_YES = {"supported": True}
_NO = {"supported": False}

Catalogue = Mapping[str, dict[str, Any]]


def dated(model: str) -> str:
    """The name under which a model answers."""
    return _DATED.get(model, model)


@cache
def knows_geography(model: str) -> bool:
    """Whether the model's answers name their ``inference_geo``. Models up to 4.5 answer ``not_available``."""
    return not any(part in model for part in ("-4-5", "-4-1", "-4-0", "-4-2025", "claude-3", "claude-2"))


def _model(id_: str, name: str) -> dict[str, Any]:
    small = "-4-5" in id_
    line = id_.split("-")[1]
    return {
        "type": "model",
        "id": id_,
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "line": line if line in ("haiku", "sonnet", "opus", "fable", "mythos") else None,
        "max_input_tokens": 200_000 if small else 1_000_000,
        "max_tokens": 64_000,
        "capabilities": {
            "batch": _YES,
            "citations": _YES,
            "code_execution": _YES,
            "context_management": _NO,
            "effort": {"supported": True, "low": _YES, "medium": _YES, "high": _YES, "xhigh": _YES, "max": _YES},
            "image_input": _YES,
            "pdf_input": _YES,
            "server_tools": {"supported": True, "code_execution": _YES, "web_search": _YES},
            "structured_outputs": _YES,
            "thinking": {
                "supported": True,
                "types": {
                    "adaptive": _NO if small else _YES,
                    "between_tools": _YES,
                    "disabled": _YES,
                    "enabled": _NO if id_.startswith(_ADAPTIVE_ONLY) else _YES,
                },
            },
        },
    }


#: id → ModelInfo, newest first
MODELS: dict[str, dict[str, Any]] = {id_: _model(id_, name) for id_, name in _MODELS}


def catalogue(changes: Mapping[str, Mapping[str, Any]]) -> Catalogue:
    """Id → ModelInfo, newest first: the known models with ``changes`` to their members. A new id adds a model at the end."""
    if not changes:
        return MODELS
    models = dict(MODELS)
    for id_, change in changes.items():
        models[dated(id_)] = {**(models.get(dated(id_)) or _model(id_, id_)), **change}
    return models


def find(models: Catalogue, name: str) -> dict[str, Any] | None:
    """The model of this name, which may be a short name; None when there is none."""
    return models.get(name) or models.get(dated(name))

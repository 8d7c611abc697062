"""The catalogue of models: names and limits for ``/v1/models``. A create call takes any name that starts with ``claude-``."""

from __future__ import annotations

from typing import Any

_MODELS = (
    ("claude-fable-5-2", "Claude Fable 5.2", "fable"),
    ("claude-mythos-5-2", "Claude Mythos 5.2", "mythos"),
    ("claude-haiku-5-5", "Claude Haiku 5.5", "haiku"),
    ("claude-sonnet-5-5", "Claude Sonnet 5.5", "sonnet"),
    ("claude-opus-5-5", "Claude Opus 5.5", "opus"),
    ("claude-fable-5-1", "Claude Fable 5.1", "fable"),
    ("claude-sonnet-5", "Claude Sonnet 5", "sonnet"),
    ("claude-opus-4-8", "Claude Opus 4.8", "opus"),
    ("claude-sonnet-4-6", "Claude Sonnet 4.6", "sonnet"),
    ("claude-haiku-4-5", "Claude Haiku 4.5", "haiku"),
)
_YES = {"supported": True}


def _model(id_: str, name: str, line: str) -> dict[str, Any]:
    return {
        "type": "model",
        "id": id_,
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "line": line,
        "max_input_tokens": 200_000,
        "max_tokens": 64_000,
        "capabilities": {
            "batch": _YES,
            "citations": _YES,
            "code_execution": _YES,
            "context_management": {"supported": False},
            "effort": {"supported": True, "low": _YES, "medium": _YES, "high": _YES, "xhigh": _YES, "max": _YES},
            "image_input": _YES,
            "pdf_input": _YES,
            "server_tools": {"supported": True, "code_execution": _YES, "web_search": _YES},
            "structured_outputs": _YES,
            "thinking": {"supported": True, "types": {"adaptive": _YES, "between_tools": _YES, "disabled": _YES, "enabled": _YES}},
        },
    }


#: id → ModelInfo, newest first. Dates and limits are placeholders; only the shape is the API's.
MODELS: dict[str, dict[str, Any]] = {id_: _model(id_, name, line) for id_, name, line in _MODELS}

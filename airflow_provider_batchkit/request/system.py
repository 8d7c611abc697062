"""The system prompt of a job: one text, or content blocks with their own members, such as cache markers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from airflow_provider_batchkit.exceptions import RequestError
from airflow_provider_batchkit.request.caching import CACHE_TTL_S, longest_ttl_s, marker_problem, markers_of


class Template(Protocol):
    """Turns a row into a text; see :class:`~airflow_provider_batchkit.request.template.RowTemplate`."""

    def render(self, row: Mapping[str, Any]) -> str:
        """:raises RequestError: the row does not give a text"""

    def render_all(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """:meth:`render` for each row."""


class SystemBlocks:
    """A system prompt of content blocks. Their texts are templates; all their other members are sent as they are."""

    def __init__(self, blocks: Sequence[Mapping[str, Any]], texts: Sequence[Template]) -> None:
        """:param texts: the template of each block's text"""
        self._blocks = [dict(block) for block in blocks]
        self._texts = list(texts)

    @classmethod
    def of(cls, blocks: Sequence[Mapping[str, Any]], template: Callable[[str, str], Template]) -> Self:
        """The blocks that a user gave.

        :param template: makes a template from a text and from the name that errors give it
        """
        return cls(blocks, [template(block["text"], f"system[{position}]") for position, block in enumerate(blocks)])

    def __len__(self) -> int:
        return len(self._blocks)

    def with_texts(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The blocks as they are sent."""
        return [{**block, "text": text} for block, text in zip(self._blocks, texts, strict=True)]

    def render(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The text of each block for one row.

        :raises RequestError: the row does not give a text
        """
        return tuple(text.render(row) for text in self._texts)

    def render_all(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
        """:meth:`render` for each row."""
        if not self._texts:
            return [()] * len(rows)
        return list(zip(*(text.render_all(rows) for text in self._texts), strict=True))


def system_problem(system: Any, name: str = "system") -> str | None:
    """Why the API would refuse a system prompt, its cache markers aside; None when it would not.

    :param name: what messages call it
    """
    if system is None or isinstance(system, str):
        return None
    if isinstance(system, bytes) or not isinstance(system, Sequence):
        return f"{name} must be a text or a list of content blocks, not {type(system).__name__}"
    for position, block in enumerate(system):
        where = f"{name}[{position}]"
        if not isinstance(block, Mapping):
            return f"{where} must be a content block, {{'type': 'text', 'text': …}}, not {type(block).__name__}"
        if block.get("type") != "text":
            return f"{where} has the type {block.get('type')!r}; a system prompt takes blocks of type 'text' alone"
        text = block.get("text")
        if not isinstance(text, str) or not text or text.isspace():
            return f"{where} has no text"
    return None


def marked(system: str | Sequence[Mapping[str, Any]], ttl: str) -> list[dict[str, Any]]:
    """A system prompt with a cache marker at its end; a text becomes a block.

    :param ttl: one of :data:`~airflow_provider_batchkit.request.caching.CACHE_TTL_S`
    :raises RequestError: for blocks that have markers of their own
    """
    blocks: list[dict[str, Any]] = [{"type": "text", "text": system}] if isinstance(system, str) else [dict(block) for block in system]
    for where, _ in markers_of(blocks, "system"):
        raise RequestError(f"{_marked_twice(where)}. Nothing was sent.")
    blocks[-1:] = [{**block, "cache_control": {"type": "ephemeral", "ttl": ttl}} for block in blocks[-1:]]
    return blocks


def _marked_twice(where: str) -> str:
    return f"cache_system marks the last block of the system prompt, and {where} has a cache_control of its own: leave one of them out"


def system_problem_of_task(
    system: Any, *, prompt: str | None, params: Mapping[str, Any], cache_system: Any = None, prime_cache: bool = False
) -> str | None:
    """Why a task's system prompt and its caching cannot work, as far as the parameters tell; None when nothing is wrong.

    :param system: templates of the rows' system prompt: a text, or content blocks
    :param params: the task's own params, which may have a system prompt that is no template
    """
    problem = system_problem(system) or system_problem(params.get("system"), "params['system']")
    if problem:
        return problem
    if system is not None and prompt is None:
        return (
            "system is a template over rows, and there is no prompt over them. Prompt strings and native requests take the system prompt "
            "that all of them share from params['system']"
        )
    given = params.get("system") if system is None else system
    if cache_system is not None:
        if cache_system not in tuple(CACHE_TTL_S):
            return f"cache_system must be '5m' or '1h', not {cache_system!r}"
        if not given:
            return "cache_system marks the system prompt, and there is none: give system together with prompt, or params['system']"
        marked_already = next(markers_of(given, "system"), None)
        if marked_already is not None:
            return _marked_twice(marked_already[0])
        given = marked(given, cache_system)
    problem = marker_problem({**params, "system": given})
    if problem:
        return problem
    if prime_cache and kept_for_s(system, params, cache_system) is None:
        return (
            "prime_cache needs cache_system, or a cache_control in a block of system or in a tool: without it nothing is written to the "
            "cache that other rows could read"
        )
    return None


def kept_for_s(system: Any, params: Mapping[str, Any], cache_system: str | None) -> int | None:
    """How long the API caches what the rows of a job have in common, in seconds; None where nothing is marked for its cache.

    The parameters are those of :func:`system_problem_of_task`, which has found no problem with them.
    """
    if cache_system is not None:
        return CACHE_TTL_S[cache_system]
    shared = {"tools": params.get("tools"), "system": params.get("system") if system is None else system}
    return longest_ttl_s(*(marker for name, blocks in shared.items() for _, marker in markers_of(blocks, name)))

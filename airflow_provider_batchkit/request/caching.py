"""Cache markers: the ``cache_control`` members of a request. Each ends a prefix that the API may keep for later requests.

The rules are those of https://platform.claude.com/docs/en/build-with-claude/prompt-caching. The API's refusals of requests that break
them were reported in public issues. Checked 2026-11-26.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: seconds for which a cached prompt lives after its last use
CACHE_TTL_S = {"5m": 300, "1h": 3600}
_TTLS = tuple(CACHE_TTL_S)
#: the ttl of a marker that names none
_DEFAULT_TTL = "5m"
#: the most markers of a request, over tools, system and messages
_MOST_MARKERS = 4


def markers_of(blocks: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The cache markers of content blocks or tools, each with the path of what it marks. A text has no markers."""
    if isinstance(blocks, str | bytes) or not isinstance(blocks, Sequence):
        return
    for position, block in enumerate(blocks):
        if isinstance(block, Mapping) and block.get("cache_control") is not None:
            yield f"{path}[{position}]", block["cache_control"]


def marker_problem(params: Mapping[str, Any]) -> str | None:
    """Why the API would refuse the cache markers of a request; None when it would not. Blocks inside of blocks are not looked at."""
    found = list(_markers(params))
    for where, marker in found:
        if not isinstance(marker, Mapping) or marker.get("type") != "ephemeral" or marker.get("ttl", _DEFAULT_TTL) not in _TTLS:
            return f"the cache_control of {where} must be {{'type': 'ephemeral'}}, with a ttl of '5m' or '1h' if any, not {marker!r}"
    if len(found) > _MOST_MARKERS:
        return f"{len(found)} cache_control markers, and a request may have {_MOST_MARKERS}: {', '.join(where for where, _ in found)}"
    short = None
    for where, marker in found:
        if marker.get("ttl", _DEFAULT_TTL) == _DEFAULT_TTL:
            short = short or where
        elif short is not None:
            return (
                f"the cache_control of {where} has the ttl '1h' and comes after that of {short} with '5m': the longer one must come first. "
                "The order is tools, system, messages"
            )
    return None


def longest_ttl_s(*markers: Any) -> int | None:
    """How long the API keeps the longest-lived of the marked prefixes, in seconds; None without a marker."""
    return max((CACHE_TTL_S[marker.get("ttl", _DEFAULT_TTL)] for marker in markers), default=None)


def _markers(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The cache markers of a request in the order in which the API takes them."""
    for name in ("tools", "system"):
        yield from markers_of(params.get(name), name)
    content: Any = None
    for position, message in enumerate(params.get("messages") or ()):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str):
            yield from markers_of(content, f"messages[{position}].content")
    automatic = params.get("cache_control")
    # the automatic marker marks the last block, and does not count where that block has its own marker
    if automatic is not None and not any(markers_of(content[-1:] if isinstance(content, Sequence) else None, "")):
        yield "params", automatic

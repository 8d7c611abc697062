"""Result lines of an undocumented shape, such as a newer API or one of its bugs may send.

``CHANGES`` names the changes. As faults they change the lines of one reading; as markers (with ``-`` for ``_``) the lines of one request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

Line = dict[str, Any]


class _Owner(msgspec.Struct):
    custom_id: str = ""


_owner = msgspec.json.Decoder(_Owner)
#: A placeholder for half of a surrogate pair until the line is encoded, since no encoder writes such a half.
_SURROGATE = "\ufdd0"
_ESCAPE = rb"\ud800"


def custom_id_of(line: bytes) -> str:
    """The ``custom_id`` of a result line; ``""`` when it has none."""
    return _owner.decode(line).custom_id if line else ""


def changed(line: bytes, kind: str) -> bytes:
    """A result line after the change ``kind`` of ``CHANGES``. A line without the member that the change needs stays as it is."""
    decoded = _decoded(line)
    CHANGES[kind](decoded)
    return _encoded(decoded)


def with_member(line: bytes, path: str, value: Any) -> bytes:
    """A result line with ``value`` as its member at ``path``, or without it for ``UNSET``. A path that does not exist changes nothing."""
    decoded = _decoded(line)
    *way, last = path.split(".")
    node: Any = decoded
    for part in way:
        node = _child(node, part)
    if isinstance(node, dict):
        if value is msgspec.UNSET:
            node.pop(last, None)
        else:
            node[last] = value
    elif isinstance(node, list) and last.isdecimal() and int(last) < len(node):
        node[int(last) : int(last) + 1] = [] if value is msgspec.UNSET else [value]
    return _encoded(decoded)


def _child(node: Any, part: str) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    return node[int(part)] if isinstance(node, list) and part.isdecimal() and int(part) < len(node) else None


def _decoded(line: bytes) -> Line:
    return msgspec.json.decode(line.replace(_ESCAPE, _SURROGATE.encode()))  # type: ignore[no-any-return]


def _encoded(line: Line) -> bytes:
    return msgspec.json.encode(line).replace(_SURROGATE.encode(), _ESCAPE) + b"\n"


def _message(line: Line) -> Line:
    """The message of a line; for a line without one an empty mapping, so that changes to it have no effect."""
    message = line["result"].get("message")
    return message if isinstance(message, dict) else {}


def _null_counters(line: Line) -> None:
    """Makes every counter null but those of plain input and output."""
    usage = _message(line).get("usage") or {}
    usage.update(dict.fromkeys([name for name in usage if name not in ("input_tokens", "output_tokens")]))


def _unknown_members(line: Line) -> None:
    """Adds unknown members at every level."""
    novelty = {"since": "tomorrow", "list": [1, None, {"deep": True}]}
    line["novelty"] = novelty
    line["result"]["novelty"] = novelty
    message = _message(line)
    message["novelty"] = novelty
    message.get("usage", {})["novel_tokens"] = 7
    for block in message.get("content", ()):
        block["novelty"] = novelty


def _lone_surrogate(line: Line) -> None:
    r"""Adds half of a surrogate pair, as the raw escape ``\ud800``, to the text."""
    for block in _message(line).get("content", ()):
        if block.get("type") == "text":
            block["text"] += _SURROGATE


def _new_type(line: Line) -> None:
    """Makes the type of the result none of the four documented ones."""
    line["result"] = {"type": "postponed", "reason": {"code": "capacity"}}


def _flat_error(line: Line) -> None:
    """Makes the result an error that is not nested twice."""
    error = line["result"].get("error") or {}
    inner = error.get("error") or {"type": "api_error", "message": "Internal server error"}
    line["result"] = {"type": "errored", "error": {"type": inner["type"], "message": inner["message"]}}


def _no_usage(line: Line) -> None:
    """Removes the message's usage."""
    _message(line).pop("usage", None)


def _odd_block(line: Line) -> None:
    """Puts a block of an unknown type before the answer, with an object where other blocks have text."""
    _message(line).get("content", []).insert(0, {"type": "sketch", "text": {"strokes": [[0, 0], [1, 1]]}})


CHANGES: dict[str, Callable[[Line], None]] = {
    "null_counters": _null_counters,
    "unknown_members": _unknown_members,
    "lone_surrogate": _lone_surrogate,
    "new_type": _new_type,
    "flat_error": _flat_error,
    "no_usage": _no_usage,
    "odd_block": _odd_block,
}

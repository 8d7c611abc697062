"""The JSON of a result line: its documented members, and the handling of a line that has others.

A line that the typed decoder refuses is read leniently: odd members are skipped and named, and the rest is decoded as usual.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from types import NoneType
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec

_Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
_Count = _Number | None
_RAW = msgspec.Raw()
_B = TypeVar("_B")


class _Known(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """An object of a line. A member that is not listed makes the line an odd one."""


class CacheCreation(_Known):
    """Tokens written to the cache, by how long they stay."""

    ephemeral_5m_input_tokens: _Number = 0
    ephemeral_1h_input_tokens: _Number = 0


class ServerToolUse(_Known):
    """Calls of tools that the API runs."""

    web_search_requests: _Number = 0
    web_fetch_requests: _Number = 0


class Iteration(_Known):
    """One of the inferences that made an answer."""

    type: str = ""
    model: str | None = None
    input_tokens: _Count = None
    output_tokens: _Count = None
    cache_creation_input_tokens: _Count = None
    cache_read_input_tokens: _Count = None
    cache_creation: CacheCreation | None = None


class WireUsage(_Known):
    """What the API counted for a message."""

    input_tokens: _Count = None
    cache_creation_input_tokens: _Count = None
    cache_read_input_tokens: _Count = None
    cache_creation: CacheCreation | None = None
    output_tokens: _Count = None
    service_tier: Literal["batch", "standard", "priority"] | None = None
    inference_geo: str | None = None
    server_tool_use: ServerToolUse | None = None
    speed: str | None = None
    iterations: list[Iteration] | None = None
    output_tokens_details: msgspec.Raw = _RAW
    fallback_credit: msgspec.Raw = _RAW


class Plain(_Known):
    """A block of plain text, as nearly all are."""

    type: Literal["text"]
    text: str
    citations: None = None


class Block(_Known):
    """Any block of an answer: the members of every kind that the API documents."""

    type: str = ""
    text: str | None = None
    citations: Any = None
    id: msgspec.Raw = _RAW
    name: msgspec.Raw = _RAW
    input: msgspec.Raw = _RAW
    caller: msgspec.Raw = _RAW
    thinking: msgspec.Raw = _RAW
    signature: msgspec.Raw = _RAW
    data: msgspec.Raw = _RAW
    tool_use_id: msgspec.Raw = _RAW
    content: msgspec.Raw = _RAW
    encrypted_content: msgspec.Raw = _RAW
    file_id: msgspec.Raw = _RAW
    is_error: msgspec.Raw = _RAW
    server_name: msgspec.Raw = _RAW
    mcp_server_name: msgspec.Raw = _RAW
    toolset_name: msgspec.Raw = _RAW
    tools: msgspec.Raw = _RAW
    tool_changes: msgspec.Raw = _RAW
    from_: msgspec.Raw = msgspec.field(name="from", default=_RAW)
    to: msgspec.Raw = _RAW
    trigger: msgspec.Raw = _RAW


class Message(_Known, Generic[_B]):
    """An answer."""

    id: str | None = None
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str | None = None
    content: list[_B] = []
    stop_reason: str | None = None
    stop_sequence: Any = None
    stop_details: Any = None
    usage: WireUsage | None = None
    container: Any = None
    diagnostics: Any = None
    context_management: Any = None
    input_transformations: Any = None


class ErrorObject(_Known):
    """Why a request failed."""

    type: str | None = None
    message: str | None = None
    details: msgspec.Raw = _RAW


class Error(_Known):
    """The outer object of an error: the results nest an error twice."""

    type: msgspec.Raw = _RAW
    error: ErrorObject | None = None
    request_id: str | None = None


class Result(_Known, Generic[_B]):
    """What became of a request."""

    type: str
    message: Message[_B] | None = None
    error: Error | None = None


class Line(_Known, Generic[_B]):
    """A line of the results."""

    custom_id: str
    result: Result[_B]


decode_plain_lines = msgspec.json.Decoder(Line[Plain]).decode_lines
_decode_lines = msgspec.json.Decoder(Line[Block]).decode_lines
_decode_line = msgspec.json.Decoder(Line[Block]).decode
#: the errors that a decoder raises for a line that it cannot read
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_FIRST, _LAST_BUT_ONE = itemgetter(0), itemgetter(-2)

NULL, UNKNOWN, SURROGATE = "is null", "is not known to this version", "has a lone surrogate or bytes that are no UTF-8"
_USAGE = "result.message.usage."
#: an escape of a JSON string; a pair of surrogates is one
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


class UnreadableLineError(Exception):
    """The line holds no result."""


class Oddity(NamedTuple):
    """Something odd in a line: the member's path, and the problem. The member's value was skipped."""

    member: str
    problem: str


@dataclass(slots=True)
class ReadLine:
    """A line that was read by itself."""

    line: Line[Any]
    #: the line, as JSON that every database accepts
    json: bytes
    odd: list[Oddity] = field(default_factory=list)

    @property
    def usage_is_whole(self) -> bool:
        """Whether everything that the line says about its usage could be read. A counter that is null counts nothing."""
        return not any(o.member.startswith(_USAGE) and o.problem not in (NULL, UNKNOWN) for o in self.odd)


def read_together(whole: bytes, lines: Sequence[bytes]) -> tuple[Sequence[Line[Any]], bool] | None:
    """Decode ``lines``, which ``whole`` holds, and say whether all are plain text. None when one is odd, unreadable or blank."""
    try:
        # JSON may have newlines between its tokens, and no newline between two values. Where every line starts with { and ends with }, each
        # newline stands between two objects, and no JSON value contains that. A line that is too short raises IndexError
        if set(map(_FIRST, lines)) != {ord("{")} or set(map(_LAST_BUT_ONE, lines)) != {ord("}")}:
            return None
    except IndexError:
        return None
    for plain, decode in ((True, decode_plain_lines), (False, _decode_lines)):
        try:
            decoded: list[Line[Any]] = decode(whole)
        except UNREADABLE:
            continue
        return (decoded, plain) if len(decoded) == len(lines) else None
    return None


def read_alone(line: bytes) -> ReadLine:
    """Decode a line, and note what is odd in it.

    :raises UnreadableLineError: the line is no JSON object, or lacks its ``custom_id``, or has neither a type of result, a message nor an
        error, or lacks the message of an answer
    """
    try:
        read = ReadLine(_decode_line(line), line)
    except UNREADABLE:
        read = _read_leniently(line)
    if read.line.result.type == "succeeded" and read.line.result.message is None:
        raise UnreadableLineError("a succeeded result without a message")
    return read


def mended(line: bytes) -> bytes:
    """The JSON with U+FFFD for each lone surrogate, raw or escaped, and for bytes that are not UTF-8: no database accepts those."""
    try:
        line.decode()
    except UnicodeDecodeError:
        line = line.decode("utf-8", "replace").encode()
    if b"\\ud" in line or b"\\uD" in line:
        return _ESCAPE.sub(lambda found: rb"\ufffd" if found["lone"] else found[0], line)
    return line


def _read_leniently(line: bytes) -> ReadLine:
    odd = []
    whole = mended(line)
    if whole != line:
        odd.append(Oddity("the line", SURROGATE))
    try:
        value = json.loads(whole, parse_constant=_refuse)
    except (ValueError, RecursionError) as e:
        raise UnreadableLineError(str(e)) from e
    if not isinstance(value, dict) or not isinstance(value.get("custom_id"), str):
        raise UnreadableLineError("not an object with a custom_id")
    result = value.get("result")
    if not isinstance(result, dict):
        raise UnreadableLineError("no result with a type")
    if not isinstance(result.get("type"), str):
        if not result.get("message") and not result.get("error"):
            raise UnreadableLineError("no result with a type")
        # the result lands as one of an unknown type does
        result["type"] = ""
    _lift(result, odd)
    try:
        return ReadLine(_decode_line(msgspec.json.encode(_clean(value, Line[Block], "", odd))), whole, odd)
    except (*UNREADABLE, OverflowError) as e:
        raise UnreadableLineError(str(e)) from e


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _lift(result: dict[str, Any], odd: list[Oddity]) -> None:
    """Convert an error that is not nested, and an answer that is no list of blocks, to the documented form."""
    error, message = result.get("error"), result.get("message")
    if isinstance(error, str):
        result["error"] = {"error": {"message": error}}
        odd.append(Oddity("result.error", "is not an object"))
    elif isinstance(error, dict) and not isinstance(error.get("error"), dict) and error.get("type") != "error":
        result["error"] = {"error": error, "request_id": error.pop("request_id", None)}
        odd.append(Oddity("result.error", "is not nested"))
    if isinstance(message, dict) and isinstance(message.get("content"), str):
        message["content"] = [{"type": "text", "text": message["content"]}]
        odd.append(Oddity("result.message.content", "is not a list"))


#: stands in place of a value that is skipped
_GONE = object()


def _clean(value: Any, kind: Any, path: str, odd: list[Oddity]) -> Any:
    """The part of a value that a decoder of type ``kind`` accepts. What it would refuse is left out, and noted with its path."""
    if kind is msgspec.Raw or kind is Any:
        # apart from stop_details, only the presence of such a value is used
        return value if path == "result.message.stop_details" and _is_json(value) else bool(value) or None
    nullable = NoneType in get_args(kind)
    if value is None:
        if not nullable:
            odd.append(Oddity(path, NULL))
        return None if nullable else _GONE
    if nullable:
        (kind,) = [one for one in get_args(kind) if one is not NoneType]
    origin = get_origin(kind) or kind
    if origin is list and isinstance(value, list):
        items = [_clean(item, get_args(kind)[0], f"{path}[]", odd) for item in value]
        return [{} if item is _GONE else item for item in items]
    if isinstance(origin, type) and issubclass(origin, msgspec.Struct) and isinstance(value, dict):
        return _clean_members(value, kind, path, odd)
    return _clean_scalar(value, kind, path, odd)


def _clean_scalar(value: Any, kind: Any, path: str, odd: list[Oddity]) -> Any:
    for strict in (True, False):
        try:
            taken = msgspec.convert(value, kind, strict=strict)
        except msgspec.ValidationError:
            continue
        if not strict:
            odd.append(Oddity(path, f"is {_json_kind(value)}"))
        return taken
    odd.append(Oddity(path, f"is {_json_kind(value)}"))
    return _GONE


def _clean_members(value: dict[str, Any], kind: Any, path: str, odd: list[Oddity]) -> Any:
    members, cleaned, before = _members(kind), {}, len(odd)
    for name, member in value.items():
        here = f"{path}.{name}".lstrip(".")
        if name not in members:
            odd.append(Oddity(here, UNKNOWN))
            continue
        taken = _clean(member, members[name], here, odd)
        if taken is not _GONE:
            cleaned[name] = taken
    if kind is CacheCreation and any(o.problem != UNKNOWN for o in odd[before:]):
        # a partial split would hide the missing part, so the sum beside it counts
        return _GONE
    return cleaned


@cache
def _members(kind: Any) -> dict[str, Any]:
    return {member.encode_name: member.type for member in msgspec.structs.fields(kind)}


def _is_json(value: Any) -> bool:
    try:
        msgspec.json.encode(value)
    except (msgspec.MsgspecError, OverflowError, ValueError):
        return False
    return True


def _json_kind(value: Any) -> str:
    return {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}.get(type(value), "a number that it cannot be")

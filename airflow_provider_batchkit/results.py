"""JSONL bytes → typed results, reconciled against what was asked.

Lines are split on the byte ``\\n`` only: U+2028 and U+0085 are legal inside a JSON string, and splitting text on them breaks lines.
A line that cannot be read is kept as :class:`BrokenLine`, never dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from typing import Any

import msgspec

from airflow_provider_batchkit.model import BatchItem, RequestStatus, Usage

_SAMPLE_CHARS = 200


class _CacheCreation(msgspec.Struct, gc=False):
    ephemeral_5m_input_tokens: int = 0
    ephemeral_1h_input_tokens: int = 0


class _ServerToolUse(msgspec.Struct, gc=False):
    web_search_requests: int = 0


class _WireUsage(msgspec.Struct, gc=False):
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation: _CacheCreation | None = None
    server_tool_use: _ServerToolUse | None = None
    inference_geo: str | None = None
    speed: str | None = None


class _Block(msgspec.Struct, gc=False):
    type: str
    text: str | None = None


class _Message(msgspec.Struct, gc=False):
    model: str
    content: list[_Block]
    usage: _WireUsage
    stop_reason: str | None = None


class _ErrorObject(msgspec.Struct, gc=False):
    type: str
    message: str = ""


class _ErrorResponse(msgspec.Struct, gc=False):
    error: _ErrorObject


class _Result(msgspec.Struct, gc=False):
    type: str
    message: _Message | None = None
    error: _ErrorResponse | None = None


class _Line(msgspec.Struct, gc=False):
    custom_id: str
    result: _Result


class _RawResult(msgspec.Struct, gc=False):
    message: msgspec.Raw = msgspec.Raw()


class _RawLine(msgspec.Struct, gc=False):
    result: _RawResult


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_lines = msgspec.json.Decoder(_Line).decode_lines
_decode_raw_line = msgspec.json.Decoder(_RawLine).decode
_STATUSES = {status.value: status for status in (RequestStatus.ERRORED, RequestStatus.EXPIRED, RequestStatus.CANCELED)}


@dataclass(frozen=True, slots=True)
class BrokenLine:
    """A line of the results that is not what the API documents."""

    #: from 1
    number: int
    reason: str
    #: the beginning of the line
    sample: str


def _usage(wire: _WireUsage) -> Usage:
    cache = wire.cache_creation
    if cache is None:
        # without the split, all cache writes are of the default five minutes (API documentation, "Prompt caching")
        written_5m, written_1h = wire.cache_creation_input_tokens or 0, 0
    else:
        written_5m, written_1h = cache.ephemeral_5m_input_tokens, cache.ephemeral_1h_input_tokens
    return Usage(
        wire.input_tokens,
        wire.output_tokens,
        written_5m,
        written_1h,
        wire.cache_read_input_tokens or 0,
        wire.server_tool_use.web_search_requests if wire.server_tool_use is not None else 0,
        wire.inference_geo,
        wire.speed,
    )


class _Undocumented(Exception):
    """A line that is JSON and is not what the API documents."""


def _item(line: _Line, message_json: bytes | None = None) -> BatchItem:
    """:raises _Undocumented: for what the API does not send"""
    result = line.result
    message = result.message
    if result.type != "succeeded":
        status = _STATUSES.get(result.type)
        if status is None:
            raise _Undocumented(f"unknown result type {result.type!r}")
        error = result.error.error if result.error is not None else None
        return BatchItem(line.custom_id, status, error_type=error.type if error else None, error_message=error.message if error else None)
    if message is None:
        raise _Undocumented("a succeeded result without a message")
    blocks = message.content
    if len(blocks) == 1 and blocks[0].type == "text":
        text = blocks[0].text
    else:
        text = "".join([block.text or "" for block in blocks if block.type == "text"])
    return BatchItem(
        line.custom_id, RequestStatus.SUCCEEDED, text, message.stop_reason, message.model, _usage(message.usage), None, None, message_json
    )


def parse_line(line: bytes, number: int, *, keep_message: bool = True) -> BatchItem | BrokenLine:
    """One result line. Never raises: what cannot be read comes back as :class:`BrokenLine`.

    :param keep_message: keep the whole message as bytes on the item; what only needs text and usage is read in half the time without
    """
    try:
        decoded = _decode_line(line)
        keeps = keep_message and decoded.result.message is not None
        return _item(decoded, bytes(_decode_raw_line(line).result.message) if keeps else None)
    except (msgspec.MsgspecError, UnicodeDecodeError, _Undocumented) as e:
        return BrokenLine(number, str(e), line[:_SAMPLE_CHARS].decode("utf-8", "replace"))


def parse_pieces(chunks: Iterable[bytes], *, keep_message: bool = True) -> Iterator[list[BatchItem | BrokenLine]]:
    """Raw chunks of a results stream → items, as many together as a chunk completes. Blank lines are skipped."""
    before = 0
    for block in _whole_lines(chunks):
        # finds newlines five times as fast as counting or splitting
        lines = BytesIO(block).readlines()
        yield _parse(block, lines, before, keep_message)
        before += len(lines)


def _whole_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, cut behind the last newline of each chunk that has one; at the end what follows the last newline of all."""
    rest: list[bytes] = []
    for chunk in chunks:
        end = chunk.rfind(b"\n") + 1
        if end:
            yield b"".join([*rest, chunk[:end]])
            rest.clear()
        rest.append(chunk[end:])
    yield b"".join(rest)


def _parse(block: bytes, lines: Sequence[bytes], before: int, keep_message: bool) -> list[BatchItem | BrokenLine]:
    """:param before: the number of the line before these ``lines``, which are the ``block``"""
    # JSON may have newlines between its tokens and values without one between: here each stands between two objects, which no value holds
    if not keep_message and {line[:1] for line in lines} == {b"{"} and {line[-2:] for line in lines} == {b"}\n"}:
        try:
            decoded = _decode_lines(block)
            if len(decoded) == len(lines):
                return list(map(_item, decoded))
        except (msgspec.MsgspecError, UnicodeDecodeError, _Undocumented):
            pass  # one of them is broken: it is looked for
    return [
        parse_line(line.rstrip(b"\n"), number, keep_message=keep_message)
        for number, line in enumerate(lines, start=before + 1)
        if not line.isspace()
    ]


def parse_stream(chunks: Iterable[bytes], *, keep_message: bool = True) -> Iterator[BatchItem | BrokenLine]:
    """:func:`parse_pieces`, one item at a time."""
    return chain.from_iterable(parse_pieces(chunks, keep_message=keep_message))


@dataclass(slots=True)
class StreamFaults:
    """What was wrong with a result stream: counts, and a first sample of each kind for the log."""

    broken: int = 0
    duplicate: int = 0
    foreign: int = 0
    #: results that the API counts and the stream did not hold, also when read a second time
    short: int = 0
    broken_sample: str | None = None
    duplicate_sample: str | None = None
    foreign_sample: str | None = None

    def add_broken(self, line: BrokenLine) -> None:
        self.broken += 1
        self.broken_sample = self.broken_sample or f"line {line.number}: {line.reason}: {line.sample!r}"

    def add_duplicate(self, item: BatchItem) -> None:
        self.duplicate += 1
        self.duplicate_sample = self.duplicate_sample or item.custom_id

    def add_foreign(self, item: BatchItem) -> None:
        self.foreign += 1
        self.foreign_sample = self.foreign_sample or item.custom_id

    def __bool__(self) -> bool:
        return bool(self.broken or self.duplicate or self.foreign or self.short)

    def __add__(self, other: StreamFaults) -> StreamFaults:
        return StreamFaults(
            self.broken + other.broken,
            self.duplicate + other.duplicate,
            self.foreign + other.foreign,
            self.short + other.short,
            self.broken_sample or other.broken_sample,
            self.duplicate_sample or other.duplicate_sample,
            self.foreign_sample or other.foreign_sample,
        )

    def to_json(self) -> dict[str, Any]:
        return {"broken_lines": self.broken, "duplicate_lines": self.duplicate, "foreign_lines": self.foreign, "short_by": self.short}


class Reconciler:
    """Gives every asked request exactly one outcome.

    :meth:`accept` says whether an item is the first answer to something that was asked; duplicates, foreign ids and broken lines are
    counted in ``faults``. Resident: the ids asked and the ids answered.
    """

    def __init__(self, asked: AbstractSet[str] | None) -> None:
        """:param asked: every ``custom_id`` of the batch, or None when nobody knows (a batch submitted elsewhere)"""
        self.faults = StreamFaults()
        self.answered: set[str] = set()
        self._asked = asked
        self._this_read = self.answered

    def read_again(self) -> None:
        """The stream starts over: what was answered stays answered, and what is wrong with the stream is counted anew."""
        self.faults = StreamFaults()
        self._this_read = set()

    def short_of(self, expected: int) -> int:
        """How many lines fewer than ``expected`` the stream has held so far."""
        return max(expected - len(self.answered) - self.faults.broken - self.faults.foreign, 0)

    def accept_all(self, items: Sequence[BatchItem | BrokenLine]) -> list[BatchItem]:
        """Those of the items that are first answers."""
        if self._this_read is self.answered:
            ids = {item.custom_id for item in items if isinstance(item, BatchItem)}
            if len(ids) == len(items) and self.answered.isdisjoint(ids) and (self._asked is None or ids <= self._asked):
                self.answered |= ids
                return list(items)  # type: ignore[arg-type] # none of them is broken
        return [item for item in items if self.accept(item)]  # type: ignore[misc] # nor is any that is accepted

    def accept(self, item: BatchItem | BrokenLine) -> bool:
        """Whether the item is a first answer."""
        if isinstance(item, BrokenLine):
            self.faults.add_broken(item)
            return False
        custom_id = item.custom_id
        if custom_id in self._this_read:
            self.faults.add_duplicate(item)
            return False
        if self._asked is not None and custom_id not in self._asked:
            self.faults.add_foreign(item)
            return False
        self._this_read.add(custom_id)
        if self._this_read is self.answered:
            return True
        first = custom_id not in self.answered
        self.answered.add(custom_id)
        return first

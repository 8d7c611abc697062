"""JSONL bytes → typed results, reconciled against what was asked.

Lines are split on the byte ``\\n`` only: U+2028 and U+0085 are legal inside a JSON string, and splitting text on them breaks lines.
A line that cannot be read is kept as :class:`BrokenLine`, never dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from operator import itemgetter
from typing import Any

import msgspec

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.model import BatchItem, RequestStatus, Usage

_SAMPLE_CHARS = 200
#: of results that are read together: a step for all of them then costs each next to nothing, and memory holds them a few times over
_BLOCK_BYTES = 1 << 19


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
_NOT_CACHED = _CacheCreation()
_FIRST, _LAST_BUT_ONE = itemgetter(0), itemgetter(-2)
#: of a result that is not billed
_NO_MESSAGE = _Message("", [], _WireUsage(0, 0))
_STATUSES = {status.value: status for status in (RequestStatus.ERRORED, RequestStatus.EXPIRED, RequestStatus.CANCELED)}


@dataclass(frozen=True, slots=True)
class BrokenLine:
    """A line of the results that is not what the API documents."""

    #: from 1
    number: int
    reason: str
    #: the beginning of the line
    sample: str


class _Undocumented(Exception):
    """A line that is JSON and is not what the API documents."""


def _item(line: _Line, message_json: bytes | None = None) -> BatchItem:
    """:raises _Undocumented: for what the API does not send"""
    result = line.result
    if result.type != "succeeded":
        error = _error(result)
        kind, why = (None, None) if error is None else (error.type, error.message)
        return BatchItem(line.custom_id, _failure(result), error_type=kind, error_message=why)
    message = _message(result)
    usage = message.usage
    written = _written(usage)
    counted = Usage(
        usage.input_tokens,
        usage.output_tokens,
        written.ephemeral_5m_input_tokens,
        written.ephemeral_1h_input_tokens,
        usage.cache_read_input_tokens or 0,
        _searches(usage),
        usage.inference_geo,
        usage.speed,
    )
    text, reason = _text(message.content), message.stop_reason
    return BatchItem(line.custom_id, RequestStatus.SUCCEEDED, text, reason, message.model, counted, None, None, message_json)


def _failure(result: _Result) -> RequestStatus:
    status = _STATUSES.get(result.type)
    if status is None:
        raise _Undocumented(f"unknown result type {result.type!r}")
    return status


def _error(result: _Result) -> _ErrorObject | None:
    return None if result.error is None else result.error.error


def _message(result: _Result) -> _Message:
    if result.message is None:
        raise _Undocumented("a succeeded result without a message")
    return result.message


def _text(content: Sequence[_Block]) -> str | None:
    if len(content) == 1 and content[0].type == "text":
        return content[0].text
    return "".join([block.text or "" for block in content if block.type == "text"])


def _written(usage: _WireUsage) -> _CacheCreation:
    # without the split, all cache writes are of the default five minutes (API documentation, "Prompt caching")
    if usage.cache_creation is not None:
        return usage.cache_creation
    return _CacheCreation(usage.cache_creation_input_tokens) if usage.cache_creation_input_tokens else _NOT_CACHED


def _searches(usage: _WireUsage) -> int:
    return 0 if usage.server_tool_use is None else usage.server_tool_use.web_search_requests


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


def parse_stream(chunks: Iterable[bytes], *, keep_message: bool = True) -> Iterator[BatchItem | BrokenLine]:
    """Raw chunks of a results stream → items. Blank lines are skipped."""
    before = 0
    for whole in _whole_lines(chunks):
        lines = _lines(whole)
        yield from _parse_each(lines, before, keep_message=keep_message)
        before += len(lines)


def parse_blocks(chunks: Iterable[bytes], *, block_bytes: int = _BLOCK_BYTES) -> Iterator[tuple[ResultBlock, list[BrokenLine]]]:
    """:func:`parse_stream` without messages, some hundred lines together; and what could not be read of them.

    :param block_bytes: a block holds the lines that are whole when so many bytes have come since the last one
    """
    before = 0
    for whole in _whole_lines(chunks, block_bytes):
        lines = _lines(whole)
        block, broken = _block(whole, lines), []
        if block is None:
            items = list(_parse_each(lines, before, keep_message=False))
            block = ResultBlock.of([item for item in items if isinstance(item, BatchItem)])
            broken = [item for item in items if isinstance(item, BrokenLine)]
        yield block, broken
        before += len(lines)


def _whole_lines(chunks: Iterable[bytes], at_least: int = 1) -> Iterator[bytes]:
    """The same bytes, cut behind the last newline that came with so many of them; at the end what follows the last newline of all."""
    rest: list[bytes] = []
    size = 0
    for chunk in chunks:
        size += len(chunk)
        end = chunk.rfind(b"\n") + 1 if size >= at_least else 0
        if end:
            yield b"".join([*rest, chunk[:end]])
            rest.clear()
            size = len(chunk) - end
        rest.append(chunk[end:])
    if any(rest):
        yield b"".join(rest)


def _lines(whole: bytes) -> list[bytes]:
    # finds newlines five times as fast as counting or splitting
    return BytesIO(whole).readlines()


def _parse_each(lines: Iterable[bytes], before: int, *, keep_message: bool) -> Iterator[BatchItem | BrokenLine]:
    """:param before: the number of the line before these"""
    for number, line in enumerate(lines, start=before + 1):
        if not line.isspace():
            yield parse_line(line.rstrip(b"\n"), number, keep_message=keep_message)


def _block(whole: bytes, lines: Sequence[bytes]) -> ResultBlock | None:
    """The results of ``lines``, which are ``whole``; None when one of them is not what the API documents, or is blank."""
    try:
        # JSON may have newlines between its tokens and values without one between: here each stands between two objects, which no value
        # holds; a line too short for that is an IndexError
        if set(map(_FIRST, lines)) != {ord("{")} or set(map(_LAST_BUT_ONE, lines)) != {ord("}")}:
            return None
        decoded = _decode_lines(whole)
        return _columns([line.custom_id for line in decoded], [line.result for line in decoded]) if len(decoded) == len(lines) else None
    except (IndexError, msgspec.MsgspecError, UnicodeDecodeError, _Undocumented):
        return None


def _columns(custom_ids: list[str], results: list[_Result]) -> ResultBlock:
    """:raises _Undocumented: for what the API does not send"""
    billed = [result.type == "succeeded" for result in results]
    messages = [_message(result) if counts else _NO_MESSAGE for result, counts in zip(results, billed, strict=True)]
    texts = [_text(message.content) for message in messages]
    models: list[str | None] = [message.model for message in messages]
    usages = [message.usage for message in messages]
    written = [_written(usage) for usage in usages]
    statuses = ["succeeded"] * len(results)
    error_types: list[str | None] = [None] * len(results)
    error_messages: list[str | None] = [None] * len(results)
    for place in [place for place, counts in enumerate(billed) if not counts]:
        statuses[place], texts[place], models[place] = _failure(results[place]).value, None, None
        error = _error(results[place])
        if error is not None:
            error_types[place], error_messages[place] = error.type, error.message
    return ResultBlock(
        custom_ids=custom_ids,
        statuses=statuses,
        texts=texts,
        stop_reasons=[message.stop_reason for message in messages],
        error_types=error_types,
        error_messages=error_messages,
        models=models,
        billed=billed,
        input_tokens=[usage.input_tokens for usage in usages],
        output_tokens=[usage.output_tokens for usage in usages],
        cache_write_5m_tokens=[one.ephemeral_5m_input_tokens for one in written],
        cache_write_1h_tokens=[one.ephemeral_1h_input_tokens for one in written],
        cache_read_tokens=[usage.cache_read_input_tokens or 0 for usage in usages],
        web_searches=[_searches(usage) for usage in usages],
        inference_geos=[usage.inference_geo for usage in usages],
        speeds=[usage.speed for usage in usages],
    )


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

    def add_duplicate(self, custom_id: str) -> None:
        self.duplicate += 1
        self.duplicate_sample = self.duplicate_sample or custom_id

    def add_foreign(self, custom_id: str) -> None:
        self.foreign += 1
        self.foreign_sample = self.foreign_sample or custom_id

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

    def __init__(self, asked: Mapping[str, str] | None) -> None:
        """:param asked: every ``custom_id`` of the batch, with the key of the row that pays for it; None when nobody knows them (a batch
        submitted elsewhere)
        """
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

    def accept_block(self, block: ResultBlock, broken: Iterable[BrokenLine]) -> ResultBlock:
        """Those of a block's results that are first answers, with their keys."""
        for line in broken:
            self.faults.add_broken(line)
        keys = None if self._asked is None else list(map(self._asked.get, block.custom_ids))
        ids = set(block.custom_ids)
        if (
            self._this_read is self.answered
            and len(ids) == len(block)
            and self.answered.isdisjoint(ids)
            and (keys is None or None not in keys)
        ):
            self.answered |= ids
        else:
            places = [place for place, custom_id in enumerate(block.custom_ids) if self._accept(custom_id)]
            block, keys = block.rows(places), keys and [keys[place] for place in places]
        block.keys = keys  # type: ignore[assignment] # what was accepted was asked
        return block

    def accept(self, item: BatchItem | BrokenLine) -> bool:
        """Whether the item is a first answer."""
        if isinstance(item, BrokenLine):
            self.faults.add_broken(item)
            return False
        return self._accept(item.custom_id)

    def _accept(self, custom_id: str) -> bool:
        if custom_id in self._this_read:
            self.faults.add_duplicate(custom_id)
            return False
        if self._asked is not None and custom_id not in self._asked:
            self.faults.add_foreign(custom_id)
            return False
        self._this_read.add(custom_id)
        if self._this_read is self.answered:
            return True
        first = custom_id not in self.answered
        self.answered.add(custom_id)
        return first

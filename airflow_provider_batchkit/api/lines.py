"""Lines of the results → a block, column by column.

Nearly all lines are alike: plain text, finished, billed as their usage says. The others are found by column, and only their rows are
looked at again. Memory: a few times the lines of one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec

from airflow_provider_batchkit.api import decode
from airflow_provider_batchkit.api.blocks import BilledPart, ResultBlock
from airflow_provider_batchkit.model import REFUSED, TRUNCATED, UNFINISHED, USAGE_UNKNOWN, RequestStatus, Usage

_T = TypeVar("_T")
_SAMPLE_CHARS = 200
_SHOWN_BYTES = 1_000

_SUCCEEDED, _INVALID, _ERRORED = (s.value for s in (RequestStatus.SUCCEEDED, RequestStatus.INVALID_OUTPUT, RequestStatus.ERRORED))
_NOT_ANSWERED = {status.value for status in (RequestStatus.ERRORED, RequestStatus.EXPIRED, RequestStatus.CANCELED)}
#: the ``stop_reason`` of an answer that is whole
FINISHED = frozenset({"end_turn", "stop_sequence", "tool_use"})
#: ``error_type`` of a result of an unknown type
_UNKNOWN_RESULT = "unknown_result"
#: the message of a result that is not billed
_NO_MESSAGE: decode.Message[Any] = decode.Message(usage=decode.WireUsage(input_tokens=0, output_tokens=0))
_UNTOLD = decode.WireUsage()
_NOT_CACHED = decode.CacheCreation()


@dataclass(frozen=True, slots=True)
class BrokenLine:
    """A line of the results that cannot be read."""

    #: the line's number, from 1
    number: int
    reason: str
    #: the beginning of the line
    sample: str


@dataclass(frozen=True, slots=True)
class OddMember:
    """A member of a line that is not as the API documents it. The member was skipped, and the answer counts."""

    custom_id: str
    #: its path in the line
    member: str
    problem: str


LineFault = BrokenLine | OddMember


def read_lines(whole: bytes, lines: Sequence[bytes], before: int, *, keep_messages: bool) -> tuple[ResultBlock, list[LineFault]]:
    """The results of ``lines``, which ``whole`` holds, and the faults in them. Blank lines are skipped.

    :param before: the number of the line before these
    :param keep_messages: keep each whole message as bytes
    """
    together = decode.read_together(whole, lines)
    read = _one_by_one(lines, before) if together is None else _Read(together[0], lines, plain=together[1])
    columns = _Columns(read)
    if columns.lack_a_message:
        read = _one_by_one(lines, before)
        columns = _Columns(read)
    block = columns.block()
    if keep_messages:
        block.messages = [
            bytes(_decode_message(line).result.message) if counts else None for line, counts in zip(read.json, block.billed, strict=True)
        ]
    return block, read.faults


@dataclass(slots=True)
class _Read:
    """Decoded lines."""

    lines: Sequence[decode.Line[Any]]
    json: Sequence[bytes]
    #: whether all answers are plain text
    plain: bool = False
    faults: list[LineFault] = field(default_factory=list)
    #: the places of lines whose usage could not be read whole
    half_told: set[int] = field(default_factory=set)


def _one_by_one(lines: Sequence[bytes], before: int) -> _Read:
    found: list[decode.Line[Any]] = []
    texts: list[bytes] = []
    read = _Read(found, texts)
    for number, line in enumerate(lines, start=before + 1):
        if line.isspace():
            continue
        line = line.rstrip(b"\n")
        try:
            one = decode.read_alone(line)
        except decode.UnreadableLineError as e:
            read.faults.append(BrokenLine(number, str(e), line[:_SAMPLE_CHARS].decode("utf-8", "replace")))
            continue
        if not one.usage_is_whole:
            read.half_told.add(len(found))
        read.faults += [OddMember(one.line.custom_id, member, problem) for member, problem in dict.fromkeys(one.odd)]
        found.append(one.line)
        texts.append(one.json)
    return read


class _Columns:
    """Builds the columns of a block."""

    def __init__(self, read: _Read) -> None:
        self._read = read
        self._results = [line.result for line in read.lines]
        #: whether the API counts anything for the result
        self._billed = [result.type == _SUCCEEDED for result in self._results]
        #: see :attr:`lack_a_message`
        self._messages: list[Any] = [
            result.message if counts else _NO_MESSAGE for result, counts in zip(self._results, self._billed, strict=True)
        ]
        self._statuses = [_SUCCEEDED] * len(self._results)
        self._error_types: list[str | None] = [None] * len(self._results)
        self._error_messages: list[str | None] = [None] * len(self._results)
        self._request_ids: list[str | None] = [None] * len(self._results)

    @property
    def lack_a_message(self) -> bool:
        """Whether an answer has no message, which makes its line unreadable."""
        return None in self._messages

    def block(self) -> ResultBlock:
        """The lines' results."""
        if not all(self._billed):
            for place in [place for place, counts in enumerate(self._billed) if not counts]:
                self._note_failure(place)
        messages = self._messages
        usages = [message.usage or _UNTOLD for message in messages]
        written = [usage.cache_creation or _written(usage) for usage in usages]
        texts, contents = self._texts()
        details = [message.stop_details for message in messages]
        reasons = [message.stop_reason for message in messages]
        block = ResultBlock(
            custom_ids=[line.custom_id for line in self._read.lines],
            statuses=self._statuses,
            texts=texts,
            stop_reasons=reasons,
            error_types=self._error_types,
            error_messages=self._error_messages,
            models=[message.model for message in messages],
            billed=self._billed,
            # _bill replaces missing counts
            input_tokens=[usage.input_tokens for usage in usages],  # type: ignore[misc]
            output_tokens=[usage.output_tokens for usage in usages],  # type: ignore[misc]
            cache_write_5m_tokens=[one.ephemeral_5m_input_tokens for one in written],
            cache_write_1h_tokens=[one.ephemeral_1h_input_tokens for one in written],
            cache_read_tokens=[usage.cache_read_input_tokens or 0 for usage in usages],
            web_searches=[0 if usage.server_tool_use is None else usage.server_tool_use.web_search_requests for usage in usages],
            inference_geos=[usage.inference_geo for usage in usages],
            speeds=[usage.speed for usage in usages],
            message_ids=[message.id for message in messages],
            request_ids=self._request_ids,
            contents=contents,
            stop_details=[_json(one) for one in details] if any(details) else None,
        )
        if not (reasons and reasons[0] in FINISHED and reasons.count(reasons[0]) == len(reasons)):
            self._tell_unfinished(block)
        self._bill(block, usages)
        return block

    # --- what failed --------------------------------------------------------------------------------------------------------------

    def _note_failure(self, place: int) -> None:
        result, line = self._results[place], self._read.lines[place]
        kind = result.type
        self._statuses[place] = kind
        if result.error is not None:
            self._request_ids[place] = result.error.request_id
            if result.error.error is not None:
                self._error_types[place], self._error_messages[place] = result.error.error.type, result.error.error.message
        if kind in _NOT_ANSWERED:
            return
        self._read.faults.append(OddMember(line.custom_id, "result.type", f"is {kind!r:.60}, which this version does not know"))
        if result.message is not None:
            self._billed[place], self._messages[place] = True, result.message
        self._statuses[place] = _ERRORED if result.message is None else _INVALID
        self._error_types[place] = self._error_types[place] or _UNKNOWN_RESULT
        if not self._error_messages[place]:
            shown = bytes(_decode_result(self._read.json[place]).result)[:_SHOWN_BYTES].decode("utf-8", "replace")
            self._error_messages[place] = f"The API gave a result of a type that this version does not know: {shown}"

    # --- what was answered --------------------------------------------------------------------------------------------------------

    def _texts(self) -> tuple[list[str | None], list[str | None] | None]:
        """The texts of the answers, and the content of those that are more than text."""
        answers = [message.content for message in self._messages]
        if self._read.plain:
            texts = [blocks[0].text if len(blocks) == 1 else None for blocks in answers]
        else:
            texts = [blocks[0].text if len(blocks) == 1 and _is_plain(blocks[0]) else None for blocks in answers]
        contents: list[str | None] | None = None
        if None in texts:
            for place in [place for place, text in enumerate(texts) if text is None and self._billed[place]]:
                texts[place], content = _read_blocks(answers[place], self._read.json[place])
                if content is not None:
                    contents = contents or [None] * len(texts)
                    contents[place] = content
        return texts, contents

    def _tell_unfinished(self, block: ResultBlock) -> None:
        """Give each unfinished answer its ``error_type`` and its status."""
        for place, (reason, counts) in enumerate(zip(block.stop_reasons, block.billed, strict=True)):
            if reason in FINISHED or not counts:
                continue
            kind = UNFINISHED.get(reason or "")
            if kind is None:
                problem = f"is {reason!r:.60}, which this version does not know: the answer counts as finished"
                self._read.faults.append(OddMember(block.custom_ids[place], "result.message.stop_reason", problem))
                continue
            if self._statuses[place] != _SUCCEEDED:
                continue
            has_text = any((one.text or "").strip() for one in self._messages[place].content if one.type == "text")
            self._error_types[place] = kind
            self._error_messages[place] = _why_unfinished(kind, reason, self._messages[place].stop_details)
            self._statuses[place] = _SUCCEEDED if kind == TRUNCATED and has_text else _INVALID

    # --- what is billed -----------------------------------------------------------------------------------------------------------

    def _bill(self, block: ResultBlock, usages: Sequence[decode.WireUsage]) -> None:
        """Find the results that are not billed as their own usage at their own model, and note how they are billed."""
        untold = self._read.half_told
        if None in block.input_tokens or None in block.output_tokens:
            untold = untold | self._untold(block, usages)
        in_doubt = [place for place, usage in enumerate(usages) if usage.cache_creation_input_tokens or usage.iterations]
        if in_doubt:
            untold = untold | self._half_split(block, usages, in_doubt)
        special = {place for place in untold if block.billed[place]}
        special.update([place for place, usage in enumerate(usages) if usage.iterations])
        if REFUSED in self._error_types:
            special.update([place for place, kind in enumerate(self._error_types) if kind == REFUSED and self._is_before_output(place)])
        if not special:
            return
        bills: list[tuple[BilledPart, ...] | None] = [None] * len(block)
        for place in special:
            bills[place] = self._parts(block, place, usages[place], told=place not in untold)
        block.bills = bills

    def _untold(self, block: ResultBlock, usages: Sequence[decode.WireUsage]) -> set[int]:
        """The places where the token count of the prompt or the answer is missing or null. Such a count is taken as zero."""
        places: set[int] = set()
        columns: list[tuple[str, Any]] = [("input_tokens", block.input_tokens), ("output_tokens", block.output_tokens)]
        for name, column in columns:
            for place in [place for place, count in enumerate(column) if count is None]:
                member, problem = ("", "is missing") if usages[place] is _UNTOLD else (f".{name}", "is missing or null")
                self._read.faults.append(OddMember(block.custom_ids[place], f"result.message.usage{member}", problem))
                column[place] = 0
                places.add(place)
        return places

    def _half_split(self, block: ResultBlock, usages: Sequence[decode.WireUsage], among: Iterable[int]) -> set[int]:
        """The places with more cache writes than their split by lifetime accounts for. The price of the rest is unknown."""
        places = {place for place in among if any(map(_has_rest, (usages[place], *(usages[place].iterations or ()))))}
        for place in places:
            member = "result.message.usage.cache_creation"
            self._read.faults.append(OddMember(block.custom_ids[place], member, "tells fewer tokens than the sum beside it"))
        return places

    def _is_before_output(self, place: int) -> bool:
        return all(one.type == "fallback" for one in self._messages[place].content)

    def _parts(self, block: ResultBlock, place: int, usage: decode.WireUsage, *, told: bool) -> tuple[BilledPart, ...]:
        """The billed parts of a result. The result's counts become their sums."""
        model = block.models[place]
        own = Usage(*[column[place] for column in block.counts], block.inference_geos[place], block.speeds[place])  # type: ignore[call-arg,arg-type]
        parts = [(model, own)] if told or any(own.counts) else []
        if usage.iterations:
            parts = _iterations(usage.iterations, model, own)
        refusal = None
        if self._error_types[place] == REFUSED and self._is_before_output(place):
            refusal = _member(self._messages[place].stop_details, "category") or ""
        if usage.iterations:
            for column, counts in zip(block.counts, zip(*(one.counts for _, one in parts), strict=True), strict=True):
                column[place] = sum(counts)  # type: ignore[index]
            told = told and not any(i.input_tokens is None or i.output_tokens is None for i in usage.iterations)
        unknown = [] if told else [((model or "") + USAGE_UNKNOWN, Usage())]
        return tuple([BilledPart(name, part, refusal) for name, part in [*unknown, *parts]])


def _is_plain(block: decode.Block) -> bool:
    return block.type == "text" and block.text is not None and not block.citations


def _read_blocks(blocks: Sequence[Any], line: bytes) -> tuple[str, str | None]:
    """Text and content of an answer that is not one block of plain text. Without text, the input of the only tool call is the text."""
    text = "".join([block.text or "" for block in blocks if block.type == "text"])
    if all(map(_is_plain, blocks)):
        return text, None
    line = decode.mended(line)
    content = bytes(_decode_content(line).result.message.content)
    if not text.strip() and [block.type for block in blocks].count("tool_use") == 1:
        text = next(bytes(call.input).decode() for call in _decode_calls(content) if call.type == "tool_use")
    return text, content.decode()


def _why_unfinished(kind: str, reason: str | None, details: Any) -> str:
    if kind == TRUNCATED:
        return f"The answer was cut before its end; stop_reason is {reason}."
    if kind != REFUSED:
        return f"The answer is not finished: the API paused; stop_reason is {reason}."
    category, explanation = _member(details, "category"), _member(details, "explanation")
    why = f"The model refused to answer; stop_reason is {reason}"
    return f"{why}{f', category {category}' if category else ''}{f': {explanation}' if explanation else '.'}"


def _member(details: Any, name: str) -> str | None:
    value = details.get(name) if isinstance(details, dict) else None
    return value if isinstance(value, str) else None


def _written(usage: decode.WireUsage | decode.Iteration) -> decode.CacheCreation:
    # without the split, all cache writes are of the default five minutes (API documentation, "Prompt caching")
    if usage.cache_creation is not None:
        return usage.cache_creation
    return decode.CacheCreation(usage.cache_creation_input_tokens) if usage.cache_creation_input_tokens else _NOT_CACHED


def _has_rest(usage: decode.WireUsage | decode.Iteration) -> bool:
    """Whether tokens were written to the cache for a lifetime that the split does not name."""
    split = usage.cache_creation
    whole = usage.cache_creation_input_tokens
    return bool(split is not None and whole and whole > split.ephemeral_5m_input_tokens + split.ephemeral_1h_input_tokens)


def _iterations(iterations: Sequence[decode.Iteration], model: str | None, own: Usage) -> list[tuple[str | None, Usage]]:
    """The billed iterations of a request, each at its own model. The usage at the top excludes compaction and the advisor.

    Where a fallback model has answered, a ``message`` of another model is an attempt that was declined, which is not billed (anthropic's
    types, ``BetaFallbackMessageIterationUsage``).

    :param own: the usage at the top. It counts the searches of all iterations, and everything that no iteration reports
    """
    serving = {one.model for one in iterations if one.type == "fallback_message"}
    billed = [one for one in iterations if one.type != "message" or not serving or (one.model or model) in serving]
    parts = []
    for one in billed:
        written = _written(one)
        cached = written.ephemeral_5m_input_tokens, written.ephemeral_1h_input_tokens, one.cache_read_input_tokens or 0
        counts = [one.input_tokens or 0, one.output_tokens or 0, *cached, 0]
        parts.append((one.model or model, Usage(*counts, own.inference_geo, own.speed)))  # type: ignore[call-arg,arg-type]
    if not any(one.type in ("message", "fallback_message") for one in iterations):
        return [(model, own), *parts]
    if own.web_searches:
        parts[0] = parts[0][0], msgspec.structs.replace(parts[0][1], web_searches=own.web_searches)
    return parts


# --- parts of a line as they were sent --------------------------------------------------------------------------------------------


class _OfResult(msgspec.Struct, Generic[_T], gc=False):
    result: _T


class _OfMessage(msgspec.Struct, Generic[_T], gc=False):
    message: _T


class _Content(msgspec.Struct, gc=False):
    content: msgspec.Raw = msgspec.Raw(b"[]")


class _Call(msgspec.Struct, gc=False):
    type: Any = None
    input: msgspec.Raw = msgspec.Raw(b"{}")


_decode_content = msgspec.json.Decoder(_OfResult[_OfMessage[_Content]]).decode
_decode_message = msgspec.json.Decoder(_OfResult[_OfMessage[msgspec.Raw]]).decode
_decode_result = msgspec.json.Decoder(_OfResult[msgspec.Raw]).decode
_decode_calls = msgspec.json.Decoder(list[_Call]).decode


def _json(value: Any) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()

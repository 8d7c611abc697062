"""Result lines are read whole, in pieces, and broken; every request gets one outcome."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.api.lines import BrokenLine, LineFault, read_lines
from airflow_provider_batchkit.api.results import Reconciler, parse_blocks
from airflow_provider_batchkit.model import BatchItem, RequestStatus, Usage


def succeeded(custom_id: str, text: str = "hi", **message: Any) -> dict[str, Any]:
    body = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-5-5",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 10, "output_tokens": 3},
        **message,
    }
    return {"custom_id": custom_id, "result": {"type": "succeeded", "message": body}}


def line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def read(data: bytes, *, keep_messages: bool = True) -> tuple[list[BatchItem], list[LineFault]]:
    """The items of some bytes, and what is wrong with their lines."""
    ((block, faults),) = parse_blocks([data], keep_messages=keep_messages)
    return list(block.items()), faults


def item(value: Any) -> BatchItem:
    (parsed,), faults = read(line(value))
    assert faults == []
    return parsed


def test_a_succeeded_line_gives_text_usage_and_stop_reason() -> None:
    """What a pipeline needs of an answer is there."""
    got = item(succeeded("a", stop_reason="stop_sequence"))
    assert (got.custom_id, got.status, got.text, got.stop_reason) == ("a", RequestStatus.SUCCEEDED, "hi", "stop_sequence")
    assert (got.error_type, got.message_id) == (None, "msg_1")
    assert got.usage == Usage(10, 3)
    assert got.model == "claude-haiku-5-5"
    assert json.loads(got.message or b"")["id"] == "msg_1"


def test_every_billed_dimension_of_usage_is_read() -> None:
    """Cache writes by lifetime, reads, searches, region and speed: each is billed differently."""
    usage = {
        "input_tokens": 1,
        "output_tokens": 2,
        "cache_creation_input_tokens": 7,
        "cache_creation": {"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 4},
        "cache_read_input_tokens": 5,
        "server_tool_use": {"web_search_requests": 6, "web_fetch_requests": 1},
        "inference_geo": "us",
        "speed": "standard",
        "service_tier": "batch",
    }
    got = item(succeeded("a", usage=usage)).usage
    assert got == Usage(1, 2, 3, 4, 5, 6, "us", "standard")
    assert got.prompt_tokens == 13


def test_cache_writes_without_a_split_count_as_five_minutes() -> None:
    """Older answers give only the sum; the default lifetime is five minutes."""
    usage = {
        "input_tokens": 1,
        "output_tokens": 2,
        "cache_creation_input_tokens": 7,
        "cache_creation": None,
        "cache_read_input_tokens": None,
    }
    assert item(succeeded("a", usage=usage)).usage == Usage(1, 2, 7, 0, 0)


def test_text_blocks_are_joined_and_others_left_to_the_message() -> None:
    """Thinking and tool blocks are not text."""
    content = [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert item(succeeded("a", content=content)).text == "ab"
    assert item(succeeded("a", content=[])).text == ""


def test_an_errored_line_gives_the_apis_type_and_message() -> None:
    """The error is nested twice in the API's answer."""
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}, "request_id": None}
    got = item({"custom_id": "a", "result": {"type": "errored", "error": error}})
    assert (got.status, got.error_type, got.error_message) == (RequestStatus.ERRORED, "invalid_request_error", "too long")


@pytest.mark.parametrize("kind", ["expired", "canceled"])
def test_expired_and_canceled_lines_have_a_status_only(kind: str) -> None:
    """They were never processed."""
    got = item({"custom_id": "a", "result": {"type": kind}})
    assert (got.status.value, got.text, got.usage) == (kind, None, None)


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"[]",
        b'{"custom_id": "a"}',
        b'{"custom_id":["a"],"result":{"type":"canceled"}}',
        b'{"custom_id":"a","result":{"type":null}}',
        b'{"custom_id":"a","result":{"type":"canceled","score":NaN}}',
        b'{"custom_id":"a","result":{"type":"canceled","deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
        b"\xff\xfe",
        b'{"custom_id":"a","result":{"type":"succeeded"}}',
    ],
)
def test_an_unreadable_line_is_kept_with_its_number_and_a_sample(bad: bytes) -> None:
    """Nothing is dropped without a word."""
    items, (got,) = read(line(succeeded("good")) + b"\n" + bad + b"\n")
    assert [item.custom_id for item in items] == ["good"]
    assert isinstance(got, BrokenLine)
    assert got.number == 3 and got.reason and got.sample


STREAM = (
    line(succeeded("a", "x\u2028y\u0085z")) + line(succeeded("b", "ü")) + b"\n" + line({"custom_id": "c", "result": {"type": "expired"}})
)


def joined(parts: Iterable[tuple[ResultBlock, list[LineFault]]]) -> tuple[ResultBlock, list[LineFault]]:
    """Blocks as one, and what is wrong with their lines in any order."""
    found, faults = ResultBlock.of([]), list[LineFault]()
    contents: list[Any] = []
    for block, wrong in parts:
        contents += zip(*(column or [None] * len(block) for column in (block.contents, block.stop_details, block.bills)), strict=True)
        for field in dataclasses.fields(found):
            if field.default is dataclasses.MISSING:
                getattr(found, field.name).extend(getattr(block, field.name))
        faults += wrong
    found.contents = contents
    return found, sorted(faults, key=repr)


def whole(chunks: Iterable[bytes]) -> tuple[ResultBlock, list[LineFault]]:
    """A stream whose lines are read one by one: a blank line keeps each from being decoded with others."""
    lines = b"".join(chunks).splitlines(keepends=True) if chunks else []
    return joined(read_lines(one + b"\n \n", [one, b" \n"], number, keep_messages=False) for number, one in enumerate(lines))


def in_blocks(chunks: Iterable[bytes]) -> tuple[ResultBlock, list[LineFault]]:
    """A stream read block by block, put together."""
    return joined(parse_blocks(chunks, block_bytes=100))


def cut(stream: bytes, size: int) -> list[bytes]:
    return [stream[i : i + size] for i in range(0, len(stream), size)]


Read = Callable[[Iterable[bytes]], tuple[ResultBlock, list[LineFault]]]
both_ways = pytest.mark.parametrize("read", [whole, in_blocks])


@both_ways
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 10_000])
def test_a_stream_reads_the_same_however_it_is_cut(size: int, read: Read) -> None:
    """Lines end at \\n bytes only: U+2028 and U+0085 inside an answer stay there, and cuts inside a character do no harm."""
    got, broken = read(cut(STREAM, size))
    assert (got.custom_ids, broken) == (["a", "b", "c"], [])
    assert got.texts[0] == "x\u2028y\u0085z"


@pytest.mark.parametrize(
    "value",
    [
        succeeded("a", "x\u2028y"),
        succeeded("b", content=[{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "t"}]),
        {"custom_id": "c", "result": {"type": "expired"}},
        {"custom_id": "d", "result": {"type": "errored", "error": {"error": {"type": "api_error", "message": "m"}}}},
    ],
)
def test_without_the_message_an_item_is_the_same_but_for_it(value: Any) -> None:
    """A landing reads lines without keeping their messages: nothing else differs."""
    (lean,), _ = read(line(value), keep_messages=False)
    assert lean.message is None
    assert lean == msgspec.structs.replace(item(value), message=None)


@pytest.mark.parametrize("size", [5, 60, 10_000])
@both_ways
def test_a_broken_line_among_good_ones_is_named_by_its_number(size: int, read: Read) -> None:
    """Lines are read many at a time; the others are none the worse for it. Blank lines count."""
    stream = line(succeeded("a")) + b"\n" + b"  \n" + b'{"custom_id": "b"}\n' + line(succeeded("c")) + line(succeeded("d"))
    found, (broken,) = read(cut(stream, size))
    assert isinstance(broken, BrokenLine) and broken.number == 4
    assert found.custom_ids == ["a", "c", "d"]


@both_ways
def test_a_last_line_without_a_newline_counts(read: Read) -> None:
    """Files need not end with one."""
    assert len(read([STREAM.rstrip(b"\n")])[0]) == 3


def test_a_line_is_read_when_it_is_whole_and_not_before() -> None:
    """A chunk may end anywhere; what it completes comes with it, or with the chunk that makes a block large enough."""
    first, second = line(succeeded("a")), line(succeeded("b"))
    chunks = [first[:9], b"", first[9:] + second[:5], second[5:-1]]
    blocks = parse_blocks(chunks, block_bytes=1)
    assert [block.custom_ids for block, _ in blocks] == [["a"], ["b"]]
    blocks = parse_blocks([*chunks, b"\n", line(succeeded("c"))], block_bytes=len(first) + 6)
    assert [block.custom_ids for block, _ in blocks] == [["a", "b"], ["c"]]


@both_ways
def test_a_result_that_is_broken_into_two_lines_is_two_broken_lines(read: Read) -> None:
    """Together they would be JSON; a line is what ends with a newline."""
    result = line(succeeded("a"))
    middle = result.index(b":") + 1
    good, broken = read([line(succeeded("b")) + result[:middle] + b"\n" + result[middle:]])
    assert good.custom_ids == ["b"]
    assert [b.number for b in broken if isinstance(b, BrokenLine)] == [2, 3]


LINES = [
    b'{"custom_id":"a","result":{"type":"expired"}}',
    b'{"custom_id":"b",',
    b'"result":{"type":"canceled"}}',
    b"",
    b" ",
    b"{}",
    b'{"custom_id":"c","result":{"type":"succeeded"}}',
    b'{"custom_id":"d","result":{"type":"unheard of"}}',
    *(
        line(value)[:-1]
        for value in (
            succeeded("e", "x\u2028y"),
            succeeded("f", content=[], model=""),
            succeeded("r", content=[], stop_reason="refusal", stop_details={"type": "refusal", "category": "cyber", "explanation": "no"}),
            succeeded("s", content=[{"type": "tool_use", "id": "t", "name": "n", "input": {"a": 1}}], stop_reason="tool_use"),
            succeeded("t", stop_reason="max_tokens"),
            succeeded("u", novelty=1, usage={"input_tokens": None, "output_tokens": 2, "novel_tokens": 7}),
            succeeded("v", usage=None),
            succeeded("w", content=[{"type": "sketch", "text": {"strokes": []}}, {"type": "text", "text": "x"}]),
            succeeded("g", content=[{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "t"}, {"type": "text", "text": "u"}]),
            succeeded("h", usage={"input_tokens": 1, "output_tokens": 2, "cache_creation_input_tokens": 7}),
            succeeded(
                "i",
                usage={
                    "input_tokens": 1,
                    "output_tokens": 2,
                    "cache_creation_input_tokens": 9,
                    "cache_creation": {"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 5},
                    "cache_read_input_tokens": 6,
                    "server_tool_use": {"web_search_requests": 3},
                    "inference_geo": "us",
                    "speed": "fast",
                },
            ),
            {"custom_id": "j", "result": {"type": "errored", "error": {"error": {"type": "api_error", "message": "m"}}}},
            {"custom_id": "k", "result": {"type": "errored", "message": succeeded("k")["result"]["message"]}},
        )
    ),
]


@given(st.lists(st.sampled_from(LINES)), st.lists(st.sampled_from([b"\n", b"\n\n", b""])), st.integers(1, 2_000))
def test_lines_read_together_are_read_as_alone(parts: list[bytes], ends: list[bytes], size: int) -> None:
    """Outcomes, usages, and broken, blank and doubled lines: all the same line by line and many at a time."""
    stream = b"".join(part + (ends[i] if i < len(ends) else b"\n") for i, part in enumerate(parts))
    assert in_blocks(cut(stream, size)) == whole([stream])


def answers(*ids: str) -> ResultBlock:
    return ResultBlock.of([BatchItem(i, RequestStatus.SUCCEEDED) for i in ids])


def accepted(reconciler: Reconciler, *ids: str) -> list[bool]:
    """Whether each answer, coming alone, is a first one."""
    return [len(reconciler.accept_block(answers(i), [])) == 1 for i in ids]


def test_every_request_is_answered_once() -> None:
    """The first answer counts; duplicates and foreign ids are counted with a sample."""
    reconciler = Reconciler({"a": "[1]", "b": "[2]"})
    assert accepted(reconciler, "a", "a", "x", "b") == [True, False, False, True]
    assert (reconciler.answered, reconciler.unanswered) == (2, {})
    assert (reconciler.faults.duplicate, reconciler.faults.duplicate_sample) == (1, "a")
    assert (reconciler.faults.foreign, reconciler.faults.foreign_sample) == (1, "x")
    assert len(reconciler.accept_block(answers(), [BrokenLine(3, "bad", "{")])) == 0
    assert reconciler.faults.to_json() == {"broken_lines": 1, "duplicate_lines": 1, "foreign_lines": 1, "short_by": 0}


def test_a_stream_that_is_read_again_gives_only_what_is_new_and_counts_faults_once() -> None:
    """After a cut the same lines come again; they are neither answers nor duplicates."""
    reconciler = Reconciler(dict.fromkeys("abc", "[1]"))
    first = accepted(reconciler, "a", "a", "b")
    reconciler.read_again()
    second = accepted(reconciler, "a", "a", "b", "c")
    assert (first, second) == ([True, False, True], [False, False, False, True])
    assert reconciler.faults.duplicate == 1
    assert (reconciler.answered, reconciler.unanswered) == (3, {})


@given(
    st.lists(st.lists(st.sampled_from([*"abcdefxy", None]), max_size=5), max_size=8),
    st.sampled_from([None, {letter: f'["{letter}"]' for letter in "abcdef"}]),
    st.integers(0, 8),
)
def test_answers_that_come_together_are_taken_as_one_by_one(pieces: list[list[str | None]], asked: dict[str, str] | None, cut: int) -> None:
    """Duplicates, foreign ids, broken lines, and a stream that is read again."""
    together, one_by_one = Reconciler(asked), Reconciler(asked)
    for number, piece in enumerate(pieces):
        if number == cut:
            together.read_again()
            one_by_one.read_again()
        ids = [i for i in piece if i is not None]
        broken = [BrokenLine(1, "bad", "{") for i in piece if i is None]
        one_by_one.accept_block(answers(), broken)
        expected = answers(*[i for i in ids if accepted(one_by_one, i) == [True]])
        expected.keys = None if asked is None else [asked[i] for i in expected.custom_ids]
        assert together.accept_block(answers(*ids), broken) == expected
    assert (together.answered, together.unanswered) == (one_by_one.answered, one_by_one.unanswered)
    assert together.faults == one_by_one.faults
    assert together.short_of(9) == one_by_one.short_of(9)


def test_of_an_unknown_batch_every_first_answer_is_taken() -> None:
    """A batch submitted elsewhere has no list of what was asked."""
    reconciler = Reconciler(None)
    assert accepted(reconciler, "a", "b", "a") == [True, True, False]

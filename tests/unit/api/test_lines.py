"""What a result line holds lands whole, and one odd member costs no answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from airflow_provider_batchkit.api.blocks import BilledPart, ResultBlock
from airflow_provider_batchkit.api.lines import LineFault, OddMember, read_lines
from airflow_provider_batchkit.model import USAGE_UNKNOWN, RequestStatus, Usage, outcome_rank

MODEL = "claude-haiku-4-5-20251001"
TEXT = {"type": "text", "text": "hi"}
THINKING = {"type": "thinking", "thinking": "hm", "signature": "s"}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "answer", "input": {"city": "Córdoba", "n": 1.0}, "caller": {"type": "direct"}}
SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "rivers"}}
FOUND = {
    "type": "web_search_tool_result",
    "tool_use_id": "srvtoolu_1",
    "content": [{"type": "web_search_result", "url": "u", "title": "t"}],
}
CITED = {"type": "text", "text": "hi", "citations": [{"type": "web_search_result_location", "url": "u", "cited_text": "c"}]}
FIVE_MINUTES, SEARCHES = "ephemeral_5m_input_tokens", "web_search_requests"
#: every member that a plain answer was seen to have
USAGE: dict[str, Any] = {
    "input_tokens": 16,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
    "output_tokens": 5,
    "service_tier": "batch",
    "inference_geo": "not_available",
    "server_tool_use": {"web_search_requests": 0, "web_fetch_requests": 0},
}


def answer(**message: Any) -> dict[str, Any]:
    """A line as the API was seen to send it."""
    whole = {
        "model": MODEL,
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [TEXT],
        "container": None,
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "stop_details": None,
        "usage": USAGE,
        "diagnostics": None,
        **message,
    }
    return {"custom_id": "a", "result": {"type": "succeeded", "message": {k: v for k, v in whole.items() if v != "missing"}}}


def read(*lines: Any) -> tuple[ResultBlock, list[LineFault]]:
    """Lines, each JSON or bytes, that come together."""
    data = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines]
    return read_lines(b"".join(data), data, 0, keep_messages=False)


def odd_members(faults: list[LineFault]) -> list[str]:
    """The members that are named as odd."""
    return [fault.member for fault in faults if isinstance(fault, OddMember)]


def test_a_plain_answer_has_no_content_of_its_own_and_nothing_odd() -> None:
    """A dated model, ``not_available``, and members that are null are how the API answers."""
    block, faults = read(answer(), answer(content=[TEXT, TEXT]))
    assert (block.texts, block.contents, block.stop_details, block.bills, faults) == (["hi", "hihi"], None, None, None, [])
    assert (block.models, block.inference_geos, block.message_ids) == ([MODEL] * 2, ["not_available"] * 2, ["msg_1"] * 2)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([CALL], '{"city": "Córdoba", "n": 1.0}'),
        ([THINKING, CALL], '{"city": "Córdoba", "n": 1.0}'),
        ([{"type": "text", "text": "\n\n"}, CALL], '{"city": "Córdoba", "n": 1.0}'),
        ([TEXT, CALL], "hi"),
        ([CALL, {**CALL, "id": "toolu_2"}], ""),
        ([THINKING, TEXT], "hi"),
        ([SEARCH, FOUND, CITED], "hi"),
        ([CITED], "hi"),
        ([{"type": "sketch", "name": "unheard of"}, TEXT], "hi"),
        ([{"type": "sketch", "text": {"strokes": [1e308, 10**400]}}, TEXT], "hi"),
    ],
)
def test_an_answer_that_is_more_than_text_keeps_its_content_as_it_came(content: list[Any], text: str) -> None:
    """The only call of an answer without text is its text; several calls, or text beside one, leave no such choice."""
    block, _ = read(answer(), answer(content=content, stop_reason="tool_use"))
    assert (block.texts[1], block.contents and block.contents[0]) == (text, None)
    assert block.contents is not None and json.loads(block.contents[1] or "") == content


@pytest.mark.parametrize(
    ("stop_reason", "content", "status", "error_type"),
    [
        ("end_turn", [TEXT], "succeeded", None),
        ("stop_sequence", [TEXT], "succeeded", None),
        ("tool_use", [CALL], "succeeded", None),
        ("max_tokens", [TEXT], "succeeded", "truncated"),
        ("model_context_window_exceeded", [TEXT], "succeeded", "truncated"),
        ("max_tokens", [THINKING], "invalid_output", "truncated"),
        ("max_tokens", [], "invalid_output", "truncated"),
        ("max_tokens", [CALL], "invalid_output", "truncated"),
        ("pause_turn", [TEXT, SEARCH], "invalid_output", "paused"),
        ("compaction", [{"type": "compaction", "content": "so far"}], "invalid_output", "paused"),
        ("refusal", [TEXT], "invalid_output", "refused"),
        ("refusal", [], "invalid_output", "refused"),
    ],
)
def test_an_unfinished_answer_is_told_apart(stop_reason: str, content: list[Any], status: str, error_type: str | None) -> None:
    """A truncated answer succeeds where it has text; what was thought, or half a tool call, is none."""
    block, faults = read(answer(stop_reason=stop_reason, content=content))
    assert (block.statuses, block.error_types, block.stop_reasons, faults) == ([status], [error_type], [stop_reason], [])
    assert (block.error_messages[0] is None) == (error_type is None)


def test_a_refusal_says_of_what_category_it_is_and_why() -> None:
    """Both stand in the message, and the details are kept."""
    details = {"type": "refusal", "category": "cyber", "explanation": "It could enable harm."}
    block, _ = read(answer(stop_reason="refusal", content=[], stop_details=details))
    assert "cyber" in (block.error_messages[0] or "") and "It could enable harm." in (block.error_messages[0] or "")
    assert block.stop_details is not None and json.loads(block.stop_details[0] or "") == details
    assert block.bills == [(BilledPart(MODEL, Usage(16, 5, inference_geo="not_available"), "cyber"),)]


def test_a_failed_request_keeps_its_id() -> None:
    """The API's id of the request is what its support asks for."""
    error = {"type": "error", "error": {"details": None, "type": "invalid_request_error", "message": "m"}, "request_id": "workerreq_1"}
    block, faults = read(
        {"custom_id": "a", "result": {"type": "errored", "error": error}}, {"custom_id": "b", "result": {"type": "canceled"}}
    )
    assert (block.request_ids, block.error_types, faults) == (["workerreq_1", None], ["invalid_request_error", None], [])


def iteration(kind: str, *tokens: int, **more: Any) -> dict[str, Any]:
    return {"type": kind, "input_tokens": tokens[0], "output_tokens": tokens[1], "cache_creation_input_tokens": 0, **more}


@pytest.mark.parametrize(
    ("iterations", "parts"),
    [
        ([iteration("message", 16, 5)], [(MODEL, 16, 5)]),
        ([iteration("compaction", 180_000, 3_500), iteration("message", 16, 5)], [(MODEL, 180_000, 3_500), (MODEL, 16, 5)]),
        ([iteration("compaction", 180_000, 3_500)], [(MODEL, 16, 5), (MODEL, 180_000, 3_500)]),
        ([iteration("message", 16, 5), iteration("advisor_message", 823, 1_612, model="big")], [(MODEL, 16, 5), ("big", 823, 1_612)]),
        ([iteration("message", 9, 0, model="asked"), iteration("fallback_message", 16, 5, model="other")], [("other", 16, 5)]),
        (
            [
                iteration("message", 9, 0, model="asked"),
                iteration("message", 4, 1, model="o"),
                iteration("fallback_message", 16, 5, model="o"),
            ],
            [("o", 4, 1), ("o", 16, 5)],
        ),
    ],
)
def test_iterations_are_billed_each_at_its_own_model(iterations: list[Any], parts: list[tuple[str, int, int]]) -> None:
    """The counts of the row are the sums; a declined attempt is left out; what no iteration tells is the usage at the top."""
    block, faults = read(answer(usage={**USAGE, "iterations": iterations}))
    assert faults == []
    assert block.bills is not None
    assert [(p.model, p.usage.input_tokens, p.usage.output_tokens) for p in block.bills[0] or ()] == parts
    assert (block.input_tokens[0], block.output_tokens[0]) == (sum(p[1] for p in parts), sum(p[2] for p in parts))


def test_searches_are_counted_once_beside_iterations() -> None:
    """They stand at the top only."""
    iterations = [iteration("message", 16, 5), iteration("message", 20, 5)]
    block, _ = read(answer(usage={**USAGE, "server_tool_use": {"web_search_requests": 3}, "iterations": iterations}))
    assert block.web_searches == [3]
    assert block.bills is not None and sum(part.usage.web_searches for part in block.bills[0] or ()) == 3


@pytest.mark.parametrize(
    ("line", "member"),
    [
        (answer(novelty={"deep": [1]}), "result.message.novelty"),
        (answer(usage={**USAGE, "novel_tokens": 7}), "result.message.usage.novel_tokens"),
        (answer(content=[{**TEXT, "novelty": 1}]), "result.message.content[].novelty"),
        (answer(content=[{"type": "sketch", "text": {"a": 1}}, TEXT]), "result.message.content[].text"),
        (answer(content="hi"), "result.message.content"),
        (answer(usage={**USAGE, "cache_creation": {FIVE_MINUTES: None}}), f"result.message.usage.cache_creation.{FIVE_MINUTES}"),
        (answer(usage={**USAGE, "server_tool_use": {SEARCHES: None}}), f"result.message.usage.server_tool_use.{SEARCHES}"),
        (answer(id=7), "result.message.id"),
        (answer(role="oracle"), "result.message.role"),
        (answer(stop_reason="fed_up"), "result.message.stop_reason"),
        (answer(stop_reason=None), "result.message.stop_reason"),
        (json.dumps(answer(content=[{"type": "text", "text": "hi"}], note="\ud83d")).encode() + b"\n", "the line"),
        (json.dumps(answer()).replace('"msg_1"', '"\xff"').encode("latin-1") + b"\n", "the line"),
    ],
)  # fmt: skip
def test_one_odd_member_costs_a_warning_and_no_answer(line: Any, member: str) -> None:
    """The answer, its tokens and those of the lines beside it are there, and the member is named."""
    block, faults = read(answer(), line, answer())
    assert (block.texts, block.statuses) == (["hi"] * 3, ["succeeded"] * 3)
    assert (block.input_tokens, block.output_tokens, block.bills) == ([16] * 3, [5] * 3, None)
    assert member in odd_members(faults)


@pytest.mark.parametrize(
    ("usage", "member", "tokens"),
    [
        ("missing", "result.message.usage", (0, 0)),
        (None, "result.message.usage", (0, 0)),
        ([1], "result.message.usage", (0, 0)),
        ({"input_tokens": 16}, "result.message.usage.output_tokens", (16, 0)),
        ({**USAGE, "output_tokens": None}, "result.message.usage.output_tokens", (16, 0)),
        ({**USAGE, "output_tokens": "many"}, "result.message.usage.output_tokens", (16, 0)),
        ({**USAGE, "input_tokens": -1}, "result.message.usage.input_tokens", (0, 5)),
        ({**USAGE, "input_tokens": 10**30}, "result.message.usage.input_tokens", (0, 5)),
    ],
)
def test_a_usage_that_is_not_told_is_never_taken_for_nothing(usage: Any, member: str, tokens: tuple[int, int]) -> None:
    """What is told of it counts, and a part that no price is known for stands for the rest."""
    block, faults = read(answer(), answer(usage=usage))
    assert member in odd_members(faults)
    assert (block.texts[1], block.statuses[1], (block.input_tokens[1], block.output_tokens[1])) == ("hi", "succeeded", tokens)
    assert block.bills is not None and block.bills[0] is None
    assert (block.bills[1] or ())[0] == BilledPart(MODEL + USAGE_UNKNOWN, Usage())


def test_lone_surrogates_are_replaced_and_pairs_are_kept() -> None:
    """No database takes half a character. A backslash that is escaped begins none."""
    text = rb'"\ud83d\ude00 \ud83d \ude00 \\ud83d"'
    line = json.dumps(answer()).replace('"hi"', "TEXT").encode().replace(b"TEXT", text) + b"\n"
    block, faults = read(line)
    assert block.texts == ["\U0001f600 \ufffd \ufffd \\ud83d"]
    assert odd_members(faults) == ["the line"]
    tool = json.dumps(answer(content=[CALL])).encode().replace(b'"answer"', rb'"\uDC00"') + b"\n"
    block, _ = read(tool)
    assert block.contents is not None and json.loads(block.contents[0] or "")[0]["name"] == "\ufffd"


@pytest.mark.parametrize(
    "error",
    [{"type": "overloaded_error", "message": "busy", "request_id": "req_1"}, {"error": {"type": "overloaded_error", "message": "busy"}}],
)
def test_an_error_that_is_nested_once_is_read(error: Any) -> None:
    """The API nests it twice today."""
    block, faults = read({"custom_id": "a", "result": {"type": "errored", "error": error}})
    assert (block.statuses, block.error_types, block.error_messages) == (["errored"], ["overloaded_error"], ["busy"])
    assert odd_members(faults) == ([] if "error" in error else ["result.error"])


def test_an_error_that_is_text_or_null_is_an_error() -> None:
    """Its line counts as what it is."""
    block, _ = read(*({"custom_id": c, "result": {"type": "errored", "error": e}} for c, e in (("a", "busy"), ("b", None), ("c", 7))))
    assert (block.statuses, block.error_messages) == (["errored"] * 3, ["busy", None, None])


def test_a_result_of_an_unknown_type_is_an_outcome_that_shows_it() -> None:
    """With a message its text lands, as one that overwrites nothing; without one it is an error."""
    postponed = {"custom_id": "a", "result": {"type": "postponed", "reason": {"code": "capacity"}}}
    partial = answer()
    partial["result"]["type"] = "partial"
    block, faults = read(postponed, partial, answer())
    assert (block.statuses, block.texts) == (["errored", "invalid_output", "succeeded"], [None, "hi", "hi"])
    assert (block.billed, block.error_types[:2]) == ([False, True, True], ["unknown_result"] * 2)
    assert "capacity" in (block.error_messages[0] or "")
    assert "result.type" in odd_members(faults)


@pytest.mark.parametrize("kind", [None, 5, ["succeeded"], {}])
def test_a_result_whose_type_is_no_text_lands_with_what_it_holds(kind: Any) -> None:
    """An answer that was paid for is not lost with its type; a result that holds nothing cannot be read."""
    paid, failed, empty = answer(), {"custom_id": "b", "result": {"type": kind, "error": {"error": {"type": "api_error"}}}}, answer()
    paid["result"]["type"] = kind
    empty["result"] = {"type": kind}
    block, faults = read(paid, failed, empty)
    assert (block.statuses, block.texts, block.billed) == (["invalid_output", "errored"], ["hi", None], [True, False])
    assert block.error_types == ["unknown_result", "api_error"]
    assert "result.type" in odd_members(faults)


def test_the_best_outcome_comes_first() -> None:
    """Whole answers before unfinished ones, these before failures."""
    order = [
        *(("succeeded", None), ("succeeded", "truncated"), ("invalid_output", "invalid_output"), ("invalid_output", "paused")),
        *(("invalid_output", "refused"), ("errored", "api_error"), ("canceled", None), ("expired", None), ("missing", None)),
    ]
    assert [outcome_rank(*one) for one in order] == list(range(9))
    assert outcome_rank("invalid_output", "truncated") == 1
    assert {status.value for status in RequestStatus} == {status for status, _ in order}

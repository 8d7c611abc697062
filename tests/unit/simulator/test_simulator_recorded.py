"""The simulator against what others recorded of the real API: shapes of lines, texts, headers, and the SDK's types for all of it."""

from __future__ import annotations

from typing import Any

import anthropic
import msgspec
import pytest
from anthropic.types.beta.messages import BetaMessageBatchIndividualResponse
from anthropic.types.messages import MessageBatchIndividualResponse

from airflow_provider_batchkit.simulator import MARKERS, Simulator, answer_for, odd_lines
from tests.unit.simulator.test_simulator import HEADERS, HTTP, client_of, create, error_of, request, results

HAIKU = "claude-haiku-4-5"
#: Members and types of recorded lines; the values are our own.
USAGE = (
    b'"usage":{"input_tokens":1,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"cache_creation":'
    b'{"ephemeral_5m_input_tokens":0,"ephemeral_1h_input_tokens":0},"output_tokens":1,"service_tier":"batch",'
    b'"inference_geo":"not_available"}'
)
MESSAGE = (
    b'{"custom_id":"a","result":{"type":"succeeded","message":{"model":"m","id":"i","type":"message","role":"assistant","content":'
    b'[{"type":"text","text":"t"}],%b"stop_reason":"end_turn","stop_sequence":null,%b' + USAGE + b"%b}}}"
)
ERRORED = b'{"custom_id":"a","result":{"type":"errored","error":{"type":"error","error":{"details":%b,"type":"x","message":"m"}%b}}}'
VISIBLE = b'{"error_visibility":"user_facing"}'
#: For each recorded shape: a line of it, what is asked, and which members the simulator's line then gets or loses.
SHAPES: dict[str, tuple[bytes, dict[str, Any], list[dict[str, Any]]]] = {
    "August 2026": (MESSAGE % (b"", b'"stop_details":null,', b""), {}, []),
    "September 2026": (MESSAGE % (b"", b"", b""), {}, [{"member": "result.message.stop_details"}]),
    "with container and diagnostics": (
        MESSAGE % (b'"container":null,', b'"stop_details":null,', b',"diagnostics":null'),
        {},
        [{"member": "result.message.container", "value": None}, {"member": "result.message.diagnostics", "value": None}],
    ),
    "2024": (
        (MESSAGE % (b"", b"", b"")).replace(USAGE, b'"usage":{"input_tokens":1,"output_tokens":1}'),
        {},
        [
            {"member": "result.message.stop_details"},
            {"member": "result.message.usage", "value": {"input_tokens": 9, "output_tokens": 9}},
        ],
    ),
    "errored before it ran": (ERRORED % (VISIBLE, b',"request_id":null'), {"model": "claude-does-not-exist-9"}, []),
    "max_tokens above the limit": (ERRORED % (VISIBLE, b',"request_id":null'), {"max_tokens": 100_000}, []),
    "errored while it ran": (ERRORED % (VISIBLE, b',"request_id":"w"'), {"prompt": "[[sim:file-url]]"}, []),
    "an image": (ERRORED % (b"null", b',"request_id":"w"'), {"prompt": "[[sim:image]]"}, []),
    "low credit": (ERRORED % (b"null", b""), {"prompt": "[[sim:credit]]"}, []),
    "canceled": (b'{"custom_id":"a","result":{"type":"canceled"}}', {"prompt": "[[sim:canceled]]"}, []),
    "expired": (b'{"custom_id":"a","result":{"type":"expired"}}', {"prompt": "[[sim:expired]]"}, []),
}


def members(value: Any) -> Any:
    """Names and types of a decoded value, all the way down; ``type`` and what else is part of a shape by value keeps it."""
    if isinstance(value, dict):
        fixed = ("role", "service_tier", "inference_geo", "error_visibility")
        return {k: v if k in fixed or (k == "type" and v in KINDS) else members(v) for k, v in value.items()}
    return [members(item) for item in value] if isinstance(value, list) else type(value).__name__


KINDS = ("succeeded", "errored", "canceled", "expired", "message", "text", "error")


def raw_line(simulator: Simulator, asked: Any) -> bytes:
    """The one line of the results of a batch with one request."""
    batch = client_of(simulator).messages.batches.create(requests=[asked])
    answer = HTTP.get(f"{simulator.base_url}/v1/messages/batches/{batch.id}/results", headers=HEADERS)
    assert answer.headers["content-type"] == "application/x-jsonl"
    return answer.content


@pytest.mark.parametrize("name", SHAPES)
def test_a_line_has_the_members_and_types_of_a_recorded_one(name: str) -> None:
    """Today's shapes come by themselves, older ones by adding and removing members."""
    line, asked, changes = SHAPES[name]
    with Simulator() as simulator:
        for change in changes:
            simulator.faults.add("set_member", line=0, **change)
        got = raw_line(
            simulator, request("a", asked.get("prompt", "hello"), **{"model": HAIKU, **{k: v for k, v in asked.items() if k != "prompt"}})
        )
        assert members(msgspec.json.decode(got)) == members(msgspec.json.decode(line))


def test_a_short_model_name_answers_under_its_dated_one() -> None:
    """In the line, on the bill, and for whoever looks the model up; a model without a known dated name keeps its own."""
    with Simulator() as simulator:
        client = client_of(simulator)
        batch = client.messages.batches.create(requests=[request("a", model=HAIKU), request("b", model="claude-haiku-5-5")])
        answers: dict[str, Any] = {line.custom_id: line.result for line in results(client, batch.id)}
        assert [answers[key].message.model for key in ("a", "b")] == ["claude-haiku-4-5-20251001", "claude-haiku-5-5"]
        assert [answers[key].message.usage.inference_geo for key in ("a", "b")] == ["not_available", "global"]
        assert set(simulator.stats()["bill"]) == {"claude-haiku-4-5-20251001", "claude-haiku-5-5"}
        assert client.models.retrieve(HAIKU).id == "claude-haiku-4-5-20251001"


def test_a_model_has_limits_and_a_lifecycle() -> None:
    """As the SDK's type has them; a retired model is still shown, and its requests fail as those of an unknown one."""
    models = {"claude-old-1": {"lifecycle": "retired", "max_tokens": 4096}, "claude-opus-5": {"lifecycle": "deprecated"}}
    with Simulator(models=models) as simulator:
        client = client_of(simulator)
        haiku = client.models.retrieve(HAIKU)
        assert (haiku.max_tokens, haiku.max_input_tokens, haiku.lifecycle) == (64_000, 200_000, "active")
        old = client.models.retrieve("claude-old-1")
        assert (old.max_tokens, old.lifecycle, client.models.retrieve("claude-opus-5").lifecycle) == (4096, "retired", "deprecated")
        assert b"model: claude-old-1" in raw_line(simulator, request("a", model="claude-old-1"))
        assert b"succeeded" in raw_line(simulator, request("a", model="claude-opus-5"))
        messages: Any = [{"role": "user", "content": "x"}]
        for name in ("claude-old-1", "claude-none", "anthropic/claude-opus-5"):
            with pytest.raises(anthropic.NotFoundError) as caught:
                client.messages.count_tokens(model=name, messages=messages)
            assert error_of(caught) == (404, "not_found_error", f"model: {name}")


def test_answers_carry_the_recorded_headers() -> None:
    """A look at a running batch says when to come back, a refusal that it is one, and every answer whose it is."""
    with Simulator(clock="polls:1", keys={"k": "ws"}) as simulator:
        client = client_of(simulator)
        batch = create(client, "x")
        path = f"{simulator.base_url}/v1/messages/batches"
        looks = [HTTP.get(f"{path}/{batch.id}", headers=HEADERS).headers.get("retry-after") for _ in range(2)]
        assert looks == ["10", None]
        listed = HTTP.get(path, headers=HEADERS).headers
        assert listed["anthropic-workspace-id"] == "ws" and listed["anthropic-organization-id"]
        assert {f"anthropic-ratelimit-requests-{name}" for name in ("limit", "remaining", "reset")} <= set(listed)
        assert "x-should-retry" not in listed
        for refused in (HTTP.get(f"{path}/msgbatch_none", headers=HEADERS), HTTP.get(path, headers={**HEADERS, "x-api-key": "no"})):
            assert refused.headers["x-should-retry"] == "false"
        simulator.faults.add("status", endpoint="list", status=429)
        assert "x-should-retry" not in HTTP.get(path, headers=HEADERS).headers


def test_times_have_an_offset_and_results_a_host_of_their_own() -> None:
    """Times end with +00:00; where a host for results_url is set, it is in every answer, whatever address the call was made to."""
    with Simulator(results_host="https://api.anthropic.com") as simulator:
        batch = create(client_of(simulator), "x")
        path = f"{simulator.base_url}/v1/messages/batches"
        shown = [HTTP.get(f"{path}/{batch.id}", headers=HEADERS).json(), HTTP.get(path, headers=HEADERS).json()["data"][0]]
        for answer in shown:
            assert answer["results_url"] == f"https://api.anthropic.com/v1/messages/batches/{batch.id}/results"
            assert {answer[name][-6:] for name in ("created_at", "ended_at", "expires_at")} == {"+00:00"}
        assert HTTP.get(f"{path}/{batch.id}/results", headers=HEADERS).status_code == 200
        simulator.set(results_host="")
        assert HTTP.get(path, headers=HEADERS).json()["data"][0]["results_url"] == f"{path}/{batch.id}/results"


def test_counters_can_move_while_a_batch_runs() -> None:
    """They add up to the size at any time; by default nothing is counted before the end."""
    for moving, wanted in ((True, [0, 25, 50, 75, 100]), (False, [0, 0, 0, 0, 100])):
        with Simulator(clock="seconds:100", moving_counts=moving) as simulator:
            client = client_of(simulator)
            batch = create(client, *("x" for _ in range(100)))
            seen = []
            for _ in range(5):
                counts = client.messages.batches.retrieve(batch.id).request_counts
                assert counts.processing + counts.succeeded == 100
                seen.append(counts.succeeded)
                simulator.advance(25)
            assert all(abs(a - b) <= 1 for a, b in zip(seen, wanted, strict=True)), seen


def test_the_batch_queue_can_be_full() -> None:
    """A create above it is a 429 until a batch has ended; other workspaces have a queue of their own."""
    with Simulator(clock="manual", queue_requests=3, keys={"k": "a", "other": "b"}) as simulator:
        client = client_of(simulator)
        first = create(client, "x", "y")
        with pytest.raises(anthropic.RateLimitError) as caught:
            create(client, "x", "y")
        assert error_of(caught)[:2] == (429, "rate_limit_error")
        create(client_of(simulator, "other"), "x", "y")
        simulator.end(first.id)
        create(client, "x", "y", "z")
        assert simulator.stats()["batches_accepted"] == 3


#: Marker → stop reason of its message, and the types of its blocks.
FORMS: dict[str, tuple[str, list[str]]] = {
    "max_tokens": ("max_tokens", ["text"]),
    "context-window": ("model_context_window_exceeded", ["text"]),
    "thinking": ("end_turn", ["thinking", "text"]),
    "thinking-only": ("max_tokens", ["thinking"]),
    **{f"refusal-{category}": ("refusal", []) for category in ("cyber", "bio", "frontier_llm", "reasoning_extraction", "general_harms")},
    "refusal": ("refusal", []),
    "refusal-partial": ("refusal", ["text"]),
    "tool": ("tool_use", ["tool_use"]),
    "tool-twice": ("tool_use", ["tool_use", "tool_use"]),
    "pause-turn": ("pause_turn", ["text", "server_tool_use"]),
    "citations": ("end_turn", ["text", "text"]),
    "search": ("end_turn", ["server_tool_use", "web_search_tool_result", "text", "text"]),
    "search-error": ("end_turn", ["server_tool_use", "web_search_tool_result", "text"]),
    "compaction": ("end_turn", ["compaction", "text"]),
    "advisor": ("end_turn", ["server_tool_use", "advisor_tool_result", "text"]),
    "fallback": ("end_turn", ["fallback", "text"]),
}
TOOL = {"name": "note", "input_schema": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}
OF_THE_BETA_API = {"compaction", "advisor", "fallback"}
BROKEN_ON_PURPOSE = {"new-type", "flat-error", "no-usage", "odd-block"}


def message_of(marker: str, **params: Any) -> Any:
    """The message that a prompt with a marker is answered, as strict as the SDK's types are; the prompt is ``row`` and the marker."""
    with Simulator() as simulator:
        line = raw_line(simulator, request("a", f"row [[sim:{marker}]]", **{"tools": [TOOL], "max_tokens": 300, **params}))
    kind = BetaMessageBatchIndividualResponse if marker in OF_THE_BETA_API else MessageBatchIndividualResponse
    result: Any = kind.model_validate_json(line).result
    return result.message


@pytest.mark.parametrize("marker", sorted(FORMS))
def test_a_marker_asks_for_a_form_of_answer(marker: str) -> None:
    """The stop reason and the blocks tell; where the answer is whole, its text is still the declared one."""
    message = message_of(marker)
    assert (message.stop_reason, [block.type for block in message.content]) == FORMS[marker]
    text = "".join(block.text for block in message.content if block.type == "text")
    assert (text == answer_for(f"row [[sim:{marker}]]")) == (message.stop_reason == "end_turn")
    assert 0 < message.usage.output_tokens <= 300


def test_forms_say_in_their_members_what_they_are() -> None:
    """Categories, tokens of thinking, the input of a tool, what a search found, whom a text cites, who answered in whose place."""
    refused = message_of("refusal-cyber").stop_details
    assert (refused.type, refused.category, "cyber" in refused.explanation) == ("refusal", "cyber", True)
    assert message_of("refusal").stop_details.category is None
    thinking = message_of("thinking-only").usage
    assert (thinking.output_tokens, thinking.output_tokens_details.thinking_tokens) == (300, 300)
    first, second = message_of("tool-twice").content
    assert (isinstance(first.input["n"], int), first.id == second.id, first.name) == (True, False, "note")
    search = message_of("search")
    assert (search.usage.server_tool_use.web_search_requests, search.usage.server_tool_use.web_fetch_requests) == (1, 0)
    assert (search.content[0].id, search.content[3].citations[0].url) == (search.content[1].tool_use_id, search.content[1].content[0].url)
    failed = message_of("search-error")
    assert (failed.content[1].content.error_code, failed.usage.server_tool_use.web_search_requests) == ("unavailable", 0)
    assert message_of("citations").content[1].citations[0].type == "char_location"
    assert [entry.type for entry in message_of("compaction").usage.iterations] == ["compaction", "message"]
    assert [entry.type for entry in message_of("advisor").usage.iterations] == ["message", "advisor_message"]
    fallback = message_of("fallback")
    declined, served = fallback.usage.iterations
    assert (declined.type, declined.model, served.type, served.model) == ("message", "claude-haiku-5-5", "fallback_message", fallback.model)
    assert fallback.content[0].to.model == fallback.model != fallback.content[0].from_.model == declined.model


@pytest.mark.parametrize("marker", sorted(MARKERS))
def test_the_sdks_types_take_every_line_that_no_fault_breaks(marker: str) -> None:
    """Strictly, each with its own markers: the SDK's types are written from the API's own description."""
    with Simulator() as simulator:
        line = raw_line(simulator, request("a", f"row [[sim:{marker}]]", tools=[TOOL]))
        kind = BetaMessageBatchIndividualResponse if marker in OF_THE_BETA_API else MessageBatchIndividualResponse
        if marker in BROKEN_ON_PURPOSE or marker == "lone-surrogate":
            with pytest.raises(ValueError, match=r"validation error|surrogate"):
                kind.model_validate_json(line)
        else:
            kind.model_validate_json(line)


def test_a_tool_that_is_forced_is_called() -> None:
    """By name or as any; left to itself the model answers with text; a call that does not fit into max_tokens has no input."""
    tools = [{"type": "web_search_20250305", "name": "web_search"}, TOOL]
    with Simulator(web_searches=0) as simulator:
        client = client_of(simulator)
        choices: dict[str, Any] = {"named": {"type": "tool", "name": "note"}, "any": {"type": "any"}, "auto": {"type": "auto"}}
        requests = [request(key, tools=tools, tool_choice=choice) for key, choice in choices.items()]
        batch = client.messages.batches.create(requests=[*requests, request("cut", tools=tools, tool_choice={"type": "any"}, max_tokens=1)])
        found: dict[str, Any] = {line.custom_id: line.result for line in results(client, batch.id)}
        assert {key: result.message.stop_reason for key, result in found.items()} == {
            "named": "tool_use", "any": "tool_use", "auto": "end_turn", "cut": "max_tokens"
        }  # fmt: skip
        assert found["named"].message.content[0].name == "note"
        assert (found["cut"].message.content[0].input, found["cut"].message.usage.output_tokens) == ({}, 1)


def test_thinking_that_was_asked_for_comes_first_and_can_use_up_max_tokens() -> None:
    """Its tokens are part of the answer's."""
    with Simulator() as simulator:
        client = client_of(simulator)
        adaptive = {"type": "adaptive"}
        requests = [request("a", thinking=adaptive), request("b", thinking=adaptive, max_tokens=5), request("c")]
        batch = client.messages.batches.create(requests=requests)
        found: dict[str, Any] = {line.custom_id: line.result.message for line in results(client, batch.id)}  # type: ignore[union-attr]
        assert [[block.type for block in found[key].content] for key in "abc"] == [["thinking", "text"], ["thinking"], ["text"]]
        assert (found["b"].stop_reason, found["b"].usage.output_tokens) == ("max_tokens", 5)
        thinking = found["a"].usage.output_tokens_details.thinking_tokens
        assert found["a"].usage.output_tokens == thinking + found["c"].usage.output_tokens


def test_the_bill_knows_what_the_top_level_of_usage_does_not_say() -> None:
    """Iterations are billed at their own model, a declined attempt and a refusal before any output are not, some categories are."""
    markers = ["compaction", "advisor", "fallback", "refusal", "refusal-cyber", "refusal-bio", "refusal-partial"]
    with Simulator(input_tokens=23_000, output_tokens=1_000) as simulator:
        client = client_of(simulator)
        batch = client.messages.batches.create(requests=[request(m, f"[[sim:{m}]]", max_tokens=2_000) for m in markers])
        client.messages.batches.retrieve(batch.id)
        bill = simulator.stats()["bill"]
        own, other = bill["claude-haiku-5-5"], bill["claude-opus-5-5"]
        assert (own["requests"], own["input_tokens"], own["output_tokens"]) == (4, 4 * 23_000 + 180_000, 4 * 1_000 + 3_500)
        assert (other["requests"], other["input_tokens"], other["output_tokens"]) == (1, 23_000 + 1_200, 1_000 + 300)


def test_one_request_of_a_batch_writes_a_prefix_and_the_others_read_it() -> None:
    """As in the one recorded batch."""
    system = [{"type": "text", "text": "p" * 8000, "cache_control": {"type": "ephemeral"}}]
    with Simulator() as simulator:
        client = client_of(simulator)
        batch = client.messages.batches.create(requests=[request(f"r{n}", system=system) for n in range(3)])
        usages: list[Any] = [line.result.message.usage for line in results(client, batch.id)]  # type: ignore[union-attr]
        assert sorted((usage.cache_creation_input_tokens, usage.cache_read_input_tokens) for usage in usages) == [
            (0, 2000),
            (0, 2000),
            (2000, 0),
        ]


def test_rates_pick_any_marker() -> None:
    """A share of the requests, as if their prompts had it."""
    with Simulator(rates={"credit": 0.4, "thinking-only": 0.2}) as simulator:
        client = client_of(simulator)
        batch = client.messages.batches.create(requests=[request(f"r{n}", f"row {n}") for n in range(300)])
        counts = client.messages.batches.retrieve(batch.id).request_counts
        assert 90 < counts.errored < 150
        cut = sum(line.result.message.stop_reason == "max_tokens" for line in results(client, batch.id) if line.result.type == "succeeded")
        assert 30 < cut < 90


def test_every_odd_line_is_a_fault_and_a_marker() -> None:
    """One name for one thing, so that a test of a whole job can ask for it in a prompt."""
    assert {kind.replace("_", "-") for kind in odd_lines.CHANGES} <= set(MARKERS)
    with Simulator() as simulator:
        assert rb"\ud800" in raw_line(simulator, request("a", "row [[sim:lone-surrogate]]"))
        assert simulator.stats()["bill"]["claude-haiku-5-5"]["requests"] == 1


def test_a_marker_that_needs_a_tool_is_refused_without_one() -> None:
    """Whatever the checks of params: it is a slip of the test."""
    with Simulator() as simulator, pytest.raises(anthropic.BadRequestError, match="needs a tool with an input_schema"):
        create(client_of(simulator), "[[sim:tool]]")


def test_the_clients_answers_stay_as_strict_as_the_sdk() -> None:
    """Each endpoint that answers JSON is validated by the SDK's strict client, of the plain and of the beta API."""
    with Simulator(clock="polls:1") as simulator:
        for batches in (client_of(simulator).messages.batches, client_of(simulator).beta.messages.batches):
            batch = batches.create(requests=[request("a")])
            assert batches.retrieve(batch.id).processing_status == "in_progress"
            assert batch.id in {found.id for found in batches.list()}
            assert batches.retrieve(batch.id).processing_status == "ended"
            assert batches.delete(batch.id).type == "message_batch_deleted"
        assert client_of(simulator).models.retrieve(HAIKU).type == "model"

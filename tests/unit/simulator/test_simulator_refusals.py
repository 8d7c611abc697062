"""What a create call refuses, as the API does, and what it leaves for the results."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic.types.messages import MessageBatch

from airflow_provider_batchkit.simulator import Simulator
from tests.unit.simulator.test_simulator import client_of, error_of, request, results

REFUSED: list[tuple[Any, str]] = [
    ([], "requests: List should have at least 1 item after validation, not 0"),
    ([request("a b")], "requests.0.custom_id: String should match pattern '^[a-zA-Z0-9_-]{1,64}$'"),
    ([request("")], "requests.0.custom_id: String should match pattern '^[a-zA-Z0-9_-]{1,64}$'"),
    ([request("a" * 65)], "requests.0.custom_id: String should have at most 64 characters"),
    ([request("a\n")], "requests.0.custom_id: String should match pattern '^[a-zA-Z0-9_-]{1,64}$'"),
    ([request("a"), request("b"), request("a")], "requests: custom_id's must be unique within a batch. Duplicate custom_id found: a"),
    ([{"params": {}}], "requests.0.custom_id: Field required"),
    ([{"custom_id": 5, "params": {}}], "requests.0.custom_id: Expected `str`, got `int`"),
    (["a"], "requests.0: Expected `object`, got `str`"),
    ("a", "requests: Expected `array`, got `str`"),
]
REFUSED_PARAMS: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model: Field required"),
    ({"model": "gpt-9"}, "model: gpt-9"),
    ({"model": "claude-does-not-exist-9"}, "model: claude-does-not-exist-9"),
    ({"model": "anthropic/claude-haiku-5-5"}, "model: anthropic/claude-haiku-5-5"),
    (
        {"model": "claude-haiku-4-5", "max_tokens": 100_000},
        "max_tokens: 100000 > 64000, which is the maximum allowed number of output tokens for claude-haiku-4-5-20251001",
    ),
    ({"model": "claude-opus-5", "thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.type: 'enabled' is not supported"),
    ({"max_token": 5}, "max_token: Extra inputs are not permitted"),
    ({"tool_choice": {"type": "tool", "name": "t"}}, "tool_choice: Tool 't' not found in provided tools"),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": 5}}},
        "output_config.format.schema: Input should be a valid dictionary",
    ),
    ({"max_tokens": None}, "max_tokens: Field required"),
    ({"max_tokens": 0}, "max_tokens: Expected `int` >= 1"),
    ({"max_tokens": "5"}, "max_tokens: Expected `int`, got `str`"),
    ({"max_tokens": True}, "max_tokens: Expected `int`, got `bool`"),
    ({"messages": None}, "messages: Field required"),
    ({"messages": []}, "messages: Expected `array` of length >= 1"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages.0.role: first message must use the user role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Invalid enum value 'tool'"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content: messages must have non-empty content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content: messages must have non-empty content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Expected `str | array`, got `int`"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name: Extra inputs are not permitted"),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": ""}]}]},
        "messages.1.content.0.text: text content blocks must be non-empty",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "movie"}]}]},
        "messages.0.content.0.type: 'movie' is not a known content block",
    ),
    ({"stream": True}, "stream: streaming is not supported here"),
    ({"speed": "fast"}, "speed: fast mode is not supported here"),
    ({"response_format": {}}, "response_format: Extra inputs are not permitted"),
    ({"mcp_servers": []}, "mcp_servers: Extra inputs are not permitted"),
    ({"temperature": 1.5}, "temperature: Expected `float` <= 1.0"),
    ({"system": [{"type": "text", "text": ""}]}, "system.0.text: Expected `str` of length >= 1"),
    (
        {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "2h"}}]},
        "system.0.cache_control.ttl: Invalid enum value '2h'",
    ),
]


def message_of(simulator: Simulator, requests: Any) -> str:
    """The message with which a create call is refused, after a check that it is a 400 and that nothing was taken."""
    with pytest.raises(anthropic.BadRequestError) as caught:
        client_of(simulator).post("/v1/messages/batches", body={"requests": requests}, cast_to=object)
    status, type_, message = error_of(caught)
    stats = simulator.stats()
    assert (status, type_, stats["posts"], stats["batches_accepted"]) == (400, "invalid_request_error", 1, 0)
    return message


@pytest.mark.parametrize(("requests", "message"), REFUSED)
def test_create_refuses_bad_requests(requests: Any, message: str) -> None:
    """The list and the request objects are checked before anything is accepted."""
    with Simulator() as simulator:
        assert message_of(simulator, requests) == message


@pytest.mark.parametrize(("params", "message"), REFUSED_PARAMS)
def test_bad_params_are_accepted_and_err_in_the_results(params: dict[str, Any], message: str) -> None:
    """As the API does, only that request is errored, in the end; with strict_params the batch is refused and the place is named."""
    requests = [request("good"), request("bad", **params)]
    with Simulator(strict_params=True) as simulator:
        assert message_of(simulator, requests).startswith(f"requests.1.params.{message}")
        simulator.set(strict_params=False)
        client = client_of(simulator)
        batch = client.messages.batches.create(requests=requests)
        found: dict[str, Any] = {line.custom_id: line.result for line in results(client, batch.id)}
        assert found["good"].type == "succeeded"
        error = found["bad"].error
        assert error.error.message.startswith(message)
        assert error.error.type == (
            "not_found_error" if message.startswith("model: ") and "required" not in message else "invalid_request_error"
        )
        assert (error.request_id, error.error.details) == (None, {"error_visibility": "user_facing"})
        assert client.messages.batches.retrieve(batch.id).request_counts.errored == 1
        assert simulator.stats()["bill"]["claude-haiku-5-5"]["requests"] == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"custom_id": "a"}, "params: Field required"),
        ({"custom_id": "a", "params": 5}, "Expected `object`, got `int`"),
        ({**request("a"), "metadata": {}}, "metadata: Extra inputs are not permitted"),
    ],
)
def test_a_request_that_has_an_id_is_accepted_whatever_else_it_holds(entry: Any, message: str) -> None:
    """It fails under its id, in the end."""
    with Simulator() as simulator:
        client = client_of(simulator)
        batch: Any = client.post("/v1/messages/batches", body={"requests": [entry]}, cast_to=MessageBatch)
        (line,) = results(client, batch.id)
        failed: Any = line.result
        assert (line.custom_id, failed.type, failed.error.error.message) == ("a", "errored", message)


def test_all_parameters_of_the_sdk_are_known() -> None:
    """Every key of the SDK's parameter type passes, so that strictness never refuses what the API takes."""
    from anthropic.types.message_create_params import MessageCreateParamsNonStreaming

    values: dict[str, Any] = {
        "model": "claude-opus-5-5",
        "max_tokens": 2000,
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}],
        "cache_control": {"type": "ephemeral"},
        "container": "container_1",
        "diagnostics": {},
        "inference_geo": "us",
        "metadata": {"user_id": "u"},
        "output_config": {"effort": "low"},
        "service_tier": "auto",
        "speed": "standard",
        "stop_sequences": ["stop"],
        "stream": False,
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        "thinking": {"type": "adaptive"},
        "tool_choice": {"type": "auto"},
        "tools": [{"name": "t", "input_schema": {"type": "object"}}],
        "user_profile_id": "p",
    }
    newer = {"diagnostics", "speed"}  # the oldest SDK that is supported does not have them yet
    assert set(MessageCreateParamsNonStreaming.__annotations__) | {"workspace_id"} >= set(values) - newer
    known = set(MessageCreateParamsNonStreaming.__mro__[0].__annotations__) - {"workspace_id"}  # a header, not a field of the body
    assert known <= set(values)
    with Simulator() as simulator:
        client = client_of(simulator)
        batch = client.messages.batches.create(requests=[{"custom_id": "a", "params": values}])  # type: ignore[typeddict-item]
        (line,) = results(client, batch.id)
        result: Any = line.result
        assert (result.type, result.message.usage.inference_geo) == ("succeeded", "us")


def test_parameters_of_the_beta_api_need_its_header() -> None:
    """mcp_servers passes with an anthropic-beta header; without one it is refused, which the table above shows."""
    with Simulator() as simulator:
        client = client_of(simulator)
        headers = {"anthropic-beta": "mcp-client-2025-11-20"}
        batch = client.messages.batches.create(requests=[request("a", mcp_servers=[])], extra_headers=headers)
        assert batch.request_counts.processing == 1


def test_a_body_over_the_limit_is_too_large() -> None:
    """413 request_too_large is readable although the client is still sending, and the connection goes on."""
    with Simulator(max_body_bytes=1000) as simulator:
        client = client_of(simulator)
        for size in (3_000_000, 1200):
            with pytest.raises(anthropic.APIStatusError) as caught:
                client.messages.batches.create(requests=[request("a", "x" * size)])
            assert error_of(caught) == (413, "request_too_large", "Request exceeds the maximum size of 1000 bytes")
        assert client.messages.batches.create(requests=[request("a", "x" * 500)]).request_counts.processing == 1


def test_a_batch_has_at_most_its_maximum_of_requests() -> None:
    """One request more than the limit refuses all of them."""
    with Simulator(max_requests=3) as simulator:
        client = client_of(simulator)
        with pytest.raises(anthropic.BadRequestError, match="at most 3 items after validation, not 4"):
            client.messages.batches.create(requests=[request(f"r{number}") for number in range(4)])
        assert client.messages.batches.create(requests=[request(f"r{number}") for number in range(3)]).request_counts.processing == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"clock": "polls"}, {"clock": "seconds:x"}, {"clock": "seconds:9-3"}, {"clock": "soon"}, {"errored": 1.5},
        {"errored": 0.6, "expired": 0.6}, {"max_requests": 100_001}, {"unknown": 1}, {"rates": {"never": 0.5}},
        {"errored": 0.6, "rates": {"credit": 0.6}},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    """A simulator that was misconfigured would test something else than was meant."""
    with pytest.raises(ValueError, match=r".+"):
        Simulator(**changes)

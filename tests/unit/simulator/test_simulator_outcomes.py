"""The declared model: answers, tokens, cache, scripted outcomes, and the bill that a client's ledger is compared with."""

from __future__ import annotations

import hashlib
import importlib
import json
from typing import Any

import anthropic
import pytest

from airflow_provider_batchkit.simulator import MARKERS, Simulator, answer_for, answer_in_schema
from tests.unit.simulator.test_simulator import MODEL, client_of, create, error_of, request, results

#: Comes with Airflow, without types.
jsonschema = importlib.import_module("jsonschema")
BILL_ZERO = {
    "requests": 0, "input_tokens": 0, "output_tokens": 0, "cache_write_5m_tokens": 0, "cache_write_1h_tokens": 0, "cache_read_tokens": 0,
    "web_search_requests": 0,
}  # fmt: skip


def results_of(client: anthropic.Anthropic, requests: list[Any]) -> dict[str, Any]:
    """Results of a new batch by custom_id; under the instant clock it has ended when it is asked for."""
    batch = client.messages.batches.create(requests=requests)
    return {line.custom_id: line.result for line in results(client, batch.id)}


def test_the_answer_is_the_declared_one() -> None:
    """The start of SHA-256 and of the prompt, as the documentation says, so that tests can compute it themselves."""
    prompt = "Describe the lamp " + "é" * 60
    assert answer_for(prompt) == f"Answer {hashlib.sha256(prompt.encode()).hexdigest()[:12]}: {prompt[:60]}"


def test_tokens_follow_the_declared_model() -> None:
    """Input: a quarter of the bytes of all text, and 8. Output: a quarter of the answer's bytes."""
    with Simulator() as simulator:
        turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "é"}, {"role": "user", "content": "last one"}]
        (result,) = results_of(client_of(simulator), [request("a", messages=turns, system="system")]).values()
        assert result.message.content[0].text == answer_for("last one")
        assert result.message.usage.input_tokens == -(-(6 + 5 + 2 + 8) // 4) + 8
        assert result.message.usage.output_tokens == -(-len(answer_for("last one")) // 4)


def test_max_tokens_cuts_the_answer() -> None:
    """An answer above max_tokens is cut, says so, and is billed exactly max_tokens."""
    with Simulator() as simulator:
        (result,) = results_of(client_of(simulator), [request("a", "é" * 60, max_tokens=10)]).values()
        assert (result.message.stop_reason, result.message.usage.output_tokens) == ("max_tokens", 10)
        assert result.message.content[0].text == answer_for("é" * 60).encode()[:40].decode(errors="ignore")


def test_fixed_tokens_make_the_bill_predictable() -> None:
    """2,700 in and 100 out per request, whatever the prompt; an answer of 100 tokens does not fit into 64."""
    with Simulator(input_tokens=2700, output_tokens=100) as simulator:
        requests = [request(f"r{number}", f"row {number}", max_tokens=200) for number in range(20)]
        results = results_of(client_of(simulator), [*requests, request("short", max_tokens=64)])
        assert results["short"].message.stop_reason == "max_tokens"
        assert results["r0"].message.stop_reason == "end_turn"
        bill = simulator.stats()["bill"][MODEL]
        assert bill == {**BILL_ZERO, "requests": 21, "input_tokens": 21 * 2700, "output_tokens": 20 * 100 + 64}


def test_fixed_tokens_are_what_count_tokens_says() -> None:
    """Counted before and billed afterwards are the same figure, so that an estimate on a simulator with fixed tokens is one of its bill."""
    with Simulator(input_tokens=2700) as simulator:
        asked = request("a")["params"]
        counted = client_of(simulator).messages.count_tokens(model=asked["model"], messages=asked["messages"])
        assert counted.input_tokens == 2700


@pytest.mark.parametrize(("prompt", "max_tokens", "tokens"), [("row", 640, 600), ("é" * 60, 640, 600), ("row", 100, 100)])
def test_an_answer_can_be_filled_up_to_a_number_of_tokens(prompt: str, max_tokens: int, tokens: int) -> None:
    """Its text is as long as its usage says, begins as it always does, and fits into max_tokens."""
    with Simulator(answer_tokens=600) as simulator:
        (result,) = results_of(client_of(simulator), [request("a", prompt, max_tokens=max_tokens)]).values()
    text = result.message.content[0].text
    assert (result.message.stop_reason, result.message.usage.output_tokens) == ("end_turn", tokens)
    assert len(text.encode()) == 4 * tokens
    assert text.startswith(answer_for(prompt))


def test_the_bill_is_the_sum_of_what_the_results_say() -> None:
    """Per model, to the token, over succeeded requests only; per inference_geo in the bill lines; unchanged by delete."""
    with Simulator(errored=0.2, expired=0.2, canceled=0.2) as simulator:
        client = client_of(simulator)
        models = ["claude-haiku-5-5", "claude-opus-5-5"]
        search = [{"type": "web_search_20250305", "name": "web_search"}]
        requests = [
            request(f"r{n}", f"row {n}" * n, model=models[n % 2], inference_geo="us" if n % 3 else None, tools=search if n % 5 else None)
            for n in range(1, 120)
        ]
        batch = client.messages.batches.create(requests=requests)
        assert simulator.stats()["batches"][0]["first_custom_id"] == "r1"
        wanted: dict[str, dict[str, int]] = {model: dict.fromkeys(BILL_ZERO, 0) for model in models}
        american = 0
        kinds = set()
        for line in results(client, batch.id):
            kinds.add(line.result.type)
            if line.result.type == "succeeded":
                usage, bill = line.result.message.usage, wanted[line.result.message.model]
                bill["requests"] += 1
                bill["input_tokens"] += usage.input_tokens
                bill["output_tokens"] += usage.output_tokens
                bill["web_search_requests"] += usage.server_tool_use.web_search_requests if usage.server_tool_use else 0
                american += usage.inference_geo == "us"
        assert kinds == {"succeeded", "errored", "expired", "canceled"}
        assert simulator.stats()["bill"] == wanted
        assert sum(line["requests"] for line in simulator.stats()["bill_lines"] if line["inference_geo"] == "us") == american
        client.messages.batches.delete(batch.id)
        assert simulator.stats()["bill"] == wanted


def test_a_batch_that_runs_is_not_billed() -> None:
    """The bill counts a batch when it ends."""
    with Simulator(clock="manual") as simulator:
        batch = create(client_of(simulator), "x")
        stats = simulator.stats()
        assert (stats["bill"], stats["batches_accepted"], stats["requests_accepted"]) == ({}, 1, 1)
        simulator.end(batch.id)
        assert simulator.stats()["bill"][MODEL]["requests"] == 1


@pytest.mark.parametrize(
    ("marker", "kind", "detail"),
    [
        ("errored", "errored", "invalid_request_error"),
        ("overloaded", "errored", "overloaded_error"),
        ("api-error", "errored", "api_error"),
        ("credit", "errored", "invalid_request_error"),
        ("expired", "expired", None),
        ("canceled", "canceled", None),
        ("refusal", "succeeded", "refusal"),
        ("max_tokens", "succeeded", "max_tokens"),
        ("invalid-output", "succeeded", "end_turn"),
    ],
)
def test_a_marker_scripts_its_row_and_no_other(marker: str, kind: str, detail: str | None) -> None:
    """Row by row, and with -once only until the same prompt is asked again."""
    assert marker in MARKERS
    with Simulator() as simulator:
        client = client_of(simulator)
        prompt = f"row [[sim:{marker}-once]]"
        first = results_of(client, [request("a", f"row [[sim:{marker}]]"), request("b"), request("c", prompt)])
        for result in (first["a"], first["c"]):
            assert result.type == kind
            if kind == "errored":
                assert result.error.error.type == detail
            elif kind == "succeeded":
                assert result.message.stop_reason == detail
        assert (first["b"].type, first["b"].message.stop_reason) == ("succeeded", "end_turn")
        again = results_of(client, [request("a", f"row [[sim:{marker}]]"), request("c", prompt)])
        assert again["a"].type == kind
        assert (again["c"].type, again["c"].message.stop_reason) == ("succeeded", "end_turn")
        assert again["c"].message.content[0].text == answer_for(prompt)


def test_a_marker_with_a_slip_of_the_pen_is_refused() -> None:
    """A test that scripts nothing by mistake would prove nothing."""
    with Simulator() as simulator, pytest.raises(anthropic.BadRequestError, match="unknown simulator marker"):
        create(client_of(simulator), "[[sim:expried]]")


def test_rates_pick_the_same_requests_for_the_same_seed() -> None:
    """About the share that was asked for, the same rows each time, and other rows under another seed."""
    picked = []
    for seed in (1, 1, 2):
        with Simulator(errored=0.3, seed=seed) as simulator:
            results = results_of(client_of(simulator), [request(f"r{number}") for number in range(300)])
            picked.append({key for key, result in results.items() if result.type == "errored"})
    assert picked[0] == picked[1] != picked[2]
    assert 60 < len(picked[0]) < 120


def test_rates_that_strike_once_let_the_second_ask_succeed() -> None:
    """With once, a row that failed succeeds when the same prompt is asked again, under the same custom_id."""
    with Simulator(errored=0.5, expired=0.5, once=True) as simulator:
        client = client_of(simulator)
        requests = [request(f"r{number}", f"row {number}") for number in range(20)]
        assert {result.type for result in results_of(client, requests).values()} == {"errored", "expired"}
        assert {result.type for result in results_of(client, requests).values()} == {"succeeded"}


@pytest.mark.parametrize(("ttl", "seconds", "other"), [("5m", 300, "1h"), ("1h", 3600, "5m")])
def test_a_cached_prefix_is_written_until_a_batch_has_ended_and_then_read(ttl: str, seconds: int, other: str) -> None:
    """Both requests of the first batch write, those within the ttl of the last use read, one after the ttl writes again."""
    with Simulator(cache_min_tokens=100, cache_concurrency=None) as simulator:
        client = client_of(simulator)
        prefix = "p" * 400
        system = [{"type": "text", "text": prefix, "cache_control": {"type": "ephemeral", "ttl": ttl}}, {"type": "text", "text": "tail"}]
        requests = [request("a", "question", system=system), request("b", "question", system=system)]
        total = -(-(400 + 4 + 8) // 4) + 8
        for written, read, wait in ((100, 0, seconds - 30), (0, 100, seconds - 30), (0, 100, seconds + 30), (100, 0, 0)):
            for result in results_of(client, requests).values():
                usage = result.message.usage
                assert usage.input_tokens == total - 100
                assert (getattr(usage.cache_creation, f"ephemeral_{ttl}_input_tokens"), usage.cache_read_input_tokens) == (written, read)
                assert getattr(usage.cache_creation, f"ephemeral_{other}_input_tokens") == 0
                assert usage.cache_creation_input_tokens == written
            simulator.advance(wait)
        bill = simulator.stats()["bill"][MODEL]
        assert (bill[f"cache_write_{ttl}_tokens"], bill[f"cache_write_{other}_tokens"], bill["cache_read_tokens"]) == (400, 0, 400)
        (plain,) = results_of(client, [request("a", "question", system=prefix)]).values()
        assert (plain.message.usage.cache_read_input_tokens, plain.message.usage.cache_creation_input_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("model", "minimum"),
    [("claude-opus-5-5", 512), ("claude-sonnet-5", 1024), ("claude-opus-4-7", 2048), ("claude-haiku-4-5-20251001", 4096)],
)
def test_a_prefix_below_the_models_minimum_is_plain_input(model: str, minimum: int) -> None:
    """One token short, and nothing is cached, without an error; at the minimum it is."""
    with Simulator() as simulator:
        for tokens, written in ((minimum - 1, 0), (minimum, minimum)):
            system = [{"type": "text", "text": "p" * 4 * tokens, "cache_control": {"type": "ephemeral"}}]
            (result,) = results_of(client_of(simulator), [request("a", "question", system=system, model=model)]).values()
            usage = result.message.usage
            assert (usage.cache_creation_input_tokens, usage.cache_read_input_tokens) == (written, 0)
            assert usage.input_tokens == tokens + 2 + 8 - written


def test_as_many_requests_write_a_cold_prefix_as_run_at_once() -> None:
    """With three at a time the fourth finds what the first wrote; each prefix is counted for itself."""
    with Simulator(cache_min_tokens=1, cache_concurrency=3) as simulator:
        requests = [
            request(f"{text}{i}", system=[{"type": "text", "text": text * 40, "cache_control": {"type": "ephemeral"}}])
            for i in range(5)
            for text in ("p", "q")
        ]
        results = results_of(client_of(simulator), requests)
        reads = {custom_id for custom_id, result in results.items() if result.message.usage.cache_read_input_tokens}
        assert reads == {"p3", "p4", "q3", "q4"}


SCHEMAS: list[Any] = [
    {
        "type": "object",
        "properties": {
            "title": {"type": "string", "minLength": 3, "maxLength": 5},
            "score": {"type": "integer", "minimum": 1, "maximum": 5},
            "price": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            "ok": {"type": "boolean"},
            "tone": {"enum": ["warm", "cold"]},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2},
            "maker": {"anyOf": [{"type": "null"}, {"type": "string"}]},
            "kind": {"const": "lamp"},
            "size": {"type": ["integer", "null"], "multipleOf": 7, "minimum": 8, "maximum": 30},
            "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}},
        },
        "required": ["title", "score", "price", "ok", "tone", "tags", "maker", "kind", "size", "parts"],
        "additionalProperties": False,
        "$defs": {
            "part": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "of": {"$ref": "#/$defs/part"}},
                "required": ["name"],
            }
        },
    },
    {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string", "format": "date"}}, "required": ["a"]}},
    {"type": "string"},
    {"type": "integer", "maximum": -3},
]


CLOSED: Any = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "score": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "maker": {"$ref": "#/$defs/maker"},
    },
    "required": ["title", "score", "tags", "maker"],
    "additionalProperties": False,
    "$defs": {"maker": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"], "additionalProperties": False}},
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_an_answer_in_a_schema_fits_it(schema: Any) -> None:
    """A JSON Schema validator accepts the answers to many prompts, and they differ from row to row."""
    texts = {answer_in_schema(schema, f"{number:012x}") for number in range(50)}
    for text in texts:
        jsonschema.validate(json.loads(text), schema)
    assert answer_in_schema(schema, "0" * 12) in texts
    assert len(texts) > 1 or "format" in json.dumps(schema)


def test_a_request_with_a_schema_is_answered_in_it() -> None:
    """output_config.format gives JSON, the same on every reading; the invalid-output marker and a low max_tokens break it."""
    schema = CLOSED
    config = {"format": {"type": "json_schema", "schema": schema}}
    with Simulator() as simulator:
        prompts = {"a": "lamp", "b": "desk", "broken": "chair [[sim:invalid-output]]"}
        requests = [request(key, prompt, output_config=config, max_tokens=500) for key, prompt in prompts.items()]
        results = results_of(client_of(simulator), [*requests, request("cut", "lamp", output_config=config, max_tokens=5)])
        texts = {key: result.message.content[0].text for key, result in results.items()}
        jsonschema.validate(json.loads(texts["a"]), schema)
        assert texts["a"] == answer_in_schema(schema, hashlib.sha256(b"lamp").hexdigest()[:12])
        assert texts["a"] != texts["b"]
        assert texts["cut"] == texts["a"][:20]
        assert results["cut"].message.stop_reason == "max_tokens"
        assert texts["broken"] == answer_for(prompts["broken"])


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "object", "properties": {}}, "For 'object' type, 'additionalProperties' must be explicitly set to false"),
        ({"type": "object", "additionalProperties": True}, "For 'object' type, 'additionalProperties' other than false is not supported"),
        (
            {**CLOSED, "$defs": {"maker": {"type": "object", "properties": {}}}},
            "For 'object' type, 'additionalProperties' must be explicitly set to false",
        ),
        ({"type": "integer", "minimum": 1, "maximum": 5}, "For 'integer' type, properties maximum, minimum are not supported"),
        ({"type": "array", "items": {"type": "string", "maxLength": 5}}, "For 'string' type, properties maxLength are not supported"),
        ({"type": "array", "items": {"type": "string"}, "minItems": 2}, "'minItems' values other than 0 or 1 are not supported"),
        ({**CLOSED, "$defs": {"maker": {"type": "array", "items": {"$ref": "#/$defs/maker"}}}}, "Recursive schemas are not supported"),
        ({"type": "string", "anyOf": [5]}, "not a JSON Schema that the simulator understands"),
        (5, "Input should be a valid dictionary"),
    ],
)
def test_a_schema_that_the_api_does_not_take_is_refused(schema: Any, problem: str) -> None:
    """Open objects and bounds are refused, also deep inside, with the API's reasons."""
    config = {"format": {"type": "json_schema", "schema": schema}}
    with Simulator(strict_params=True) as simulator, pytest.raises(anthropic.BadRequestError) as caught:
        client_of(simulator).messages.batches.create(requests=[request("a", output_config=config)])
    assert error_of(caught)[2].startswith("requests.0.params.output_config.format.schema: ")
    assert problem in error_of(caught)[2]


def test_a_schema_that_the_sdk_has_transformed_is_taken() -> None:
    """What the SDK makes of a Pydantic model with bounds passes, so the refusals above hit no well-behaved client."""
    from pydantic import BaseModel, Field

    class Review(BaseModel):
        stars: int = Field(ge=1, le=5)
        words: list[str] = Field(min_length=2)
        author: str | None = Field(default=None, max_length=9)

    config = {"format": {"type": "json_schema", "schema": anthropic.transform_schema(Review)}}
    with Simulator() as simulator:
        (result,) = results_of(client_of(simulator), [request("a", output_config=config)]).values()
        assert set(json.loads(result.message.content[0].text)) == {"stars", "words", "author"}

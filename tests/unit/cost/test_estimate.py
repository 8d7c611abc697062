"""What requests will cost: expected, and a bound that no bill exceeds."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from airflow_provider_batchkit import BatchKit
from airflow_provider_batchkit.cost.checks import check
from airflow_provider_batchkit.cost.estimate import Estimate, bound_of, estimate
from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.model import COST_QUANTUM, Bound, parse_usd
from airflow_provider_batchkit.request.block import PreparedRequest, split_body
from airflow_provider_batchkit.request.build import RequestBuilder, RequestDefaults
from airflow_provider_batchkit.request.exposure import Exposure
from airflow_provider_batchkit.request.params import ParamNames
from airflow_provider_batchkit.request.shards import Sample
from airflow_provider_batchkit.request.template import RowTemplate
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings
from tests.warehouse import kit_for

NOW = datetime(2026, 11, 23, tzinfo=UTC)
BOOK = PriceBook()
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}}


def body(**params: Any) -> bytes:
    """A native request as it is uploaded."""
    given = {
        "model": "claude-opus-4-8",
        "max_tokens": 100,
        "inference_geo": "global",
        "messages": [{"role": "user", "content": "x"}],
        **params,
    }
    return RequestBuilder(RequestDefaults(names=ParamNames(beta=True))).build({"custom_id": "a", "params": given}, 0).body


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def exposed(bodies: Sequence[bytes]) -> Exposure:
    exposure = Exposure()
    exposure.add([PreparedRequest("a", "", split_body(body, "a")) for body in bodies])
    return exposure


def most(*bodies: bytes) -> Bound:
    return bound_of(exposed(bodies), BOOK, NOW)


class Counter:
    """The free calls, with a count of one's own and no models."""

    sends_betas = False

    def __init__(self, count: Callable[[Mapping[str, Any]], int]) -> None:
        self.count_tokens = count

    def model_info(self, model: str) -> Mapping[str, Any]:
        return {}


def expect(*bodies: bytes, count: Any = lambda _: 10, **options: Any) -> Estimate:
    counted = check(Counter(count), exposed(bodies), lambda most: [Sample("[]", one) for one in bodies[:most]])
    return estimate(exposed(bodies), counted, BOOK, NOW, **options)


# --- the bound, worked out by hand: opus-4-8 in a batch is $2.50 in, $12.50 out, $3.125 / $5 cache writes per MTok -----------------


def usd(micro: str) -> Decimal:
    """Millionths of a dollar, and the quantum that a bill may round up to."""
    return Decimal(micro) * Decimal("1e-6") + COST_QUANTUM


def test_a_text_cannot_have_more_tokens_than_bytes() -> None:
    """Every byte of the request's JSON at the input price, and max_tokens at the output price."""
    plain = body()
    assert most(plain) == Bound(usd(f"{len(plain) * 2.5 + 100 * 12.5}"), len(plain) + 100)


def test_a_prompt_with_cache_markers_may_be_written_to_the_cache() -> None:
    """At 1.25 times the input price for five minutes, at twice for an hour."""
    for ttl, rate in (("5m", 3.125), ("1h", 5.0)):
        marked = body(system=[{"type": "text", "text": "long", "cache_control": {"type": "ephemeral", "ttl": ttl}}])
        assert most(marked).usd == usd(f"{len(marked) * rate + 1250}")


def test_a_text_that_speaks_of_cache_markers_has_none() -> None:
    """Quotes in a text are escaped in its JSON."""
    text = body(messages=user('"type":"text","cache_control":{"ttl":"1h"}'))
    assert most(text).usd == usd(f"{len(text) * 2.5 + 1250}")


@pytest.mark.parametrize("geo", ["us", None])
def test_what_may_be_run_us_only_is_bounded_at_its_price(geo: str | None) -> None:
    """Without inference_geo the workspace's default counts, which may be US-only: 1.1 times."""
    request = body(inference_geo=geo)
    assert most(request).usd == usd(str((Decimal(len(request)) * Decimal("2.5") + 1250) * Decimal("1.1")))


def test_a_prompt_that_may_cross_a_tier_is_bounded_above_it() -> None:
    """haiku-5-5 in a batch: $0.05 / $0.25 up to 100,000 prompt tokens, five times that above; bytes decide what may be."""
    short = body(model="claude-haiku-5-5", messages=user("x" * 99_000))
    long = body(model="claude-haiku-5-5", messages=user("x" * 100_000))
    assert most(short).usd == usd(str(len(short) * Decimal("0.05") + 25))
    assert most(long).usd == usd(str(len(long) * Decimal("0.25") + 125))
    # a prompt that is counted as 30,000 tokens is expected below the tier: 30,000 * 0.05 + 100 * 0.25 = 1,525
    assert expect(long, count=lambda _: 30_000).expected_usd == Decimal("0.001525")


def test_tools_schemas_and_images_bring_tokens_of_their_own() -> None:
    """1,000 for the prompt that comes with tools or a schema, 5,000 for an image of any size."""
    tool = {"name": "look", "input_schema": {"type": "object"}}
    schema = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    for extra, request in (
        (1_000, body(tools=[tool])),
        (1_000, body(output_config=schema)),
        (10_000, body(messages=user([PNG, PNG]))),
        (6_000, body(messages=user([{"type": "tool_result", "tool_use_id": "t", "content": [PNG]}]))),
        (1_000, body(messages=user([{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}]))),
    ):
        assert most(request).tokens == len(request) + extra + 100


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "the tool web_search_20250305"),
        ({"messages": user([{"type": "document", "source": {"type": "file", "file_id": "f"}}])}, "a source of type file"),
        (
            {"messages": user([{"type": "document", "source": {"type": "base64", "data": ""}}])},
            "type document with a source of type base64",
        ),
        ({"messages": user([{"type": "container_upload", "file_id": "f"}])}, "a block of type container_upload"),
        ({"mcp_servers": [{"url": "https://example.com"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management, which may add inferences"),
        ({"fallbacks": [{"model": "claude-sonnet-5"}]}, "fallbacks, which may add inferences"),
        ({"tools": [{"type": "advisor_20260301", "name": "advisor", "model": "claude-opus-5"}]}, "the tool advisor_20260301"),
        ({"messages": user([{"type": "compaction", "content": "so far"}])}, "a block of type compaction"),
        ({"messages": user({"type": "text", "text": "x"})}, "blocks or tools of an unknown form"),
        ({"tools": {"type": "custom"}}, "blocks or tools of an unknown form"),
        ({"messages": user([{"type": "document"}])}, "blocks or tools of an unknown form"),
        ({"messages": user([{"type": "image_or_so", "source": None}])}, "blocks or tools of an unknown form"),
    ],
)
def test_what_the_api_decides_has_no_bound(params: dict[str, Any], why: str) -> None:
    """The estimate says so and why, and still expects something."""
    found = expect(body(), body(**params))
    assert (found.upper_usd, found.upper_tokens) == (None, None)
    assert why in found.why_unbounded
    assert found.expected_usd is not None
    assert "without an upper bound" in str(found)


def test_a_model_without_a_price_has_no_bound_in_usd() -> None:
    """Unknown is never zero; its tokens are bounded all the same."""
    found = expect(body(model="claude-unheard-of"))
    assert (found.expected_usd, found.upper_usd) == (None, None)
    assert found.upper_tokens is not None
    assert "no price is known for claude-unheard-of" in found.why_unbounded


@pytest.mark.parametrize(
    "defaults",
    [
        RequestDefaults("claude-opus-4-8", 100, params={"inference_geo": "global"}),
        RequestDefaults("claude-opus-4-8", 100, cache_system="1h"),
        RequestDefaults("claude-opus-4-8", 100, output_format={"type": "json_schema", "schema": {"type": "object"}}),
        RequestDefaults("claude-opus-4-8", 100, params={"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
        RequestDefaults("claude-opus-4-8", 100, params={"mcp_servers": []}, names=ParamNames(beta=True)),
    ],
)
def test_a_request_counts_the_same_among_others_and_alone(defaults: RequestDefaults) -> None:
    """Rows of a job differ in their texts alone and are counted together: as if each were looked at, and whatever the texts speak of."""
    texts = ["x" * (i % 40 + 1) for i in range(300)] + ['"type":"image","cache_control":{"ttl":"1h"}', '\\"type":', "é" * 70]
    prompt, system = RowTemplate("{{ row.text }}", name="prompt"), RowTemplate("You {{ row.n }}", name="system")
    builder = RequestBuilder(defaults, job_id="0" * 20, key=["n"], prompt=prompt, system=system)
    rows = builder.build_all([{"n": n, "text": text} for n, text in enumerate(texts)], 0)
    natives = [
        PreparedRequest("a", "", split_body(native, "a"))
        for native in [body(max_tokens=7), body(messages=user([PNG])), body(model="claude-haiku-5-5"), body(tools=[])]
    ]
    mixed = [*natives[:1], *rows[:100], *natives[1:3], *rows[100:], *natives[3:]]
    assert {request.form for request in rows} == {rows[0].form} != {None}
    alone, together = Exposure(), Exposure()
    for request in mixed:
        one = Exposure()
        one.add([msgspec.structs.replace(request, form=None)])
        alone.include(one)
    for start in range(0, len(mixed), 100):
        together.add(mixed[start : start + 100])
    assert (alone.groups, alone.unbounded, alone.unbounded_requests) == (
        together.groups,
        together.unbounded,
        together.unbounded_requests,
    )
    assert together.requests == len(mixed) and together.body_bytes == sum(len(request.body) for request in mixed)


def test_the_bounds_of_parts_add_up_to_no_more_than_the_whole() -> None:
    """Shards, and halves of them, share what was reserved for all; also at a price of a fraction of a picodollar a token."""
    book = PriceBook({"m": {"input_usd_per_mtok": "0.000003", "output_usd_per_mtok": "0.333333"}})
    bodies = [body(model="m", messages=user("x" * (n + 1)), max_tokens=n + 1, inference_geo=None) for n in range(60)]
    whole = bound_of(exposed(bodies), book, NOW)
    parts = [bound_of(exposed(bodies[i : i + 7]), book, NOW) for i in range(0, 60, 7)]
    assert whole.usd is not None
    assert sum(part.usd for part in parts if part.usd is not None) <= whole.usd


# --- the expected figure ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_counted_and_the_rest_goes_by_bytes() -> None:
    """Ten of 1,000 are counted; with the answers of earlier runs the output is what they were."""
    asked: list[Mapping[str, Any]] = []

    def count(params: Mapping[str, Any]) -> int:
        asked.append(params)
        return 20

    bodies = [body(messages=user(f"{i:06}")) for i in range(1000)]
    found = expect(*bodies, count=count, output_per_request=Decimal("12.5"))
    assert [int(p["messages"][0]["content"]) for p in asked] == list(range(10))
    assert (found.input_tokens, found.output_tokens) == (20_000, 12_500)
    # 20,000 * 2.5 + 12,500 * 12.5 = 206,250 millionths
    assert found.expected_usd == Decimal("0.20625")
    assert "counted on 10 of them" in str(found) and "12 a request as in this task's earlier runs" in str(found)


def test_without_earlier_answers_max_tokens_is_expected() -> None:
    """Nobody knows better, and the line says so."""
    found = expect(body(max_tokens=300), body(max_tokens=50))
    assert found.output_tokens == 350
    assert "max_tokens of every request" in str(found)


def test_earlier_answers_never_put_the_expected_above_max_tokens() -> None:
    """The task asked for longer answers before."""
    assert expect(body(max_tokens=5), output_per_request=Decimal(80)).output_tokens == 5


def test_a_count_that_fails_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A token for four bytes is taken then."""

    def fail(params: Mapping[str, Any]) -> int:
        raise ConnectionError("no route")

    request = body()
    with caplog.at_level(logging.WARNING):
        found = expect(request, count=fail)
    assert found.input_tokens == -(-len(request) // 4)
    assert "no route" in caplog.text
    assert "a token for 4 bytes" in str(found)


def test_the_line_is_readable() -> None:
    """One line, thousands separated, cents rounded up."""
    found = Estimate(50_000, 61_000_000, 135_000_000, 5_000_000, Decimal("412.196"), Decimal(950), 7, "counted on 10 of them", "max_tokens")
    assert str(found) == (
        "50,000 requests: expected $412.20, at most $950.00 "
        "(input 135,000,000 tokens, counted on 10 of them; output 5,000,000 tokens, max_tokens)"
    )
    assert json.loads(json.dumps(found.to_json()))["upper_usd"] == "950.00"


@pytest.mark.parametrize("value", ["25", 25, 25.0, Decimal(25)])
def test_an_amount_is_read_as_it_prints(value: Any) -> None:
    """A float of 0.1 is a tenth."""
    assert parse_usd(value, "cap") == 25
    assert parse_usd(0.1, "cap") == Decimal("0.1")


@pytest.mark.parametrize("value", [0, -1, "much", "nan", "inf", True, None, [1]])
def test_what_is_no_amount_is_refused(value: Any) -> None:
    """By its name."""
    with pytest.raises(BatchInputError, match="cap must be an amount"):
        parse_usd(value, "cap")


# --- against the simulator ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kit() -> Iterator[BatchKit]:
    old: dict[str, dict[str, Any]] = {"claude-opus-4-1": {}, "claude-3-haiku-20240307": {}}
    with Simulator(SimulatorSettings(cache_min_tokens=1, models=old)) as sim:
        yield kit_for(sim.base_url)


MODELS = (
    *("claude-haiku-5-5", "claude-haiku-4-5", "claude-sonnet-5-5", "claude-sonnet-4-5-20250929", "claude-opus-4-8", "claude-opus-4-1"),
    *("claude-fable-5-1", "claude-mythos-5-2", "claude-3-haiku-20240307"),
)
ALPHABETS = ("abc def", "äöü ß", "漢字仮名", "🚀🎉👩‍👩‍👧", '"\\/\n\t', "\x00\x1f\u2028")


def random_text(rng: random.Random, size: int) -> str:
    return "x" + "".join(rng.choices(rng.choice(ALPHABETS), k=size))


def random_request(rng: random.Random, number: int) -> dict[str, Any]:
    # one in twenty near or above haiku's tier of 100,000 prompt tokens, which takes four bytes a token
    size = rng.choice([399_000, 400_100, 420_000]) if rng.random() < 0.01 else rng.randint(1, 400)
    text = random_text(rng, size) if size < 1000 else "y" * size
    params: dict[str, Any] = {
        "model": rng.choice(MODELS),
        "max_tokens": rng.choice([1, 5, 20, 100, 4096]),
        "messages": user(text if rng.random() < 0.7 else [{"type": "text", "text": text}, {"type": "text", "text": "more"}]),
    }
    if rng.random() < 0.4:
        marker = {"cache_control": {"type": "ephemeral", "ttl": rng.choice(["5m", "1h"])}} if rng.random() < 0.7 else {}
        params["system"] = [{"type": "text", "text": random_text(rng, rng.randint(1, 600)), **marker}]
    if rng.random() < 0.5:
        params["inference_geo"] = rng.choice(["us", "global"])
    if rng.random() < 0.1:
        params["tools"] = [{"name": "look", "input_schema": {"type": "object"}}]
    if rng.random() < 0.1:
        schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
        params["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    return {"custom_id": f"r-{number}", "params": params}


def test_no_bill_of_1000_random_jobs_is_above_its_bound(kit: BatchKit) -> None:
    """Models, lengths, alphabets, cache markers, US-only inference, tools and schemas, mixed in one job as they come."""
    rng = random.Random(20261123)
    billed = 0
    for job in range(1000):
        requests = [random_request(rng, n) for n in range(rng.randint(1, 4))]
        found = kit.estimate(requests)
        assert found.upper_usd is not None and found.upper_tokens is not None and found.expected_usd is not None
        batch_ids = kit.submit(requests)
        tally = kit.retrieve(batch_ids).tally
        assert tally.batch_cost_usd is not None
        assert tally.batch_cost_usd <= found.upper_usd, (job, requests)
        total = tally.total
        used = (
            total.input_tokens + total.cache_write_5m_tokens + total.cache_write_1h_tokens + total.cache_read_tokens + total.output_tokens
        )
        assert used <= found.upper_tokens
        assert found.expected_usd <= found.upper_usd
        billed += tally.batch_cost_usd > 0
    assert billed == 1000


def test_the_input_is_expected_as_the_simulator_bills_it(kit: BatchKit) -> None:
    """Rows of a table are alike: a sample of ten tells the rest to within a fiftieth."""
    prompts = [f"Write two sentences about product {i}, " + "a kettle of steel. " * (5 + i % 7) for i in range(500)]
    found = kit.estimate(prompts, model="claude-haiku-5-5", max_tokens=60)
    billed = kit.retrieve(kit.submit(prompts, model="claude-haiku-5-5", max_tokens=60)).tally
    assert abs(found.input_tokens - billed.input_tokens) < billed.input_tokens / 50

"""Costs worked out by hand, per dimension. Prices: DOCS/about-claude/pricing of platform.claude.com, checked 2026-11-23."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.model import Usage

NOW = datetime(2026, 11, 23, tzinfo=UTC)
LAST_DAY_WITHOUT_VARIANTS = datetime(2026, 10, 13, 23, 59, 59, tzinfo=UTC)
FIRST_DAY_WITH_VARIANTS = datetime(2026, 10, 14, tzinfo=UTC)
EARLY_2026 = datetime(2026, 3, 12, tzinfo=UTC)
MTOK = 1_000_000


def case(name: str, model: str, batch: str, standard: str, /, at: datetime = NOW, **usage: Any) -> Any:
    """One row of the table: amounts in USD, written out."""
    return pytest.param(model, at, Usage(**usage), Decimal(batch), Decimal(standard), id=name)


GOLDEN = [
    # opus-4-8 is $5 in, $25 out, $6.25 / $10 cache writes, $0.50 cache reads per MTok; batch half
    case("input", "claude-opus-4-8", "2.50", "5", input_tokens=MTOK),
    case("output", "claude-opus-4-8", "12.50", "25", output_tokens=MTOK),
    case("cache write 5m", "claude-opus-4-8", "3.125", "6.25", cache_write_5m_tokens=MTOK),
    case("cache write 1h", "claude-opus-4-8", "5", "10", cache_write_1h_tokens=MTOK),
    case("cache read", "claude-opus-4-8", "0.25", "0.50", cache_read_tokens=MTOK),
    case("web search is never discounted", "claude-opus-4-8", "0.03", "0.03", web_searches=3),  # 3 * $10 / 1,000
    # 2,700 * $5 = $0.0135 and 100 * $25 = $0.0025 a million: $0.016; half $0.008
    case("one row of the catalog", "claude-opus-4-8", "0.008", "0.016", input_tokens=2700, output_tokens=100),
    # 1,000 * 5 + 200 * 25 + 300 * 6.25 + 400 * 10 + 5,000 * 0.5 = 5,000 + 5,000 + 1,875 + 4,000 + 2,500 = 18,375 µ$
    # = $0.018375, half $0.0091875; one search adds $0.01 to each
    case(
        "all together",
        "claude-opus-4-8",
        "0.0191875",
        "0.028375",
        input_tokens=1000,
        output_tokens=200,
        cache_write_5m_tokens=300,
        cache_write_1h_tokens=400,
        cache_read_tokens=5000,
        web_searches=1,
    ),
    # US-only: 1.1 * ($0.0091875, $0.018375) = $0.01010625, $0.0202125; the search stays $0.01
    case(
        "all together, US-only",
        "claude-opus-4-8",
        "0.02010625",
        "0.0302125",
        input_tokens=1000,
        output_tokens=200,
        cache_write_5m_tokens=300,
        cache_write_1h_tokens=400,
        cache_read_tokens=5000,
        web_searches=1,
        inference_geo="us",
    ),
    case("US-only before Opus 4.6 costs no more", "claude-opus-4-5", "2.50", "5", input_tokens=MTOK, inference_geo="us"),
    case("global inference costs no more", "claude-opus-4-6", "2.50", "5", input_tokens=MTOK, inference_geo="global"),
    case("US-only from Opus 4.6", "claude-opus-4-6", "2.75", "5.50", input_tokens=MTOK, inference_geo="us"),
    # one token of haiku-5-5 in a US-only batch: $0.05e-6 * 1.1 = $0.000000055
    case("the smallest US-only token", "claude-haiku-5-5", "0.000000055", "0.00000011", input_tokens=1, inference_geo="us"),
    # one cache read of haiku-5-5 in a batch: $0.005e-6
    case("the smallest token", "claude-haiku-5-5", "0.000000005", "0.00000001", cache_read_tokens=1),
    # haiku-5-5 up to 100,000: $0.10 in, $0.50 out. 100,000 * 0.1 = 10,000 and 1,000 * 0.5 = 500 µ$: $0.0105
    case("haiku-5-5 at 100,000", "claude-haiku-5-5", "0.00525", "0.0105", input_tokens=100_000, output_tokens=1000),
    # above: $0.50 in, $2.50 out. 100,001 * 0.5 = 50,000.5 and 1,000 * 2.5 = 2,500 µ$: $0.0525005
    case("haiku-5-5 at 100,001", "claude-haiku-5-5", "0.02625025", "0.0525005", input_tokens=100_001, output_tokens=1000),
    # the prompt is 1 + 50,000 + 30,000 + 20,000 = 100,001: 1 * 0.5 + 50,000 * 0.625 + 30,000 * 1 + 20,000 * 0.05
    # = 0.5 + 31,250 + 30,000 + 1,000 = 62,250.5 µ$
    case(
        "cached tokens count for the tier",
        "claude-haiku-5-5",
        "0.03112525",
        "0.0622505",
        input_tokens=1,
        cache_write_5m_tokens=50_000,
        cache_write_1h_tokens=30_000,
        cache_read_tokens=20_000,
    ),
    case("output does not count for the tier", "claude-haiku-5-5", "0.05", "0.1", output_tokens=200_000),  # 200,000 * $0.5
    case("a dated name", "claude-haiku-5-5-20261001", "0.05", "0.1", output_tokens=200_000),
    # sonnet-4-5 above 200,000: $6 in. 200,001 * 6 = 1,200,006 µ$
    case("sonnet-4-5 at 200,000", "claude-sonnet-4-5-20250929", "0.3", "0.6", input_tokens=200_000),
    case("sonnet-4-5 at 200,001", "claude-sonnet-4-5-20250929", "0.600003", "1.200006", input_tokens=200_001),
    # opus-4-6 had a tier above 200,000 ($10) until 2026-03-12, and no batch variant in the data then
    case("opus-4-6 in early 2026", "claude-opus-4-6", "1.5", "3", at=EARLY_2026, input_tokens=300_000),
    case("opus-4-6 now", "claude-opus-4-6", "0.75", "1.5", input_tokens=300_000),
    # sonnet-4-6 had a tier above 200,000 ($6 in, $22.50 out) up to the same day: 300,000 * 6 = 1.8 and 1,000 * 22.5 = 0.0225 USD
    case("sonnet-4-6 in early 2026", "claude-sonnet-4-6", "0.91125", "1.8225", at=EARLY_2026, input_tokens=300_000, output_tokens=1000),
    # now 300,000 * 3 = 0.9 and 1,000 * 15 = 0.015 USD
    case("sonnet-4-6 now", "claude-sonnet-4-6", "0.4575", "0.915", input_tokens=300_000, output_tokens=1000),
    case("before batch variants", "claude-opus-4-8", "2.50", "5", at=LAST_DAY_WITHOUT_VARIANTS, input_tokens=MTOK),
    case("first day of batch variants", "claude-opus-4-8", "2.50", "5", at=FIRST_DAY_WITH_VARIANTS, input_tokens=MTOK),
    case("haiku-5-5 tier before batch variants", "claude-haiku-5-5", "0.0250025", "0.050005", at=EARLY_2026, input_tokens=100_010),
    # a model per family: 1 MTok in and 1 MTok out
    case("claude-2", "claude-2.1", "16", "32", input_tokens=MTOK, output_tokens=MTOK),  # 8 + 24
    case("claude-1", "claude-v1", "16", "32", input_tokens=MTOK, output_tokens=MTOK),  # 8 + 24
    case("haiku-3", "claude-3-haiku-20240307", "0.75", "1.5", input_tokens=MTOK, output_tokens=MTOK),  # 0.25 + 1.25
    case("haiku-3-5", "claude-3-5-haiku-20241022", "2.4", "4.8", input_tokens=MTOK, output_tokens=MTOK),  # 0.8 + 4
    case("sonnet-3", "claude-3-sonnet-20240229", "9", "18", input_tokens=MTOK, output_tokens=MTOK),  # 3 + 15
    case("sonnet-3-5", "claude-3-5-sonnet-20241022", "9", "18", input_tokens=MTOK, output_tokens=MTOK),  # 3 + 15
    case("sonnet-3-7", "claude-3-7-sonnet-20250219", "9", "18", input_tokens=MTOK, output_tokens=MTOK),  # 3 + 15
    case("opus-3", "claude-3-opus-20240229", "45", "90", input_tokens=MTOK, output_tokens=MTOK),  # 15 + 75
    case("sonnet-4", "claude-sonnet-4-20250514", "9", "18", input_tokens=MTOK, output_tokens=MTOK),  # 3 + 15
    case("opus-4", "claude-opus-4-20250514", "45", "90", input_tokens=MTOK, output_tokens=MTOK),  # 15 + 75
    case("haiku-4-5", "claude-haiku-4-5-20251001", "3", "6", input_tokens=100_000 * 10, output_tokens=MTOK),  # 1 + 5
    case("sonnet-5-5", "claude-sonnet-5-5", "6", "12", input_tokens=MTOK, output_tokens=MTOK),  # 2 + 10
    case("opus-4-1", "claude-opus-4-1-20250805", "45", "90", input_tokens=MTOK, output_tokens=MTOK),  # 15 + 75
    # 0.25 * 5 in, 0.25 * 25 out
    case("opus-4-5", "claude-opus-4-5-20251101", "3.75", "7.5", input_tokens=MTOK // 4, output_tokens=MTOK // 4),
    case("sonnet-4-6", "claude-sonnet-4-6", "9", "18", input_tokens=MTOK, output_tokens=MTOK),  # 3 + 15
    case("opus-4-7", "claude-opus-4-7", "15", "30", input_tokens=MTOK, output_tokens=MTOK),  # 5 + 25
    case("sonnet-5", "claude-sonnet-5", "6", "12", input_tokens=MTOK, output_tokens=MTOK),  # 2 + 10
    case("opus-5", "claude-opus-5", "15", "30", input_tokens=MTOK, output_tokens=MTOK),  # 5 + 25
    case("opus-5-5", "claude-opus-5-5", "12", "24", input_tokens=MTOK, output_tokens=MTOK),  # 4 + 20
    case("fable-5", "claude-fable-5", "30", "60", input_tokens=MTOK, output_tokens=MTOK),  # 10 + 50
    case("fable-5-1", "claude-fable-5-1", "30", "60", input_tokens=MTOK, output_tokens=MTOK),  # 10 + 50
    case("fable-5-2", "claude-fable-5-2", "24", "48", input_tokens=MTOK, output_tokens=MTOK),  # 8 + 40
    case("fable-5-1 cache reads are 0.025 of input", "claude-fable-5-1", "0.125", "0.25", cache_read_tokens=MTOK),
    case("mythos-5-2", "claude-mythos-5-2", "24", "48", input_tokens=MTOK, output_tokens=MTOK),  # 8 + 40
    # fast opus-4-8 is $10 in; a batch has no fast mode, so its price is the batch's
    case("fast mode", "claude-opus-4-8", "2.50", "10", input_tokens=MTOK, speed="fast"),
    case("fast mode, US-only", "claude-opus-4-8", "2.75", "11", input_tokens=MTOK, speed="fast", inference_geo="us"),
    case("fast mode where there is none", "claude-opus-4-6", "2.50", "5", input_tokens=MTOK, speed="fast"),
    case("web search where the data has no price", "claude-3-haiku-20240307", "0.01", "0.01", web_searches=1),
    case("nothing", "claude-opus-4-8", "0", "0"),
]


def test_every_model_family_has_a_case() -> None:
    """A family that genai-prices adds is missed here first."""
    from genai_prices.data import providers

    (anthropic,) = (provider for provider in providers if provider.id == "anthropic")
    found = (anthropic.find_model(param.values[0]) for param in GOLDEN)
    assert {model.id for model in found if model is not None} == {model.id for model in anthropic.models}


@pytest.mark.parametrize(("model", "at", "usage", "batch", "standard"), GOLDEN)
def test_a_usage_costs_what_the_price_list_says(model: str, at: datetime, usage: Usage, batch: Decimal, standard: Decimal) -> None:
    """Batch and standard cost agree with a sum worked out by hand, to the last digit."""
    cost = PriceBook().cost(model, usage, at)
    assert cost is not None
    assert (cost.batch_usd, cost.standard_usd) == (batch, standard)


ALL = {
    "input_tokens": MTOK,
    "output_tokens": MTOK,
    "cache_write_5m_tokens": MTOK,
    "cache_write_1h_tokens": MTOK,
    "cache_read_tokens": MTOK,
    "web_searches": 1000,
}
OVERRIDES = [
    # input 4.5, output 20; the rest follows: 4.5 * 1.25 = 5.625, * 2 = 9, * 0.1 = 0.45; searches $10.
    # tokens 4.5 + 20 + 5.625 + 9 + 0.45 = 39.575, half 19.7875
    pytest.param("claude-opus-4-8", {}, ALL, "29.7875", "49.575", id="derived cache prices"),
    # 4.5 + 20 + 5 + 8 + 0.25 = 37.75; batch 60% off: 15.1; 1,000 searches at $7
    pytest.param(
        "claude-opus-4-8",
        {
            "cache_write_5m_usd_per_mtok": 5,
            "cache_write_1h_usd_per_mtok": "8",
            "cache_read_usd_per_mtok": Decimal("0.25"),
            "web_search_usd_per_1k": "7.00",
            "batch_discount": "0.6",
        },
        ALL,
        "22.1",
        "44.75",
        id="every field",
    ),
    # nobody published mythos-5-1 here: usual multipliers, as the first case
    pytest.param("claude-mythos-5-1", {}, ALL, "29.7875", "49.575", id="a model without a published price"),
    # fable-5-1 reads its cache at 0.025 of input: 4.5 * 0.025 = 0.1125
    pytest.param("claude-fable-5-1", {}, {"cache_read_tokens": MTOK}, "0.05625", "0.1125", id="the model's own cache multiplier"),
    # haiku-5-5 above 100,000 prompt tokens is five times its base price: 4.5 * 5 = 22.5
    pytest.param("claude-haiku-5-5", {}, {"input_tokens": 200_000}, "2.25", "4.5", id="a tier keeps its proportion"),
    pytest.param("claude-opus-4-8", {}, {"input_tokens": MTOK, "speed": "fast"}, "2.25", "9", id="fast mode keeps its proportion"),
    # 4.5 * 1.1 = 4.95
    pytest.param("claude-opus-4-8", {}, {"input_tokens": MTOK, "inference_geo": "us"}, "2.475", "4.95", id="US-only"),
    pytest.param("claude-opus-4-5", {}, {"input_tokens": MTOK, "inference_geo": "us"}, "2.25", "4.5", id="no US-only before Opus 4.6"),
]


@pytest.mark.parametrize(("model", "fields", "usage", "batch", "standard"), OVERRIDES)
def test_a_negotiated_price_replaces_the_published_one(
    model: str, fields: dict[str, Any], usage: dict[str, Any], batch: str, standard: str
) -> None:
    """What the override says holds; what it leaves out keeps the proportions of the published price."""
    book = PriceBook({model: {"input_usd_per_mtok": "4.5", "output_usd_per_mtok": 20, **fields}})
    cost = book.cost(model, Usage(**usage), NOW)
    assert cost is not None
    assert (cost.batch_usd, cost.standard_usd) == (Decimal(batch), Decimal(standard))


@pytest.mark.parametrize(
    ("tokens", "batch"),
    # $0.000001 a million tokens is one pico-dollar each; half of it in a batch, a half rounded to even
    [(1, "0"), (2, "1e-12"), (3, "2e-12"), (5, "2e-12"), (7, "4e-12")],
)
def test_half_a_pico_dollar_rounds_to_even(tokens: int, batch: str) -> None:
    """0.5, 1, 1.5, 2.5 and 3.5 pico-dollars become 0, 1, 2, 2 and 4."""
    book = PriceBook({"m": {"input_usd_per_mtok": "0.000001", "output_usd_per_mtok": 0}})
    cost = book.cost("m", Usage(input_tokens=tokens), NOW)
    assert cost is not None
    assert cost.batch_usd == Decimal(batch)
    assert cost.batch_usd.as_tuple().exponent == -12

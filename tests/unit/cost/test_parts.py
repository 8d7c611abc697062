"""What is billed in parts, or not at all, and bills that others measured, with the figures written out."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from airflow_provider_batchkit.api.blocks import BilledPart, ResultBlock
from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.cost.tally import TallyBuilder, reprice
from airflow_provider_batchkit.model import USAGE_UNKNOWN, BatchItem, CostTally, RequestStatus, Usage

BOOK = PriceBook()
NOW = datetime(2026, 11, 1, tzinfo=UTC)
OPUS, HAIKU = "claude-opus-5", "claude-haiku-4-5-20251001"


def bill(*results: tuple[BilledPart, ...] | Usage, at: datetime = NOW) -> tuple[list[int | None], CostTally]:
    """Batch costs in picodollars, and the tally, of Opus results."""
    usages = [result if isinstance(result, Usage) else Usage() for result in results]
    block = ResultBlock.of([BatchItem("c", RequestStatus.SUCCEEDED, model=OPUS, usage=usage) for usage in usages])
    block.bills = [None if isinstance(result, Usage) else result for result in results]
    builder = TallyBuilder(BOOK, at)
    return list(builder.add_all(block)[0]), builder.tally()


def test_a_search_over_thirteen_thousand_tokens_costs_what_was_billed() -> None:
    """Opus 5, 13,333 input and 203 output tokens, one search: $0.04587 as a batch."""
    _, tally = bill(Usage(13_333, 203, web_searches=1, inference_geo="not_available"))
    assert tally.batch_cost_usd == Decimal("0.04587")


def test_cache_writes_cost_what_was_billed_above_plain_input() -> None:
    """Opus 5, 27,312 tokens written for five minutes: $0.017070 more than plain input."""
    _, written = bill(Usage(0, 0, cache_write_5m_tokens=27_312))
    _, plain = bill(Usage(27_312, 0))
    assert written.batch_cost_usd is not None and plain.batch_cost_usd is not None
    assert written.batch_cost_usd - plain.batch_cost_usd == Decimal("0.017070")


def test_a_dated_model_costs_what_its_name_costs() -> None:
    """Haiku 4.5, 16 input and 5 output tokens: $0.0000205 as a batch, $0.000041 otherwise."""
    builder = TallyBuilder(BOOK, NOW)
    builder.add_all(ResultBlock.of([BatchItem("c", RequestStatus.SUCCEEDED, model=HAIKU, usage=Usage(16, 5))]))
    assert (builder.tally().batch_cost_usd, builder.tally().standard_cost_usd) == (Decimal("0.0000205"), Decimal("0.000041"))


def test_a_compaction_beside_the_answer_is_billed() -> None:
    """203,000 and 4,500 tokens at $2.50 and $12.50 a million: $0.56375, of one request."""
    parts = (BilledPart(OPUS, Usage(180_000, 3_500)), BilledPart(OPUS, Usage(23_000, 1_000)))
    costs, tally = bill(parts, Usage(1_000, 0))
    assert costs == [563_750_000_000, 2_500_000_000]
    assert (tally.requests, tally.input_tokens, tally.output_tokens) == (2, 204_000, 4_500)


def test_each_part_is_priced_at_its_own_model() -> None:
    """An advisor's tokens stand under the advisor, and the request under the model that answered."""
    costs, tally = bill((BilledPart(HAIKU, Usage(412, 612)), BilledPart(OPUS, Usage(823, 1_612))))
    # 412 x 0.5 + 612 x 2.5 + 823 x 2.5 + 1612 x 12.5 dollars a million
    assert costs == [23_943_500_000]
    assert {name: (line.requests, line.input_tokens) for name, line in tally.models.items()} == {HAIKU: (1, 412), OPUS: (0, 823)}
    assert reprice(tally, BOOK, NOW).batch_cost_usd == tally.batch_cost_usd == Decimal("0.0239435")


@pytest.mark.parametrize(
    ("category", "at", "cost"),
    [
        ("cyber", datetime(2026, 11, 1, tzinfo=UTC), 0),
        ("general_harms", datetime(2026, 11, 1, tzinfo=UTC), 0),
        ("", datetime(2026, 11, 1, tzinfo=UTC), 0),
        ("bio", datetime(2026, 9, 23, 23, 59, tzinfo=UTC), 0),
        ("bio", datetime(2026, 9, 24, tzinfo=UTC), 2_500_000),
        ("frontier_llm", datetime(2026, 9, 24, tzinfo=UTC), 2_500_000),
        ("reasoning_extraction", datetime(2026, 9, 24, tzinfo=UTC), 2_500_000),
    ],
)
def test_a_refusal_before_any_output_is_billed_by_its_category_and_date(category: str, at: datetime, cost: int) -> None:
    """What is not billed counts as a request, and its tokens are not in the bill."""
    costs, tally = bill((BilledPart(OPUS, Usage(1, 0), category),), at=at)
    assert costs == [cost]
    assert (tally.requests, tally.input_tokens) == (1, 1 if cost else 0)


def test_an_unbilled_refusal_does_not_keep_a_bill_from_being_priced_again() -> None:
    """It has no prompt whose size would lie in another price tier."""
    large = Usage(150_000, 10)
    block = ResultBlock.of([BatchItem("c", RequestStatus.SUCCEEDED, model="claude-haiku-5-5", usage=large)] * 2)
    block.bills = [(BilledPart("claude-haiku-5-5", large, "cyber"),), None]
    builder = TallyBuilder(BOOK, NOW)
    builder.add_all(block)
    tally = builder.tally()
    # 150,000 x 0.25 + 10 x 1.25 dollars a million
    assert reprice(tally, BOOK, NOW).batch_cost_usd == tally.batch_cost_usd == Decimal("0.0375125")


def test_an_unknown_usage_makes_the_cost_unknown_and_hides_no_tokens() -> None:
    """The bill has a line of its own for it, so the model's own sum stays known."""
    costs, tally = bill((BilledPart(OPUS + USAGE_UNKNOWN, Usage()), BilledPart(OPUS, Usage(16, 0))), Usage(4, 0))
    assert costs == [None, 10_000_000]
    assert (tally.batch_cost_usd, tally.requests, tally.input_tokens) == (None, 2, 20)
    assert tally.models[OPUS].batch_cost_usd == Decimal("0.00005")
    assert reprice(tally, BOOK, NOW).batch_cost_usd is None

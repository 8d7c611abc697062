"""A batch is priced again from what the ledger keeps, without its results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.cost.tally import TallyBuilder, reprice
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.model import BatchItem, CostTally, RequestStatus, Usage

AT = datetime(2026, 11, 23, tzinfo=UTC)
#: half of what is published, for one model with a price tier and one without
NEGOTIATED = PriceBook(
    {
        "claude-haiku-5-5": {"input_usd_per_mtok": "0.1", "output_usd_per_mtok": "0.5"},
        "claude-opus-4-8": {"input_usd_per_mtok": "2.5", "output_usd_per_mtok": "12.5"},
    }
)
MODELS = ("claude-haiku-5-5", "claude-opus-4-8", "claude-sonnet-5", "nobody-knows-this")
USAGES = st.builds(
    Usage,
    input_tokens=st.integers(0, 300_000),
    output_tokens=st.integers(0, 5_000),
    cache_write_5m_tokens=st.integers(0, 3_000),
    cache_write_1h_tokens=st.integers(0, 3_000),
    cache_read_tokens=st.integers(0, 3_000),
    web_searches=st.integers(0, 3),
    inference_geo=st.sampled_from([None, "us", "global"]),
    speed=st.sampled_from([None, "fast"]),
)


def tally_of(requests: Sequence[tuple[str, Usage]], book: PriceBook) -> CostTally:
    builder = TallyBuilder(book, AT)
    builder.add_all(ResultBlock.of([BatchItem("c", RequestStatus.SUCCEEDED, model=model, usage=usage) for model, usage in requests]))
    return builder.tally()


@settings(max_examples=200, deadline=None)
@given(requests=st.lists(st.tuples(st.sampled_from(MODELS), USAGES), max_size=20))
def test_pricing_again_gives_what_pricing_at_once_gives(requests: list[tuple[str, Usage]]) -> None:
    """Through the ledger's JSON, at other prices: to the last digit the tally that the results themselves would have given."""
    first = tally_of(requests, PriceBook())
    stored = CostTally.from_json(json.loads(json.dumps(first.to_json(with_lines=True))))
    assert stored == first
    assert reprice(stored, NEGOTIATED, AT) == tally_of(requests, NEGOTIATED)
    assert reprice(reprice(stored, NEGOTIATED, AT), PriceBook(), AT) == first


def test_half_the_price_is_half_the_bill() -> None:
    """Opus 4.8 at $2.50 and $12.50: 2,700 x 1.25e-6 + 100 x 6.25e-6 = $0.004 a row as a batch, against $0.008."""
    tally = tally_of([("claude-opus-4-8", Usage(2700, 100))] * 50, PriceBook())
    again = reprice(tally, NEGOTIATED, AT)
    assert (tally.batch_cost_usd, again.batch_cost_usd, again.standard_cost_usd) == (Decimal("0.4"), Decimal("0.2"), Decimal("0.4"))
    assert again.price_version != tally.price_version


def test_a_model_gets_its_price_afterwards() -> None:
    """What was unknown when it landed is known once an override is there; the tokens were counted then."""
    tally = tally_of([("claude-next", Usage(1_000_000, 0))], PriceBook())
    assert tally.batch_cost_usd is None
    book = PriceBook({"claude-next": {"input_usd_per_mtok": "4", "output_usd_per_mtok": "20"}})
    assert reprice(tally, book, AT).batch_cost_usd == Decimal(2)


def test_prices_that_tell_requests_apart_which_were_priced_together_are_refused() -> None:
    """A tier that begins between the smallest and the largest prompt of a line: no guess is made."""
    flat = PriceBook({"claude-next": {"input_usd_per_mtok": "4", "output_usd_per_mtok": "20"}})
    tally = tally_of([("claude-next", Usage(10, 1)), ("claude-next", Usage(250_000, 1))], flat)
    line = tally.lines[0]
    assert (line.smallest_prompt, line.largest_prompt) == (10, 250_000)
    renamed = CostTally.from_json(json.loads(json.dumps(tally.to_json(with_lines=True)).replace("claude-next", "claude-haiku-5-5")))
    with pytest.raises(BatchInputError, match=r"2 requests to claude-haiku-5-5 have prompts of 10 to 250,000 tokens"):
        reprice(renamed, PriceBook(), AT)


def test_a_tally_without_lines_is_not_guessed_at() -> None:
    """The summary in XCom leaves the lines out."""
    tally = tally_of([("claude-opus-4-8", Usage(1, 1))], PriceBook())
    with pytest.raises(BatchInputError, match="no usage lines"):
        reprice(CostTally.from_json(tally.to_json()), PriceBook(), AT)

"""What spooled requests will cost, before any is sent: a figure to expect, and one that the bill cannot exceed.

The bound covers every request; :mod:`~airflow_provider_batchkit.request.exposure` says what is known of each. A request without
``inference_geo`` may be US-only by its workspace's default (https://platform.claude.com/docs/en/build-with-claude/data-residency), so it
is bounded at that price.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from typing import Any

from airflow_provider_batchkit.cost.checks import Counted, exposure_of
from airflow_provider_batchkit.cost.prices import ModelRates, PriceBook, PriceTier
from airflow_provider_batchkit.model import COST_QUANTUM, PICO_PER_USD, Bound, format_usd_exact, usd_text
from airflow_provider_batchkit.request.exposure import Exposure
from airflow_provider_batchkit.request.shards import Shard

_EXACT = Context(prec=60)


def bound_of(exposure: Exposure, book: PriceBook, at: datetime) -> Bound:
    """The most that ``exposure`` can cost at the prices of ``at``. Never below the bill; bounds of parts never sum to more."""
    if exposure.unbounded:
        return Bound(None, None, f"{exposure.unbounded}, which nothing bounds ({exposure.unbounded_requests:,} such requests)")
    tokens = sum(group.prompt_bound + group.max_tokens for group in exposure.groups.values())
    pico = 0
    for (model, geo, cached, _), group in exposure.groups.items():
        rates = book.rates(model, at)
        if rates is None:
            return Bound(None, tokens, f"no price is known for {model}")
        factor = Decimal(1) if geo == "global" else rates.us_multiplier
        # a bill rounds every request to the quantum, so each gets one picodollar more
        pico += group.requests + max(
            group.prompt_bound * prompt + group.max_tokens * answer
            for prompt, answer in (_dearest_pico(tier, cached, factor) for tier in rates.tiers if tier.min_prompt_tokens <= group.largest)
        )
    return Bound(pico * COST_QUANTUM, tokens)


def _dearest_pico(tier: PriceTier, cached: str, factor: Decimal) -> tuple[int, int]:
    """Whole picodollars for a token of the prompt and of the answer. They are rounded up, so that sums over any parts agree."""
    rates = tier.batch
    prompt = max(rates.input, rates.cache_write_5m, rates.cache_read) if cached else rates.input
    if cached == "1h":
        prompt = max(prompt, rates.cache_write_1h)
    return math.ceil(prompt * factor * PICO_PER_USD), math.ceil(rates.output * factor * PICO_PER_USD)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What requests will cost as a batch: expected, and at most. USD; ``None`` where it is not known (``why_unbounded`` says why)."""

    requests: int
    bytes: int
    input_tokens: int
    output_tokens: int
    expected_usd: Decimal | None
    upper_usd: Decimal | None
    upper_tokens: int | None
    #: the sources of the two token figures
    input_source: str
    output_source: str
    why_unbounded: str = ""

    def __str__(self) -> str:
        upper = f"at most {usd_text(self.upper_usd)}" if self.upper_usd is not None else f"without an upper bound: {self.why_unbounded}"
        return (
            f"{self.requests:,} requests: expected {usd_text(self.expected_usd)}, {upper} "
            f"(input {self.input_tokens:,} tokens, {self.input_source}; output {self.output_tokens:,} tokens, {self.output_source})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, money as decimal strings."""
        return {
            "requests": self.requests,
            "bytes": self.bytes,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "expected_usd": format_usd_exact(self.expected_usd),
            "upper_usd": format_usd_exact(self.upper_usd),
            "upper_tokens": self.upper_tokens,
            "input_source": self.input_source,
            "output_source": self.output_source,
            "why_unbounded": self.why_unbounded,
        }


def estimate_shards(
    shards: Sequence[Shard], counted: Counted, book: PriceBook, at: datetime, *, output_per_request: Decimal | None = None
) -> Estimate:
    """The estimate for all the shards together. See :func:`estimate`."""
    return estimate(exposure_of(shards), counted, book, at, output_per_request=output_per_request)


def estimate(exposure: Exposure, counted: Counted, book: PriceBook, at: datetime, *, output_per_request: Decimal | None = None) -> Estimate:
    """Price an exposure at the prices of ``at``.

    :param counted: the prompt tokens of a sample
    :param output_per_request: tokens that earlier requests of this kind were answered with; without it, ``max_tokens`` is expected
    """
    inputs = outputs = 0
    usd: Decimal | None = Decimal(0)
    with localcontext(_EXACT):
        for (model, geo, _, _), group in exposure.groups.items():
            tokens, size = counted.rate(model)
            prompt = min(-(-group.bytes * tokens // size), group.prompt_bound)
            answer = group.max_tokens
            if output_per_request is not None:
                answer = min(int((group.requests * output_per_request).to_integral_value(ROUND_HALF_EVEN)), answer)
            inputs, outputs = inputs + prompt, outputs + answer
            rates = book.rates(model, at)
            usd = None if usd is None or rates is None else usd + _expected_usd(rates, prompt, answer, group.requests, geo)
    most = bound_of(exposure, book, at)
    return Estimate(
        exposure.requests,
        exposure.body_bytes,
        inputs,
        outputs,
        None if usd is None else usd.quantize(COST_QUANTUM, context=_EXACT),
        most.usd,
        most.tokens,
        counted.source,
        "max_tokens of every request"
        if output_per_request is None
        else f"{output_per_request:,.0f} a request as in this task's earlier runs",
        most.why,
    )


def _expected_usd(rates: ModelRates, prompt: int, answer: int, requests: int, geo: str | None) -> Decimal:
    tier = [tier for tier in rates.tiers if tier.min_prompt_tokens * requests <= prompt][-1]
    usd = prompt * tier.batch.input + answer * tier.batch.output
    return usd * rates.us_multiplier if geo == "us" else usd

"""Adding up: what requests used and cost, per model; the same usage at other prices; and the bill as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from decimal import Context, Decimal
from typing import TypeVar

from airflow_provider_batchkit.api.blocks import BilledPart, ResultBlock
from airflow_provider_batchkit.cost.prices import ModelRates, PriceBook, is_refusal_billed, usd_of_pico
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.model import CostTally, ModelTally, Usage, UsageLine, format_usd_exact

#: columns of a list of sums: the counts of ``ModelTally`` and ``UsageLine``, then money in pico-dollars, then the prompts' sizes
_COUNTS = 7
_BATCH, _STANDARD, _CACHE_SAVINGS, _SMALLEST, _LARGEST = range(_COUNTS, _COUNTS + 5)
#: batch costs and standard costs of many results, in pico-dollars; None where a cost is not known
Costs = tuple[Sequence[int | None], Sequence[int | None]]
#: the facts that decide a result's prices, besides the size of its prompt: model, ``inference_geo``, ``speed``
_Kind = tuple[str | None, str | None, str | None]
_T = TypeVar("_T")


class TallyBuilder:
    """Adds up the requests of one batch, priced at ``at``. Exact; memory grows with the number of models and price tiers only."""

    def __init__(self, price_book: PriceBook, at: datetime) -> None:
        self._book = price_book
        self._at = at
        self._rates: dict[str, ModelRates | None] = {}
        #: running sums of usage that is priced alike, by model, ``inference_geo``, ``speed`` and start of the price tier
        self._lines: dict[tuple[str, str | None, str | None, int], list[int]] = {}

    def add_all(self, results: ResultBlock) -> Costs:
        """Count the results of many requests; returns the cost of each in whole pico-dollars.

        A result that the API counts nothing for costs nothing. The cost is None for an unknown model, whose tokens are still counted, and
        for a usage that is not known.
        """
        if results.bills is not None:
            return self._add_parts(results, results.bills)
        return self._add_simple(results)

    def _add_parts(self, results: ResultBlock, bills: Sequence[tuple[BilledPart, ...] | None]) -> Costs:
        """Count results of which some are billed in parts: each part is priced by itself, and only the first counts as a request."""
        simple = [place for place, parts in enumerate(bills) if parts is None]
        priced = [(simple, self._add_simple(results.rows(simple)))] if simple else []
        for first in (True, False):
            parts = [
                (place, part if part.refusal is None or is_refusal_billed(part.refusal, self._at) else BilledPart(part.model, Usage()))
                for place, all_parts in enumerate(bills)
                for part in (all_parts or ())[slice(1) if first else slice(1, None)]
            ]
            if parts:
                costs = self._add_simple(ResultBlock.billing([part for _, part in parts]), requests=int(first))
                priced.append(([place for place, _ in parts], costs))
        return _spread(len(results), priced)

    def _add_simple(self, results: ResultBlock, requests: int = 1) -> Costs:
        """Count results whose own usage is billed at their own model.

        :param requests: number of requests that each result counts as
        """
        kinds = results.models, results.inference_geos, results.speeds
        if len(results) and all(results.billed) and all(map(_of_one_value, kinds)):
            return self._add_kind((results.models[0], results.inference_geos[0], results.speeds[0]), results, requests)
        each = _places(zip(*kinds, strict=True), results.billed)
        return _spread(len(results), ((places, self._add_kind(kind, results.rows(places), requests)) for kind, places in each))

    def _add_kind(self, kind: _Kind, results: ResultBlock, requests: int) -> Costs:
        """Count results of one kind."""
        model = kind[0] or ""
        if model not in self._rates:
            self._rates[model] = self._book.rates(model, self._at)
        rates, prompts = self._rates[model], results.prompt_tokens
        if rates is None or len(rates.tiers) == 1:
            return self._add_alike(kind, 0, results, requests)
        lowest = rates.tier_start(min(prompts))
        if lowest == rates.tier_start(max(prompts)):
            return self._add_alike(kind, lowest, results, requests)
        each = _places(map(rates.tier_start, prompts), results.billed)
        return _spread(len(results), ((places, self._add_alike(kind, tier, results.rows(places), requests)) for tier, places in each))

    def _add_alike(self, kind: _Kind, tier: int, results: ResultBlock, requests: int) -> Costs:
        """Count requests that are priced alike, together."""
        model, geo, speed = kind
        rates = self._rates[model or ""]
        counts, prompts = results.counts, results.prompt_tokens
        sums = self._lines.setdefault((model or "", geo, speed, tier), [0] * _SMALLEST + [prompts[0], prompts[0]])
        sums[0] += len(results) * requests
        for place, column in enumerate(counts, start=1):
            sums[place] += sum(column)
        # a result that is not billed has no prompt
        smallest = min(prompts) or min(filter(None, prompts), default=0)
        sums[_SMALLEST] = min(filter(None, (sums[_SMALLEST], smallest)), default=0)
        sums[_LARGEST] = max(sums[_LARGEST], *prompts)
        if rates is None:
            return [None] * len(results), [None] * len(results)
        batch, standard = rates.pico_usd_all(counts, geo, speed, tier)
        sums[_BATCH] += sum(batch)
        sums[_STANDARD] += sum(standard)
        if results.cached:
            # a price tier depends on the whole prompt, cached or not, so the tier stays the same
            nothing = [0] * len(results)
            uncached, _ = rates.pico_usd_all([prompts, counts[1], nothing, nothing, nothing, counts[5]], geo, speed, tier)
            sums[_CACHE_SAVINGS] += sum(uncached) - sum(batch)
        return batch, standard

    def tally(self) -> CostTally:
        """Everything added so far. Without any request it is empty and names no prices."""
        lines = [UsageLine(model, geo, speed, *sums[:_COUNTS], *sums[_SMALLEST:]) for (model, geo, speed, _), sums in self._lines.items()]
        costs = [sums[_BATCH:_SMALLEST] if self._rates[key[0]] is not None else None for key, sums in self._lines.items()]
        return _tally(zip(lines, costs, strict=True), self._book)


def _of_one_value(column: Sequence[object]) -> bool:
    return column.count(column[0]) == len(column)


def _places(values: Iterable[_T], billed: Iterable[bool]) -> Iterable[tuple[_T, list[int]]]:
    """Each value that a billed result has, with the places of these results."""
    places: dict[_T, list[int]] = {}
    for place, (value, counts) in enumerate(zip(values, billed, strict=True)):
        if counts:
            places.setdefault(value, []).append(place)
    return places.items()


def _spread(number: int, parts: Iterable[tuple[Sequence[int], Costs]]) -> Costs:
    """The costs of ``number`` results. Each part has the costs at some places, which are added up; all other results cost nothing."""
    batch: list[int | None] = [0] * number
    standard: list[int | None] = [0] * number
    for places, costs in parts:
        for sums, added in zip((batch, standard), costs, strict=True):
            for place, cost in zip(places, added, strict=True):
                before = sums[place]
                sums[place] = None if before is None or cost is None else before + cost
    return batch, standard


def _tally(priced: Iterable[tuple[UsageLine, list[int] | None]], book: PriceBook) -> CostTally:
    """A tally of lines. Each has its batch cost, standard cost and cache savings in pico-dollars, or None where no price is known."""
    models: dict[str, ModelTally] = {}
    lines = []
    for line, pico in priced:
        batch, standard, cached = (None, None, None) if pico is None else map(usd_of_pico, pico)
        one = ModelTally(*line.counts, batch, standard, cached)  # type: ignore[call-arg,arg-type] # in the order of its fields
        if pico is None and not one.used_cache:
            one = replace(one, cache_savings_usd=Decimal(0))
        models[line.model] = models[line.model] + one if line.model in models else one
        lines.append(line)
    return CostTally(models, book.version if models else "", tuple(lines))


def reprice(tally: CostTally, book: PriceBook, at: datetime) -> CostTally:
    """Price the same usage again without its results, for example a batch's tally from the ledger at prices that were negotiated later.

    The result is exact, but for half a picodollar a request where a price has fractions of a picodollar a token.

    :param at: the time whose prices count, aware; to compare, give the batch's own creation
    :raises BatchInputError: the tally does not say enough, because requests were priced together that the other prices tell apart by
        the size of their prompts
    """
    if tally.requests != sum(line.requests for line in tally.lines):
        raise BatchInputError(
            "This tally has no usage lines to price again: it was written by an earlier version, or is not from the ledger."
        )
    priced = []
    for line in tally.lines:
        rates = book.rates(line.model, at)
        priced.append((line, None if rates is None else _repriced(line, rates)))
    return _tally(priced, book)


def _repriced(line: UsageLine, rates: ModelRates) -> list[int]:
    start = rates.tier_start(line.smallest_prompt)
    if rates.tier_start(line.largest_prompt) != start:
        raise BatchInputError(
            f"{line.requests:,} requests to {line.model} have prompts of {line.smallest_prompt:,} to {line.largest_prompt:,} tokens. The "
            f"new prices change at {rates.tier_start(line.largest_prompt):,}, and which requests are on which side is not kept."
        )
    usage = line.usage
    batch, standard = rates.pico_usd(usage, start)
    return [batch, standard, rates.pico_usd(usage.uncached(), start)[0] - batch]


def format_tally(tally: CostTally) -> str:
    """A text table for the log: a line per model, a total, and last ``batch $400.00  standard $800.00  savings $400.00``."""
    total = tally.total
    header = ("model", "requests", "input", "output", "cache write", "cache read", "batch cost", "standard cost", "savings")
    rows: list[tuple[str, ...]] = [header]
    for name, line in [*sorted(tally.models.items()), ("total", total)]:
        written = line.cache_write_5m_tokens + line.cache_write_1h_tokens
        counts = (line.requests, line.input_tokens, line.output_tokens, written, line.cache_read_tokens)
        money = (line.batch_cost_usd, line.standard_cost_usd, line.savings_usd)
        rows.append((name, *(f"{count:,}" for count in counts), *(_format_usd(usd) for usd in money)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    return "\n".join([*(form.format(*row) for row in rows), summary_line(tally)])


def summary_line(tally: CostTally) -> str:
    """``batch $400.00  standard $800.00  savings $400.00``; ``unknown`` where a model has no known price.

    With prompt caching also ``cache savings $80.00``: how much dearer the batch would have been without it.
    """
    batch, standard, savings = map(_format_usd, (tally.batch_cost_usd, tally.standard_cost_usd, tally.savings_usd))
    line = f"batch {batch}  standard {standard}  savings {savings}"
    return f"{line}  cache savings {_format_usd(tally.cache_savings_usd)}" if tally.total.used_cache else line


def _format_usd(value: Decimal | None) -> str:
    # a cost below a dollar is shown with six significant digits, so that a small cost never reads as none
    if value is None:
        return "unknown"
    amount = value.copy_abs()
    text = f"{amount:,.2f}" if amount >= 1 else format_usd_exact(Context(prec=6).plus(amount))
    return f"{'-' if value < 0 else ''}${text}"

"""Usage times prices → cost: per request, per model, and as text for the log.

Prices are the data that genai-prices bundles, pinned by its version. A price is resolved once per model and UTC date into integers
per token, for every prompt-size tier; pricing a request is then a few integer products (``genai_prices.calc_price`` takes 0.1 ms a
call). Sums are integer pico-dollars, so the costs of any rows add up to their tally to the last digit.

Rules that the price data does not hold, with their source, checked 2026-11-23 (DOCS is https://platform.claude.com/docs/en):

* A batch costs 50% of the standard price of all tokens, cache writes and reads included (DOCS/build-with-claude/batch-processing).
  genai-prices has it from 2026-10-14 on and for active models only; for other dates and models the half is taken here. Web searches
  have no batch rate.
* US-only inference costs 1.1 times the price of all tokens on Claude Opus 4.6 and later models, on top of the batch and fast mode
  prices; not of web searches (DOCS/about-claude/pricing, "Data residency pricing").
* There is no fast mode in batches (same page), so the batch price never depends on ``speed``; the standard price does.
* A web search costs $10 per 1,000 on every model (same page). This price is used where the data has none.
* A refusal before any output is not billed, although its usage shows tokens. Since 2026-09-24 it is billed for the categories of
  ``BILLED_REFUSALS`` (DOCS/test-and-evaluate/strengthen-guardrails/handle-streaming-refusals).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from datetime import UTC, date, datetime
from decimal import Context, Decimal, InvalidOperation, localcontext
from functools import lru_cache
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.model import COST_QUANTUM, PICO_PER_USD, USAGE_UNKNOWN, Cost, Usage, format_usd_exact

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import ModelInfo, ModelPrice

log = logging.getLogger(__name__)

US_ONLY_MULTIPLIER = Decimal("1.1")
#: genai-prices' ids of the models older than Opus 4.6: they do not take ``inference_geo``. A list of the old ones is complete and stays so.
MODELS_BEFORE_US_ONLY = {
    *("claude-v1", "claude-2", "claude-3-haiku", "claude-3-sonnet", "claude-3-opus-latest", "claude-3-5-haiku-latest"),
    *("claude-3-5-sonnet", "claude-3-7-sonnet-latest", "claude-sonnet-4-0", "claude-opus-4-0", "claude-opus-4-1"),
    *("claude-sonnet-4-5", "claude-haiku-4-5", "claude-opus-4-5"),
}
WEB_SEARCH_USD = Decimal("0.01")
BATCH_FACTOR = Decimal("0.5")

#: Categories of refusals before any output that are billed, and the time from which they are.
BILLED_REFUSALS = frozenset({"bio", "frontier_llm", "reasoning_extraction"})
REFUSALS_BILLED_FROM = datetime(2026, 9, 24, tzinfo=UTC)

#: The fields of an override: USD per million tokens, named after ``TokenRates``; USD per 1,000 searches; and a share of the price.
OVERRIDE_TOKEN_FIELDS = {f"{name}_usd_per_mtok": name for name in ("input", "output", "cache_write_5m", "cache_write_1h", "cache_read")}
OVERRIDE_FIELDS = (*OVERRIDE_TOKEN_FIELDS, "web_search_usd_per_1k", "batch_discount")

#: What may follow a model's name: a date, "latest", and the version of a release. ``claude-2.1`` has another form.
_NAME_SUFFIX = re.compile(r"([-@](\d{8}|\d{4}-\d\d-\d\d|latest))?(-v\d+(:\d+)?)?$|(?<=^claude-2)\.\d$")

#: This precision is wide enough that a product of a price and its factors is never rounded, whatever the caller's decimal context.
_EXACT = Context(prec=60)


@dataclass(frozen=True, slots=True)
class TokenRates:
    """USD per token."""

    input: Decimal
    output: Decimal
    cache_write_5m: Decimal
    cache_write_1h: Decimal
    cache_read: Decimal

    def times(self, factor: Decimal) -> TokenRates:
        """Every rate multiplied by ``factor``."""
        return TokenRates(*(rate * factor for rate in astuple(self)))


#: The proportions of a model without a published price: Anthropic's usual multipliers for cache writes and reads.
_USUAL_PROPORTIONS = TokenRates(Decimal(1), Decimal(1), Decimal("1.25"), Decimal(2), Decimal("0.1"))


@dataclass(frozen=True, slots=True)
class PriceTier:
    """The rates of every token, output included, of a request whose prompt has at least ``min_prompt_tokens`` tokens, cached or not."""

    min_prompt_tokens: int
    batch: TokenRates
    standard: TokenRates
    #: the standard price in fast mode; equals ``standard`` on models without such a mode
    fast: TokenRates


@dataclass(frozen=True, slots=True)
class ModelRates:
    """What one model costs on one date. ``tiers`` ascend, the first starts at 0 tokens; ``web_search_usd`` is per search."""

    tiers: tuple[PriceTier, ...]
    web_search_usd: Decimal
    us_multiplier: Decimal
    #: each tier's ``min_prompt_tokens`` with four rows of rates: global, global fast, US-only, US-only fast
    _lines: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        with localcontext(_EXACT):
            lines = tuple((tier.min_prompt_tokens, tuple(self._integer_lines(tier))) for tier in self.tiers)
        object.__setattr__(self, "_lines", lines)

    def _integer_lines(self, tier: PriceTier) -> Iterator[tuple[int, ...]]:
        for factor in (Decimal(1), self.us_multiplier):
            for standard in (tier.standard, tier.fast):
                rates = [*astuple(tier.batch.times(factor)), *astuple(standard.times(factor)), self.web_search_usd]
                pico = [rate.scaleb(12).normalize() for rate in rates]
                scale = 10 ** max(0, *(-int(rate.as_tuple().exponent) for rate in pico))
                yield scale, *(int(rate * scale) for rate in pico)

    def tier_start(self, prompt_tokens: int) -> int:
        """``min_prompt_tokens`` of the tier that a prompt of that size is priced in."""
        return max(minimum for minimum, _ in self._lines if prompt_tokens >= minimum)

    def pico_usd(self, usage: Usage, tier: int | None = None) -> tuple[int, int]:
        """Batch and standard cost of one request in whole pico-dollars, a half rounded to even.

        :param tier: ``min_prompt_tokens`` of the price tier; by default, the tier of the usage's own prompt
        """
        tier = self.tier_start(usage.prompt_tokens) if tier is None else tier
        (batch,), (standard,) = self.pico_usd_all([[count] for count in usage.counts], usage.inference_geo, usage.speed, tier)
        return batch, standard

    def pico_usd_all(
        self, counts: Sequence[Sequence[int]], inference_geo: str | None, speed: str | None, tier: int
    ) -> tuple[list[int], list[int]]:
        """The same as :meth:`pico_usd` for many requests that are priced alike: their batch costs and their standard costs.

        :param counts: ``Usage.counts`` of each, by column
        :param tier: ``min_prompt_tokens`` of the price tier of all of them
        """
        lines = next(lines for minimum, lines in self._lines if minimum == tier)
        scale, *rates, search = lines[(2 if inference_geo == "us" else 0) + (speed == "fast")]
        half = len(rates) // 2
        return _costs(counts, [*rates[:half], search], scale), _costs(counts, [*rates[half:], search], scale)


def _costs(counts: Sequence[Sequence[int]], rates: Sequence[int], scale: int) -> list[int]:
    """For each request, the sum of its counts times their rates, divided by ``scale``."""
    (fresh, output, *others), (fresh_rate, output_rate, *other_rates) = counts, rates
    costs = [i * fresh_rate + o * output_rate for i, o in zip(fresh, output, strict=True)]
    for column, rate in zip(others, other_rates, strict=True):
        if any(column):
            costs = [cost + count * rate for cost, count in zip(costs, column, strict=True)]
    return costs if scale == 1 else [_divide_half_even(cost, scale) for cost in costs]


class PriceBook:
    """Prices of Claude models: what genai-prices bundles, changed by ``overrides``, updated first if ``live``.

    ``overrides`` maps a model name to its negotiated price (see ``OVERRIDE_FIELDS``, :func:`load_price_overrides`). A name without a
    date covers its dated forms. What an override leaves out keeps the proportions of the published price: cache prices to input, long
    prompts to short ones, fast to standard; where none is published, Anthropic's usual cache multipliers (1.25, 2, 0.1) hold.
    ``batch_discount`` is the share taken off the token prices, 0.5 when left out.

    ``live`` fetches genai-prices' newest data once, at the first look-up (HTTPS, about 10 seconds at most; ``live_url`` names a mirror).
    When that fails, a warning is logged and the bundled prices are used; ``version`` says which. Prices that another part of the
    process has put into genai-prices are not used: a version must name its prices. Nothing is loaded or fetched before a look-up.

    Raises :class:`BatchInputError` for a bad override, and for a time without a zone.
    """

    def __init__(self, overrides: Mapping[str, Any] | None = None, live: bool = False, *, live_url: str | None = None) -> None:
        self._overrides = validate_price_overrides(overrides or {})
        self._live = live
        self._live_url = live_url
        self._snapshot: DataSnapshot | None = None
        self._rates: dict[tuple[str, date], ModelRates | None] = {}
        self._warned: set[str] = set()

    @property
    def version(self) -> str:
        """Names the prices, e.g. ``genai-prices 0.2.3+overrides:1f3a90bc+live 2026-11-23T10:00:00Z``."""
        snapshot = self._load()
        name = f"genai-prices {installed_version('genai-prices')}"
        if self._overrides:
            canonical = {m: {f: format_usd_exact(v) for f, v in values.items()} for m, values in self._overrides.items()}
            name += f"+overrides:{hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()[:8]}"
        if snapshot.from_auto_update:
            name += f"+live {snapshot.timestamp.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
        return name

    def rates(self, model: str, at: datetime) -> ModelRates | None:
        """The rates of ``model`` (the name that the API reported) on the UTC date of ``at``; ``None``, with one warning, if unknown."""
        if model.endswith(USAGE_UNKNOWN):
            return None
        if at.tzinfo is None:
            raise BatchInputError(f"prices depend on the UTC date, but {at.isoformat()} has no time zone; pass an aware time")
        key = (model, at.astimezone(UTC).date())
        if key not in self._rates:
            with localcontext(_EXACT):
                self._rates[key] = self._resolve(model, at)
        rates = self._rates[key]
        if rates is None and model not in self._warned:
            self._warned.add(model)
            message = "No price is known for model %r in %s: its tokens are counted, its cost is unknown. Add a price override for it."
            log.warning(message, model, self.version)
        return rates

    def cost(self, model: str, usage: Usage, at: datetime) -> Cost | None:
        """What one request costs, or ``None`` for an unknown model: an unknown cost is never zero."""
        rates = self.rates(model, at)
        return None if rates is None else cost_of_pico(*rates.pico_usd(usage))

    def _resolve(self, model: str, at: datetime) -> ModelRates | None:
        try:
            _, info = self._load().find_provider_model(model, None, "anthropic", None)
            published = _published_rates(info, at) if _is_named(info, model) else None
        except LookupError:
            published = None
        override = self._overrides.get(model) or self._overrides.get(re.sub(r"-\d{8}$", "", model))
        return published if override is None else _overridden_rates(override, published)

    def _load(self) -> DataSnapshot:
        if self._snapshot is None:
            from genai_prices.data import providers
            from genai_prices.data_snapshot import DataSnapshot

            fetched = _fetch_live(self._live_url) if self._live else None
            self._snapshot = fetched or DataSnapshot(providers=providers, from_auto_update=False)
        return self._snapshot


def _fetch_live(url: str | None) -> DataSnapshot | None:
    from genai_prices.update_prices import DEFAULT_UPDATE_URL, UpdatePrices

    url = url or DEFAULT_UPDATE_URL
    try:
        snapshot = UpdatePrices(url=url).fetch()  # once and in this thread: no background task, no change to the process-wide prices
        if snapshot is not None:
            snapshot.find_provider_model("claude-opus-4-8", None, "anthropic", None)  # a file without Claude's prices is no update
    except Exception as error:  # noqa: BLE001 - the update is optional, and the bundled prices remain
        log.warning("Prices could not be updated from %s (%s: %s); using the bundled ones.", url, type(error).__name__, error)
        return None
    return snapshot


def _is_named(info: ModelInfo, model: str) -> bool:
    """Whether ``model`` is really a name of the model that the price data matched it to.

    Much of the data matches by the beginning of a name, so that ``claude-opus-4-1`` would lend its price to a ``claude-opus-4-10``. Only a
    date and a version may follow a name.
    """
    name = model.lower()
    clauses = list(_clauses(info.match))
    if any(re.fullmatch(clause.regex, name) for clause in clauses if hasattr(clause, "regex")):
        return True
    spelled = [getattr(clause, kind) for clause in clauses for kind in ("equals", "starts_with") if hasattr(clause, kind)]
    return _base(name) in {_base(known.rstrip("@").lower()) for known in (info.id, *spelled)}


def _base(name: str) -> str:
    return _NAME_SUFFIX.sub("", name)


def _clauses(match: Any) -> Iterator[Any]:
    """The single clauses of a model's rule."""
    for clause in getattr(match, "or_", None) or getattr(match, "and_", None) or ():
        yield from _clauses(clause)
    yield match


def _published_rates(info: ModelInfo, at: datetime) -> ModelRates | None:
    standard = info.get_prices(at)
    if standard.input_mtok is None or standard.output_mtok is None:
        return None
    fast = info.get_prices(at, {"speed": "fast"})
    variants = [variant for variant in info.price_variants or () if variant.when == {"processing": "batch"}]
    listed = any(variant.constraint is None or variant.constraint.active(at) for variant in variants)
    batch = info.get_prices(at, {"processing": "batch"}) if listed else None
    starts = {
        tier.start
        for prices in (standard, fast, batch or standard)
        for price in vars(prices).values()
        for tier in getattr(price, "tiers", ())
    }
    tiers = []
    for minimum in (0, *sorted(start + 1 for start in starts)):
        full = _token_rates(standard, minimum)
        half = _token_rates(batch, minimum) if batch is not None else full.times(BATCH_FACTOR)
        tiers.append(PriceTier(minimum, batch=half, standard=full, fast=_token_rates(fast, minimum)))
    search = standard.web_searches_kcount
    search_usd = search.scaleb(-3) if isinstance(search, Decimal) else WEB_SEARCH_USD
    return ModelRates(tuple(tiers), search_usd, Decimal(1) if info.id in MODELS_BEFORE_US_ONLY else US_ONLY_MULTIPLIER)


def _token_rates(prices: ModelPrice, prompt_tokens: int) -> TokenRates:
    def rate(*keys: str) -> Decimal:
        # a category without a price of its own is billed at the more general one, as in calc_price
        price = next(price for key in keys if (price := getattr(prices, key)) is not None)
        usd_per_mtok = price if isinstance(price, Decimal) else price.base
        for tier in getattr(price, "tiers", ()):
            if prompt_tokens > tier.start:
                usd_per_mtok = tier.price
        return usd_per_mtok.scaleb(-6)

    return TokenRates(
        input=rate("input_mtok"),
        output=rate("output_mtok"),
        cache_write_5m=rate("cache_write_5m_mtok", "cache_write_mtok", "input_mtok"),
        cache_write_1h=rate("cache_write_1h_mtok", "cache_write_mtok", "input_mtok"),
        cache_read=rate("cache_read_mtok", "input_mtok"),
    )


def _overridden_rates(override: Mapping[str, Decimal], published: ModelRates | None) -> ModelRates:
    if published is None or not all(astuple(published.tiers[0].standard)):
        usual = PriceTier(0, batch=_USUAL_PROPORTIONS, standard=_USUAL_PROPORTIONS, fast=_USUAL_PROPORTIONS)
        published = ModelRates((usual,), published.web_search_usd if published else WEB_SEARCH_USD, US_ONLY_MULTIPLIER)
    base = published.tiers[0].standard

    def scaled(rates: TokenRates) -> TokenRates:
        values = {}
        for given, name in OVERRIDE_TOKEN_FIELDS.items():
            known = given if given in override else "input_usd_per_mtok"
            usd_per_mtok = override[known] * getattr(rates, name) / getattr(base, OVERRIDE_TOKEN_FIELDS[known])
            values[name] = usd_per_mtok.quantize(Decimal("1e-12")).scaleb(-6)
        return TokenRates(**values)

    factor = 1 - override.get("batch_discount", 1 - BATCH_FACTOR)
    tiers = []
    for tier in published.tiers:
        standard = scaled(tier.standard)
        tiers.append(PriceTier(tier.min_prompt_tokens, batch=standard.times(factor), standard=standard, fast=scaled(tier.fast)))
    search = override.get("web_search_usd_per_1k")
    return ModelRates(tuple(tiers), published.web_search_usd if search is None else search.scaleb(-3), published.us_multiplier)


def load_price_overrides(path: str | Path) -> dict[str, dict[str, Decimal]]:
    """Read negotiated prices from a local ``.json`` or ``.toml`` file: one table per model, fields as in ``OVERRIDE_FIELDS``.

    Numbers and strings are both read exactly. Raises :class:`BatchInputError` for a file or a price that is not usable.
    """
    path = Path(path)
    parse: Any = {".json": json.loads, ".toml": tomllib.loads}.get(path.suffix)
    if parse is None:
        raise _bad_override(f"file {path}: its name must end in .json or .toml")
    try:
        data = parse(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON, not TOML
        raise _bad_override(f"file {path} cannot be read: {error}") from error
    return validate_price_overrides(data)


def validate_price_overrides(overrides: Mapping[str, Any]) -> dict[str, dict[str, Decimal]]:
    """Check negotiated prices and return them as decimals. Raises :class:`BatchInputError` naming model, field and value."""
    if not isinstance(overrides, Mapping):
        raise _bad_override(f"must be a table from model names to prices, not {overrides!r}")
    return {model: _validate_override(model, values) for model, values in overrides.items()}


def _validate_override(model: Any, values: Any) -> dict[str, Decimal]:
    where = f"for model {model!r}"
    if not isinstance(model, str) or not model:
        raise _bad_override(f"{where}: the model's name must be a non-empty string")
    if not isinstance(values, Mapping):
        raise _bad_override(f"{where} is {values!r}: must be a table of {', '.join(OVERRIDE_FIELDS)}")
    if unknown := [name for name in values if name not in OVERRIDE_FIELDS]:
        raise _bad_override(f"{where}: unknown field {unknown[0]!r}; use {', '.join(OVERRIDE_FIELDS)}")
    if missing := [name for name in ("input_usd_per_mtok", "output_usd_per_mtok") if name not in values]:
        raise _bad_override(f"{where}: field {missing[0]!r} is missing")
    return {name: _validate_price(f"{where}: field {name!r} is {value!r}", name, value) for name, value in values.items()}


def _validate_price(what: str, name: str, value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise _bad_override(f"{what}: must be a string, an int or a Decimal; a float is not exact, quote it")
    try:
        price = Decimal(value)
    except InvalidOperation:
        raise _bad_override(f"{what}: is not a decimal number") from None
    if not price.is_finite() or price < 0:
        raise _bad_override(f"{what}: must be finite and not negative")
    limit, unit = (1, "a share of the price") if name == "batch_discount" else (1_000_000, "in USD")
    if price > limit:
        raise _bad_override(f"{what}: must not be above {limit:,}; it is {unit}")
    if (rounded := price.quantize(Decimal("1e-6"), context=_EXACT)) != price:
        raise _bad_override(f"{what}: must not have more than 6 decimals")
    return rounded


def _bad_override(problem: str) -> BatchInputError:
    return BatchInputError(f"price override {problem} (no request was sent)")


def is_refusal_billed(category: str, at: datetime) -> bool:
    """Whether a refusal before any output is billed, in a batch that was created at ``at``."""
    return category in BILLED_REFUSALS and at >= REFUSALS_BILLED_FROM


def cost_of_pico(batch: int, standard: int) -> Cost:
    """The cost for whole picodollars."""
    return Cost(usd_of_pico(batch), usd_of_pico(standard))


@lru_cache(maxsize=10_000)
def format_pico_exact(pico: int | None) -> str | None:
    """The same as :func:`format_usd_exact`, for whole picodollars that are not negative. It is cached: many requests cost the same."""
    if pico is None:
        return None
    whole, fraction = divmod(pico, PICO_PER_USD)
    return f"{whole}.{f'{fraction:012d}'.rstrip('0').ljust(2, '0')}"


def usd_of_pico(pico: int) -> Decimal:
    """Whole picodollars in USD, exactly."""
    return _EXACT.multiply(pico, COST_QUANTUM)


def _divide_half_even(value: int, divisor: int) -> int:
    quotient, rest = divmod(value, divisor)
    return quotient + (2 * rest > divisor or (2 * rest == divisor and quotient % 2 == 1))

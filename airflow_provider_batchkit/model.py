"""The values that pass between the stages: no I/O, no Airflow, no API client."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from decimal import ROUND_CEILING, Context, Decimal, InvalidOperation
from enum import Enum
from operator import attrgetter
from typing import Any

import msgspec

from airflow_provider_batchkit.exceptions import BatchInputError

#: Limits of the API, from its documentation: requests and bytes of one batch, and the form of a ``custom_id``.
MAX_REQUESTS_PER_BATCH = 100_000
MAX_BYTES_PER_BATCH = 256 * 1000 * 1000
CUSTOM_ID_PATTERN = r"^[a-zA-Z0-9_-]{1,64}$"

#: Costs are kept to a millionth of a millionth of a dollar: a batch price of $0.005 per million tokens is 5e-9 dollars a token.
COST_QUANTUM = Decimal("1e-12")
PICO_PER_USD = 10**12


class RequestStatus(str, Enum):
    """The one outcome that every request gets when its batch lands."""

    SUCCEEDED = "succeeded"
    ERRORED = "errored"
    EXPIRED = "expired"
    CANCELED = "canceled"
    #: the request succeeded at the API and is billed, but its answer does not fit the schema
    INVALID_OUTPUT = "invalid_output"
    #: the result file ended without a line for the request
    MISSING = "missing"


#: Outcomes of requests that were answered and are billed. Their rows are always written; a failed request's row only on demand.
ANSWERED = (RequestStatus.SUCCEEDED, RequestStatus.INVALID_OUTPUT)

#: ``error_type`` of an answer that is unfinished
TRUNCATED, PAUSED, REFUSED = "truncated", "paused", "refused"
#: a message's ``stop_reason`` → the ``error_type`` of its row; a complete answer has none
UNFINISHED = {
    "max_tokens": TRUNCATED,
    "model_context_window_exceeded": TRUNCATED,
    "pause_turn": PAUSED,
    "compaction": PAUSED,
    "refusal": REFUSED,
}

#: outcomes of a row, the best first; see :func:`outcome_rank`
_BEST_FIRST = ("finished", TRUNCATED, "invalid_output", PAUSED, REFUSED, "errored", "canceled", "expired", "missing")


def outcome_rank(status: str, error_type: str | None) -> int:
    """The rank of an outcome. When several rounds have asked a row, the outcome with the lowest rank counts, and the latest among equals.

    :param error_type: distinguishes unfinished answers, whatever their status
    """
    if status == RequestStatus.SUCCEEDED.value and error_type is None:
        return 0
    answered = status in (RequestStatus.SUCCEEDED.value, RequestStatus.INVALID_OUTPUT.value)
    return _BEST_FIRST.index(error_type if answered and error_type in UNFINISHED.values() else status)


#: follows a model's name in a bill for requests whose usage the API did not report, so that their cost is not known
USAGE_UNKNOWN = " (usage unknown)"


#: the counters of a usage, in the order in which every shape of it has them
COUNTERS = ("input_tokens", "output_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens", "cache_read_tokens", "web_searches")
#: reads these counters of a usage, a bill's line or a block
counts_of: Callable[[Any], tuple[Any, ...]] = attrgetter(*COUNTERS)


class Usage(msgspec.Struct, frozen=True, gc=False):
    """What the API counted for one request.

    ``input_tokens`` excludes cached tokens, as the API reports it; ``prompt_tokens`` is the whole prompt.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    cache_read_tokens: int = 0
    web_searches: int = 0
    #: ``"us"`` is billed at 1.1 times the price on models that support it
    inference_geo: str | None = None
    #: ``"fast"`` has its own price
    speed: str | None = None

    @property
    def prompt_tokens(self) -> int:
        """All tokens of the prompt, cached or not. Price tiers by prompt size depend on them."""
        return self.input_tokens + self.cache_write_5m_tokens + self.cache_write_1h_tokens + self.cache_read_tokens

    @property
    def counts(self) -> tuple[int, ...]:
        """All the counts, in the order of ``COUNTERS``."""
        return counts_of(self)

    def uncached(self) -> Usage:
        """The usage that would have been counted without prompt caching."""
        return msgspec.structs.replace(
            self, input_tokens=self.prompt_tokens, cache_write_5m_tokens=0, cache_write_1h_tokens=0, cache_read_tokens=0
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one usage in USD, exact to ``COST_QUANTUM``: as part of a batch, and at the standard price."""

    batch_usd: Decimal
    standard_usd: Decimal


@dataclass(frozen=True, slots=True)
class BatchSnapshot:
    """A batch as the API last showed it. Times are aware and UTC."""

    batch_id: str
    #: ``in_progress``, ``canceling`` or ``ended``
    processing_status: str
    counts: BatchCounts
    created_at: datetime
    expires_at: datetime | None = None
    ended_at: datetime | None = None
    #: set once the results are gone, 29 days after creation
    archived_at: datetime | None = None
    #: whether the API gave every one of the counts; a missing count is 0
    counted: bool = True


class BatchItem(msgspec.Struct, frozen=True, gc=False):
    """One line of a batch's results.

    ``status`` is the API's, except for an answer that is unfinished or of no use. ``error_type`` and ``error_message`` of a failed request
    are the API's. ``text`` joins the text blocks of the answer. Where an answer without text has only one tool call, ``text`` is the call's
    input as JSON. An unfinished answer has the ``error_type`` ``truncated``, ``paused`` or ``refused`` (see ``UNFINISHED``). Its status is
    ``invalid_output``, unless it is truncated and has text. ``usage`` is what the API counted, over all iterations; it is None where the
    API counts nothing or does not say. ``message`` is the whole message as the API sent it, in JSON bytes.
    """

    custom_id: str
    status: RequestStatus
    text: str | None = None
    stop_reason: str | None = None
    model: str | None = None
    usage: Usage | None = None
    error_type: str | None = None
    error_message: str | None = None
    message: bytes | None = None
    message_id: str | None = None
    #: the API's id of a request that failed
    request_id: str | None = None
    #: the message's ``stop_details`` as JSON
    stop_details: str | None = None

    @property
    def content(self) -> str | None:
        """Another name of ``text``: the text of the answer; None for a request that was not answered."""
        return self.text


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """Requests of a batch per status, as the API reports them. All are ``processing`` until the whole batch has ended."""

    processing: int = 0
    succeeded: int = 0
    errored: int = 0
    canceled: int = 0
    expired: int = 0

    @property
    def total(self) -> int:
        return self.processing + self.succeeded + self.errored + self.canceled + self.expired

    @property
    def done(self) -> int:
        """Requests that are not processing any more. The API may count none before a batch has ended."""
        return self.total - self.processing

    def __add__(self, other: BatchCounts) -> BatchCounts:
        return BatchCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def _add_optional(a: Decimal | None, b: Decimal | None) -> Decimal | None:
    return None if a is None or b is None else a + b


@dataclass(frozen=True, slots=True)
class ModelTally:
    """Tokens and cost of one model. Costs are USD, or ``None`` where the model has no known price."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    cache_read_tokens: int = 0
    web_searches: int = 0
    batch_cost_usd: Decimal | None = Decimal(0)
    standard_cost_usd: Decimal | None = Decimal(0)
    #: the savings of prompt caching on the batch's price; below zero where the writes cost more than the reads saved
    cache_savings_usd: Decimal | None = Decimal(0)

    def __add__(self, other: ModelTally) -> ModelTally:
        counts = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if not f.name.endswith("_usd")}
        return ModelTally(
            **counts,
            batch_cost_usd=_add_optional(self.batch_cost_usd, other.batch_cost_usd),
            standard_cost_usd=_add_optional(self.standard_cost_usd, other.standard_cost_usd),
            cache_savings_usd=_add_optional(self.cache_savings_usd, other.cache_savings_usd),
        )

    @property
    def used_cache(self) -> bool:
        """Whether a request wrote to the prompt cache or read from it."""
        return bool(self.cache_write_5m_tokens or self.cache_write_1h_tokens or self.cache_read_tokens)

    @property
    def savings_usd(self) -> Decimal | None:
        """The standard price minus the batch price."""
        if self.batch_cost_usd is None or self.standard_cost_usd is None:
            return None
        return self.standard_cost_usd - self.batch_cost_usd


@dataclass(frozen=True, slots=True)
class UsageLine:
    """Requests to one model that were priced alike. Such lines are enough to price a batch again without its results."""

    model: str
    inference_geo: str | None
    speed: str | None
    requests: int
    input_tokens: int
    output_tokens: int
    cache_write_5m_tokens: int
    cache_write_1h_tokens: int
    cache_read_tokens: int
    web_searches: int
    #: tokens of the smallest and the largest prompt, cached or not
    smallest_prompt: int
    largest_prompt: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Requests, tokens and searches, in the order of the first fields of ``ModelTally``."""
        return (self.requests, *counts_of(self))

    @property
    def usage(self) -> Usage:
        """The usage of all requests together."""
        return Usage(*counts_of(self), self.inference_geo, self.speed)  # type: ignore[call-arg] # the counts are its first fields


@dataclass(frozen=True, slots=True)
class CostTally:
    """What a batch, a job or a month cost, per model. Tallies add up with ``+``, exactly, in ``Decimal`` USD.

    A total is ``None`` as soon as one model in it has no known price: an unknown cost is never shown as zero. Tokens always count.
    ``price_version`` names the price data that was used; a sum over several versions lists them. ``lines`` hold what is needed to price the
    same usage again (:func:`~airflow_provider_batchkit.cost.tally.reprice`); the ledger keeps them.
    """

    models: Mapping[str, ModelTally] = field(default_factory=dict)
    price_version: str = ""
    lines: tuple[UsageLine, ...] = field(default=(), compare=False, repr=False)

    def __add__(self, other: CostTally) -> CostTally:
        models = dict(self.models)
        for name, tally in other.models.items():
            models[name] = models[name] + tally if name in models else tally
        versions = [*self.price_version.split(", "), *other.price_version.split(", ")]
        return CostTally(models, ", ".join(sorted({v for v in versions if v})), self.lines + other.lines)

    @classmethod
    def sum(cls, tallies: Iterable[CostTally]) -> CostTally:
        """Add any number of tallies. The sum of none is an empty tally."""
        total = cls()
        for tally in tallies:
            total = total + tally
        return total

    @property
    def total(self) -> ModelTally:
        """The sum over all models."""
        total = ModelTally()
        for tally in self.models.values():
            total = total + tally
        return total

    @property
    def requests(self) -> int:
        return self.total.requests

    @property
    def input_tokens(self) -> int:
        return self.total.input_tokens

    @property
    def output_tokens(self) -> int:
        return self.total.output_tokens

    @property
    def cache_write_5m_tokens(self) -> int:
        return self.total.cache_write_5m_tokens

    @property
    def cache_write_1h_tokens(self) -> int:
        return self.total.cache_write_1h_tokens

    @property
    def cache_read_tokens(self) -> int:
        return self.total.cache_read_tokens

    @property
    def web_searches(self) -> int:
        return self.total.web_searches

    @property
    def batch_cost_usd(self) -> Decimal | None:
        return self.total.batch_cost_usd

    @property
    def standard_cost_usd(self) -> Decimal | None:
        return self.total.standard_cost_usd

    @property
    def savings_usd(self) -> Decimal | None:
        return self.total.savings_usd

    @property
    def cache_savings_usd(self) -> Decimal | None:
        return self.total.cache_savings_usd

    def to_json(self, *, with_lines: bool = False) -> dict[str, Any]:
        """Plain JSON values: counts as numbers, money as decimal strings (a JSON number would be a binary float)."""
        lines = {"lines": [asdict(line) for line in self.lines]} if with_lines else {}
        return {
            **_tally_json(self.total),
            "price_version": self.price_version,
            "models": {name: _tally_json(tally) for name, tally in sorted(self.models.items())},
            **lines,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CostTally:
        """The inverse of :meth:`to_json`."""
        models = {name: _tally_from_json(values) for name, values in data["models"].items()}
        return cls(models, data.get("price_version", ""), tuple(UsageLine(**line) for line in data.get("lines", ())))


def _tally_json(tally: ModelTally) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for f in fields(tally):
        value = getattr(tally, f.name)
        values[f.name] = format_usd_exact(value) if f.name.endswith("_usd") else value
    values["savings_usd"] = format_usd_exact(tally.savings_usd)
    return values


def _tally_from_json(values: Mapping[str, Any]) -> ModelTally:
    known: dict[str, Any] = {}
    for f in fields(ModelTally):
        value = values.get(f.name, 0)
        known[f.name] = (None if value is None else Decimal(str(value))) if f.name.endswith("_usd") else value
    tally = ModelTally(**known)
    if tally.used_cache and "cache_savings_usd" not in values:
        # the tally was written before cache savings were counted
        return replace(tally, cache_savings_usd=None)
    return tally


@dataclass(frozen=True, slots=True)
class Bound:
    """The most that requests can cost as a batch, in USD, and the most tokens they can use. A bill is never above it.

    A value is ``None`` where nothing bounds the requests, or where no price is known; ``why`` says which.
    """

    usd: Decimal | None
    tokens: int | None
    why: str = ""


def parse_usd(value: Any, name: str) -> Decimal:
    """A positive amount in USD. A float is taken as it prints.

    :raises BatchInputError: for anything else; the error names ``name``
    """
    try:
        amount = Decimal(str(value)) if isinstance(value, Decimal | int | str | float) and not isinstance(value, bool) else None
    except InvalidOperation:
        amount = None
    if amount is None or not amount.is_finite() or amount <= 0:
        raise BatchInputError(f"{name} must be an amount in USD above 0, such as '25.00', not {value!r}.")
    return amount


def format_usd_exact(value: Decimal | None) -> str | None:
    """Every digit of an amount, without an exponent and without trailing zeros beyond the cents."""
    if value is None:
        return None
    text = f"{value:f}"
    whole, _, fraction = text.partition(".")
    fraction = fraction.rstrip("0")
    return f"{whole}.{fraction.ljust(2, '0')}"


def usd_text(value: Decimal | None) -> str:
    """An amount for a person, rounded up: to the cent, or to four digits below a dollar."""
    if value is None:
        return "unknown"
    if value >= 1:
        return f"${value.quantize(Decimal('0.01'), ROUND_CEILING):,}"
    return f"${format_usd_exact(Context(prec=4, rounding=ROUND_CEILING).plus(value))}"


#: Types that a source reports for its columns → the type of Python's values that each narrows. The ledger keeps the type of a key column
#: as a text: ``integer``, ``char(10)``, ``numeric(38,0)``, ``enum(public.mood)``.
_NARROWER_KEYS = {"smallint": "integer", "int": "integer", "real": "float", "char": "text", "varchar": "text", "enum": "text"}


def key_kind(type_name: str) -> str:
    """The type of the values of a key column, such as ``text`` for ``char(10)``."""
    base = type_name.partition("(")[0]
    return _NARROWER_KEYS.get(base, base)


def common_key_type(type_names: Collection[str]) -> str:
    """The narrowest type of a key column that holds the keys of all these types; it may be text."""
    kinds = set(map(key_kind, type_names))
    if len(set(type_names)) == 1:
        return next(iter(type_names))
    if len(kinds) == 1:
        return kinds.pop()
    return "numeric" if kinds == {"integer", "numeric"} else "text"

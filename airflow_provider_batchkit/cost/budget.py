"""A budget: a named cap on what batches may cost or use over a window of time, shared by all tasks that name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.model import parse_usd

WINDOWS = ("day", "week", "month", "ever")
_MAX_NAME = 250
#: the greatest cap in USD and in tokens: its picodollars fit into the ledger's BIGINT, with room for a sum
_MAX_USD = Decimal(4_000_000)
_MAX_TOKENS = 2**62
#: shares of a cap are kept as whole numbers of hundredths of a percent
SHARE_UNIT = 10_000


@dataclass(frozen=True, slots=True)
class Budget:
    """A cap in USD, in tokens, or both. A batch counts in the window in which its task submits it, whenever it lands.

    A task reserves the most that its requests can cost before it sends the first, and a landed batch counts at its real cost. So a task
    may be refused although its bill would have fitted, but the sum never exceeds the cap.
    """

    #: Tasks that give the same name share the sum. Each is held against the cap that it gives itself.
    name: str
    #: USD at batch prices; also as a string, an int, or a float, which is taken as it prints
    usd: Decimal | None = None
    #: prompt tokens, cached or not, and output tokens together
    tokens: int | None = None
    #: ``day``, ``week`` (from Monday), ``month`` or ``ever``, in UTC
    window: str = "month"
    #: ``fail`` or ``skip`` the task that would exceed it
    on_exceeded: str = "fail"
    #: Shares of the cap, above 0 and up to 1. When what is spent and reserved reaches a share, the notifiers are called, once a window. The
    #: share is that of the cap which is nearer to its limit; 1 also stands for a task that the budget has refused.
    alert_at: Sequence[Decimal | float | str] = ()
    #: Airflow's notifiers, or functions of the task's context, which has ``batchkit``. The task calls them. The ledger knows a notifier by
    #: its place in the list.
    notifiers: Sequence[Any] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        """:raises BatchInputError: when a field is not valid"""
        # a DAG file is not type-checked, so the values may be of any type
        name: Any = self.name
        tokens: Any = self.tokens
        if not isinstance(name, str) or not 1 <= len(name) <= _MAX_NAME:
            raise BatchInputError(f"A budget's name must be a text of 1 to {_MAX_NAME} characters, not {name!r}.")
        if self.usd is None and self.tokens is None:
            raise BatchInputError(f"The budget {self.name!r} caps nothing: give usd, tokens, or both.")
        if self.usd is not None:
            object.__setattr__(self, "usd", parse_usd(self.usd, f"usd of the budget {self.name!r}"))
            if self.usd > _MAX_USD:
                raise BatchInputError(f"usd of the budget {self.name!r} must not be above {_MAX_USD:,}, and is {self.usd:,}.")
        if tokens is not None and (type(tokens) is not int or not 1 <= tokens <= _MAX_TOKENS):
            raise BatchInputError(f"tokens of the budget {self.name!r} must be a whole number of at least 1, not {tokens!r}.")
        if self.window not in WINDOWS:
            raise BatchInputError(f"window of the budget {self.name!r} must be one of {', '.join(WINDOWS)}, not {self.window!r}.")
        if self.on_exceeded not in ("fail", "skip"):
            raise BatchInputError(f"on_exceeded of the budget {self.name!r} must be 'fail' or 'skip', not {self.on_exceeded!r}.")
        self._take_alerts()

    def _take_alerts(self) -> None:
        """:raises BatchInputError: for alerts that could not be sent"""
        alert_at: Any = self.alert_at
        notifiers: Any = self.notifiers
        if isinstance(alert_at, str | Mapping) or not isinstance(alert_at, Sequence):
            raise BatchInputError(
                f"alert_at of the budget {self.name!r} must be a list of shares, such as [0.5, 0.8, 1], not {alert_at!r}."
            )
        object.__setattr__(self, "alert_at", tuple(sorted({_share(value, self.name) for value in alert_at})))
        object.__setattr__(self, "notifiers", parse_notifiers(notifiers, f"notifiers of the budget {self.name!r}"))
        if bool(self.alert_at) is not bool(self.notifiers):
            raise BatchInputError(f"The budget {self.name!r} needs both alert_at and notifiers, or neither of them.")

    @property
    def thresholds(self) -> list[int]:
        """``alert_at`` in hundredths of a percent, ascending."""
        return [int(Decimal(share) * SHARE_UNIT) for share in self.alert_at]

    @classmethod
    def parse(cls, value: Any) -> Budget:
        """A budget, or a mapping with its fields.

        :raises BatchInputError: for anything else
        """
        if isinstance(value, Budget):
            return value
        names = [f.name for f in fields(cls)]
        if not isinstance(value, Mapping) or "name" not in value or not set(value) <= set(names):
            raise BatchInputError(f"budget must be a Budget or a mapping with name and some of {', '.join(names[1:])}, not {value!r}.")
        return cls(**value)


def parse_notifiers(notifiers: Any, what: str) -> tuple[Any, ...]:
    """A list of notifiers, each of which can be called with a task's context.

    :param what: the list's name, for messages
    :raises BatchInputError: for anything else
    """
    if isinstance(notifiers, str) or not isinstance(notifiers, Sequence):
        raise BatchInputError(f"{what} must be a list, not a {type(notifiers).__name__}.")
    for notifier in notifiers:
        if isinstance(notifier, type) or not callable(notifier):
            found = f"the class {notifier.__name__}" if isinstance(notifier, type) else f"a {type(notifier).__name__}"
            raise BatchInputError(f"{what} has {found}: give instances of Airflow's notifiers, or functions of the context.")
    return tuple(notifiers)


def _share(value: Any, name: str) -> Decimal:
    """:raises BatchInputError: for a value that is not a share"""
    try:
        # a float is taken as it prints
        share = Decimal("NaN") if isinstance(value, bool) else Decimal(str(value))
    except InvalidOperation:
        share = Decimal("NaN")
    if not share.is_finite() or not 0 < share <= 1 or share * SHARE_UNIT % 1:
        raise BatchInputError(
            f"alert_at of the budget {name!r} has {value!r}: a share is above 0 and at most 1 (0.8 is 80%), with four digits at most."
        )
    return share.normalize()


def window_of(window: str, at: datetime) -> tuple[datetime | None, datetime | None]:
    """The first moment of the window that holds ``at``, and the first after it; ``(None, None)`` for ``ever``."""
    day = at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    match window:
        case "day":
            return day, day + timedelta(days=1)
        case "week":
            monday = day - timedelta(days=day.weekday())
            return monday, monday + timedelta(weeks=1)
        case "month":
            first = day.replace(day=1)
            return first, (first + timedelta(days=31)).replace(day=1)
        case _:
            return None, None


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """A budget's books in one window: what landed batches cost, and what is reserved for batches under way. Caps are those last given."""

    name: str
    window: str
    cap_usd: Decimal | None
    cap_tokens: int | None
    spent_usd: Decimal
    spent_tokens: int
    reserved_usd: Decimal
    reserved_tokens: int
    #: the first moment of the next window; None for ``ever``
    ends_at: datetime | None

    @property
    def remaining_usd(self) -> Decimal | None:
        """USD that a task may still reserve; never below zero."""
        return None if self.cap_usd is None else max(self.cap_usd - self.spent_usd - self.reserved_usd, Decimal(0))

    @property
    def remaining_tokens(self) -> int | None:
        """Tokens that a task may still reserve; never below zero."""
        return None if self.cap_tokens is None else max(self.cap_tokens - self.spent_tokens - self.reserved_tokens, 0)

    @property
    def share(self) -> Decimal:
        """What is spent and reserved, as a share of the cap. Of two caps, the one that is nearer to its limit counts."""
        shares = [Decimal(0)]
        if self.cap_usd is not None:
            shares.append((self.spent_usd + self.reserved_usd) / self.cap_usd)
        if self.cap_tokens is not None:
            shares.append(Decimal(self.spent_tokens + self.reserved_tokens) / self.cap_tokens)
        return max(shares)

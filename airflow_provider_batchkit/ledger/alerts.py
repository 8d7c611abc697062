"""Marks of what was told: each threshold of a budget once a window, and that a task's batches are late once, to each notifier.

A mark is *claimed* in a transaction before its notifier is called, and *told* in another one after it. Of tasks that reach a threshold at
once, the one that has the lock of the budget's row claims it. A notifier that raised gives its claim back; the claim of a task that died,
or whose notifier hangs, ends after ``CLAIM_S`` seconds. In both cases the next submit, or the task that waits, tells it. So an alert comes
twice where a task dies between the notifier's return and the mark, and is not lost: that is the better end where it is about money.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError

from airflow_provider_batchkit.cost.budget import SHARE_UNIT, Budget, BudgetStatus, window_of
from airflow_provider_batchkit.ledger.budgets import lock_budget, read_books, status_of
from airflow_provider_batchkit.ledger.engine import clock, write_transaction
from airflow_provider_batchkit.ledger.tables import alert, late

#: a task that has not said for so long how its notifier ended is taken for dead, in seconds
CLAIM_S = 600
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class AlertClaim:
    """What one task is to tell one notifier now."""

    #: the budget's books, held against the cap that the task gives
    status: BudgetStatus
    #: of the window; None for ``ever``
    starts_at: datetime | None
    #: the notifier's position in the budget's list
    notifier: int
    #: in hundredths of a percent, ascending: all that this notifier was not told
    thresholds: tuple[int, ...]
    claimed_at: datetime


@dataclass(frozen=True, slots=True)
class LateClaim:
    """What one task is to tell of its late batches now."""

    #: of the task that waits
    job_id: str
    #: positions in its list of notifiers
    notifiers: tuple[int, ...]
    claimed_at: datetime
    #: every other notifier has taken it before
    rest_told: bool


class Alerts:
    """The part of the ledger that marks what was told."""

    engine: Engine

    def claim_alerts(self, budget: Budget, *, at: datetime | None = None, refused: bool = False) -> list[AlertClaim]:
        """Claim what is to be told now, one claim for each notifier that is to be told something.

        :param at: a moment of the window; now by default
        :param refused: the budget has no room for what the task asks, so its whole cap counts as reached
        """
        at = at or datetime.now(UTC)
        start = window_of(budget.window, at)[0]
        with write_transaction(self.engine) as connection:
            now = clock(connection)
            lock_budget(connection, budget, now)
            status = status_of(budget, read_books(connection, budget.name, budget.window, at), at)
            reached = [t for t in budget.thresholds if status.share * SHARE_UNIT >= t or (refused and t == SHARE_UNIT)]
            if not reached:
                return []
            found = []
            for position in range(len(budget.notifiers)):
                due = _claim(connection, {**_window(budget.name, budget.window, start), "notifier": position}, reached, now)
                if due:
                    found.append(AlertClaim(status, start, position, tuple(due), now))
            return found

    def alert_told(self, claim: AlertClaim) -> None:
        """The notifier has taken it: it is told no more in this window."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.update(alert).where(*_of(claim)).values(told_at=clock(connection)))

    def alert_untold(self, claim: AlertClaim) -> None:
        """The notifier raised: the next submit tells it."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.delete(alert).where(*_of(claim)))

    def claim_late(self, job_id: str, notifiers: int) -> LateClaim:
        """Claim those of a task's notifiers that nobody has told of its late batches, or tells now."""
        with write_transaction(self.engine) as connection:
            now = clock(connection)
            dead = sa.and_(late.c.told_at.is_(None), late.c.claimed_at < now - timedelta(seconds=CLAIM_S))
            connection.execute(sa.delete(late).where(late.c.job_id == job_id, dead))
            marks = connection.execute(sa.select(late.c.notifier, late.c.told_at).where(late.c.job_id == job_id))
            told = {mark.notifier: mark.told_at is not None for mark in marks}
            due = tuple(position for position in range(notifiers) if position not in told)
            try:
                with connection.begin_nested():
                    for position in due:
                        connection.execute(sa.insert(late).values(job_id=job_id, notifier=position, claimed_at=now))
            except IntegrityError:
                # another attempt claims them at this moment
                return LateClaim(job_id, (), now, rest_told=False)
        return LateClaim(job_id, due, now, rest_told=all(told.values()))

    def late_told(self, claim: LateClaim, notifier: int) -> None:
        """The notifier has taken it: it is not told again."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.update(late).where(*_of_late(claim, notifier)).values(told_at=clock(connection)))

    def late_untold(self, claim: LateClaim, notifier: int) -> None:
        """The notifier raised: it is told again."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.delete(late).where(*_of_late(claim, notifier)))


def _window(budget: str, window: str, start: datetime | None) -> dict[str, Any]:
    return {"budget": budget, "window": window, "window_start": start or _EPOCH}


def marks_of(budget: str, window: str, start: datetime | None) -> list[sa.ColumnElement[bool]]:
    """What holds for the marks of a budget in one window."""
    return [alert.c[name] == value for name, value in _window(budget, window, start).items()]


def _claim(connection: Connection, key: dict[str, Any], thresholds: list[int], now: datetime) -> list[int]:
    """Those of the thresholds that nobody has told or tells now."""
    here = [alert.c[name] == value for name, value in key.items()]
    dead = sa.and_(alert.c.told_at.is_(None), alert.c.claimed_at < now - timedelta(seconds=CLAIM_S))
    connection.execute(sa.delete(alert).where(*here, dead))
    marked = set(connection.execute(sa.select(alert.c.threshold).where(*here)).scalars())
    due = [threshold for threshold in thresholds if threshold not in marked]
    if due:
        connection.execute(sa.insert(alert), [{**key, "threshold": threshold, "claimed_at": now} for threshold in due])
    return due


def _of(claim: AlertClaim) -> list[sa.ColumnElement[bool]]:
    """The marks of a claim, unless another task has taken it for dead and claimed them anew."""
    return [
        *marks_of(claim.status.name, claim.status.window, claim.starts_at),
        alert.c.notifier == claim.notifier,
        alert.c.threshold.in_(claim.thresholds),
        alert.c.claimed_at == claim.claimed_at,
        alert.c.told_at.is_(None),
    ]


def _of_late(claim: LateClaim, notifier: int) -> list[sa.ColumnElement[bool]]:
    """The mark of a claim, unless another attempt has taken it for dead and claimed it anew."""
    return [
        late.c.job_id == claim.job_id,
        late.c.notifier == notifier,
        late.c.claimed_at == claim.claimed_at,
        late.c.told_at.is_(None),
    ]

"""Marks of sent alerts. Each notifier gets an alert once per threshold and window of a budget, and once per task whose batches are late.

A mark is *claimed* in a transaction before its notifier is called, and *told* in another one after it. When several tasks reach a threshold
at once, the one that holds the lock of the budget's row claims it. A notifier that raises gives its claim back. The claim of a task that
died, or whose notifier hangs, ends after ``CLAIM_S`` seconds. In both cases the next submit, or the waiting task, sends the alert. When a
task dies between the notifier's return and the mark, the alert is sent twice: with money at stake that is better than losing it.
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

#: seconds after which a claim without a result ends, because its task counts as dead
CLAIM_S = 600
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class AlertClaim:
    """The alert that one task must send to one notifier now."""

    #: the budget's books, compared with the cap that the task gives
    status: BudgetStatus
    #: the start of the budget's window; None for the window ``ever``
    starts_at: datetime | None
    #: the notifier's position in the budget's list
    notifier: int
    #: the thresholds that this notifier has not been told yet, in hundredths of a percent, ascending
    thresholds: tuple[int, ...]
    claimed_at: datetime


@dataclass(frozen=True, slots=True)
class LateClaim:
    """The alerts that one task must send about its late batches now."""

    #: the job id of the waiting task
    job_id: str
    #: positions of the claimed notifiers in the task's list
    notifiers: tuple[int, ...]
    claimed_at: datetime
    #: whether every other notifier has already taken the alert
    rest_told: bool


class Alerts:
    """The part of the ledger that marks sent alerts."""

    engine: Engine

    def claim_alerts(self, budget: Budget, *, at: datetime | None = None, refused: bool = False) -> list[AlertClaim]:
        """Claim the alerts that are due now, one claim for each notifier that has an alert due.

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
        """Mark the alert as told: the notifier has taken it and does not get it again in this window."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.update(alert).where(*_of(claim)).values(told_at=clock(connection)))

    def alert_untold(self, claim: AlertClaim) -> None:
        """Give the claim back because the notifier raised: the next submit sends the alert."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.delete(alert).where(*_of(claim)))

    def claim_late(self, job_id: str, notifiers: int) -> LateClaim:
        """Claim the notifiers of a task that have not been told of its late batches and that no other attempt is telling now."""
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
                # another attempt has claimed them at this moment
                return LateClaim(job_id, (), now, rest_told=False)
        return LateClaim(job_id, due, now, rest_told=all(told.values()))

    def late_told(self, claim: LateClaim, notifier: int) -> None:
        """Mark the alert as told: the notifier has taken it and does not get it again."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.update(late).where(*_of_late(claim, notifier)).values(told_at=clock(connection)))

    def late_untold(self, claim: LateClaim, notifier: int) -> None:
        """Give the claim back because the notifier raised: it gets the alert again."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.delete(late).where(*_of_late(claim, notifier)))


def _window(budget: str, window: str, start: datetime | None) -> dict[str, Any]:
    return {"budget": budget, "window": window, "window_start": start or _EPOCH}


def marks_of(budget: str, window: str, start: datetime | None) -> list[sa.ColumnElement[bool]]:
    """The conditions that select the marks of a budget in one window."""
    return [alert.c[name] == value for name, value in _window(budget, window, start).items()]


def _claim(connection: Connection, key: dict[str, Any], thresholds: list[int], now: datetime) -> list[int]:
    """Claim the thresholds that are not marked yet, and return them."""
    here = [alert.c[name] == value for name, value in key.items()]
    dead = sa.and_(alert.c.told_at.is_(None), alert.c.claimed_at < now - timedelta(seconds=CLAIM_S))
    connection.execute(sa.delete(alert).where(*here, dead))
    marked = set(connection.execute(sa.select(alert.c.threshold).where(*here)).scalars())
    due = [threshold for threshold in thresholds if threshold not in marked]
    if due:
        connection.execute(sa.insert(alert), [{**key, "threshold": threshold, "claimed_at": now} for threshold in due])
    return due


def _of(claim: AlertClaim) -> list[sa.ColumnElement[bool]]:
    """The conditions that select a claim's marks. They match nothing once another task has declared the claim dead and claimed anew."""
    return [
        *marks_of(claim.status.name, claim.status.window, claim.starts_at),
        alert.c.notifier == claim.notifier,
        alert.c.threshold.in_(claim.thresholds),
        alert.c.claimed_at == claim.claimed_at,
        alert.c.told_at.is_(None),
    ]


def _of_late(claim: LateClaim, notifier: int) -> list[sa.ColumnElement[bool]]:
    """The conditions that select a claim's mark. They match nothing once another attempt has declared the claim dead and claimed anew."""
    return [
        late.c.job_id == claim.job_id,
        late.c.notifier == notifier,
        late.c.claimed_at == claim.claimed_at,
        late.c.told_at.is_(None),
    ]

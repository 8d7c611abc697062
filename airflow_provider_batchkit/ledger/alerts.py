"""Marks of sent alerts. Each notifier gets an alert once per threshold and window of a budget, and once per task whose batches are late.

A mark is *claimed* in a transaction before its notifier is called, and *told* in another one after it. When several tasks reach a threshold
at once, the one that holds the lock of the budget's row claims it. A notifier that raises gives its claim back. The claim of a task that
died, or whose notifier hangs, ends after ``CLAIM_S`` seconds. In both cases the next submit, or the waiting task, sends the alert. When a
task dies between the notifier's return and the mark, the alert is sent twice: with money at stake that is better than losing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from airflow_provider_batchkit.cost.budget import SHARE_UNIT, Budget, BudgetStatus, window_of
from airflow_provider_batchkit.ledger.budgets import lock_budget, read_books, status_of
from airflow_provider_batchkit.ledger.engine import Part, clock, write_transaction
from airflow_provider_batchkit.ledger.tables import alert, late

#: seconds after which a claim without a result ends, because its task counts as dead
CLAIM_S = 600
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Claim:
    """An alert that one task must send to one notifier now."""

    #: the notifier's position in its list
    notifier: int
    claimed_at: datetime
    #: the table of the alert's marks, and the columns that say what the alert is about
    table: sa.Table
    about: Mapping[str, Any]

    @property
    def marks(self) -> list[sa.ColumnElement[bool]]:
        """The conditions that select the marks. They match nothing once another task has declared the claim dead and claimed anew."""
        columns = self.table.c
        mine = (columns.notifier == self.notifier, columns.claimed_at == self.claimed_at, columns.told_at.is_(None))
        return [*_equal(self.table, self.about), *mine]


@dataclass(frozen=True, slots=True)
class AlertClaim(Claim):
    """The alert of a budget."""

    #: the budget's books, compared with the cap that the task gives
    status: BudgetStatus
    #: the start of the budget's window; None for the window ``ever``
    starts_at: datetime | None
    #: the thresholds that this notifier has not been told yet, in hundredths of a percent, ascending
    thresholds: tuple[int, ...]


class Alerts(Part):
    """The part of the ledger that marks sent alerts."""

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
            about = _window(budget.name, budget.window, start)
            for position in range(len(budget.notifiers)):
                due = _claim(connection, {**about, "notifier": position}, reached, now)
                if due:
                    found.append(AlertClaim(position, now, alert, about, status, start, tuple(due)))
            return found

    def claim_late(self, job_id: str, notifiers: int) -> tuple[list[Claim], bool]:
        """Claim the notifiers of a task that have not been told of its late batches and that no other attempt is telling now.

        :returns: the claims, and whether every other notifier has already taken the alert
        """
        about = {"job_id": job_id}
        with write_transaction(self.engine) as connection:
            now = clock(connection)
            connection.execute(sa.delete(late).where(*_equal(late, about), _is_dead(late, now)))
            marks = connection.execute(sa.select(late.c.notifier, late.c.told_at).where(*_equal(late, about)))
            told = {mark.notifier: mark.told_at is not None for mark in marks}
            found = [Claim(position, now, late, about) for position in range(notifiers) if position not in told]
            try:
                with connection.begin_nested():
                    for claim in found:
                        connection.execute(sa.insert(late).values(**about, notifier=claim.notifier, claimed_at=now))
            except IntegrityError:
                # another attempt has claimed them at this moment
                return [], False
        return found, all(told.values())

    def alert_told(self, claim: Claim) -> None:
        """Mark the alert as told: the notifier has taken it and does not get it again (of a budget: in this window)."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.update(claim.table).where(*claim.marks).values(told_at=clock(connection)))

    def alert_untold(self, claim: Claim) -> None:
        """Give the claim back because the notifier raised: it gets the alert again."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.delete(claim.table).where(*claim.marks))


def _window(budget: str, window: str, start: datetime | None) -> dict[str, Any]:
    return {"budget": budget, "window": window, "window_start": start or _EPOCH}


def marks_of(budget: str, window: str, start: datetime | None) -> list[sa.ColumnElement[bool]]:
    """The conditions that select the marks of a budget in one window."""
    return _equal(alert, _window(budget, window, start))


def _equal(table: sa.Table, values: Mapping[str, Any]) -> list[sa.ColumnElement[bool]]:
    return [table.c[name] == value for name, value in values.items()]


def _is_dead(table: sa.Table, now: datetime) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.told_at.is_(None), table.c.claimed_at < now - timedelta(seconds=CLAIM_S))


def _claim(connection: Connection, key: dict[str, Any], thresholds: list[int], now: datetime) -> list[int]:
    """Claim the thresholds that are not marked yet, and return them."""
    here = _equal(alert, key)
    connection.execute(sa.delete(alert).where(*here, _is_dead(alert, now)))
    marked = set(connection.execute(sa.select(alert.c.threshold).where(*here)).scalars())
    due = [threshold for threshold in thresholds if threshold not in marked]
    if due:
        connection.execute(sa.insert(alert), [{**key, "threshold": threshold, "claimed_at": now} for threshold in due])
    return due

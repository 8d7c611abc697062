"""Budgets in the ledger. The books are the batch rows themselves, so they cannot disagree with them.

A batch that counts in a budget has its name in its row, with the time that decides the window and the most that it can cost. It is reserved
while it is ``sending``, ``submitted`` or ``gone`` (it may have been billed), spent once it is ``landed`` (at its real cost), and no longer
counted when it is ``rejected`` or ``void``. The statement that moves a batch to another state moves its money, too.

Before its first batch row an attempt takes a *hold*: the sum of all that it is about to send. Each intent draws its batch's part from the
hold, in the intent's transaction. A hold counts as long as its attempt has the job's lease and lives; the next attempt of the job, or
``HOLD_S`` seconds without an intent, ends it.

A transaction that adds to a sum holds the lock of the budget's row. A draw from a hold moves money inside the sum, and every other change
makes the sum smaller. The sum is read in one statement. So it may be read too high, never too low.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from airflow_provider_batchkit.cost.budget import Budget, BudgetStatus, window_of
from airflow_provider_batchkit.exceptions import BudgetExceededError, BudgetReservedError
from airflow_provider_batchkit.ledger.engine import Part, write_transaction
from airflow_provider_batchkit.ledger.leases import hold_lease
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.ledger.tables import batch, job
from airflow_provider_batchkit.ledger.tables import budget as budget_table
from airflow_provider_batchkit.ledger.tables import budget_hold as hold
from airflow_provider_batchkit.model import COST_QUANTUM, COUNTERS, PICO_PER_USD, Bound, CostTally, usd_text

log = logging.getLogger(__name__)

#: seconds without a journaled shard after which an attempt counts as dead and its hold ends; a live attempt then reserves again
HOLD_S = 6 * 3600


class Books(NamedTuple):
    """Sums of one budget in one window, in picodollars and tokens."""

    spent_pico: int
    spent_tokens: int
    reserved_pico: int
    reserved_tokens: int


class Budgets(Part):
    """The part of the ledger that keeps the books of budgets."""

    def reserve(self, job_id: str, lease: int, budget: Budget, asked: Bound) -> None:
        """Hold ``asked`` for what an attempt is about to send. It replaces the hold of an earlier attempt of the job.

        :param asked: bounded in both USD and tokens
        :raises BudgetExceededError: when ``asked`` does not fit under the cap; nothing is held
        :raises LeaseLostError: when another attempt of the job has begun
        """
        with write_transaction(self.engine) as connection:
            hold_lease(connection, job_id, lease)
            _take_hold(connection, job_id, lease, budget, asked)

    def give_up_hold(self, job_id: str, lease: int) -> None:
        """Free what an attempt held and did not send, because it has ended."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.delete(hold).where(hold.c.job_id == job_id, hold.c.lease == lease))

    def budget_status(self, name: str, *, at: datetime | None = None) -> BudgetStatus | None:
        """The books of a budget in the window that contains ``at`` (default: now), compared with the cap last given.

        None when no task has named the budget.
        """
        now = at or datetime.now(UTC)
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(budget_table).where(budget_table.c.name == name)).first()
            if row is None:
                return None
            books = read_books(connection, name, row.window, now)
        return _status(name, row.window, row.cap_picousd, row.cap_tokens, books, now)


# --- inside the ledger's transactions ---------------------------------------------------------------------------------------------


def draw(connection: Connection, job_id: str, lease: int, bound: Bound, budget: Budget | None) -> dict[str, Any]:
    """Draw a batch's bound from the attempt's hold, and return the columns of the new batch row: its bound and its budget.

    :raises BudgetExceededError: when the hold had ended and its amount is no longer free
    """
    columns: dict[str, Any] = {"bound_picousd": None if bound.usd is None else _pico(bound.usd), "bound_tokens": bound.tokens}
    if budget is None:
        return columns
    if not _draw(connection, job_id, lease, columns):
        _take_hold(connection, job_id, lease, budget, bound)
        _draw(connection, job_id, lease, columns)
    budget_at = connection.execute(sa.select(hold.c.budget_at).where(hold.c.job_id == job_id)).scalar_one()
    return {**columns, "budget": budget.name, "budget_at": budget_at}


def put_back(connection: Connection, job_id: str, shard: int) -> None:
    """Return the money of a rejected or void batch to its attempt's hold, since an attempt that goes on needs it for the same requests."""
    row = connection.execute(
        sa.select(batch.c.budget, batch.c.bound_picousd, batch.c.bound_tokens).where(batch.c.job_id == job_id, batch.c.shard == shard)
    ).one()
    if row.budget is not None:
        connection.execute(
            sa.update(hold)
            .where(hold.c.job_id == job_id, hold.c.budget == row.budget)
            .values(picousd=hold.c.picousd + row.bound_picousd, tokens=hold.c.tokens + row.bound_tokens)
        )


def status_of(budget: Budget, books: Books, at: datetime) -> BudgetStatus:
    """The books, compared with the cap that a task gives."""
    return _status(budget.name, budget.window, None if budget.usd is None else _pico(budget.usd), budget.tokens, books, at)


def settled(connection: Connection, job_id: str, shard: int, tally: CostTally) -> dict[str, Any]:
    """Further columns of a landed batch's row: the tokens that it used."""
    if tally.batch_cost_usd is None:
        columns = sa.select(batch.c.budget, batch.c.bound_picousd).where(batch.c.job_id == job_id, batch.c.shard == shard)
        where = connection.execute(columns).one()
        if where.budget is not None:
            log.warning(
                "The cost of a batch is unknown: the budget %r goes on counting it at its upper bound, %s",
                where.budget,
                usd_text(_usd(where.bound_picousd)),
            )
    total = tally.total
    return {"billed_tokens": sum(getattr(total, name) for name in COUNTERS if name.endswith("_tokens"))}


def _draw(connection: Connection, job_id: str, lease: int, amounts: Mapping[str, Any]) -> bool:
    """Draw the amounts from the attempt's hold; False when the hold has ended or is too small."""
    now = datetime.now(UTC)
    pico, tokens = amounts["bound_picousd"], amounts["bound_tokens"]
    drawn = connection.execute(
        sa.update(hold)
        .where(
            hold.c.job_id == job_id,
            hold.c.lease == lease,
            hold.c.picousd >= pico,
            hold.c.tokens >= tokens,
            # the attempt stops drawing at half of HOLD_S, well before an attempt whose clock differs stops counting the hold
            hold.c.held_at > now - timedelta(seconds=HOLD_S / 2),
        )
        .values(picousd=hold.c.picousd - pico, tokens=hold.c.tokens - tokens, held_at=now)
    )
    return drawn.rowcount > 0


def _take_hold(connection: Connection, job_id: str, lease: int, budget: Budget, asked: Bound) -> None:
    assert asked.usd is not None and asked.tokens is not None, "what has no bound is refused before"
    now = datetime.now(UTC)
    lock_budget(connection, budget, now)
    connection.execute(sa.delete(hold).where(hold.c.job_id == job_id))
    books = read_books(connection, budget.name, budget.window, now)
    pico = _pico(asked.usd)
    _refuse_above_cap(budget, books, pico, asked.tokens, now)
    connection.execute(
        sa.insert(hold).values(
            job_id=job_id, lease=lease, budget=budget.name, picousd=pico, tokens=asked.tokens, budget_at=now, held_at=now
        )
    )


def lock_budget(connection: Connection, budget: Budget, now: datetime) -> None:
    """Lock the budget's row until the transaction ends, and note the cap that the task gave."""
    mine = budget_table.c.name == budget.name
    cap = {"window": budget.window, "cap_picousd": None if budget.usd is None else _pico(budget.usd), "cap_tokens": budget.tokens}
    if connection.execute(sa.update(budget_table).where(mine).values(asked_at=now)).rowcount == 0:
        try:
            with connection.begin_nested():
                connection.execute(sa.insert(budget_table).values(name=budget.name, asked_at=now, **cap))
        except IntegrityError:
            # another task has just created the row
            connection.execute(sa.update(budget_table).where(mine).values(asked_at=now))
    known = dict(connection.execute(sa.select(*(budget_table.c[name] for name in cap)).where(mine)).mappings().one())
    if known != cap:
        log.warning("The budget %r has been given as %s before, and now as %s: each task is held against its own", budget.name, known, cap)
        connection.execute(sa.update(budget_table).where(mine).values(cap))


def read_books(connection: Connection, name: str, window: str, at: datetime) -> Books:
    """The sums of the window that contains ``at``."""
    start, end = window_of(window, at)

    def total(column: sa.ColumnElement[int], *where: sa.ColumnElement[bool], time: sa.Column[Any]) -> sa.ScalarSelect[Any]:
        inside = [] if start is None or end is None else [time >= start, time < end]
        return sa.select(sa.func.coalesce(sa.func.sum(column), 0)).where(*where, *inside).scalar_subquery()

    of_batches = batch.c.budget == name
    landed = batch.c.state == BatchState.LANDED.value
    open_ = batch.c.state.in_([state.value for state in (BatchState.SENDING, BatchState.SUBMITTED, BatchState.PREPARED, BatchState.GONE)])
    living = sa.and_(
        hold.c.budget == name,
        hold.c.held_at > datetime.now(UTC) - timedelta(seconds=HOLD_S),
        sa.exists().where(job.c.job_id == hold.c.job_id, job.c.lease == hold.c.lease),
    )
    sums = (
        total(sa.func.coalesce(batch.c.batch_cost_picousd, batch.c.bound_picousd), of_batches, landed, time=batch.c.budget_at),
        total(sa.func.coalesce(batch.c.billed_tokens, batch.c.bound_tokens), of_batches, landed, time=batch.c.budget_at),
        total(batch.c.bound_picousd, of_batches, open_, time=batch.c.budget_at),
        total(batch.c.bound_tokens, of_batches, open_, time=batch.c.budget_at),
        total(hold.c.picousd, living, time=hold.c.budget_at),
        total(hold.c.tokens, living, time=hold.c.budget_at),
    )
    # the sums are read in one statement, so that money which moves from a hold to a batch meanwhile is counted at least once
    spent_pico, spent_tokens, open_pico, open_tokens, held_pico, held_tokens = map(int, connection.execute(sa.select(*sums)).one())
    return Books(spent_pico, spent_tokens, open_pico + held_pico, open_tokens + held_tokens)


def _refuse_above_cap(budget: Budget, books: Books, pico: int, tokens: int, now: datetime) -> None:
    caps: list[tuple[int, int, int, int, Callable[[int], str]]] = []
    if budget.usd is not None:
        caps.append((_pico(budget.usd), books.spent_pico, books.reserved_pico, pico, lambda v: usd_text(_usd(v))))
    if budget.tokens is not None:
        caps.append((budget.tokens, books.spent_tokens, books.reserved_tokens, tokens, lambda v: f"{v:,} tokens"))
    exceeded = [cap for cap in caps if cap[1] + cap[2] + cap[3] > cap[0]]
    if not exceeded:
        return
    figures = "; ".join(
        f"cap {text(cap)}, spent {text(spent)}, reserved {text(reserved)}, asked at most {text(asked)}"
        for cap, spent, reserved, asked, text in exceeded
    )
    end = window_of(budget.window, now)[1]
    ends = f"The window ({budget.window}) ends {end:%Y-%m-%d %H:%M} UTC" if end else "Its window never ends"
    final = any(spent + asked > cap for cap, spent, _, asked, _ in exceeded)
    raise (BudgetExceededError if final else BudgetReservedError)(
        f"The budget {budget.name!r} would be exceeded: {figures}. {ends}. Nothing was sent by this attempt. "
        + (
            "Lower max_tokens or the number of rows, raise the budget, or wait for the next window."
            if final
            else "Reserved is what batches under way can cost at most; when they land, what they did not cost is free again."
        )
    )


def _status(name: str, window: str, cap_pico: int | None, cap_tokens: int | None, books: Books, at: datetime) -> BudgetStatus:
    return BudgetStatus(
        name,
        window,
        None if cap_pico is None else _usd(cap_pico),
        cap_tokens,
        _usd(books.spent_pico),
        books.spent_tokens,
        _usd(books.reserved_pico),
        books.reserved_tokens,
        window_of(window, at)[1],
    )


def _pico(usd: Decimal) -> int:
    return int(usd * PICO_PER_USD)


def _usd(pico: int) -> Decimal:
    return pico * COST_QUANTUM

"""Pruning: the deletion of old records of single source rows that nothing can need any more.

Pruning deletes a job's rows in ``batchkit_journal``, ``batchkit_succeeded`` and ``batchkit_failed``, which are nearly all bytes of a
ledger. The rows in ``batchkit_job``, ``batchkit_batch``, ``batchkit_bill`` and ``batchkit_landing`` stay: budgets add them up, a fetch
sees by them that it has landed, and people read them as history.

Without its journal a job cannot tell which rows it has paid for. So the ledger refuses to let it ask anything
(:meth:`.Ledger.known`): a run that is cleared after it was pruned fails, and pays nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.ledger.engine import Part, clock, write_transaction
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.ledger.tables import batch, failed, job, journal, succeeded

#: results can be read for 29 days after a batch's creation (API documentation); one more day allows for clocks that differ
RESULTS_DAYS = 30

NOT_LANDED = "a batch has not landed, is in doubt, or is gone and may have been billed"
SKIPS = "its task skips unchanged rows, and reads here what was answered"
LATEST = "it is the latest landed job of its task, which a task that begins to skip unchanged rows reads"
FETCHABLE = f"a batch is younger than {RESULTS_DAYS} days: its results can be fetched into another table"

_ENDED = (BatchState.LANDED.value, BatchState.REJECTED.value, BatchState.VOID.value)


@dataclass(slots=True)
class PrunePlan:
    """The jobs that can be pruned, and how many are kept."""

    #: ids of jobs that can be pruned, the oldest first
    jobs: list[str] = field(default_factory=list)
    #: the number of these jobs' batches, and of the rows that they answered
    batches: int = 0
    source_rows: int = 0
    #: reason → how many equally old jobs are kept for it
    kept: Counter[str] = field(default_factory=Counter)


class Pruning(Part):
    """The part of the ledger that deletes old records."""

    def plan_pruning(self, before: datetime) -> PrunePlan:
        """The jobs in which nothing has happened since ``before``: which of them can be pruned, and why the others are kept."""
        found = PrunePlan()
        with self.engine.connect() as connection:
            for row in connection.execute(_old(before).order_by(job.c.created_at)).all():
                reason = _needed(connection, row)
                if reason is not None:
                    found.kept[reason] += 1
                    continue
                found.jobs.append(row.job_id)
                found.batches += int(row.batches)
                found.source_rows += int(row.source_rows or 0)
        return found

    def prune(self, job_id: str, before: datetime) -> bool:
        """Delete the records of a job's rows in one transaction. False when something needs them by now; nothing is deleted then."""
        with write_transaction(self.engine) as connection:
            # an attempt that opens the job waits for this lock, and then finds the journal gone
            connection.execute(sa.update(job).where(job.c.job_id == job_id).values(lease=job.c.lease))
            row = connection.execute(_old(before).where(job.c.job_id == job_id)).first()
            if row is None or _needed(connection, row) is not None:
                return False
            for table in (journal, succeeded, failed):
                connection.execute(sa.delete(table).where(table.c.job_id == job_id))
        return True


def _old(before: datetime) -> sa.Select[tuple[str, str, str, int, datetime, int, int, datetime]]:
    """Jobs that have a journal, and in which nothing has happened since ``before``."""
    identity = (job.c.job_id, job.c.dag_id, job.c.task_id, job.c.map_index, job.c.created_at)
    last = sa.func.max(sa.func.coalesce(batch.c.landed_at, batch.c.intended_at))
    return (
        sa.select(
            *identity,
            sa.func.count().label("batches"),
            sa.func.sum(batch.c.source_rows).label("source_rows"),
            sa.func.max(batch.c.created_at).label("youngest"),
        )
        .join(batch, batch.c.job_id == job.c.job_id)
        .where(sa.exists().where(journal.c.job_id == job.c.job_id))
        .group_by(*identity)
        .having(sa.and_(last < before, job.c.created_at < before))
    )


def _needed(connection: Connection, row: sa.Row[tuple[str, str, str, int, datetime, int, int, datetime]]) -> str | None:
    """Why a job's records are kept; None when nothing needs them."""
    if _is(connection, sa.exists().where(batch.c.job_id == row.job_id, batch.c.state.not_in(_ENDED))):
        return NOT_LANDED
    of_task = (job.c.dag_id == row.dag_id) & (job.c.task_id == row.task_id)
    # NULL counts as skipping: an attempt that has just begun has not noted yet whether it skips
    if _is(connection, sa.exists().where(of_task, sa.or_(job.c.skip_unchanged, job.c.skip_unchanged.is_(None)))):
        return SKIPS
    if row.youngest is not None and row.youngest > clock(connection) - timedelta(days=RESULTS_DAYS):
        return FETCHABLE
    later = sa.and_(
        of_task,
        job.c.map_index == row.map_index,
        job.c.created_at > row.created_at,
        sa.exists().where(batch.c.job_id == job.c.job_id, batch.c.state == BatchState.LANDED.value),
    )
    return None if _is(connection, sa.exists().where(later)) else LATEST


def _is(connection: Connection, condition: sa.ColumnElement[bool]) -> bool:
    return connection.execute(sa.select(sa.literal(1)).where(condition)).first() is not None

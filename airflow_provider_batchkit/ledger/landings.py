"""The landings: one row for each batch, result table and landing number.

A fetch that has landed in a table writes nothing there again: a retry or a cleared task would overwrite what later runs have written. A
table that is missing or empty is filled anew, under the next number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.ledger.tables import batch, job, landing


@dataclass(frozen=True, slots=True)
class Landed:
    """The latest landing of a batch in a table. ``counts`` are source rows per outcome, ``tally`` is a cost tally as JSON."""

    batch_id: str
    number: int
    landed_at: datetime
    #: rows written to the result table
    rows: int
    #: whether the landing has everything that the API can give for the batch
    complete: bool
    counts: dict[str, int]
    tally: dict[str, Any]
    created_at: datetime | None
    ended_at: datetime | None


def landed_in(connection: Connection, batch_ids: Iterable[str], table: str) -> dict[str, Landed]:
    """Batch id → latest landing, for each batch that has landed in ``table`` (the table's name in the database)."""
    here = sa.and_(landing.c.table_name == table, landing.c.batch_id.in_(list(batch_ids)))
    rows = connection.execute(sa.select(landing).where(here).order_by(landing.c.number))
    return {
        row.batch_id: Landed(
            row.batch_id,
            row.number,
            row.landed_at,
            row.rows_written,
            row.complete,
            json.loads(row.counts),
            json.loads(row.tally),
            row.created_at,
            row.ended_at,
        )
        for row in rows
    }


def note_landing(connection: Connection, batch_id: str, table: str, number: int, values: Mapping[str, Any]) -> None:
    """Note that a batch lands in a table, inside the landing's transaction. A landing that completes an earlier one is noted again."""
    here = (landing.c.batch_id == batch_id) & (landing.c.table_name == table) & (landing.c.number == number)
    if connection.execute(sa.update(landing).where(here).values(values)).rowcount == 0:
        connection.execute(sa.insert(landing).values(batch_id=batch_id, table_name=table, number=number, **values))


def landings_of(connection: Connection, dag_id: str, task_id: str) -> Sequence[Any]:
    """The latest landing of each batch of a task in each table, newest first. Each row has job_id, shard, round, run_id, map_index and
    table_name.
    """
    latest = sa.func.max(landing.c.landed_at).label("landed_at")
    where = (job.c.run_id, job.c.map_index, landing.c.table_name)
    statement = (
        sa.select(batch.c.job_id, batch.c.shard, batch.c.round, *where, latest)
        .join(job, job.c.job_id == batch.c.job_id)
        .join(landing, landing.c.batch_id == batch.c.batch_id)
        .where(job.c.dag_id == dag_id, job.c.task_id == task_id)
        .group_by(batch.c.job_id, batch.c.shard, batch.c.round, *where)
        .order_by(latest.desc(), batch.c.job_id, batch.c.shard.desc())
    )
    return connection.execute(statement).all()


def generation(connection: Connection, table: str) -> tuple[int, bool]:
    """The greatest landing number in a table, 0 when nothing has landed there, and whether rows were ever written."""
    row = connection.execute(
        sa.select(sa.func.max(landing.c.number), sa.func.max(landing.c.rows_written)).where(landing.c.table_name == table)
    ).one()
    return int(row[0] or 0), bool(row[1])


def younger_is_there(connection: Connection, table: str, number: int, landed: Landed) -> bool:
    """Whether a batch that landed later than this one has been written to the table under ``number``."""
    later = sa.and_(landing.c.table_name == table, landing.c.number == number, landing.c.landed_at > landed.landed_at)
    return connection.execute(sa.select(sa.literal(1)).where(sa.exists().where(later))).first() is not None


def older_batches(table: str, landed: Landed) -> sa.Select[Any]:
    """The ids of the batches that landed in the table before this one."""
    return sa.select(landing.c.batch_id).where(landing.c.table_name == table, landing.c.landed_at < landed.landed_at)

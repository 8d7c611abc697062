"""Facts from earlier batches that the next one needs: the answered rows, the length of answers, and the job's cost so far."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.ledger import journal, outcomes
from airflow_provider_batchkit.ledger.engine import Part
from airflow_provider_batchkit.ledger.landings import landings_of
from airflow_provider_batchkit.ledger.names import table_identity
from airflow_provider_batchkit.ledger.records import JobRecord
from airflow_provider_batchkit.ledger.states import HELD, BatchState
from airflow_provider_batchkit.ledger.tables import batch, job
from airflow_provider_batchkit.model import COST_QUANTUM

log = logging.getLogger(__name__)

_RECENT = 20


class History(Part):
    """The part of the ledger that reads the history of tasks."""

    def table_name(self, table: str) -> str:
        """The name by which the ledger knows a table of its own database."""
        with self.engine.connect() as connection:
            return table_identity(connection, table)

    def refuse_another(self, record: JobRecord, asked: str) -> None:
        """Compare the digest of what a mapped task instance asks with that of its earlier attempts.

        :raises BatchInputError: when they have sent batches for something else
        """
        of_job = sa.select(job.c.asked, batch.c.batch_id).join(batch, batch.c.job_id == job.c.job_id)
        held = of_job.where(job.c.job_id == record.job_id, batch.c.state.in_([state.value for state in HELD]))
        with self.engine.connect() as connection:
            before = connection.execute(held.order_by(batch.c.shard)).all()
        if before and before[0].asked not in (None, asked):
            error = BatchInputError(
                f"The mapped instance {record.map_index} of {record.dag_id}.{record.task_id} asked something else in an earlier attempt of "
                "this DAG run, or for another place: another source, prompt or table, or the list that it is mapped over has another order "
                "now. What it has asked would land beside the wrong rows, or be paid for again. Nothing was sent or written. Give the list "
                "its order back and clear the task, or start a new DAG run."
            )
            error.submitted = [row.batch_id for row in before if row.batch_id is not None]
            raise error

    def answered(self, record: JobRecord, table: str | None) -> Iterator[tuple[str, str]]:
        """(key, digest) of every request that succeeded in an earlier run of the task and landed in its table, the latest landing first.

        :param table: the task's result table, under the ledger's name for it. None where the task does not know it: then an earlier run
            counts when all its landings are in one table, or else the run's same mapped instance when its landings are in one table
        """
        with self.engine.connect() as connection:
            landed = [row for row in landings_of(connection, record.dag_id, record.task_id) if row.run_id != record.run_id]
            by_run, by_job = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
            for row in landed:
                by_run[row.run_id].add(row.table_name)
                by_job[row.job_id].add(row.table_name)
            ignored: set[str] = set()
            for row in landed:
                own = row.map_index == record.map_index and len(by_job[row.job_id]) == 1
                if row.table_name == table if table is not None else own or len(by_run[row.run_id]) == 1:
                    yield from _answered(connection, row.job_id, row.shard, row.round)
                elif table is None:
                    ignored.add(row.run_id)
            if ignored:
                log.warning(
                    "skip_unchanged: the answers of %d earlier runs landed in several tables, and this task does not say which one is its "
                    "own: they do not count. Give it its `table`.",
                    len(ignored),
                )

    def output_per_request(self, dag_id: str, task_id: str) -> Decimal | None:
        """Mean output tokens of a billed request over the last 20 landed batches of a task; None before the first."""
        statement = (
            sa.select(batch.c.tally)
            .join(job, job.c.job_id == batch.c.job_id)
            .where(job.c.dag_id == dag_id, job.c.task_id == task_id, batch.c.state == BatchState.LANDED.value)
            .order_by(batch.c.landed_at.desc())
            .limit(_RECENT)
        )
        with self.engine.connect() as connection:
            tallies = [json.loads(text) for text in connection.execute(statement).scalars() if text]
        requests = sum(tally["requests"] for tally in tallies)
        return Decimal(sum(tally["output_tokens"] for tally in tallies)) / requests if requests else None

    def committed_usd(self, job_id: str) -> tuple[Decimal, list[str]]:
        """The USD that the job's batches have cost or may still cost, and the names of the batches whose cost is unknown."""
        statement = sa.select(batch.c.batch_id, batch.c.shard, sa.func.coalesce(batch.c.batch_cost_picousd, batch.c.bound_picousd)).where(
            batch.c.job_id == job_id, batch.c.state.in_([state.value for state in HELD])
        )
        with self.engine.connect() as connection:
            rows = connection.execute(statement).all()
        unknown = [batch_id or f"shard {shard}" for batch_id, shard, pico in rows if pico is None]
        return sum(pico or 0 for _, _, pico in rows) * COST_QUANTUM, unknown


def _answered(connection: Connection, job_id: str, shard: int, round_number: int) -> Iterator[tuple[str, str]]:
    """(key, digest) of the rows that a landed batch has answered. The digest is that of the row's first request: a later round may ask with
    another model or more tokens, and by the digest of that request the row would be paid for again in every run.
    """
    rows = ((row.key, row.digest) for row in outcomes.succeeded_rows(connection, job_id, shard))
    if round_number == 1:
        yield from rows
        return
    keys = {key for key, _ in rows}
    first = sa.select(batch.c.shard).where(batch.c.job_id == job_id, batch.c.round == 1, batch.c.state.in_([s.value for s in HELD]))
    for number in connection.execute(first.order_by(batch.c.shard)).scalars().all():
        for entry in journal.entries(connection, job_id, number):
            if entry.key in keys:
                yield entry.key, outcomes.digests_of([entry.custom_id])[0]

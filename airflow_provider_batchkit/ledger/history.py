"""What earlier batches tell about the next one: what was answered, how long answers were, and what a job may have cost by now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from airflow_provider_batchkit.ledger import outcomes
from airflow_provider_batchkit.ledger.ledger import JobRecord
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.ledger.tables import batch, job
from airflow_provider_batchkit.model import COST_QUANTUM

_RECENT = 20


def answered(engine: Engine, record: JobRecord) -> Iterator[tuple[str, str]]:
    """(key, digest) of every request of the task's other runs that succeeded, the one that landed last first."""
    landed = (
        sa.select(batch.c.job_id, batch.c.shard)
        .join(job, job.c.job_id == batch.c.job_id)
        .where(job.c.dag_id == record.dag_id, job.c.task_id == record.task_id, job.c.job_id != record.job_id)
        .where(batch.c.state == BatchState.LANDED.value)
        .order_by(batch.c.landed_at.desc(), batch.c.job_id, batch.c.shard.desc())
    )
    with engine.connect() as connection:
        for job_id, shard in connection.execute(landed).all():
            for row in outcomes.succeeded_rows(connection, job_id, shard):
                yield row.key, row.digest


def output_per_request(engine: Engine, dag_id: str, task_id: str) -> Decimal | None:
    """Mean output tokens of a billed request over the last 20 landed batches of a task; None before the first."""
    statement = (
        sa.select(batch.c.tally)
        .join(job, job.c.job_id == batch.c.job_id)
        .where(job.c.dag_id == dag_id, job.c.task_id == task_id, batch.c.state == BatchState.LANDED.value)
        .order_by(batch.c.landed_at.desc())
        .limit(_RECENT)
    )
    with engine.connect() as connection:
        tallies = [json.loads(text) for text in connection.execute(statement).scalars() if text]
    requests = sum(tally["requests"] for tally in tallies)
    return Decimal(sum(tally["output_tokens"] for tally in tallies)) / requests if requests else None


def committed_usd(engine: Engine, job_id: str) -> tuple[Decimal, list[str]]:
    """What the job's batches have cost or may still cost, and those of them for which nobody knows."""
    statement = sa.select(batch.c.batch_id, batch.c.shard, sa.func.coalesce(batch.c.batch_cost_picousd, batch.c.bound_picousd)).where(
        batch.c.job_id == job_id, batch.c.state.in_([s.value for s in (BatchState.SENDING, BatchState.SUBMITTED, BatchState.LANDED)])
    )
    with engine.connect() as connection:
        rows = connection.execute(statement).all()
    unknown = [batch_id or f"shard {shard}" for batch_id, shard, pico in rows if pico is None]
    return sum(pico or 0 for _, _, pico in rows) * COST_QUANTUM, unknown

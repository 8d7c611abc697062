"""A key that was asked in several rounds of its job has one outcome and one row: those of the last round, in whatever order they land."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.ledger.ledger import BatchRecord
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.ledger.tables import batch, request


def leave_out_superseded(connection: Connection, stage: sa.Table, record: BatchRecord) -> None:
    """Take those rows out of the stage whose keys a later round has asked again: its outcomes stand."""
    mine = (batch.c.job_id == record.job_id) & (batch.c.state == BatchState.LANDED.value)
    if connection.execute(sa.select(sa.func.max(batch.c.round)).where(mine)).scalar_one() > record.round:
        later = sa.exists().where(request.c.job_id == record.job_id, request.c.key == stage.c.batchkit_key, request.c.shard > record.shard)
        connection.execute(sa.delete(stage).where(later))


def forget_outcomes(connection: Connection, stage: sa.Table, record: BatchRecord) -> None:
    """Take what earlier rounds noted of the stage's keys out of the ledger."""
    if record.round > 1:
        asked_again = request.c.key.in_(sa.select(stage.c.batchkit_key))
        connection.execute(sa.delete(request).where(request.c.job_id == record.job_id, asked_again))


def remove_rows(connection: Connection, target: sa.Table, record: BatchRecord, again: sa.ColumnElement[bool]) -> None:
    """Remove the rows that earlier rounds of the job wrote to a table.

    :param again: which of them, over the columns of ``target``
    """
    if record.round > 1:
        earlier = sa.select(batch.c.batch_id).where(
            batch.c.job_id == record.job_id, batch.c.round < record.round, batch.c.batch_id.is_not(None)
        )
        connection.execute(sa.delete(target).where(target.c.batch_id.in_(earlier), again))

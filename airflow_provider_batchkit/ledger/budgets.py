"""The most that a batch can cost, in its row of the ledger. Functions take the connection of the transaction that they are a part of."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.ledger.tables import batch
from airflow_provider_batchkit.model import PICO_PER_USD, Bound

UNBOUNDED = Bound(None, None)


def bound_columns(bound: Bound) -> dict[str, Any]:
    """A bound as values of a batch's row."""
    return {"bound_picousd": None if bound.usd is None else int(bound.usd * PICO_PER_USD), "bound_tokens": bound.tokens}


def carried(connection: Connection, job_id: str, shard: int) -> dict[str, Any]:
    """What goes along when a batch's requests move to another row."""
    columns = sa.select(batch.c.bound_picousd, batch.c.bound_tokens)
    return dict(connection.execute(columns.where(batch.c.job_id == job_id, batch.c.shard == shard)).mappings().one())

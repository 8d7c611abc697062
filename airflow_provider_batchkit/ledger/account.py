"""A job's bills and times: the bill of each landed batch per model, and how long the steps took."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.ledger.engine import Part, write_transaction
from airflow_provider_batchkit.ledger.tables import batch, bill, job
from airflow_provider_batchkit.model import PICO_PER_USD, CostTally, ModelTally


class Account(Part):
    """The part of the ledger that keeps bills and the times of steps."""

    def tally_of(self, batch_id: str) -> tuple[CostTally, datetime] | None:
        """The bill of a landed batch and the time of its creation; None when the batch has not landed."""
        statement = sa.select(batch.c.tally, batch.c.created_at).where(batch.c.batch_id == batch_id, batch.c.tally.is_not(None))
        with self.engine.connect() as connection:
            row = connection.execute(statement).first()
        return None if row is None else (CostTally.from_json(json.loads(row.tally)), row.created_at)

    def note_rendering(self, job_id: str, seconds: float, unchanged: int) -> None:
        """Add the seconds of reading and rendering to the job's total, and note how many rows were left out as already answered."""
        total = sa.func.coalesce(job.c.rendering_ms, 0) + round(seconds * 1000)
        with write_transaction(self.engine) as connection:
            connection.execute(sa.update(job).where(job.c.job_id == job_id).values(rendering_ms=total, unchanged_rows=unchanged))


def pico(usd: Decimal | None) -> int | None:
    """Whole picodollars (1e-12 USD); exact, since no cost is finer. None for an unknown cost."""
    return None if usd is None else int(usd * PICO_PER_USD)


def bill_columns(tally: CostTally) -> dict[str, Any]:
    """A landed batch's bill as columns of its own row."""
    total = tally.total
    return {
        "tally": json.dumps(tally.to_json(with_lines=True)),
        "batch_cost_picousd": pico(total.batch_cost_usd),
        "standard_cost_picousd": pico(total.standard_cost_usd),
    }


def write_bill(connection: Connection, job_id: str, shard: int, tally: CostTally) -> None:
    """Write a landed batch's bill, a row per model, in place of the one from an earlier landing."""
    connection.execute(sa.delete(bill).where(bill.c.job_id == job_id, bill.c.shard == shard))
    rows = [{"job_id": job_id, "shard": shard, "model": model, **_line(line)} for model, line in sorted(tally.models.items())]
    if rows:
        connection.execute(sa.insert(bill), rows)


def _line(line: ModelTally) -> dict[str, Any]:
    values = asdict(line)
    # the savings are kept in the batch's tally only
    del values["cache_savings_usd"]
    for price in ("batch", "standard"):
        values[f"{price}_cost_picousd"] = pico(values.pop(f"{price}_cost_usd"))
    return values


def note_duration(connection: Connection, job_id: str, shard: int, seconds: float) -> None:
    """Note how long a batch's landing took, inside the landing's transaction."""
    here = (batch.c.job_id == job_id) & (batch.c.shard == shard)
    connection.execute(sa.update(batch).where(here).values(landing_ms=round(seconds * 1000)))

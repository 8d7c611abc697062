"""A ledger with some history, for a page that shows it: jobs of several DAGs and models, failed rows, a budget, and batches that run."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from airflow_provider_batchkit import BatchKit
from airflow_provider_batchkit.cost.budget import Budget
from airflow_provider_batchkit.jobs.caps import Limits
from airflow_provider_batchkit.ledger import JobRecord
from airflow_provider_batchkit.ledger.tables import batch, job
from airflow_provider_batchkit.simulator import SimulatorProcess
from tests.warehouse import Warehouse

DAGS = ("catalog_copy", "review_labels")
#: what a DAG file is to hold, so that Airflow knows the DAGs of the ledger
DAG_FILE = "\n".join(
    [
        "from airflow.sdk import DAG, task",
        "",
        f"for name in {DAGS!r}:",
        "    with DAG(name, schedule=None):",
        "",
        "        @task",
        "        def submit() -> None:",
        "            pass",
        "",
        "        submit()",
        "",
    ]
)


class Shelf(Warehouse):
    """A warehouse whose jobs are of a DAG of one's own choice."""

    dag_id = DAGS[0]

    def job(self, run_id: str = "run-1", *, task_id: str = "submit", map_index: int = -1) -> JobRecord:
        self.ledger.ensure()
        return self.ledger.identify(self.dag_id, run_id, task_id, map_index)

    def aged(self, run_id: str, hours: float, took_s: float) -> None:
        """Let a landed job be so old, and its batches have taken so long."""
        began = datetime.now(UTC) - timedelta(hours=hours)
        ended = began + timedelta(seconds=took_s)
        here = self.job(run_id).job_id
        with self.engine.begin() as connection:
            connection.execute(sa.update(job).where(job.c.job_id == here).values(created_at=began))
            times: dict[str, Any] = {
                "intended_at": began,
                "created_at": began + timedelta(seconds=2),
                "submitted_at": began + timedelta(seconds=3),
            }
            connection.execute(sa.update(batch).where(batch.c.job_id == here).values(**times))
            landed = (batch.c.job_id == here) & batch.c.landed_at.is_not(None)
            connection.execute(sa.update(batch).where(landed).values(ended_at=ended, landed_at=ended + timedelta(seconds=20)))


def rows(count: int, every: int = 0, mark: str = "") -> list[dict[str, Any]]:
    """Rows, of which every so many has a marker for the simulator."""
    return [{"id": i, "name": f"product {i}{f' [[sim:{mark}]]' if every and i % every == every - 1 else ''}"} for i in range(count)]


def fill(engine: sa.Engine, kit: BatchKit, sim: SimulatorProcess) -> Shelf:
    """Two weeks of landed jobs; gives the shelf, on which further jobs may be begun."""
    shelf = Shelf(engine, kit)
    sim.set(clock="instant", input_tokens=1800, output_tokens=320)
    limits = Limits(budget=Budget("catalog", Decimal(40)))
    for day in range(14, 0, -2):
        for dag_id, model, count, every, mark in (
            (DAGS[0], "claude-opus-4-8", 60 + 7 * day, 29, "errored"),
            (DAGS[1], "claude-haiku-5-5", 150 - 5 * day, 41, "overloaded"),
        ):
            shelf.dag_id = dag_id
            run_id = f"scheduled__2026-11-{26 - day:02d}T04:00:00+00:00"
            done = shelf.submit(rows(count, every, mark), run_id=run_id, model=model, limits=limits, max_tokens=400, max_requests=100)
            shelf.fetch(done.batch_ids, f"answers_{dag_id}", run_id=run_id)
            shelf.aged(run_id, day * 24, 900 + 420 * (day % 5))
    shelf.dag_id = DAGS[0]
    return shelf


def run(shelf: Shelf, sim: SimulatorProcess, run_id: str, count: int, *, seconds: int, dag_id: str = DAGS[0]) -> list[str]:
    """Begin a job whose batches take so long, with counters that move."""
    sim.set(clock=f"seconds:{seconds}", moving_counts=True)
    shelf.dag_id = dag_id
    return shelf.submit(rows(count), run_id=run_id, model="claude-opus-4-8", max_tokens=400, max_requests=100).batch_ids

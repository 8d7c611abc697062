"""How long the Batches page's queries take on a large ledger: ``python -m tests.bench.page``.

5,000 jobs and 1,000,000 rows in a real PostgreSQL, 20,000 of them failed; alone, and while a batch of 100,000 rows lands beside them, in
a process of its own as a worker's is.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Event
from typing import Any

import sqlalchemy as sa

from airflow_provider_batchkit.ledger.overview import Filter, Overview
from airflow_provider_batchkit.ledger.spending import Spending
from airflow_provider_batchkit.ledger.tables import batch, bill, budget, failed, job, journal, succeeded
from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from tests.databases import postgres_database, running_postgres
from tests.warehouse import Warehouse, kit_for

JOBS, ROWS_A_JOB, FAILED_A_JOB = 5_000, 200, 4
DAGS, OPEN_JOBS, TIMES = 40, 50, 15
LANDING = 100_000


def fill(engine: sa.Engine) -> None:
    """Jobs over 200 days; the last ones have an open batch."""
    now = datetime.now(UTC)
    entries = json.dumps([[f"[{row}]", f"{row:040x}", 75_000_000, 150_000_000] for row in range(ROWS_A_JOB - FAILED_A_JOB)])
    for start in range(0, JOBS, 500):
        tables = dict[sa.Table, list[dict[str, Any]]]()
        for number in range(start, start + 500):
            job_id, began = f"{number:020x}", now - timedelta(days=200) * (1 - number / JOBS)
            is_open = number >= JOBS - OPEN_JOBS
            tables.setdefault(job, []).append(
                {
                    "job_id": job_id,
                    "dag_id": f"dag_{number % DAGS}",
                    "run_id": f"scheduled__{number}",
                    "task_id": "submit",
                    "map_index": -1,
                    "created_at": began,
                    "lease": 1,
                    "key_columns": "[]",
                    "rounds_sent": 1,
                }
            )
            for shard in range(2):
                lands = not (is_open and shard)
                values = {"batch_cost_picousd": 7_500_000_000, "standard_cost_picousd": 15_000_000_000}
                times = {"created_at": began, "submitted_at": began, "intended_at": began}
                landed = {
                    "ended_at": began + timedelta(minutes=40),
                    "landed_at": began + timedelta(minutes=41),
                    "counts": '{"succeeded": 98}',
                }
                tables.setdefault(batch, []).append(
                    {
                        "job_id": job_id,
                        "shard": shard,
                        "batch_id": f"msgbatch_{number}_{shard}",
                        "anthropic_conn_id": "anthropic_default",
                        "state": "landed" if lands else "submitted",
                        "round": 1,
                        "requests": ROWS_A_JOB // 2,
                        "body_bytes": 100_000,
                        "bound_picousd": 30_000_000_000,
                        "bound_tokens": 100_000,
                        "budget": "all",
                        "budget_at": began,
                        **times,
                        **{name: values[name] if lands else None for name in values},
                        **{name: landed[name] if lands else None for name in landed},
                    }
                )
                if lands:
                    tokens = dict.fromkeys(("cache_write_5m_tokens", "cache_write_1h_tokens", "cache_read_tokens", "web_searches"), 0)
                    model = ("claude-opus-4-8", "claude-haiku-5-5", "claude-sonnet-5")[number % 3]
                    counted = {"requests": 100, "input_tokens": 100_000, "output_tokens": 20_000}
                    tables.setdefault(bill, []).append({"job_id": job_id, "shard": shard, "model": model, **counted, **tokens, **values})
            tables.setdefault(journal, []).append({"job_id": job_id, "shard": 0, "part": 0, "entries": entries.encode()})
            rows = {"asked": True, "source_rows": ROWS_A_JOB - FAILED_A_JOB, "entries": entries}
            tables.setdefault(succeeded, []).append({"job_id": job_id, "shard": 0, "part": 0, **rows})
            error = {"status": "errored", "error_type": "overloaded_error", "error_message": "Overloaded", "asked": True}
            tables.setdefault(failed, []).extend(
                {"job_id": job_id, "key": f"[{row}]", "shard": 0, "custom_id": f"{job_id}-{row:040x}", **error}
                for row in range(FAILED_A_JOB)
            )
        with engine.begin() as connection:
            for table, values_of in tables.items():
                connection.execute(sa.insert(table), values_of)
    with engine.begin() as connection:
        connection.execute(sa.insert(budget).values(name="all", window="month", cap_picousd=10**15, asked_at=now))


def questions(engine: sa.Engine) -> dict[str, Callable[[], object]]:
    """What the page asks, each as one request does."""
    overview, books = Overview(engine), Spending(engine)
    dags = frozenset(overview.dag_ids())
    some = f"{JOBS // 2:020x}"
    page = overview.jobs(Filter(dags), limit=25).next
    month = datetime.now(UTC) - timedelta(days=30)
    return {
        "the filters' choices": lambda: (overview.dag_ids(), overview.models(dags)),
        "in flight": lambda: overview.jobs(Filter(dags, state="open"), limit=200, oldest_first=True),
        "open batches": lambda: overview.batches(Filter(state="open"), limit=1000, oldest_first=True),
        "what jobs in flight usually cost": lambda: overview.usual((f"dag_{number}", "submit") for number in range(DAGS)),
        "history, first page": lambda: overview.jobs(Filter(dags), limit=25),
        "history, second page": lambda: overview.jobs(Filter(dags), limit=25, before=page),
        "history, failed rows of a DAG": lambda: overview.jobs(Filter(dags, dag_id="dag_7", failed=True), limit=25),
        "history, of a model": lambda: overview.jobs(Filter(dags, model="claude-sonnet-5"), limit=25),
        "history, nothing fits": lambda: overview.jobs(Filter(dags, state="gone"), limit=25),
        "one job": lambda: (overview.job(some), overview.failed_rows(some)),
        "keys of one reason": lambda: overview.keys_like(some, "[0]"),
        "spent by day": lambda: books.spent("day", since=month, dag_ids=dags),
        "spent by DAG, all time": lambda: books.spent("dag", dag_ids=dags),
        "spent by model": lambda: books.spent("model", since=month, dag_ids=dags),
        "budgets": lambda: books.budgets(dags),
        "latency of a month": lambda: books.latencies(since=month, dag_ids=dags),
    }


def measure(engine: sa.Engine) -> dict[str, tuple[float, float]]:
    """Milliseconds of each question: the median and the slowest."""
    found = dict[str, tuple[float, float]]()
    for name, ask in questions(engine).items():
        took = list[float]()
        for _ in range(TIMES):
            started = time.perf_counter()
            ask()
            took.append(1_000 * (time.perf_counter() - started))
        found[name] = statistics.median(took), max(took)
    return found


def land(url: str, api: str, ids: list[str], begun: Event, over: Event) -> None:
    """Land the batches again and again."""
    shelf = Warehouse(sa.create_engine(url), kit_for(api))
    while not over.is_set():
        begun.set()
        shelf.fetch(ids, "answers", run_id="landing", rewrite=True)


def main() -> None:
    """Print the table."""
    with running_postgres() as url, postgres_database(url) as database, SimulatorProcess(SimulatorSettings()) as sim:
        shelf = Warehouse(database.engine(), kit_for(sim.base_url))
        shelf.ledger.ensure()
        fill(shelf.engine)
        shelf.execute("ANALYZE")
        reader = sa.create_engine(database.url)
        alone = measure(reader)
        ids = shelf.submit(({"id": i, "name": f"n {i}"} for i in range(LANDING)), run_id="landing").batch_ids
        processes = multiprocessing.get_context("spawn")
        begun, over = processes.Event(), processes.Event()
        beside = processes.Process(target=land, args=(database.url, sim.base_url, ids, begun, over))
        beside.start()
        try:
            begun.wait(60)
            busy = measure(reader)
        finally:
            over.set()
            beside.join()
        if beside.exitcode:
            raise SystemExit("the landing failed")
        reader.dispose()
    print(f"{'milliseconds':34} {'alone':>8} {'slowest':>8} {'landing':>8} {'slowest':>8}")
    for name, (median, slowest) in alone.items():
        print(f"{name:34} {median:8.0f} {slowest:8.0f} {busy[name][0]:8.0f} {busy[name][1]:8.0f}")


if __name__ == "__main__":
    main()

"""One measurement of one side, in a process of its own; prints a JSON line.

``submit``: batchkit reads a SQL table, renders, digests, journals and sends; the official operator sends a list that lies in memory.
``fetch``: results into a table; batchkit with costs and ledger, the official provider through its iterator and ``insert_rows``.
The side ``typed`` is batchkit with a schema of six columns.
``cut``: one small batch while the simulator cuts connections after acceptance, with one retry of the task.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import resource
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import sqlalchemy as sa

from tests.connections import anthropic_connection
from tests.databases import Database

#: of the typed side: an answer of six columns
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "category": {"type": "string", "enum": ["home", "garden", "kitchen"]},
        "stock": {"type": "integer"},
        "price": {"type": "number"},
        "organic": {"type": "boolean"},
        "seen_on": {"type": "string", "format": "date"},
    },
    "required": ["title", "category", "stock", "price", "organic", "seen_on"],
}
PROMPT = "Write a two-sentence description of product {} " + "x" * 900


def context(task_id: str) -> Any:
    """As much of a task's context as the operators read."""
    ti = type(
        "TI", (), {"dag_id": "bench", "run_id": "r", "task_id": task_id, "map_index": -1, "xcom_push": staticmethod(lambda **_: None)}
    )
    return {"ti": ti()}


class Bench:
    """Both sides' work on one database and one simulator."""

    def __init__(self, simulator: str, database: Database, rows: int) -> None:
        self.rows = rows
        os.environ["AIRFLOW_CONN_ANTHROPIC_DEFAULT"] = anthropic_connection(simulator)
        os.environ["AIRFLOW_CONN_WAREHOUSE"] = database.airflow_uri
        products = sa.table("products", sa.column("id"), sa.column("name"))
        with database.engine().begin() as connection:
            connection.exec_driver_sql("CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT)")
            for start in range(0, rows, 10_000):
                chunk = range(start, min(start + 10_000, rows))
                connection.execute(sa.insert(products), [{"id": i, "name": f"product {i} " + "x" * 900} for i in chunk])
            connection.exec_driver_sql("CREATE TABLE official (custom_id TEXT, response TEXT, input_tokens INTEGER, output_tokens INTEGER)")

    def batchkit_submit(self, output_schema: Any = None) -> list[str]:
        from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

        submit = SubmitBatchOperator(
            task_id="submit",
            sql="SELECT id, name FROM products",
            key="id",
            prompt="Write a two-sentence description of {{ row.name }}",
            model="claude-opus-4-8",
            max_tokens=200,
            output_schema=output_schema,
            sql_conn_id="warehouse",
            settle_seconds=2,
        )
        return list(submit.execute(context("submit")))

    def batchkit_fetch(self, ids: list[str]) -> None:
        from airflow_provider_batchkit.operators.batch import FetchBatchOperator

        FetchBatchOperator(task_id="fetch", batch_id=ids, table="answers", sql_conn_id="warehouse").execute(context("fetch"))

    def requests(self) -> list[dict[str, Any]]:
        """The list that the official operator is given."""
        return [
            {
                "custom_id": f"p-{i}",
                "params": {
                    "model": "claude-opus-4-8",
                    "max_tokens": 200,
                    "messages": [{"role": "user", "content": PROMPT.format(i)}],
                },
            }
            for i in range(self.rows)
        ]

    def official_submit(self, requests: list[dict[str, Any]]) -> list[str]:
        from airflow.providers.anthropic.operators.batch import AnthropicBatchOperator

        submit = AnthropicBatchOperator(task_id="submit", requests=requests, conn_id="anthropic_default", wait_for_completion=False)
        return [str(submit.execute(context("submit")))]

    def official_fetch(self, ids: list[str]) -> None:
        from airflow.providers.anthropic.hooks.anthropic import AnthropicHook
        from airflow.providers.common.compat.sdk import BaseHook

        hook = AnthropicHook("anthropic_default")

        def rows() -> Any:
            for line in hook.stream_batch_results(ids[0]):
                message: Any = line.result.message  # type: ignore[union-attr]  # all succeed here
                yield line.custom_id, message.content[0].text, message.usage.input_tokens, message.usage.output_tokens

        columns = ["custom_id", "response", "input_tokens", "output_tokens"]
        BaseHook.get_connection("warehouse").get_hook().insert_rows("official", rows(), columns, commit_every=1000, executemany=True)


def warm_up(bench: Bench) -> None:
    """Imports, the SDK's types, which it makes at their first use, and first connections are not what is measured."""
    from airflow.providers.common.compat.sdk import BaseHook

    import airflow_provider_batchkit.jobs
    import airflow_provider_batchkit.operators.batch
    import airflow_provider_batchkit.sources
    import airflow_provider_batchkit.templates  # noqa: F401
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

    BaseHook.get_connection("warehouse").get_hook()
    params = {"model": "claude-opus-4-8", "messages": [{"role": "user", "content": "Hello"}]}
    kit = BatchKitHook().kit
    kit.count_tokens(params)
    kit.retrieve(bench.official_submit([{"custom_id": "warm", "params": {**params, "max_tokens": 1}}]))


def watched(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory over what the process held before."""
    process = psutil.Process()
    base = peak = process.memory_info().rss
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    cpu, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    work()
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
    stop.set()
    thread.join()
    used = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    return {"seconds": seconds, "cpu_seconds": used, "peak_mb_over_base": (peak - base) / 1e6}


def main() -> None:
    """Prepare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("batchkit", "official", "typed"))
    parser.add_argument("what", choices=("submit", "fetch", "cut"))
    parser.add_argument("--simulator", required=True)
    parser.add_argument("--url", required=True, help="SQLAlchemy URL of an empty database")
    parser.add_argument("--airflow-uri", required=True, help="the same as an Airflow connection")
    parser.add_argument("--rows", type=int, required=True)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    kind = sa.make_url(args.url).get_backend_name()
    bench = Bench(args.simulator, Database(kind, args.url, args.airflow_uri), args.rows)
    if args.what != "cut":  # there the first call is what is counted
        warm_up(bench)
    figures: dict[str, float] = {}
    if args.what == "cut":
        for _ in range(2):  # the task and one retry
            with contextlib.suppress(Exception):
                bench.batchkit_submit() if args.side == "batchkit" else bench.official_submit(bench.requests())
                break
    elif args.side in ("batchkit", "typed"):
        ids: list[str] = []
        submitted = watched(lambda: ids.extend(bench.batchkit_submit(SCHEMA if args.side == "typed" else None)))
        figures = submitted if args.what == "submit" else watched(lambda: bench.batchkit_fetch(ids))
    else:
        requests = bench.requests()
        ids = []
        submitted = watched(lambda: ids.extend(bench.official_submit(requests)))
        requests.clear()
        figures = submitted if args.what == "submit" else watched(lambda: bench.official_fetch(ids))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

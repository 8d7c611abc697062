"""One step of one side, in a process of its own as a task has; prints its figures, and what the next step needs, as a JSON line.

``submit``: from what lies ready to a batch that the API accepted. ``fetch``: from a batch that has ended to its results in their place.
``cut``: a small submit while the simulator cuts connections after acceptance, with one retry of the task.
What each side does in a step, and what it does not, is in the docstring of its class. Each drives its operators and hooks as a DAG does.
A peer's list of requests is made before its submit is measured: neither its time nor its memory counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import sqlalchemy as sa

from tests.connections import anthropic_connection
from tests.databases import Database

MODEL = "claude-opus-4-8"
MAX_TOKENS = 200
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


def product(i: int) -> str:
    """What the prompts are about: 600 to 1,200 bytes, which makes them 1 KB on average, and no two neighbours of one length."""
    return f"product {i} " + "x" * (600 + i * 7_919 % 601)


def prompt(i: int) -> str:
    """The prompt of row ``i``, the same on every side."""
    return f"Write a two-sentence description of {product(i)}"


class Side(ABC):
    """One way of requests through one side. What it leaves in the database, and its job, go by ``name``; a fetch finds in ``folder`` what
    the submit of that name put there.
    """

    def __init__(self, database: Database, folder: Path, name: str) -> None:
        self.database = database
        self.folder = folder
        self.name = name

    def context(self, task_id: str) -> Any:
        """As much of a task's context as the operators read."""
        ti = {"dag_id": self.name, "run_id": "r", "task_id": task_id, "map_index": -1, "xcom_push": staticmethod(lambda **_: None)}
        instance = type("TI", (), ti)()
        return {"ti": instance, "task_instance": instance}

    @abstractmethod
    def prepare(self, rows: int) -> None:
        """Lay ready what the submit of ``rows`` requests begins with."""

    @abstractmethod
    def submit(self) -> None:
        """Measured."""

    @abstractmethod
    def submitted(self) -> Any:
        """What the fetch is handed: a JSON value."""

    @abstractmethod
    def fetch(self, submitted: Any) -> None:
        """Measured."""


class BatchKit(Side):
    """submit: read a SQL table, render, digest, journal, stream. fetch: rows, costs and ledger into the database, in one transaction."""

    output_schema: Any = None

    def prepare(self, rows: int) -> None:
        products = sa.table(f"products_{self.name}", sa.column("id"), sa.column("name"))
        with self.database.engine().begin() as connection:
            connection.exec_driver_sql(f"CREATE TABLE {products.name} (id INTEGER PRIMARY KEY, name TEXT)")
            for start in range(0, rows, 10_000):
                chunk = range(start, min(start + 10_000, rows))
                connection.execute(sa.insert(products), [{"id": i, "name": product(i)} for i in chunk])

    def submit(self) -> None:
        from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

        submit = SubmitBatchOperator(
            task_id="submit",
            sql=f"SELECT id, name FROM products_{self.name}",
            key="id",
            prompt="Write a two-sentence description of {{ row.name }}",
            model=MODEL,
            max_tokens=MAX_TOKENS,
            output_schema=self.output_schema,
            sql_conn_id="warehouse",
            settle_seconds=60,
        )
        self.ids = list(submit.execute(self.context("submit")))

    def submitted(self) -> list[str]:
        return self.ids

    def fetch(self, submitted: list[str]) -> None:
        from airflow_provider_batchkit.operators.batch import FetchBatchOperator

        fetch = FetchBatchOperator(task_id="fetch", batch_id=submitted, table=f"answers_{self.name}", sql_conn_id="warehouse")
        fetch.execute(self.context("fetch"))


class Typed(BatchKit):
    """batchkit with an answer of six columns: every one is checked and lands in columns of its own."""

    output_schema = SCHEMA


class IntoDuckDB(BatchKit):
    """batchkit with its results in a DuckDB file: the source and the ledger stay where they are."""

    def fetch(self, submitted: list[str]) -> None:
        from airflow_provider_batchkit.operators.batch import FetchBatchOperator

        os.environ["AIRFLOW_CONN_LAKE"] = f"duckdb://{quote(str(self.folder / 'lake.duckdb'), safe='')}"
        places = {"sql_conn_id": "lake", "ledger_conn_id": "warehouse"}
        FetchBatchOperator(task_id="fetch", batch_id=submitted, table=f"answers_{self.name}", **places).execute(self.context("fetch"))


class Official(Side):
    """submit: a list of native requests, in memory, sent. fetch: the hook's iterator into ``insert_rows``. No ledger, no costs."""

    def prepare(self, rows: int) -> None:
        fixed = {"model": MODEL, "max_tokens": MAX_TOKENS}
        messages = ([{"role": "user", "content": prompt(i)}] for i in range(rows))
        self.requests = [{"custom_id": f"p-{i}", "params": {**fixed, "messages": asked}} for i, asked in enumerate(messages)]
        columns = "custom_id TEXT, response TEXT, input_tokens INTEGER, output_tokens INTEGER"
        with self.database.engine().begin() as connection:
            connection.exec_driver_sql(f"CREATE TABLE answers_{self.name} ({columns})")

    def submit(self) -> None:
        from airflow.providers.anthropic.operators.batch import AnthropicBatchOperator

        submit = AnthropicBatchOperator(task_id="submit", requests=self.requests, conn_id="anthropic_default", wait_for_completion=False)
        self.batch_id = submit.execute(self.context("submit"))

    def submitted(self) -> str:
        return str(self.batch_id)

    def fetch(self, submitted: str) -> None:
        from airflow.providers.anthropic.hooks.anthropic import AnthropicHook
        from airflow.providers.common.compat.sdk import BaseHook

        hook = AnthropicHook("anthropic_default")

        def rows() -> Any:
            for line in hook.stream_batch_results(submitted):
                message: Any = line.result.message  # type: ignore[union-attr]  # all succeed here
                yield line.custom_id, message.content[0].text, message.usage.input_tokens, message.usage.output_tokens

        columns = ["custom_id", "response", "input_tokens", "output_tokens"]
        warehouse = BaseHook.get_connection("warehouse").get_hook()
        warehouse.insert_rows(f"answers_{self.name}", rows(), columns, commit_every=1000, executemany=True)


class CommonAI(Side):
    """submit: a list of prompts, in memory, sized, fingerprinted, sent, noted in a file. fetch: rows with tokens to a JSONL file on
    disk, in the lines of both databases. No table, no costs.
    """

    # a submit is execute() until the task defers, a fetch is execute_complete() with the event that its trigger gave

    def prepare(self, rows: int) -> None:
        self.requests = [prompt(i) for i in range(rows)]

    def operator(self, requests: list[str]) -> Any:
        from airflow.providers.common.ai.operators.llm_batch import LLMBatchOperator

        return LLMBatchOperator(
            task_id="ask",
            requests=requests,
            result_path=self.folder.as_uri(),
            llm_conn_id="pydanticai_default",
            model_id=f"anthropic:{MODEL}",
            max_tokens=MAX_TOKENS,
            deferrable=True,
        )

    def submit(self) -> None:
        from airflow.providers.common.compat.sdk import TaskDeferred

        try:
            self.operator(self.requests).execute(self.context("ask"))
        except TaskDeferred as deferred:
            self.trigger: Any = deferred.trigger

    def submitted(self) -> Any:
        async def event() -> Any:
            return await anext(self.trigger.run())

        return asyncio.run(event()).payload

    def fetch(self, submitted: Any) -> None:
        self.operator([]).execute_complete(self.context("ask"), submitted)


SIDES: dict[str, type[Side]] = {"batchkit": BatchKit, "typed": Typed, "duckdb": IntoDuckDB, "official": Official, "common.ai": CommonAI}


def connect(simulator: str) -> None:
    """Every side's connection to the API, where Airflow looks for it first."""
    os.environ["AIRFLOW_CONN_ANTHROPIC_DEFAULT"] = anthropic_connection(simulator)
    os.environ["AIRFLOW_CONN_PYDANTICAI_DEFAULT"] = json.dumps({"conn_type": "pydanticai", "password": "test-key", "host": simulator})


def warm_up(side: Side) -> None:
    """Imports, the SDK's types, which it makes at their first use, and first connections are not what is measured."""
    side.prepare(1)
    side.submit()
    side.fetch(side.submitted())


def watched(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory over what the process held before."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)  # else memory that the warm-up freed, and the process kept, would hide as much of the peak
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
    return {"seconds": seconds, "CPU seconds": used, "peak MB over base": (peak - base) / 1e6}


def main() -> None:
    """Prepare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("step", choices=("submit", "fetch", "cut"))
    parser.add_argument("--simulator", required=True)
    parser.add_argument("--url", required=True, help="SQLAlchemy URL of a database that is empty at the submit")
    parser.add_argument("--airflow-uri", required=True, help="the same as an Airflow connection")
    parser.add_argument("--folder", type=Path, required=True, help="empty at the submit")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--submitted", type=json.loads, help="of a fetch: what the submit printed under this name")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    database = Database(sa.make_url(args.url).get_backend_name(), args.url, args.airflow_uri)
    connect(args.simulator)
    os.environ["AIRFLOW_CONN_WAREHOUSE"] = args.airflow_uri
    side = SIDES[args.side](database, args.folder, "bench")
    if args.step != "cut":  # there the first call is what is counted
        warm_up(SIDES[args.side](database, args.folder, f"warm_{args.step}"))
    if args.step != "fetch":
        side.prepare(args.rows)
    result: dict[str, Any] = {}
    if args.step == "submit":
        result["figures"] = watched(side.submit)
        result["submitted"] = side.submitted()
    elif args.step == "fetch":
        result["figures"] = watched(lambda: side.fetch(args.submitted))
    else:
        for _ in range(2):  # the task and one retry
            with contextlib.suppress(Exception):
                side.submit()
                break
    print(json.dumps(result))


if __name__ == "__main__":
    main()

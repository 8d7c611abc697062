"""The kill matrix: the real operators in a process of their own, killed with SIGKILL at every write and at every byte of every request.

Each case forks three times: a first attempt that kills itself at one point, a retry that is left alone, and the fetch (or, for the
fetch's own points, a submit, a killed fetch, and its retry). Then the books are compared: the simulator's count of accepted requests with
the rows asked, the table with the answers, and the ledger's tally with the simulator's bill.

Run as a program by the tests: ``python -m tests.crash.matrix --url … --airflow-uri … --simulator …``; prints one JSON line per case.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from airflow.providers.common.compat.sdk import TaskDeferred
from sqlalchemy.engine import Connection
from uuid6 import uuid7

from airflow_provider_batchkit.cost import checks
from airflow_provider_batchkit.ledger import Ledger
from airflow_provider_batchkit.simulator import answer_for
from airflow_provider_batchkit.simulator.process import RemoteControl
from tests.connections import anthropic_connection

ROWS = 7
SHARD = 4
SETTLE_S = 0.5
#: how long a batch may be missing from the list, and what a deferred attempt sleeps in place of the triggerer
ABSENCE_S, DEFERRED_S = 0.3, 0.2
#: the upper bound of a case's rows is between $0.0105 and $0.016
CAP_USD = "0.020"
#: the same of a primed job, whose bound counts a write to the cache: $0.0205 to $0.0215
PRIMED_CAP_USD = "0.030"
_WRITES = ("INSERT", "UPDATE", "DELETE", "CREATE", "DROP", "COPY")


class KillSwitch:
    """Counts the points that a process passes, and kills it at one of them."""

    def __init__(self, at: int | None, names: Path) -> None:
        self._at = at
        self._names = names.open("a", buffering=1)
        self._passed = 0
        self._awaiting = False

    def point(self, name: str) -> None:
        self._passed += 1
        self._names.write(name + "\n")
        if self._passed == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Points at every write, before and after every commit, and around every send and receive on a socket."""

        def on_execute(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if statement.lstrip().upper().startswith(_WRITES):
                self.point("before " + " ".join(statement.split())[:60])

        sa.event.listen(sa.engine.Engine, "before_cursor_execute", on_execute)
        self._wrap(Connection, "_commit_impl", "COMMIT")
        for name in ("send", "sendall", "recv"):
            self._wrap(socket.socket, name, name)

    def _wrap(self, owner: Any, name: str, label: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def wrapped(this: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(this, socket.socket) and this.family != socket.AF_INET:
                return original(this, *args, **kwargs)
            what = label
            if label == "recv" and not self._awaiting:
                # how many pieces an answer comes in is up to the network: only its first has a number
                return original(this, *args, **kwargs)
            self._awaiting = label.startswith("send")
            if self._awaiting:
                what = f"{label} {bytes(args[0][:40]).split(b' HTTP')[0].decode('latin-1')!r}"
            self.point(f"before {what}")
            result = original(this, *args, **kwargs)
            self.point(f"after {what}")
            return result

        setattr(owner, name, wrapped)


class Case:
    """One pair of submit and fetch, under a run id and a table of its own."""

    def __init__(self, name: str, engine: sa.Engine, simulator: RemoteControl, folder: Path, *, primed: bool = False) -> None:
        self.name = name
        # too short to be cached, so the bill stays what it is; the order of things is that of a primed job
        self._priming: dict[str, Any] = {"system": "Be brief.", "cache_system": "1h", "prime_cache": True} if primed else {}
        self._cap_usd = PRIMED_CAP_USD if primed else CAP_USD
        self.table = f"answers_{name}"
        self._engine = engine
        self._simulator = simulator
        self._out = folder / f"{name}.json"
        self.points = folder / f"{name}.points"
        self._before = simulator.stats()

    def submit(self) -> None:
        from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

        make = partial(
            SubmitBatchOperator,
            task_id="submit",
            sql="SELECT id, name FROM products ORDER BY id",
            key="id",
            prompt=f"{self.name} {{{{ row.name }}}}",
            model="claude-opus-4-8",
            max_tokens=100,
            sql_conn_id="warehouse",
            max_requests_per_batch=SHARD,
            settle_seconds=SETTLE_S,
            # has room for the job once: a reservation that a killed attempt left behind would refuse the retry
            budget={"name": self.name, "usd": self._cap_usd},
            **self._priming,
        )
        self._out.write_text(json.dumps(self._perform(make)))

    def fetch(self) -> None:
        from airflow_provider_batchkit.operators.batch import FetchBatchOperator

        ids = json.loads(self._out.read_text())
        self._perform(partial(FetchBatchOperator, task_id="fetch", batch_id=ids, table=self.table, sql_conn_id="warehouse"))

    def _perform(self, make: Callable[[], Any]) -> Any:
        """Execute a task's operator in one attempt, as Airflow does: after each deferral another object of it goes on."""
        operator = make()
        # the id of a task instance is new for each attempt, and an attempt keeps it over its deferrals
        names = {"id": uuid7(), "dag_id": "crash", "run_id": self.name, "task_id": operator.task_id, "map_index": -1}
        context = {"ti": type("TI", (), {**names, "xcom_push": _nowhere})()}
        goes_on = operator.execute
        event: dict[str, Any] = {}
        while True:
            try:
                return goes_on(context, **event)
            except TaskDeferred as deferred:
                time.sleep(DEFERRED_S)
                goes_on = getattr(make(), deferred.method_name)
                batch_ids = list(getattr(deferred.trigger, "batch_ids", ()))
                told = {"status": "timeout", "batch_ids": batch_ids, "message": "The time is over."}
                event = {"event": told, **(deferred.kwargs or {})}

    def attempt(self, what: Callable[[], None], kill_at: int | None = None) -> str:
        """Run in a fork; gives ``done``, ``killed`` or the error."""
        pid = os.fork()
        if pid == 0:
            try:
                KillSwitch(kill_at, self.points).install()
                what()
                os._exit(0)
            except BaseException:  # noqa: BLE001 - the fork must end here, whatever happened
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return "killed"
        return "done" if os.WEXITSTATUS(status) == 0 else "failed"

    def verify(self) -> list[str]:
        """What is wrong with the books; nothing, when the promise was kept."""
        wrong = []
        now = self._simulator.stats()
        asked = now["requests_accepted"] - self._before["requests_accepted"]
        if asked != ROWS:
            wrong.append(f"{asked} requests accepted for {ROWS} rows")
        with self._engine.connect() as connection:
            rows = connection.exec_driver_sql(f"SELECT id, response FROM {self.table} ORDER BY id").fetchall()
            job = f"SELECT job_id FROM batchkit_job WHERE run_id = '{self.name}'"
            booked = connection.exec_driver_sql(
                f"SELECT SUM(batch_cost_picousd), COUNT(*) FROM batchkit_batch WHERE state = 'landed' AND job_id IN ({job})"
            ).one()
            states = connection.exec_driver_sql(f"SELECT state FROM batchkit_batch WHERE job_id IN ({job})").scalars().all()
            requests = connection.exec_driver_sql(f"SELECT status FROM batchkit_request WHERE job_id IN ({job})").scalars().all()
        expected = [(i, answer_for(f"{self.name} product {i}")) for i in range(ROWS)]
        if [tuple(row) for row in rows] != expected:
            wrong.append(f"the table holds {rows}")
        # 7 rows at $0.008: what the simulator billed, in picodollars
        billed = now["bill"]["claude-opus-4-8"]["requests"] - self._before["bill"].get("claude-opus-4-8", {"requests": 0})["requests"]
        if (booked[0], billed) != (ROWS * 8_000_000_000, ROWS):
            wrong.append(f"booked {booked[0]} picodollars, billed {billed} requests")
        if set(states) - {"landed", "void", "rejected"} or requests != ["succeeded"] * ROWS:
            wrong.append(f"batches {states}, requests {requests}")
        books = Ledger(self._engine).budget_status(self.name)
        if books is None or (books.spent_usd, books.reserved_usd) != (ROWS * Decimal("0.008"), Decimal(0)):
            wrong.append(f"the budget's books: {books}")
        return wrong


def _nowhere(*_: Any, **__: Any) -> None:
    """An XCom push: what a killed attempt pushed is cleared before a retry anyway."""


def run_all(engine: sa.Engine, simulator: RemoteControl, folder: Path, *, primed: bool) -> int:
    """All cases; prints a JSON line each. Gives the number of cases with a fault. A primed job is fetched like any other."""
    rehearsal = Case("rehearsal", engine, simulator, folder, primed=primed)
    assert rehearsal.attempt(rehearsal.submit) == "done"
    submit_points = rehearsal.points.read_text().splitlines()
    assert rehearsal.attempt(rehearsal.fetch) == "done"
    fetch_points = [] if primed else rehearsal.points.read_text().splitlines()[len(submit_points) :]
    faults = 0
    for phase, points in (("submit", submit_points), ("fetch", fetch_points)):
        for number, point in enumerate(points, 1):
            case = Case(f"{phase}_{number}", engine, simulator, folder, primed=primed)
            if phase == "submit":
                outcomes = [case.attempt(case.submit, number), case.attempt(case.submit), case.attempt(case.fetch)]
            else:
                outcomes = [case.attempt(case.submit), case.attempt(case.fetch, number), case.attempt(case.fetch)]
            wrong = case.verify()
            if "failed" in outcomes or "killed" not in outcomes:
                wrong.append(f"attempts ended {outcomes}")
            faults += bool(wrong)
            print(json.dumps({"phase": phase, "number": number, "point": point, "outcomes": outcomes, "wrong": wrong}), flush=True)
    return faults


def main(run: Callable[[sa.Engine, RemoteControl, Path], int] | None = None) -> int:
    """Set up the database that the arguments name, and ``run`` all cases in it; by default those of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="SQLAlchemy URL of an empty database")
    parser.add_argument("--airflow-uri", required=True, help="the same as an Airflow connection")
    parser.add_argument("--simulator", required=True, help="base URL of a simulator with 2,700 and 100 tokens a request")
    parser.add_argument("--primed", action="store_true", help="submit with prime_cache")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    os.environ["AIRFLOW_CONN_ANTHROPIC_DEFAULT"] = anthropic_connection(args.simulator)
    os.environ["AIRFLOW_CONN_WAREHOUSE"] = args.airflow_uri
    os.environ["AIRFLOW__BATCHKIT__ABSENCE_SECONDS"] = str(ABSENCE_S)
    engine = sa.create_engine(args.url, poolclass=sa.pool.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT)")
        for i in range(ROWS):
            connection.exec_driver_sql(f"INSERT INTO products VALUES ({i}, 'product {i}')")
    with tempfile.TemporaryDirectory() as folder:
        simulator = RemoteControl(args.simulator)
        # one count is as good as ten here
        checks._SAMPLES = 1
        # everything is imported once here, so that a fork starts at once
        warm = Case("warm", engine, simulator, Path(folder))
        warm.submit()
        warm.fetch()
        # what is there by now is never looked at again by a fork's collector, which would copy its pages
        gc.collect()
        gc.freeze()
        cases = partial(run_all, primed=args.primed) if run is None else run
        return min(cases(engine, simulator, Path(folder)), 100)


if __name__ == "__main__":
    sys.exit(main())

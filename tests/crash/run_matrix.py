"""The kill matrix of ``RunBatchOperator``: killed at every write and around every request of both of its rounds, then retried.

Two of the rows expire in the first round and are answered in the second. After each case the books are compared: the simulator has
accepted every row once and the two once more, the table has each answer, and the ledger's bill is that of the answers.

Run as a program by the tests, with the arguments of :mod:`tests.crash.matrix`.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from airflow_provider_batchkit.simulator import answer_for
from airflow_provider_batchkit.simulator.process import RemoteControl
from tests.crash.matrix import ROWS, SETTLE_S, Case, main

#: rows that expire the first time that they are asked
LATE = frozenset({1, 4})
#: picodollars of an answer: 2,700 and 100 tokens of claude-opus-4-8 at batch prices
ANSWER_PICO = 8_000_000_000


class RunCase(Case):
    """One task, under a run id and a table of its own."""

    def run(self) -> None:
        from airflow_provider_batchkit.operators.batch import RunBatchOperator

        late = ", ".join(map(str, sorted(LATE)))
        make = partial(
            RunBatchOperator,
            task_id="run",
            sql=f"SELECT id, name, CASE WHEN id IN ({late}) THEN '[[sim:expired-once]]' ELSE '' END AS late FROM products ORDER BY id",
            key="id",
            prompt=f"{self.name} {{{{ row.name }}}}{{{{ row.late }}}}",
            model="claude-opus-4-8",
            max_tokens=100,
            sql_conn_id="warehouse",
            table=self.table,
            settle_seconds=SETTLE_S,
            max_rounds=2,
        )
        self._perform(make)

    def verify(self) -> list[str]:
        wrong = []
        now = self._simulator.stats()
        asked = now["requests_accepted"] - self._before["requests_accepted"]
        if asked != ROWS + len(LATE):
            wrong.append(f"{asked} requests accepted for {ROWS} rows, {len(LATE)} of them asked twice")
        job = f"SELECT job_id FROM batchkit_job WHERE run_id = '{self.name}'"
        with self._engine.connect() as connection:
            rows = connection.exec_driver_sql(f"SELECT id, response FROM {self.table} ORDER BY id").fetchall()
            batches = connection.exec_driver_sql(
                f"SELECT round, requests, state, batch_cost_picousd FROM batchkit_batch WHERE job_id IN ({job}) ORDER BY shard"
            ).fetchall()
            requests = connection.exec_driver_sql(
                f"SELECT status, batch_cost_picousd FROM batchkit_request WHERE job_id IN ({job})"
            ).fetchall()
        expected = [(i, answer_for(f"{self.name} product {i}" + "[[sim:expired-once]]" * (i in LATE))) for i in range(ROWS)]
        if [tuple(row) for row in rows] != expected:
            wrong.append(f"the table holds {rows}")
        landed = [tuple(row) for row in batches if row.state == "landed"]
        if landed != [(1, ROWS, "landed", (ROWS - len(LATE)) * ANSWER_PICO), (2, len(LATE), "landed", len(LATE) * ANSWER_PICO)]:
            wrong.append(f"landed {landed}")
        if {row.state for row in batches} - {"landed", "void", "rejected"} or [tuple(r) for r in requests] != [
            ("succeeded", ANSWER_PICO)
        ] * ROWS:
            wrong.append(f"batches {batches}, requests {requests}")
        return wrong


def run(engine: sa.Engine, simulator: RemoteControl, folder: Path) -> int:
    """All cases; prints a JSON line each. Gives the number of cases with a fault."""
    rehearsal = RunCase("rehearsal", engine, simulator, folder)
    assert rehearsal.attempt(rehearsal.run) == "done"
    assert rehearsal.verify() == []
    faults = 0
    for number, point in enumerate(rehearsal.points.read_text().splitlines(), 1):
        case = RunCase(f"run_{number}", engine, simulator, folder)
        outcomes = [case.attempt(case.run, number), case.attempt(case.run)]
        wrong = case.verify()
        if outcomes != ["killed", "done"]:
            wrong.append(f"attempts ended {outcomes}")
        faults += bool(wrong)
        print(json.dumps({"phase": "run", "number": number, "point": point, "outcomes": outcomes, "wrong": wrong}), flush=True)
    return faults


if __name__ == "__main__":
    sys.exit(main(run))

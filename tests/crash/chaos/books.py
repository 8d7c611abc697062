"""The books: what was asked, what the simulator accepted and billed, what the result tables hold, and what the ledger says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from airflow_provider_batchkit.model import CostTally
from airflow_provider_batchkit.simulator import SimulatorProcess, answer_for
from tests.crash.chaos.dag import DAG_ID, MODEL, ROWS_PER_RUN, TABLES, question
from tests.crash.chaos.report import Doubts, Outcome
from tests.crash.chaos.weather import FOREIGN_PREFIX
from tests.e2e.harness import AirflowStandalone

#: picodollars a token of MODEL at batch prices: $2.50 and $12.50 per million
PICO_PER_INPUT_TOKEN, PICO_PER_OUTPUT_TOKEN = 2_500_000, 12_500_000
#: states in which a batch may be left when every run has succeeded
AT_REST = frozenset({"landed", "void", "rejected"})

#: The engine's words in a task's log. What stands before them in the line names the row, and nothing else that differs between attempts.
PROVED = "was accepted, as its results prove"
VOID = "was never accepted"
WAITED = "waits for"


class Books:
    """Everybody's account of the same run."""

    def __init__(self, airflow: AirflowStandalone, sim: SimulatorProcess, warehouse: sa.Engine, outcome: Outcome, runs: list[str]) -> None:
        self._airflow = airflow
        self._sim = sim
        self._warehouse = warehouse
        self._outcome = outcome
        self._runs = runs
        self._stats = sim.stats()
        ours = [batch for batch in self._stats["batches"] if not batch["first_custom_id"].startswith(FOREIGN_PREFIX)]
        #: batch id → what the simulator says of it, and the requests in it
        self._ours: dict[str, dict[str, Any]] = {batch["id"]: batch for batch in ours}
        self._asked_in = {batch_id: sim.custom_ids(batch_id) for batch_id in self._ours}
        self._batches = self._rows("SELECT * FROM batchkit_batch ORDER BY job_id, shard")

    def compare(self) -> None:
        """Fill the outcome's figures and note every violation."""
        out = self._outcome
        out.runs = len(self._runs)
        out.asked = out.runs * ROWS_PER_RUN * len(TABLES)
        out.attempts = sum(task["try_number"] for run_id in self._runs for task in self._airflow.task_instances(DAG_ID, run_id))
        out.batches, out.foreign = len(self._ours), len(self._stats["batches"]) - len(self._ours)
        out.accepted = sum(batch["size"] for batch in self._ours.values())
        out.states = Counter(row["state"] for row in self._batches)
        out.doubts = self._doubts()
        self._check_paid_once()
        for table in TABLES:
            self._check_answers(table)
        self._check_batches()
        self._check_bill()

    # --- the settling -------------------------------------------------------------------------------------------------------------

    def _doubts(self) -> Doubts:
        """By the ledger where it can tell, else by the logs, of which a killed worker's last lines may be missing."""
        logged = {words: self._rows_named_before(words) for words in (PROVED, VOID, WAITED)}
        doubted = [row for row in self._batches if row.get("doubt_at") is not None]
        void = sum(row["state"] == "void" for row in self._batches)
        total = max(len(doubted), len(logged[PROVED]) + void)
        return Doubts(total, len(logged[PROVED]), void, len(logged[WAITED]))

    def _rows_named_before(self, words: str) -> set[str]:
        """What stands before these words in the task logs, each once."""
        return {event.partition(words)[0] for event in self._events(words)}

    def _events(self, words: str) -> Iterator[str]:
        for log in (self._airflow.home / "logs").rglob("attempt=*.log*"):
            yield from _events(log, words)

    # --- paid once ----------------------------------------------------------------------------------------------------------------

    def _check_paid_once(self) -> None:
        out = self._outcome
        batches_of: dict[str, list[str]] = {}
        for batch_id, custom_ids in self._asked_in.items():
            for custom_id in custom_ids:
                batches_of.setdefault(custom_id, []).append(batch_id)
        out.duplicates = sum(len(ids) - 1 for ids in batches_of.values())
        if out.accepted != out.asked:
            out.violations.append(f"{out.accepted} requests were accepted for {out.asked} rows")
        twice = {tuple(ids): custom_id for custom_id, ids in batches_of.items() if len(ids) > 1}
        for ids, custom_id in sorted(twice.items()):
            when = [(batch_id, self._ours[batch_id]["created_at"]) for batch_id in ids]
            jobs = {row["job_id"] for row in self._batches if custom_id.startswith(row["job_id"])}
            out.violations.append(f"{custom_id} was paid in {when}; {self._told(jobs)}")

    # --- the right answer in the right place ---------------------------------------------------------------------------------------

    def _check_answers(self, table: str) -> None:
        out = self._outcome
        names = {row["sku"]: row["name"] for row in self._rows("SELECT sku, name FROM products WHERE lot < :lots", lots=len(self._runs))}
        landed: dict[str, list[dict[str, Any]]] = {}
        for row in self._rows(f"SELECT sku, response, batch_id FROM {table}") if self._has(table) else []:
            landed.setdefault(row["sku"], []).append(row)
        lost = [sku for sku in names if sku not in landed]
        out.lost += len(lost)
        self._note(f"of {table} have no answer", lost)
        self._note(f"of {table} have several answers", [sku for sku, rows in landed.items() if len(rows) > 1])
        self._note(f"of {table} were never asked", sorted(landed.keys() - names.keys()))
        question_of = {answer_for(question(other, name)): (other, sku) for other in TABLES for sku, name in names.items()}
        wrong = {}
        for sku, name in names.items():
            for row in landed.get(sku, []):
                if row["response"] != answer_for(question(table, name)):
                    wrong[sku] = f"of {row['batch_id']} {question_of.get(row['response'], row['response'])}"
        out.wrong += len(wrong)
        self._note(f"of {table} hold the answer to another question", [f"{sku}: {what}" for sku, what in wrong.items()])

    def _note(self, what: str, rows: list[str]) -> None:
        if rows:
            self._outcome.violations.append(f"{len(rows)} rows {what}: {rows[:10]}")

    # --- the ledger ---------------------------------------------------------------------------------------------------------------

    def _check_batches(self) -> None:
        out = self._outcome
        restless = {row["job_id"] for row in self._batches if row["state"] not in AT_REST}
        if restless:
            out.violations.append(f"the ledger has batches that neither landed nor came to nothing; {self._told(restless)}")
        for row in self._batches:
            # a custom_id begins with the id of the job that asks it
            strange = [c for c in self._asked_in.get(row["batch_id"], []) if not c.startswith(row["job_id"] + "-")]
            if row["state"] in ("submitted", "prepared", "landed") and (strange or row["batch_id"] not in self._ours):
                out.violations.append(f"{row['batch_id']} is another job's, it asks {strange[:2]}; {self._told({row['job_id']})}")
        claimed = Counter(row["batch_id"] for row in self._batches if row["batch_id"] is not None and row["state"] == "landed")
        unclaimed = sorted(self._ours.keys() - claimed.keys())
        if unclaimed:
            out.violations.append(f"{len(unclaimed)} paid batches have not landed: {unclaimed[:10]}")
        pending = self._rows("SELECT status, COUNT(*) AS n FROM batchkit_request WHERE status <> 'succeeded' GROUP BY status")
        if pending:
            out.violations.append(f"the ledger has requests that did not succeed: {pending}")

    def _check_bill(self) -> None:
        tallies = [CostTally.from_json(json.loads(row["tally"])) for row in self._batches if row["tally"]]
        bill = self._stats["bill"].get(MODEL, {"requests": 0, "input_tokens": 0, "output_tokens": 0})
        pico = bill["input_tokens"] * PICO_PER_INPUT_TOKEN + bill["output_tokens"] * PICO_PER_OUTPUT_TOKEN
        for what, ours, theirs in (
            ("input tokens", sum(t.input_tokens for t in tallies), bill["input_tokens"]),
            ("output tokens", sum(t.output_tokens for t in tallies), bill["output_tokens"]),
            ("picodollars by batch", sum(row["batch_cost_picousd"] or 0 for row in self._batches), pico),
            ("picodollars by request", self._rows("SELECT SUM(batch_cost_picousd) AS n FROM batchkit_request")[0]["n"], pico),
            ("picodollars in the tallies", sum(int(t.batch_cost_usd * 10**12) for t in tallies if t.batch_cost_usd is not None), pico),
        ):
            if ours != theirs:
                self._outcome.violations.append(f"the ledger has {ours} {what}, the simulator billed {theirs}")

    def _told(self, jobs: set[str]) -> str:
        """What the ledger says of these jobs."""
        lines = [f"  {row}" for row in self._rows("SELECT job_id, run_id, task_id, lease FROM batchkit_job") if row["job_id"] in jobs]
        empty = (None, "", 0)
        lines += [f"  { {k: str(v) for k, v in row.items() if v not in empty} }" for row in self._batches if row["job_id"] in jobs]
        return "in the ledger:\n" + "\n".join(lines)

    def _has(self, table: str) -> bool:
        return sa.inspect(self._warehouse).has_table(table)

    def _rows(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        with self._warehouse.connect() as connection:
            return [dict(row) for row in connection.execute(sa.text(sql), values).mappings()]


def _events(log: Path, words: str) -> Iterator[str]:
    """The events of a log, a JSON object on each line, that have these words."""
    for line in log.read_text(errors="replace").splitlines():
        if words in line:
            try:
                yield str(json.loads(line)["event"])
            except (ValueError, KeyError, TypeError):
                yield line

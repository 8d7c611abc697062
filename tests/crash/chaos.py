"""The randomised crash run: a real Airflow works through DAG runs while its workers and its triggerer are killed at random moments.

``python -m tests.crash.chaos --seed 1 --kills 100 --database postgres``

Runs of submit → wait → fetch go on, several at a time. Meanwhile SIGKILL hits a task process, its supervisor (the task goes on as an
orphan beside its own retry), both at once, or the triggerer; the simulator cuts connections and refuses calls; finished runs are cleared.
Then it stops, every run has to succeed, and four sets of books are compared: the rows asked, the simulator's, the result table, the
ledger. The seed decides what is killed, when, and how; the machine's load decides what that hits, so a seed repeats a storm and not its
every lightning.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import sqlalchemy as sa

from airflow_provider_batchkit.model import CostTally
from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings, answer_for
from tests.connections import anthropic_connection
from tests.databases import Database, postgres_database, running_postgres, sqlite_database
from tests.e2e.harness import AirflowStandalone

DAG_ID = "chaos"
MODEL = "claude-opus-4-8"
#: picodollars a token of MODEL at batch prices: $2.50 and $12.50 per million
PICO_PER_INPUT_TOKEN, PICO_PER_OUTPUT_TOKEN = 2_500_000, 12_500_000
ROWS_PER_RUN = 40
ROWS_PER_BATCH = 10
RUNS_AT_ONCE = 4
#: how long the API takes to answer a POST that it has accepted, and to send a line of results: room for a kill in between
POST_SECONDS, LINE_SECONDS = 0.4, 0.02
#: for one run to end after the last kill
RUN_SECONDS = 300
#: without anything to kill for so long, Airflow itself is stuck
IDLE_SECONDS = 120

DAG_FILE = f'''
from datetime import timedelta

from airflow.sdk import DAG

from airflow_provider_batchkit.operators.batch import FetchBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor

with DAG(
    "{DAG_ID}", schedule=None, max_active_runs={RUNS_AT_ONCE}, default_args={{"retries": 50, "retry_delay": timedelta(seconds=1)}}
):
    submit = SubmitBatchOperator(
        task_id="submit",
        sql="SELECT sku, name FROM products WHERE lot = {{{{ dag_run.conf['lot'] }}}}",
        key="sku",
        prompt="Describe {{{{ row.name }}}}",
        model="{MODEL}",
        max_tokens=100,
        max_requests_per_batch={ROWS_PER_BATCH},
        settle_seconds=3,
        sql_conn_id="warehouse",
    )
    wait = BatchSensor(task_id="wait", batch_id=submit.output, poke_interval=1, timeout=3600)
    fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse")
    submit >> wait >> fetch
'''

#: what every task imports, once in the scheduler: a forked task then begins its work in a fraction of a second
LOCAL_SETTINGS = """
import sys

if "scheduler" in sys.argv:
    import airflow.providers.anthropic.hooks.anthropic
    import airflow.providers.postgres.hooks.postgres
    import airflow.providers.sqlite.hooks.sqlite
    import airflow_provider_batchkit.jobs
    import airflow_provider_batchkit.landing
    import airflow_provider_batchkit.operators.batch
    import airflow_provider_batchkit.sensors.batch
    import airflow_provider_batchkit.sources
    import airflow_provider_batchkit.triggers.batch
"""

AIRFLOW_SETTINGS = {
    "CORE__PARALLELISM": 6,
    # a task whose supervisor is dead is only known by its silence
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": 2,
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": 10,
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": 2,
    "SCHEDULER__TASK_QUEUED_TIMEOUT": 30,
    "SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": 5,
    "WORKERS__MIN_HEARTBEAT_INTERVAL": 1,
    # so is a triggerer
    "TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": 6,
    # the one DAG never changes
    "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": 600,
}

#: what is killed of a worker, and how often in proportion
WORKER_KILLS = {"task": 76, "supervisor": 10, "both": 14}
#: what becomes of a try: it is let through, killed while it imports and renders, or killed once it talks to the API
FATES = {"spared": 35, "early": 15, "talking": 50}
EARLY_SECONDS, TALKING_SECONDS = (0.2, 3.0), (0.0, 2.5)
#: kills of workers between two of the triggerer: it takes about 8 seconds to start and must also get to do something
WORKERS_A_TRIGGERER = (4, 12)
LOOK_SECONDS = 0.1

FAULTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("cut_before_accept", {}),
    ("cut_after_accept", {}),
    ("cut_after_accept", {"reset": True}),
    ("status", {"status": 429, "retry_after": 1.0}),
    ("status", {"status": 529}),
    ("status", {"status": 500}),
    ("status_after_accept", {"status": 500}),
    ("cut_results", {"line": 4}),
    ("cut_results", {"line": 7, "clean": True}),
    ("status", {"endpoint": "results", "status": 500}),
    ("status", {"endpoint": "retrieve", "status": 529}),
    ("status", {"endpoint": "list", "status": 500}),
)

#: in the log of an attempt that found a shard of which nobody knows whether it was sent
_SETTLING = b"An earlier attempt may have sent"


@dataclass(frozen=True, slots=True)
class Worker:
    """A process of the LocalExecutor that supervises a task right now, and the task's own process."""

    supervisor: psutil.Process
    task: psutil.Process
    #: the id of the task instance's try
    try_id: str

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - float(self.task.create_time()))

    def talks_to(self, port: int) -> bool:
        """Whether the task has a connection to a server on that port, or has just had one."""
        return any(c.raddr and c.raddr.port == port for c in self.task.net_connections("tcp"))

    def kill(self, what: str) -> None:
        """SIGKILL the ``"task"``, the ``"supervisor"`` or ``"both"``. Raises NoSuchProcess when the task has ended before that."""
        # a supervisor without a task may hold a lock on the executor's queues, which would die with it and stop the whole executor
        self.supervisor.suspend()
        try:
            if self.task.status() == psutil.STATUS_ZOMBIE:
                raise psutil.NoSuchProcess(self.task.pid)
            if what != "supervisor":
                self.task.kill()
            if what != "task":
                self.supervisor.kill()
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.supervisor.resume()


@dataclass(slots=True)
class Fate:
    """What is to become of one try of a task: ``when`` is one of FATES, ``what`` of WORKER_KILLS."""

    when: str
    what: str
    #: seconds from its start, or from its first word to the API
    after_s: float
    #: on the monotonic clock; 0 until it is known
    due: float = 0.0
    done: bool = False


class Workers:
    """The task processes below a scheduler."""

    def __init__(self, scheduler: psutil.Process) -> None:
        self._scheduler = scheduler

    def busy(self) -> list[Worker]:
        """Those whose task has begun; raises RuntimeError when the scheduler is dead."""
        if not self._scheduler.is_running() or self._scheduler.status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError("the scheduler has ended, and nobody killed it")
        found = {process.pid: process for process in self._scheduler.children(recursive=True)}
        return [worker for process in found.values() for worker in self._workers(process, found)]

    @staticmethod
    def _workers(process: psutil.Process, found: Mapping[int, psutil.Process]) -> Iterator[Worker]:
        """The worker whose task this process is, if it is one."""
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            # a task takes its own title when Airflow counts it as running; its supervisor's says LocalExecutor
            title = " ".join(process.cmdline()).strip()
            if title.startswith("airflow worker -- ") and "LocalExecutor" not in title and (above := found.get(process.ppid())):
                yield Worker(above, process, title.rpartition(" ")[2])


class Triggerer:
    """``airflow triggerer`` of our own in place of the standalone's, which nobody would start again."""

    def __init__(self, standalones: psutil.Process) -> None:
        self._environment = standalones.environ()
        _kill_family(standalones)
        self._log = (Path(self._environment["AIRFLOW_HOME"]) / "triggerer.log").open("ab")
        self._process = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._log.close()

    def restart(self) -> None:
        """SIGKILL it and all below it, and start another."""
        self._end()
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "airflow", "triggerer"],
            env=self._environment,
            cwd=self._environment["AIRFLOW_HOME"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _end(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            _kill_family(psutil.Process(self._process.pid))
        self._process.wait()


@dataclass
class Outcome:
    """What a run did, and everything that it found wrong."""

    seed: int
    database: str
    kills: Counter[str] = field(default_factory=Counter)
    #: kills of workers by the task that they worked on
    victims: Counter[str] = field(default_factory=Counter)
    faults: int = 0
    clears: int = 0
    runs: int = 0
    #: sum of the try numbers of all tasks
    attempts: int = 0
    #: shards of which a later attempt had to find out whether they had been accepted
    settled: int = 0
    #: ledger rows per state
    states: Counter[str] = field(default_factory=Counter)
    batches: int = 0
    asked: int = 0
    accepted: int = 0
    duplicates: int = 0
    lost: int = 0
    seconds: float = 0.0
    #: a sentence each
    violations: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """All figures in one line."""
        kills = ", ".join(f"{self.kills[what]} {what}" for what in (*WORKER_KILLS, "triggerer"))
        victims = ", ".join(f"{task} {count}" for task, count in sorted(self.victims.items()))
        return (
            f"seed {self.seed} on {self.database}: {self.kills.total()} kills ({kills}; of workers on {victims}), {self.faults} faults, "
            f"{self.clears} clears; {self.runs} runs, {self.attempts} attempts, {self.settled} uncertain shards settled; "
            f"{self.batches} batches ({dict(sorted(self.states.items()))} in the ledger), {self.asked} rows asked, "
            f"{self.accepted} requests accepted: {self.duplicates} duplicates, {self.lost} lost rows, "
            f"{len(self.violations)} violations; {self.seconds:.0f} s"
        )


class Chaos:
    """One randomised run against an Airflow, a simulator and a warehouse that are there already."""

    def __init__(
        self,
        airflow: AirflowStandalone,
        sim: SimulatorProcess,
        warehouse: sa.Engine,
        metadata: sa.Engine,
        outcome: Outcome,
        *,
        faults: bool,
    ) -> None:
        self.airflow = airflow
        self.sim = sim
        self.warehouse = warehouse
        self.metadata = metadata
        self.outcome = outcome
        self.faults = faults
        self.random = random.Random(outcome.seed)
        self.run_ids: list[str] = []
        #: the tries whose workers were killed
        self.killed_tries: list[str] = []
        self._fates: dict[str, Fate] = {}
        self._started = time.monotonic()

    def storm(self, kills: int) -> None:
        """Keep runs going until so many processes are killed."""
        workers = Workers(self._component("scheduler"))
        self.airflow.wait_for_dag(DAG_ID)
        idle_since = time.monotonic()
        runs_checked = 0.0
        triggerer_dies = self.random.randint(*WORKERS_A_TRIGGERER)
        with Triggerer(self._component("triggerer")) as triggerer:
            while self.outcome.kills.total() < kills:
                now = time.monotonic()
                if now > runs_checked + 2:
                    self._keep_runs_going(most=kills)
                    runs_checked = now
                if len(self.killed_tries) >= triggerer_dies:
                    triggerer_dies += self.random.randint(*WORKERS_A_TRIGGERER)
                    triggerer.restart()
                    self._after_a_kill("triggerer")
                for worker in workers.busy():
                    idle_since = now
                    if self.outcome.kills.total() < kills and self._meets_its_fate(worker):
                        self._after_a_kill(self._fates[worker.try_id].what, worker.try_id)
                if now - idle_since > IDLE_SECONDS:
                    raise TimeoutError(f"no task has run for {IDLE_SECONDS} seconds: {self._run_states()}")
                time.sleep(LOOK_SECONDS)
            self._let_all_runs_end()

    def _meets_its_fate(self, worker: Worker) -> bool:
        """Kill the worker when its time has come."""
        fate = self._fates.get(worker.try_id)
        if fate is None:
            fate = self._fates[worker.try_id] = self._draw_fate()
        if fate.when == "spared" or fate.done:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            if fate.when == "early":
                fate.due = fate.due or time.monotonic() + fate.after_s - worker.age_s
            elif not fate.due and worker.talks_to(self.sim.port):
                fate.due = time.monotonic() + fate.after_s
            if fate.due and time.monotonic() >= fate.due:
                fate.done = True
                worker.kill(fate.what)
                return True
        return False

    def _draw_fate(self) -> Fate:
        when = self.random.choices(list(FATES), list(FATES.values()))[0]
        what = self.random.choices(list(WORKER_KILLS), list(WORKER_KILLS.values()))[0]
        return Fate(when, what, self.random.uniform(*(EARLY_SECONDS if when == "early" else TALKING_SECONDS)))

    def _after_a_kill(self, what: str, try_id: str = "") -> None:
        self.outcome.kills[what] += 1
        if try_id:
            self.killed_tries.append(try_id)
        print(f"{time.monotonic() - self._started:6.1f} s  killed {what} {try_id}", flush=True)
        if self.faults and self.random.random() < 0.25:
            kind, fields = self.random.choice(FAULTS)
            self.sim.faults.add(kind, **fields)
            self.outcome.faults += 1
        if self.random.random() < 0.06:
            self._clear_a_finished_run()

    def _component(self, name: str) -> psutil.Process:
        """The standalone's own process of that name."""
        assert self.airflow._process is not None
        for child in psutil.Process(self.airflow._process.pid).children():
            words = child.cmdline()
            if name in words or f"airflow {name}" in " ".join(words):
                return child
        raise RuntimeError(f"airflow standalone has no {name}")

    def _keep_runs_going(self, *, most: int) -> None:
        states = self._run_states()
        open_runs = sum(state not in ("success", "failed") for state in states.values())
        # one more than may be active, so that no slot waits for us
        for _ in range(RUNS_AT_ONCE + 1 - open_runs):
            lot = len(self.run_ids)
            if lot >= lots_for(most):
                return
            self.run_ids.append(self.airflow.trigger_dag(DAG_ID, {"lot": lot}))

    def _run_states(self) -> dict[str, str]:
        runs: list[dict[str, Any]] = []
        while True:
            page = self._patiently("GET", f"/dags/{DAG_ID}/dagRuns", params={"limit": 100, "offset": len(runs)})["dag_runs"]
            runs += page
            if len(page) < 100:
                return {run["dag_run_id"]: run["state"] for run in runs}

    def _clear_a_finished_run(self) -> None:
        finished = [run_id for run_id, state in self._run_states().items() if state == "success"]
        if finished:
            tasks = self.random.choice((["submit", "wait", "fetch"], ["submit", "wait", "fetch"], ["fetch"]))
            with contextlib.suppress(httpx.HTTPError):
                self.airflow.clear_tasks(DAG_ID, self.random.choice(finished), tasks)
                self.outcome.clears += 1

    def _let_all_runs_end(self) -> None:
        """Without kills and faults from here on, every run has to succeed."""
        self.sim.faults.clear()
        for run_id in self.run_ids:
            try:
                state = self.airflow.wait_for_run(DAG_ID, run_id, timeout=RUN_SECONDS)
            except (TimeoutError, httpx.HTTPError) as error:
                state = f"not at its end: {error}"
            if state != "success":
                self.outcome.violations.append(f"run {run_id} is {state}: {self._last_words(run_id)}")

    def _last_words(self, run_id: str) -> str:
        """The end of the log of each task's last try that did not succeed."""
        words = []
        for task in self.airflow.task_instances(DAG_ID, run_id):
            if task["state"] != "success":
                log = self.airflow.task_log(DAG_ID, run_id, task["task_id"], max(1, task["try_number"]))
                words.append(f"{task['task_id']} try {task['try_number']} is {task['state']}:\n" + "\n".join(log.splitlines()[-15:]))
        return "\n".join(words)

    def _patiently(self, method: str, path: str, **options: Any) -> Any:
        """A REST call that a busy API server may let down once or twice."""
        for attempt in range(5):
            try:
                return self.airflow.request(method, path, **options)
            except httpx.HTTPError:
                if attempt == 4:
                    raise
                time.sleep(1)
        raise AssertionError("unreachable")

    # the books

    def compare_books(self) -> None:
        """Fill the outcome's figures and note every violation."""
        out = self.outcome
        out.runs = len(self.run_ids)
        out.asked = out.runs * ROWS_PER_RUN
        for run_id in self.run_ids:
            out.attempts += sum(task["try_number"] for task in self.airflow.task_instances(DAG_ID, run_id))
        out.victims = self._victims()
        out.settled = sum(log.read_bytes().count(_SETTLING) for log in (self.airflow.home / "logs").rglob("attempt=*.log"))
        stats = self.sim.stats()
        out.batches, out.accepted = stats["batches_accepted"], stats["requests_accepted"]
        self._check_paid_once(stats)
        self._check_answers()
        self._check_ledger(stats)

    def _victims(self) -> Counter[str]:
        statement = (
            "SELECT CAST(id AS TEXT), task_id FROM task_instance "
            "UNION SELECT CAST(task_instance_id AS TEXT), task_id FROM task_instance_history"
        )
        with self.metadata.connect() as connection:
            task_of = {str(try_id).replace("-", ""): task for try_id, task in connection.exec_driver_sql(statement)}
        return Counter(task_of.get(try_id.replace("-", ""), "?") for try_id in self.killed_tries)

    def _check_paid_once(self, stats: dict[str, Any]) -> None:
        out = self.outcome
        batches_of: dict[str, list[str]] = {}
        for batch in stats["batches"]:
            for custom_id in self.sim.custom_ids(batch["id"]):
                batches_of.setdefault(custom_id, []).append(batch["id"])
        out.duplicates = sum(len(ids) - 1 for ids in batches_of.values())
        if out.accepted != out.asked:
            out.violations.append(f"{out.accepted} requests were accepted for {out.asked} rows")
        twice = {tuple(ids) for ids in batches_of.values() if len(ids) > 1}
        created = {batch["id"]: batch["created_at"] for batch in stats["batches"]}
        for ids in sorted(twice):
            custom_id = next(c for c, found in batches_of.items() if tuple(found) == ids)
            jobs = self._rows("SELECT DISTINCT job_id FROM batchkit_request WHERE custom_id = :c", c=custom_id)
            where = " OR ".join(f"job_id = '{row['job_id']}'" for row in jobs) or "1 = 0"
            ledger = self._rows(f"SELECT * FROM batchkit_batch WHERE {where} ORDER BY job_id, shard")
            runs = self._rows(f"SELECT job_id, run_id, lease FROM batchkit_job WHERE {where}")
            out.violations.append(
                f"{custom_id} was paid in {[(i, created[i]) for i in ids]}; job {runs}; its batches in the ledger:\n"
                + "\n".join(f"  {row}" for row in ledger)
            )

    def _check_answers(self) -> None:
        out = self.outcome
        lots = len(self.run_ids)
        asked = {row["sku"]: row["name"] for row in self._rows("SELECT sku, name FROM products WHERE lot < :lots", lots=lots)}
        landed: dict[str, list[str]] = {}
        for row in self._rows("SELECT sku, response FROM answers"):
            landed.setdefault(row["sku"], []).append(row["response"])
        lost = [sku for sku in asked if sku not in landed]
        wrong = [sku for sku, name in asked.items() if sku in landed and set(landed[sku]) != {answer_for(f"Describe {name}")}]
        doubled = [sku for sku, answers in landed.items() if len(answers) > 1]
        out.lost = len(lost)
        for what, skus in (
            ("have no answer", lost),
            ("have a wrong answer", wrong),
            ("have several answers", doubled),
            ("were never asked", sorted(landed.keys() - asked.keys())),
        ):
            if skus:
                out.violations.append(f"{len(skus)} rows {what}: {skus[:10]}")

    def _check_ledger(self, stats: dict[str, Any]) -> None:
        out = self.outcome
        batches = self._rows("SELECT * FROM batchkit_batch")
        out.states = Counter(row["state"] for row in batches)
        open_rows = [row for row in batches if row["state"] in ("sending", "submitted")]
        if open_rows:
            out.violations.append(
                "the ledger has batches that neither landed nor came to nothing:\n" + "\n".join(f"  {r}" for r in open_rows)
            )
        pending = self._rows("SELECT status, COUNT(*) AS n FROM batchkit_request WHERE status <> 'succeeded' GROUP BY status")
        if pending:
            out.violations.append(f"the ledger has requests that did not succeed: {pending}")
        tallies = [CostTally.from_json(json.loads(row["tally"])) for row in batches if row["tally"]]
        bill = stats["bill"].get(MODEL, {"requests": 0, "input_tokens": 0, "output_tokens": 0})
        pico = bill["input_tokens"] * PICO_PER_INPUT_TOKEN + bill["output_tokens"] * PICO_PER_OUTPUT_TOKEN
        for what, ours, theirs in (
            ("input tokens", sum(t.input_tokens for t in tallies), bill["input_tokens"]),
            ("output tokens", sum(t.output_tokens for t in tallies), bill["output_tokens"]),
            ("picodollars by batch", sum(row["batch_cost_picousd"] or 0 for row in batches), pico),
            ("picodollars by request", self._rows("SELECT SUM(batch_cost_picousd) AS n FROM batchkit_request")[0]["n"], pico),
            ("picodollars in the tallies", sum(int(t.batch_cost_usd * 10**12) for t in tallies if t.batch_cost_usd is not None), pico),
        ):
            if ours != theirs:
                out.violations.append(f"the ledger has {ours} {what}, the simulator billed {theirs}")

    def _rows(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        with self.warehouse.connect() as connection:
            return [dict(row) for row in connection.execute(sa.text(sql), values).mappings()]


def lots_for(kills: int) -> int:
    """More runs than so many kills can need."""
    return 2 * kills + 2 * RUNS_AT_ONCE


def run_chaos(*, seed: int, kills: int, database: str = "sqlite", metadata: str = "postgres", faults: bool = True) -> Outcome:
    """Start everything, kill ``kills`` processes, compare the books.

    Airflow's home stays where something was wrong; a note in ``violations`` says where.

    :param seed: decides the order of kills, pauses, faults and clears
    :param database: ``sqlite`` or ``postgres``: where the source, the results and the ledger are
    :param metadata: the same for Airflow's own database; its SQLite refuses reports under load
    """
    begun = time.monotonic()
    outcome = Outcome(seed, database)
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="batchkit-chaos-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "dags").mkdir()
        (folder / "tmp").mkdir()
        (folder / "settings").mkdir()
        (folder / "settings" / "airflow_local_settings.py").write_text(LOCAL_SETTINGS)
        (folder / "dags" / "chaos.py").write_text(DAG_FILE)
        server = stack.enter_context(running_postgres()) if "postgres" in (database, metadata) else ""

        def fresh(kind: str, name: str) -> Database:
            return stack.enter_context(postgres_database(server)) if kind == "postgres" else sqlite_database(folder / name)

        warehouse, airflows_own = fresh(database, "warehouse.db"), fresh(metadata, "airflow.db")
        _fill_products(warehouse.engine(), lots_for(kills))
        settings = SimulatorSettings(clock="seconds:3", seed=seed, input_tokens=2_000, output_tokens=50)
        sim = stack.enter_context(SimulatorProcess(settings))
        sim.faults.add("late", seconds=POST_SECONDS, times=None)
        sim.faults.add("trickle", seconds=LINE_SECONDS, times=None)
        env = {
            **{f"AIRFLOW__{name}": str(value) for name, value in AIRFLOW_SETTINGS.items()},
            "PYTHONPATH": str(folder / "settings"),
            "TMPDIR": str(folder / "tmp"),  # a killed task leaves its temporary files behind
            "AIRFLOW_CONN_WAREHOUSE": warehouse.airflow_uri,
            "AIRFLOW_CONN_ANTHROPIC_DEFAULT": anthropic_connection(sim.base_url),
        }
        airflow = stack.enter_context(AirflowStandalone(folder / "dags", airflows_own, env, keep_home=True))
        chaos = Chaos(airflow, sim, warehouse.engine(), airflows_own.engine(), outcome, faults=faults)
        chaos.storm(kills)
        chaos.compare_books()
        if outcome.violations:
            if database == "sqlite":
                shutil.copy(folder / "warehouse.db", airflow.home)
            outcome.violations.append(f"Airflow's logs, and a warehouse on SQLite, are in {airflow.home}")
        else:
            stack.callback(shutil.rmtree, airflow.home, ignore_errors=True)
    outcome.seconds = time.monotonic() - begun
    if not outcome.violations:
        shutil.rmtree(airflow.home, ignore_errors=True)  # what was written while it ended
    return outcome


def _fill_products(engine: sa.Engine, lots: int) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE products (sku VARCHAR(20) PRIMARY KEY, name TEXT, lot INTEGER)")
        rows = [{"s": f"S{lot}-{i}", "n": f"thing {i} of lot {lot}", "l": lot} for lot in range(lots) for i in range(ROWS_PER_RUN)]
        connection.execute(sa.text("INSERT INTO products VALUES (:s, :n, :l)"), rows)


def _kill_family(process: psutil.Process) -> None:
    """SIGKILL a process and all below it, which it cannot replace in between because it is stopped first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        os.kill(process.pid, signal.SIGSTOP)
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def main() -> int:
    """The command line; exit code 1 where the books disagree."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite", help="of the rows and the ledger")
    parser.add_argument("--metadata", choices=("sqlite", "postgres"), default="postgres", help="of Airflow itself")
    parser.add_argument("--no-faults", action="store_true", help="kills only, the simulator answers every call")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an end in which everything that was started is ended
    outcome = run_chaos(seed=given.seed, kills=given.kills, database=given.database, metadata=given.metadata, faults=not given.no_faults)
    for violation in outcome.violations:
        print(f"VIOLATION {violation}")
    print(outcome.line)
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())

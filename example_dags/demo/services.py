"""A real Airflow of the demo's own: API server, scheduler, DAG processor and triggerer, each a process with a log.

The API server comes first. Tasks report to it, so that a run which starts before it answers fails its first tries.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil

from . import DAG_ID
from .catalog import change_products

#: products that change between two runs
CHANGED_PRODUCTS = 2_000
#: examples that run once by themselves: some requests of the first one fail, and the second one has a budget
BESIDE = ("csv_to_table", "one_task_run")
_ASKED_JOBS = (
    "SELECT COUNT(DISTINCT job_id) FROM batchkit_batch JOIN batchkit_job USING (job_id)"
    " WHERE dag_id = ? AND state IN ('submitted', 'prepared', 'landed')"
)
#: seconds in which the parts may end by themselves: Ctrl-C is to end everything within five
_STOP_SECONDS = 3.0


_OPEN_JOBS = (
    "SELECT DISTINCT job_id, dag_id, run_id FROM batchkit_job JOIN batchkit_batch USING (job_id)"
    " WHERE state IN ('sending', 'submitted', 'prepared')"
)
#: the ledger's tables with rows of single jobs
_OF_JOBS = (
    *("batchkit_journal", "batchkit_succeeded", "batchkit_failed", "batchkit_bill", "batchkit_budget_hold", "batchkit_batch"),
    "batchkit_job",
)


def serve(home: Path, catalog: Path, command: str) -> int:
    """Run all of it until Ctrl-C. After each run of the DAG a part of the catalog changes, so that the next one has something to ask.

    :param command: what shows the same in another terminal
    """
    api, worker_logs, trigger_logs = _free_ports(3)
    url = f"http://127.0.0.1:{api}"
    os.environ.update(
        {
            # everybody is an admin here: nobody else's machine is to reach it
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(api),
            "AIRFLOW__API__BASE_URL": url,
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(worker_logs),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(trigger_logs),
        }
    )
    parts: dict[str, subprocess.Popen[bytes]] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        set_aside(home, catalog)
        # without an earlier demo, the first run asks for everything anyway
        asked = _change(catalog)
        _start(home, parts, "api-server")
        while _running(home, parts) and not _health(url):
            time.sleep(1)
        _start(home, parts, "scheduler", "dag-processor", "triggerer")
        while _running(home, parts) and not _all_healthy(_health(url)):
            time.sleep(1)
        if _running(home, parts):
            print(f"Airflow is up: {url}/dags/{DAG_ID}  (logs: {os.path.relpath(home)}/*.log)")
            print("Trigger the DAG there. A batch takes a minute, and the page Batches shows it run. Ctrl-C ends everything.")
            print(f"Two more examples run once by themselves: {BESIDE[0]}, some of whose rows fail, and {BESIDE[1]}, which has a budget.")
            print(f"The same in another terminal:  {command}\n", flush=True)
        begun = set[str]()
        while _running(home, parts):
            # one after the other, because Airflow's own database is SQLite here, which takes one writer at a time
            waiting = next((dag_id for dag_id in BESIDE if not asked_jobs(catalog, dag_id)), None)
            if waiting is not None and waiting not in begun and _trigger(url, waiting):
                begun.add(waiting)
            if asked_jobs(catalog) != asked:
                asked = _change(catalog)
                print(f"A run has asked. {CHANGED_PRODUCTS:,} products have changed since: the next run asks those.", flush=True)
            time.sleep(1)
        return 1
    except KeyboardInterrupt:
        print("\nEnding Airflow ...", flush=True)
        return 0
    finally:
        _end(list(parts.values()))
        print("Ended.")


def asked_jobs(catalog: Path, dag_id: str = DAG_ID) -> int:
    """How many jobs of a DAG have read their source and sent what they ask."""
    with contextlib.closing(sqlite3.connect(f"file:{catalog}?mode=ro", uri=True, timeout=5)) as connection:
        try:
            return int(connection.execute(_ASKED_JOBS, (dag_id,)).fetchone()[0])
        except sqlite3.OperationalError:  # no ledger yet
            return 0


def set_aside(home: Path, catalog: Path) -> int:
    """Take away the runs whose batches an earlier simulator had when it ended, with what the ledger has of them; says so, and how many.

    Their batches ended with that simulator, as no batch of the real API does, so they would wait for nothing and then fail.
    """
    with contextlib.closing(sqlite3.connect(catalog, timeout=60)) as ledger, ledger:
        try:
            jobs = ledger.execute(_OPEN_JOBS).fetchall()
        except sqlite3.OperationalError:  # no ledger yet, but its first task may have been killed
            jobs = []
        for table in _OF_JOBS if jobs else ():
            ledger.executemany(f"DELETE FROM {table} WHERE job_id = ?", [(job_id,) for job_id, _, _ in jobs])
    with contextlib.closing(sqlite3.connect(home / "airflow.db", timeout=60)) as airflow, airflow:
        airflow.execute("PRAGMA foreign_keys = ON")  # a run's tasks go with it
        runs = airflow.execute("DELETE FROM dag_run WHERE state IN ('running', 'queued') RETURNING run_id").fetchall()
        airflow.executemany("DELETE FROM dag_run WHERE dag_id = ? AND run_id = ?", [(dag_id, run_id) for _, dag_id, run_id in jobs])
        # what the demo's run has waited with is left over; the triggerer would look for its batch, and write so into its log
        airflow.execute("UPDATE task_instance SET trigger_id = NULL")
        airflow.execute("DELETE FROM trigger")
    if jobs or runs:
        count = max(len(jobs), len(runs))
        print(
            f"When Airflow was ended, {count} {'run was' if count == 1 else 'runs were'} under way. The batches ended with the "
            "simulator; those of the real API would run on. What waited for them is taken away: press Trigger, and the next run asks again."
        )
    return len(jobs)


def _change(catalog: Path) -> int:
    """Change the next part of the catalog; the number of jobs that have asked so far."""
    asked = asked_jobs(catalog)
    change_products(catalog, CHANGED_PRODUCTS, asked)
    return asked


def _start(home: Path, parts: dict[str, subprocess.Popen[bytes]], *names: str) -> None:
    home.mkdir(parents=True, exist_ok=True)
    for name in names:
        command = [sys.executable, "-m", "airflow", name]
        with (home / f"{name}.log").open("wb") as output:
            # a session of its own, so that Ctrl-C reaches this process alone
            parts[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)  # noqa: S603 - the arguments are ours


def _running(home: Path, parts: dict[str, subprocess.Popen[bytes]]) -> bool:
    """Whether every part runs; names one that does not."""
    for name, process in parts.items():
        if process.poll() is not None:
            print(f"Airflow's {name} has ended. Its log: {os.path.relpath(home / f'{name}.log')}", file=sys.stderr)
            return False
    return True


def _health(url: str) -> dict[str, Any]:
    """What the API server says of the parts; nothing while it does not answer."""
    with contextlib.suppress(OSError, ValueError), urlopen(f"{url}/api/v2/monitor/health", timeout=5) as answer:  # noqa: S310 - our own loopback server
        health: dict[str, Any] = json.load(answer)
        return health
    return {}


def _trigger(url: str, dag_id: str) -> bool:
    """Trigger a DAG; False while Airflow cannot do it, since it has not parsed the DAG yet. A second call begins no second run."""
    body = json.dumps({"dag_run_id": "with_the_demo", "logical_date": None}).encode()
    try:
        with urlopen(f"{url}/auth/token", timeout=10) as answer:  # noqa: S310 - our own loopback server
            token = json.load(answer)["access_token"]
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        with urlopen(Request(f"{url}/api/v2/dags/{dag_id}/dagRuns", body, headers), timeout=10):  # noqa: S310 - our own loopback server
            return True
    except HTTPError as e:
        return e.code == 409  # the run is there
    except (OSError, ValueError):
        return False


def _all_healthy(health: dict[str, Any]) -> bool:
    return all((health.get(name) or {}).get("status") == "healthy" for name in ("scheduler", "dag_processor", "triggerer"))


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what runs, and kill what has not ended in time: the parts, and whatever they have started, in whichever process group."""
    family = _family(processes)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    psutil.wait_procs(family, timeout=_STOP_SECONDS)
    for one in {*family, *_family(processes)}:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _family(processes: list[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    """The processes that run, and all that descend from them."""
    found: list[psutil.Process] = []
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                found += [parent, *parent.children(recursive=True)]
    return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()

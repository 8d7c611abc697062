"""What a person does meanwhile: clears tasks, of runs that have ended and of runs in the middle."""

from __future__ import annotations

import contextlib
import random
import time
from typing import Any

import httpx

from tests.crash.chaos.dag import CHAINS, DAG_ID, RUN_TABLE
from tests.crash.chaos.report import Outcome
from tests.e2e.harness import AirflowStandalone

CLEAR_AFTER_A_KILL = 0.13
#: what is cleared, and how often in proportion
CLEARS = {"a run that has ended": 30, "a fetch that has ended": 10, "a running run": 25, "a submit alone": 20, "a run task": 15}


class Clears:
    """Clears at random moments."""

    def __init__(self, airflow: AirflowStandalone, outcome: Outcome, chance: random.Random) -> None:
        self._airflow = airflow
        self._outcome = outcome
        self._random = chance

    def after_a_kill(self) -> None:
        """Sometimes one clear."""
        if self._random.random() < CLEAR_AFTER_A_KILL:
            what = self._random.choices(list(CLEARS), list(CLEARS.values()))[0]
            with contextlib.suppress(httpx.HTTPError):
                states = run_states(self._airflow)
                ended = [run_id for run_id, state in states.items() if state == "success"]
                running = [run_id for run_id, state in states.items() if state == "running"]
                runs = ended if what.endswith("has ended") else running
                if runs:
                    self._clear(what, self._random.choice(runs))

    def _clear(self, what: str, run_id: str) -> None:
        tasks = self._tasks_for(what, run_id)
        if tasks:
            print(f"          clears {what}: {', '.join(tasks)} of {run_id}", flush=True)
            self._airflow.clear_tasks(DAG_ID, run_id, tasks)
            self._outcome.clears[what] += 1

    def _tasks_for(self, what: str, run_id: str) -> list[str]:
        table = self._random.choice(CHAINS)
        if what == "a fetch that has ended":
            return [f"fetch_{table}"]
        if what == "a run task":
            return [f"run_{RUN_TABLE}"]
        states = self._airflow.task_states(DAG_ID, run_id)
        if what == "a submit alone":
            # A clear deletes the XCom that the tasks behind it are about to read, so it makes sense only before they begin: a task that
            # has begun by then fails for good, with any operator.
            behind = (states.get(f"wait_{table}"), states.get(f"fetch_{table}"))
            return [f"submit_{table}"] if behind in ((None, None), ("deferred", None)) else []
        return list(states)


def run_states(airflow: AirflowStandalone) -> dict[str, str]:
    """Run id → state, of all runs."""
    runs: list[dict[str, Any]] = []
    while True:
        page = patiently(airflow, "GET", f"/dags/{DAG_ID}/dagRuns", params={"limit": 100, "offset": len(runs)})["dag_runs"]
        runs += page
        if len(page) < 100:
            return {run["dag_run_id"]: run["state"] for run in runs}


def patiently(airflow: AirflowStandalone, method: str, path: str, **options: Any) -> Any:
    """A REST call that a busy API server may let down once or twice."""
    for attempt in range(5):
        try:
            return airflow.request(method, path, **options)
        except httpx.HTTPError:
            if attempt == 4:
                raise
            time.sleep(1)
    raise AssertionError("unreachable")

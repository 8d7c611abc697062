"""``make demo`` and then ``make airflow``, with a small catalog: what somebody finds there who opens Airflow for the first time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from example_dags.demo import DAG_ID
from example_dags.demo.services import BESIDE

ROOT = Path(__file__).resolve().parents[2]
ROWS = 40


def command(what: str) -> list[str]:
    return [sys.executable, "-m", "example_dags.demo", what, "--rows", str(ROWS)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder and the environment of a ``make airflow`` that runs after ``make demo``; what it prints is in ``stdout``."""
    folder = tmp_path_factory.mktemp("demo")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW_", "ANTHROPIC_"))}
    env |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    subprocess.run(command("demo"), cwd=folder, env=env, check=True, capture_output=True, timeout=300)
    output = folder / "stdout"
    with output.open("wb") as file:
        process = subprocess.Popen(command("airflow"), cwd=folder, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while "The same in another terminal: " not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(1)
        yield folder, env
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def airflow(demo: tuple[Path, dict[str, str]]) -> Iterator[httpx.Client]:
    """A client of the demo's Airflow."""
    url = (demo[0] / "stdout").read_text().partition("Airflow is up: ")[2].partition("/dags/")[0]
    token = httpx.get(f"{url}/auth/token").json()["access_token"]
    with httpx.Client(base_url=f"{url}/api/v2", headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
        yield client


def test_the_commands_see_the_demo_from_another_terminal(demo: tuple[Path, dict[str, str]]) -> None:
    """What is printed can be typed as it stands; the ledger need not be named."""
    folder, env = demo
    typed = (folder / "stdout").read_text().partition("The same in another terminal: ")[2].partition("\n")[0].strip()
    assert typed.endswith(" batches --open")
    everything = typed.removesuffix(" batches --open") + " batches --output json"
    said = subprocess.run(["bash", "-c", everything], cwd=folder, env=env, check=True, capture_output=True, text=True, timeout=120)
    assert ROWS in [one["requests"] for one in json.loads(said.stdout)]


def runs(airflow: httpx.Client, dag_id: str = DAG_ID) -> dict[str, dict[str, Any]]:
    """Run id → run of a DAG, by default the demo's."""
    found = airflow.get(f"/dags/{dag_id}/dagRuns").json()["dag_runs"]
    return {run["dag_run_id"]: run for run in found}


def test_the_demos_run_is_there_with_its_log_and_a_later_run_asks_what_has_changed(airflow: httpx.Client) -> None:
    """No login, nothing red; the log has the bound; the month's run, which nobody triggered, asks all that has changed since, once."""
    (demo,) = (run_id for run_id, run in runs(airflow).items() if run["run_type"] == "manual")
    assert runs(airflow)[demo]["state"] == "success"
    log = airflow.get(f"/dags/{DAG_ID}/dagRuns/{demo}/taskInstances/submit/logs/1", headers={"accept": "application/json"}).text
    assert f"Estimate for {ROWS} requests: expected $0.34, at most $0.4556" in log

    deadline = time.monotonic() + 300
    while [run["state"] for run in runs(airflow).values()] != ["success", "success"]:
        assert "failed" not in {run["state"] for run in runs(airflow).values()}
        assert time.monotonic() < deadline, runs(airflow)
        time.sleep(2)
    (scheduled,) = (run_id for run_id, run in runs(airflow).items() if run["run_type"] == "scheduled")
    tasks = airflow.get(f"/dags/{DAG_ID}/dagRuns/{scheduled}/taskInstances").json()["task_instances"]
    assert {task["task_id"]: (task["state"], task["try_number"]) for task in tasks} == dict.fromkeys(
        ("submit", "wait", "fetch"), ("success", 1)
    )
    log = airflow.get(f"/dags/{DAG_ID}/dagRuns/{demo}/taskInstances/wait/logs/1", headers={"accept": "application/json"}).text
    assert "1 of 1 batches ended" in log and "WARNING" not in log.upper() and "killed" not in log
    summary = airflow.get(f"/dags/{DAG_ID}/dagRuns/{scheduled}/taskInstances/fetch/xcomEntries/return_value").json()["value"]
    assert (summary["rows"], summary["cost_tally"]["batch_cost_usd"]) == (ROWS, "0.32")


def test_two_more_examples_run_once_by_themselves(airflow: httpx.Client) -> None:
    """So that the page has failed rows, a budget, and several DAGs."""
    deadline = time.monotonic() + 300
    for dag_id in BESIDE:
        while (states := [run["state"] for run in runs(airflow, dag_id).values()]) != ["success"]:
            assert "failed" not in states and len(states) < 2, states
            assert time.monotonic() < deadline, states
            time.sleep(2)

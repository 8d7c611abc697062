"""Killed at every write and every request of submit and fetch, a retry pays for nothing twice and loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from tests.databases import Database


def cases_of(module: str, database: Database, *flags: str) -> list[dict[str, Any]]:
    """Run a matrix; every case has kept the promise."""
    with SimulatorProcess(SimulatorSettings(input_tokens=2700, output_tokens=100)) as sim:
        command = [sys.executable, "-m", module, "--url", database.url, "--airflow-uri", database.airflow_uri, *flags]
        done = subprocess.run([*command, "--simulator", sim.base_url], capture_output=True, text=True, check=False)
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for case in cases:
        print(f"{case['phase']} {case['number']:3}  {case['point']}")
    wrong = [case for case in cases if case["wrong"]]
    assert wrong == [], done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
    return cases


def test_a_worker_killed_at_any_point_pays_once_and_loses_nothing(database: Database) -> None:
    """Every kill point by name; after each: rows asked once, the table whole, the ledger's tally equal to the simulator's bill."""
    cases = cases_of("tests.crash.matrix", database)
    points = {(case["phase"], case["point"].split(" '")[0]) for case in cases}
    # the points that matter most are among them: around the intent, the POST, the note of its id, and the landing
    assert {("submit", "after COMMIT"), ("submit", "before recv"), ("fetch", "before COMMIT"), ("fetch", "after COMMIT")} <= points
    assert any("POST /v1/messages/batches" in case["point"] for case in cases if case["phase"] == "submit")
    assert len(cases) >= 60


@pytest.mark.long
def test_a_worker_killed_while_it_primes_the_cache_pays_once_and_loses_nothing(sqlite: Database) -> None:
    """Submit of a job whose first row goes alone: three batches, one after the other."""
    cases = cases_of("tests.crash.matrix", sqlite, "--primed")
    assert sum("POST /v1/messages/batches HTTP" in case["point"] or "POST /v1/messages/batches'" in case["point"] for case in cases) >= 3


@pytest.mark.long
def test_a_run_killed_at_any_point_of_its_rounds_asks_nothing_once_too_often(sqlite: Database) -> None:
    """Every kill point of both rounds by name; after each, the retry has asked the failed rows once more and nothing else twice."""
    cases = cases_of("tests.crash.run_matrix", sqlite)
    posts = [case for case in cases if "POST /v1/messages/batches" in case["point"]]
    landings = [case for case in cases if case["point"].startswith("before INSERT INTO answers_")]
    # both rounds are among them
    assert (len(posts), len(landings)) >= (4, 2)

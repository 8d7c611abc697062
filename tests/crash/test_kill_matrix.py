"""Killed at every write and every request of submit and fetch, a retry pays for nothing twice and loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from tests.databases import Database


def all_cases(database: Database, *flags: str) -> list[dict[str, Any]]:
    """Every kill point by name; after each: rows asked once, the table whole, the ledger's tally equal to the simulator's bill."""
    with SimulatorProcess(SimulatorSettings(input_tokens=2700, output_tokens=100)) as sim:
        command = [sys.executable, "-m", "tests.crash.matrix", "--url", database.url, "--airflow-uri", database.airflow_uri, *flags]
        done = subprocess.run([*command, "--simulator", sim.base_url], capture_output=True, text=True, check=False)
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for case in cases:
        print(f"{case['phase']} {case['number']:3}  {case['point']}")
    wrong = [case for case in cases if case["wrong"]]
    assert wrong == [], done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
    return cases


def test_a_worker_killed_at_any_point_pays_once_and_loses_nothing(database: Database) -> None:
    """Submit and fetch of a plain job."""
    cases = all_cases(database)
    points = {(case["phase"], case["point"].split(" '")[0]) for case in cases}
    # the points that matter most are among them: around the intent, the POST, the note of its id, and the landing
    assert {("submit", "after COMMIT"), ("submit", "before recv"), ("fetch", "before COMMIT"), ("fetch", "after COMMIT")} <= points
    assert any("POST /v1/messages/batches" in case["point"] for case in cases if case["phase"] == "submit")
    assert len(cases) >= 60


def test_a_worker_killed_while_it_primes_the_cache_pays_once_and_loses_nothing(database: Database) -> None:
    """Submit of a job whose first row goes alone: three batches, one after the other."""
    cases = all_cases(database, "--primed")
    assert sum("POST /v1/messages/batches HTTP" in case["point"] or "POST /v1/messages/batches'" in case["point"] for case in cases) >= 3

"""What the API tells for free stops a task before it sends anything, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from tests.databases import Database, rows
from tests.integration.airflow_runs import run_dag


@pytest.fixture(scope="module")
def connection_model() -> str:
    return "claude-haiku-5-5"


@pytest.fixture(scope="module")
def simulator_settings() -> SimulatorSettings:
    return SimulatorSettings()


@pytest.fixture
def faulty(simulator: SimulatorProcess) -> Iterator[SimulatorProcess]:
    yield simulator
    simulator.faults.clear()


ASK = """
def ask(task_id, **how):
    SubmitBatchOperator(task_id=task_id, sql="SELECT 'A-1' AS sku, 'tea' AS name", key="sku", prompt="About {{ row.name }}",
                        sql_conn_id="warehouse", retries=3, **{"max_tokens": 20, **how})
"""


def created(simulator: SimulatorProcess) -> int:
    return int(simulator.stats()["calls"].get("create", 0))


def test_bad_params_fail_the_task_before_anything_is_sent(
    home: Path, faulty: SimulatorProcess, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """Misspelt names, limits and models, in a real run and in a dry run, with retries: nothing is journaled or sent."""
    run = run_dag(
        home,
        ASK,
        """
        ask("misspelt", params={"max_token": 5})
        ask("body", params={"extra_body": {"verbosity": 1}})
        ask("nested", params={"output_config": {"efort": "low"}})
        ask("limit", max_tokens=64_001)
        ask("limit_dry", max_tokens=64_001, dry_run=True)
        ask("vendor", model="us.anthropic.claude-haiku-5-5-v1:0")
        SubmitBatchOperator(task_id="native", requests=[{"custom_id": "a", "params": {"model": "anthropic/claude-opus-4-8",
            "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}}], sql_conn_id="warehouse")

        @task.claude_batch(max_tokens=20, sql_conn_id="warehouse", params={"max_token": 5})
        def decorated():
            return ["a"]
        decorated()
        """,
    )
    assert set(run.states().values()) == {"failed"} and len(run.states()) == 8
    assert created(faulty) == 0
    output = capsys.readouterr().out
    assert "row 0 (sku='A-1'): params has 'max_token', which the Messages API does not know; the nearest is 'max_tokens'" in output
    assert "'extra_body' in params is an argument of the SDK's own calls" in output
    assert "output_config has 'efort'" in output
    assert 'key ["A-1"]: max_tokens is 64,001, and claude-haiku-5-5 writes 64,000 at most. Nothing was sent' in output
    assert "the Messages API calls it 'claude-haiku-5-5'" in output and "the Messages API calls it 'claude-opus-4-8'" in output
    assert rows(database, "SELECT COUNT(*) FROM batchkit_batch") == [(0,)]


def test_the_words_of_the_count_reach_the_log_and_a_later_run_goes_on(
    home: Path, faulty: SimulatorProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that the API does not know fails at once, dry or not; weather in the checks stops nothing."""
    before = created(faulty)
    faulty.faults.add("status", endpoint="count_tokens", status=404, message="model: claude-nobody-1", times=2)
    # each of the two meets one of the two faults
    run = run_dag(home, ASK, 'ask("real", model="claude-nobody-1")', 'ask("dry", model="claude-nobody-1", dry_run=True)')
    assert run.states() == {"real": "failed", "dry": "failed"}
    assert created(faulty) == before
    assert capsys.readouterr().out.count('key ["A-1"]: the API refuses it: model: claude-nobody-1. Nothing was sent') >= 2
    for endpoint in ("count_tokens", "model"):
        faulty.faults.add("status", endpoint=endpoint, status=503, times=4)
    run = run_dag(home, ASK, 'ask("windy", max_tokens=65_000)')
    assert run.states() == {"windy": "success"}
    assert created(faulty) == before + 1


def test_a_newer_name_is_let_through_by_the_configuration(home: Path, faulty: SimulatorProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deployment names it; the API has the last word, in the results."""
    monkeypatch.setenv("AIRFLOW__BATCHKIT__ALLOW_UNKNOWN_PARAMS", "verbosity")
    before = created(faulty)
    run = run_dag(home, ASK, 'ask("newer", params={"verbosity": 2})', 'ask("misspelt", params={"verbosty": 2})')
    assert run.states() == {"newer": "success", "misspelt": "failed"}
    assert created(faulty) == before + 1

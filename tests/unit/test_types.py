"""What a user's type checker sees of this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed: it comes with the extra dev")

ROOT = Path(__file__).resolve().parents[2]

DAG = """
import pendulum
from airflow.sdk import DAG

from airflow_provider_batchkit import BatchKit
from airflow_provider_batchkit.operators.batch import FetchBatchOperator, RunBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor

with DAG("catalog", schedule="@daily", start_date=pendulum.datetime(2026, 1, 1, tz="UTC")) as dag:
    submit = SubmitBatchOperator(
        task_id="submit",
        sql="SELECT sku, name FROM products",
        key="sku",
        prompt="Describe {{ row.name }}",
        model="claude-haiku-5-5",
        max_tokens=200,
        sql_conn_id="warehouse",
    )
    wait = BatchSensor(task_id="wait", batch_id=submit.output)
    fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="copy", sql_conn_id="warehouse")
    submit >> wait >> fetch
    again = RunBatchOperator(
        task_id="again",
        sql="SELECT sku, name FROM products",
        key="sku",
        prompt="Describe {{ row.name }}",
        model="claude-haiku-5-5",
        max_tokens=200,
        sql_conn_id="warehouse",
        table="copy",
        max_rounds=3,
    )


def rivers(kit: BatchKit) -> None:
    reveal_type(kit.run(["Name a river."], model="claude-haiku-5-5", max_tokens=50).tally.batch_cost_usd)
"""

WRONG = """
from airflow_provider_batchkit import BatchKit
from airflow_provider_batchkit.operators.batch import FetchBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor
SubmitBatchOperator(task_id="submit", requests=["Name a river."], sql_conn_id="warehouse", max_tokens="fifty")  # line 5
BatchSensor(task_id="wait")  # line 6
FetchBatchOperator(task_id="fetch", batch_id="msgbatch_1", table=7, sql_conn_id="warehouse")  # line 7
BatchKit(key="secret")  # line 8
"""


def mypy(folder: Path, source: str) -> tuple[int, str]:
    """The exit code and the output of ``mypy --strict`` on a file of a user, who has this package among the installed ones."""
    file = folder / "user_dag.py"
    file.write_text(source)
    # two mypy at a time break each other's cache
    cache = ROOT / ".mypy_cache" / f"users-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-version=3.11", f"--cache-dir={cache}", file.name],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_a_users_strict_type_checker_sees_our_types(tmp_path: Path) -> None:
    """The main DAG passes mypy --strict, and what comes out of the kit has the type that it is declared with."""
    code, output = mypy(tmp_path, DAG)
    assert 'Revealed type is "decimal.Decimal | None"' in output
    assert code == 0, output


def test_a_wrong_parameter_is_an_error_of_the_type_checker(tmp_path: Path) -> None:
    """A value of the wrong type, a missing parameter and an unknown one are found before the DAG is deployed."""
    code, output = mypy(tmp_path, WRONG)
    assert code == 1
    found = {int(line.split(":")[1]): line.rpartition("[")[2] for line in output.splitlines() if ": error: " in line}
    assert found == {5: "arg-type]", 6: "call-arg]", 7: "arg-type]", 8: "call-arg]"}, output

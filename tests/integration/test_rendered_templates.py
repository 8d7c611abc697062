"""What Airflow's page "Rendered Template" shows of a task: what it asks of each row, and what it may cost; templates, and no row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_batchkit.simulator import SimulatorProcess
from tests.databases import Database
from tests.integration.airflow_runs import run_source

PROMPT, SYSTEM = "About {{ row.note }}", "Speak as {{ row.voice }} does, {{ ds }}"
SOURCE = "SELECT 1 AS id, 'a secret note' AS note, 'a pirate' AS voice"

DAG = f"""
import pendulum
from datetime import timedelta
from airflow.sdk import DAG, task

from airflow_provider_batchkit import Budget, Round
from airflow_provider_batchkit.operators.batch import FetchBatchOperator, RunBatchOperator, SubmitBatchOperator

with DAG("rendered", schedule=None, start_date=pendulum.datetime(2026, 1, 1, tz="UTC")) as dag:
    asked = dict(
        prompt={PROMPT!r}, system={SYSTEM!r}, max_tokens=100, max_cost_usd="2.50", params={{"temperature": 0.5}}, sql_conn_id="warehouse",
        model="claude-haiku-5-5", key="id", budget=Budget("catalog", usd="10", alert_at=[0.5], notifiers=[print]),
    )
    SubmitBatchOperator(task_id="submit", sql={SOURCE!r}, **asked)
    SubmitBatchOperator(task_id="dry", sql={SOURCE!r}, **asked, dry_run=True)
    SubmitBatchOperator.partial(task_id="mapped", **asked).expand(sql=[{SOURCE!r}])
    rounds = [Round(), Round(ask=["truncated"], max_tokens=300)]
    RunBatchOperator(task_id="run", sql={SOURCE!r}, table="answers", poke_interval=0.2, **asked, rounds=rounds)

    @task.claude_batch(**asked)
    def decorated():
        return [{{"id": 1, "note": "a secret note", "voice": "a pirate"}}]

    decorated()
"""


@pytest.fixture(scope="module")
def fields(airflow_db: Path, simulator: SimulatorProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Task → what Airflow has stored of its templates."""
    from airflow.models.renderedtifields import RenderedTaskInstanceFields
    from airflow.utils.session import create_session

    from tests.connections import anthropic_connection
    from tests.databases import sqlite_database

    warehouse: Database = sqlite_database(tmp_path_factory.mktemp("rendered") / "warehouse.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection(simulator.base_url, "claude-haiku-5-5"))
        patch.setenv("AIRFLOW_CONN_WAREHOUSE", warehouse.airflow_uri)
        run = run_source(airflow_db, "rendered", DAG)
    assert run.state == "success", run.states()
    with create_session() as session:
        stored = session.query(RenderedTaskInstanceFields).filter_by(dag_id="rendered").all()
        return {one.task_id: dict(one.rendered_fields) for one in stored}


@pytest.mark.parametrize("task_id", ["submit", "dry", "mapped", "run", "decorated"])
def test_the_page_shows_what_is_asked_and_what_it_may_cost(fields: dict[str, dict[str, Any]], task_id: str) -> None:
    """The row's templates as they are given; the model as it is rendered."""
    found = fields[task_id]
    assert found["asks"] == {"prompt": PROMPT, "system": SYSTEM, "params": {"temperature": 0.5}}
    caps = found["caps"]
    assert caps["max_tokens"] == 100 and caps["max_cost_usd"] == "2.50" and caps["dry_run"] is (task_id == "dry")
    assert caps["budget"] == {"name": "catalog", "usd": "10", "window": "month", "on_exceeded": "fail", "alert_at": ["0.5"]}
    assert found["model"] == "claude-haiku-5-5"
    if task_id == "run":
        assert caps["rounds"] == [{}, {"ask": ["truncated"], "max_tokens": 300}]


def test_no_row_is_shown(fields: dict[str, dict[str, Any]]) -> None:
    """A function's rows exist while its task runs, and nowhere else; a query is shown as it was given."""
    shown = json.dumps({task: {name: value for name, value in found.items() if name != "sql"} for task, found in fields.items()})
    assert "secret note" not in shown and "pirate" not in shown

"""Submit, wait and fetch in a real Airflow: scheduler, DAG processor, API server and triggerer, seen through its REST API."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa

from airflow_provider_batchkit.model import CostTally
from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from tests.databases import sqlite_database
from tests.e2e.conftest import StartAirflow

ROWS = 300
DAG_ID = "catalog_enrichment"
EXAMPLES = Path(__file__).parents[2] / "example_dags"


def anthropic_connection(base_url: str) -> str:
    """The URI of an ``anthropic`` connection to a simulator."""
    extra = json.dumps({"anthropic_client_kwargs": {"base_url": base_url}})
    return f"anthropic://:test-key@/?__extra__={quote(extra)}"


def test_a_table_in_the_answers_and_the_bill_out(tmp_path: Path, start_airflow: StartAirflow) -> None:
    """The example DAG enriches a table; states, XComs, the stored tally and the table agree, and waiting held no worker slot."""
    warehouse = sqlite_database(tmp_path / "warehouse.db")
    engine = warehouse.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE products (sku TEXT PRIMARY KEY, name TEXT, attributes TEXT)")
        for i in range(ROWS):
            connection.execute(sa.text("INSERT INTO products VALUES (:s, :n, 'blue')"), {"s": f"S{i}", "n": f"thing {i}"})
    with SimulatorProcess(SimulatorSettings(clock="manual", input_tokens=2700, output_tokens=100)) as sim:
        env = {"AIRFLOW_CONN_WAREHOUSE": warehouse.airflow_uri, "AIRFLOW_CONN_ANTHROPIC_DEFAULT": anthropic_connection(sim.base_url)}
        airflow = start_airflow(EXAMPLES, env)
        assert airflow.import_errors() == {}
        run_id = airflow.wait_for_scheduled_run(DAG_ID)

        # the batch ends only when told: until then the sensor is deferred, and nothing holds a slot
        airflow.wait_for_task(DAG_ID, run_id, "wait", "deferred")
        assert airflow.task_states(DAG_ID, run_id) == {"submit": "success", "wait": "deferred", "fetch": None}
        pool = airflow.pool()
        assert (pool["running_slots"], pool["occupied_slots"]) == (0, 0)
        batch_ids = airflow.xcom(DAG_ID, run_id, "submit")
        assert len(batch_ids) == 1
        assert airflow.xcom(DAG_ID, run_id, "submit", "batch_id") == batch_ids[0]
        for batch_id in batch_ids:
            sim.end(batch_id)

        airflow.wait_for_task(DAG_ID, run_id, "wait", "success")
        assert airflow.wait_for_run(DAG_ID, run_id) == "success"
        assert airflow.task_states(DAG_ID, run_id) == {"submit": "success", "wait": "success", "fetch": "success"}
        assert airflow.xcom(DAG_ID, run_id, "wait") == {"succeeded": ROWS, "errored": 0, "canceled": 0, "expired": 0}
        summary = airflow.xcom(DAG_ID, run_id, "fetch")
        assert (summary["batch_ids"], summary["table"], summary["rows"]) == (batch_ids, "product_copy", ROWS)
        assert summary["counts"] == {"succeeded": ROWS}

        # 300 rows at $0.008: the same figure in XCom, in the Storage tab, in the table and in the simulator's own books
        tally = CostTally.from_json(summary["cost_tally"])
        assert (tally.batch_cost_usd, tally.standard_cost_usd) == (Decimal("2.40"), Decimal("4.80"))
        stored = airflow.task_state_store(DAG_ID, run_id, "fetch")
        assert stored["cost_tally"] == summary["cost_tally"]
        assert stored["batch_ids"] == batch_ids
        assert stored["cost"] == "batch $2.40  standard $4.80  savings $2.40"
        with engine.connect() as connection:
            costs = connection.exec_driver_sql("SELECT cost_usd FROM product_copy").scalars().all()
        assert sum(map(Decimal, costs)) == tally.batch_cost_usd
        stats = sim.stats()
        assert stats["requests_accepted"] == ROWS
        assert stats["bill"]["claude-opus-4-8"]["input_tokens"] == tally.input_tokens

        # clearing everything re-attaches: no new batch, the same table
        airflow.clear_tasks(DAG_ID, run_id, ["submit", "wait", "fetch"])
        assert airflow.wait_for_run(DAG_ID, run_id) == "success"
        assert airflow.xcom(DAG_ID, run_id, "submit") == batch_ids
        assert sim.stats()["requests_accepted"] == ROWS
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT COUNT(*) FROM product_copy").scalar() == ROWS

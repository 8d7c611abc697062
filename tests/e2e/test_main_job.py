"""Submit, wait and fetch in a real Airflow: scheduler, DAG processor, API server and triggerer, seen through its REST API."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.model import CostTally
from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from airflow_provider_batchkit.simulator.tokens import answer_for
from tests import releases
from tests.connections import anthropic_connection
from tests.databases import postgres_database, sqlite_database
from tests.e2e.conftest import StartAirflow
from tests.e2e.harness import AirflowStandalone

ROWS = 300
DAG_ID = "catalog_enrichment"
COST_DAG_ID = "catalog_cost"
PUBLISHED = ("batch_ids", "table", "rows", "counts", "cost_tally", "latency_s")
EXAMPLES = Path(__file__).parents[2] / "example_dags"
#: examples whose DAG is there only beside another provider
LOADED_ELSEWHERE = {"into_bigquery", "into_redshift"}
THREE = "into_duckdb"


@dataclass(frozen=True)
class Shop:
    """A catalog, the API and an Airflow that runs the example DAGs on both."""

    airflow: AirflowStandalone
    sim: SimulatorProcess
    engine: sa.Engine
    #: OpenLineage's events, one JSON a line, where its provider is installed
    events: Path
    #: the three databases of the example ``into_duckdb`` beside the warehouse, which is its shop
    ledger: sa.Engine
    analytics: Path
    lake: Path

    def ended_run(self) -> str:
        """The id of the example's scheduled run, which has succeeded by then."""
        run_id = self.airflow.wait_for_scheduled_run(DAG_ID)
        self.airflow.wait_for_task(DAG_ID, run_id, "submit", "success")
        for batch_id in self.airflow.xcom(DAG_ID, run_id, "submit"):
            self.sim.end(batch_id)
        assert self.airflow.wait_for_run(DAG_ID, run_id) == "success"
        return run_id


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, start_airflow: StartAirflow, postgres_url: str) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    warehouse = sqlite_database(folder / "warehouse.db")
    engine = warehouse.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE products (sku TEXT PRIMARY KEY, name TEXT, attributes TEXT)")
        for i in range(ROWS):
            connection.execute(sa.text("INSERT INTO products VALUES (:s, :n, 'blue')"), {"s": f"S{i}", "n": f"thing {i}"})
    reviews = folder / "reviews.csv"
    reviews.write_text("review_id,product,stars,text\n" + "".join(f"R{i},thing {i // 2},4,good\n" for i in range(ROWS)))
    events = folder / "lineage.jsonl"
    analytics, lake = folder / "analytics.duckdb", folder / "the lake"
    settings = SimulatorSettings(clock="manual", input_tokens=2700, output_tokens=100)
    with SimulatorProcess(settings) as sim, postgres_database(postgres_url) as ledger:
        env = {
            "AIRFLOW_CONN_SHOP": warehouse.airflow_uri,
            "AIRFLOW_CONN_ANALYTICS": f"duckdb://{quote(str(analytics), safe='')}",
            "AIRFLOW_CONN_LEDGER": ledger.airflow_uri,
            "AIRFLOW_VAR_LAKE": str(lake),
            "AIRFLOW_CONN_WAREHOUSE": warehouse.airflow_uri,
            "AIRFLOW_CONN_ANTHROPIC_DEFAULT": anthropic_connection(sim.base_url),
            "AIRFLOW_VAR_REVIEWS_CSV": str(reviews),
            "AIRFLOW__OPENLINEAGE__TRANSPORT": json.dumps({"type": "file", "log_file_path": str(events), "append": True}),
        }
        yield Shop(start_airflow(EXAMPLES, env), sim, engine, events, ledger.engine(), analytics, lake)


def test_a_table_in_the_answers_and_the_bill_out(shop: Shop) -> None:
    """The example DAG enriches a table; states, XComs and links agree, waiting held no worker slot, and clearing costs nothing."""
    airflow, sim = shop.airflow, shop.sim
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
    link = airflow.console_link(DAG_ID, run_id, "wait")
    assert link.endswith(f"/batches#{batch_ids[0]}")
    assert airflow.console_link(DAG_ID, run_id, "submit") == link

    for batch_id in batch_ids:
        sim.end(batch_id)
    airflow.wait_for_task(DAG_ID, run_id, "wait", "success")
    assert airflow.wait_for_run(DAG_ID, run_id) == "success"
    assert airflow.task_states(DAG_ID, run_id) == {"submit": "success", "wait": "success", "fetch": "success"}
    # on a busy machine the first look may come after the end
    assert f"1 of 1 batches ended, {ROWS} of {ROWS} requests done" in airflow.task_log(DAG_ID, run_id, "wait")
    assert airflow.xcom(DAG_ID, run_id, "wait") == {"succeeded": ROWS, "errored": 0, "canceled": 0, "expired": 0}
    summary = airflow.xcom(DAG_ID, run_id, "fetch")
    assert (summary["batch_ids"], summary["table"], summary["rows"]) == (batch_ids, "product_copy", ROWS)
    assert summary["counts"] == {"succeeded": ROWS}

    # clearing everything re-attaches: no new batch, the same table
    airflow.clear_tasks(DAG_ID, run_id, ["submit", "wait", "fetch"])
    assert airflow.wait_for_run(DAG_ID, run_id) == "success"
    assert airflow.xcom(DAG_ID, run_id, "submit") == batch_ids
    assert [airflow.console_link(DAG_ID, run_id, task) for task in ("submit", "wait", "fetch")] == [link] * 3
    assert sim.stats()["requests_accepted"] == ROWS
    with shop.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM product_copy").scalar() == ROWS


def test_the_bill_is_the_same_wherever_airflow_shows_it(shop: Shop) -> None:
    """300 rows at $0.008: XCom, the asset's event, the table, the ledger and the simulator's own books agree."""
    airflow, run_id = shop.airflow, shop.ended_run()
    summary = airflow.xcom(DAG_ID, run_id, "fetch")
    tally = CostTally.from_json(summary["cost_tally"])
    assert (tally.batch_cost_usd, tally.standard_cost_usd) == (Decimal("2.40"), Decimal("4.80"))

    published = {name: summary[name] for name in PUBLISHED}
    event = airflow.asset_events(source_dag_id=DAG_ID, source_task_id="fetch", source_run_id=run_id)[-1]
    assert (event["name"], event["extra"]) == ("product_copy", published)

    with shop.engine.connect() as connection:
        costs = connection.exec_driver_sql("SELECT cost_usd FROM product_copy").scalars().all()
        tokens = connection.exec_driver_sql("SELECT SUM(input_tokens), SUM(output_tokens), COUNT(*) FROM product_copy").one()
        booked = connection.exec_driver_sql("SELECT SUM(batch_cost_picousd), SUM(standard_cost_picousd) FROM batchkit_request").one()
        spent = connection.exec_driver_sql("SELECT batch_cost_usd, savings_usd, requests FROM batchkit_spend").one()
    assert sum(map(Decimal, costs)) == tally.batch_cost_usd
    assert tuple(tokens) == (tally.input_tokens, tally.output_tokens, summary["rows"])
    assert [Decimal(pico).scaleb(-12) for pico in booked] == [tally.batch_cost_usd, tally.standard_cost_usd]
    assert (Decimal(spent[0]), Decimal(spent[1]), spent[2]) == (tally.batch_cost_usd, tally.savings_usd, ROWS)
    assert shop.sim.stats()["bill"]["claude-opus-4-8"]["input_tokens"] == tally.input_tokens


@releases.needs("the task's state store")
def test_the_storage_tab_has_the_summary_and_the_bill_in_words(shop: Shop) -> None:
    """What the task's page shows beside its log, and keeps when the task is cleared."""
    airflow, run_id = shop.airflow, shop.ended_run()
    summary = airflow.xcom(DAG_ID, run_id, "fetch")
    stored = airflow.task_state_store(DAG_ID, run_id, "fetch")
    assert stored == {**{name: summary[name] for name in PUBLISHED}, "cost": "batch $2.40  standard $4.80  savings $2.40"}


def test_a_dag_that_is_scheduled_on_the_table_reads_its_cost(shop: Shop) -> None:
    """The second example DAG runs after the first, and finds the bill in the asset's event."""
    shop.ended_run()
    cost_run = shop.airflow.wait_for_run_of_type(COST_DAG_ID, "asset_triggered")
    assert shop.airflow.wait_for_run(COST_DAG_ID, cost_run) == "success"
    assert Decimal(shop.airflow.xcom(COST_DAG_ID, cost_run, "report")) == Decimal("2.40")


@pytest.mark.skipif(importlib.util.find_spec("openlineage") is None, reason="needs the extra openlineage")
def test_openlineage_is_told_of_the_run_and_its_cost(shop: Shop) -> None:
    """The events that the provider sends from its copy of the task's process carry what the task left for them."""
    shop.ended_run()
    events = [json.loads(line) for line in shop.events.read_text().splitlines()]
    done = {e["job"]["name"]: e for e in events if e["eventType"] == "COMPLETE"}
    submitted, fetched = (done[f"{DAG_ID}.{task}"] for task in ("submit", "fetch"))
    assert submitted["job"]["facets"]["sql"]["query"] == "SELECT sku, name, attributes FROM products"
    assert submitted["run"]["facets"]["batchkit"]["source_rows"] == ROWS
    tally = CostTally.from_json(fetched["run"]["facets"]["batchkit"]["cost_tally"])
    assert (tally.batch_cost_usd, tally.input_tokens) == (Decimal("2.40"), 2700 * ROWS)


def test_one_task_asks_again_what_expired(shop: Shop) -> None:
    """A Run of two rounds, deferred in each: a row that expires once is answered in the second."""
    shop.sim.set(clock="seconds:2")
    mark = " [[sim:expired-once]]"
    with shop.engine.begin() as connection:
        connection.execute(sa.text("UPDATE products SET attributes = attributes || :mark WHERE sku = 'S7'"), {"mark": mark})
    run_id = shop.airflow.trigger_dag("one_task_run")
    assert shop.airflow.wait_for_run("one_task_run", run_id, timeout=300) == "success"
    with shop.engine.begin() as connection:
        connection.execute(sa.text("UPDATE products SET attributes = replace(attributes, :mark, '')"), {"mark": mark})
    summary = shop.airflow.xcom("one_task_run", run_id, "run")
    assert [(part["requests"], part["counts"]) for part in summary["rounds"]] == [
        (ROWS, {"succeeded": ROWS - 1, "expired": 1}),
        (1, {"succeeded": 1}),
    ]
    assert summary["counts"] == {"succeeded": ROWS}


def in_duckdb(shop: Shop) -> list[tuple[Any, ...]]:
    """Key, answer, price and batch of each row of the DuckDB file."""
    import duckdb

    with duckdb.connect(str(shop.analytics), read_only=True) as connection:
        found: list[tuple[Any, ...]] = connection.execute(
            "SELECT sku, response, cost_usd, batch_id FROM product_copy ORDER BY sku"
        ).fetchall()
        return found


def in_the_lake(shop: Shop) -> list[tuple[Any, ...]]:
    """The same of the Parquet files."""
    import pyarrow.parquet as pq

    files = sorted((shop.lake / "product_copy").iterdir())
    return sorted(
        tuple(row[name] for name in ("sku", "response", "cost_usd", "batch_id"))
        for path in files
        for row in pq.read_table(path).to_pylist()
    )


def test_rows_answers_and_ledger_lie_in_three_databases(shop: Shop) -> None:
    """Out of SQLite into DuckDB and Parquet, the ledger in PostgreSQL: each row once in each, with its own answer, and one bill."""
    pytest.importorskip("airflow.providers.duckdb.hooks.duckdb", reason="apache-airflow-providers-duckdb is not installed")
    airflow, tasks = shop.airflow, ["describe.submit", "describe.wait", "describe.fetch"]
    # the scheduled run asks, too: its requests must not come between
    shop.ended_run()
    shop.sim.set(clock="manual")
    before = shop.sim.stats()
    run_id = airflow.trigger_dag(THREE)
    airflow.wait_for_task(THREE, run_id, "describe.wait", "deferred")
    batch_ids = airflow.xcom(THREE, run_id, "describe.submit")
    # the submit has proved the place, and left nothing there
    assert list((shop.lake / "product_copy").iterdir()) == []
    for batch_id in batch_ids:
        shop.sim.end(batch_id)
    assert airflow.wait_for_run(THREE, run_id) == "success"

    with shop.engine.connect() as connection:
        source = connection.exec_driver_sql("SELECT sku, name, attributes FROM products").all()
    answers = {sku: answer_for(f"Write a two-sentence description of {name}: {attributes}") for sku, name, attributes in source}
    assert len(set(answers.values())) == len(answers) == ROWS
    landed = in_duckdb(shop)
    assert [(sku, response) for sku, response, _, _ in landed] == sorted(answers.items())
    assert in_the_lake(shop) == landed
    assert sorted(path.name for path in (shop.lake / "product_copy").iterdir()) == sorted(f"{batch_id}.parquet" for batch_id in batch_ids)

    # the bill: in the task's summary, in both places of the rows, and in the ledger, which lies in PostgreSQL alone
    summary = airflow.xcom(THREE, run_id, "describe.fetch")
    tally = CostTally.from_json(summary["cost_tally"])
    assert (summary["rows"], summary["counts"]) == (ROWS, {"succeeded": ROWS})
    assert sum(cost for _, _, cost, _ in landed) == tally.batch_cost_usd != 0
    booked = sa.text("SELECT SUM(batch_cost_picousd), SUM(standard_cost_picousd), COUNT(*) FROM batchkit_request")
    spent = sa.text("SELECT batch_cost_usd, savings_usd, requests FROM batchkit_spend")
    with shop.ledger.connect() as connection:
        batch_pico, standard_pico, requests = connection.execute(booked).one()
        assert [Decimal(pico).scaleb(-12) for pico in (batch_pico, standard_pico)] == [tally.batch_cost_usd, tally.standard_cost_usd]
        assert requests == ROWS
        assert tuple(connection.execute(spent).one()) == (tally.batch_cost_usd, tally.savings_usd, ROWS)
    billed = [stats["bill"].get("claude-haiku-5-5", {}).get("input_tokens", 0) for stats in (before, shop.sim.stats())]
    assert tally.input_tokens == billed[1] - billed[0] == 2700 * ROWS

    # neither a clear nor another run buys or writes anything again
    files = {path: path.stat().st_mtime_ns for path in (shop.lake / "product_copy").iterdir()}
    airflow.clear_tasks(THREE, run_id, tasks)
    assert airflow.wait_for_run(THREE, run_id) == "success"
    assert airflow.xcom(THREE, run_id, "describe.submit") == batch_ids
    again = airflow.trigger_dag(THREE)
    assert airflow.wait_for_run(THREE, again) == "success"
    assert set(airflow.task_states(THREE, again).values()) == {"skipped"}
    assert shop.sim.stats()["requests_accepted"] == before["requests_accepted"] + ROWS
    assert in_duckdb(shop) == landed == in_the_lake(shop)
    assert {path: path.stat().st_mtime_ns for path in (shop.lake / "product_copy").iterdir()} == files


def test_the_examples_without_a_schedule_run_when_they_are_triggered(shop: Shop) -> None:
    """All at once, on one warehouse and one triggerer; the table of each has a row for every key. After the tests that count requests."""
    shop.sim.set(clock="seconds:2")
    scheduled = {DAG_ID, COST_DAG_ID}
    runs = {
        dag_id: shop.airflow.trigger_dag(dag_id)
        for dag_id in sorted({path.stem for path in EXAMPLES.glob("*.py")} - scheduled - LOADED_ELSEWHERE - {THREE})
    }
    states = {dag_id: shop.airflow.wait_for_run(dag_id, run_id, timeout=300) for dag_id, run_id in runs.items()}
    assert states == dict.fromkeys(runs, "success")
    fetches = {"classify_then_write": "write.fetch", "one_task_run": "run"}
    for dag_id, run_id in runs.items():
        summary = shop.airflow.xcom(dag_id, run_id, fetches.get(dag_id, "fetch"))
        assert summary["rows"] == summary["counts"]["succeeded"] > 0, dag_id
        with shop.engine.connect() as connection:
            assert connection.exec_driver_sql(f"SELECT COUNT(*) FROM {summary['table']}").scalar() == summary["rows"]

"""Every DAG of example_dags as it is, on SQLite and PostgreSQL: the demo's catalog and reviews, the simulator for the API."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from airflow_provider_batchkit.simulator.demo import INPUT_TOKENS, OUTPUT_TOKENS, fill_catalog, write_reviews
from tests.databases import Database
from tests.integration.airflow_runs import Run

EXAMPLES = Path(__file__).resolve().parents[2] / "example_dags"
PRODUCTS = 30
#: name of the example → its result table, key column and number of rows; None for one that writes no table
RESULTS: dict[str, tuple[str, str, int] | None] = {
    "catalog_cost": None,
    "catalog_enrichment": ("product_copy", "sku", PRODUCTS),
    # the simulator's answers are the same on every run
    "classify_then_write": ("office_pitch", "sku", 11),
    "csv_to_table": ("review_sentiment", "review_id", 2 * PRODUCTS),
    "one_task_run": ("product_keywords", "sku", PRODUCTS),
    "review_digest": ("review_digest", "product", PRODUCTS),
}


@pytest.fixture(scope="module")
def simulator() -> Iterator[SimulatorProcess]:
    with SimulatorProcess(SimulatorSettings(input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS)) as process:
        yield process


@pytest.fixture
def home(airflow_db: Path, simulator: SimulatorProcess, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Airflow with what the examples ask for: two connections, a table of products, a variable with the path of a file."""
    extra = json.dumps({"anthropic_client_kwargs": {"base_url": simulator.base_url}})
    monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", f"anthropic://:test-key@/?__extra__={quote(extra)}")
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", database.airflow_uri)
    monkeypatch.setenv("AIRFLOW_VAR_REVIEWS_CSV", str(tmp_path / "reviews.csv"))
    catalog = tmp_path / "catalog.db"
    fill_catalog(catalog, PRODUCTS)
    write_reviews(tmp_path / "reviews.csv", catalog)
    with closing(sqlite3.connect(catalog)) as source, database.engine().begin() as connection:
        connection.exec_driver_sql("CREATE TABLE products (sku TEXT PRIMARY KEY, name TEXT NOT NULL, attributes TEXT NOT NULL)")
        for sku, name, attributes in source.execute("SELECT sku, name, attributes FROM products"):
            connection.execute(sa.text("INSERT INTO products VALUES (:s, :n, :a)"), {"s": sku, "n": name, "a": attributes})
    return airflow_db


def run_example(home: Path, name: str) -> Run:
    """Run an example once; its file and its DAG have one name."""
    from airflow.dag_processing.dagbag import DagBag

    shutil.copy(EXAMPLES / f"{name}.py", home / "dags")
    bag = DagBag(str(home / "dags" / f"{name}.py"))
    assert bag.import_errors == {}
    return Run(bag.dags[name].test())


def test_every_example_is_run_here() -> None:
    """One that is added has to say what it writes."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(RESULTS)


@pytest.mark.parametrize("name", RESULTS)
def test_an_example_runs_as_it_is(home: Path, database: Database, name: str) -> None:
    """Each task succeeds, and the result table has a whole answer and its price for every key, with as many tokens as in the demo."""
    ended = run_example(home, name)
    assert set(ended.states().values()) == {"success"}
    result = RESULTS[name]
    if result is None:
        return
    table, key, count = result
    landed = rows(database, f"SELECT {key}, response, stop_reason, cost_usd FROM {table} ORDER BY {key}")
    print(table, *landed[:5], sep="\n")  # noqa: T201 - pytest shows it with the failure, and with -rP
    assert len({row[0] for row in landed}) == len(landed) == count
    assert {stop_reason for _, _, stop_reason, _ in landed} == {"end_turn"}
    assert all(response and float(cost) > 0 for _, response, _, cost in landed)


def rows(database: Database, sql: str) -> list[tuple[Any, ...]]:
    with database.engine().connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(sql)]

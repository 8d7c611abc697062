"""Every DAG of example_dags as it is, on SQLite and PostgreSQL: the demo's catalog and reviews, the simulator for the API."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.simulator import SimulatorSettings
from example_dags.demo import ANSWER_TOKENS
from example_dags.demo.catalog import fill_catalog, write_reviews
from tests.databases import Database, rows
from tests.integration.airflow_runs import run_source

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
#: examples that need other providers, which are parsed in test_loading_examples.py
LOADED = {"into_bigquery", "into_redshift"}
#: over three databases, which test_three_databases.py has
THREE_DATABASES = {"into_duckdb"}


@pytest.fixture(scope="module")
def simulator_settings() -> SimulatorSettings:
    return SimulatorSettings(answer_tokens=ANSWER_TOKENS)


@pytest.fixture(scope="module")
def connection_model() -> None:
    """Every example names its model."""


@pytest.fixture
def home(home: Path, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Airflow with what the examples ask for: two connections, a table of products, a variable with the path of a file."""
    monkeypatch.setenv("AIRFLOW_VAR_REVIEWS_CSV", str(tmp_path / "reviews.csv"))
    catalog = tmp_path / "catalog.db"
    fill_catalog(catalog, PRODUCTS)
    write_reviews(tmp_path / "reviews.csv", catalog)
    with closing(sqlite3.connect(catalog)) as source, database.engine().begin() as connection:
        connection.exec_driver_sql("CREATE TABLE products (sku TEXT PRIMARY KEY, name TEXT NOT NULL, attributes TEXT NOT NULL)")
        for sku, name, attributes in source.execute("SELECT sku, name, attributes FROM products"):
            connection.execute(sa.text("INSERT INTO products VALUES (:s, :n, :a)"), {"s": sku, "n": name, "a": attributes})
    return home


def test_every_example_is_run_here() -> None:
    """One that is added has to say what it writes."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(RESULTS) | LOADED | THREE_DATABASES


@pytest.mark.parametrize("name", RESULTS)
def test_an_example_runs_as_it_is(home: Path, database: Database, name: str) -> None:
    """Each task succeeds, and the result table has a whole answer and its price for every key, with as many tokens as in the demo."""
    ended = run_source(home, name, (EXAMPLES / f"{name}.py").read_text())
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

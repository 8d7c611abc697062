"""The example ``into_duckdb`` as it is: rows out of SQLite, answers into DuckDB and Parquet, the ledger in PostgreSQL or another SQLite."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.simulator import SimulatorProcess
from airflow_provider_batchkit.simulator.tokens import answer_for
from tests.databases import Database, rows, sqlite_database
from tests.integration.airflow_runs import run_source
from tests.integration.test_examples import EXAMPLES
from tests.integration.test_result_files import read_all

duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
pytest.importorskip("airflow.providers.duckdb.hooks.duckdb", reason="apache-airflow-providers-duckdb is not installed")

PRODUCTS = 30


def test_each_row_is_once_in_each_place_with_its_own_answer_and_one_bill(
    airflow_db: Path, database: Database, api: SimulatorProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bill in the ledger is that of the rows in both places; a second run buys and writes nothing."""
    file, lake = tmp_path / "analytics.duckdb", tmp_path / "the lake"
    shop = sqlite_database(tmp_path / "shop.db")
    with shop.engine().begin() as connection:
        connection.exec_driver_sql("CREATE TABLE products (sku TEXT PRIMARY KEY, name TEXT, attributes TEXT)")
        for i in range(PRODUCTS):
            connection.execute(sa.text("INSERT INTO products VALUES (:s, :n, 'blue')"), {"s": f"S{i}", "n": f"thing {i}"})
    monkeypatch.setenv("AIRFLOW_CONN_SHOP", shop.airflow_uri)
    monkeypatch.setenv("AIRFLOW_CONN_ANALYTICS", f"duckdb://{quote(str(file), safe='')}")
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER", database.airflow_uri)
    monkeypatch.setenv("AIRFLOW_VAR_LAKE", str(lake))
    source = (EXAMPLES / "into_duckdb.py").read_text()
    accepted = api.stats()["requests_accepted"]

    assert set(run_source(airflow_db, "into_duckdb", source).states().values()) == {"success"}
    answers = {f"S{i}": answer_for(f"Write a two-sentence description of thing {i}: blue") for i in range(PRODUCTS)}
    select = "SELECT sku, response, cost_usd, batch_id FROM product_copy ORDER BY sku"
    with duckdb.connect(str(file)) as connection:
        landed = connection.execute(select).fetchall()
    assert [(sku, response) for sku, response, _, _ in landed] == sorted(answers.items())
    folder = lake / "product_copy"
    assert sorted(tuple(row[name] for name in ("sku", "response", "cost_usd", "batch_id")) for row in read_all(folder)) == landed
    (booked,) = rows(database, "SELECT SUM(batch_cost_picousd), COUNT(*) FROM batchkit_request")
    assert (Decimal(booked[0]).scaleb(-12), booked[1]) == (sum(cost for _, _, cost, _ in landed), PRODUCTS)
    assert sa.inspect(shop.engine()).get_table_names() == ["products"]

    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(run_source(airflow_db, "into_duckdb", source).states().values()) == {"skipped"}
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    with duckdb.connect(str(file)) as connection:
        assert connection.execute(select).fetchall() == landed
    assert api.stats()["requests_accepted"] == accepted + PRODUCTS

"""OpenLineage: what is told of the tables and the costs, and that nothing is needed without its provider."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from airflow_provider_batchkit.operators.batch import FetchBatchOperator, RunBatchOperator, SubmitBatchOperator
from tests.databases import Database

SUMMARY = {
    "batch_ids": ["msgbatch_1"],
    "table": "shop.copy",
    "rows": 3,
    "counts": {"succeeded": 3},
    "cost_tally": {"batch_cost_usd": "0.016", "input_tokens": 5400, "models": {"claude-opus-4-8": {"batch_cost_usd": "0.016"}}},
}


def submit(**arguments: Any) -> SubmitBatchOperator:
    return SubmitBatchOperator(task_id="submit", prompt="About {{ row.name }}", sql_conn_id="warehouse", **arguments)


def fetch(table: str = "shop.copy") -> FetchBatchOperator:
    return FetchBatchOperator(task_id="fetch", batch_id="msgbatch_1", table=table, sql_conn_id="warehouse")


@pytest.fixture
def openlineage() -> None:
    pytest.importorskip("airflow.providers.openlineage.sqlparser")


@pytest.fixture
def namespace(openlineage: None, postgres: Database, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The test's PostgreSQL as OpenLineage names it, and its database's name."""
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", postgres.airflow_uri)
    address, _, name = postgres.airflow_uri.rpartition("/")
    return f"postgres://{address.rpartition('@')[2]}", name


def serialized(facet: Any) -> dict[str, Any]:
    """A facet as it is sent."""
    import json

    from openlineage.client.serde import Serde

    return dict(json.loads(Serde.to_json(facet)))


def test_submit_names_the_tables_that_it_reads(namespace: tuple[str, str]) -> None:
    """Both tables of a join, with the default schema where none is written; before and after the run."""
    server, name = namespace
    task = submit(sql="SELECT p.sku, s.name FROM products p JOIN shop.sellers s ON s.id = p.seller", key="sku")
    for lineage in (task.get_openlineage_facets_on_start(), task.get_openlineage_facets_on_complete(None)):
        assert lineage is not None
        assert sorted((d.namespace, d.name) for d in lineage.inputs) == [
            (server, f"{name}.public.products"),
            (server, f"{name}.shop.sellers"),
        ]
        assert lineage.outputs == []
        assert lineage.job_facets["sql"].query.startswith("SELECT p.sku")


def test_submit_reads_from_the_source_connection(namespace: tuple[str, str], postgres: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another database than the ledger's has its own name."""
    monkeypatch.setenv("AIRFLOW_CONN_SHOP", postgres.airflow_uri.rpartition("/")[0] + "/postgres")
    lineage = submit(sql="SELECT sku FROM products", key="sku", source_conn_id="shop").get_openlineage_facets_on_start()
    assert lineage is not None
    assert [(d.namespace, d.name) for d in lineage.inputs] == [(namespace[0], "postgres.public.products")]


def test_a_database_that_does_not_answer_takes_nothing_but_its_tables_names(openlineage: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statement and the costs are told all the same."""
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", "postgres://somebody:secret-word@127.0.0.1:9/warehouse")
    lineage = submit(sql="SELECT sku FROM products", key="sku").get_openlineage_facets_on_start()
    assert lineage is not None
    assert (lineage.inputs, lineage.job_facets["sql"].query) == ([], "SELECT sku FROM products")
    task = fetch(table="copy")
    task.lineage_summary = SUMMARY
    landed = task.get_openlineage_facets_on_failure(None)
    assert landed is not None
    assert landed.outputs == []
    assert serialized(landed.run_facets["batchkit"])["rows"] == 3


def test_submit_of_requests_reads_no_table(openlineage: None) -> None:
    """There is no SQL, so there is no table to name."""
    lineage = SubmitBatchOperator(task_id="s", requests=["Name a river."], sql_conn_id="warehouse").get_openlineage_facets_on_start()
    assert lineage is not None
    assert (lineage.inputs, lineage.outputs, lineage.run_facets, lineage.job_facets) == ([], [], {}, {})


def test_fetch_names_the_table_the_rows_and_the_cost(namespace: tuple[str, str]) -> None:
    """The target table at the start; the rows, and tokens and costs as exact text, once it has landed, and also when it then fails."""
    server, name = namespace
    task = fetch()
    lineage = task.get_openlineage_facets_on_start()
    assert lineage is not None
    assert [(d.namespace, d.name) for d in lineage.outputs] == [(server, f"{name}.shop.copy")]
    assert lineage.run_facets == {}

    task.lineage_summary = SUMMARY
    for lineage in (task.get_openlineage_facets_on_complete(None), task.get_openlineage_facets_on_failure(None)):
        assert lineage is not None
        assert lineage.outputs[0].outputFacets["outputStatistics"].rowCount == 3
        facet = serialized(lineage.run_facets["batchkit"])
        assert {key: facet[key] for key in SUMMARY} == SUMMARY
    short = fetch(table="copy").get_openlineage_facets_on_start()
    assert short is not None
    assert short.outputs[0].name == f"{name}.public.copy"


def test_a_submit_that_names_its_later_table_writes_none(namespace: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """``table`` of a submit is what a later task writes: no output of its own, before or after it has sent, and nothing is lacking."""
    task = submit(sql="SELECT sku FROM products", key="sku", table="shop.copy")
    start = task.get_openlineage_facets_on_start()
    task.lineage_summary = {"batch_ids": ["msgbatch_1"], "source_rows": 3, "submitted_requests": 3}
    for lineage in (start, task.get_openlineage_facets_on_complete(None), task.get_openlineage_facets_on_failure(None)):
        assert lineage is not None
        assert lineage.outputs == []
        assert [d.name for d in lineage.inputs] == [f"{namespace[1]}.public.products"]
    assert "lacks a part" not in caplog.text


def test_a_run_names_the_table_that_it_writes(namespace: tuple[str, str]) -> None:
    """The one task that submits and fetches both reads and writes."""
    task = RunBatchOperator(
        task_id="run", sql="SELECT sku FROM products", key="sku", prompt="{{ row.sku }}", table="shop.copy", sql_conn_id="warehouse"
    )
    lineage = task.get_openlineage_facets_on_start()
    assert lineage is not None
    assert [d.name for d in lineage.inputs] == [f"{namespace[1]}.public.products"]
    assert [d.name for d in lineage.outputs] == [f"{namespace[1]}.shop.copy"]


def test_a_database_that_openlineage_does_not_know_has_the_statement_alone(
    openlineage: None, sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite has no name in OpenLineage: no tables, and no error."""
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", sqlite.airflow_uri)
    lineage = submit(sql="SELECT sku FROM products", key="sku").get_openlineage_facets_on_start()
    assert lineage is not None
    assert (lineage.inputs, lineage.job_facets["sql"].query) == ([], "SELECT sku FROM products")
    written = fetch().get_openlineage_facets_on_start()
    assert written is not None
    assert written.outputs == []


def test_without_openlineage_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider is an extra."""
    monkeypatch.setitem(sys.modules, "airflow.providers.openlineage.extractors", None)
    task = submit(sql="SELECT sku FROM products", key="sku")
    assert task.get_openlineage_facets_on_start() is None
    assert task.get_openlineage_facets_on_complete(None) is None
    assert fetch().get_openlineage_facets_on_failure(None) is None

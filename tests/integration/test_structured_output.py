"""``output_schema``: typed columns on real databases, by every way into a table, against the simulator over HTTP."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError, TableError
from airflow_provider_batchkit.simulator import Simulator, answer_for
from tests.connections import anthropic_connection
from tests.databases import Database
from tests.integration.airflow_runs import run_dag
from tests.warehouse import LANDING_PATHS, Warehouse, kit_for


def warehouse_on(request: pytest.FixtureRequest, sim: Simulator, path: str) -> Warehouse:
    kind, driver, portable = LANDING_PATHS[path]
    database: Database = request.getfixturevalue(kind)
    found = replace(database, url=database.url.replace("+psycopg", driver))
    return Warehouse(found.engine(), kit_for(sim.base_url), portable=portable)


@pytest.fixture(params=LANDING_PATHS)
def every_way(request: pytest.FixtureRequest, sim: Simulator) -> Warehouse:
    return warehouse_on(request, sim, str(request.param))


@pytest.fixture(params=["sqlite", "psycopg3"])
def warehouse(request: pytest.FixtureRequest, sim: Simulator) -> Warehouse:
    return warehouse_on(request, sim, str(request.param))


SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "stock": {"type": "integer"},
        "price": {"type": ["number", "null"]},
        "organic": {"type": "boolean"},
        "seen_on": {"type": "string", "format": "date"},
        "seen_at": {"type": "string", "format": "date-time"},
        "parts": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["title", "stock", "price", "organic", "seen_on", "seen_at", "parts"],
}
NAMES = tuple(SCHEMA["properties"])


def items(*names: str) -> list[dict[str, Any]]:
    return [{"id": i, "name": name} for i, name in enumerate(names)]


def typed(warehouse: Warehouse, table: str = "answers") -> list[dict[str, Any]]:
    """The rows as Python values of the types that the database says it has."""
    found = sa.Table(table, sa.MetaData(), autoload_with=warehouse.engine)
    with warehouse.engine.connect() as connection:
        return [dict(row) for row in connection.execute(sa.select(found).order_by(found.c.id)).mappings()]


def test_answers_land_in_columns_of_their_types(every_way: Warehouse) -> None:
    """Each value equals the one in the raw text beside it, and is of the column's own type."""
    landed = every_way.fetch(every_way.submit(items("lamp", "cup", "tea"), output_schema=SCHEMA).batch_ids)
    assert (landed.rows, dict(landed.counts)) == (3, {"succeeded": 3})
    rows = typed(every_way)
    for row in rows:
        answer = json.loads(row["response"])
        for name in ("title", "stock", "price", "organic"):
            assert (row[name], type(row[name])) == (answer[name], type(answer[name]))
        assert row["seen_on"] == dt.date(2026, 1, 2)
        assert row["seen_at"].replace(tzinfo=row["seen_at"].tzinfo or dt.UTC) == dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
        parts = row["parts"]
        assert (json.loads(parts) if isinstance(parts, str) else parts) == answer["parts"]
    assert tuple(rows[0])[: len(NAMES) + 2] == ("id", *NAMES, "response")
    assert len({row["stock"] for row in rows}) == 3


def test_what_does_not_fit_lands_with_its_text_and_its_reason(every_way: Warehouse) -> None:
    """Prose, a cut answer and a refusal are told apart, billed, and in the table without ``include_failed``; an expired row is not."""
    names = ("lamp", "[[sim:invalid-output]]", "[[sim:max_tokens]]", "[[sim:refusal]]", "[[sim:expired]]")
    landed = every_way.fetch(every_way.submit(items(*names), output_schema=SCHEMA).batch_ids)
    assert (landed.rows, dict(landed.counts)) == (4, {"succeeded": 1, "invalid_output": 3, "expired": 1})
    assert landed.tally.requests == 4
    good, prose, cut, refused = typed(every_way)
    assert good["status"] == "succeeded"
    assert [(r["status"], r["error_type"], r["stop_reason"]) for r in (prose, cut, refused)] == [
        ("invalid_output", "invalid_output", "end_turn"),
        ("invalid_output", "truncated", "max_tokens"),
        ("invalid_output", "refused", "refusal"),
    ]
    assert prose["response"] == answer_for("About [[sim:invalid-output]]")
    assert cut["response"].startswith('{"title":')
    assert refused["response"] == ""
    assert {row[name] for row in (prose, cut, refused) for name in NAMES} == {None}
    assert all(row["cost_usd"] and row["output_tokens"] is not None for row in (prose, cut))
    ledger = every_way.rows("SELECT key, status, error_type, batch_cost_picousd AS c FROM batchkit_request ORDER BY key")
    assert [(r["status"], r["error_type"]) for r in ledger][1:4] == [
        ("invalid_output", t) for t in ("invalid_output", "truncated", "refused")
    ]
    assert sum(r["c"] for r in ledger) == sum(r["batch_cost_picousd"] for r in every_way.rows("SELECT * FROM batchkit_batch"))


def test_a_line_that_never_comes_leaves_the_other_rows_their_values(every_way: Warehouse, sim: Simulator) -> None:
    """Rows with and without an answer land together, each with its own columns, also those that share a request."""
    ids = every_way.submit(items("lamp", "cup", "lamp", "tea", "cup"), output_schema=SCHEMA).batch_ids
    sim.faults.add("missing_line", line=2, times=None)
    landed = every_way.fetch(ids, include_failed=True)
    assert (landed.rows, landed.counts["missing"] > 0) == (5, True)
    rows = typed(every_way)
    assert [row["status"] for row in rows].count("missing") == landed.counts["missing"]
    for row in rows:
        answer = {"title": None} if row["status"] == "missing" else json.loads(row["response"])
        assert row["title"] == answer["title"]
        if row["status"] == "missing":
            assert {row[name] for name in (*NAMES, "response", "cost_usd")} <= {None, "0.00", 0}


def test_an_answer_that_does_not_fit_never_overwrites_one_that_does(warehouse: Warehouse) -> None:
    """Merge keeps the good row of an earlier run, and takes the text of the later one where there was none."""
    first = warehouse.submit(items("lamp", "[[sim:expired]]"), output_schema=SCHEMA)
    warehouse.fetch(first.batch_ids, include_failed=True)
    second = warehouse.submit(items("a [[sim:invalid-output]]", "b [[sim:invalid-output]]"), output_schema=SCHEMA, run_id="run-2")
    warehouse.fetch(second.batch_ids)
    kept, taken = typed(warehouse)
    assert (kept["status"], kept["title"] is not None) == ("succeeded", True)
    assert (taken["status"], taken["response"]) == ("invalid_output", answer_for("About b [[sim:invalid-output]]"))
    third = warehouse.submit(items("lamp", "cup"), output_schema=SCHEMA, run_id="run-3")
    warehouse.fetch(third.batch_ids)
    assert {row["status"] for row in typed(warehouse)} == {"succeeded"}


@pytest.mark.parametrize("disposition", ["append", "replace"])
def test_every_disposition_writes_typed_columns(warehouse: Warehouse, disposition: str) -> None:
    """Twice, as a cleared fetch does."""
    ids = warehouse.submit(items("lamp", "cup"), output_schema=SCHEMA).batch_ids
    for _ in range(2):
        warehouse.fetch(ids, disposition=disposition)
    assert [(row["id"], row["seen_on"]) for row in typed(warehouse)] == [(0, dt.date(2026, 1, 2)), (1, dt.date(2026, 1, 2))]


def test_rows_that_share_a_request_share_its_values(warehouse: Warehouse) -> None:
    """One request, two rows, equal columns."""
    report = warehouse.submit(items("lamp", "lamp"), output_schema=SCHEMA)
    assert report.asked == 1
    warehouse.fetch(report.batch_ids)
    one, two = typed(warehouse)
    assert [one[name] for name in NAMES] == [two[name] for name in NAMES]


def test_a_table_whose_columns_do_not_fit_is_refused_with_every_difference(warehouse: Warehouse) -> None:
    """What is lacking with its type, what is of another type with both; the batch can still be fetched, elsewhere or after ALTER TABLE."""
    plain = warehouse.submit(items("lamp"))
    warehouse.fetch(plain.batch_ids)
    warehouse.execute("ALTER TABLE answers ADD COLUMN title INTEGER", "ALTER TABLE answers ADD COLUMN organic TEXT")
    report = warehouse.submit(items("lamp"), output_schema=SCHEMA, run_id="run-2")
    with pytest.raises(TableError) as caught:
        warehouse.fetch(report.batch_ids)
    message = str(caught.value)
    assert "lacks the columns stock BIGINT, price FLOAT" in message
    assert "title is INTEGER and must be TEXT, organic is TEXT and must be BOOLEAN" in message
    assert "Nothing was written" in message
    assert warehouse.rows("SELECT COUNT(*) AS n FROM answers") == [{"n": 1}]
    assert warehouse.fetch(report.batch_ids, "elsewhere").rows == 1


def test_a_table_of_the_users_own_types_is_filled(warehouse: Warehouse) -> None:
    """INTEGER for a whole number, NUMERIC for a number, JSON or text for nested values; more columns do not matter."""
    time_type, json_type = ("TIMESTAMPTZ", "JSON") if warehouse.engine.dialect.name == "postgresql" else ("TIMESTAMP", "JSON")
    warehouse.fetch(warehouse.submit(items("lamp")).batch_ids)
    for column in (
        "title VARCHAR(200)", "stock INTEGER", "price NUMERIC", "organic BOOLEAN", "seen_on DATE", f"seen_at {time_type}",
        f"parts {json_type}", "note TEXT",
    ):  # fmt: skip
        warehouse.execute(f"ALTER TABLE answers ADD COLUMN {column}")
    warehouse.fetch(warehouse.submit(items("lamp", "cup"), output_schema=SCHEMA, run_id="run-2").batch_ids)
    for row in typed(warehouse):
        answer = json.loads(row["response"])
        assert (row["title"], row["stock"], row["organic"], row["parts"]) == tuple(
            answer[n] for n in ("title", "stock", "organic", "parts")
        )
        assert float(row["price"]) == answer["price"]


def test_a_time_without_its_zone_does_not_fit_on_postgresql(postgres: Database, sim: Simulator) -> None:
    """The value would be shifted to the session's local time; nor does text go into a number, or a large whole number into a small one."""
    warehouse = Warehouse(postgres.engine(), kit_for(sim.base_url))
    warehouse.fetch(warehouse.submit(items("lamp"), output_schema=SCHEMA).batch_ids)
    for column, type_name in (("seen_at", "TIMESTAMP"), ("title", "JSONB USING NULL"), ("stock", "SMALLINT USING 1")):
        warehouse.execute(f"ALTER TABLE answers ALTER COLUMN {column} TYPE {type_name}")
    with pytest.raises(TableError) as caught:
        warehouse.fetch(warehouse.submit(items("cup"), output_schema=SCHEMA, run_id="run-2").batch_ids)
    message = str(caught.value)
    assert "title is JSONB and must be TEXT, stock is SMALLINT and must be BIGINT" in message
    assert "seen_at is TIMESTAMP WITHOUT TIME ZONE and must be TIMESTAMP WITH TIME ZONE" in message


def test_a_property_with_another_columns_name_is_refused(warehouse: Warehouse) -> None:
    """Of a result column, whatever its case, or of the key."""
    for name in ("Status", "id"):
        schema = {"type": "object", "properties": {name: {"type": "string"}}}
        report = warehouse.submit(items("lamp"), output_schema=schema, run_id=name)
        with pytest.raises(TableError, match=f"The property {name} of output_schema has the name of another column"):
            warehouse.fetch(report.batch_ids)


def test_batches_of_different_schemas_do_not_land_together(warehouse: Warehouse) -> None:
    """Nor do those of a schema and plain text; each lands by itself."""
    other = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    ids = [
        *warehouse.submit(items("lamp"), output_schema=SCHEMA, run_id="run-1").batch_ids,
        *warehouse.submit(items("lamp"), output_schema=other, run_id="run-2").batch_ids,
        *warehouse.submit(items("lamp"), run_id="run-3").batch_ids,
    ]
    for pair in (ids[:2], ids[1:]):
        with pytest.raises(BatchInputError, match="asked with different output schemas, or some with none"):
            warehouse.fetch(pair)
    for number, batch_id in enumerate(ids):
        assert warehouse.fetch([batch_id], f"t{number}").rows == 1


def test_a_schema_that_changes_within_a_run_is_not_mixed_with_the_first(warehouse: Warehouse, sim: Simulator) -> None:
    """What is in flight lands as it was asked; new rows under another schema are refused before anything is sent."""
    other = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    warehouse.submit(items("lamp"), output_schema=SCHEMA)
    report = warehouse.submit(items("lamp"), output_schema=other)
    assert report.asked == 0
    with pytest.raises(BatchInputError, match="another output_schema, and rows are left to ask"):
        warehouse.submit(items("lamp", "cup"), output_schema=other)
    assert sim.stats()["requests_accepted"] == 1
    assert warehouse.fetch(report.batch_ids).counts == {"succeeded": 1}
    assert typed(warehouse)[0]["stock"] is not None


def test_a_changed_schema_is_a_changed_request(warehouse: Warehouse) -> None:
    """``skip_unchanged`` asks again when only a bound of the schema changed, and does not when nothing did."""
    closer = json.loads(json.dumps(SCHEMA))
    closer["properties"]["stock"]["minimum"] = 0
    for run, schema, asked in (("run-1", SCHEMA, 1), ("run-2", SCHEMA, 0), ("run-3", closer, 1)):
        report = warehouse.submit(items("lamp"), output_schema=schema, run_id=run, skip_unchanged=True)
        assert report.asked == asked
        warehouse.fetch(report.batch_ids)


def test_answers_that_do_not_fit_are_asked_again_by_the_next_run(warehouse: Warehouse) -> None:
    """They are no answers to ``skip_unchanged``."""
    rows = items("lamp", "[[sim:invalid-output-once]]")
    warehouse.fetch(warehouse.submit(rows, output_schema=SCHEMA).batch_ids)
    report = warehouse.submit(rows, output_schema=SCHEMA, run_id="run-2", skip_unchanged=True)
    assert (report.asked, report.unchanged) == (1, 1)
    warehouse.fetch(report.batch_ids)
    assert {row["status"] for row in typed(warehouse)} == {"succeeded"}


def test_a_format_of_the_params_beside_a_schema_is_refused(warehouse: Warehouse, sim: Simulator) -> None:
    """Two schemas for one answer; nothing is sent."""
    params = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    with pytest.raises(RequestError, match="leave one of them out"):
        warehouse.submit(items("lamp"), output_schema=SCHEMA, params=params)
    assert sim.stats()["posts"] == 0


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_pydantic_model_in_a_dag(
    airflow_db: Path, request: pytest.FixtureRequest, sim: Simulator, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """From the model's class in the DAG file to typed columns; the key's clash with a property is found before anything is sent."""
    database: Database = request.getfixturevalue(kind)
    monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection(sim.base_url))
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", database.airflow_uri)
    with database.engine().begin() as connection:
        connection.exec_driver_sql("CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT)")
        connection.exec_driver_sql("INSERT INTO products VALUES (1, 'lamp'), (2, 'a [[sim:invalid-output]]')")
    body = """
        import datetime
        from pydantic import BaseModel, Field

        class Label(BaseModel):
            {field}: str = Field(max_length=100)
            score: float
            since: datetime.date | None = None

        submit = SubmitBatchOperator(
            task_id="submit", sql="SELECT id, name FROM products", key="id", prompt="Label {{{{ row.name }}}}", model="claude-haiku-5-5",
            max_tokens=100, output_schema=Label, sql_conn_id="warehouse",
        )
        wait = BatchSensor(task_id="wait", batch_id=submit.output, poke_interval=1)
        fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="labels", sql_conn_id="warehouse")
        wait >> fetch
    """
    run = run_dag(airflow_db, body.format(field="label"))
    assert run.state == "success"
    assert run.xcom("fetch")["counts"] == {"succeeded": 1, "invalid_output": 1}
    with database.engine().connect() as connection:
        good, bad = connection.exec_driver_sql("SELECT id, label, score, status, response FROM labels ORDER BY id").all()
    answer = json.loads(good.response)
    assert (good.label, good.score, good.status) == (answer["label"], answer["score"], "succeeded")
    assert (bad.label, bad.score, bad.status) == (None, None, "invalid_output")
    posts = sim.stats()["posts"]
    assert run_dag(airflow_db, body.format(field="id")).states()["submit"] == "failed"
    assert sim.stats()["posts"] == posts

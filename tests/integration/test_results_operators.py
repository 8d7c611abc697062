"""The operators with their results in one database, their rows from another, and the ledger in a third."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from airflow.providers.common.compat.sdk import AirflowFailException, TaskDeferred

from airflow_provider_batchkit.simulator import SimulatorProcess
from tests.databases import Database, rows, sqlite_database
from tests.integration.test_fetch_operator import SOURCE, Task, fetch, fill, submit

duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
pytest.importorskip("airflow.providers.duckdb.hooks.duckdb", reason="apache-airflow-providers-duckdb is not installed")


@pytest.fixture
def file(airflow_db: Path, api: SimulatorProcess, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DuckDB file behind ``results``, rows behind ``source``, and the ledger, as the deployment says, behind ``ledger``."""
    path = tmp_path / "results.duckdb"
    monkeypatch.setenv("AIRFLOW_CONN_RESULTS", f"duckdb://{quote(str(path), safe='')}")
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", sqlite_database(tmp_path / "source.db").airflow_uri)
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER", database.airflow_uri)
    monkeypatch.setenv("AIRFLOW__BATCHKIT__LEDGER_CONN_ID", "ledger")
    fill(sqlite_database(tmp_path / "source.db"), 3)
    return path


ELSEWHERE: dict[str, Any] = {"sql_conn_id": "results", "source_conn_id": "source"}


def found(file: Path, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(file)) as connection:
        rows: list[tuple[Any, ...]] = connection.execute(sql).fetchall()
        return rows


def run(**parameters: Any) -> Task:
    from airflow_provider_batchkit.operators.batch import RunBatchOperator

    return Task(RunBatchOperator, "run", **{**SOURCE, **ELSEWHERE, "table": "answers", **parameters})


def asked(api: SimulatorProcess) -> int:
    return len(api.stats()["batches"])


def test_rows_answers_and_ledger_may_each_have_a_database(file: Path, database: Database) -> None:
    """Submit and fetch; a cleared fetch writes nothing again."""
    ids = submit(**ELSEWHERE, table="answers").run()
    for _ in range(2):
        summary = fetch(ids, sql_conn_id="results").run()
        assert (summary["rows"], summary["counts"], summary["table"]) == (3, {"succeeded": 3}, "answers")
    assert found(file, "SELECT id, status FROM answers ORDER BY id") == [(i, "succeeded") for i in range(3)]


def test_run_lands_there_too_in_rounds(file: Path, database: Database, api: SimulatorProcess, tmp_path: Path) -> None:
    """What failed in the first round is asked again, and its row comes beside the others."""
    source = sqlite_database(tmp_path / "source.db")
    with source.engine().begin() as connection:
        # one simulator serves all tests, and lets a prompt expire once
        connection.exec_driver_sql(f"UPDATE things SET note = 'late {database.kind} [[sim:expired-once]]' WHERE id = 1")
    summary = run(max_rounds=2).run()
    assert not isinstance(summary, TaskDeferred)
    assert summary["counts"] == {"succeeded": 3}
    assert [r["counts"] for r in summary["rounds"]] == [{"expired": 1, "succeeded": 2}, {"succeeded": 1}]
    assert found(file, "SELECT id, status, round FROM answers ORDER BY id") == [
        (0, "succeeded", 1),
        (1, "succeeded", 2),
        (2, "succeeded", 1),
    ]


def test_skip_unchanged_knows_the_table_by_its_connection(file: Path, api: SimulatorProcess) -> None:
    """An answer in a table of the same name elsewhere does not count."""
    ids = submit(**ELSEWHERE, table="answers", skip_unchanged=True).run()
    fetch(ids, sql_conn_id="results").run()
    before = asked(api)
    again = submit(**ELSEWHERE, table="main.answers", skip_unchanged=True, run_id="next", on_empty="succeed").run()
    assert (again, asked(api)) == ([], before)
    assert submit(**{**ELSEWHERE, "sql_conn_id": "source"}, table="answers", skip_unchanged=True, run_id="third").run()


TABLES = {
    "lacks the columns response": "id INTEGER, status VARCHAR, custom_id VARCHAR, batch_id VARCHAR",
    "id is VARCHAR and must be BIGINT": "id VARCHAR, response VARCHAR, status VARCHAR, custom_id VARCHAR, batch_id VARCHAR",
    "NOT NULL columns without a default that a landing does not write.*: owner": "id BIGINT, owner VARCHAR NOT NULL, response VARCHAR, "
    "status VARCHAR, custom_id VARCHAR, batch_id VARCHAR",
    r"cost_usd is DECIMAL\(10,2\)": "id BIGINT, response VARCHAR, status VARCHAR, custom_id VARCHAR, batch_id VARCHAR, "
    "cost_usd DECIMAL(10,2)",
    "response is INTEGER and must be VARCHAR": "id BIGINT, response INTEGER, status VARCHAR, custom_id VARCHAR, batch_id VARCHAR",
}


@pytest.mark.parametrize("says", TABLES)
@pytest.mark.parametrize("task", [run, lambda: submit(**ELSEWHERE, table="answers")], ids=["run", "submit"])
def test_a_table_that_does_not_fit_is_refused_before_anything_is_paid(file: Path, api: SimulatorProcess, task: Any, says: str) -> None:
    """Where the task knows the table."""
    found(file, f"CREATE TABLE answers ({TABLES[says]})")
    before = asked(api)
    with pytest.raises(AirflowFailException, match=says):
        task().run()
    assert asked(api) == before


def test_a_view_is_refused(file: Path, api: SimulatorProcess) -> None:
    """Nothing can be merged into it."""
    found(file, "CREATE VIEW answers AS SELECT 1 AS id")
    with pytest.raises(AirflowFailException, match="is a view"):
        run().run()


def test_a_database_in_memory_is_refused(file: Path, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers would be gone with the task."""
    monkeypatch.setenv("AIRFLOW_CONN_RESULTS", "duckdb://")
    before = asked(api)
    with pytest.raises(AirflowFailException, match="DuckDB in memory"):
        run().run()
    assert asked(api) == before


@pytest.mark.parametrize("name", ["TrinoHook", "DatabricksSqlHook"])
def test_another_database_is_refused_by_name_and_files_are_named_as_the_way(
    file: Path, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before anything is read or paid."""
    from airflow.providers.common.sql.hooks.sql import DbApiHook

    hook = type(name, (DbApiHook,), {"conn_name_attr": "conn_id"})
    from airflow_provider_batchkit.hooks import sql

    real = sql._hook_of
    monkeypatch.setattr(sql, "_hook_of", lambda c: hook() if c.conn_id == "results" else real(c))
    before = asked(api)
    with pytest.raises(AirflowFailException, match=rf"{name}.*Snowflake.*output_path.*Nothing was read or sent"):
        run().run()
    with pytest.raises(AirflowFailException, match=name):
        fetch(["msgbatch_1"], sql_conn_id="results").run()
    assert asked(api) == before


def test_a_file_that_another_process_has_is_waited_for_and_then_worth_a_retry(
    file: Path, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DuckDB lets one process write at a time, and a stopped one keeps its lock."""
    import subprocess
    import sys

    from airflow.providers.common.compat.sdk import AirflowException

    from airflow_provider_batchkit.landing.warehouse import duckdb as adapter

    ids = submit(**ELSEWHERE, table="answers").run()
    monkeypatch.setattr(adapter, "OPEN_S", 1.0)
    code = f"import duckdb, sys; c = duckdb.connect({str(file)!r}); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(AirflowException, match=r"cannot be opened.*Another process has it") as caught:
            fetch(ids, sql_conn_id="results").run()
        assert not isinstance(caught.value, AirflowFailException)
        other.stdin.close()
    assert fetch(ids, sql_conn_id="results").run()["rows"] == 3


def test_a_turn_that_a_dead_worker_took_is_waited_for_without_a_worker_slot(
    file: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its load was never published. The task waits until the turn is over, and lands then; what it had staged goes."""
    from airflow_provider_batchkit.landing import elsewhere
    from airflow_provider_batchkit.ledger import Ledger

    fetch(submit(**ELSEWHERE, table="answers").run(), sql_conn_id="results").run()
    ledger = Ledger(database.engine())
    ((name,),) = rows(database, "SELECT DISTINCT table_name FROM batchkit_load")
    dead = ledger.open_load("f" * 32, name, "0190a000-0000-7000-8000-000000000000")
    assert ledger.take_turn(dead, 90.0) is not None
    monkeypatch.setattr(elsewhere, "PATIENCE_S", 0.2)

    task = fetch(submit(**ELSEWHERE, table="answers", run_id="next").run(), sql_conn_id="results", run_id="next")
    waits = task.run()
    assert isinstance(waits, TaskDeferred)
    assert waits.trigger.batch_ids == []
    assert task.pushed["waits_for"]["about"] == "turn"
    assert found(file, "SELECT count(DISTINCT batch_id) FROM answers") == [(1,)]

    with database.engine().begin() as connection:
        connection.exec_driver_sql("UPDATE batchkit_turn SET until = '2020-01-01 00:00:00'")
    summary = task.go_on(waits)
    assert summary["rows"] == 3
    assert found(file, "SELECT count(*), count(DISTINCT batch_id) FROM answers") == [(3, 1)]
    assert found(file, "SELECT table_name FROM duckdb_tables() WHERE table_name LIKE 'batchkit_stage%'") == []


@pytest.mark.parametrize("client", ["mysqlclient", "mysql-connector-python"])
def test_each_client_of_the_mysql_hook_lands(
    file: Path, mariadb_port: int, monkeypatch: pytest.MonkeyPatch, client: str, api: SimulatorProcess
) -> None:
    """A real MariaDB behind Airflow's own hook, whose connections have two clients; keys that differ in case alone are two rows."""
    pytest.importorskip("airflow.providers.mysql.hooks.mysql", reason="apache-airflow-providers-mysql is not installed")
    import pymysql

    name = f"test_{secrets.token_hex(6)}"
    with pymysql.connect(host="127.0.0.1", port=mariadb_port, user="root") as admin:
        admin.cursor().execute(f"CREATE DATABASE {name}")
    extra = quote(f'{{"client": "{client}"}}')
    monkeypatch.setenv("AIRFLOW_CONN_RESULTS", f"mysql://root:@127.0.0.1:{mariadb_port}/{name}?__extra__={extra}")
    sql = "SELECT CASE id WHEN 0 THEN 'abc' WHEN 1 THEN 'ABC' ELSE 'abc ' END AS id, note FROM things"
    for run_id in ("r", "next"):
        summary = run(sql=sql, run_id=run_id, prompt="{{ row.note }} " + run_id).run()
        assert summary["counts"] == {"succeeded": 3}
    with pymysql.connect(host="127.0.0.1", port=mariadb_port, user="root", database=name) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT id, COUNT(*) FROM answers GROUP BY id")
        assert sorted(cursor.fetchall()) == [("ABC", 1), ("abc", 1), ("abc ", 1)]

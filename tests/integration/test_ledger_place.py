"""Where the ledger lies: beside the results, in a database of its own, or in a schema of its own, and what is refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import AirflowFailException

from airflow_provider_batchkit.simulator import SimulatorProcess
from tests.databases import Database, rows, sqlite_database
from tests.integration.test_fetch_operator import Task, fetch, fill, submit


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """A second, empty database behind the connection ``ledger``."""
    found = sqlite_database(tmp_path / "ledger.db")
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER", found.airflow_uri)
    return found


def tables(database: Database) -> set[str]:
    import sqlalchemy as sa

    return set(sa.inspect(database.engine()).get_table_names())


def asked(api: SimulatorProcess) -> int:
    return len(api.stats()["batches"])


@pytest.mark.parametrize("by", ["parameter", "configuration"])
def test_the_ledger_lies_where_the_task_or_the_deployment_says(
    home: Path, database: Database, other: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """The source's database holds no table of the ledger then."""
    fill(database, 2)
    if by == "configuration":
        monkeypatch.setenv("AIRFLOW__BATCHKIT__LEDGER_CONN_ID", "ledger")
    submit(**({"ledger_conn_id": "ledger"} if by == "parameter" else {})).run()
    assert "batchkit_job" in tables(other)
    assert tables(database) == {"things"}


def test_a_database_that_cannot_hold_a_ledger_is_refused_before_anything_is_read(
    home: Path, api: SimulatorProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names what to set."""
    pytest.importorskip("airflow.providers.duckdb.hooks.duckdb", reason="apache-airflow-providers-duckdb is not installed")
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", f"duckdb:///{tmp_path}/warehouse.duckdb")
    before = asked(api)
    with pytest.raises(AirflowFailException, match=r"DuckDBHook.*ledger_conn_id.*\[batchkit\] ledger_conn_id.*Nothing was read"):
        submit().run()
    assert asked(api) == before
    assert not (tmp_path / "warehouse.duckdb").exists()


def test_a_ledger_that_was_left_behind_is_found_before_its_rows_are_bought_again(
    home: Path, database: Database, other: Database, api: SimulatorProcess
) -> None:
    """A changed setting finds an empty ledger. The task fails, says how to move the old one, and goes on once it is moved."""
    fill(database, 2)
    submit().run()
    before = asked(api)
    with pytest.raises(AirflowFailException, match=r"knows no job of d\.submit.*'warehouse' has 1.*Move its tables"):
        submit(ledger_conn_id="ledger").run()
    with pytest.raises(AirflowFailException, match="has 1 of them"):
        submit(ledger_conn_id="ledger", run_id="next").run()
    assert asked(api) == before


def test_a_ledger_that_was_moved_is_gone_on_with(
    home: Path, sqlite: Database, other: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same job has the same batches, and nothing is bought again."""
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", sqlite.airflow_uri)
    fill(sqlite, 2)
    ids = submit().run()
    before = asked(api)
    with sqlite3.connect(sqlite.url.removeprefix("sqlite:///")) as old, sqlite3.connect(other.url.removeprefix("sqlite:///")) as new:
        new.executescript("\n".join(line for line in old.iterdump() if "things" not in line))
    assert submit(ledger_conn_id="ledger").run() == ids
    assert asked(api) == before


def test_a_batch_of_another_ledger_is_not_landed_as_a_strangers(home: Path, database: Database, other: Database) -> None:
    """Its custom_ids say that this package sent it: by custom_id its rows would have no key."""
    fill(database, 2)
    ids = submit(ledger_conn_id="ledger").run()
    with pytest.raises(AirflowFailException, match=r"no row of this ledger has it.*ledger_conn_id"):
        fetch(ids).run()
    assert "answers" not in tables(database) or rows(database, "SELECT * FROM answers") == []


@pytest.mark.parametrize("executor", ["CeleryExecutor", "kubernetes:my.module.KubernetesExecutor", "CeleryExecutor,LocalExecutor"])
def test_a_sqlite_ledger_is_refused_where_tasks_run_on_several_machines(
    home: Path, other: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch, executor: str
) -> None:
    """Each machine would have a file of its own, and buy what another one has sent."""
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", executor)
    with pytest.raises(AirflowFailException, match=r"SQLite file.*(Celery|Kubernetes)Executor runs tasks on several machines.*PostgreSQL"):
        submit(ledger_conn_id="ledger").run()
    assert tables(other) == set()


@pytest.fixture
def in_postgres(airflow_db: Path, api: SimulatorProcess, postgres: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", postgres.airflow_uri)
    monkeypatch.setenv("AIRFLOW__BATCHKIT__LEDGER_SCHEMA", "books")
    fill(postgres, 3)
    return postgres


def execute(database: Database, sql: str) -> None:
    with database.engine().begin() as connection:
        connection.exec_driver_sql(sql)


def test_a_schema_of_its_own_holds_the_ledger_and_nothing_else(in_postgres: Database) -> None:
    """Results land where the connection creates tables, in one transaction with the ledger."""
    execute(in_postgres, "CREATE SCHEMA books")
    ids = submit().run()
    assert fetch(ids).run()["rows"] == 3
    found = rows(in_postgres, "SELECT table_schema, table_name FROM information_schema.tables WHERE table_schema IN ('public', 'books')")
    assert {name for schema, name in found if schema == "public"} == {"things", "answers"}
    assert {"batchkit_job", "batchkit_landing", "batchkit_spend"} <= {name for schema, name in found if schema == "books"}
    assert rows(in_postgres, "SELECT table_name FROM books.batchkit_landing") == [("public.answers",)]


def test_a_schema_that_is_missing_is_named(in_postgres: Database, api: SimulatorProcess) -> None:
    """Nobody creates schemas behind an administrator's back."""
    before = asked(api)
    with pytest.raises(AirflowFailException, match=r"ledger_schema is 'books'.*no such schema"):
        submit().run()
    assert asked(api) == before


def test_a_ledger_in_the_schema_before_is_found(in_postgres: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of other tasks, which would hide the one in the new schema."""
    execute(in_postgres, "CREATE SCHEMA books")
    monkeypatch.delenv("AIRFLOW__BATCHKIT__LEDGER_SCHEMA")
    submit().run()
    monkeypatch.setenv("AIRFLOW__BATCHKIT__LEDGER_SCHEMA", "books")
    before = asked(api)
    with pytest.raises(AirflowFailException, match="SET SCHEMA books"):
        other_task("another").run()
    assert asked(api) == before
    names = rows(in_postgres, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename LIKE 'batchkit%%'")
    for (name,) in names:
        execute(in_postgres, f"ALTER TABLE {name} SET SCHEMA books")
    assert other_task("another").run()


def other_task(task_id: str) -> Task:
    from airflow_provider_batchkit.operators.batch import SubmitBatchOperator
    from tests.integration.test_fetch_operator import SOURCE

    parameters: dict[str, Any] = {**SOURCE}
    return Task(SubmitBatchOperator, task_id, **parameters)


def test_sqlite_has_no_schema_for_a_ledger(home: Path, sqlite: Database, other: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting is said to be wrong there, and not passed over."""
    monkeypatch.setenv("AIRFLOW__BATCHKIT__LEDGER_SCHEMA", "books")
    with pytest.raises(AirflowFailException, match="SQLite file, which has no schemas"):
        submit(ledger_conn_id="ledger").run()

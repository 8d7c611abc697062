"""Every connection is the hook's own: what its extra says counts for sources, the ledger and results, and any hook's rows can be read."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytest
from airflow.providers.common.compat.sdk import AirflowFailException, BaseHook
from airflow.providers.common.sql.hooks.sql import DbApiHook

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.hooks.sql import open_connection, sql_engine
from airflow_provider_batchkit.simulator import SimulatorProcess
from airflow_provider_batchkit.source.sql import read_sql
from tests.databases import Database, opener, rows
from tests.integration.test_fetch_operator import fetch, fill, submit
from tests.results import mysql_client

DRIVERS = ["psycopg", "psycopg2"]


def with_extra(database: Database, **extra: Any) -> str:
    """The database's Airflow connection, with an extra."""
    return f"{database.airflow_uri}?__extra__={quote(json.dumps(extra))}"


@pytest.fixture
def ours(airflow_db: Path, api: SimulatorProcess, sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    """A SQLite warehouse behind the connection ``warehouse``."""
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", sqlite.airflow_uri)
    return sqlite


@pytest.mark.parametrize("where", ["in the extra", "for the hook's engines"])
@pytest.mark.parametrize("what", ["source", "ledger and results"])
def test_no_row_goes_over_a_connection_that_must_be_encrypted_and_is_not(
    ours: Database, postgres: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch, what: str, where: str
) -> None:
    """The server speaks no TLS, and the connection's extra asks for it: the hook refuses the server, and so do we."""
    fill(postgres, 2)
    tls = {"sslmode": "verify-full", "sslrootcert": "system"}
    monkeypatch.setenv("AIRFLOW_CONN_GUARDED", with_extra(postgres, **(tls if where == "in the extra" else {"sqlalchemy_query": tls})))
    before = len(api.stats()["batches"])
    with pytest.raises(Exception, match="server does not support SSL, but SSL was required"):
        submit(**({"source_conn_id": "guarded"} if what == "source" else {"sql_conn_id": "guarded"})).run()
    assert len(api.stats()["batches"]) == before
    assert rows(postgres, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == [("things",)]


@pytest.mark.parametrize("extra", [{"cursor": "dictcursor"}, {"autocommit": True}, {"sqlalchemy_scheme": "postgresql+psycopg2"}])
def test_an_extra_that_would_change_our_rows_or_transactions_does_not(
    ours: Database, postgres: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]
) -> None:
    """Rows as mappings, statements without a transaction, and a URL of another driver than the hook's connections."""
    fill(postgres, 3)
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", with_extra(postgres, **extra))
    assert fetch(submit().run()).run()["rows"] == 3
    with sql_engine("warehouse") as engine:
        with engine.connect() as connection:
            connection.exec_driver_sql("DELETE FROM things")
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM things").scalar_one() == 3


def test_a_corrected_source_is_read_at_once(ours: Database, api: SimulatorProcess) -> None:
    """A row was refused, and its error is still at hand, with all that it refers to: no cursor holds SQLite's file."""
    fill(ours, 1000)
    path = ours.url.removeprefix("sqlite:///")
    ids = "SELECT NULLIF(id, 3) AS id, note FROM things ORDER BY things.id"
    with pytest.raises(AirflowFailException, match="it is NULL") as refused:
        submit(sql=ids).run()
    with sqlite3.connect(path, timeout=0, isolation_level=None) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        writer.execute("DELETE FROM things WHERE id = 3")
        writer.execute("COMMIT")
    assert len(submit().run()) == 1
    assert "Nothing was sent" in str(refused.value)


def memory() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("driver", DRIVERS)
def test_rows_stay_in_postgresql_until_they_are_fetched(postgres: Database, driver: str) -> None:
    """Of 100,000 rows of a kilobyte few are in memory, and the server shows the named cursor."""
    import sqlalchemy as sa

    engine = sa.create_engine(postgres.url.replace("+psycopg", f"+{driver}"), poolclass=sa.pool.NullPool)
    sql = "SELECT i, repeat('x', 1000) AS text FROM generate_series(1, 100000) AS i"
    found = read_sql(opener(engine), sql)
    count = len(next(found))
    before = peak = memory()
    for chunk in found:
        count += len(chunk)
        peak = max(peak, memory())
    assert count == 100_000
    assert peak - before < 20_000_000
    half = read_sql(opener(engine), sql)
    next(half)
    assert ours_in(postgres) == 1
    half.close()
    assert ours_in(postgres) == 0


def ours_in(postgres: Database) -> int:
    """Sessions of the server that fetch from our cursor; one that was closed may take a moment to end."""
    import time

    for _ in range(50):
        ((count,),) = rows(postgres, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'FETCH %%batchkit_source%%'")
        if count != 0:
            break
        time.sleep(0.02)
    return int(count)


def test_a_duckdb_file_is_a_source(ours: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no dialect of SQLAlchemy. Its types tell the keys' where the values tell less."""
    duckdb = pytest.importorskip("duckdb", reason="apache-airflow-providers-duckdb is not installed")
    path = tmp_path / "source.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE things AS SELECT i::DECIMAL(9, 2) / 4 AS id, 'thing ' || i AS note FROM range(3) AS r(i)")
        connection.execute("ALTER TABLE things ALTER id TYPE DECIMAL(9, 2)")
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", f"duckdb://{quote(str(path), safe='')}")
    ids = submit(source_conn_id="lake", sql="SELECT id, note FROM things WHERE id < ? ORDER BY id", parameters=[0.5]).run()
    assert fetch(ids).run()["rows"] == 2
    ((told,),) = rows(ours, "SELECT key_columns FROM batchkit_job")
    assert "numeric(9,2)" in told
    # nothing holds the file
    with duckdb.connect(str(path), read_only=False) as connection:
        connection.execute("DROP TABLE things")


class TinyHook(DbApiHook):
    """A hook of a user's own: no URL, no dialect, and no more than PEP 249."""

    conn_name_attr = "tiny_conn_id"
    conn_type = "tiny"
    connection_class: type[sqlite3.Connection] = sqlite3.Connection

    def get_conn(self) -> Any:
        connection = sqlite3.connect(self.get_connection(self.get_conn_id()).host, factory=self.connection_class)
        connection.row_factory = self.row_factory
        return connection

    row_factory: Callable[..., Any] | None = None

    def get_uri(self) -> str:
        raise NotImplementedError


def as_mapping(cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> dict[str, Any]:
    return {column[0]: value for column, value in zip(cursor.description, row, strict=True)}


@pytest.mark.parametrize("row_factory", [None, sqlite3.Row, as_mapping])
def test_any_hook_with_a_connection_is_a_source(
    ours: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_factory: Callable[..., Any] | None
) -> None:
    """Rows as tuples, as a driver's own class, or as mappings."""
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.executescript("CREATE TABLE things (id INTEGER, note TEXT); INSERT INTO things VALUES (1, 'tea'), (2, 'coffee 100%')")
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", f"tiny://{quote(str(path), safe='')}")
    kind = type(BaseHook.get_connection("other"))
    usual: Any = kind.get_hook
    monkeypatch.setattr(TinyHook, "row_factory", staticmethod(row_factory) if row_factory is not None else None)
    monkeypatch.setattr(kind, "get_hook", lambda c, **_: cast("Any", TinyHook)(tiny_conn_id="other") if c.conn_type == "tiny" else usual(c))
    read = [row for chunk in read_sql(lambda: open_connection("other"), "SELECT * FROM things WHERE note LIKE '%e%'") for row in chunk]
    assert read == [{"id": 1, "note": "tea"}, {"id": 2, "note": "coffee 100%"}]
    with pytest.raises(BatchInputError, match="more than one column named id; give them aliases"):
        next(read_sql(lambda: open_connection("other"), "SELECT id, note, id FROM things"))
    with pytest.raises(BatchInputError, match="returns no rows: it must be a SELECT"):
        next(read_sql(lambda: open_connection("other"), "DELETE FROM things"))
    assert fetch(submit(source_conn_id="other").run()).run()["rows"] == 2


@pytest.mark.parametrize("name", ["plain.db", "a #1.db"])
def test_a_sqlite_connection_means_the_file_that_it_has_always_meant(
    ours: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A ledger that is looked for in another file would buy its rows again. The hook's own connections leave out what follows a ``#``."""
    path = tmp_path / name
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", f"sqlite://{quote(str(path), safe='')}")
    with sqlite3.connect(path) as connection:
        connection.executescript("CREATE TABLE things (id INTEGER, note TEXT); INSERT INTO things VALUES (1, 'tea')")
    assert fetch(submit().run()).run()["rows"] == 1
    assert [found.name for found in tmp_path.iterdir()] == [name]


def test_an_option_of_a_sqlite_connection_counts(ours: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that may only be read is one."""
    fill(ours, 1)
    monkeypatch.setenv("AIRFLOW_CONN_ONLY", f"{ours.airflow_uri}?mode=ro")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        open_connection("only").execute("DELETE FROM things")
    assert len(submit(source_conn_id="only").run()) == 1


@pytest.mark.parametrize("client", ["pymysql", "mysqlclient", "connector"])
def test_rows_of_mysql_stay_in_the_server_until_they_are_fetched(mariadb_port: int, client: str) -> None:
    """A source that is given up is not read to its end: its connection is closed, and the server stops."""
    import time

    connect = mysql_client(client, mariadb_port)
    sql = "SELECT seq AS id, REPEAT('x', 1000) AS note FROM seq_1_to_100000 WHERE seq % 2 = 0 OR seq > 0"
    found = read_sql(connect, sql)
    count = len(next(found))
    before = peak = memory()
    for chunk in found:
        count += len(chunk)
        peak = max(peak, memory())
    assert count == 100_000
    assert peak - before < 20_000_000
    half = read_sql(connect, sql.replace("100000", "10000000"))
    assert next(half)[0] == {"id": 1, "note": "x" * 1000}
    started = time.monotonic()
    half.close()
    assert time.monotonic() - started < 5
    for row in read_sql(connect, "SELECT CAST(7.50 AS DECIMAL(5, 2)) AS id, 'a' AS note WHERE 'a' LIKE %s", ["%"]):
        assert [str(value) for value in row[0].values()] == ["7.50", "a"]

"""Databases for results apart from the ledger's: each has its adapter, and can be queried by a test."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.landing import Warehouse
from airflow_provider_batchkit.landing.warehouse import warehouse_of

#: every database and driver in which results can land
RESULTS = (
    *("sqlite", "postgres-psycopg3", "postgres-psycopg2", "duckdb"),
    *("mysql-pymysql", "mysql-mysqlclient", "mysql-connector", "snowflake"),
)


class Results:
    """A database of results."""

    def __init__(self, kind: str, connect: Callable[[], Any]) -> None:
        self.kind = kind.partition("-")[0]
        self.connect = connect
        self.adapter: Warehouse = warehouse_of(self.kind, "results", connect)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        with self.adapter.open() as connection:
            return self.adapter.rows(connection, sql)

    def run(self, *statements: str) -> None:
        """Run statements."""
        with self.adapter.open() as connection, self._together(connection):
            for statement in statements:
                self.adapter.run(connection, statement)

    def _together(self, connection: Any) -> contextlib.AbstractContextManager[None]:
        # each DDL statement is a transaction of its own in Snowflake
        return contextlib.nullcontext() if self.kind == "snowflake" else self.adapter.transaction(connection)

    def tables(self) -> set[str]:
        """Names of its tables."""
        if self.kind == "sqlite":
            return {name for (name,) in self.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if self.kind == "snowflake":
            return {name.lower() for (name,) in self.rows("SELECT table_name FROM information_schema.tables")}
        here = {"mysql": " WHERE table_schema = DATABASE()"}.get(self.kind, "")
        return {name for (name,) in self.rows(f"SELECT table_name FROM information_schema.tables{here}")}


@contextlib.contextmanager
def results_in(kind: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[Results]:
    """An empty database of results; where it is not available, the test is skipped and names it."""
    match kind:
        case "sqlite":
            yield Results(kind, lambda: sqlite3.connect(folder / "results.db"))
        case "duckdb":
            duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
            yield Results(kind, lambda: duckdb.connect(str(folder / "results.duckdb")))
        case "postgres-psycopg3" | "postgres-psycopg2":
            import importlib

            url = sa.make_url(request.getfixturevalue("postgres").url)
            driver = importlib.import_module("psycopg" if kind.endswith("3") else "psycopg2")
            plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
            yield Results(kind, lambda: driver.connect(plain))
        case "mysql-pymysql" | "mysql-mysqlclient" | "mysql-connector":
            yield Results(kind, mysql_client(kind.partition("-")[2], request.getfixturevalue("mariadb_port")))
        case "snowflake":
            yield Results(kind, fakesnow_connect())
        case _:
            raise ValueError(kind)


def mysql_client(client: str, port: int) -> Callable[[], Any]:
    """A function that connects to a new database of the MariaDB server, with one of the clients that MySqlHook may use."""
    module = {"pymysql": "pymysql", "mysqlclient": "MySQLdb", "connector": "mysql.connector"}[client]
    driver = pytest.importorskip(module, reason=f"{client} is not installed")
    name = f"test_{secrets.token_hex(6)}"
    with (
        contextlib.closing(driver.connect(host="127.0.0.1", port=port, user="root")) as admin,
        contextlib.closing(admin.cursor()) as cursor,
    ):
        cursor.execute(f"CREATE DATABASE {name}")
    return lambda: driver.connect(host="127.0.0.1", port=port, user="root", database=name)


def fakesnow_connect(**how: Any) -> Callable[[], Any]:
    """A function that connects to a new account of fakesnow, an emulation of Snowflake's connector on DuckDB.

    It has the connector's errors, PUT, stages, COPY and the information schema. It has no locks that wait, no roles and no collations,
    enforces keys, and knows no session parameter but AUTOCOMMIT.
    """
    instance = pytest.importorskip("fakesnow.instance", reason="fakesnow is not installed: make test-snowflake installs it")
    account = instance.FakeSnow(nop_regexes=[r"ALTER SESSION SET (?!AUTOCOMMIT)"])
    return lambda: account.connect(**(how or {"database": "LAKE", "schema": "SHOP"}))

"""Connections of Airflow's SQL hooks, and SQLAlchemy engines on them.

A hook makes its engine from its URL, which leaves out most of a connection's extra, such as ``sslmode``. So our engines use the connections
that the hook opens, and their URL names only the dialect.

Operators import this module when a DAG file is parsed, so SQLAlchemy and the hooks are imported only where an engine is made.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowException, BaseHook, Connection

from airflow_provider_batchkit.exceptions import BatchInputError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

#: connection type → the extra of this package that installs its hook
_EXTRAS = {"duckdb": "duckdb", "mysql": "mysql", "postgres": "postgres", "snowflake": "snowflake", "sqlite": "sqlite"}
#: class name of a hook → the kind of its database; a user's own hook may derive from one of these classes
KINDS = {"PostgresHook": "postgres", "SqliteHook": "sqlite", "DuckDBHook": "duckdb", "MySqlHook": "mysql", "SnowflakeHook": "snowflake"}


@contextmanager
def sql_engine(conn_id: str) -> Iterator[Engine]:
    """A SQLAlchemy engine on a SQL connection. It keeps one connection open between uses, and checks that it is alive before each use.
    After the block all connections are closed.

    :raises BatchInputError: when the connection is not of a SQL database, or the provider of its type is not installed
    """
    from sqlalchemy.pool import QueuePool

    from airflow_provider_batchkit.ledger import prepare_engine

    hook, kind = hook_named(conn_id)
    engine = prepare_engine(make_engine(hook, kind, poolclass=QueuePool, pool_size=1, pool_pre_ping=True))
    try:
        yield engine
    finally:
        engine.dispose()


def make_engine(hook: Any, kind: str | None, **options: Any) -> Engine:
    """An engine on the connections of a hook.

    :param options: further options of SQLAlchemy's ``create_engine``
    """
    from sqlalchemy import URL, create_engine

    options["creator"] = partial(_connect, hook, kind)
    if kind != "postgres":
        engine: Engine = hook.get_sqlalchemy_engine(options)
        return engine
    # the hook's URL may name the other driver (by the extra sqlalchemy_scheme), so it does not tell which driver the hook uses
    from airflow.providers.postgres.hooks.postgres import USE_PSYCOPG3

    return create_engine(URL.create("postgresql+psycopg" if USE_PSYCOPG3 else "postgresql+psycopg2"), **options)


def open_connection(conn_id: str) -> Any:
    """A new PEP 249 connection, as the hook opens it. It waits for SQLite's locks, and uses UTF-8 with PostgreSQL.

    :raises BatchInputError: when the connection is not of a SQL database, or the provider of its type is not installed
    """
    from airflow_provider_batchkit.ledger import prepare_connection

    connection = _connect(*hook_named(conn_id))
    prepare_connection(connection)
    return connection


def _connect(hook: Any, kind: str | None) -> Any:
    if kind == "sqlite" and type(hook).get_conn.__qualname__ == "SqliteHook.get_conn":
        return _connect_sqlite(hook.get_uri())
    connection = hook.get_conn()
    if kind == "postgres":
        # the connection's extra may have set another row type than tuples, and autocommit
        if hasattr(connection, "row_factory"):
            from psycopg.rows import tuple_row

            connection.row_factory = tuple_row
        else:
            connection.cursor_factory = None
        if connection.autocommit:
            connection.autocommit = False
    return connection


def _connect_sqlite(uri: str) -> sqlite3.Connection:
    """A connection to the file that SqliteHook's engine opens, for use from any thread. The hook itself opens another file when the path
    has a ``#`` or ``%``, and none when it begins with two slashes.
    """
    from sqlalchemy import make_url

    url = make_url(uri)
    if url.query:
        return sqlite3.connect(uri.replace("sqlite:///", "file:", 1), uri=True, check_same_thread=False)
    return sqlite3.connect(url.database or ":memory:", check_same_thread=False)


def add_extra(hook: Any, extra: Mapping[str, Any]) -> None:
    """Add values to the extra of a hook's connection where it lacks them. Only the hook's own copy of the connection changes."""
    connection = hook.connection
    connection.extra = json.dumps({**extra, **connection.extra_dejson})


def hook_named(conn_id: str) -> tuple[Any, str | None]:
    """The hook of a SQL connection, and the kind of its database where this package knows one: see :data:`KINDS`.

    :raises BatchInputError: when the connection is not of a SQL database, or the provider of its type is not installed
    """
    from airflow.providers.common.sql.hooks.sql import DbApiHook

    connection = BaseHook.get_connection(conn_id)
    hook = _hook_of(connection)
    if not isinstance(hook, DbApiHook):
        raise BatchInputError(f"The connection {conn_id!r} is a {type(hook).__name__}, not a SQL database. Nothing was sent.")
    kind = next((KINDS[cls.__name__] for cls in type(hook).__mro__ if cls.__name__ in KINDS), None)
    if kind == "postgres" and connection.extra_dejson.get("redshift"):
        kind = None  # PostgresHook also connects to Redshift, which is another kind of database
    query = connection.extra_dejson.get("sqlalchemy_query") if kind == "postgres" else None
    if isinstance(query, dict):
        # the hook gives these options of the driver, such as TLS, to its engines only
        add_extra(hook, query)
    return hook, kind


def _hook_of(connection: Connection) -> Any:
    try:
        return connection.get_hook()
    except AirflowException as e:
        if not str(e).startswith("Unknown hook type"):
            raise
        kind = connection.conn_type
        package = f"airflow-provider-batchkit[{_EXTRAS[kind]}]" if kind in _EXTRAS else f"apache-airflow-providers-{kind}"
        raise BatchInputError(
            f"The connection {connection.conn_id!r} is of type {kind!r}, and no installed provider has a hook for it. Install "
            f"{'it' if kind in _EXTRAS else 'its provider, for most types'} with: pip install '{package}'. Nothing was sent."
        ) from e

"""SQLAlchemy engines and transactions that behave alike on every database."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from airflow_provider_batchkit.exceptions import LedgerError

log = logging.getLogger(__name__)

#: Milliseconds that one attempt waits for a lock; a writer makes several attempts, an hour in all. SQLite grants its lock in no fixed
#: order, and a landing of a million rows holds it for a minute.
_SQLITE_BUSY_MS = 120_000
_SQLITE_ATTEMPTS = 30
_BEGIN_OPTION = "batchkit_sqlite_begin"
_PREPARED = "_batchkit_prepared"
#: SQL for the current UTC time, whatever the session's time zone is. CURRENT_TIMESTAMP of MySQL and SQL Server is local time without zone.
_UTC_NOW = {
    "postgresql": "clock_timestamp()",
    "mysql": "UTC_TIMESTAMP(6)",
    "mariadb": "UTC_TIMESTAMP(6)",
    "mssql": "SYSUTCDATETIME()",
}
#: the greatest difference between this process's clock and the database's, the same as for the API's clock (SettleTimes.skew_s)
_CLOCKS_APART = timedelta(minutes=15)


class Part:
    """A part of the ledger, or of its reading side: methods that run their statements on one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine


def prepare_engine(engine: Engine) -> Engine:
    """Make a SQLite engine's transactions include DDL and wait for locks; make PostgreSQL's connections use UTF-8.

    Python's sqlite3 begins a transaction only before some statements and never around DDL, so this module sends ``BEGIN`` itself
    (SQLAlchemy documentation, "Serializable isolation / Savepoints / Transactional DDL" of the pysqlite dialect).
    """
    if getattr(engine, _PREPARED, False):
        return engine
    setattr(engine, _PREPARED, True)
    if engine.dialect.name == "postgresql":
        event.listen(engine, "connect", lambda dbapi_connection, _record: prepare_connection(dbapi_connection))
        engine.dispose()
    if engine.dialect.name != "sqlite":
        return engine

    def on_connect(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None
        prepare_connection(dbapi_connection)

    def on_begin(connection: Connection) -> None:
        if connection.get_execution_options().get(_BEGIN_OPTION) == "IMMEDIATE":
            _begin_immediate(connection)
        else:
            connection.exec_driver_sql("BEGIN DEFERRED")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    engine.dispose()
    return engine


def add_schema(engine: Engine, schema: str) -> None:
    """Append a schema to PostgreSQL's search_path. The connection's own schemas come first."""

    def on_connect(dbapi_connection: Any, _record: Any) -> None:
        with closing(dbapi_connection.cursor()) as cursor:
            # the names in the setting are quoted already
            cursor.execute("SELECT set_config('search_path', current_setting('search_path') || ', ' || quote_ident(%s), false)", (schema,))
        dbapi_connection.commit()

    event.listen(engine, "connect", on_connect)
    engine.dispose()


def prepare_connection(dbapi_connection: Any) -> None:
    """Make a driver's connection wait for SQLite's locks, or use UTF-8 with PostgreSQL. Connections to other databases stay as they are.

    PostgreSQL's drivers encode and decode texts by the connection's encoding, which may lack characters that the database has. The server
    converts between UTF-8 and the database's encoding. A database without an encoding (SQL_ASCII) converts nothing, so it stays as it is.
    """
    if isinstance(dbapi_connection, sqlite3.Connection):
        dbapi_connection.execute(f"PRAGMA busy_timeout = {_SQLITE_BUSY_MS}")
        return
    driver = type(dbapi_connection).__module__.partition(".")[0]
    if driver == "psycopg2":
        if dbapi_connection.encoding not in ("UTF8", "SQL_ASCII", "SQLASCII"):
            dbapi_connection.set_client_encoding("UTF8")
    elif driver == "psycopg" and dbapi_connection.info.encoding not in ("utf-8", "ascii"):
        dbapi_connection.execute("SET client_encoding TO 'UTF8'")
        dbapi_connection.commit()


@contextmanager
def write_transaction(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes: on SQLite it takes the write lock at once, so two writers queue instead of failing."""
    with engine.connect() as connection:
        connection = connection.execution_options(**{_BEGIN_OPTION: "IMMEDIATE"})
        with connection.begin():
            yield connection


def clock(connection: Connection) -> datetime:
    """The time by the database's own clock, which the workers of a deployment share. Aware, UTC.

    A SQLite database is read and written by one machine, so its clock is this process's.

    :raises LedgerError: when it is far from this process's clock: a batch would then be looked for at a wrong time and not be found
    """
    here = datetime.now(UTC)
    if connection.dialect.name == "sqlite":
        return here
    now: sa.ColumnClause[datetime] = sa.literal_column(_UTC_NOW.get(connection.dialect.name, "CURRENT_TIMESTAMP"))
    found: datetime = connection.execute(sa.select(sa.type_coerce(now, sa.DateTime(timezone=True)))).scalar_one()
    found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    if abs(found - here) > _CLOCKS_APART:
        raise LedgerError(
            f"The database's clock says {found:%Y-%m-%d %H:%M:%S} and this worker's {here:%Y-%m-%d %H:%M:%S}, both as UTC. Doubts about "
            "batches are settled by these times. Nothing was sent or changed. Set the clocks, or the session's time zone to UTC."
        )
    return found


def begin_writing(connection: Connection) -> None:
    """Take SQLite's write lock until the end of the transaction. Other databases lock rows, so nothing is done for them.

    SQLite does not let a transaction that has read wait for the write lock: it fails at once ("database is locked") while another
    connection writes, since the two may wait for each other. So the transaction ends here, and another one begins with the lock.
    The caller may have written to temporary tables only: they are kept, and they are all that is committed.
    """
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("COMMIT")
        _begin_immediate(connection)


def _begin_immediate(connection: Connection) -> None:
    """Begin a transaction that holds the write lock. Each of several attempts waits for the lock anew."""
    driver: Any = connection.connection.dbapi_connection
    dbapi: Any = connection.dialect.dbapi
    for attempt in range(1, _SQLITE_ATTEMPTS):
        try:
            driver.execute("BEGIN IMMEDIATE")
        except dbapi.OperationalError as e:
            if "locked" not in str(e):
                raise
            log.info(
                "Other connections write to %s; %s s have been waited for it", connection.engine.url, attempt * _SQLITE_BUSY_MS // 1000
            )
        else:
            return
    # SQLAlchemy reports an error of the last attempt
    connection.exec_driver_sql("BEGIN IMMEDIATE")

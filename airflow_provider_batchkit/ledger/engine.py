"""A SQLAlchemy engine whose transactions mean what they say on every database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

_SQLITE_BUSY_MS = 120_000
_BEGIN_OPTION = "batchkit_sqlite_begin"
_PREPARED = "_batchkit_prepared"


def prepare_engine(engine: Engine) -> Engine:
    """Make a SQLite engine's transactions real, including DDL, and let it wait for locks; others are returned as they are.

    Python's sqlite3 begins a transaction only before some statements and never around DDL, so ``BEGIN`` is ours here
    (SQLAlchemy documentation, "Serializable isolation / Savepoints / Transactional DDL" of the pysqlite dialect).
    """
    if engine.dialect.name != "sqlite" or getattr(engine, _PREPARED, False):
        return engine

    def on_connect(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None
        dbapi_connection.execute(f"PRAGMA busy_timeout = {_SQLITE_BUSY_MS}")

    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN " + connection.get_execution_options().get(_BEGIN_OPTION, "DEFERRED"))

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    engine.dispose()
    setattr(engine, _PREPARED, True)
    return engine


@contextmanager
def write_transaction(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes: on SQLite it takes the write lock at once, so two writers queue instead of failing."""
    with engine.connect() as connection:
        connection = connection.execution_options(**{_BEGIN_OPTION: "IMMEDIATE"})
        with connection.begin():
            yield connection

"""How drivers differ when rows are read: the cursor that leaves rows in the database, and the conversion of some values.

A driver is known by the module of its connection's class, so a connection may come from any hook. A driver that is unknown here needs only
PEP 249: ``cursor()``, ``execute()`` and ``fetchmany()``.
"""

from __future__ import annotations

from contextlib import closing, suppress
from importlib import import_module
from typing import Any

#: module of a driver's connection → the driver
_DRIVERS = {
    "psycopg": "psycopg",
    "psycopg2": "psycopg2",
    "duckdb": "duckdb",
    "_duckdb": "duckdb",
    "MySQLdb": "MySQLdb",
    "pymysql": "pymysql",
    "mysql": "mysql.connector",
}
POSTGRES = ("psycopg", "psycopg2")
MYSQL = ("MySQLdb", "pymysql", "mysql.connector")
#: The usual cursors of these drivers hold all rows. A streaming cursor reads to its end on close, so only the connection is closed.
_MYSQL = ("MySQLdb", "pymysql")
#: the cursor's name in PostgreSQL, where it shows in pg_stat_activity
_NAME = "batchkit_source"
#: PostgreSQL's types of dates and times, with psycopg2's converters, which turn an infinite value into a finite one of Python
_POSTGRES_TIMES = {1082: "PYDATE", 1114: "PYDATETIME", 1184: "PYDATETIMETZ"}


def driver_of(connection: Any) -> str:
    """The driver of a connection; empty for one that is not known here."""
    modules = (cls.__module__.partition(".")[0] for cls in type(connection).__mro__)
    return next((_DRIVERS[module] for module in modules if module in _DRIVERS), "")


def open_cursor(connection: Any, driver: str) -> Any:
    """A cursor whose rows are tuples, and stay in the database until they are fetched, as far as the driver has such a cursor.

    The connection is a new one. PostgreSQL's values come as they do through SQLAlchemy: a UUID as a UUID, ``hstore`` as a mapping.
    """
    if driver == "psycopg":
        _begin(connection)
        types, rows = import_module("psycopg.types"), import_module("psycopg.rows")
        if found := types.TypeInfo.fetch(connection, "hstore"):
            import_module("psycopg.types.hstore").register_hstore(found, connection)
        return connection.cursor(_NAME, row_factory=rows.tuple_row)
    if driver == "psycopg2":
        _begin(connection)
        extras, extensions = import_module(f"{driver}.extras"), import_module(f"{driver}.extensions")
        extras.register_uuid(None, connection)
        if found := extras.HstoreAdapter.get_oids(connection):
            extras.register_hstore(connection, oid=found[0], array_oid=found[1])
        _refuse_infinite_times(connection, extensions)
        return connection.cursor(_NAME, cursor_factory=extensions.cursor)
    if driver in _MYSQL:
        return connection.cursor(import_module(f"{driver}.cursors").SSCursor)
    return connection.cursor()


def close(connection: Any, cursor: Any, driver: str) -> None:
    """Close both, even after an error. An open cursor keeps a lock on SQLite's file, even when its connection is closed."""
    for opened in (connection,) if driver in _MYSQL else (cursor, connection):
        with suppress(Exception):
            opened.close()


def _begin(connection: Any) -> None:
    """Turn autocommit off, which an extra of the connection may turn on: a named cursor needs a transaction."""
    if connection.autocommit:
        connection.autocommit = False


def _refuse_infinite_times(connection: Any, extensions: Any) -> None:
    """Have psycopg2 refuse infinite dates and times, as psycopg 3 does: by default it turns them into Python's last or first ones."""
    for oid, name in _POSTGRES_TIMES.items():
        cast = getattr(extensions, name)

        def finite(value: str | None, cursor: Any, cast: Any = cast) -> Any:
            if value is not None and "infinity" in value:
                raise ValueError(f"Python has no date or time {value!r}")
            return cast(value, cursor)

        extensions.register_type(extensions.new_type((oid,), f"FINITE_{name}", finite), connection)


def rows_of(connection: Any, sql: str) -> list[Any]:
    """The rows of a small query on a connection that may have an open cursor."""
    with closing(connection.cursor()) as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall())

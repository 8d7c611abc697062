"""What drivers differ in when rows are read: the cursor that leaves them in the database, and what they make of some values.

A driver is known by the module of its connection's class, so a connection may come from any hook. Of one that is not known here, PEP 249 is
enough: ``cursor()``, ``execute()`` and ``fetchmany()``.
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
}
POSTGRES = ("psycopg", "psycopg2")
#: Their usual cursors hold all rows. One that does not is read to its end when it is closed, so the connection is closed in its place.
_MYSQL = ("MySQLdb", "pymysql")
#: the cursor's name in PostgreSQL, where it shows in pg_stat_activity
_NAME = "batchkit_source"
#: PostgreSQL's types of dates and times, and of what psycopg2 makes of one that Python lacks: an infinite one becomes a finite one
_POSTGRES_TIMES = {1082: "PYDATE", 1114: "PYDATETIME", 1184: "PYDATETIMETZ"}


def driver_of(connection: Any) -> str:
    """The driver of a connection, empty for one that is not known here."""
    modules = (cls.__module__.partition(".")[0] for cls in type(connection).__mro__)
    return next((_DRIVERS[module] for module in modules if module in _DRIVERS), "")


def open_cursor(connection: Any, driver: str) -> Any:
    """A cursor whose rows stay in the database until they are fetched, as far as the driver has one, and are tuples.

    The connection is a new one. PostgreSQL's values come as they do through SQLAlchemy: a UUID as one, ``hstore`` as a mapping.
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
    """Close both, whatever has become of them. An open cursor keeps a lock on SQLite's file, also when its connection is closed."""
    for opened in (connection,) if driver in _MYSQL else (cursor, connection):
        with suppress(Exception):
            opened.close()


def _begin(connection: Any) -> None:
    """Have statements open a transaction: a named cursor lives in one. An extra of the connection may say otherwise."""
    if connection.autocommit:
        connection.autocommit = False


def _refuse_infinite_times(connection: Any, extensions: Any) -> None:
    """Have psycopg2 refuse infinite dates and times, as psycopg 3 does: it makes the last or the first of Python's of them."""
    for oid, name in _POSTGRES_TIMES.items():
        cast = getattr(extensions, name)

        def finite(value: str | None, cursor: Any, cast: Any = cast) -> Any:
            if value is not None and "infinity" in value:
                raise ValueError(f"Python has no date or time {value!r}")
            return cast(value, cursor)

        extensions.register_type(extensions.new_type((oid,), f"FINITE_{name}", finite), connection)


def rows_of(connection: Any, sql: str) -> list[Any]:
    """The rows of a small query, beside an open cursor of the same connection."""
    with closing(connection.cursor()) as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall())

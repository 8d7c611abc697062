"""Rows of a SQL query, read over a driver's own connection. Rows stream, and none is kept."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.source.drivers import close, driver_of, open_cursor
from airflow_provider_batchkit.source.rows import Rows
from airflow_provider_batchkit.source.types import column_types

#: number of rows that are fetched at a time: at first, and at most where they are small
_FIRST_ROWS = 8
_FETCH_ROWS = 500
_FETCH_BYTES = 1 << 20
_LONG = frozenset({str, bytes, bytearray, memoryview})
_SIZED = _LONG | {dict, list}


def read_sql(connect: Callable[[], Any], sql: str, parameters: Any = None) -> Generator[Rows, None, None]:
    """Rows of a query, some hundred at a time and fewer when they are large. Column names are as the database gives them.

    Uses a server-side cursor where the driver has one (PostgreSQL, MySQL): memory stays flat for any number of rows. The connection is
    closed when the rows are read, when reading them fails, and when the generator is closed.

    :param connect: opens a PEP 249 connection that is used for nothing else
    :param parameters: passed to the driver in its own style; without parameters, ``%`` in the SQL is literal
    :raises BatchInputError: two columns have the same name, the statement returns no rows, or a value has no form in Python
    """
    connection, cursor = connect(), None
    driver = driver_of(connection)
    try:
        cursor = open_cursor(connection, driver)
        cursor.execute(sql) if parameters is None else cursor.execute(sql, parameters)
        yield from _chunks(connection, cursor, driver)
    finally:
        close(connection, cursor, driver)


def _chunks(connection: Any, cursor: Any, driver: str) -> Iterator[Rows]:
    # psycopg2 describes a named cursor only after its first rows
    _refuse_statement(cursor, unknown=driver == "psycopg2")
    rows, position = _FIRST_ROWS, 0
    values = _fetch(cursor, rows, position)
    _refuse_statement(cursor, unknown=not values)
    columns = _names(cursor)
    types = column_types(cursor.description, connection, driver) if values else {}
    while values:
        if isinstance(values[0], Mapping):
            # an extra of the connection may ask for a cursor that gives rows as mappings
            values = [tuple(row[column] for column in columns) for row in values]
        chunk = Rows(columns, values, types)
        position += len(chunk)
        rows = max(1, min(_FETCH_BYTES // _largest(chunk), 2 * rows, _FETCH_ROWS))
        yield chunk
        values = _fetch(cursor, rows, position)


def _refuse_statement(cursor: Any, *, unknown: bool) -> None:
    """:raises BatchInputError: for a statement without rows, where the cursor must know its columns by now"""
    if cursor.description is None and not unknown:
        raise BatchInputError("The source's sql returns no rows: it must be a SELECT. Nothing was sent.")


def _names(cursor: Any) -> list[str]:
    columns = [column[0] for column in cursor.description or ()]
    repeated = sorted({c for c in columns if columns.count(c) > 1})
    if repeated:
        raise BatchInputError(
            f"The source's sql has more than one column named {', '.join(repeated)}; give them aliases. Nothing was sent."
        )
    return columns


def _fetch(cursor: Any, most: int, position: int) -> Sequence[Any]:
    with _python_holds(position):
        found: Sequence[Any] = cursor.fetchmany(most)
    return found


@contextmanager
def _python_holds(position: int) -> Iterator[None]:
    """Wrap the reading of rows from ``position`` on.

    :raises BatchInputError: for a value that Python cannot hold: PostgreSQL's dates before year 1 or after 9999, and infinite ones
    """
    try:
        yield
    except Exception as e:
        # an error of psycopg that has a code comes from the database
        psycopg = any(cls.__name__ == "DataError" and cls.__module__.startswith("psycopg") for cls in type(e).__mro__)
        if not (psycopg or isinstance(e, ValueError | OverflowError)) or getattr(e, "sqlstate", None) or getattr(e, "pgcode", None):
            raise
        raise BatchInputError(
            f"The source's sql gives a value that Python cannot hold, in row {position} or one of the next {_FETCH_ROWS}: {e}. Cast "
            "the column to text in the sql, or leave such rows out. Nothing was sent."
        ) from e


def _largest(rows: Rows) -> int:
    """The approximate size of the largest row in bytes, at least 1."""
    return 1 + sum(map(_longest, rows.columns.values()))


def _longest(values: Sequence[Any]) -> int:
    types = set(map(type, values))
    if types <= _LONG:
        return max(map(len, values))
    if types.isdisjoint(_SIZED):
        return 0  # numbers and times are small
    # a JSON column is a dict or a list
    return max([len(v) if type(v) in _LONG else len(repr(v)) if type(v) in _SIZED else 0 for v in values])

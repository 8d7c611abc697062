"""Where rows come from: a list, or a SQL query read through a server-side cursor. Rows stream; none is kept."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.source.rows import Rows
from airflow_provider_batchkit.source.types import postgres_types, refuse_infinite_times

if TYPE_CHECKING:
    from sqlalchemy.engine import CursorResult, Engine

#: rows that are fetched at a time: at first, and at most where they are small
_FIRST_ROWS = 8
_FETCH_ROWS = 500
_FETCH_BYTES = 1 << 20
_LONG = frozenset({str, bytes, bytearray, memoryview})
_SIZED = _LONG | {dict, list}


def read_sql(engine: Engine, sql: str, parameters: Any = None) -> Generator[Rows, None, None]:
    """Rows of a query, some hundred at a time and fewer when they are large; column names as the database gives them.

    Uses a server-side cursor where the driver has one (PostgreSQL, MySQL): memory stays flat for any number of rows.

    :param parameters: passed to the driver in its own style; without any, ``%`` in the SQL is literal
    :raises BatchInputError: when two columns have one name, the statement returns no rows, or a value has no form in Python
    """
    with engine.connect() as connection:
        connection = connection.execution_options(stream_results=True, max_row_buffer=_FETCH_ROWS, no_parameters=parameters is None)
        if engine.dialect.driver == "psycopg2":
            refuse_infinite_times(connection)
        with _python_holds(0):
            result = connection.exec_driver_sql(sql, tuple(parameters) if isinstance(parameters, list) else parameters)
        if not result.returns_rows:
            raise BatchInputError("The source's sql returns no rows: it must be a SELECT. Nothing was sent.")
        columns = list(result.keys())
        repeated = sorted({c for c in columns if columns.count(c) > 1})
        if repeated:
            raise BatchInputError(
                f"The source's sql has more than one column named {', '.join(repeated)}; give them aliases. Nothing was sent."
            )
        # psycopg2 has a description once there are rows, and psycopg 3 until the cursor is closed, which a short result is by then
        cursor: Any = result.cursor
        description = cursor.description
        rows, position = _FIRST_ROWS, 0
        types: dict[str, str] = {}
        while values := _fetch(result, rows, position):
            if position == 0 and engine.dialect.name == "postgresql":
                types = postgres_types(description or cursor.description, connection)
            chunk = Rows(columns, values, types)
            position += len(chunk)
            rows = max(1, min(_FETCH_BYTES // _largest(chunk), 2 * rows, _FETCH_ROWS))
            yield chunk


def _fetch(result: CursorResult[Any], most: int, position: int) -> Sequence[Any]:
    with _python_holds(position):
        return result.fetchmany(most)


@contextmanager
def _python_holds(position: int) -> Iterator[None]:
    """While rows are read from ``position`` on.

    :raises BatchInputError: for a value that Python cannot hold: PostgreSQL's dates before year 1 and behind 9999, and infinite ones
    """
    from sqlalchemy.exc import DataError

    try:
        yield
    except (DataError, ValueError, OverflowError) as e:
        problem = e.orig if isinstance(e, DataError) else e
        # an error with a code is the database's own
        if getattr(problem, "sqlstate", None) or getattr(problem, "pgcode", None):
            raise
        raise BatchInputError(
            f"The source's sql gives a value that Python cannot hold, in row {position} or one of the next {_FETCH_ROWS}: {problem}. Cast "
            "the column to text in the sql, or leave such rows out. Nothing was sent."
        ) from e


def _largest(rows: Rows) -> int:
    """About the bytes of the largest row, at least 1."""
    return 1 + sum(map(_longest, rows.columns.values()))


def _longest(values: Sequence[Any]) -> int:
    types = set(map(type, values))
    if types <= _LONG:
        return max(map(len, values))
    if types.isdisjoint(_SIZED):
        return 0  # numbers and times are small
    # a JSON column is a dict or a list
    return max([len(v) if type(v) in _LONG else len(repr(v)) if type(v) in _SIZED else 0 for v in values])

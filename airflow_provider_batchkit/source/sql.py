"""Where rows come from: a list, or a SQL query read through a server-side cursor. Rows stream; none is kept."""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.source.rows import Rows

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

#: rows that are fetched at a time: at first, and at most where they are small
_FIRST_ROWS = 8
_FETCH_ROWS = 500
_FETCH_BYTES = 1 << 20
_LONG = frozenset({str, bytes, bytearray, memoryview})
_SIZED = _LONG | {dict, list}

#: SQL-neutral names of key column types, from the narrowest Python type
_TYPE_NAMES: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    decimal.Decimal: "numeric",
    float: "float",
    str: "text",
    dt.datetime: "timestamp",
    dt.date: "date",
    uuid.UUID: "uuid",
}


def read_sql(engine: Engine, sql: str, parameters: Any = None) -> Iterator[Rows]:
    """Rows of a query, some hundred at a time and fewer when they are large; column names as the database gives them.

    Uses a server-side cursor where the driver has one (PostgreSQL, MySQL): memory stays flat for any number of rows.

    :param parameters: passed to the driver in its own style; without any, ``%`` in the SQL is literal
    :raises BatchInputError: when two columns have one name, or the statement returns no rows
    """
    with engine.connect() as connection:
        connection = connection.execution_options(stream_results=True, max_row_buffer=_FETCH_ROWS, no_parameters=parameters is None)
        result = connection.exec_driver_sql(sql, tuple(parameters) if isinstance(parameters, list) else parameters)
        if not result.returns_rows:
            raise BatchInputError("The source's sql returns no rows: it must be a SELECT. Nothing was sent.")
        columns = list(result.keys())
        repeated = sorted({c for c in columns if columns.count(c) > 1})
        if repeated:
            raise BatchInputError(
                f"The source's sql has more than one column named {', '.join(repeated)}; give them aliases. Nothing was sent."
            )
        rows = _FIRST_ROWS
        while values := result.fetchmany(rows):
            chunk = Rows(columns, values)
            rows = max(1, min(_FETCH_BYTES // _largest(chunk), 2 * rows, _FETCH_ROWS))
            yield chunk


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


class KeyTypes:
    """Learns the SQL type of each key column from the values that pass; a column of mixed types becomes text."""

    def __init__(self, columns: Sequence[str]) -> None:
        #: Python types, and for an aware time the name of its SQL type
        self._seen: list[tuple[str, set[type | str]]] = [(column, set()) for column in columns]

    def see(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Note the key columns of some rows."""
        for column, seen in self._seen:
            # a native request's own id is its key, whatever the key column is called
            values = rows.columns.get(column, ("",)) if isinstance(rows, Rows) else [row.get(column, "") for row in rows]
            types = set(map(type, values))
            if any(issubclass(type_, dt.datetime) for type_ in types):
                seen.update(_seen_type(value) for value in values)
            else:
                seen.update(types)

    def result(self, before: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
        """(column, type name) of every key column, in order; ``before`` is what earlier attempts saw.

        Without a key the rows are known by their ``request_id``: a native request's own id, or the position.
        """
        if not self._seen:
            return [("request_id", "text")]
        known = dict(before)
        return [
            (column, _widest({_type_name(type_) for type_ in seen} | ({known[column]} if column in known else set())))
            for column, seen in self._seen
        ]

    @property
    def rows_seen(self) -> bool:
        """Whether any row has passed."""
        return not self._seen or any(seen for _, seen in self._seen)


def _seen_type(value: Any) -> type | str:
    return "timestamptz" if isinstance(value, dt.datetime) and value.tzinfo is not None else type(value)


def _type_name(seen: type | str) -> str:
    return seen if isinstance(seen, str) else _TYPE_NAMES.get(seen, "text")


def _widest(names: set[str]) -> str:
    if len(names) == 1:
        return next(iter(names))
    return "numeric" if names == {"integer", "numeric"} else "text"

"""Bulk loading: many rows into a table, in the connection's own transaction.

Three loaders write the same rows: PostgreSQL's COPY (psycopg 2 and 3), SQLite's executemany on the driver, and SQLAlchemy Core anywhere.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

#: one row: values in the order of the table's columns
BulkRow = tuple[Any, ...]
Loader = Callable[[Connection, sa.Table, Sequence[BulkRow]], None]


def loader_for(connection: Connection, *, portable: bool = False) -> Loader:
    """The fastest loader that the connection's database has; ``portable`` asks for the one that works anywhere."""
    dialect = connection.dialect
    if not portable and dialect.name == "sqlite":
        return _load_driver
    if not portable and dialect.name == "postgresql" and dialect.driver in ("psycopg", "psycopg2"):
        return _load_copy
    return _load_core


def _load_core(connection: Connection, table: sa.Table, rows: Sequence[BulkRow]) -> None:
    names = [column.name for column in table.columns]
    connection.execute(sa.insert(table), [dict(zip(names, row, strict=True)) for row in rows])


def _binders(connection: Connection, table: sa.Table) -> list[tuple[int, Callable[[Any], Any]]]:
    """The columns whose values the dialect converts before the driver sees them."""
    dialect = connection.dialect
    processors = ((i, column.type.dialect_impl(dialect).bind_processor(dialect)) for i, column in enumerate(table.columns))
    return [(i, process) for i, process in processors if process is not None]


def _bind(rows: Sequence[BulkRow], binders: list[tuple[int, Callable[[Any], Any]]]) -> Sequence[BulkRow]:
    if not binders:
        return rows
    bound = []
    for row in rows:
        values = list(row)
        for i, process in binders:
            values[i] = process(values[i])
        bound.append(tuple(values))
    return bound


def _load_driver(connection: Connection, table: sa.Table, rows: Sequence[BulkRow]) -> None:
    columns = ", ".join(connection.dialect.identifier_preparer.quote(c.name) for c in table.columns)
    marks = ", ".join("?" * len(table.columns))
    connection.exec_driver_sql(f"INSERT INTO {table.name} ({columns}) VALUES ({marks})", list(_bind(rows, _binders(connection, table))))


_COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\0": "\ufffd"})


def _copy_text(value: Any) -> str:
    if value is None:
        return "\\N"
    if isinstance(value, str):
        return value.translate(_COPY_ESCAPES)
    if isinstance(value, bool):
        return "t" if value else "f"
    return str(value)


def _load_copy(connection: Connection, table: sa.Table, rows: Sequence[BulkRow]) -> None:
    columns = ", ".join(connection.dialect.identifier_preparer.quote(c.name) for c in table.columns)
    # no parameters, so a percent sign in a name is not doubled
    statement = f"COPY {table.name} ({columns}) FROM STDIN".replace("%%", "%")
    data = "".join("\t".join(map(_copy_text, row)) + "\n" for row in rows).encode()
    cursor: Any = connection.connection.cursor()
    try:
        if connection.dialect.driver == "psycopg":
            with cursor.copy(statement) as copy:
                copy.write(data)
        else:
            cursor.copy_expert(statement, io.BytesIO(data))
    finally:
        cursor.close()

"""Bulk loading: many rows into a table, in the connection's own transaction.

Three loaders write the same rows: PostgreSQL's COPY (psycopg 2 and 3), SQLite's executemany on the driver, and SQLAlchemy Core anywhere.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import chain
from types import NoneType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

#: the values of each of the table's columns, in the order of the rows, of which there are some
BulkColumns = Sequence[Sequence[Any]]
Loader = Callable[[Connection, sa.Table, BulkColumns], None]

#: rows in one SQLite INSERT: that many values stay below the 999 parameters that a statement of any SQLite may have
_SQLITE_VALUES = 900


def loader_for(connection: Connection, *, portable: bool = False) -> Loader:
    """The fastest loader that the connection's database has; ``portable`` asks for the one that works anywhere."""
    dialect = connection.dialect
    if not portable and dialect.name == "sqlite":
        return _load_driver
    if not portable and dialect.name == "postgresql" and dialect.driver in ("psycopg", "psycopg2"):
        return _load_copy
    return _load_core


def _load_core(connection: Connection, table: sa.Table, columns: BulkColumns) -> None:
    names = [column.name for column in table.columns]
    rows = zip(*columns, strict=True)
    connection.execute(sa.insert(table), [dict(zip(names, row, strict=True)) for row in rows])


def _quoted(connection: Connection, table: sa.Table) -> tuple[str, str]:
    """The table's name and its columns as SQL of the connection's dialect."""
    preparer = connection.dialect.identifier_preparer
    return preparer.format_table(table), ", ".join(preparer.quote(c.name) for c in table.columns)


def _bound(connection: Connection, table: sa.Table, columns: BulkColumns) -> BulkColumns:
    """The values as the driver takes them: only columns whose type converts values are touched."""
    dialect = connection.dialect
    processors = [column.type.dialect_impl(dialect).bind_processor(dialect) for column in table.columns]
    return [list(map(p, column)) if p else column for p, column in zip(processors, columns, strict=True)]


def _load_driver(connection: Connection, table: sa.Table, columns: BulkColumns) -> None:
    """Many rows a statement: what the driver does for each statement costs as much as for twenty values."""
    name, names = _quoted(connection, table)
    rows = list(zip(*_bound(connection, table, columns), strict=True))
    marks = f"({', '.join('?' * len(table.columns))})"
    insert = f"INSERT INTO {name} ({names}) VALUES "
    many = max(_SQLITE_VALUES // len(table.columns), 1)
    whole = len(rows) - len(rows) % many
    if whole:
        statements = [tuple(chain.from_iterable(rows[i : i + many])) for i in range(0, whole, many)]
        connection.exec_driver_sql(insert + ", ".join([marks] * many), statements)
    if whole < len(rows):
        connection.exec_driver_sql(insert + marks, rows[whole:])


_NULL = "\\N"
_COPY_ESCAPES = (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"))


def _copy_escaped(text: str) -> str:
    for character, escape in _COPY_ESCAPES:
        text = text.replace(character, escape)
    return text


def _copy_value(value: Any) -> str:
    if value is None:
        return _NULL
    if isinstance(value, str):
        # PostgreSQL has no NUL in text
        return _copy_escaped(value).replace("\0", "\ufffd")
    if isinstance(value, bool):
        return "t" if value else "f"
    return str(value)


def _copy_column(values: Sequence[Any]) -> Sequence[str]:
    """A column in COPY's text format. Columns of one plain type, as most are, are converted as a whole."""
    types = set(map(type, values))
    if types == {NoneType}:
        return [_NULL] * len(values)
    if types == {int}:
        return list(map(str, values))
    if types == {str}:
        texts = _copy_escaped("\0".join(values)).split("\0")
        if len(texts) == len(values):
            return texts
    return list(map(_copy_value, values))


def _load_copy(connection: Connection, table: sa.Table, columns: BulkColumns) -> None:
    name, names = _quoted(connection, table)
    # no parameters, so a percent sign in a name is not doubled
    statement = f"COPY {name} ({names}) FROM STDIN".replace("%%", "%")
    lines = map("\t".join, zip(*map(_copy_column, columns), strict=True))
    data = ("\n".join(lines) + "\n").encode()
    cursor: Any = connection.connection.cursor()
    try:
        if connection.dialect.driver == "psycopg":
            with cursor.copy(statement) as copy:
                copy.write(data)
        else:
            cursor.copy_expert(statement, io.BytesIO(data))
    finally:
        cursor.close()

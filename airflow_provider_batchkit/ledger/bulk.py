"""Bulk loading: many rows into a table, in the connection's own transaction.

Four loaders write the same rows: PostgreSQL's COPY with psycopg 3, which stays open while the next rows are made; COPY with psycopg 2;
INSERTs of many rows on SQLite's driver; and SQLAlchemy Core on any database.
"""

from __future__ import annotations

import codecs
import io
import logging
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import lru_cache
from itertools import chain, compress, count, groupby
from operator import ne
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection

log = logging.getLogger(__name__)

#: one sequence of values per column of the table, in the order of the rows; there is at least one row
BulkColumns = Sequence[Sequence[Any]]

#: values in one SQLite INSERT: every SQLite allows 999 parameters in a statement
_SQLITE_VALUES = 900
#: bytes after which a COPY is ended and another begun: the server reports errors only at the end, and some psycopg versions buffer it all
_COPY_BYTES = 16 << 20


class BulkLoader:
    """Loads rows into a table, with SQLAlchemy Core. It is a context manager: after the block, the rows are in the table. Inside the block
    they may not be, and nothing else may use the connection.
    """

    def __init__(self, connection: Connection, table: sa.Table) -> None:
        self._connection = connection
        self._table = table
        #: Python's codec for the texts that the database can store; None where it can store any text
        self._codec = storage_codec(connection)
        #: the number of characters that were replaced because the database's encoding lacks them
        self._replaced = 0

    def write(self, columns: BulkColumns) -> None:
        """Add rows."""
        names = [column.name for column in self._table.columns]
        rows = zip(*columns, strict=True)
        if self._connection.dialect.name == "postgresql":
            rows = zip(*(map(self._stored, column) for column in columns), strict=True)
        self._connection.execute(sa.insert(self._table), [dict(zip(names, row, strict=True)) for row in rows])

    def _stored(self, value: Any) -> Any:
        """A value as the database can store it."""
        return self._storable(_without_nul(value)) if isinstance(value, str) else value

    def _storable(self, text: str) -> str:
        """A text with ``?`` in place of each character that the database's encoding lacks: the rest of the answer must not be lost."""
        if self._codec is None:
            return text
        stored = text.encode(self._codec, "replace").decode(self._codec)
        self._replaced += sum(map(ne, text, stored)) if stored != text else 0
        return stored

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        """Finish the load. After an error, the rows that were not written are dropped."""
        if error is None and self._replaced:
            log.warning(
                "%s characters that the database's encoding (%s) lacks were written as '?'. A database in UTF8 keeps every character; "
                "until then the results can be read from the API for 29 days.",
                f"{self._replaced:,}",
                self._codec,
            )


def bulk_loader(connection: Connection, table: sa.Table, *, portable: bool = False) -> BulkLoader:
    """The fastest loader that the connection's database has; ``portable`` asks for the one that works anywhere."""
    dialect = connection.dialect
    if portable:
        return BulkLoader(connection, table)
    if dialect.name == "sqlite":
        return _DriverLoader(connection, table)
    if dialect.name == "postgresql" and dialect.driver == "psycopg":
        return _OpenCopyLoader(connection, table)
    if dialect.name == "postgresql" and dialect.driver == "psycopg2":
        return _CopyLoader(connection, table)
    return BulkLoader(connection, table)


def _quoted(connection: Connection, table: sa.Table) -> tuple[str, str]:
    """The table's name and its columns as SQL of the connection's dialect."""
    preparer = connection.dialect.identifier_preparer
    return preparer.format_table(table), ", ".join(preparer.quote(c.name) for c in table.columns)


class _DriverLoader(BulkLoader):
    """Writes many rows per statement and binds each value that all rows share once: the driver pays per statement and per value."""

    def __init__(self, connection: Connection, table: sa.Table) -> None:
        super().__init__(connection, table)
        #: per column, the conversion to a value that the driver accepts; None where none is needed
        self._convert = [column.type.dialect_impl(connection.dialect).bind_processor(connection.dialect) for column in table.columns]

    def write(self, columns: BulkColumns) -> None:
        rows, alike = len(columns[0]), tuple(map(_is_of_one_value, columns))
        values = [
            list(map(convert, column[:1] if same else column)) if convert else column
            for convert, column, same in zip(self._convert, columns, alike, strict=True)
        ]
        common = tuple([column[0] for column in compress(values, alike)])
        own = [column for column, same in zip(values, alike, strict=True) if not same]
        insert = "INSERT INTO {} ({}) VALUES ".format(*_quoted(self._connection, self._table))
        many = max((_SQLITE_VALUES - len(common)) // max(len(own), 1), 1)
        whole = rows - rows % many
        for start, stop, together in ((0, whole, many), (whole, rows, rows - whole)):
            parts = ([column[i : i + together] for column in own] for i in range(start, stop, max(together, 1)))
            statements = [common + tuple(chain.from_iterable(zip(*part, strict=True))) for part in parts]
            if statements:
                self._connection.exec_driver_sql(insert + _marks(alike, together), statements)


def _is_of_one_value(column: Sequence[Any]) -> bool:
    first = column[0]
    return (first is None or type(first) in (str, int)) and first == column[-1] and column.count(first) == len(column)


@lru_cache
def _marks(alike: tuple[bool, ...], rows: int) -> str:
    """The placeholders of the rows. The columns that are ``alike`` in all rows have the first numbers, which every row repeats."""
    common, own = count(1), count(1 + sum(alike))
    numbers = [f"?{next(common)}" if same else None for same in alike]
    return ", ".join([f"({', '.join([number or f'?{next(own)}' for number in numbers])})" for _ in range(rows)])


def _without_nul(value: Any) -> Any:
    """The value with U+FFFD for each NUL, which PostgreSQL cannot store in text."""
    return value.replace("\0", "\ufffd") if isinstance(value, str) and "\0" in value else value


_NULL = "\\N"
_COPY_ESCAPES = (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"))


def _copy_escaped(text: str) -> str:
    for character, escape in _COPY_ESCAPES:
        # replace counts the character first, and a plain search is far faster
        if character in text:
            text = text.replace(character, escape)
    return text


def _copy_value(value: Any) -> str:
    if value is None:
        return _NULL
    if isinstance(value, str):
        return _copy_escaped(_without_nul(value))
    if isinstance(value, bool):
        return "t" if value else "f"
    return str(value)


def _copy_column(values: Sequence[Any]) -> Sequence[str]:
    """A column in COPY's text format. Columns of one plain type, as most are, are converted as a whole."""
    types = set(map(type, values))
    if types == {int}:
        return list(map(str, values))
    if types == {str}:
        texts = _copy_escaped("\0".join(values)).split("\0")
        if len(texts) == len(values):
            return texts
    return list(map(_copy_value, values))


def copy_data(columns: BulkColumns) -> str:
    """The rows in COPY's text format. Neighbouring columns that have one value in all rows are formatted once."""
    rows = len(columns[0])
    parts: list[Sequence[str]] = []
    for same, several in groupby(columns, _is_of_one_value):
        if same:
            parts.append(["\t".join([_copy_value(column[0]) for column in several])] * rows)
        else:
            parts += map(_copy_column, several)
    return "\n".join(map("\t".join, zip(*parts, strict=True))) + "\n"


def _copy_statement(connection: Connection, table: sa.Table) -> str:
    name, names = _quoted(connection, table)
    # the data is UTF-8, whatever the connection's encoding is; without parameters the driver leaves a percent sign in a name single
    return f"COPY {name} ({names}) FROM STDIN (ENCODING 'UTF8')".replace("%%", "%")


def storage_codec(connection: Connection) -> str | None:
    """Python's codec for the encoding of a PostgreSQL database; None where any text can be stored, or the encoding is not known."""
    if connection.dialect.name != "postgresql":
        return None
    name = str(connection.exec_driver_sql("SHOW server_encoding").scalar_one())
    if name == "UTF8":
        return None
    # Python names WIN1252, KOI8R and EUC_JP cp1252, koi8_r and euc_jp (PostgreSQL documentation, "Character Set Support")
    name = f"cp{name[3:]}" if name.startswith("WIN") else f"koi8_{name[4:]}" if name.startswith("KOI8") else name
    try:
        return codecs.lookup(name).name
    except LookupError:
        return None  # SQL_ASCII, for example, takes any bytes


def can_store(text: str, codec: str) -> bool:
    """Whether a text can be written in an encoding."""
    return text.encode(codec, "ignore").decode(codec) == text


class _CopyLoader(BulkLoader):
    """Runs one COPY per call."""

    def write(self, columns: BulkColumns) -> None:
        cursor: Any = self._connection.connection.cursor()
        try:
            cursor.copy_expert(_copy_statement(self._connection, self._table), io.BytesIO(self._storable(copy_data(columns)).encode()))
        finally:
            cursor.close()


class _OpenCopyLoader(BulkLoader):
    """Runs one COPY over many calls. The calls do not wait for the server, so an error of the server appears some calls later.

    The COPY lasts until its rows have come, which includes the pauses of a stalled download. The database's statement timeout is not
    meant for that, so it is lifted until the last row is written.
    """

    def __init__(self, connection: Connection, table: sa.Table) -> None:
        super().__init__(connection, table)
        self._copy: Any = None
        self._open = ExitStack()
        self._bytes = 0
        self._timeout = ""

    def __enter__(self) -> Self:
        self._timeout = self._connection.exec_driver_sql("SHOW statement_timeout").scalar_one()
        self._connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        return self

    def write(self, columns: BulkColumns) -> None:
        data = self._storable(copy_data(columns)).encode()
        if self._copy is None:
            cursor: Any = self._open.enter_context(closing(self._connection.connection.cursor()))
            self._copy = self._open.enter_context(cursor.copy(_copy_statement(self._connection, self._table)))
            self._bytes = 0
        self._copy.write(data)
        self._bytes += len(data)
        if self._bytes >= _COPY_BYTES:
            self._end()

    def _end(self) -> None:
        self._copy = None
        self._open.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._copy = None
        self._open.__exit__(kind, error, where)
        super().__exit__(kind, error, where)
        if error is None:
            self._connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{self._timeout}'")

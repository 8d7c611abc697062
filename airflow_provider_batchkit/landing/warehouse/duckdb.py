"""DuckDB, the embedded warehouse, as a database of results.

One process at a time has the file. It is opened for each step and closed again, so that others get at it while results are downloaded.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from airflow_provider_batchkit.exceptions import BatchInputError, TableError
from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.landing.warehouse.base import Columns, Warehouse, busy
from airflow_provider_batchkit.landing.warehouse.catalog import Dialect, FoundColumn, check_columns, column_types, refuse_inexact
from airflow_provider_batchkit.model import key_kind

log = logging.getLogger(__name__)

#: seconds that another process is waited for
OPEN_S = 60.0
#: bytes that a row of the loaded file may have
_ROW_BYTES = 1 << 30
_DIGITS, _SCALE = 38, 12

_TYPES = {
    "boolean": "BOOLEAN",
    "smallint": "SMALLINT",
    "int": "INTEGER",
    "integer": "BIGINT",
    "numeric": f"DECIMAL({_DIGITS},{_SCALE})",
    "real": "FLOAT",
    "float": "DOUBLE",
    "timestamp": "TIMESTAMP",
    "timestamptz": "TIMESTAMPTZ",
    "date": "DATE",
    "uuid": "UUID",
    "json": "JSON",
}
_TEXT = "VARCHAR"
_CLASSES = {
    "boolean": "boolean",
    **dict.fromkeys(("tinyint", "smallint", "integer", "bigint", "hugeint"), "integer"),
    **dict.fromkeys(("utinyint", "usmallint", "uinteger", "ubigint", "uhugeint"), "integer"),
    "decimal": "numeric",
    "float": "float",
    "double": "float",
    "varchar": "text",
    "timestamp": "timestamp",
    "timestamp with time zone": "timestamptz",
    "date": "date",
    "uuid": "uuid",
    "json": "json",
}
_KEYS = {kind: {kind} for kind in ("boolean", "float", "text", "timestamp", "timestamptz", "uuid", "numeric")} | {
    "integer": {"integer", "numeric"},
    "date": {"date", "timestamp"},
}
_DIALECT = Dialect(_CLASSES, {**_TYPES, "text": _TEXT}, _KEYS, (_DIGITS, _SCALE), (38, 38))
#: what a JSON file holds as itself; everything else comes as text and is cast
_PLAIN = frozenset({"BOOLEAN", "BIGINT", "INTEGER", "SMALLINT", "DOUBLE", "FLOAT", _TEXT})
_encode = msgspec.json.Encoder(decimal_format="string").encode


class DuckDB(Warehouse):
    """A DuckDB file."""

    name: ClassVar[str] = "DuckDB"

    @contextmanager
    def open(self) -> Iterator[Any]:
        until = time.monotonic() + OPEN_S
        while True:
            try:
                connection = self._connect()
                break
            except Exception as e:
                if "lock" not in str(e):
                    raise
                if time.monotonic() > until:
                    raise busy(self.name, self.conn_id, e) from e
                log.info("Another process has the DuckDB file; it is waited for")
                time.sleep(0.5)
        with closing(connection):
            files = self.rows(connection, "SELECT path FROM duckdb_databases() WHERE database_name = current_database()")
            if not files or not files[0][0]:
                raise BatchInputError(
                    f"The connection {self.conn_id!r} is a DuckDB in memory: what lands there is gone with the task. Name a file. Nothing "
                    "was sent or written."
                )
            if files[0][0].startswith("md:"):
                raise BatchInputError(
                    f"The connection {self.conn_id!r} is of MotherDuck, in which landing was never tried. Name a DuckDB file, or write "
                    "files with output_path. Nothing was sent or written."
                )
            yield connection

    def begin(self, connection: Any) -> None:
        connection.execute("BEGIN TRANSACTION")

    def commit(self, connection: Any) -> None:
        _end(connection.commit)

    def rollback(self, connection: Any) -> None:
        _end(connection.rollback)

    # a cursor is a connection of its own here
    def run(self, connection: Any, statement: str) -> None:
        connection.execute(statement)

    def rows(self, connection: Any, statement: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in connection.execute(statement).fetchall()]

    def is_conflict(self, error: Exception) -> bool:
        return "conflict" in str(error).lower() and type(error).__name__ == "TransactionException"

    # --- the table ----------------------------------------------------------------------------------------------------------------

    def _place(self, connection: Any, name: str) -> tuple[str, str]:
        schema, _, table = name.rpartition(".")
        return (schema or str(self.rows(connection, "SELECT current_schema()")[0][0])).lower(), table.lower()

    def identity(self, connection: Any, name: str) -> str:
        return ".".join(self._place(connection, name))

    def check(self, connection: Any, table: ResultTable) -> bool:
        schema, name = map(self._sql_text, self._place(connection, table.name))
        if not self.rows(connection, f"SELECT 1 FROM duckdb_schemas() WHERE lower(schema_name) = {schema}"):
            raise TableError(f"The table {table.name} is to be in a schema that does not exist. Create it. Nothing was sent or written.")
        here = f"database_name = current_database() AND lower(schema_name) = {schema}"
        if self.rows(connection, f"SELECT 1 FROM duckdb_views() WHERE {here} AND lower(view_name) = {name}"):
            raise TableError(f"The table {table.name} exists and cannot be written: it is a view. Nothing was sent or written.")
        columns = "SELECT column_name, data_type, is_nullable, column_default IS NOT NULL, is_generated FROM duckdb_columns()"
        rows = self.rows(connection, f"{columns} WHERE {here} AND lower(table_name) = {name} ORDER BY column_index")
        check_columns(table, [FoundColumn(*row) for row in rows], _DIALECT)
        return bool(rows)

    @staticmethod
    def _sql_text(text: str) -> str:
        return "'{}'".format(text.replace("'", "''"))

    def create(self, connection: Any, table: ResultTable, *, unique_key: bool) -> None:
        columns = self._columns(table)
        key = f", PRIMARY KEY ({', '.join(map(self.quote, table.key_names))})" if unique_key else ""
        with self.transaction(connection):
            self.run(connection, f"CREATE TABLE IF NOT EXISTS {self.spelled(table)} ({columns}{key})")

    def _columns(self, table: ResultTable) -> str:
        return ", ".join(
            f"{self.quote(name)} {_sql_type(told)}{' NOT NULL' if name in table.key_names else ''}"
            for name, told in column_types(table).items()
        )

    # --- staging ------------------------------------------------------------------------------------------------------------------

    def stage(self, connection: Any, table: ResultTable, name: str, blocks: Iterable[Columns]) -> int:
        types = list(map(_sql_type, column_types(table).values()))
        names = [f"c{number}" for number in range(len(types))]
        with tempfile.TemporaryDirectory(prefix="batchkit-duckdb-") as folder:
            path = Path(folder) / "rows.jsonl"
            with path.open("wb") as file:
                for block in blocks:
                    refuse_inexact(table, block, _DIGITS, _SCALE)
                    file.writelines(_encode(dict(zip(names, row, strict=True))) + b"\n" for row in zip(*block, strict=True))
            read = ", ".join(f"{column}: '{kind if kind in _PLAIN else _TEXT}'" for column, kind in zip(names, types, strict=True))
            values = ", ".join(column if kind in _PLAIN else f"CAST({column} AS {kind})" for column, kind in zip(names, types, strict=True))
            source = (
                f"read_json({self._sql_text(str(path))}, format = 'newline_delimited', maximum_object_size = {_ROW_BYTES}, "
                f"columns = {{{read}}})"
            )
            with self.transaction(connection):
                self.run(connection, f"CREATE OR REPLACE TABLE {self.beside(table, name)} ({self._columns(table)})")
                if path.stat().st_size:
                    self.run(connection, f"INSERT INTO {self.beside(table, name)} SELECT {values} FROM {source}")
        return self.count(connection, table, name)

    def stages(self, connection: Any, table: ResultTable, prefix: str) -> list[str]:
        schema = self._sql_text(self._place(connection, table.name)[0])
        here = f"database_name = current_database() AND lower(schema_name) = {schema}"
        found = self.rows(connection, f"SELECT table_name FROM duckdb_tables() WHERE {here}")
        return [name for (name,) in found if name.startswith(prefix)]


def _sql_type(told: str) -> str:
    base, _, arguments = told.removesuffix(")").partition("(")
    if base == "numeric" and arguments:
        return f"DECIMAL({arguments})"
    return _TYPES.get(base) or _TYPES.get(key_kind(told)) or _TEXT


def _end(how: Callable[[], Any]) -> None:
    """Commit or roll back; DuckDB raises where there is no transaction to end."""
    try:
        how()
    except Exception as e:
        if "no transaction is active" not in str(e):
            raise

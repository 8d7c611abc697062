"""Snowflake as a database of results, over the connections of Airflow's SnowflakeHook.

The protocol rests on these facts (Snowflake documentation, "Transactions"):

- UPDATE, DELETE and MERGE lock the table, and hold the lock until COMMIT or ROLLBACK; INSERT and COPY wait for nobody. Keys are not
  enforced, and only hybrid tables have SELECT FOR UPDATE. So a fence is raised, and a load published, in a transaction that begins with an
  UPDATE of the only row of ``batchkit_lock``. All tables of a schema share that lock: their publishes queue.
- READ COMMITTED is the only isolation level: a statement sees what was committed before it began. A statement that waits for a lock may
  have begun too early; those behind the one that took the lock have not. That is why the lock lies in a table of its own.
- A session is certain to see what other sessions had committed before it began, and may see what they commit later some milliseconds late.
  So markers are read, and loads published, in sessions that begin after the fence was raised.
- Every DDL statement commits. None is run within a transaction here.
- A session that is cut off leaves its transaction behind with its locks; Snowflake ends it after five idle minutes in which another waits.

AUTOCOMMIT is switched on, whatever the account, the user or the connection's ``session_parameters`` say: the hook leaves it
to them. Each transaction is explicit. ``client_session_keep_alive`` is not needed: a session lasts for one step of a landing, and an idle
one lives for four hours.

Names are read as Snowflake reads them: ``products`` is ``PRODUCTS``, and ``"products"`` is another table. Columns follow the same rule.
"""

from __future__ import annotations

import re
import secrets
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

from airflow_provider_batchkit.exceptions import BatchInputError, TableError
from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.landing.warehouse.base import FENCE, PUBLISHED, Columns, Publish, Warehouse
from airflow_provider_batchkit.landing.warehouse.catalog import Dialect, FoundColumn, check_columns, column_types, refuse_inexact
from airflow_provider_batchkit.model import key_kind

LOCK = "batchkit_lock"
#: seconds that a statement waits for a lock; a cut-off transaction is gone after 300
_LOCK_S = 600
_NAME_CHARACTERS = 255
_DIGITS, _SCALE = 38, 12
#: rows and characters of a row group, and bytes of a file: Snowflake advises files of 100 to 250 MB, which it loads side by side
_GROUP_ROWS, _GROUP_CHARACTERS, _FILE_BYTES = 20_000, 32_000_000, 128_000_000
#: a name that needs no quotes, or one in them
_PART = re.compile(r'([A-Za-z_][A-Za-z0-9_$]*)|"((?:[^"]|"")+)"')
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*")
#: the statement waits for a lock for too long, or behind too many others
_LOCK_ERROR = 625
_NOT_FOUND, _DENIED = 2003, 3001
#: SQLSTATE of a missing privilege
_DENIED_STATE = "42501"
#: collations that compare texts byte by byte
_EXACT = ("", "utf8", "bin")

_TYPES = {
    "boolean": "BOOLEAN",
    "integer": "NUMBER(38,0)",
    "numeric": f"NUMBER({_DIGITS},{_SCALE})",
    "float": "FLOAT",
    "timestamp": "TIMESTAMP_NTZ",
    "timestamptz": "TIMESTAMP_TZ",
    "date": "DATE",
    "uuid": "VARCHAR(36)",
    "json": "VARCHAR",
    "text": "VARCHAR",
}
_CLASSES = {
    "boolean": "boolean",
    "number": "numeric",
    "float": "float",
    "varchar": "text",
    "timestamp_ntz": "timestamp",
    **dict.fromkeys(("timestamp_tz", "timestamp_ltz"), "timestamptz"),
    "date": "date",
}
_KEYS = {kind: {kind} for kind in ("boolean", "float", "text", "timestamp", "timestamptz", "numeric")} | {
    "integer": {"numeric"},
    "date": {"date", "timestamp"},
    "uuid": {"text"},
}
TYPES = Dialect(_CLASSES, _TYPES, _KEYS, (_DIGITS, _SCALE), (38, 37))
#: session parameters that the statements here rely on, whatever the account says
_SESSION = (
    f"LOCK_TIMEOUT = {_LOCK_S} TIMEZONE = 'UTC' DATE_INPUT_FORMAT = 'AUTO' TIMESTAMP_INPUT_FORMAT = 'AUTO' "
    "QUOTED_IDENTIFIERS_IGNORE_CASE = FALSE ERROR_ON_NONDETERMINISTIC_UPDATE = TRUE"
)


class Snowflake(Warehouse):
    """A Snowflake database. Rows reach it as Parquet files over the stage of the staging table, which goes with the table."""

    name: ClassVar[str] = "Snowflake"

    def __init__(self, conn_id: str, connect: Callable[[], Any]) -> None:
        super().__init__(conn_id, connect)
        #: the session's database and schema, for a table whose name says none
        self._home: tuple[str | None, str | None] = (None, None)

    def prepare(self, connection: Any) -> None:
        self.run(connection, "ALTER SESSION SET AUTOCOMMIT = TRUE")
        self.run(connection, f"ALTER SESSION SET {_SESSION}")
        ((database, schema),) = self.rows(connection, "SELECT CURRENT_DATABASE(), CURRENT_SCHEMA()")
        self._home = database, schema

    def begin(self, connection: Any) -> None:
        self.run(connection, "BEGIN TRANSACTION")

    def run(self, connection: Any, statement: str) -> None:
        self.rows(connection, statement)

    def rows(self, connection: Any, statement: str) -> list[tuple[Any, ...]]:
        try:
            return super().rows(connection, statement)
        except Exception as e:
            if getattr(e, "errno", None) == _DENIED or getattr(e, "sqlstate", None) == _DENIED_STATE:
                raise TableError(
                    f"Snowflake refused a statement on the connection {self.conn_id!r}: {e}. Its role needs USAGE on the warehouse and the "
                    "database, USAGE and CREATE TABLE on the schema, and SELECT, INSERT, UPDATE and DELETE on the table. Nothing was "
                    "written; results of batches that were sent before stay with the API for 29 days."
                ) from e
            raise

    def is_conflict(self, error: Exception) -> bool:
        return getattr(error, "errno", None) == _LOCK_ERROR or "deadlock" in str(error).lower()

    # --- names --------------------------------------------------------------------------------------------------------------------

    def quote(self, name: str) -> str:
        return _quoted(_folded(name))

    def beside(self, table: ResultTable, name: str) -> str:
        database, schema, _ = self._place(table.name)
        return f"{_quoted(database)}.{_quoted(schema)}.{self.quote(name)}"

    def spelled(self, table: ResultTable) -> str:
        return ".".join(map(_quoted, self._place(table.name)))

    def identity(self, connection: Any, name: str) -> str:
        return ".".join(part if _PLAIN.fullmatch(part) and part == part.upper() else _quoted(part) for part in self._place(name))

    def _place(self, name: str) -> tuple[str, str, str]:
        """Database, schema and table, as Snowflake keeps them.

        :raises TableError: when that is no name
        :raises BatchInputError: when neither the name nor the connection says the schema
        """
        parts: list[str] = []
        at = 0
        while found := _PART.match(name, at):
            parts.append(found[1].upper() if found[1] else found[2].replace('""', '"'))
            at = found.end() + 1
            if name[found.end() : at] != ".":
                break
        if at <= len(name) or not 1 <= len(parts) <= 3:
            raise TableError(
                f"{name!r} is no name of a table in Snowflake. Write it as in SQL: table, schema.table or database.schema.table, each in "
                'double quotes where it has other characters than letters, digits, _ and $, or lower case ("my table"). Nothing was sent.'
            )
        database = parts[-3] if len(parts) > 2 else self._home[0]
        schema = parts[-2] if len(parts) > 1 else self._home[1]
        if database is None or schema is None:
            raise BatchInputError(
                f"The connection {self.conn_id!r} names no {'database' if database is None else 'schema'}, and neither does the table "
                f"{name}. Nothing was sent or written."
            )
        return database, schema, parts[-1]

    # --- the table ----------------------------------------------------------------------------------------------------------------

    def check(self, connection: Any, table: ResultTable) -> bool:
        database, schema, name = self._place(table.name)
        self._check_names(table, name)
        catalog = f"{_quoted(database)}.INFORMATION_SCHEMA"
        if not self._has_schema(connection, catalog, schema):
            raise TableError(
                f"The table {table.name} is to be in {database}.{schema}, which does not exist, or the role of the connection "
                f"{self.conn_id!r} has no USAGE on it. Create it, or grant that. Nothing was sent or written."
            )
        here = f"table_schema = {_text(schema)} AND table_name = {_text(name)}"
        found = self._records(connection, f"SELECT * FROM {catalog}.TABLES WHERE {here}")
        kind = "a view" if self.rows(connection, f"SELECT 1 FROM {catalog}.VIEWS WHERE {here}") else _unwritable(found)
        if kind:
            raise TableError(f"The table {table.name} exists and cannot be written: it is {kind}. Nothing was sent or written.")
        if not found:
            check_columns(table, [], TYPES)
            return False
        collations = dict(self.rows(connection, f"SELECT column_name, collation_name FROM {catalog}.COLUMNS WHERE {here}"))
        columns = [
            found_column(row, collations.get(row["name"])) for row in self._records(connection, f"DESCRIBE TABLE {self.spelled(table)}")
        ]
        self._check_case(table, {column.name for column in columns})
        check_columns(table, columns, TYPES)
        self._check_grants(connection, table)
        return True

    def _records(self, connection: Any, statement: str) -> list[dict[str, Any]]:
        with closing(connection.cursor()) as cursor:
            cursor.execute(statement)
            names = [column[0].lower() for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _has_schema(self, connection: Any, catalog: str, schema: str) -> bool:
        try:
            return bool(self.rows(connection, f"SELECT 1 FROM {catalog}.SCHEMATA WHERE schema_name = {_text(schema)}"))
        except Exception as e:
            if getattr(e, "errno", None) == _NOT_FOUND:
                return False
            raise

    @staticmethod
    def _check_names(table: ResultTable, name: str) -> None:
        long = [name for name in (name, *table.column_names) if len(name) > _NAME_CHARACTERS]
        if long:
            raise TableError(
                f"{long[0]!r} has {len(long[0])} characters, and Snowflake takes names of {_NAME_CHARACTERS}. Nothing was sent."
            )

    @staticmethod
    def _check_case(table: ResultTable, columns: set[str]) -> None:
        wanted = [name for name in table.column_names if _folded(name) not in columns]
        apart = [f'"{found}"' for name in wanted for found in sorted(columns) if found.strip('"').lower() == name.lower()]
        if apart:
            raise TableError(
                f"The table {table.name} exists and has {', '.join(apart)} in another case than Snowflake gives to names without quotes, "
                'which a landing writes. Rename: ALTER TABLE … RENAME COLUMN "id" TO id. Nothing was sent or written.'.replace('""', '"')
            )

    def _check_grants(self, connection: Any, table: ResultTable) -> None:
        """Run each statement that a landing may need on no row.

        :raises TableError: naming what the role lacks
        """
        target, first = self.spelled(table), self.quote(table.key_names[0])
        tries = {
            "SELECT": f"SELECT {first} FROM {target} WHERE 1 = 0",
            "INSERT": f"INSERT INTO {target} ({first}) SELECT {first} FROM {target} WHERE 1 = 0",
            "UPDATE": f"UPDATE {target} SET {first} = {first} WHERE 1 = 0",
            "DELETE": f"DELETE FROM {target} WHERE 1 = 0",
        }
        lacking: list[str] = []
        said: TableError | None = None
        for privilege, statement in tries.items():
            try:
                self.rows(connection, statement)
            except TableError as e:
                lacking.append(privilege)
                said = e
        if lacking:
            raise TableError(
                f"The table {table.name} exists, and the role of the connection {self.conn_id!r} lacks {', '.join(lacking)} on it. Grant "
                "them. Nothing was written; results of batches that were sent before stay with the API for 29 days."
            ) from said

    def create(self, connection: Any, table: ResultTable, *, unique_key: bool) -> None:
        # no primary key: Snowflake would not enforce it. The landing itself sees to it that no key comes twice
        self.run(connection, f"CREATE TABLE IF NOT EXISTS {self.spelled(table)} ({self._columns(table)})")

    def _columns(self, table: ResultTable) -> str:
        return ", ".join(
            f"{self.quote(name)} {_sql_type(told)}{' NOT NULL' if name in table.key_names else ''}"
            for name, told in column_types(table).items()
        )

    def create_books(self, connection: Any, table: ResultTable) -> None:
        lock, fence, published = (self.beside(table, name) for name in (LOCK, FENCE, PUBLISHED))
        # the table and its only row come in one statement, so that there is never another number of them
        self.run(connection, f"CREATE TABLE IF NOT EXISTS {lock} AS SELECT 'nobody' AS holder")
        self.run(connection, f"CREATE TABLE IF NOT EXISTS {fence} (name VARCHAR NOT NULL, turn NUMBER(38,0) NOT NULL)")
        self.run(connection, f"CREATE TABLE IF NOT EXISTS {published} (load_id VARCHAR NOT NULL, attempt_id VARCHAR NOT NULL)")

    def is_empty(self, connection: Any, table: ResultTable) -> bool:
        with self.open() as fresh:
            return super().is_empty(fresh, table)

    # --- staging ------------------------------------------------------------------------------------------------------------------

    def stage(self, connection: Any, table: ResultTable, name: str, blocks: Iterable[Columns]) -> int:
        stage = self.beside(table, name)
        self.run(connection, f"CREATE OR REPLACE TRANSIENT TABLE {stage} ({self._columns(table)})")
        # the files of an earlier leg of the same attempt lie elsewhere
        place = f"@{stage.rpartition('.')[0]}.%{_folded(name)}/{uuid.uuid4().hex}"
        sent = False
        with tempfile.TemporaryDirectory(prefix="batchkit-snowflake-") as folder:
            for path in _parquet_files(Path(folder), table, blocks):
                local = str(path).replace("\\", "/").replace("'", "\\'")
                self.run(connection, f"PUT 'file://{local}' {place} AUTO_COMPRESS = FALSE OVERWRITE = TRUE")
                path.unlink()
                sent = True
        if sent:
            self.run(
                connection,
                f"COPY INTO {stage} FROM {place}/ FILE_FORMAT = (TYPE = PARQUET NULL_IF = ()) "
                "MATCH_BY_COLUMN_NAME = CASE_INSENSITIVE ON_ERROR = ABORT_STATEMENT",
            )
        return self.count(connection, table, name)

    def stages(self, connection: Any, table: ResultTable, prefix: str) -> list[str]:
        database, schema, _ = self._place(table.name)
        here = f"SELECT table_name FROM {_quoted(database)}.INFORMATION_SCHEMA.TABLES WHERE table_schema = {_text(schema)}"
        return [name.lower() for (name,) in self.rows(connection, here) if name.startswith(prefix.upper())]

    # --- fence, markers and publishing --------------------------------------------------------------------------------------------

    def lock(self, connection: Any, table: ResultTable) -> None:
        books = self.beside(table, LOCK)
        ((held, *_),) = self.rows(connection, f"UPDATE {books} SET holder = '{secrets.token_hex(8)}'")
        if int(held) != 1:
            raise TableError(
                f"{books} has {held} rows in place of its only one. DROP it; it is created again by the next try. Nothing was published."
            )

    def marked(self, connection: Any, table: ResultTable, load_ids: Sequence[str]) -> dict[str, str]:
        if not load_ids:
            return {}
        with self.open() as fresh:
            return super().marked(fresh, table, load_ids)

    def publish(self, connection: Any, table: ResultTable, fence: str, how: Publish) -> bool:
        with self.open() as fresh:
            return super().publish(fresh, table, fence, how)

    def update(self, table: ResultTable, how: Publish) -> str:
        # UPDATE takes no alias for the table that it changes
        target = self.spelled(table)
        values = ", ".join(f"{self.quote(name)} = s.{self.quote(name)}" for name in self._changed(table))
        return (
            f"UPDATE {target} SET {values} FROM {self.beside(table, how.stage)} s "
            f"WHERE {self._same(table, target, 's')} AND {self._better(how, target)}"
        )


def _folded(name: str) -> str:
    """A name as Snowflake keeps it where it is written without quotes; one that needs them stays as it is."""
    return name.upper() if _PLAIN.fullmatch(name) else name


def _quoted(name: str) -> str:
    return '"{}"'.format(name.replace('"', '""'))


def _text(text: str) -> str:
    return "'{}'".format(text.replace("\\", "\\\\").replace("'", "''"))


def _unwritable(found: Sequence[Mapping[str, Any]]) -> str | None:
    """What an object is in place of a table that takes rows."""
    if not found:
        return None
    kind, marks = str(found[0]["table_type"]), found[0]
    if kind != "BASE TABLE":
        return f"of the type {kind}"
    return next((f"a table with {name.upper()}" for name in ("is_dynamic", "is_immutable") if marks.get(name) == "YES"), None)


def found_column(row: Mapping[str, Any], collation: str | None) -> FoundColumn:
    """A column as DESCRIBE TABLE shows it.

    :param row: by the lower-case names of its columns
    :param collation: of the information schema
    """
    name, (kind, _, inline) = row["name"], str(row["type"]).partition(" COLLATE ")
    collation = (collation or inline or "").strip("'").lower()
    return FoundColumn(
        name if _folded(name) == name else f'"{name}"',
        kind,
        row["null?"] == "Y",
        # IDENTITY is shown as a default
        row["default"] is not None,
        row["kind"] != "COLUMN" or row.get("expression") is not None,
        collation in _EXACT,
    )


def _kind(told: str) -> str:
    return {"long text": "text", "kept json": "json", "json": "json"}.get(told) or key_kind(told)


def _sql_type(told: str) -> str:
    base, _, arguments = told.removesuffix(")").partition("(")
    return f"NUMBER({arguments})" if base == "numeric" and arguments else _TYPES[_kind(told)]


def _written(value: Any) -> str:
    """A value as a text that Snowflake casts to the column's type."""
    if isinstance(value, datetime):
        return (value if value.tzinfo is None else value.astimezone(UTC)).isoformat()
    if isinstance(value, date):
        return value.isoformat()
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def _parquet_files(folder: Path, table: ResultTable, blocks: Iterable[Columns]) -> Iterator[Path]:
    """Rows as files, each of which may be deleted once it was taken. Memory holds one row group."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds = [_kind(told) for told in column_types(table).values()]
    native = {"boolean": pa.bool_(), "integer": pa.int64(), "float": pa.float64()}
    # everything else goes as text: a number or a time in a Parquet file would pass through a VARIANT, which keeps fewer digits
    schema = pa.schema([(_folded(name), native.get(kind, pa.string())) for name, kind in zip(table.column_names, kinds, strict=True)])

    def array(values: Sequence[Any], kind: str) -> Any:
        if kind not in native and kind not in ("text", "json"):
            values = [None if value is None else _written(value) for value in values]
        return pa.array(values, native.get(kind, pa.string()))

    writer: Any = None
    path = folder
    number = 0
    for group in _groups(table, blocks):
        if writer is None:
            path, number = folder / f"{number}.parquet", number + 1
            writer = parquet.ParquetWriter(path, schema)
        writer.write_table(pa.Table.from_arrays([array(values, kind) for values, kind in zip(group, kinds, strict=True)], schema=schema))
        if path.stat().st_size > _FILE_BYTES:
            writer.close()
            writer = None
            yield path
    if writer is not None:
        writer.close()
        yield path


def _groups(table: ResultTable, blocks: Iterable[Columns]) -> Iterator[list[list[Any]]]:
    """Blocks put together to row groups of some size."""
    group: list[list[Any]] = [[] for _ in table.column_names]
    characters = 0
    for block in blocks:
        refuse_inexact(table, block, _DIGITS, _SCALE)
        for values, more in zip(group, block, strict=True):
            values.extend(more)
            characters += sum(len(value) for value in more if isinstance(value, str))
        if len(group[0]) >= _GROUP_ROWS or characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [[] for _ in table.column_names], 0
    if group[0]:
        yield group

"""MySQL and MariaDB as databases of results, with mysqlclient, PyMySQL or MySQL's own connector.

Keys are compared byte by byte: their columns have a binary collation that does not pad. The session is strict, so what does not fit is an
error and is never cut.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, ClassVar

from airflow_provider_batchkit.exceptions import BatchInputError, TableError
from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.landing.warehouse.base import Columns, Publish, Warehouse
from airflow_provider_batchkit.landing.warehouse.catalog import Dialect, FoundColumn, check_columns, column_types, refuse_inexact
from airflow_provider_batchkit.model import key_kind

#: characters of a text key: a row has 65,535 bytes in all, and a character up to four
_KEY_CHARACTERS = 2048
#: bytes of an index's entry
_INDEX_BYTES = 3072
_NAME_CHARACTERS = 64
_DIGITS, _SCALE = 38, 12
#: characters and rows of one INSERT, far below the 16 MB that a server takes by default; a longer row goes alone
_TOGETHER, _ROWS = 1_000_000, 500
#: lock wait timeout, deadlock
_CONFLICTS = (1205, 1213)

_TYPES = {
    "boolean": "BOOLEAN",
    "smallint": "SMALLINT",
    "int": "INT",
    "integer": "BIGINT",
    "numeric": f"DECIMAL({_DIGITS},{_SCALE})",
    "float": "DOUBLE",
    "timestamp": "DATETIME(6)",
    "timestamptz": "DATETIME(6)",
    "date": "DATE",
    "uuid": "CHAR(36)",
    "json": "LONGTEXT",
}
_CLASSES = {
    "tinyint": "boolean",
    **dict.fromkeys(("smallint", "mediumint", "int", "bigint", "smallint unsigned", "int unsigned", "bigint unsigned"), "integer"),
    "decimal": "numeric",
    "double": "float",
    # TIMESTAMP is turned from and into the session's time zone, and ends in 2038
    "datetime": "timestamptz",
    "date": "date",
    "json": "json",
    **dict.fromkeys(("char", "varchar", "tinytext", "text", "mediumtext", "longtext"), "text"),
}
_KEYS = {kind: {kind} for kind in ("boolean", "float", "text", "timestamptz", "numeric", "date")} | {
    "integer": {"integer", "numeric"},
    "timestamp": {"timestamptz"},
    "uuid": {"text"},
}


class MySQL(Warehouse):
    """A MySQL or MariaDB database: rows are locked, and a raised fence waits for the publish that holds it."""

    name: ClassVar[str] = "MySQL"
    quote_character: ClassVar[str] = "`"

    def prepare(self, connection: Any) -> None:
        if hasattr(connection, "set_charset_collation"):  # MySQL's own connector
            connection.set_charset_collation("utf8mb4")
        else:
            connection.set_character_set("utf8mb4")
        self.run(connection, "SET SESSION sql_mode = 'STRICT_TRANS_TABLES,STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'")
        self.run(connection, "SET SESSION time_zone = '+00:00'")
        connection.commit()

    def begin(self, connection: Any) -> None:
        # ends what a query has begun, whose snapshot would be older than the fence
        connection.rollback()
        self.run(connection, "START TRANSACTION")

    def is_conflict(self, error: Exception) -> bool:
        return getattr(error, "errno", None) in _CONFLICTS or bool(error.args and error.args[0] in _CONFLICTS)

    # --- the table ----------------------------------------------------------------------------------------------------------------

    def _place(self, connection: Any, name: str) -> tuple[str, str]:
        schema, _, table = name.rpartition(".")
        found, folds = self.rows(connection, "SELECT DATABASE(), @@lower_case_table_names")[0]
        if not (schema or found):
            raise BatchInputError(f"The connection {self.conn_id!r} names no database (its schema). Nothing was sent or written.")
        schema = schema or str(found)
        return (schema.lower(), table.lower()) if int(folds) else (schema, table)

    def identity(self, connection: Any, name: str) -> str:
        return ".".join(self._place(connection, name))

    def check(self, connection: Any, table: ResultTable) -> bool:
        self._check_names(table)
        schema, name = map(self._text, self._place(connection, table.name))
        # what was created since a transaction's snapshot would not be seen
        connection.rollback()
        here = f"table_schema = {schema} AND table_name = {name}"
        found = self.rows(connection, f"SELECT table_type, engine FROM information_schema.tables WHERE {here}")
        dialect = self._dialect(connection)
        if not found:
            if not self.rows(connection, f"SELECT 1 FROM information_schema.schemata WHERE schema_name = {schema}"):
                raise TableError(
                    f"The table {table.name} is to be in a database that does not exist. Create it. Nothing was sent or written."
                )
            check_columns(table, [], dialect)
            return False
        if "VIEW" in str(found[0][0]) or found[0][1] != "InnoDB":
            kind = "a view" if "VIEW" in str(found[0][0]) else f"kept by {found[0][1]}, which has no transactions"
            raise TableError(f"The table {table.name} exists and cannot be written: it is {kind}. Nothing was sent or written.")
        columns = "column_name, column_type, is_nullable, column_default, extra, collation_name, privileges"
        rows = self.rows(connection, f"SELECT {columns} FROM information_schema.columns WHERE {here} ORDER BY ordinal_position")
        check_columns(table, [_found(*row) for row in rows], dialect)
        if table.needs == "DELETE":
            self._check_delete(connection, table)
        return True

    def _check_delete(self, connection: Any, table: ResultTable) -> None:
        """:raises TableError: when this user may not delete rows; a statement on no row tells, whatever role or grant gives the right"""
        try:
            self.run(connection, f"DELETE FROM {self.spelled(table)} WHERE 1 = 0")
        except Exception as e:
            raise TableError(
                f"The table {table.name} exists and cannot be written as wanted: this user may not DELETE its rows, which append and "
                f"replace do (GRANT DELETE): {e}. Nothing was written; results of batches that were sent before stay with the API for 29 "
                "days."
            ) from e
        finally:
            connection.rollback()

    def _dialect(self, connection: Any) -> Dialect:
        most = (65, 38 if self._is_mariadb(connection) else 30)
        return Dialect(_CLASSES, {**_TYPES, "text": self._key_text(connection)}, _KEYS, (_DIGITS, _SCALE), most)

    @staticmethod
    def _check_names(table: ResultTable) -> None:
        long = [name for name in (table.table.name, *table.column_names) if len(name) > _NAME_CHARACTERS]
        if long:
            raise TableError(f"{long[0]!r} has {len(long[0])} characters, and MySQL takes names of {_NAME_CHARACTERS}. Nothing was sent.")

    @staticmethod
    def _text(text: str) -> str:
        return "'{}'".format(text.replace("\\", "\\\\").replace("'", "''"))

    def _is_mariadb(self, connection: Any) -> bool:
        return "mariadb" in str(self.rows(connection, "SELECT VERSION()")[0][0]).lower()

    def _collation(self, connection: Any) -> str:
        return "utf8mb4_nopad_bin" if self._is_mariadb(connection) else "utf8mb4_0900_bin"

    def _key_text(self, connection: Any, characters: int = _KEY_CHARACTERS) -> str:
        return f"VARCHAR({characters}) CHARACTER SET utf8mb4 COLLATE {self._collation(connection)}"

    def _columns(self, connection: Any, table: ResultTable) -> list[str]:
        found = []
        for name, told in column_types(table).items():
            is_key = name in table.key_names
            base, _, arguments = told.removesuffix(")").partition("(")
            kind = _kind(told)
            if kind == "text":
                characters = min(int(arguments), _KEY_CHARACTERS) if base in ("char", "varchar") else _KEY_CHARACTERS
                long = told in ("long text", "kept json")
                sql = "LONGTEXT CHARACTER SET utf8mb4" if long else self._key_text(connection, characters)
            else:
                sql = f"DECIMAL({arguments})" if base == "numeric" and arguments else _TYPES.get(base) or _TYPES[kind]
                if kind == "uuid":
                    sql += f" CHARACTER SET utf8mb4 COLLATE {self._collation(connection)}"
            found.append(f"{self.quote(name)} {sql} {'NOT NULL' if is_key else 'NULL'}")
        # no primary key: an index has no room for a long text. The landing itself sees to it that no key comes twice
        share = min(255, _INDEX_BYTES // 4 // len(table.key_names))
        types = column_types(table)
        keys = [
            self.quote(name) + (f"({min(share, _length(types[name]))})" if key_kind(types[name]) == "text" else "")
            for name in table.key_names
        ]
        return [*found, f"KEY batchkit_key ({', '.join(keys)})"]

    def create(self, connection: Any, table: ResultTable, *, unique_key: bool) -> None:
        columns = ", ".join(self._columns(connection, table))
        self.run(connection, f"CREATE TABLE IF NOT EXISTS {self.spelled(table)} ({columns}) ENGINE = InnoDB")

    def create_books(self, connection: Any, table: ResultTable) -> None:
        super().create_books(connection, table)
        connection.rollback()

    # --- staging ------------------------------------------------------------------------------------------------------------------

    def stage(self, connection: Any, table: ResultTable, name: str, blocks: Iterable[Columns]) -> int:
        stage = self.beside(table, name)
        self.drop(connection, table, [name])
        self.run(connection, f"CREATE TABLE {stage} ({', '.join(self._columns(connection, table))}) ENGINE = InnoDB")
        convert = [_CONVERT.get(_kind(told)) for told in column_types(table).values()]
        places = ", ".join(["%s"] * len(convert))
        insert = f"INSERT INTO {stage.replace('%', '%%')} VALUES ({places})"
        with self.transaction(connection), closing(connection.cursor()) as cursor:
            for block in blocks:
                refuse_inexact(table, block, _DIGITS, _SCALE)
                values = [
                    [None if value is None else how(value) for value in column] if how else column
                    for how, column in zip(convert, block, strict=True)
                ]
                for rows in _pieces(list(zip(*values, strict=True))):
                    cursor.executemany(insert, rows)
        found = self.count(connection, table, name)
        connection.rollback()
        return found

    def stages(self, connection: Any, table: ResultTable, prefix: str) -> list[str]:
        schema = self._text(self._place(connection, table.name)[0])
        found = self.rows(connection, f"SELECT table_name FROM information_schema.tables WHERE table_schema = {schema}")
        connection.rollback()
        return [name for (name,) in found if name.startswith(prefix)]

    # --- publishing ---------------------------------------------------------------------------------------------------------------

    def update(self, table: ResultTable, how: Publish) -> str:
        values = ", ".join(f"t.{self.quote(name)} = s.{self.quote(name)}" for name in self._changed(table))
        return (
            f"UPDATE {self.spelled(table)} t JOIN {self.beside(table, how.stage)} s ON {self._same(table, 't', 's')} "
            f"SET {values} WHERE {self._better(how)}"
        )


def _found(name: str, kind: Any, nullable: str, default: Any, extra: str, collation: str | None, rights: str) -> FoundColumn:
    made = "generated" in extra.lower() and "default_generated" not in extra.lower()
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    # MariaDB's nopad ones, and MySQL's only one that does not pad
    exact = collation is None or collation.endswith("_nopad_bin") or collation == "utf8mb4_0900_bin"
    writable = {"insert", "update"} <= set(rights.split(","))
    return FoundColumn(name, kind, nullable == "YES", default is not None or "auto_increment" in extra, made, exact, writable)


def _kind(told: str) -> str:
    return {"long text": "text", "kept json": "text", "json": "json"}.get(told) or key_kind(told)


def _length(told: str) -> int:
    """Characters of a text column."""
    base, _, arguments = told.removesuffix(")").partition("(")
    return int(arguments) if base in ("char", "varchar") else _KEY_CHARACTERS


def _utc(value: datetime) -> datetime:
    return value.astimezone(UTC).replace(tzinfo=None)


_CONVERT: dict[str, Callable[[Any], Any]] = {"uuid": lambda value: str(uuid.UUID(str(value))), "timestamptz": _utc, "boolean": int}


def _pieces(rows: list[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """Rows that go into one statement."""
    piece: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        length = sum(len(value) for value in row if isinstance(value, str))
        if piece and (size + length > _TOGETHER or len(piece) >= _ROWS):
            yield piece
            piece, size = [], 0
        piece.append(row)
        size += length
    if piece:
        yield piece

"""What in an existing table, or in the place for a new one, keeps results from landing, as far as it shows before anything is paid.

The information is from the database's catalog; no row is read and nothing is locked.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import DOMAIN
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.engine.interfaces import ReflectedColumn
from sqlalchemy.engine.reflection import Inspector
from sqlalchemy.exc import NoSuchTableError

from airflow_provider_batchkit.landing.columns import fits, key_fits, result_fits, sql_type
from airflow_provider_batchkit.landing.names import column_name
from airflow_provider_batchkit.ledger.names import spelled
from airflow_provider_batchkit.model import RequestStatus

#: text column → the least length that holds each of its values, where these are known
_LEAST_CHARACTERS = {"status": max(len(status.value) for status in RequestStatus)}
#: columns that are null for every row with a plain answer
_ALWAYS_NULL = ("error_type", "error_message", "content", "stop_details", "request_id")

#: the first SQLite that has STRICT tables and lists them
_SQLITE_WITH_STRICT = (3, 37)
#: column → types of a STRICT table that refuse its values; a BLOB column refuses those of every other column
_REFUSING_STRICT: Mapping[str, tuple[type[Any], ...]] = {
    "cost_usd": (sa.LargeBinary, sa.Integer),
    "landed_at": (sa.LargeBinary, sa.Integer, sa.Float),
}

#: bits of pg_relation_is_updatable for UPDATE, INSERT and DELETE
_WRITABLE = 28
_RIGHTS = sa.text(
    "SELECT pg_relation_is_updatable(c.oid, true) AS may,"
    # a trigger before each INSERT may fill any column
    " EXISTS(SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgtype & 7 = 7) AS filled,"
    " ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
    " AND NOT (has_column_privilege(c.oid, a.attnum, 'INSERT') AND pg_column_is_updatable(c.oid, a.attnum, true))) AS closed,"
    " has_table_privilege(c.oid, 'DELETE') AS may_delete,"
    " ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
    " AND NOT has_column_privilege(c.oid, a.attnum, 'UPDATE')) AS fixed"
    " FROM pg_class c WHERE c.oid = to_regclass(:spelled)"
)
_PLACE = sa.text(
    "SELECT n.nspname, has_schema_privilege(n.oid, 'USAGE') AS use, has_schema_privilege(n.oid, 'CREATE') AS make"
    " FROM pg_namespace n WHERE n.nspname = COALESCE(:schema, current_schema())"
)


@dataclass(frozen=True, slots=True)
class WantedColumns:
    """The columns that a landing writes."""

    #: key column → name of its type; empty where ``custom_id`` is the key
    keys: Mapping[str, str]
    #: answer column → its kind
    answers: Mapping[str, str]
    #: every column, with the type that a new table would have
    types: Mapping[str, Any]
    #: the right on the table that a landing needs beside SELECT and INSERT; None where it is not known
    right: str | None = None


class ExistingTable:
    """A table of the database as the catalog shows it."""

    def __init__(self, connection: Connection, table: sa.Table) -> None:
        self._connection = connection
        self._dialect: Dialect = connection.dialect
        self._name, self._schema = table.name, table.schema
        self._inspector: Inspector = sa.inspect(connection)
        self._columns: dict[str, ReflectedColumn] | None = None
        self._place = self._place_problem()
        if self._place is not None:
            return
        try:
            found = self._inspector.get_columns(self._name, schema=self._schema)
        except NoSuchTableError:
            self._place = self._creation_problem()
        else:
            self._columns = {column_name(column["name"], self._dialect): column for column in found}

    @property
    def exists(self) -> bool:
        """Whether the table exists."""
        return self._columns is not None

    @property
    def dialect(self) -> Dialect:
        """The database's dialect."""
        return self._dialect

    @property
    def columns(self) -> list[str]:
        """The names of its columns, in their order."""
        return [column["name"] for column in (self._columns or {}).values()]

    @property
    def is_table(self) -> bool:
        """Whether it is a table and not a view."""
        return column_name(self._name, self._dialect) in {
            column_name(name, self._dialect) for name in self._inspector.get_table_names(schema=self._schema)
        }

    def has(self, name: str) -> bool:
        """Whether it has a column of this name, as the database compares names."""
        return self._columns is not None and column_name(name, self._dialect) in self._columns

    def compared(self, name: str) -> str:
        """A column's name as the database compares it."""
        return column_name(name, self._dialect)

    def type_of(self, column: str) -> Any:
        """The type of a column that the table has."""
        return self._column(column)["type"]

    def problems(self, wanted: WantedColumns) -> list[str]:
        """Reasons why results cannot land or would be changed, as parts of a sentence."""
        if self._place is not None or not self.exists:
            return [self._place] if self._place is not None else []
        lacking = [
            f"{name} {self._sql(wanted.types[name])}" if name in wanted.answers else name for name in wanted.types if not self.has(name)
        ]
        return [
            *_sentence("lacks the columns ", lacking),
            *_sentence("does not fit the source's key: ", self._unfit(wanted.keys, key_fits, wanted)),
            *_sentence("does not fit output_schema: ", self._unfit(wanted.answers, fits, wanted)),
            *_sentence("does not fit the results: ", self._unfit_results(wanted)),
            *_sentence("is STRICT, and these columns take no value that a landing writes (make them TEXT or REAL): ", self._strict(wanted)),
            *self._closed(wanted),
        ]

    # --- columns ------------------------------------------------------------------------------------------------------------------

    def _unfit(self, kinds: Mapping[str, str], test: Any, wanted: WantedColumns) -> list[str]:
        return [
            self._is_and_must_be(name, wanted)
            for name, kind in kinds.items()
            if self.has(name) and not test(kind, self.type_of(name), self._dialect)
        ]

    def _unfit_results(self, wanted: WantedColumns) -> list[str]:
        unfit = []
        for name in wanted.types:
            if name in wanted.keys or name in wanted.answers or not self.has(name):
                continue
            found = self.type_of(name)
            length = None if self._dialect.name == "sqlite" else getattr(found, "length", None)
            if not result_fits(name, found, self._dialect) or (length is not None and length < _LEAST_CHARACTERS.get(name, 0)):
                unfit.append(self._is_and_must_be(name, wanted))
        return unfit

    def _strict(self, wanted: WantedColumns) -> list[str]:
        """Columns of a STRICT table of SQLite that would refuse their values; in other tables of SQLite a column takes any value."""
        if self._dialect.name != "sqlite" or sqlite3.sqlite_version_info < _SQLITE_WITH_STRICT:
            return []
        strict = sa.text("SELECT MAX(strict) FROM pragma_table_list WHERE name = :name COLLATE NOCASE AND schema = :schema COLLATE NOCASE")
        if not self._connection.execute(strict, {"name": self._name, "schema": self._schema or "main"}).scalar():
            return []
        found = {name: self.type_of(name) for name in wanted.types if self.has(name)}
        return [
            f"{name} {self._sql(type_)}" for name, type_ in found.items() if isinstance(type_, _REFUSING_STRICT.get(name, sa.LargeBinary))
        ]

    def _is_and_must_be(self, name: str, wanted: WantedColumns) -> str:
        return f"{name} is {self._sql(self.type_of(name))} and must be {self._sql(wanted.types[name])}"

    # --- rights and constraints -----------------------------------------------------------------------------------------------------

    def _closed(self, wanted: WantedColumns) -> list[str]:
        """What cannot be written: the table, columns of ours, or a row that omits columns that are not ours."""
        rights = self._rights()
        if rights is not None and rights.may & _WRITABLE != _WRITABLE:
            return ["cannot be written: it is a view, or a table of another kind that takes no INSERT, UPDATE and DELETE"]
        if self._dialect.name == "sqlite" and self._is_sqlite_view():
            return ["cannot be written: it is a view"]
        made = [name for name in wanted.types if self.has(name) and _is_generated(self._column(name))]
        own = {name for name in wanted.types if name not in wanted.keys and name not in wanted.answers}
        null = [name for name in _ALWAYS_NULL if name in own and self.has(name) and _refuses_null(self._column(name))]
        shut = [] if rights is None else [name for name in wanted.types if name in rights.closed and name not in made]
        lacking = None
        if rights is not None and wanted.right == "DELETE" and not rights.may_delete:
            lacking = "cannot be written as wanted: this user may not DELETE its rows, which append and replace do (GRANT DELETE)"
        fixed = (
            [] if rights is None or wanted.right != "UPDATE" else [n for n in wanted.types if n in rights.fixed and n not in wanted.keys]
        )
        names = {column_name(name, self._dialect) for name in wanted.types}
        assert self._columns is not None
        filled = rights is not None and rights.filled
        unfilled = [c["name"] for name, c in self._columns.items() if name not in names and not filled and self._must_be_given(c)]
        return [
            *_sentence("generates columns that a landing writes (make them plain columns): ", made),
            *_sentence("has NOT NULL columns that are NULL in every row with an answer (drop NOT NULL): ", null),
            *_sentence("has columns that this user may not write or the view does not pass on: ", shut),
            *_sentence("has NOT NULL columns without a default that a landing does not write (give them a default): ", unfilled),
            *_sentence("has columns that this user may not update, which a merge does (GRANT UPDATE): ", fixed),
            *([lacking] if lacking else []),
        ]

    def _must_be_given(self, column: ReflectedColumn) -> bool:
        """Whether an INSERT without the column fails."""
        if not _refuses_null(column):
            return False
        found = column["type"]
        domain = found if isinstance(found, DOMAIN) else None
        given = column.get("default") is not None or (domain is not None and domain.default is not None)
        if given or _is_generated(column) or column.get("identity") or column.get("autoincrement") is True:
            return False
        # SQLite numbers the rows in a primary key of one INTEGER column
        alone = self._dialect.name == "sqlite" and self._primary_key() == [column["name"]]
        return not (alone and isinstance(found, sa.Integer))

    def _primary_key(self) -> list[str]:
        return self._inspector.get_pk_constraint(self._name, schema=self._schema)["constrained_columns"]

    def _rights(self) -> Any:
        """The user's rights on the table; None where they are not known."""
        if self._dialect.name != "postgresql":
            return None
        return self._connection.execute(_RIGHTS, {"spelled": spelled(self._schema, self._name)}).first()

    def _is_sqlite_view(self) -> bool:
        views = self._inspector.get_view_names(schema=self._schema)
        return column_name(self._name, self._dialect) in {column_name(view, self._dialect) for view in views}

    # --- the place ------------------------------------------------------------------------------------------------------------------

    def _place_problem(self) -> str | None:
        """The problem with the schema, whether or not the table exists."""
        if self._schema is None:
            return None
        if self._dialect.name == "sqlite":
            known = {column_name(schema, self._dialect) for schema in (*self._inspector.get_schema_names(), "main")}
            return None if column_name(self._schema, self._dialect) in known else self._no_schema()
        if self._dialect.name == "postgresql":
            place = self._postgres_place()
            if place is None:
                return self._no_schema()
            return None if place.use else f"is in the schema {self._schema}, which this user may not use (GRANT USAGE)"
        return None

    def _creation_problem(self) -> str | None:
        """Why the table, which does not exist, cannot be created."""
        if self._dialect.name != "postgresql":
            return None
        place = self._postgres_place()
        if place is None:
            return "does not exist, and the connection's search_path names no schema to create it in"
        return None if place.make else f"does not exist, and this user may not create it in the schema {place.nspname} (GRANT CREATE)"

    def _no_schema(self) -> str:
        return f"is to be in the schema {self._schema}, which does not exist (create it)"

    def _postgres_place(self) -> Any:
        return self._connection.execute(_PLACE, {"schema": self._schema}).first()

    # --- inside -------------------------------------------------------------------------------------------------------------------

    def _column(self, name: str) -> ReflectedColumn:
        assert self._columns is not None
        return self._columns[column_name(name, self._dialect)]

    def _sql(self, type_: Any) -> str:
        return sql_type(type_, self._dialect)


def _is_generated(column: ReflectedColumn) -> bool:
    identity = column.get("identity")
    return bool(column.get("computed")) or bool(identity and identity.get("always"))


def _refuses_null(column: ReflectedColumn) -> bool:
    """Whether the column, or the domain that is its type, is NOT NULL."""
    if not column["nullable"]:
        return True
    found: Any = column["type"]
    while isinstance(found, DOMAIN):
        if found.not_null:
            return True
        found = found.data_type
    return False


def _sentence(beginning: str, parts: list[str]) -> list[str]:
    return [beginning + ", ".join(parts)] if parts else []

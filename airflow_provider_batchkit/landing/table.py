"""The result table: its columns, and whether an existing table has them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from enum import Enum
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from airflow_provider_batchkit.exceptions import BatchInputError, TableError
from airflow_provider_batchkit.landing.columns import ANSWER_TYPES, KEPT_JSON, changes, sql_type
from airflow_provider_batchkit.landing.evolve import FIRST_RELEASE, Layout, add_columns
from airflow_provider_batchkit.landing.existing import ExistingTable, WantedColumns
from airflow_provider_batchkit.landing.key_types import ExactDecimal, key_decoder, key_type, lands_as_told, staged_type
from airflow_provider_batchkit.landing.names import name_problems
from airflow_provider_batchkit.ledger.engine import write_transaction
from airflow_provider_batchkit.ledger.names import table_identity
from airflow_provider_batchkit.ledger.tables import UtcDateTime
from airflow_provider_batchkit.model import key_kind
from airflow_provider_batchkit.schema import OutputSchema

log = logging.getLogger(__name__)


class WriteDisposition(str, Enum):
    """How results are combined with the rows that the table already holds."""

    #: a row with the same key is updated, others are added; a failed request never overwrites an answer
    MERGE = "merge"
    #: rows are added; landing the same batch again replaces that batch's own rows
    APPEND = "append"
    #: the table holds these results and nothing else
    REPLACE = "replace"

    @classmethod
    def parse(cls, value: str) -> WriteDisposition:
        """:raises BatchInputError: for any other value"""
        try:
            return cls(value)
        except ValueError:
            raise BatchInputError(f"write_disposition must be one of {', '.join(d.value for d in cls)}, not {value!r}.") from None


_KEYS = msgspec.json.Decoder(list[list[Any]])
_VALUES = msgspec.json.Decoder(list[Any])

#: (name, type) of the columns that a new result table has beside the source's key; columns of later releases come last
RESULT_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("response", sa.Text()),
    ("status", sa.String(16)),
    ("stop_reason", sa.String(64)),
    ("error_type", sa.String(100)),
    ("error_message", sa.Text()),
    ("model", sa.String(100)),
    ("input_tokens", sa.BigInteger()),
    ("output_tokens", sa.BigInteger()),
    ("cost_usd", ExactDecimal(12)),
    ("custom_id", sa.String(64)),
    ("batch_id", sa.String(100)),
    ("landed_at", UtcDateTime()),
    # the whole content of an answer that is not plain text
    ("content", KEPT_JSON),
    ("stop_details", KEPT_JSON),
    ("message_id", sa.String(100)),
    ("request_id", sa.String(100)),
    # the round of its job that gave the row
    ("round", sa.Integer()),
)
#: columns whose values are staged as text
_STAGED_AS_TEXT = ("cost_usd", "content", "stop_details")
RESULT_NAMES = tuple(name for name, _ in RESULT_COLUMNS)
#: columns that a stage has beside those of the table
STAGE_COLUMNS: tuple[tuple[str, Any], ...] = (
    # further facts that the ledger keeps of a failed row, with costs in picodollars; null for a row that succeeded
    ("batchkit_batch_cost", sa.BigInteger()),
    ("batchkit_standard_cost", sa.BigInteger()),
    ("batchkit_key", sa.Text()),
    ("batchkit_asked", sa.Boolean()),
)
_STAGE_NAMES = tuple(name for name, _ in STAGE_COLUMNS)


class ResultTable:
    """A target table and the key that identifies its rows."""

    def __init__(
        self,
        name: str,
        key_columns: Sequence[tuple[str, str]],
        schema: OutputSchema | None = None,
        widest: Mapping[str, Sequence[Any]] | None = None,
        disposition: WriteDisposition | None = None,
    ) -> None:
        """
        :param name: ``table`` or ``schema.table``
        :param key_columns: (column, type name) as the source gave them; empty for a batch without a source, whose key is ``custom_id``
        :param schema: the schema that the answers must fit; each of its properties is a column
        :param widest: key column → keys that need the most room in it, where the source has just been read
        :param disposition: how results will be written, where that is known
        :raises TableError: a key column or a property has the name of another column
        """
        in_schema, _, table_name = name.rpartition(".")
        if not table_name:
            raise TableError(f"The table name {name!r} is empty.")
        names = [column.lower() for column, _ in key_columns]
        if len(set(names)) < len(names):
            raise TableError(f"The key has a column twice: {', '.join(column for column, _ in key_columns)}.")
        # a key or a property may take the name of a column that a later release has added
        clash = [column for column, _ in key_columns if column.lower() in FIRST_RELEASE]
        if clash:
            raise TableError(
                f"The key column {', '.join(clash)} has the name of a result column of {name}. Give it an alias in the source's sql "
                f"(result columns: {', '.join(FIRST_RELEASE)})."
            )
        clash = [column for column, _ in key_columns if column.lower() in _STAGE_NAMES]
        if clash:
            raise TableError(
                f"The key column {', '.join(clash)} has a name that is needed for what is not written to {name}. Give it an alias in the "
                "source's sql. Nothing was sent or written."
            )
        answers = () if schema is None else schema.columns
        clash = [column.name for column in answers if column.name.lower() in (*names, *FIRST_RELEASE)]
        if clash:
            raise TableError(
                f"The property {', '.join(clash)} of output_schema has the name of another column of the result table. Rename it; "
                f"taken are {', '.join(column for column, _ in key_columns)}, {', '.join(FIRST_RELEASE)}. Nothing was sent or written."
            )
        self.schema = schema
        #: the right that this user needs on the table beside SELECT and INSERT; None where the disposition is not known
        self.needs = None if disposition is None else "UPDATE" if disposition is WriteDisposition.MERGE else "DELETE"
        self._widest = widest or {}
        #: (name, type) of the answers' properties
        self.answer_columns = tuple((column.name, ANSWER_TYPES[column.kind]) for column in answers)
        self.json_names = frozenset(column.name for column in answers if column.kind == "json")
        self.name = name
        self.key_columns = tuple(key_columns)
        self.key_names = tuple(column for column, _ in key_columns) or ("custom_id",)
        taken = {*names, *(column.name.lower() for column in answers)}
        #: the result columns of a new table
        self.result_names = tuple(name for name in RESULT_NAMES if name not in taken)
        #: the result columns that are written to the table that :meth:`check` found
        self._layout = Layout()
        #: types of the key columns of the table that :meth:`check` found
        self._found_keys: dict[str, Any] = {}
        self._decoders = [key_decoder(type_name) for _, type_name in key_columns]
        keys = [sa.Column(column, key_type(type_name), nullable=False, autoincrement=False) for column, type_name in key_columns]
        results = [
            sa.Column(column, type_, nullable=column != "custom_id") for column, type_ in RESULT_COLUMNS if column in self.result_names
        ]
        self.table = sa.Table(
            table_name,
            sa.MetaData(),
            *keys,
            *(sa.Column(column, type_) for column, type_ in self.answer_columns),
            *results,
            schema=in_schema or None,
        )

    @property
    def column_names(self) -> tuple[str, ...]:
        """The columns that a landing writes: key columns, the answers' properties, then result columns."""
        return tuple(column.name for column in self.table.columns if column.name not in self._layout.left_out)

    def widest(self, column: str) -> list[Any]:
        """The keys that need the most room in a key column, as values of its kind; empty where the source was not read."""
        kind = key_kind(dict(self.key_columns)[column])
        fitting = {"text": str, "integer": int, "numeric": (int, Decimal)}.get(kind, ())
        return [key for key in self._widest.get(column, ()) if isinstance(key, fitting)]  # type: ignore[arg-type]

    def leave_out(self, names: Iterable[str]) -> None:
        """Note the result columns that a landing does not write because the table lacks them."""
        self._layout = Layout(frozenset(names))

    @property
    def written_results(self) -> frozenset[str]:
        """The result columns that a landing writes."""
        return frozenset(self.result_names) - self._layout.left_out

    @property
    def cast_names(self) -> list[str]:
        """The columns that a landing writes and stages as text."""
        return [*(name for name in _STAGED_AS_TEXT if name in self.written_results), *self.json_names]

    def key_values(self, journaled: Sequence[str]) -> Sequence[Sequence[Any]]:
        """Journaled keys, each a JSON array, as columns of values that have the key columns' types."""
        if not self.key_columns:
            return []
        # the keys are parsed as one document: parsing each alone takes three times as long
        if len(self.key_columns) == 1:
            columns: Sequence[Sequence[Any]] = [_VALUES.decode(f"[{','.join([key[1:-1] for key in journaled])}]")]
        else:
            columns = list(zip(*_KEYS.decode(f"[{','.join(journaled)}]"), strict=True))
        return [list(map(decode, column)) if decode else column for decode, column in zip(self._decoders, columns, strict=True)]

    def check_names(self, dialect: Dialect) -> None:
        """Check that a database takes the names of the columns and of the table. Nothing is read from the database.

        :raises TableError: naming the names that it does not take
        """
        names = [
            *(("key column", name) for name in self.key_names),
            *(("property", name) for name, _ in self.answer_columns),
            *([("schema", self.table.schema)] if self.table.schema else []),
            ("table", self.table.name),
        ]
        problems = name_problems(names, dialect)
        if problems:
            raise TableError(
                f"{self.name} cannot be a result table: the {'; the '.join(problems)}. Give a key column another alias in the source, "
                "rename a property of output_schema, or name another table. Nothing was sent or written."
            )

    def check(self, engine: Engine) -> bool:
        """Whether the table exists. Finds all problems that can be known before anything is sent or written.

        :raises TableError: results could not land in the table, it could not be created, or it would change values; lists every reason
        """
        self.check_names(engine.dialect)
        answers = () if self.schema is None else self.schema.columns
        with engine.connect() as connection:
            found = ExistingTable(connection, self.table)
            names = [column for column, _ in self.key_columns]
            self._layout = Layout.of(found, names, self.result_names) if found.exists else Layout()
            wanted = WantedColumns(
                dict(self.key_columns),
                {column.name: column.kind for column in answers},
                {name: self.table.c[name].type for name in self.column_names},
                self.needs,
            )
            problems = found.problems(wanted)
            if found.exists and not problems:
                self._refuse_narrow_keys(connection, found)
        if problems:
            raise TableError(
                f"The table {self.name} {'exists and ' if found.exists else ''}{'; it '.join(problems)}. Alter it, or name another table. "
                "Nothing was written; results of batches that were sent before stay with the API for 29 days."
            )
        self._found_keys = {name: found.type_of(name) for name, _ in self.key_columns} if found.exists else {}
        for name, type_name in self.key_columns if found.exists else ():
            if not lands_as_told(type_name, self._found_keys[name], engine.dialect):
                told, has = (sql_type(type_, engine.dialect) for type_ in (key_type(type_name), self._found_keys[name]))
                log.warning(
                    "The key column %s is %s in the source and %s in the table %s. It keeps the source's values, and a JOIN with the "
                    "source may not find them. ALTER TABLE %s ALTER COLUMN %s TYPE %s mends that.",
                    *(name, told, has, self.name, self.name, name, told),
                )
        return found.exists

    def staged_keys(self, dialect: Dialect) -> list[tuple[str, Any]]:
        """(name, type) of the stage's key columns. The table that :meth:`check` found compares these with its own, and keeps them."""
        return [(name, staged_type(type_name, self._found_keys.get(name), dialect)) for name, type_name in self.key_columns]

    def check_keys(self, connection: Connection, rows: sa.Table, batch_id: str) -> None:
        """Check that the table's key columns, as :meth:`check` found them, keep the keys of staged rows as they are.

        :param rows: the stage's table
        :raises TableError: the table would store a key as another one, or the database cannot store one; the message names or quotes it
        """
        dialect = connection.dialect
        for name, type_name in self.key_columns:
            found = self._found_keys.get(name)
            changed = None if found is None else changes(type_name, found, rows.c[name], dialect)
            if changed is None:
                continue
            try:
                key = connection.execute(sa.select(rows.c[name]).where(changed).limit(1)).first()
            except (DataError, IntegrityError) as e:
                problem = f"cannot hold every key of {batch_id}: {e.orig}"
            else:
                if key is None:
                    continue
                problem = f"would store the key {key[0]!s} of {batch_id} as another value"
            raise self._narrow(name, found, dialect, problem, "of the batch was written; its results stay with the API for 29 days")

    def _narrow(self, name: str, found: Any, dialect: Dialect, problem: str, nothing: str) -> TableError:
        return TableError(
            f"The column {name} of the table {self.name} is {sql_type(found, dialect)} and {problem}. Make it "
            f"{sql_type(self.table.c[name].type, dialect)}, or name another table. Nothing {nothing}."
        )

    def _refuse_narrow_keys(self, connection: Connection, table: ExistingTable) -> None:
        """:raises TableError: a column of the table would change a key of the source"""
        dialect = connection.dialect
        for name, type_name in self.key_columns:
            found = table.type_of(name)
            for key in self.widest(name):
                value = sa.literal(key, staged_type(type_name, found, dialect))
                changed = changes(type_name, found, sa.cast(value, value.type), dialect)
                if changed is None:
                    break
                try:
                    if not connection.execute(sa.select(changed)).scalar():
                        continue
                    problem = f"would store the key {key!s} as another value"
                except (DataError, IntegrityError) as e:
                    connection.rollback()
                    problem = f"cannot hold the key {key!s}: {e.orig}"
                raise self._narrow(name, found, dialect, problem, "was sent or written")

    def is_empty(self, connection: Connection) -> bool:
        """Whether the table has no row."""
        return connection.execute(sa.select(sa.literal(1)).select_from(self.table).limit(1)).first() is None

    def identity(self, connection: Connection) -> str:
        """The one name of the table in its database, however it is spelled: ``schema.table``, and on SQLite ``table``."""
        return table_identity(connection, self.name)

    def extend(self, engine: Engine) -> None:
        """Add the columns of later releases to a table that :meth:`check` has found and that this package made."""
        if self._layout.not_ours:
            log.warning(
                "%s has columns of its own named %s, as result columns are: they are left alone, and what belongs into %s is not kept.",
                self.name,
                ", ".join(self._layout.not_ours),
                ", ".join(name for name in self.result_names if name in self._layout.left_out),
            )
        if self._layout.addable:
            add_columns(engine, self.table, self._layout.addable)
            # this also finds columns that another landing has just added
            self.check(engine)

    def create(self, engine: Engine, *, unique_key: bool) -> None:
        """Create the table unless it exists by now; ``unique_key`` makes the key its primary key."""
        columns = [sa.Column(c.name, c.type, nullable=c.nullable, autoincrement=False) for c in self.table.columns]
        extra = [sa.PrimaryKeyConstraint(*self.key_names)] if unique_key else []
        table = sa.Table(self.table.name, sa.MetaData(), *columns, *extra, schema=self.table.schema)
        try:
            with write_transaction(engine) as connection:
                table.create(connection, checkfirst=True)
        except DBAPIError as e:
            if not self.check(engine):
                raise TableError(f"The table {self.name} could not be created: {e.orig}. The results stay with the API for 29 days.") from e

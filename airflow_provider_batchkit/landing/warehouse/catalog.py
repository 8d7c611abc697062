"""A table as a database's information schema shows it, and whether results can land in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from airflow_provider_batchkit.exceptions import TableError
from airflow_provider_batchkit.landing.evolve import REQUIRED
from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.model import RequestStatus, key_kind

#: a type's name, and what stands in its brackets
_TYPE = re.compile(r"\s*([a-z][a-z0-9_ ]*?)\s*(?:\(([^)]*)\))?\s*(with time zone|without time zone|unsigned)?\s*", re.IGNORECASE)
_STATUS_CHARACTERS = max(len(status.value) for status in RequestStatus)
#: digits behind the point of a cost
_COST_SCALE = 12
#: bits of the integer types
_BITS = {"tinyint": 8, "smallint": 16, "mediumint": 24, "int": 32, "integer": 32, "bigint": 64, "hugeint": 128}
#: null in every row that has a plain answer
_ALWAYS_NULL = ("error_type", "error_message", "content", "stop_details", "request_id")

#: Type of each result column, in the words of a source's types. ``long text`` and ``kept json``, JSON as it came, have no limit.
RESULT_TYPES: Mapping[str, str] = {
    "response": "long text",
    "status": "varchar(16)",
    "stop_reason": "varchar(64)",
    "error_type": "varchar(100)",
    "error_message": "long text",
    "model": "varchar(100)",
    "input_tokens": "integer",
    "output_tokens": "integer",
    "cost_usd": f"numeric(38,{_COST_SCALE})",
    "custom_id": "varchar(64)",
    "batch_id": "varchar(100)",
    "landed_at": "timestamptz",
    "content": "kept json",
    "stop_details": "kept json",
    "message_id": "varchar(100)",
    "request_id": "varchar(100)",
    "round": "int",
}
#: type of an answer's property, by its kind
ANSWER_KINDS: Mapping[str, str] = {
    "integer": "integer",
    "number": "float",
    "boolean": "boolean",
    "string": "long text",
    "date": "date",
    "date-time": "timestamptz",
    "json": "json",
}


def column_types(table: ResultTable) -> dict[str, str]:
    """The type of each column that a landing writes, in the words of a source's types."""
    kinds = {} if table.schema is None else {column.name: ANSWER_KINDS[column.kind] for column in table.schema.columns}
    keys = dict(table.key_columns)
    return {name: keys.get(name) or kinds.get(name) or RESULT_TYPES[name] for name in table.column_names}


@dataclass(frozen=True, slots=True)
class FoundColumn:
    """A column of a table that exists."""

    name: str
    #: as the database writes it
    type: str
    nullable: bool
    #: has a default, or numbers its rows
    filled: bool
    generated: bool
    #: texts are compared byte by byte
    exact: bool = True
    #: this user may write it
    writable: bool = True

    @property
    def parts(self) -> tuple[str, list[str]]:
        """The type's name in lower case, and its arguments."""
        found = _TYPE.fullmatch(self.type)
        if found is None:
            return self.type.lower(), []
        name = " ".join(filter(None, (found[1].lower(), (found[3] or "").lower())))
        return name, [part.strip() for part in (found[2] or "").split(",") if part.strip()]


@dataclass(frozen=True, slots=True)
class Dialect:
    """The types of a database."""

    #: name of a type → what it holds: a kind of :func:`key_kind`, or ``json``
    classes: Mapping[str, str]
    #: kind → the type of a column in a new table
    new: Mapping[str, str]
    #: kind → what columns hold that keep such keys and compare as they do
    keys: Mapping[str, set[str]]
    #: digits in all, and behind the point, of a decimal key whose source tells neither
    decimal: tuple[int, int]
    #: the most that a decimal can have of both
    most: tuple[int, int]

    def holds(self, column: FoundColumn) -> str | None:
        return self.classes.get(column.parts[0])


def check_columns(table: ResultTable, found: Sequence[FoundColumn], dialect: Dialect) -> None:
    """Check a table that exists, and note in ``table`` which columns are written; or the keys of one that is to be created.

    :param found: its columns; none where it is to be created
    :raises TableError: with every reason
    """
    _refuse_wide_keys(table, dialect)
    if not found:
        return
    columns = {column.name.lower(): column for column in found}
    table.leave_out({name for name in table.result_names if name not in REQUIRED and name.lower() not in columns})
    lacking = [name for name in table.column_names if name.lower() not in columns]
    problems = [
        *([f"lacks the columns {', '.join(lacking)}"] if lacking else []),
        *_unfit(table, columns, dialect),
        *_narrow(table, columns, dialect),
        *_closed(table, found, columns),
    ]
    if problems:
        raise TableError(
            f"The table {table.name} exists and {'; it '.join(problems)}. Alter it, or name another table. Nothing was written; results of "
            "batches that were sent before stay with the API for 29 days."
        )


def _unfit(table: ResultTable, columns: Mapping[str, FoundColumn], dialect: Dialect) -> Iterator[str]:
    """What is of another type than what is written."""
    told = column_types(table)
    for name in table.column_names:
        column = columns.get(name.lower())
        if column is None:
            continue
        kind = _plain(told[name])
        if name in dict(table.key_columns):
            if dialect.holds(column) not in dialect.keys[kind]:
                yield f"does not fit the source's key: {name} is {column.type} and must be {dialect.new[kind]}"
            elif not column.exact:
                yield f"does not tell keys apart that differ in case, or in spaces at their end: {name} must be {dialect.new['text']}"
        elif not _holds(told[name], dialect.holds(column), column):
            what = "the results" if name in table.written_results else "output_schema"
            yield f"does not fit {what}: {name} is {column.type} and must be {dialect.new[kind]}"


def _refuse_wide_keys(table: ResultTable, dialect: Dialect) -> None:
    """:raises TableError: for a decimal key that the staging table, or a table that is to be created, cannot keep"""
    for name, told in table.key_columns:
        if key_kind(told) != "numeric":
            continue
        _, _, arguments = told.removesuffix(")").partition("(")
        digits, scale = map(int, arguments.split(",")) if arguments else dialect.decimal
        problem = None
        if digits > dialect.most[0] or scale > dialect.most[1]:
            problem = f"is DECIMAL({digits},{scale}) in the source, and this database keeps DECIMAL({dialect.most[0]},{dialect.most[1]})"
        else:
            key = next((key for key in table.widest(name) if not _is_within(key, digits, scale)), None)
            if key is not None:
                problem = f"has the key {key}, which has more digits than the column DECIMAL({digits},{scale}) keeps"
        if problem is not None:
            raise TableError(
                f"The key column {name} {problem}, in which it would land in {table.name}. Cast it to a text or to a narrower decimal in "
                "the source's sql. Nothing was sent or written."
            )


def _narrow(table: ResultTable, columns: Mapping[str, FoundColumn], dialect: Dialect) -> Iterator[str]:
    """Key columns that cannot keep each of the source's keys."""
    for name, told in table.key_columns:
        column, kind = columns.get(name.lower()), key_kind(told)
        if column is None or dialect.holds(column) not in dialect.keys[kind]:
            continue
        key = next((key for key in table.widest(name) if not _has_room(column, dialect.holds(column), key)), None)
        if key is not None:
            yield f"is too narrow for the source's key: {name} is {column.type}, and the key {key} needs more"


def _has_room(column: FoundColumn, holds: str | None, key: Any) -> bool:
    """Whether a column keeps a key; True where that cannot be told."""
    base, arguments = column.parts
    numbers = [int(argument) for argument in arguments if argument.isdigit()]
    if isinstance(key, str):
        return not (holds == "text" and numbers) or len(key) <= numbers[0]
    if holds == "numeric" and len(numbers) == 2:
        return _is_within(Decimal(key), *numbers)
    bits = _BITS.get(base.removesuffix(" unsigned").removeprefix("u"))
    if holds != "integer" or bits is None:
        return True
    unsigned = base.startswith("u") or base.endswith(" unsigned")
    least, most = (0, 2**bits) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    return bool(least <= key < most)


def _is_within(key: Decimal | int, digits: int, scale: int) -> bool:
    # not by normalize(), which rounds to 28 digits
    before, _, behind = f"{Decimal(key).copy_abs():f}".partition(".")
    return len(before.lstrip("0")) <= digits - scale and len(behind.rstrip("0")) <= scale


def _closed(table: ResultTable, found: Sequence[FoundColumn], columns: Mapping[str, FoundColumn]) -> Iterator[str]:
    """What cannot be written, or must be and is not."""
    written = {name.lower() for name in table.column_names}
    made = [column.name for column in found if column.generated and column.name.lower() in written]
    shut = [column.name for column in found if not column.writable and column.name.lower() in written]
    null = [name for name in _ALWAYS_NULL if name in table.written_results and name in columns and not columns[name].nullable]
    unfilled = [c.name for c in found if c.name.lower() not in written and not c.nullable and not c.filled and not c.generated]
    for words, names in (
        ("generates columns that a landing writes (make them plain columns): ", made),
        ("has NOT NULL columns that are NULL in every row with an answer (drop NOT NULL): ", null),
        ("has columns that this user may not INSERT and UPDATE: ", shut),
        ("has NOT NULL columns without a default that a landing does not write (give them a default): ", unfilled),
    ):
        if names:
            yield words + ", ".join(names)


def refuse_inexact(table: ResultTable, block: Sequence[Sequence[Any]], digits: int, scale: int) -> None:
    """Refuse keys that a decimal column of a fixed scale would round, where the source does not tell theirs.

    :param digits: of the column, in all
    :raises TableError: naming the key
    """
    names = list(table.column_names)
    for name, told in table.key_columns:
        if told != "numeric":
            continue
        for value in block[names.index(name)]:
            if not _is_within(value, digits, scale):
                raise TableError(
                    f"The key {value} has more digits than a column DECIMAL({digits},{scale}) of {table.name} keeps. Cast the key to a "
                    "text or to a narrower decimal in the source's sql. Nothing was written; results stay with the API for 29 days."
                )


def _plain(told: str) -> str:
    return {"long text": "text", "kept json": "json", "json": "json"}.get(told) or key_kind(told)


def _holds(told: str, has: str | None, column: FoundColumn) -> bool:
    """Whether a column of this class keeps results of a type, all of them and unchanged where they count."""
    kind, (_, arguments) = _plain(told), column.parts
    if kind == "json":
        return has in ("json", "text")
    if kind == "text":
        short = column.name.lower() == "status" and arguments and arguments[0].isdigit() and int(arguments[0]) < _STATUS_CHARACTERS
        return has == "text" and not short
    if column.name.lower() == "cost_usd":
        return has in ("float", "text") or (has == "numeric" and len(arguments) == 2 and int(arguments[1]) >= _COST_SCALE)
    if kind == "timestamptz":
        return has in ("timestamptz", "timestamp") if column.name.lower() == "landed_at" else has == "timestamptz"
    if kind in ("integer", "float"):
        return has in ("integer", "numeric") or (kind == "float" and has == "float")
    return has == kind

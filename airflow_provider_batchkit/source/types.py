"""Types of a source's columns: those that the database reports, else those of the values."""

from __future__ import annotations

import datetime as dt
import decimal
import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.model import common_key_type, key_kind
from airflow_provider_batchkit.source.drivers import MYSQL, POSTGRES, rows_of
from airflow_provider_batchkit.source.rows import Rows

log = logging.getLogger(__name__)

#: Python types of keys, the narrowest first → SQL-neutral type names
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
#: OIDs of PostgreSQL's own types, which never change → type names; other types are found from the values
_POSTGRES_TYPES = {21: "smallint", 23: "int", 20: "integer", 700: "real", 701: "float"}
_BPCHAR, _VARCHAR, _NUMERIC = 1042, 1043, 1700
#: the first OID of types that a database defines itself
_FIRST_OWN_OID = 16_384
#: the name of a type whose values come rounded, so that a JOIN with them would not find every row
_ROUNDED = "rounded"
#: DuckDB's type names → type names. The same names mean other things elsewhere: an INTEGER of BigQuery has 64 bits
_DUCKDB_TYPES = {
    "TINYINT": "smallint",
    "UTINYINT": "smallint",
    "SMALLINT": "smallint",
    "INTEGER": "int",
    "BIGINT": "integer",
    "FLOAT": "real",
    "DOUBLE": "float",
    "TIMESTAMP_NS": _ROUNDED,
}
#: PEP 249's type code of MySQL's FLOAT, whose values the server gives with six digits
_MYSQL_FLOAT = 4


def column_types(description: Sequence[Any], connection: Any, driver: str) -> dict[str, str]:
    """Column → type name, for the columns of a query whose types say more than their values.

    :param description: the description of the driver's cursor
    """
    if driver in POSTGRES:
        return _postgres_types(description, connection)
    if driver == "duckdb":
        return {column[0]: name for column in description if (name := _duckdb_type(str(column[1]))) is not None}
    if driver in MYSQL:
        return {column[0]: _ROUNDED for column in description if column[1] == _MYSQL_FLOAT}
    return {}


def _duckdb_type(name: str) -> str | None:
    return f"numeric{name[7:]}" if name.startswith("DECIMAL(") and name.endswith(")") else _DUCKDB_TYPES.get(name)


def _postgres_types(description: Sequence[Any], connection: Any) -> dict[str, str]:
    """Column → type name, from the names, OIDs, sizes, precisions and scales of the description."""
    found = {column[0]: name for column in description if (name := _postgres_type(*column[:6])) is not None}
    own = {column[1]: column[0] for column in description if column[1] >= _FIRST_OWN_OID}
    if own:
        enums = rows_of(
            connection,
            "SELECT oid, typnamespace::regnamespace || '.' || quote_ident(typname) FROM pg_type "
            f"WHERE typtype = 'e' AND oid IN ({', '.join(map(str, own))})",
        )
        names = {oid: f"enum({name})" for oid, name in map(tuple, enums)}
        found |= {column[0]: names[column[1]] for column in description if column[1] in names}
    return found


def _postgres_type(_name: str, oid: int, shown: int | None, size: int | None, precision: int | None, scale: int | None) -> str | None:
    """The type of a column. psycopg gives the number of characters as the display size, psycopg2 as the size, with -1 for any number."""
    length = shown or size
    if oid in (_BPCHAR, _VARCHAR) and length is not None and length > 0:
        return f"{'char' if oid == _BPCHAR else 'varchar'}({length})"
    if oid == _NUMERIC and precision is not None and precision <= 1000:
        return f"numeric({precision},{scale or 0})"
    return _POSTGRES_TYPES.get(oid)


class KeyTypes:
    """The SQL type of each key column: the one that the source reports, else that of the values that pass. Mixed values are text."""

    def __init__(self, columns: Sequence[str]) -> None:
        #: key column → the Python types of its values; an aware time is noted by the name of its SQL type
        self._seen: list[tuple[str, set[type | str]]] = [(column, set()) for column in columns]
        #: each non-ASCII character of the keys → a key that has it: some databases cannot store every character
        self.characters: dict[str, str] = {}
        #: column → each way in which a key is wide → the widest key, and its width
        self._widest: dict[str, dict[str, tuple[int, Any]]] = {column: {} for column in columns}

    def see(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Note the key columns of some rows."""
        for column, seen in self._seen:
            # the key of a native request is its own id, whatever the key column is called
            values = rows.columns.get(column, ("",)) if isinstance(rows, Rows) else [row.get(column, "") for row in rows]
            types = set(map(type, values))
            self._note_widest(self._widest[column], values, types)
            if str in types:
                self._note_characters([value for value in values if isinstance(value, str)])
            if isinstance(rows, Rows) and column in rows.types:
                if rows.types[column] == _ROUNDED:
                    raise BatchInputError(
                        f"The key column {column} is of a type whose values come rounded (MySQL's FLOAT, DuckDB's TIMESTAMP_NS): a JOIN of "
                        "the results with the source would not find every row. Cast it in the source's sql: a FLOAT to DOUBLE, a "
                        "TIMESTAMP_NS to text, which is then what to join by. Nothing was sent."
                    )
                seen.add(rows.types[column])
                continue
            if any(issubclass(type_, dt.datetime) for type_ in types):
                seen.update(_seen_type(value) for value in values)
            else:
                seen.update(types)

    @staticmethod
    def _note_widest(widest: dict[str, tuple[int, Any]], values: Sequence[Any], types: set[type]) -> None:
        found: list[tuple[str, int, Any]] = []
        if str in types:
            text = max(values if len(types) == 1 else [value for value in values if isinstance(value, str)], key=len)
            found.append(("characters", len(text), text))
        if int in types:
            integers = [value for value in values if type(value) is int]
            found += [("below zero", -min(integers), min(integers)), ("above zero", max(integers), max(integers))]
        if decimal.Decimal in types:
            for value in values:
                if isinstance(value, decimal.Decimal) and value.is_finite():
                    whole, _, part = f"{value.copy_abs():f}".partition(".")
                    before, behind = len(whole.lstrip("0")), len(part.rstrip("0"))
                    found += [("before the point", before, value), ("behind the point", behind, value), ("digits", before + behind, value)]
        for how, width, value in found:
            if how not in widest or width > widest[how][0]:
                widest[how] = (width, value)

    @property
    def widest(self) -> dict[str, list[Any]]:
        """Key column → its keys that need the most room: the longest text, the least and the greatest integer, and the decimals with the
        most digits before the point, after it, and in all. A column that can store these keys can store all keys.
        """
        return {column: [value for _, value in widest.values()] for column, widest in self._widest.items()}

    def _note_characters(self, keys: Sequence[str]) -> None:
        if "".join(keys).isascii():
            return
        for key in keys:
            if not key.isascii():
                self.characters |= {character: key for character in set(key) - self.characters.keys() if not character.isascii()}

    def result(self, before: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
        """(column, type name) of every key column, in order; ``before`` has the types that earlier attempts saw.

        Without a key, ``request_id`` identifies the rows: a native request's own id, or the position.
        """
        if not self._seen:
            return [("request_id", "text")]
        known = dict(before)
        found = []
        for column, seen in self._seen:
            names = {_type_name(type_) for type_ in seen} | ({known[column]} if column in known else set())
            found.append((column, common_key_type(names)))
            if found[-1][1] == "text" and len(set(map(key_kind, names))) > 1:
                log.warning(
                    "The key column %s has values of different types (%s) and lands as text. A JOIN with the source may not find them all; "
                    "cast it to one type in the source.",
                    *(column, ", ".join(sorted(names))),
                )
        return found

    @property
    def rows_seen(self) -> bool:
        """Whether any row has passed."""
        return not self._seen or any(seen for _, seen in self._seen)


def _seen_type(value: Any) -> type | str:
    return "timestamptz" if isinstance(value, dt.datetime) and value.tzinfo is not None else type(value)


def _type_name(seen: type | str) -> str:
    return seen if isinstance(seen, str) else _TYPE_NAMES.get(seen, "text")

"""Types of a result table's key columns. They are the source's types, so that a JOIN with the source finds every row."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

from airflow_provider_batchkit.ledger.tables import UtcDateTime
from airflow_provider_batchkit.model import format_usd_exact, key_kind


class ExactDecimal(TypeDecorator[Decimal]):
    """A decimal that never passes through binary floats: NUMERIC, and TEXT on SQLite, which has no decimal type."""

    impl = sa.Numeric
    cache_ok = True

    def __init__(self, scale: int | None, precision: int = 38) -> None:
        """
        :param scale: digits after the point; None for any number of them, where the database allows it
        :param precision: digits in all, where a scale is given
        """
        super().__init__()
        self.scale, self.precision = scale, precision

    def load_dialect_impl(self, dialect: Any) -> Any:
        if dialect.name == "sqlite":
            return dialect.type_descriptor(sa.Text())
        if self.scale is None and dialect.name == "postgresql":
            return dialect.type_descriptor(sa.Numeric())
        return dialect.type_descriptor(sa.Numeric(self.precision, 12 if self.scale is None else self.scale))

    def process_bind_param(self, value: Decimal | None, dialect: Any) -> Any:
        return format_usd_exact(value) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Any) -> Decimal | None:
        return None if value is None else Decimal(value)


class _Enum(UserDefinedType[str]):
    """An enumeration type of PostgreSQL, given by its name."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return self.name


#: kind of the values → type
_TYPES: dict[str, TypeEngine[Any]] = {
    "boolean": sa.Boolean(),
    "integer": sa.BigInteger(),
    "numeric": ExactDecimal(None),
    "float": sa.Float(53),
    "text": sa.Text().with_variant(sa.String(255), "mysql", "mariadb"),
    "timestamp": sa.DateTime(),
    "timestamptz": UtcDateTime(),
    "date": sa.Date(),
    "uuid": sa.Uuid(),
}
#: narrower types that a source reports; they get the arguments in the brackets
_TOLD: dict[str, Callable[..., TypeEngine[Any]]] = {
    "smallint": sa.SmallInteger,
    "int": sa.Integer,
    "real": lambda: sa.Float(53).with_variant(sa.REAL(), "postgresql"),
    "numeric": lambda precision, scale: ExactDecimal(int(scale), int(precision)),
    "char": lambda length: sa.CHAR(int(length)),
    "varchar": lambda length: sa.String(int(length)),
    "enum": lambda name: sa.Text().with_variant(_Enum(name), "postgresql"),
}
_DECODE: dict[str, Callable[[Any], Any]] = {
    "numeric": lambda v: Decimal(str(v)),
    "float": float,
    "timestamp": dt.datetime.fromisoformat,
    "timestamptz": dt.datetime.fromisoformat,
    "date": dt.date.fromisoformat,
    "uuid": uuid.UUID,
    "text": lambda v: v if isinstance(v, str) else str(v),
}


def key_type(type_name: str) -> TypeEngine[Any]:
    """The type of a key column of a new table."""
    base, _, arguments = type_name.removesuffix(")").partition("(")
    if not arguments and base in _TYPES:
        return _TYPES[base]
    return _TOLD[base](*([arguments] if base == "enum" else arguments.split(",") if arguments else []))


def key_decoder(type_name: str) -> Callable[[Any], Any] | None:
    """A function that converts a journaled key to the key column's type; None where no conversion is needed."""
    return _DECODE.get(key_kind(type_name))


def lands_as_told(type_name: str, found: Any, dialect: Dialect) -> bool:
    """Whether an existing column compares as equal with the source's column, where the source reports its type.

    PostgreSQL pads CHAR and ignores the spaces at its end, except when it is compared with TEXT. It rounds REAL, except beside DOUBLE
    PRECISION. It compares an enumeration only with itself. A table of an earlier release has TEXT and DOUBLE PRECISION there.
    """
    if dialect.name != "postgresql":
        return True
    base = type_name.partition("(")[0]
    if base == "char":
        return isinstance(found, sa.CHAR)
    return isinstance(found, sa.REAL) if base == "real" else is_enum(type_name, found) if base == "enum" else True


def staged_type(type_name: str, found: Any, dialect: Dialect) -> TypeEngine[Any]:
    """The type of a key column in the stage.

    :param found: the type of the existing table's column; None for a table that will be created
    """
    return key_type(type_name if found is None or lands_as_told(type_name, found, dialect) else key_kind(type_name))


def is_enum(type_name: str, found: Any) -> bool:
    """Whether an existing column's type is the source's enumeration."""
    if not type_name.startswith("enum(") or not isinstance(found, sa.Enum):
        return False
    schema, _, name = type_name.removeprefix("enum(").removesuffix(")").rpartition(".")
    return found.name == name.strip('"') and getattr(found, "schema", None) in (None, schema.strip('"'))

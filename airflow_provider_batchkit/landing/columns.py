"""Columns of an answer's properties: their SQL types, and whether a column of somebody else's making can hold them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect

from airflow_provider_batchkit.ledger.tables import UtcDateTime

#: by a column's kind; JSON comes as text and is cast when it moves from the stage into the table
ANSWER_TYPES: dict[str, Any] = {
    "integer": sa.BigInteger(),
    "number": sa.Float(53),
    "boolean": sa.Boolean(),
    "string": sa.Text(),
    "date": sa.Date(),
    "date-time": UtcDateTime(),
    "json": sa.Text().with_variant(JSONB(), "postgresql"),
}
_FITTING: dict[str, tuple[type[Any], ...]] = {
    "integer": (sa.Integer, sa.Numeric),
    "number": (sa.Float, sa.Numeric),
    "boolean": (sa.Boolean,),
    "string": (sa.String,),
    "date": (sa.Date,),
    "date-time": (sa.DateTime,),
    "json": (sa.JSON, sa.String),
}
#: SQLite has no such types, and knows no more of a column that was made by CREATE TABLE AS
_FITTING_SQLITE: dict[str, tuple[type[Any], ...]] = {
    "boolean": (sa.Integer, sa.Numeric),
    "date": (sa.String, sa.Numeric),
    "date-time": (sa.String, sa.Numeric),
}
_NEVER = (sa.SmallInteger, sa.Enum)


def fits(kind: str, found: Any, dialect: Dialect) -> bool:
    """Whether an existing column is of the class of types in which values of ``kind`` mean the same.

    It may be narrower than ours (INTEGER, VARCHAR(200)): a value that is too large is then the database's own error, and nothing lands.
    """
    if dialect.name == "sqlite" and isinstance(found, _FITTING_SQLITE.get(kind, ())):
        return True
    if isinstance(found, _NEVER) or not isinstance(found, _FITTING[kind]):
        return False
    if kind == "integer" and isinstance(found, sa.Float):
        return False
    if kind == "date-time" and dialect.name == "postgresql":
        # without a time zone it would be the session's local time
        return bool(found.timezone)
    return True


def sql_type(type_: Any, dialect: Dialect) -> str:
    """A type as the database writes it."""
    try:
        return str(type_.compile(dialect=dialect))
    except sa.exc.CompileError:
        return "of an unknown type"

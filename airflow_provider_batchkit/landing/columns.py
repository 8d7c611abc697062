"""Types of columns: those of an answer's properties, and whether an existing table's column can hold what a landing writes."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import DOMAIN, JSON, JSONB
from sqlalchemy.engine import Dialect
from sqlalchemy.types import NullType

from airflow_provider_batchkit.landing.key_types import is_enum
from airflow_provider_batchkit.ledger.tables import UtcDateTime
from airflow_provider_batchkit.model import key_kind

#: kind of a column → its type; JSON comes as text and is cast when it moves from the stage into the table
ANSWER_TYPES: dict[str, Any] = {
    "integer": sa.BigInteger(),
    "number": sa.Float(53),
    "boolean": sa.Boolean(),
    "string": sa.Text(),
    "date": sa.Date(),
    "date-time": UtcDateTime(),
    "json": sa.Text().with_variant(JSONB(), "postgresql"),
}

#: JSON as the API sent it. PostgreSQL's JSON keeps the text as it is, where JSONB refuses some numbers and an escaped NUL
KEPT_JSON: Any = sa.Text().with_variant(JSON(), "postgresql").with_variant(sa.Text(1 << 24), "mysql", "mariadb")

_Classes = tuple[type[Any], ...]

_FITTING: dict[str, _Classes] = {
    "integer": (sa.Integer, sa.Numeric),
    "number": (sa.Float, sa.Numeric),
    "boolean": (sa.Boolean,),
    "string": (sa.String,),
    "date": (sa.Date,),
    "date-time": (sa.DateTime,),
    "json": (sa.JSON, sa.String),
}
#: SQLite lacks these types, and keeps less about the columns of a table that CREATE TABLE AS made
_FITTING_SQLITE: dict[str, _Classes] = {
    "boolean": (sa.Integer, sa.Numeric),
    "date": (sa.String, sa.Numeric),
    "date-time": (sa.String, sa.Numeric),
}
_NEVER = (sa.SmallInteger, sa.Enum)

#: A key's column must also compare with the key. PostgreSQL assigns a number to a text column, but does not compare the two.
_KEYS: dict[str, _Classes] = {
    "boolean": (sa.Boolean,),
    "integer": (sa.Integer, sa.Numeric),
    "numeric": (sa.Numeric,),
    "float": (sa.Float,),
    "text": (sa.String,),
    "timestamp": (sa.DateTime,),
    "timestamptz": (sa.DateTime,),
    "date": (sa.Date, sa.DateTime),
    "uuid": (sa.Uuid,),
}
#: SQLite converts a value by the affinity of its column (SQLite documentation, "Datatypes In SQLite"): text that looks like a number
#: becomes one in a column of INTEGER, REAL or NUMERIC affinity. A column that was made by CREATE TABLE AS is NUM for all but text.
_KEYS_SQLITE: dict[str, _Classes] = {
    "boolean": (sa.Boolean, sa.Integer, sa.Numeric),
    "integer": (sa.Integer, sa.Numeric),
    "numeric": (sa.String, sa.Numeric),
    "float": (sa.Float, sa.Numeric),
    "text": (sa.String, sa.Date, sa.DateTime, sa.Time),
    "timestamp": (sa.DateTime, sa.String, sa.Numeric),
    "timestamptz": (sa.DateTime, sa.String, sa.Numeric),
    "date": (sa.Date, sa.String, sa.Numeric),
    "uuid": (sa.String,),
}
#: types that other databases have in place of one that they lack
_KEYS_ELSEWHERE: dict[str, _Classes] = {
    "boolean": (sa.Integer, sa.Numeric),
    "float": (sa.Numeric,),
    "uuid": (sa.String, sa.LargeBinary),
}

#: digits after the point of ``cost_usd``, because a cost is whole picodollars
_COST_SCALE = 12
_TIMES: _Classes = (sa.DateTime, sa.String)
_NUMBERS: _Classes = (sa.Integer, sa.Numeric, sa.Float, sa.String)
#: result column → the types that it may have; the other columns are text
_RESULTS: dict[str, _Classes] = {
    "input_tokens": _NUMBERS,
    "output_tokens": _NUMBERS,
    "cost_usd": (sa.Numeric, sa.Float, sa.String),
    "landed_at": _TIMES,
    "content": (sa.JSON, sa.Text),
    "stop_details": (sa.JSON, sa.Text),
    "round": _NUMBERS,
}


def fits(kind: str, found: Any, dialect: Dialect) -> bool:
    """Whether an existing column's class of types gives values of ``kind`` the same meaning.

    The column may be narrower than ours (INTEGER, VARCHAR(200)). A value that is too large is the database's own error, and nothing lands.
    """
    if dialect.name == "sqlite" and _is(found, (*_FITTING_SQLITE.get(kind, ()), NullType)):
        return True
    if isinstance(found, _NEVER) or not _is(found, _FITTING[kind]):
        return False
    if kind == "date-time" and dialect.name == "postgresql":
        # without a time zone, the column would hold the session's local time
        return bool(found.timezone)
    return True


def key_fits(type_name: str, found: Any, dialect: Dialect) -> bool:
    """Whether an existing column holds keys of a type exactly, and can be compared with them.

    The column may be narrower than ours; see :func:`changes`.
    """
    kind = key_kind(type_name)
    if dialect.name == "sqlite":
        # a column without a type, or a BLOB column, keeps values as they are
        return _is(found, (*_KEYS_SQLITE[kind], NullType, sa.LargeBinary)) and not isinstance(found, sa.Enum)
    if dialect.name != "postgresql":
        return _is(found, (*_KEYS[kind], *_KEYS_ELSEWHERE.get(kind, ()), NullType)) and not isinstance(found, sa.Enum)
    base = _base(found)
    if not _is(base, _KEYS[kind]) or isinstance(base, sa.Enum):
        return is_enum(type_name, found)
    if kind == "text":
        # the types name and "char" are reflected as a bare String, and cut longer values; a domain does not show the length of its CHAR
        return type(base) is not sa.String and not (isinstance(base, sa.CHAR) and base is not found)
    if kind == "float":
        return type_name == "real" or not isinstance(base, sa.REAL)
    if kind == "integer":
        return (getattr(base, "scale", None) or 0) >= 0
    if isinstance(base, sa.DateTime):
        # the session's time zone decides the conversion between the two
        return bool(base.timezone) is (kind == "timestamptz")
    return True


def result_fits(name: str, found: Any, dialect: Dialect) -> bool:
    """Whether an existing column can hold a result column's values, all of them and unchanged where they count."""
    if dialect.name == "sqlite":
        return name in _RESULTS or _is(found, (sa.String, NullType, sa.LargeBinary))
    base = _base(found)
    if dialect.name != "postgresql":
        return _is(base, (*_RESULTS.get(name, (sa.String,)), NullType))
    if isinstance(base, sa.Enum) or type(base) is sa.String or not _is(base, _RESULTS.get(name, (sa.String,))):
        return False
    scale = getattr(base, "scale", None)
    return name != "cost_usd" or isinstance(base, sa.Float) or scale is None or scale >= _COST_SCALE


def changes(type_name: str, found: Any, column: sa.ColumnElement[Any], dialect: Dialect) -> sa.ColumnElement[bool] | None:
    """The keys that a fitting column would store as other keys: too many digits, too long, or text that looks like a number.

    :param found: the existing column's type
    :param column: the keys
    :return: a condition that is true for these keys; None where none can exist. A key that is too large fails the condition's statement
    """
    kind = key_kind(type_name)
    if dialect.name == "sqlite":
        if kind == "numeric" and _is(found, (sa.Numeric,)):
            # a number keeps 15 digits and no trailing zeros; a staged decimal has at least two digits after the point
            text = sa.type_coerce(column, sa.Text())
            shortest = sa.func.rtrim(sa.func.rtrim(text, "0"), ".")
            return shortest != sa.cast(sa.cast(text, sa.Numeric()), sa.Text())
        if kind == "text" and _is(found, (sa.Date, sa.DateTime, sa.Time)):
            # the comparison converts the text in the same way as storing it
            return column == sa.cast(column, sa.Numeric())
        return None
    if dialect.name != "postgresql" or is_enum(type_name, found):
        return None
    if isinstance(found, sa.CHAR) and not type_name.startswith("char("):
        # shorter keys are padded with spaces, and comparisons ignore spaces at the end
        return sa.or_(sa.func.char_length(column) != (found.length or 1), column != sa.func.rtrim(column))
    narrow = (
        isinstance(found, DOMAIN)
        or (kind == "integer" and not isinstance(found, sa.BigInteger))
        or (kind == "numeric" and found.scale is not None)
        or (kind == "text" and found.length is not None)
        or (kind in ("timestamp", "timestamptz") and getattr(found, "precision", None) is not None)
    )
    return column != sa.cast(column, found) if narrow else None


def sql_type(type_: Any, dialect: Dialect) -> str:
    """The database's own spelling of a type."""
    try:
        return str(type_.compile(dialect=dialect))
    except sa.exc.CompileError:
        return "of an unknown type"


def _base(found: Any) -> Any:
    """The type that a domain restricts."""
    while isinstance(found, DOMAIN):
        found = found.data_type
    return found


def _is(found: Any, classes: _Classes) -> bool:
    # in SQLAlchemy 2.0, Float is a subclass of Numeric
    return isinstance(found, classes) and (sa.Float in classes or not isinstance(found, sa.Float))

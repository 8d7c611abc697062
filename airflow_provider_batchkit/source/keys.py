"""Keys: the JSON array of a source row's key columns, which identifies the row in the ledger and in the result table."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import msgspec

from airflow_provider_batchkit.exceptions import RequestError

_DECODE_KEY = msgspec.json.Decoder(list[Any])
_ENCODE_KEY = msgspec.json.Encoder(decimal_format="string")
#: the most bytes of a key, which is part of an index of the ledger and of the result table; PostgreSQL's indexes take 2,700 bytes
_MAX_KEY_BYTES = 2_000
_INT64 = 2**63


def encode_key(values: Sequence[Any]) -> str:
    """Key column values as a JSON array. Equal values give the same array: times in UTC, decimals without trailing zeros, no negative zero.

    :raises RequestError: for NULL, and for values that as keys could not be told apart or found again
    """
    try:
        key = _ENCODE_KEY.encode([_key_value(value) for value in values])
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as e:
        raise RequestError(f"a key column cannot be a key: {e}. Nothing was sent.") from e
    if len(key) > _MAX_KEY_BYTES:
        raise RequestError(f"the key is {len(key):,} bytes long, over the limit of {_MAX_KEY_BYTES:,}. Nothing was sent.")
    return key.decode()


def encode_keys(columns: Sequence[Sequence[Any]]) -> list[str]:
    """The same as :func:`encode_key` for many rows, whose key columns are given column by column."""
    rows = list(zip(*columns, strict=True))
    if not all(_plain(column) for column in columns):
        return [encode_key(row) for row in rows]
    lines = _ENCODE_KEY.encode_lines(rows).decode()
    keys = lines.split("\n")[:-1]
    # a character takes at most four bytes
    plain = 4 * max(map(len, keys)) <= _MAX_KEY_BYTES and "\\u0000" not in lines
    return keys if plain else [encode_key(row) for row in rows]


def _plain(column: Sequence[Any]) -> bool:
    """Whether a key column's values are encoded without a change."""
    types = set(map(type, column))
    return types == {str} or (types == {int} and min(column) >= -_INT64 and max(column) < _INT64)


def _key_value(value: Any) -> Any:
    if isinstance(value, Decimal | float):
        return _key_number(value)
    match value:
        case str() if "\0" in value:
            raise ValueError(f"{value!r} has a NUL character, which many databases lack")
        case None:
            raise ValueError("it is NULL, so its answer could not be told apart")
        case int() if not -_INT64 <= value < _INT64:
            raise ValueError(f"{value} does not fit into 64 bits")
        case dt.datetime() if value.tzinfo is not None:
            return value.astimezone(dt.UTC)
        case bytes() | bytearray() | memoryview() | list() | tuple() | dict() | dt.time() | dt.timedelta():
            raise TypeError(f"a {type(value).__name__} is not supported; cast it to text in the sql")
    return value


def _key_number(value: Decimal | float) -> str | float:
    if not (value.is_finite() if isinstance(value, Decimal) else math.isfinite(value)):
        raise ValueError(f"{value} is not a number")
    if isinstance(value, float):
        # both zeros are one key for a database
        return value or 0.0
    # normalize() would round to 28 digits
    text = f"{value:f}" if value else "0"
    return text.rstrip("0").rstrip(".") if "." in text else text


def key_values(key: str) -> list[Any]:
    """The inverse of :func:`encode_key`, with JSON types: dates come back as ISO strings, decimals as decimal strings."""
    values: list[Any] = _DECODE_KEY.decode(key)
    return values

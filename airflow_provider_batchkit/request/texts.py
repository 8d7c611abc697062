"""The text of a value in a prompt: one rule for every type, the same bytes on every attempt.

A value that has a text of its own keeps it: text, numbers (without an exponent where people write none), booleans, UUIDs, addresses.
Dates and times are written as ISO 8601, ranges as PostgreSQL writes them, and NULL as nothing. A value without such a text (a mapping, an
array, a row) is written as JSON. Bytes have no text, and neither has an object that prints its address in memory.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import re
from collections.abc import Callable, Collection, ItemsView, KeysView, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from decimal import Decimal
from enum import Enum
from functools import partial, singledispatch
from types import NoneType
from typing import Any

#: types whose ``str`` gives their text
_STR_IS_TEXT = frozenset({str, int, bool})
#: collections that are not written as JSON arrays
_UNDIVIDED = (str, bytes, bytearray, memoryview, Enum)
#: floats from 1e-7 up to 1e21 are written without an exponent
_EXPONENTS = range(-7, 21)
_ADDRESS = re.compile(r"<.* at 0x[0-9a-fA-F]+.*>", re.DOTALL)


class NoTextError(ValueError):
    """A value has no text that a prompt could show."""

    def __init__(self, value: Any, why: str) -> None:
        super().__init__(why)
        self.value = value


@singledispatch
def text_of(value: Any) -> str:
    """The text of a value in a prompt.

    :raises NoTextError: for bytes, and for an object that prints its address in memory
    """
    unboxed = _unboxed(value)
    if unboxed is not value:
        return text_of(unboxed)
    if _is_range(value):
        return _range_text(value)
    text = str(value)
    if _ADDRESS.search(text):
        raise NoTextError(value, f"a {type(value).__name__} prints as {text[:100]}, which another attempt would print differently")
    return text


def texts_of(values: Sequence[Any]) -> Sequence[Any]:
    """A column's values in a form that ``%s`` of Python writes as :func:`text_of` does. A column of text is returned as it is.

    :raises NoTextError: see :func:`text_of`
    """
    types = set(map(type, values))
    if types <= _STR_IS_TEXT:
        return values
    writers = {type_: text_of.dispatch(type_) for type_ in types}
    return [writers[type(value)](value) for value in values]


def json_of(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """A value as JSON the way people write it: only the escapes that JSON needs, and a space after commas and colons.

    Decimals are numbers with all their digits. Dates, UUIDs and the like are their texts. Sets are sorted. NaN and infinity, which JSON
    lacks, are null.

    :raises NoTextError: see :func:`text_of`
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent, sort_keys=sort_keys)
    except (TypeError, ValueError, AttributeError):
        return _json(value, "" if indent is None else "\n", " " * (indent or 0), sort_keys=sort_keys)


def _json(value: Any, line: str, step: str, *, sort_keys: bool) -> str:
    """The same as :func:`json_of`, for values of any type.

    :param line: the line break and indentation of the value's depth; empty when everything is on one line
    """
    value = _unboxed(value)
    inner = line + step if line else ""
    write = partial(_json, line=inner, step=step, sort_keys=sort_keys)
    if isinstance(value, Mapping):
        items = [(_json_key(key), value[key]) for key in value]
        if sort_keys:
            items.sort(key=lambda item: item[0])
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {write(part)}" for key, part in items]
    elif isinstance(value, AbstractSet) and not isinstance(value, KeysView | ItemsView):
        parts = sorted(write(part) for part in value)
    elif isinstance(value, Collection) and not isinstance(value, _UNDIVIDED):
        parts = [write(part) for part in value]
    else:
        return _json_scalar(value)
    begin, end = "{}" if isinstance(value, Mapping) else "[]"
    return f"{begin}{inner}{(f',{inner}' if line else ', ').join(parts)}{line}{end}" if parts else begin + end


def _json_scalar(value: Any) -> str:
    match value:
        case Enum():
            return json_of(value.value)
        case None | bool():
            return json.dumps(value)
        case int():
            return int.__repr__(value)
        case float():
            return float.__repr__(value) if math.isfinite(value) else "null"
        case Decimal():
            return f"{value:f}" if value.is_finite() else "null"
        case _:
            return json.dumps(text_of(value), ensure_ascii=False)


def _json_key(key: Any) -> str:
    if isinstance(key, str):
        return str.__str__(key)
    return _json(key, "", "", sort_keys=False) if key is None or isinstance(key, bool) else text_of(key)


def _unboxed(value: Any) -> Any:
    """The Python value of a NumPy or PyArrow value; other values as they are."""
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    if isinstance(kind, str) and hasattr(value, "tolist"):
        # nanoseconds would become a bare number
        times = {"M": "datetime64[us]", "m": "timedelta64[us]"}
        return (value.astype(times[kind]) if kind in times else value).tolist()
    return value.as_py() if type(value).__module__.startswith("pyarrow") and hasattr(value, "as_py") else value


def _is_range(value: Any) -> bool:
    return type(value).__module__.startswith("psycopg") and hasattr(value, "lower_inc") and hasattr(value, "isempty")


def _range_text(value: Any) -> str:
    if value.isempty:
        return "empty"
    return f"{'[' if value.lower_inc else '('}{text_of(value.lower)},{text_of(value.upper)}{']' if value.upper_inc else ')'}"


@text_of.register
def _(value: float) -> str:
    text = float.__repr__(value)
    if "e" not in text or Decimal(text).adjusted() not in _EXPONENTS:
        return text
    return f"{Decimal(text):f}"


@text_of.register
def _(value: dt.timedelta) -> str:
    """An ISO 8601 duration in days and shorter units: months and years have no fixed length."""
    if value < dt.timedelta():
        return f"-{text_of(-value)}"
    minutes, seconds = divmod(value.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{value.microseconds:06}".rstrip("0") if value.microseconds else ""
    days = f"{value.days}D" if value.days else ""
    time = "".join(f"{number}{unit}" for number, unit in ((hours, "H"), (minutes, "M")) if number)
    if seconds or fraction or not (days or time):
        time += f"{seconds}{fraction}S"
    return f"P{days}{'T' if time else ''}{time}"


@text_of.register(bytes)
@text_of.register(bytearray)
@text_of.register(memoryview)
def _(value: bytes | bytearray | memoryview) -> str:
    raise NoTextError(value, f"it is binary ({type(value).__name__}, {len(value):,} bytes), and a prompt is text")


_WRITERS: tuple[tuple[Callable[[Any], str], tuple[type, ...]], ...] = (
    (lambda _: "", (NoneType,)),
    (str.__str__, (str,)),
    (str, (bool,)),
    (int.__repr__, (int,)),
    (lambda value: f"{value:f}" if value.is_finite() else str(value), (Decimal,)),
    (lambda value: text_of(value.value), (Enum,)),
    (lambda value: value.isoformat(), (dt.date, dt.time)),
    (json_of, (Mapping, Sequence, AbstractSet, ItemsView, KeysView, ValuesView)),
)
for _writer, _types in _WRITERS:
    for _type in _types:
        text_of.register(_type, _writer)

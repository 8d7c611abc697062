"""Result files: rows as JSON lines or as Parquet, written to a stream column by column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import compress
from typing import Any, BinaryIO, Protocol

import msgspec

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.model import key_kind

Columns = Sequence[Sequence[Any]]

#: name of a format → suffix of its files
FORMATS = {"jsonl": ".jsonl", "parquet": ".parquet"}
#: suffix of a path → format
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}

#: characters that are legal in a line of JSON, but end a line for some readers
_LINE_ENDS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))
#: rows and characters at which a row group of Parquet is full; it is held until then
_GROUP_ROWS = 50_000
_GROUP_CHARACTERS = 16_000_000
#: the most digits of a Parquet decimal; one with more digits, or with any number of them, is written as text
_MAX_DIGITS = 76


@dataclass(frozen=True, slots=True)
class FileColumn:
    """A column of a result file.

    ``kind`` is the type name of a key (``int``, ``numeric(9,2)``, ``char(3)`` …), the kind of an answer's property (``number``,
    ``date-time``, ``json`` …), or ``usd`` for a cost, whose values are texts.
    """

    name: str
    kind: str


class RowWriter(Protocol):
    """Writes rows to a file, which is complete after :meth:`close`."""

    def write(self, columns: Columns) -> None:
        """Add rows, column by column."""

    def close(self) -> None:
        """Write the rows that are still held. The stream stays open."""


def row_writer(form: str, stream: BinaryIO, columns: Sequence[FileColumn]) -> RowWriter:
    """The writer of a format.

    :raises BatchInputError: the format is Parquet, and pyarrow is not installed
    """
    return ParquetRows(stream, columns) if form == "parquet" else JsonLines(stream, columns)


def require(form: str) -> None:
    """:raises BatchInputError: the format cannot be written here"""
    if form == "parquet":
        _pyarrow()


class JsonLines:
    """A JSON object a line. A decimal key is a string, because a reader would round a number; times are ISO 8601; JSON stays JSON."""

    def __init__(self, stream: BinaryIO, columns: Sequence[FileColumn]) -> None:
        self._stream = stream
        self._names = [column.name for column in columns]
        self._raw = [column.kind in ("json", "usd") for column in columns]
        self._encoder = msgspec.json.Encoder(decimal_format="string")

    def write(self, columns: Columns) -> None:
        columns = [list(map(_raw, column)) if raw else column for column, raw in zip(columns, self._raw, strict=True)]
        try:
            lines = self._lines(columns)
        except UnicodeEncodeError:
            lines = self._lines(_mended(columns))
        for end, escape in _LINE_ENDS:
            if end in lines:
                lines = lines.replace(end, escape)
        self._stream.write(lines)

    def _lines(self, columns: Columns) -> bytes:
        return self._encoder.encode_lines([dict(zip(self._names, row, strict=True)) for row in zip(*columns, strict=True)])

    def close(self) -> None:
        """Do nothing: every line has been written."""


def _raw(text: str | None) -> msgspec.Raw | None:
    return None if text is None else msgspec.Raw(text.encode())


def _mended(columns: Columns) -> Columns:
    """The columns with U+FFFD in place of each lone surrogate, which no text may hold."""
    return [[v.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if type(v) is str else v for v in c] for c in columns]


class ParquetRows:
    """Columns with Parquet's own types. Rows are held until a row group is full."""

    def __init__(self, stream: BinaryIO, columns: Sequence[FileColumn]) -> None:
        self._arrow, parquet = _pyarrow()
        self._types = [_arrow_type(self._arrow, column.kind) for column in columns]
        self._converters = [_converter(self._arrow, *one) for one in zip((c.kind for c in columns), self._types, strict=True)]
        fields = [self._arrow.field(column.name, type_) for column, type_ in zip(columns, self._types, strict=True)]
        self._writer = parquet.ParquetWriter(stream, self._arrow.schema(fields), compression="snappy")
        self._held: list[list[Any]] = [[] for _ in columns]
        self._characters = 0

    def write(self, columns: Columns) -> None:
        for held, column, convert in zip(self._held, columns, self._converters, strict=True):
            held += column if convert is None else [None if value is None else convert(value) for value in column]
            self._characters += sum(len(value) for value in column if type(value) is str)
        if len(self._held[0]) >= _GROUP_ROWS or self._characters >= _GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        try:
            arrays = self._arrays(self._held)
        except UnicodeEncodeError:
            arrays = self._arrays(_mended(self._held))
        self._writer.write_table(self._arrow.Table.from_arrays(arrays, schema=self._writer.schema))
        for held in self._held:
            held.clear()
        self._characters = 0

    def _arrays(self, columns: Columns) -> list[Any]:
        return [self._arrow.array(column, type_) for column, type_ in zip(columns, self._types, strict=True)]

    def close(self) -> None:
        if self._held and self._held[0]:
            self._flush()
        self._writer.close()


def _plain_decimal(value: Decimal) -> str:
    return f"{value:f}"


def _converter(arrow: Any, kind: str, type_: Any) -> Callable[[Any], Any] | None:
    if key_kind(kind) == "numeric" and type_ == arrow.string():
        return _plain_decimal
    return {"usd": Decimal, "uuid": str}.get(kind)


def _arrow_type(arrow: Any, kind: str) -> Any:
    base, _, arguments = kind.removesuffix(")").partition("(")
    if base == "numeric" and arguments:
        precision, scale = map(int, arguments.split(","))
        if precision <= _MAX_DIGITS:
            return (arrow.decimal128 if precision <= 38 else arrow.decimal256)(precision, scale)
    types = {
        "boolean": arrow.bool_(),
        "smallint": arrow.int16(),
        "int": arrow.int32(),
        "integer": arrow.int64(),
        "real": arrow.float32(),
        "float": arrow.float64(),
        "number": arrow.float64(),
        "date": arrow.date32(),
        "timestamp": arrow.timestamp("us"),
        "timestamptz": arrow.timestamp("us", "UTC"),
        "date-time": arrow.timestamp("us", "UTC"),
        "usd": arrow.decimal128(38, 12),
    }
    return types.get(base, arrow.string())


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise BatchInputError("Parquet needs pyarrow: pip install 'airflow-provider-batchkit[parquet]'. Nothing was written.") from e
    return pa, pq


def where(columns: Columns, wanted: Sequence[bool]) -> Columns:
    """The rows that are wanted."""
    return columns if all(wanted) else [list(compress(column, wanted)) for column in columns]

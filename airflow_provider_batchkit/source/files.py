"""Rows from CSV, JSONL and Parquet files, one at a time. A file's columns are the row; errors name the line.

The caller opens a file: it comes as a name and a function that opens it for reading bytes, so that a path in object storage and a local
one are the same here. A CSV or JSONL file may be gzipped; its first two bytes show that, not its name.

Memory does not grow with the file: it holds one line of CSV or JSONL, or one row group of Parquet as it is compressed in the file.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError

if TYPE_CHECKING:
    import pyarrow as pa

#: the greatest length of a line and of a CSV field; the Messages API takes 32 MB a request. Without this bound, a quote that is never
#: closed would make a field of the file's size
MAX_LINE = 32 * 1024 * 1024
_BUFFER_BYTES = 1024 * 1024
_PARQUET_ROWS = 1_000
_GZIP_MAGIC = b"\x1f\x8b"
_LINE_END = re.compile(rb"\r\n?|\n")
_FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}

#: a file: its name in errors, and the function that opens it for reading bytes
InputFile = tuple[str, Callable[[], Any]]


@dataclass(frozen=True, slots=True)
class InputOptions:
    """How to read a file where its name does not say it."""

    #: ``"csv"``, ``"jsonl"`` or ``"parquet"``; by default, the file's extension decides
    format: str | None = None
    #: Python codec of a CSV file; UTF-8 with or without a byte order mark by default
    encoding: str | None = None
    #: delimiter of a CSV file, one character; a comma by default
    delimiter: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> InputOptions:
        """:raises BatchInputError: for an unknown name or value"""
        names = [f.name for f in fields(cls)]
        unknown = sorted(set(options or {}) - set(names))
        if unknown:
            raise BatchInputError(f"input_options has no {', '.join(unknown)}; it takes {', '.join(names)}.")
        parsed = cls(**(options or {}))
        if parsed.format not in (None, *_FORMATS.values()):
            raise BatchInputError(f"input_options: format must be 'csv', 'jsonl' or 'parquet', not {parsed.format!r}.")
        if parsed.encoding is not None:
            try:
                "".encode(parsed.encoding)
            except (LookupError, TypeError, ValueError):
                raise BatchInputError(f"input_options: encoding {parsed.encoding!r} is no text encoding that Python knows.") from None
        delimiter: Any = parsed.delimiter
        if delimiter is not None and (not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\r\n\0'):
            raise BatchInputError(f"input_options: delimiter must be one character, no quote and no line end, not {delimiter!r}.")
        return parsed

    def format_of(self, name: str) -> str:
        """:raises BatchInputError: neither the options nor the extension tell the format, or an option belongs to another format"""
        found = self.format or next((f for end, f in _FORMATS.items() if name.lower().removesuffix(".gz").endswith(end)), None)
        if found is None:
            raise BatchInputError(
                f"{name}: the extension does not tell the format. It can be .csv, .jsonl, .ndjson or .parquet, the first three also with "
                ".gz; for another name give input_options={'format': ...}. Nothing was sent."
            )
        if found != "csv" and (self.encoding or self.delimiter):
            raise BatchInputError(f"{name}: encoding and delimiter are options of CSV files, and this is {found}. Nothing was sent.")
        return found


class FileRows:
    """The rows of files, in the files' order. They can be iterated more than once.

    CSV values are strings, and an empty field is ``""``. JSONL values are those of JSON, with integers of any size. Parquet values are
    Python's ``datetime``, ``date``, ``Decimal``, ``dict`` and so on, with times in microseconds.

    :raises BatchInputError: while iterating, with the file, the line and the value
    """

    def __init__(self, files: Iterable[InputFile], options: InputOptions | None = None) -> None:
        self._files = list(files)
        self._options = options or InputOptions()
        #: place of the row that was handed out last
        self._place = _Place("", "")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        formats = [self._options.format_of(name) for name, _ in self._files]
        first: tuple[str, set[str]] | None = None
        for (name, open_), form in zip(self._files, formats, strict=True):
            self._place = place = _Place(name, "row" if form == "parquet" else "line")
            # each line of a JSONL file has columns of its own
            same_columns = form != "jsonl"
            with closing(open_()) as stream:
                for place.number, row in self._read(stream, name, form):
                    if same_columns:
                        first = first or (name, set(row))
                        _check_columns(name, set(row), *first)
                        same_columns = False
                    yield row

    def _read(self, stream: BinaryIO, name: str, form: str) -> Iterator[tuple[int, dict[str, Any]]]:
        if form == "parquet":
            return _parquet(stream, name)
        if form == "jsonl":
            return _jsonl(stream, name)
        return _csv(stream, name, self._options)

    def place(self, position: int) -> str | None:
        """File and line of the row at ``position`` (from 0), for an error about it. For Parquet, the row's number in its file, from 1.

        Reads the files again up to there, so that good rows need no memory for their places. None when reading fails.
        """
        again = FileRows(self._files, self._options)
        try:
            found = next(islice(again, position, None), None)
        except Exception:  # noqa: BLE001 - the error that this place is for matters more
            return None
        return None if found is None else str(again._place)

    @contextmanager
    def naming_places(self) -> Iterator[None]:
        """Put file and line before the message of a :class:`RequestError` that knows its row's position."""
        try:
            yield
        except RequestError as e:
            place = None if e.position is None else self.place(e.position)
            if place is None:
                raise
            raise RequestError(f"{place}: {e}", position=e.position) from e


@dataclass(slots=True)
class _Place:
    name: str
    unit: str
    number: int = 0

    def __str__(self) -> str:
        return f"{self.name}, {self.unit} {self.number}"


def _check_columns(name: str, columns: set[str], first: str, expected: set[str]) -> None:
    if columns != expected:
        differences = [
            f"{verb} {', '.join(sorted(names))}" for verb, names in (("lacks", expected - columns), ("adds", columns - expected)) if names
        ]
        raise BatchInputError(f"{name}: its columns are not those of {first}: it {' and '.join(differences)}. Nothing was sent.")


def _bad(name: str, line: int, problem: str) -> BatchInputError:
    return BatchInputError(f"{name}, line {line}: {problem}. Nothing was sent.")


def _csv(stream: BinaryIO, name: str, options: InputOptions) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line that the record begins in, row). A quote in the wrong place is an error, not part of a value."""
    # Python's bound of 131,072 characters is too short for a long product text. The bound is global, so it is raised and never lowered
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    reader = csv.reader(_text_lines(stream, name, options.encoding), delimiter=options.delimiter or ",", strict=True)
    columns: list[str] = []
    begins = 1
    try:
        for values in reader:
            line, begins = begins, reader.line_num + 1
            if not values:
                continue
            if not columns:
                columns = values
                _check_names(columns, f"{name}, line {line}")
            elif len(values) == len(columns):
                yield line, dict(zip(columns, values, strict=True))
            else:
                raise _bad(name, line, f"{len(values)} fields, but the header has {len(columns)}: {_excerpt(values)}")
    except csv.Error as e:
        hint = "; a field whose quote is not closed" if "end of data" in str(e) or "limit" in str(e) else ""
        raise _bad(name, begins, f"the record that begins here is not valid CSV: {e}{hint}") from e
    if not columns:
        raise BatchInputError(f"{name} is empty: a CSV file begins with a line of column names. Nothing was sent.")


def _check_names(columns: Sequence[str], where: str) -> None:
    unnamed = [str(number) for number, column in enumerate(columns, 1) if not column.strip()]
    if unnamed:
        raise BatchInputError(f"{where}: column {', '.join(unnamed)} of {len(columns)} has no name: {_excerpt(columns)}. Nothing was sent.")
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        raise BatchInputError(f"{where}: more than one column is named {', '.join(repeated)}. Nothing was sent.")


def _text_lines(stream: BinaryIO, name: str, encoding: str | None) -> Iterator[str]:
    codec = codecs.lookup(encoding or "utf-8").name
    text = io.TextIOWrapper(_unzipped(stream), encoding="utf-8-sig" if codec == "utf-8" else codec, newline="")
    number = 0
    with _zip_errors(name):
        try:
            for number, line in enumerate(iter(partial(text.readline, MAX_LINE + 1), ""), 1):
                if len(line) > MAX_LINE:
                    raise _bad(name, number, f"longer than {MAX_LINE:,} characters: {_excerpt(line)}")
                if "\0" in line:
                    hint = "" if encoding else "; a UTF-16 file needs input_options={'encoding': 'utf-16'}"
                    raise _bad(name, number, f"a NUL character: {_excerpt(line)}{hint}")
                yield line
        except UnicodeDecodeError as e:
            # everything decoded before this piece of the file has been handed out, apart from the line that the piece begins in
            number += 1 + len(_LINE_END.findall(e.object, 0, e.start))
            raise _bad(
                name,
                number,
                f"not {codec}: byte 0x{e.object[e.start]:02x} after {_excerpt(e.object[max(e.start - 20, 0) : e.start])}. "
                "Another encoding can be given: input_options={'encoding': 'latin-1'}",
            ) from e


def _jsonl(stream: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row). Only a newline byte ends a line: other line ends, such as U+2028, are legal inside JSON's strings."""
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    with _zip_errors(name):
        for number, line in enumerate(iter(partial(_unzipped(stream).readline, MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                raise _bad(name, number, f"longer than {MAX_LINE:,} bytes: {_excerpt(line)}")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = decode(line)
            except UnicodeDecodeError as e:
                raise _bad(name, number, f"not UTF-8, which JSON always is: {_excerpt(line)}") from e
            except msgspec.ValidationError as e:
                raise _bad(name, number, f"not a row, which is a JSON object: {e}: {_excerpt(line)}") from e
            except msgspec.DecodeError as e:
                raise _bad(name, number, f"not valid JSON: {e}: {_excerpt(line)}") from e
            yield number, row


def _parquet(stream: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the row from 1, row)."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as e:
        raise BatchInputError(
            f"{name}: Parquet files are read with pyarrow, which is not installed: pip install 'airflow-provider-batchkit[parquet]'. "
            "Nothing was sent."
        ) from e
    number = 0
    try:
        # reading ahead over row groups and threads would keep far more of the file in memory
        file = parquet.ParquetFile(stream, coerce_int96_timestamp_unit="us", pre_buffer=False)
        _check_names(file.schema_arrow.names, name)
        schema = _python_times(file.schema_arrow)
        mapped = {column.name: convert for column in schema if (convert := _with_dicts(column.type)) is not None}
        for batch in file.iter_batches(_PARQUET_ROWS, use_threads=False):
            for row in batch.cast(schema, safe=False).to_pylist():
                number += 1
                yield number, {**row, **{name: convert(row[name]) for name, convert in mapped.items()}} if mapped else row
    except pa.ArrowException as e:
        raise BatchInputError(f"{name}, after row {number}: not a Parquet file, or a damaged one: {e}. Nothing was sent.") from e


def _python_times(schema: pa.Schema) -> pa.Schema:
    """The schema with microseconds for nanoseconds: those become pandas' own types where pandas is installed, and fail where it is not."""
    import pyarrow as pa

    for index, column in enumerate(schema):
        if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
            schema = schema.set(index, column.with_type(pa.timestamp("us", column.type.tz)))
        elif pa.types.is_duration(column.type) and column.type.unit == "ns":
            schema = schema.set(index, column.with_type(pa.duration("us")))
    return schema


def _with_dicts(type_: pa.DataType) -> Callable[[Any], Any] | None:
    """A function that makes dicts of the maps in a value of a type, which Arrow gives as pairs; None for a type without maps.

    Pairs stay pairs where a key comes twice.
    """
    import pyarrow as pa

    if pa.types.is_map(type_):
        of_item = _with_dicts(type_.item_type) or (lambda item: item)

        def mapping(pairs: Any) -> Any:
            found = None if pairs is None else {key: of_item(item) for key, item in pairs}
            return found if found is None or len(found) == len(pairs) else [(key, of_item(item)) for key, item in pairs]

        return mapping
    if pa.types.is_struct(type_):
        of_fields = {field.name: convert for field in type_ if (convert := _with_dicts(field.type)) is not None}
        return (lambda row: row and {**row, **{name: convert(row[name]) for name, convert in of_fields.items()}}) if of_fields else None
    of_value = _with_dicts(type_.value_type) if hasattr(type_, "value_type") else None
    return None if of_value is None else lambda values: values and [of_value(value) for value in values]


class _Raw(io.RawIOBase):
    """A raw stream over anything that has ``read``, for Python's buffers and decoders."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _unzipped(stream: BinaryIO) -> BinaryIO:
    buffered = io.BufferedReader(_Raw(stream), _BUFFER_BYTES)
    if buffered.peek(2)[:2] != _GZIP_MAGIC:
        return buffered
    return io.BufferedReader(gzip.GzipFile(fileobj=buffered), _BUFFER_BYTES)


@contextmanager
def _zip_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise BatchInputError(f"{name}: its gzip data is cut or damaged: {e}. Nothing was sent.") from e


def _excerpt(value: Any, length: int = 100) -> str:
    text = repr(value[:length] if isinstance(value, str | bytes) else value)
    return text if len(text) <= length else f"{text[:length]}…"

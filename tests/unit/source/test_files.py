"""CSV, JSONL and Parquet files become rows one at a time, and what is wrong in a file is named by its line."""

from __future__ import annotations

import datetime as dt
import gzip
import io
import random
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError
from airflow_provider_batchkit.source.files import FileRows, InputOptions

ROOT = Path(__file__).resolve().parents[3]


def rows_of(content: bytes, name: str = "x.csv", **options: Any) -> FileRows:
    return FileRows([(name, partial(io.BytesIO, content))], InputOptions.parse(options))


def read(content: bytes, name: str = "x.csv", **options: Any) -> list[dict[str, Any]]:
    return list(rows_of(content, name, **options))


def refusal(content: bytes, name: str = "x.csv", **options: Any) -> str:
    with pytest.raises(BatchInputError) as caught:
        read(content, name, **options)
    message = str(caught.value)
    assert message.endswith("Nothing was sent.")
    return message.removesuffix(" Nothing was sent.")


# CSV


def test_a_csv_row_is_its_columns_as_strings() -> None:
    """Quotes, delimiters and line ends inside quotes are values; an empty field is an empty string; no value is guessed to be a number."""
    content = b'sku,name,price\r\n007,"Tea, ""green""",1.50\r\n8,"two\r\nlines",\r\n'
    assert read(content) == [{"sku": "007", "name": 'Tea, "green"', "price": "1.50"}, {"sku": "8", "name": "two\r\nlines", "price": ""}]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_of_a_csv_is_read_and_the_last_may_lack(end: bytes) -> None:
    """Unix, Windows and old Macintosh files; blank lines are no rows."""
    assert read(end.join([b"a,b", b"1,2", b"", b"3,4"])) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_other_line_ends_of_unicode_do_not_cut_a_csv_row() -> None:
    """U+2028, U+0085 and form feeds are text."""
    assert read("a,b\n1,x\u2028y\x85z\x0cw\n".encode()) == [{"a": "1", "b": "x\u2028y\x85z\x0cw"}]


def test_a_byte_order_mark_is_no_part_of_the_first_column() -> None:
    """Excel writes one, also when UTF-8 is asked for by name."""
    content = b"\xef\xbb\xbfa,b\n1,2\n"
    assert read(content) == read(content, encoding="UTF8") == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le"])
def test_encoding_and_delimiter_can_be_given(encoding: str) -> None:
    """German Excel: semicolons and Latin-1; UTF-16 by its own byte order mark or by name."""
    assert read("größe;ort\n1,5;Köln\n".encode(encoding), encoding=encoding, delimiter=";") == [{"größe": "1,5", "ort": "Köln"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.csv is empty: a CSV file begins with a line of column names."),
        (b"\n\n", "x.csv is empty: a CSV file begins with a line of column names."),
        (b"a,b\n1,2\n3\n", "x.csv, line 3: 1 fields, but the header has 2: ['3']."),
        (b"a,b\n1,2,3\n", "x.csv, line 2: 3 fields, but the header has 2: ['1', '2', '3']."),
        (b'a,b\n1,"x\ny"\n\n2,"x\ny",3\n', "x.csv, line 5: 3 fields, but the header has 2: ['2', 'x\\ny', '3']."),
        (b"a,,c, \n1,2,3,4\n", "x.csv, line 1: column 2, 4 of 4 has no name: ['a', '', 'c', ' ']."),
        (b"a,b,a,b\n1,2,3,4\n", "x.csv, line 1: more than one column is named a, b."),
        (
            b'a,b\n1,2\n3,"4\n5,6\n',
            "x.csv, line 3: the record that begins here is not valid CSV: unexpected end of data; a field whose quote is not closed.",
        ),
        (b'a,b\n1,"2"3\n', "x.csv, line 2: the record that begins here is not valid CSV: ',' expected after '\"'."),
        (
            b"a,b\n1,2\n3,\0\n",
            "x.csv, line 3: a NUL character: '3,\\x00\\n'; a UTF-16 file needs input_options={'encoding': 'utf-16'}.",
        ),
        (
            "a,b\n1,2\n3,Köln\n".encode("latin-1"),
            (
                "x.csv, line 3: not utf-8: byte 0xf6 after b'a,b\\n1,2\\n3,K'. "
                "Another encoding can be given: input_options={'encoding': 'latin-1'}."
            ),
        ),
    ],
)
def test_a_broken_csv_is_refused_by_line_and_value(content: bytes, message: str) -> None:
    """The line is that of the record's beginning, as an editor counts."""
    assert refusal(content) == message
    assert refusal(gzip.compress(content), "x.csv.gz") == message.replace("x.csv", "x.csv.gz")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_wrong_byte_deep_in_a_file_is_named_by_its_line(end: str) -> None:
    """Text is decoded in pieces of several lines; the line counts all the same, whatever the pieces' borders."""
    chance = random.Random(3)
    for _ in range(200):
        lines = [b"a"] + [b"x" * chance.randrange(1, 400) for _ in range(chance.randrange(1, 200))]
        at = chance.randrange(1, len(lines))
        lines[at] += b"\xff"
        assert f"x.csv, line {at + 1}: not utf-8: byte 0xff" in refusal(end.encode().join(lines))


def test_a_field_may_be_as_long_as_a_product_text_and_not_longer_than_a_request() -> None:
    """Far above the 131,072 characters that Python's csv allows by itself; a line without an end does not fill the memory."""
    text = "x" * 5_000_000
    assert read(f"a,b\n1,{text}\n".encode()) == [{"a": "1", "b": text}]
    assert "x.csv, line 2: longer than 33,554,432 characters: '1,xxx" in refusal(b"a,b\n1," + b"x" * 34_000_000)
    assert "x.csv, line 2: the record that begins here is not valid CSV: field larger than field limit (33554432)" in refusal(
        b'a,b\n1,"' + (b"x" * 1000 + b"\n") * 34_000
    )
    assert "x.jsonl, line 1: longer than 33,554,432 bytes" in refusal(b'{"a":"' + b"x" * 34_000_000, "x.jsonl")


@pytest.mark.parametrize(("name", "start"), [("x.csv", b"a,b\n"), ("x.jsonl", b""), ("x.csv", b'a,b\n"')])
def test_a_line_that_does_not_end_is_given_up_before_it_fills_the_memory(name: str, start: bytes) -> None:
    """Not a text file at all, or a few kilobytes of gzip that unpack to more than the worker has."""

    class Endless(io.BytesIO):
        given = 0

        def read(self, size: int | None = -1) -> bytes:
            assert size is not None and size > 0
            assert self.given < 100_000_000, "it does not end by itself"
            self.given += size
            return super().read(size) or b"x" * size

    with pytest.raises(BatchInputError, match="longer than"):
        list(FileRows([(name, partial(Endless, start))]))


# JSONL


def test_a_jsonl_row_keeps_its_types() -> None:
    """Integers of any size are exact; nested values, null and booleans are as written; a BOM, CRLF and blank lines do not matter."""
    content = b'\xef\xbb\xbf{"id": 123456789012345678901234567890, "x": 0.1}\r\n\r\n{"id": 2, "tags": ["a", {"b": null}], "ok": true}'
    assert read(content, "x.jsonl") == [
        {"id": 123456789012345678901234567890, "x": 0.1},
        {"id": 2, "tags": ["a", {"b": None}], "ok": True},
    ]


def test_only_a_newline_byte_ends_a_jsonl_line() -> None:
    """U+2028, U+2029 and U+0085 are legal inside JSON's strings."""
    assert read('{"a":"x\u2028y\u2029z\x85w"}\n{"a":"v"}\n'.encode(), "x.ndjson") == [{"a": "x\u2028y\u2029z\x85w"}, {"a": "v"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":1}\n{"a":\n', "line 2: not valid JSON: Input data was truncated: b'{\"a\":\\n'."),
        (b'{"a":1} {"a":2}\n', 'line 1: not valid JSON: JSON is malformed: trailing characters (byte 9): b\'{"a":1} {"a":2}\\n\'.'),
        (b'{"a":NaN}\n', "line 1: not valid JSON: JSON is malformed: invalid character (byte 5): b'{\"a\":NaN}\\n'."),
        (b'{"a":1}\n\n[1, 2]\n', "line 3: not a row, which is a JSON object: Expected `object`, got `array`: b'[1, 2]\\n'."),
        (b'"text"\n', "line 1: not a row, which is a JSON object: Expected `object`, got `str`: b'\"text\"\\n'."),
        (b'{"a":1}\n{"a":"K\xf6ln"}\n', 'line 2: not UTF-8, which JSON always is: b\'{"a":"K\\xf6ln"}\\n\'.'),
    ],
)
def test_a_broken_jsonl_line_is_refused_by_line_and_value(content: bytes, message: str) -> None:
    """Plain and gzipped."""
    assert refusal(content, "x.jsonl") == f"x.jsonl, {message}"
    assert refusal(gzip.compress(content), "x.jsonl.gz") == f"x.jsonl.gz, {message}"


def test_an_empty_jsonl_and_a_csv_of_a_header_alone_are_sources_without_rows() -> None:
    """What happens then is for on_empty to say."""
    assert read(b"", "x.jsonl") == read(b"a,b\n") == []


# gzip


def test_gzip_is_known_by_its_bytes_and_not_by_its_name() -> None:
    """Stores unzip in transit, or keep zipped what is called .csv; several members in one file are one stream."""
    content = b"a,b\n1,2\n3,4\n"
    expected = [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    for stored in (content, gzip.compress(content), gzip.compress(content[:6]) + gzip.compress(content[6:])):
        assert read(stored, "x.csv") == read(stored, "X.CSV.GZ") == expected


@pytest.mark.parametrize("name", ["x.csv.gz", "x.jsonl.gz"])
def test_a_gzip_that_is_cut_or_damaged_is_refused(name: str) -> None:
    """A broken upload is no end of the rows."""
    lines = b"".join(b'{"a":"%d"}\n' % n for n in range(10_000))
    whole = gzip.compress(lines)
    for stored in (whole[: len(whole) // 2], whole[:-4], whole[:-8] + b"\0" * 8):
        assert f"{name}: its gzip data is cut or damaged: " in refusal(stored, name)


# Parquet


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, **options)
    return stream.getvalue()


def test_a_parquet_row_has_pythons_types() -> None:
    """Also with pandas installed, whose own timestamps are no keys and print in another way."""
    pa = pytest.importorskip("pyarrow")
    moment = dt.datetime(2026, 11, 23, 12, 30, 1, 250_000)  # noqa: DTZ001 - a column without a time zone
    expected = {
        "id": 2**60,
        "name": "té",
        "price": Decimal("1.50"),
        "day": dt.date(2026, 11, 23),
        "at": moment,
        "utc": moment.replace(tzinfo=dt.UTC),
        "took": dt.timedelta(seconds=1),
        "tags": ["a", "b"],
        "size": {"w": 1},
        "none": None,
        "kind": "x",
    }
    columns = {
        **{name: [value] for name, value in expected.items() if name not in ("at", "utc", "took", "kind")},
        "at": pa.array([moment], pa.timestamp("ns")),
        "utc": pa.array([moment], pa.timestamp("ns", "UTC")),
        "took": pa.array([dt.timedelta(seconds=1)], pa.duration("ns")),
        "kind": pa.array(["x"]).dictionary_encode(),
    }
    (row,) = read(parquet(columns), "x.parquet")
    assert row == expected
    assert {name: type(value) for name, value in row.items()} == {name: type(value) for name, value in expected.items()}


def test_the_end_of_time_survives_sparks_old_timestamps() -> None:
    """Year 9999 stands for "open end" in many warehouses; in nanoseconds it would wrap around to 1816."""
    pa = pytest.importorskip("pyarrow")
    end = dt.datetime(9999, 12, 31)  # noqa: DTZ001 - a column without a time zone
    content = parquet({"until": pa.array([end], pa.timestamp("us"))}, use_deprecated_int96_timestamps=True)
    assert read(content, "x.parquet") == [{"until": end}]


def test_a_map_of_a_parquet_file_is_a_dict() -> None:
    """Also inside of a list, a row or another map, and where there are no pairs; a key that comes twice leaves them pairs."""
    import pyarrow as pa

    one = pa.map_(pa.string(), pa.int64())
    values: dict[str, Any] = {
        "plain": ([[("a", 1), ("b", 2)], None, []], one, [{"a": 1, "b": 2}, None, {}]),
        "twice": ([[("a", 1), ("a", 2)], [("a", 1)], None], one, [[("a", 1), ("a", 2)], {"a": 1}, None]),
        "listed": ([[[("a", 1)], None], [], None], pa.list_(one), [[{"a": 1}, None], [], None]),
        "inner": ([{"m": [("a", 1)], "n": 1}, {"m": None, "n": 2}, None], pa.struct([("m", one), ("n", pa.int64())]),
                  [{"m": {"a": 1}, "n": 1}, {"m": None, "n": 2}, None]),
        "double": ([[("x", [("a", 1)])], None, []], pa.map_(pa.string(), one), [{"x": {"a": 1}}, None, {}]),
    }  # fmt: skip
    found = read(parquet({name: pa.array(given, type_) for name, (given, type_, _) in values.items()}), "x.parquet")
    assert found == [{name: wanted[at] for name, (_, _, wanted) in values.items()} for at in range(3)]


def test_a_parquet_file_of_several_row_groups_is_one_run_of_rows() -> None:
    """Rows are counted through the whole file."""
    rows = rows_of(parquet({"n": list(range(5_000))}, row_group_size=700), "x.parquet")
    assert [row["n"] for row in rows] == list(range(5_000))
    assert rows.place(4_321) == "x.parquet, row 4322"


def test_what_is_no_parquet_file_is_refused() -> None:
    """Another format under the name, a cut file, a column without a name or with another's."""
    pa = pytest.importorskip("pyarrow")
    assert "x.parquet, after row 0: not a Parquet file, or a damaged one: " in refusal(b"a,b\n1,2\n", "x.parquet")
    assert "x.parquet, after row 0: not a Parquet file, or a damaged one: " in refusal(parquet({"a": [1]})[:-20], "x.parquet")
    assert refusal(parquet({"a": [1], "": [2]}), "x.parquet") == "x.parquet: column 2 of 2 has no name: ['a', '']."
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), stream)
    assert refusal(stream.getvalue(), "x.parquet") == "x.parquet: more than one column is named a."


def test_without_pyarrow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra: CSV and JSONL do not need it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refusal(b"PAR1", "x.parquet")
    assert message == (
        "x.parquet: Parquet files are read with pyarrow, which is not installed: pip install 'airflow-provider-batchkit[parquet]'."
    )
    assert read(b"a\n1\n") == [{"a": "1"}]


# names, options, several files, places


@pytest.mark.parametrize("name", ["export", "x.txt", "x.csv.bz2", "csv"])
def test_an_extension_that_tells_nothing_is_refused(name: str) -> None:
    """Unless the format is given."""
    assert refusal(b"a\n1\n", name) == (
        f"{name}: the extension does not tell the format. It can be .csv, .jsonl, .ndjson or .parquet, the first three also with .gz; "
        "for another name give input_options={'format': ...}."
    )
    assert read(b"a\n1\n", name, format="csv") == [{"a": "1"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sep": ";"}, "input_options has no sep; it takes format, encoding, delimiter."),
        ({"format": "xlsx"}, "input_options: format must be 'csv', 'jsonl' or 'parquet', not 'xlsx'."),
        ({"encoding": "utf-9"}, "input_options: encoding 'utf-9' is no text encoding that Python knows."),
        ({"encoding": "base64"}, "input_options: encoding 'base64' is no text encoding that Python knows."),
        ({"encoding": 8}, "input_options: encoding 8 is no text encoding that Python knows."),
        ({"delimiter": ";;"}, "input_options: delimiter must be one character, no quote and no line end, not ';;'."),
        ({"delimiter": "\n"}, "input_options: delimiter must be one character, no quote and no line end, not '\\n'."),
        ({"delimiter": 1}, "input_options: delimiter must be one character, no quote and no line end, not 1."),
        ({"delimiter": '"'}, "input_options: delimiter must be one character, no quote and no line end, not '\"'."),
    ],
)
def test_options_are_checked_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    """At DAG parse time, that is."""
    with pytest.raises(BatchInputError) as caught:
        InputOptions.parse(options)
    assert str(caught.value).startswith(message)


def test_an_option_of_csv_is_refused_for_other_formats() -> None:
    """It would do nothing, and somebody meant something by it."""
    assert refusal(b"{}", "x.jsonl", encoding="latin-1") == "x.jsonl: encoding and delimiter are options of CSV files, and this is jsonl."


def files(**contents: bytes) -> list[tuple[str, Callable[[], io.BytesIO]]]:
    return [(f"{name}.csv", partial(io.BytesIO, content)) for name, content in contents.items()]


def test_several_files_are_one_source_when_their_columns_agree() -> None:
    """In whatever order the columns are; lines are counted from 1 in each file."""
    rows = FileRows(files(one=b"a,b\n1,2\n", header_alone=b"a,b\n", two=b"b,a\n4,3\n"))
    assert list(rows) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert (rows.place(0), rows.place(1), rows.place(2)) == ("one.csv, line 2", "two.csv, line 2", None)
    with pytest.raises(BatchInputError) as caught:
        list(FileRows(files(one=b"a,b\n1,2\n", two=b"a,c,d\n1,2,3\n")))
    assert str(caught.value) == "two.csv: its columns are not those of one.csv: it lacks b and adds c, d. Nothing was sent."


def test_a_row_is_named_by_the_line_that_it_begins_in() -> None:
    """Whatever lines its values and blank lines take."""
    rows = rows_of(b'a,b\n1,"x\ny\nz"\n\n2,3\n')
    assert [rows.place(position) for position in (0, 1)] == ["x.csv, line 2", "x.csv, line 6"]
    rows = rows_of(b'\n{"a":1}\n\n{"a":2}\n', "x.jsonl")
    assert [rows.place(position) for position in (0, 1)] == ["x.jsonl, line 2", "x.jsonl, line 4"]


def test_an_error_about_a_row_gets_its_place_also_when_later_rows_were_read() -> None:
    """Whoever reads ahead does not shift it; an error about no row, or about a row that is not there, stays as it is."""
    rows = rows_of(b"a\n1\n2\n3\n")
    for position, message in ((1, "x.csv, line 3: row 1: bad"), (None, "row 1: bad"), (7, "row 1: bad")):
        with pytest.raises(RequestError) as caught, rows.naming_places():  # noqa: PT012 - the error comes after the rows
            list(rows)
            raise RequestError("row 1: bad", position=position)
        assert (str(caught.value), caught.value.position) == (message, position)


def test_every_file_is_closed_also_when_it_is_broken() -> None:
    """A worker that maps over partitions would run out of file handles."""
    streams = [io.BytesIO(b"a,b\n1,2\n"), io.BytesIO(b"a,b\n1\n"), io.BytesIO(b"never opened")]
    opened = []

    def open_(stream: io.BytesIO) -> io.BytesIO:
        opened.append(stream)
        return stream

    with pytest.raises(BatchInputError):
        list(FileRows((f"{number}.csv", partial(open_, stream)) for number, stream in enumerate(streams)))
    assert opened == streams[:2]
    assert [stream.closed for stream in streams] == [True, True, False]


# memory

_PEAK = """
import re, sys
from functools import partial
from pathlib import Path
from airflow_provider_batchkit.source.files import FileRows

def count(path):
    return sum(1 for row in FileRows([(path, partial(open, path, "rb"))]))

def peak():  # in kB; getrusage would give the parent's where that was larger
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

count(sys.argv[1])
before = peak()
print(count(sys.argv[2]), peak() - before)
"""


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_memory_stays_flat_over_a_long_file(tmp_path: Path, name: str) -> None:
    """200,000 rows of 500 bytes, 100 MB, take less than 20 MB more than a tenth of them, in a process of its own."""
    small, large = tmp_path / f"small-{name}", tmp_path / name
    for path, count in ((small, 20_000), (large, 200_000)):
        write(path, count)
    done = subprocess.run([sys.executable, "-c", _PEAK, small, large], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    rows, kilobytes = map(int, done.stdout.split())
    assert rows == 200_000
    assert kilobytes < 20_000


def write(path: Path, count: int) -> None:
    """A file with ``count`` rows that do not compress to nothing."""
    chance = random.Random(7)
    pool = [f"{chance.getrandbits(2_000):x}" for _ in range(5_000)]
    texts = (chance.choice(pool) for _ in range(count))
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, pa.schema({"sku": pa.string(), "text": pa.string()})) as writer:
            for start in range(0, count, 10_000):
                skus = [str(number) for number in range(start, min(start + 10_000, count))]
                writer.write_table(pa.table({"sku": skus, "text": [next(texts) for _ in skus]}))
        return
    line = '{{"sku":"{}","text":"{}"}}\n' if "jsonl" in path.name else "{},{}\n"
    with gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else path.open("w") as file:
        if "csv" in path.name:
            file.write("sku,text\n")
        file.writelines(line.format(number, text) for number, text in enumerate(texts))

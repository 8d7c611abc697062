"""Result files, written column by column: large answers, odd texts, and memory that does not grow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_batchkit.landing.formats import FileColumn, row_writer

COLUMNS = [FileColumn("id", "integer"), FileColumn("response", "text"), FileColumn("cost_usd", "usd"), FileColumn("tags", "json")]


def read(form: str, data: bytes) -> list[dict[str, Any]]:
    if form == "parquet":
        import pyarrow.parquet as pq

        found: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
        return found
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_half_a_surrogate_pair_becomes_a_replacement_and_nothing_else_changes(form: str) -> None:
    """No other text of the same rows, either."""
    stream = io.BytesIO()
    writer = row_writer(form, stream, COLUMNS)
    texts = ["\ud800", "a\udc00b", "whole \U0001f4a9", "nul \0", None]
    writer.write([[1, 2, 3, 4, None], texts, ["0.000000000001", None, "1.0", "0.5", "2.25"], ["[1]", None, "{}", '"x"', "null"]])
    writer.close()
    found = read(form, stream.getvalue())
    assert [row["response"] for row in found] == ["\ufffd", "a\ufffdb", "whole \U0001f4a9", "nul \0", None]
    assert [float(row["cost_usd"]) if row["cost_usd"] is not None else None for row in found] == [1e-12, None, 1.0, 0.5, 2.25]
    assert [row["id"] for row in found] == [1, 2, 3, 4, None]
    if form == "jsonl":
        assert b'"cost_usd":0.000000000001,' in stream.getvalue()
        assert [row["tags"] for row in found] == [[1], None, {}, "x", None]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_no_rows_are_a_whole_file(form: str) -> None:
    """A batch without an answer has a file that can be read, with its columns where the format has some."""
    stream = io.BytesIO()
    row_writer(form, stream, COLUMNS).close()
    assert read(form, stream.getvalue()) == []


def memory() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_answers_of_five_megabytes(form: str, tmp_path: Path) -> None:
    """A hundred and fifty of them, which are 750 MB."""
    answer = "".join(chr(32 + i * 7919 % 90) for i in range(5_000)) * 1_000
    path = tmp_path / "answers"
    with path.open("wb") as stream:
        writer = row_writer(form, stream, COLUMNS)
        for number in range(10):
            writer.write([[number], [f"{number} {answer}"], ["0.1"], [None]])
        before = peak = memory()
        for number in range(10, 150):
            writer.write([[number], [f"{number} {answer}"], ["0.1"], [None]])
            peak = max(peak, memory())
        writer.close()
    assert peak - before < 120_000_000
    if form == "parquet":
        import pyarrow.parquet as pq

        assert pq.ParquetFile(path).metadata.num_rows == 150
        assert pq.ParquetFile(path).read_row_group(0).column("response")[3].as_py() == f"3 {answer}"
    else:
        with path.open("rb") as stream:
            assert sum(1 for _ in stream) == 150

"""What a job has seen, exactly, in little memory."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from airflow_provider_batchkit.marks import MarkTable


def marks(*texts: object) -> bytes:
    return b"".join(hashlib.sha256(str(text).encode()).digest()[:16] for text in texts)


@pytest.fixture(params=[1 << 17, 1_000, 0], ids=["in memory", "from memory into a file", "in a file"])
def table(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MarkTable]:
    """An empty table."""
    table = MarkTable(tmp_path / "marks", few=request.param)
    yield table
    table.close()


def test_a_mark_is_new_once_and_has_its_number_from_then_on(table: MarkTable) -> None:
    """Numbers count what is new, also within one call."""
    assert table.add_all(marks("a", "b", "a")) == [None, None, 0]
    assert table.add_all(marks("c", "b")) == [None, 1]
    assert table.find_all(marks("c", "d", "a")) == [2, None, 0]
    assert table.add_all(marks("c", "d", "d")) == [2, None, 3]
    assert len(table) == 4


def test_marks_that_begin_alike_are_told_apart(table: MarkTable) -> None:
    """The index knows four bytes of a mark; the rest is compared in the file, so no answer goes to another row."""
    alike = b"".join(b"same" + bytes([i]) * 12 for i in range(200))
    assert table.add_all(alike) == [None] * 200
    assert table.add_all(alike) == list(range(200))


def test_no_mark_is_lost_while_the_table_grows_and_is_written_out(table: MarkTable) -> None:
    """A hundred thousand marks, far beyond the first size of the index and the buffer."""
    many = marks(*range(100_000))
    for start in range(0, len(many), 512 * 16):
        assert set(table.add_all(many[start : start + 512 * 16])) == {None}
    assert table.find_all(many) == list(range(100_000))
    assert table.find_all(marks(-1)) == [None]


def test_few_marks_need_no_file(tmp_path: Path) -> None:
    """Most jobs are small: they leave the disk alone."""
    table = MarkTable(tmp_path / "marks")
    table.add_all(marks(*range(1_000)))
    table.close()
    assert not list(tmp_path.iterdir())


def test_a_million_marks_take_sixteen_bytes_each_at_most(table: MarkTable) -> None:
    """Memory that stays is the index; the marks are on disk."""
    tracemalloc.start()
    try:
        for start in range(0, 500_000, 500):
            table.add_all(marks(*range(start, start + 500)))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / len(table) < 20

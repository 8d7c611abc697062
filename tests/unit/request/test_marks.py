"""What a job has seen, exactly, in little memory."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from airflow_provider_batchkit.request.marks import MarkTable


def marks(*texts: object) -> bytes:
    return b"".join(hashlib.sha256(str(text).encode()).digest()[:16] for text in texts)


@pytest.fixture
def table(tmp_path: Path) -> Iterator[MarkTable]:
    """An empty table."""
    table = MarkTable(tmp_path / "marks")
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


def test_numbers_are_those_of_a_dict_whatever_comes_again(table: MarkTable) -> None:
    """Pieces of any size, with marks that came before, that come twice in the piece, and that begin as others do."""
    chance = random.Random(4)
    known: dict[bytes, int] = {}
    for _ in range(300):
        piece = [chance.choice([b"same", b"much"]) + chance.randrange(3_000).to_bytes(12, "big") for _ in range(chance.randrange(40))]
        if chance.random() < 0.5:
            piece = [marks(chance.randrange(5_000)) for _ in piece]
        numbers = []
        for mark in piece:
            numbers.append(known.get(mark))
            known.setdefault(mark, len(known))
        assert table.add_all(b"".join(piece)) == numbers
        assert table.find_all(b"".join(piece)) == [known[mark] for mark in piece]
    assert len(table) == len(known)


def test_no_mark_is_lost_while_the_table_grows_and_is_written_out(table: MarkTable) -> None:
    """Three hundred thousand marks, beyond the first size of the index and far beyond that of the buffer."""
    many = marks(*range(300_000))
    for start in range(0, len(many), 512 * 16):
        assert set(table.add_all(many[start : start + 512 * 16])) == {None}
    assert table.find_all(many) == list(range(300_000))
    assert table.find_all(marks(-1)) == [None]


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

"""``python -m tests.bench.seen``: what telling new rows from known ones costs, for each way to do it.

A submit looks up two marks of each row, its key's and its question's, 512 rows at a time, and numbers those that are new. Every line is a
process of its own: CPU seconds of the look-ups alone, and peak memory over what the process held before the first.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from struct import iter_unpack

from airflow_provider_batchkit.request.dedupe import _key_marks, _question_marks
from airflow_provider_batchkit.request.marks import MarkTable

BLOCK = 512
#: gives for each of some marks the number that it has, or None where it is new
AddAll = Callable[[bytes], list[int | None]]


def dict_of(parts: str, part: int, marks: bytes, known: dict[object, int]) -> list[int | None]:
    """``parts`` is the layout of a mark, of which one part counts."""
    found, first = [mark[part] for mark in iter_unpack(parts, marks)], len(known)
    numbers = [known.setdefault(mark, number) for number, mark in enumerate(found, start=first)]
    return [None if number == first + place else number for place, number in enumerate(numbers)]


def set_of_64(known: set[int], marks: bytes) -> list[int | None]:
    """Numbers nothing: a repeated row would have to be looked for."""
    block = memoryview(marks).cast("Q")[::2].tolist()
    assert known.isdisjoint(block)
    known.update(block)
    return [None] * len(block)


def sqlite(folder: Path) -> AddAll:
    """A table without safety; its page cache has 32 MB."""
    connection = sqlite3.connect(folder / "seen.db", isolation_level=None)
    for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -32000"):
        connection.execute(f"PRAGMA {pragma}")
    connection.executescript("CREATE TABLE seen (mark BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID; BEGIN")
    count = 0

    def add_all(marks: bytes) -> list[int | None]:
        nonlocal count
        rows = [(mark, number) for number, (mark,) in enumerate(iter_unpack("16s", marks), start=count)]
        assert connection.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", rows).rowcount == len(rows)
        count += len(rows)
        return [None] * len(rows)

    return add_all


WAYS: dict[str, Callable[[Path], AddAll]] = {
    "MarkTable": lambda folder: MarkTable(folder / "marks").add_all,
    "SQLite table": sqlite,
    "dict of 128 bits": lambda _: partial(dict_of, "16s", 0, known={}),
    "dict of 64 bits": lambda _: partial(dict_of, "QQ", 0, known={}),
    "set of 64 bits": lambda _: partial(set_of_64, set()),
}


def measure(way: str, rows: int) -> None:
    """Print CPU seconds and peak megabytes over the base."""
    with tempfile.TemporaryDirectory() as home:
        tables = []
        for name in ("keys", "questions"):
            Path(home, name).mkdir()
            tables.append(WAYS[way](Path(home, name)))
        base, used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
        for start in range(0, rows, BLOCK):
            keys = [f'["sku-{row}"]' for row in range(start, min(start + BLOCK, rows))]
            marks = _key_marks(keys), _question_marks([f"job-{hashlib.sha256(key.encode()).hexdigest()[:40]}" for key in keys])
            before = time.process_time()
            for add_all, some in zip(tables, marks, strict=True):
                add_all(some)
            used += time.process_time() - before
        print(f"{way:18} {rows:10,} {used:8.2f} s {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1e3:8.1f} MB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--way", choices=WAYS, nargs="*", default=list(WAYS))
    parser.add_argument("--alone", action="store_true", help="in this process")
    args = parser.parse_args()
    for rows in args.rows:
        for way in args.way:
            if args.alone:
                measure(way, rows)
            else:
                subprocess.run([sys.executable, "-m", "tests.bench.seen", "--alone", "--rows", str(rows), "--way", way], check=True)

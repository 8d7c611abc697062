"""An exact table of what a job has seen, small enough for any number of rows.

The marks are in a file, and memory holds an open-addressing index over it: 8 to 16 bytes a row, half as much again while it grows. A
look-up reads the file only where the index says that the row may have come before.

Simpler ways were measured (``python -m tests.bench.seen``: two tables, blocks of 512 rows, CPU seconds and peak MB on one busy machine):

================  ==============  ================  ==================
way               100,000 rows    1,000,000 rows    5,000,000 rows
================  ==============  ================  ==================
this table        0.12 s, 4 MB    1.7 s, 41 MB      11.5 s, 328 MB
SQLite table      0.64 s, 2 MB    9.6 s, 58 MB      81.4 s, 70 MB
dict of 128 bits  0.11 s, 28 MB   1.5 s, 269 MB     8.5 s, 1,269 MB
dict of 64 bits   0.10 s, 26 MB   1.5 s, 236 MB     8.7 s, 1,102 MB
set of 64 bits    0.04 s, 17 MB   0.6 s, 157 MB     3.1 s, 723 MB
================  ==============  ================  ==================

A submit of a million rows is to stay within 80 MB, which Python's own containers do not. A SQLite table adds 0.5 s to the 1.2 s of a submit
of 100,000 rows. Marks of 64 bits are not exact, either: among 5 million rows, two different ones have the same mark with a probability of
7e-7, and the second would get the answer of the first. With 128 bits it is 4e-26.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path

#: Bytes of a mark: a digest's beginning, or two hashes. Different keys and questions have different marks.
MARK_BYTES = 16
_FIRST_SLOTS = 1 << 18
_BUFFER_BYTES = MARK_BYTES * 4096
_NUMBER = (1 << 32) - 1


class MarkTable:
    """Up to four billion different marks, numbered from 0 in the order in which they came."""

    def __init__(self, path: Path) -> None:
        """:param path: a file that does not exist yet; it is removed with its folder"""
        #: Each slot has the mark's first four bytes in the upper half and its number plus one in the lower half. A free slot is 0.
        self._slots = array("Q")
        self._count = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._buffer = bytearray()
        self._flushed = 0

    def add_all(self, marks: bytes) -> list[int | None]:
        """For each mark the number of its earlier occurrence, or None when it is new and gets the next number.

        :param marks: the marks, joined
        """
        beginnings = _beginnings(marks)
        while 2 * (self._count + len(beginnings)) > len(self._slots):
            self._grow()
        fresh = self._add_fresh(beginnings)
        self._buffer += marks[: MARK_BYTES * fresh]
        found: list[int | None] = [None] * fresh
        found += [self._add(beginnings[position], marks, position) for position in range(fresh, len(beginnings))]
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()
        return found

    def _add_fresh(self, beginnings: Sequence[int]) -> int:
        """Number the first of the marks, as far as they are certainly new; returns how many. Each step costs at a million rows."""
        slots, mask, count = self._slots, len(self._slots) - 1, self._count
        for number, beginning in enumerate(beginnings, start=count + 1):
            slot = beginning & mask
            if slots[slot]:
                while taken := slots[slot]:
                    if taken >> 32 == beginning:
                        self._count = number - 1
                        return self._count - count
                    slot = (slot + 1) & mask
            slots[slot] = beginning << 32 | number
        self._count += len(beginnings)
        return len(beginnings)

    def _add(self, beginning: int, marks: bytes, position: int) -> int | None:
        """Return the number of a known mark; give a new mark the next number and return None."""
        slots, mask = self._slots, len(self._slots) - 1
        slot = beginning & mask
        while taken := slots[slot]:
            if taken >> 32 == beginning and self._is(taken & _NUMBER, marks, position):
                return (taken & _NUMBER) - 1
            slot = (slot + 1) & mask
        self._count += 1
        slots[slot] = beginning << 32 | self._count
        self._buffer += marks[MARK_BYTES * position : MARK_BYTES * (position + 1)]
        return None

    def find_all(self, marks: bytes) -> list[int | None]:
        """The number of each mark, or None for a mark that was not added."""
        if not self._count:
            return [None] * (len(marks) // MARK_BYTES)
        slots, mask = self._slots, len(self._slots) - 1
        found: list[int | None] = []
        for position, beginning in enumerate(_beginnings(marks)):
            slot = beginning & mask
            while (taken := slots[slot]) and not (taken >> 32 == beginning and self._is(taken & _NUMBER, marks, position)):
                slot = (slot + 1) & mask
            found.append((taken & _NUMBER) - 1 if taken else None)
        return found

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Free the file's handle."""
        os.close(self._file)

    def _is(self, number: int, marks: bytes, position: int) -> bool:
        """Whether mark ``number``, counted from 1, equals the mark at a position of ``marks``."""
        start = (number - 1) * MARK_BYTES
        if start < self._flushed:
            known = os.pread(self._file, MARK_BYTES, start)
        else:
            known = bytes(self._buffer[start - self._flushed : start - self._flushed + MARK_BYTES])
        return marks.startswith(known, MARK_BYTES * position)

    def _flush(self) -> None:
        with memoryview(self._buffer) as data:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
        self._flushed += len(self._buffer)
        self._buffer.clear()

    def _grow(self) -> None:
        old = self._slots
        slots = self._slots = array("Q", [0]) * (2 * len(old) or _FIRST_SLOTS)
        mask = len(slots) - 1
        for taken in old:
            if taken:
                slot = taken >> 32 & mask
                while slots[slot]:
                    slot = (slot + 1) & mask
                slots[slot] = taken


def _beginnings(marks: bytes) -> list[int]:
    """The first four bytes of each mark as a number."""
    return memoryview(marks).cast("I")[:: MARK_BYTES // 4].tolist()

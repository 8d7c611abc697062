"""An exact table of what a job has seen, small enough for any number of rows.

Telling whether one of a million rows came before takes more than a dict: one of digests needs 150 bytes a row. It is the fastest, and holds
the first 131,072 rows. When there are more the digests lie in a file, and memory holds an open-addressing index over it: 8 to 16 bytes a
row, half as much again while it grows. A look-up reads the file only where the index says that the row may have come before.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

#: of a mark: of a digest, or of hashes, that differ where what they mark differs
MARK_BYTES = 16
#: marks that are held in a dict
_FEW = 1 << 17
_FIRST_SLOTS = 1 << 16
_BUFFER_BYTES = MARK_BYTES * 4096
_NUMBER = (1 << 32) - 1


class MarkTable:
    """Up to four billion different marks, numbered from 0 in the order in which they came."""

    def __init__(self, path: Path, *, few: int = _FEW) -> None:
        """
        :param path: where a file may be made; it goes with the folder that it lies in
        :param few: so many marks are held in memory, and more in the file
        """
        self._path = path
        self._most = few
        self._few: dict[bytes, int] = {}
        self._many: _MarkFile | None = None

    def add_all(self, marks: bytes) -> Sequence[int | None]:
        """For each mark the number that it has from an earlier coming, or None when it is new and gets the next number.

        :param marks: one behind the other
        """
        few = self._few
        if self._many is None and len(few) + len(marks) // MARK_BYTES > self._most:
            self._many = _MarkFile(self._path)
            self._many.add_all(b"".join(few))
            few.clear()
        if self._many is not None:
            return self._many.add_all(marks)
        separate = _separate(marks)
        if few.keys().isdisjoint(separate) and len(set(separate)) == len(separate):
            few.update(zip(separate, range(len(few), len(few) + len(separate)), strict=True))
            return [None] * len(separate)
        return [self._add(mark) for mark in separate]

    def _add(self, mark: bytes) -> int | None:
        number = self._few.get(mark)
        if number is None:
            self._few[mark] = len(self._few)
        return number

    def find_all(self, marks: bytes) -> Sequence[int | None]:
        """For each mark its number, or None when it did not come."""
        return list(map(self._few.get, _separate(marks))) if self._many is None else self._many.find_all(marks)

    def __len__(self) -> int:
        return len(self._few) if self._many is None else len(self._many)

    def close(self) -> None:
        """Free the file's handle."""
        if self._many is not None:
            self._many.close()


def _separate(marks: bytes) -> tuple[bytes, ...]:
    return struct.unpack(f"{MARK_BYTES}s" * (len(marks) // MARK_BYTES), marks)


class _MarkFile:
    """Marks that lie in a file."""

    def __init__(self, path: Path) -> None:
        """:param path: of a file that does not exist yet"""
        #: upper half: the mark's first four bytes; lower half: its number plus one; 0 for a free slot
        self._slots = array("Q", [0]) * _FIRST_SLOTS
        self._count = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._buffer = bytearray()
        self._flushed = 0

    def add_all(self, marks: bytes) -> list[int | None]:
        beginnings = _beginnings(marks)
        while 2 * (self._count + len(beginnings)) > len(self._slots):
            self._grow()
        slots, mask, count = self._slots, len(self._slots) - 1, self._count
        found: list[int | None] = [None] * len(beginnings)
        for position, beginning in enumerate(beginnings):
            slot = beginning & mask
            while taken := slots[slot]:
                if taken >> 32 == beginning and self._is(taken & _NUMBER, marks, position):
                    found[position] = (taken & _NUMBER) - 1
                    break
                slot = (slot + 1) & mask
            else:
                count += 1
                slots[slot] = beginning << 32 | count
                self._buffer += marks[MARK_BYTES * position : MARK_BYTES * (position + 1)]
        self._count = count
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()
        return found

    def find_all(self, marks: bytes) -> list[int | None]:
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
        os.close(self._file)

    def _is(self, number: int, marks: bytes, position: int) -> bool:
        """Whether the mark of that number, counted from 1, is the one at a position of ``marks``."""
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
        slots = self._slots = array("Q", [0]) * (2 * len(old))
        mask = len(slots) - 1
        for taken in old:
            if taken:
                slot = taken >> 32 & mask
                while slots[slot]:
                    slot = (slot + 1) & mask
                slots[slot] = taken


def _beginnings(marks: bytes) -> memoryview:
    """The first four bytes of each mark as a number."""
    return memoryview(marks).cast("I")[:: MARK_BYTES // 4]

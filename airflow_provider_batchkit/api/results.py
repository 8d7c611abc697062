"""A stream of results → blocks, reconciled against the requests that were asked.

Lines are split on the byte ``\\n`` only: U+2028 and U+0085 are legal inside a JSON string, and splitting text on them breaks lines.
A line that cannot be read is kept as :class:`BrokenLine`, never dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from itertools import repeat
from typing import Any

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.api.lines import BrokenLine, LineFault, read_lines

#: bytes of results that are read together: large enough that per-block steps cost little, and memory holds a block a few times over
_BLOCK_BYTES = 1 << 19


def parse_blocks(
    chunks: Iterable[bytes], *, block_bytes: int = _BLOCK_BYTES, keep_messages: bool = False
) -> Iterator[tuple[ResultBlock, list[LineFault]]]:
    """Raw chunks of a results stream → blocks of some hundred results, each with the faults of its lines. Blank lines are skipped.

    :param block_bytes: once so many bytes have come, the lines that are whole make a block
    :param keep_messages: keep each whole message as bytes
    """
    before = 0
    for whole in _whole_lines(chunks, block_bytes):
        lines = _lines(whole)
        yield read_lines(whole, lines, before, keep_messages=keep_messages)
        before += len(lines)


def _whole_lines(chunks: Iterable[bytes], at_least: int = 1) -> Iterator[bytes]:
    """The same bytes, cut after the last newline whenever ``at_least`` of them have come. The rest after the final newline comes last."""
    rest: list[bytes] = []
    size = 0
    for chunk in chunks:
        size += len(chunk)
        end = chunk.rfind(b"\n") + 1 if size >= at_least else 0
        if end:
            yield b"".join([*rest, chunk[:end]])
            rest.clear()
            size = len(chunk) - end
        rest.append(chunk[end:])
    if any(rest):
        yield b"".join(rest)


def _lines(whole: bytes) -> list[bytes]:
    # readlines() finds newlines five times as fast as counting or splitting
    return BytesIO(whole).readlines()


@dataclass(slots=True)
class StreamFaults:
    """What was wrong with a result stream: counts, and a first sample of each kind for the log."""

    broken: int = 0
    duplicate: int = 0
    foreign: int = 0
    #: results that the API counts and that the stream lacked, even when it was read a second time
    short: int = 0
    broken_sample: str | None = None
    duplicate_sample: str | None = None
    foreign_sample: str | None = None
    #: (member, problem) of an :class:`OddMember` → its number of results; below, the ``custom_id`` of the first. These answers count
    odd: Counter[tuple[str, str]] = field(default_factory=Counter)
    odd_samples: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, fault: LineFault) -> None:
        """Count what is wrong with a line."""
        if isinstance(fault, BrokenLine):
            self.broken += 1
            self.broken_sample = self.broken_sample or f"line {fault.number}: {fault.reason}: {fault.sample!r}"
            return
        kind = fault.member, fault.problem
        self.odd[kind] += 1
        self.odd_samples.setdefault(kind, fault.custom_id)

    def add_duplicate(self, custom_id: str) -> None:
        self.duplicate += 1
        self.duplicate_sample = self.duplicate_sample or custom_id

    def add_foreign(self, custom_id: str) -> None:
        self.foreign += 1
        self.foreign_sample = self.foreign_sample or custom_id

    def __bool__(self) -> bool:
        return bool(self.broken or self.duplicate or self.foreign or self.short)

    def __add__(self, other: StreamFaults) -> StreamFaults:
        return StreamFaults(
            self.broken + other.broken,
            self.duplicate + other.duplicate,
            self.foreign + other.foreign,
            self.short + other.short,
            self.broken_sample or other.broken_sample,
            self.duplicate_sample or other.duplicate_sample,
            self.foreign_sample or other.foreign_sample,
            self.odd + other.odd,
            other.odd_samples | self.odd_samples,
        )

    def odd_members(self) -> list[str]:
        """A sentence for each member that was not as documented."""
        return [
            f"in {count:,} results {member} {problem}; their answers count, and this was passed over; first: {self.odd_samples[kind]}"
            for kind in self.odd
            for (member, problem), count in [(kind, self.odd[kind])]
        ]

    def to_json(self) -> dict[str, Any]:
        return {"broken_lines": self.broken, "duplicate_lines": self.duplicate, "foreign_lines": self.foreign, "short_by": self.short}


class Reconciler:
    """Gives every asked request exactly one outcome.

    :meth:`accept_block` passes on the first answer to each request. Duplicates, foreign ids and faults of lines are counted in ``faults``.
    Memory: the ids asked.
    """

    def __init__(self, asked: Mapping[str, str] | None) -> None:
        """:param asked: every ``custom_id`` of the batch, with the key of the row that pays for it; None when nobody knows them (a batch
        submitted elsewhere)
        """
        self.faults = StreamFaults()
        self._asked = asked
        #: the requests without an answer so far, with their keys; empty when nobody knows what was asked
        self.unanswered: dict[str, str] = dict(asked or {})
        #: ids that were answered, when nobody knows what was asked
        self._strangers: set[str] = set()
        #: ids that have come since the stream was begun anew; None while it is read for the first time
        self._this_read: set[str] | None = None

    @property
    def answered(self) -> int:
        """How many requests have their answer."""
        return len(self._strangers) if self._asked is None else len(self._asked) - len(self.unanswered)

    def read_again(self) -> None:
        """Start over with the stream: answers are kept, and faults are counted anew."""
        self.faults = StreamFaults()
        self._this_read = set()

    def short_of(self, expected: int) -> int:
        """How many lines fewer than ``expected`` the stream has held so far."""
        return max(expected - self.answered - self.faults.broken - self.faults.foreign, 0)

    def accept_block(self, block: ResultBlock, faults: Iterable[LineFault]) -> ResultBlock:
        """The first answers among a block's results, with their keys."""
        for fault in faults:
            self.faults.add(fault)
        if self._asked is not None and self._this_read is None:
            keys = list(map(self.unanswered.pop, block.custom_ids, repeat(None)))
            if None not in keys:
                block.keys = keys  # type: ignore[assignment] # just checked
                return block
            self.unanswered |= {custom_id: key for custom_id, key in zip(block.custom_ids, keys, strict=True) if key is not None}
        places = [place for place, custom_id in enumerate(block.custom_ids) if self._is_first(custom_id)]
        if len(places) < len(block):
            block = block.rows(places)
        block.keys = None if self._asked is None else [self._asked[custom_id] for custom_id in block.custom_ids]
        return block

    def _is_first(self, custom_id: str) -> bool:
        """Count a result, and say whether it is the first answer to a request."""
        if self._asked is not None and custom_id not in self._asked:
            self.faults.add_foreign(custom_id)
            return False
        first = custom_id not in self._strangers if self._asked is None else custom_id in self.unanswered
        if not first if self._this_read is None else custom_id in self._this_read:
            self.faults.add_duplicate(custom_id)
            return False
        if self._this_read is not None:
            self._this_read.add(custom_id)
        if self._asked is None:
            self._strangers.add(custom_id)
        else:
            self.unanswered.pop(custom_id, None)
        return first

"""What landed: the report of a fetch, and the log's lines on a faulty result stream."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from airflow_provider_batchkit.api.results import StreamFaults
from airflow_provider_batchkit.ledger.landings import Landed
from airflow_provider_batchkit.model import BatchSnapshot, CostTally, RequestStatus
from airflow_provider_batchkit.request.failed import FailedKinds

log = logging.getLogger(__name__)

NAMED = 10


@dataclass(frozen=True, slots=True)
class LandedBatch:
    """One batch of a landing."""

    snapshot: BatchSnapshot
    #: source rows per outcome
    counts: Counter[str]
    #: unfinished answers among the counted rows, per ``error_type``
    unfinished: Counter[str]
    tally: CostTally
    faults: StreamFaults
    #: the first keys without a result line
    missing: list[str]
    #: rows written to the table
    rows: int
    #: whether the batch had not landed before
    first: bool
    #: seconds that it took to read and stage the batch
    read_s: float
    #: failed results of a batch that the ledger does not know
    foreign_failed: FailedKinds | None = None

    @property
    def complete(self) -> bool:
        """Whether every request has a readable result line, so that the API has nothing more to give."""
        return not self.missing and not self.faults.broken and not self.faults.short

    @property
    def latency_s(self) -> float | None:
        """Seconds from the batch's creation to its end, by the API's clock."""
        return _seconds(self.snapshot.created_at, self.snapshot.ended_at)


@dataclass(frozen=True, slots=True)
class BatchFigures:
    """The figures of one batch of a landing. ``latency_s`` is the seconds from its creation to its end, by the API's clock."""

    batch_id: str
    counts: Counter[str]
    tally: CostTally
    latency_s: float | None


@dataclass(slots=True)
class LandingReport:
    """What landed. ``counts`` are source rows per outcome; ``tally`` counts requests, each once."""

    batch_ids: list[str] = field(default_factory=list)
    table: str = ""
    #: rows of these batches in the table; those that another batch of the same fetch has overridden do not count
    rows: int = 0
    #: rows that another batch of the same fetch has overridden, since its job has the same key
    overridden: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    #: source rows with an unfinished answer, per ``error_type``; ``counts`` includes them
    unfinished: Counter[str] = field(default_factory=Counter)
    tally: CostTally = field(default_factory=CostTally)
    faults: StreamFaults = field(default_factory=StreamFaults)
    #: the first keys without a result line
    missing: list[str] = field(default_factory=list)
    #: the batches that had not landed before; only these may be added to a counter
    first: list[BatchFigures] = field(default_factory=list)
    #: the batches that are in the table whole, for which the API has nothing more to give
    complete_ids: list[str] = field(default_factory=list)
    #: failed results of batches that the ledger does not know; below, the failed rows of such batches that had landed before
    foreign_failed: list[FailedKinds] = field(default_factory=list)
    untold: int = 0
    created_at: datetime | None = None
    ended_at: datetime | None = None

    @property
    def complete(self) -> bool:
        """Whether the API has nothing more to give for any of the batches."""
        return set(self.batch_ids) <= set(self.complete_ids)

    @property
    def latency_s(self) -> float | None:
        """Seconds from the first batch's creation to the last one's end, by the API's clock."""
        return _seconds(self.created_at, self.ended_at)

    def to_json(self) -> dict[str, Any]:
        """The summary that fetch pushes to XCom."""
        return {
            "batch_ids": self.batch_ids,
            "table": self.table,
            "rows": self.rows,
            "overridden": self.overridden,
            "counts": dict(sorted(self.counts.items())),
            "unfinished": dict(sorted(self.unfinished.items())),
            "cost_tally": self.tally.to_json(),
            "latency_s": self.latency_s,
            "stream": self.faults.to_json(),
            "missing": self.missing,
        }

    def recall(self, landed: Landed, unfinished: Mapping[str, int], *, is_foreign: bool) -> None:
        """Add a batch that has landed in the table before. Nothing is written; its counts and its bill come from the ledger.

        :param is_foreign: whether it was submitted elsewhere, so that the ledger lacks the outcomes of its rows
        """
        if is_foreign:
            self.untold += sum(landed.counts.values()) - landed.counts.get(RequestStatus.SUCCEEDED.value, 0)
        self.unfinished.update(unfinished)
        self.batch_ids.append(landed.batch_id)
        self.rows += landed.rows
        self.counts.update(landed.counts)
        if landed.complete:
            self.complete_ids.append(landed.batch_id)
        self.tally = self.tally + CostTally.from_json(landed.tally)
        self.created_at = min(filter(None, (self.created_at, landed.created_at)), default=None)
        self.ended_at = max(filter(None, (self.ended_at, landed.ended_at)), default=None)

    def include(self, batch: LandedBatch) -> None:
        """Add a batch that landed."""
        snapshot = batch.snapshot
        self.batch_ids.append(snapshot.batch_id)
        self.rows += batch.rows
        self.counts.update(batch.counts)
        self.unfinished.update(batch.unfinished)
        self.tally = self.tally + batch.tally
        self.faults = self.faults + batch.faults
        self.missing.extend(batch.missing[: NAMED - len(self.missing)])
        if batch.complete and not batch.faults.foreign:
            self.complete_ids.append(snapshot.batch_id)
        if batch.foreign_failed is not None:
            self.foreign_failed.append(batch.foreign_failed)
        if batch.first:
            self.first.append(BatchFigures(snapshot.batch_id, batch.counts, batch.tally, batch.latency_s))
        self.created_at = min(filter(None, (self.created_at, snapshot.created_at)))
        self.ended_at = max(filter(None, (self.ended_at, snapshot.ended_at)), default=None)


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return None if start is None or end is None else (end - start).total_seconds()


def log_unfinished(batch_id: str, unfinished: Mapping[str, int]) -> None:
    """Log a warning about unfinished answers."""
    for kind, rows in sorted(unfinished.items()):
        log.warning("Batch %s: %s rows have an answer that is %s (error_type)", batch_id, f"{rows:,}", kind)


def log_faults(snapshot: BatchSnapshot, faults: StreamFaults, missing: int, names: Sequence[str]) -> None:
    """Log a warning for each kind of fault."""
    for odd in faults.odd_members():
        log.warning("Batch %s: %s", snapshot.batch_id, odd)
    if faults.broken:
        log.warning("Batch %s: %d unreadable result lines; first: %s", snapshot.batch_id, faults.broken, faults.broken_sample)
    if faults.duplicate:
        log.warning(
            "Batch %s: %d repeated results, the first of each was taken; first: %s",
            snapshot.batch_id,
            faults.duplicate,
            faults.duplicate_sample,
        )
    if faults.foreign:
        log.warning(
            "Batch %s: %d results that nobody asked for, left out; first: %s", snapshot.batch_id, faults.foreign, faults.foreign_sample
        )
    if faults.short:
        log.warning("Batch %s: the API counts %d results more than it gave; the bill above lacks them", snapshot.batch_id, faults.short)
    if missing:
        log.warning("Batch %s: %d requests have no result line; first keys: %s", snapshot.batch_id, missing, ", ".join(names))

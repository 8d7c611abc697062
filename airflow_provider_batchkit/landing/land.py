"""Landing: an ended batch's results into the table, its outcomes into the ledger, and its bill, all in one transaction.

The order inside: results are streamed into a stage (a temporary table); the batch row moves to ``landed``, which locks it; the table is
written from the stage; the ledger's requests are updated from the stage; commit. Killed anywhere before the commit, nothing happened.
Memory: one map of the batch's ids and keys, and one chunk of rows.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.exceptions import BatchInputError, WrongBatchError
from airflow_provider_batchkit.landing.rounds import forget_outcomes, leave_out_superseded, remove_rows
from airflow_provider_batchkit.landing.stage import create_stage
from airflow_provider_batchkit.landing.table import RESULT_COLUMNS, ResultTable, WriteDisposition
from airflow_provider_batchkit.ledger.account import note_landing, pico
from airflow_provider_batchkit.ledger.bulk import BulkRow, loader_for
from airflow_provider_batchkit.ledger.engine import prepare_engine
from airflow_provider_batchkit.ledger.ledger import BatchRecord, Landed, Ledger
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.ledger.tables import request as request_table
from airflow_provider_batchkit.model import BatchItem, BatchSnapshot, Cost, CostTally, RequestStatus
from airflow_provider_batchkit.pricing import PriceBook, TallyBuilder
from airflow_provider_batchkit.progress import Progress
from airflow_provider_batchkit.requests import key_values
from airflow_provider_batchkit.results import Reconciler, StreamFaults

log = logging.getLogger(__name__)

_CHUNK = 5_000
_NAMED = 10
#: columns of the stage behind the table's own: how the row is known in the ledger, and its exact cost there
_LEDGER_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("batchkit_key", sa.Text()),
    ("batchkit_batch_cost", sa.BigInteger()),
    ("batchkit_standard_cost", sa.BigInteger()),
    ("batchkit_asked", sa.Boolean()),
)

#: reads a batch's first answers, each once, through a reconciler; told how many results the API counts
ReadItems = Callable[[str, Reconciler, int], Iterator[BatchItem]]


@dataclass(frozen=True, slots=True)
class BatchFigures:
    """One batch of a landing, by itself. ``latency_s``: seconds from its creation to its end, by the API's clock."""

    batch_id: str
    counts: Counter[str]
    tally: CostTally
    latency_s: float | None


@dataclass(slots=True)
class LandingReport:
    """What landed. ``counts`` are source rows per outcome; ``tally`` counts requests, each once."""

    batch_ids: list[str] = field(default_factory=list)
    table: str = ""
    #: rows written to the table
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    tally: CostTally = field(default_factory=CostTally)
    faults: StreamFaults = field(default_factory=StreamFaults)
    #: the first keys without a result line
    missing: list[str] = field(default_factory=list)
    #: the batches that had not landed before: what a counter may add up
    first: list[BatchFigures] = field(default_factory=list)
    created_at: datetime | None = None
    ended_at: datetime | None = None

    @property
    def complete(self) -> bool:
        """Every request has a readable result line: nothing more could be had from the API."""
        return not self.missing and not self.faults.broken and not self.faults.short

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
            "counts": dict(sorted(self.counts.items())),
            "cost_tally": self.tally.to_json(),
            "latency_s": self.latency_s,
            "stream": self.faults.to_json(),
            "missing": self.missing,
        }

    def recall(self, landed: Landed) -> None:
        """Add a batch that landed before and whose results are gone: nothing is written, its counts and its bill are in the ledger."""
        self.batch_ids.append(landed.batch_id)
        self.rows += landed.counts.get(RequestStatus.SUCCEEDED.value, 0)
        self.counts.update(landed.counts)
        self.tally = self.tally + CostTally.from_json(landed.tally)
        self.created_at = min(filter(None, (self.created_at, landed.created_at)), default=None)
        self.ended_at = max(filter(None, (self.ended_at, landed.ended_at)), default=None)

    def include(self, batch: _Landed, snapshot: BatchSnapshot) -> None:
        self.batch_ids.append(snapshot.batch_id)
        self.rows += batch.rows
        self.counts.update(batch.counts)
        self.tally = self.tally + batch.tally
        self.faults = self.faults + batch.faults
        self.missing.extend(batch.missing[: _NAMED - len(self.missing)])
        if batch.first:
            latency_s = _seconds(snapshot.created_at, snapshot.ended_at)
            self.first.append(BatchFigures(snapshot.batch_id, batch.counts, batch.tally, latency_s))
        self.created_at = min(filter(None, (self.created_at, snapshot.created_at)))
        self.ended_at = max(filter(None, (self.ended_at, snapshot.ended_at)), default=None)


@dataclass(slots=True)
class _Landed:
    rows: int
    counts: Counter[str]
    tally: CostTally
    faults: StreamFaults
    missing: list[str]
    first: bool = True


def land_batches(
    ledger: Ledger,
    snapshots: Sequence[BatchSnapshot],
    table_name: str,
    read_items: ReadItems,
    price_book: PriceBook,
    *,
    disposition: WriteDisposition = WriteDisposition.MERGE,
    include_failed: bool = False,
    portable: bool = False,
) -> LandingReport:
    """Land ended batches in the order given. Each batch is one transaction; ``replace`` is one for all of them.

    :param snapshots: the batches as the API shows them, all ended
    :param table_name: ``table`` or ``schema.table`` in the ledger's database; created when missing
    :param include_failed: also write a row, without a response, for each request that did not succeed
    :param portable: use no database's own bulk path
    :raises TableError: the table does not fit; nothing was written
    :raises ResultStreamError: the results could not be read to their end; nothing of that batch was written
    """
    ledger.ensure()
    records = [ledger.find(s.batch_id) for s in snapshots]
    table = ResultTable(table_name, _common_key(ledger, records, snapshots))
    if not table.check(ledger.engine):
        table.create(ledger.engine, unique_key=disposition is not WriteDisposition.APPEND)
    report = LandingReport(table=table_name)
    landing = _Landing(ledger, table, read_items, price_book, disposition, include_failed, portable)
    engine = prepare_engine(ledger.engine)
    if disposition is WriteDisposition.REPLACE:
        maps = [_key_map(ledger, record) for record in records]
        with engine.begin() as connection:
            for i, (snapshot, record, keys) in enumerate(zip(snapshots, records, maps, strict=True)):
                report.include(landing.land(connection, snapshot, record, keys, empty_first=i == 0), snapshot)
        return report
    for snapshot, record in zip(snapshots, records, strict=True):
        keys = _key_map(ledger, record)
        with engine.begin() as connection:
            report.include(landing.land(connection, snapshot, record, keys), snapshot)
    return report


def _common_key(ledger: Ledger, records: Sequence[BatchRecord | None], snapshots: Sequence[BatchSnapshot]) -> list[tuple[str, str]]:
    keys = {tuple(ledger.key_columns(r.job_id)) if r is not None else () for r in records}
    if len(keys) > 1:
        raise BatchInputError(
            f"The batches {', '.join(s.batch_id for s in snapshots)} have different keys "
            f"({'; '.join(sorted(', '.join(c for c, _ in k) or 'custom_id' for k in keys))}) and cannot land in one table. "
            "Nothing was written."
        )
    return list(keys.pop()) if keys else []


def _key_map(ledger: Ledger, record: BatchRecord | None) -> dict[str, list[str]] | None:
    """``custom_id`` → keys of the source rows that it answers, the one that is asked (and billed) first. None for an unknown batch."""
    if record is None:
        return None
    keys: dict[str, list[str]] = {}
    for custom_id, key, asked in ledger.rows_of(record):
        known = keys.setdefault(custom_id, [])
        known.insert(0, key) if asked else known.append(key)
    return keys


@dataclass(slots=True)
class _Landing:
    ledger: Ledger
    table: ResultTable
    read_items: ReadItems
    price_book: PriceBook
    disposition: WriteDisposition
    include_failed: bool
    portable: bool

    def land(
        self,
        connection: Connection,
        snapshot: BatchSnapshot,
        record: BatchRecord | None,
        keys: dict[str, list[str]] | None,
        *,
        empty_first: bool = False,
    ) -> _Landed:
        now, started = datetime.now(UTC), time.monotonic()
        key_types = [(c.name, c.type) for c in self.table.table.columns][: len(self.table.key_columns)]
        stage = create_stage(connection, [*key_types, *RESULT_COLUMNS, *_LEDGER_COLUMNS])
        landed = self._fill(connection, stage, snapshot, keys, now)
        if record is not None:
            self.ledger.landed(
                connection,
                record,
                landed.tally,
                {
                    "ended_at": snapshot.ended_at,
                    "landed_at": now,
                    "landed_table": self.table.name,
                    "counts": json.dumps(dict(sorted(landed.counts.items()))),
                    "source_rows": landed.counts.total(),
                },
            )
            leave_out_superseded(connection, stage, record)
        landed.rows = self._write(connection, stage, snapshot.batch_id, record, empty_first=empty_first)
        if record is not None:
            self._settle_requests(connection, stage, record)
        stage.drop(connection)
        if record is not None:
            landed.first = record.state is not BatchState.LANDED
            note_landing(connection, record.job_id, record.shard, time.monotonic() - started)
        return landed

    def _fill(
        self, connection: Connection, stage: sa.Table, snapshot: BatchSnapshot, keys: dict[str, list[str]] | None, now: datetime
    ) -> _Landed:
        """Stream the results into the stage; ids without a line become ``missing`` rows."""
        load = loader_for(connection, portable=self.portable)
        tally = TallyBuilder(self.price_book, snapshot.created_at)
        reconciler = Reconciler(keys)
        progress = Progress(log, f"landing {snapshot.batch_id}", snapshot.counts.total)
        counts: Counter[str] = Counter()
        chunk: list[BulkRow] = []

        def put(item: BatchItem, cost: Cost | None) -> None:
            for copy, key in enumerate(keys[item.custom_id] if keys is not None else ("",)):
                counts[item.status.value] += 1
                chunk.append(self._staged(item, key, cost, snapshot.batch_id, now, copy=copy > 0))
            if len(chunk) >= _CHUNK:
                load(connection, stage, chunk)
                chunk.clear()

        for item in self.read_items(snapshot.batch_id, reconciler, snapshot.counts.total):
            billed = item.status is RequestStatus.SUCCEEDED and item.usage is not None
            put(item, tally.add(item.model or "", item.usage) if billed and item.usage is not None else _FREE)
            progress.add()
        _refuse_anothers(snapshot, reconciler)
        missing = [c for c in keys if c not in reconciler.answered] if keys is not None else []
        for custom_id in missing:
            put(BatchItem(custom_id, RequestStatus.MISSING), _FREE)
        if chunk:
            load(connection, stage, chunk)
        progress.done()
        names = [key for custom_id in missing[:_NAMED] for key in (keys or {})[custom_id]]
        _report_faults(snapshot, reconciler.faults, len(missing), names)
        return _Landed(0, counts, tally.tally(), reconciler.faults, names)

    def _staged(self, item: BatchItem, key: str, cost: Cost | None, batch_id: str, now: datetime, *, copy: bool) -> BulkRow:
        if copy and cost is not None:
            cost = _FREE
        usage = item.usage
        return (
            *(self.table.key_of(key_values(key)) if key else ()),
            item.text,
            item.status.value,
            item.stop_reason,
            item.error_type,
            item.error_message,
            item.model,
            None if usage is None else usage.prompt_tokens,
            None if usage is None else usage.output_tokens,
            None if cost is None else cost.batch_usd,
            item.custom_id,
            batch_id,
            now,
            key,
            None if cost is None else pico(cost.batch_usd),
            None if cost is None else pico(cost.standard_usd),
            not copy,
        )

    def _write(self, connection: Connection, stage: sa.Table, batch_id: str, record: BatchRecord | None, *, empty_first: bool) -> int:
        """Move the staged rows into the table; returns how many."""
        target = self.table.table
        wanted = sa.true() if self.include_failed else stage.c.status == RequestStatus.SUCCEEDED.value
        names = self.table.column_names
        same_key = sa.and_(*(target.c[name] == stage.c[name] for name in self.table.key_names))
        select = sa.select(*(stage.c[name] for name in names)).where(wanted)
        if self.disposition is WriteDisposition.MERGE:
            better = sa.or_(
                stage.c.status == RequestStatus.SUCCEEDED.value, target.c.status != RequestStatus.SUCCEEDED.value, target.c.status.is_(None)
            )
            changed = {name: stage.c[name] for name in names if name not in self.table.key_names}
            connection.execute(sa.update(target).values(changed).where(same_key, wanted, better))
            select = select.where(~sa.exists().where(same_key))
        elif empty_first:
            connection.execute(sa.delete(target))
        else:
            connection.execute(sa.delete(target).where(target.c.batch_id == batch_id))
            if record is not None:
                remove_rows(connection, target, record, sa.exists().where(same_key, wanted))
        connection.execute(sa.insert(target).from_select(list(names), select))
        return int(connection.execute(sa.select(sa.func.count()).select_from(stage).where(wanted)).scalar_one())

    @staticmethod
    def _settle_requests(connection: Connection, stage: sa.Table, record: BatchRecord) -> None:
        """Write each source row's outcome to the ledger, anew when the batch has landed before."""
        here = (request_table.c.job_id == record.job_id) & (request_table.c.shard == record.shard)
        connection.execute(sa.delete(request_table).where(here))
        forget_outcomes(connection, stage, record)
        values: dict[str, Any] = {
            "job_id": sa.literal(record.job_id),
            "key": stage.c.batchkit_key,
            "shard": sa.literal(record.shard),
            "custom_id": stage.c.custom_id,
            # behind the job's id and a dash
            "digest": sa.func.substr(stage.c.custom_id, len(record.job_id) + 2),
            "asked": stage.c.batchkit_asked,
            "status": stage.c.status,
            "error_type": stage.c.error_type,
            "error_message": stage.c.error_message,
            "batch_cost_picousd": stage.c.batchkit_batch_cost,
            "standard_cost_picousd": stage.c.batchkit_standard_cost,
        }
        connection.execute(sa.insert(request_table).from_select(list(values), sa.select(*values.values())))


def _refuse_anothers(snapshot: BatchSnapshot, reconciler: Reconciler) -> None:
    if reconciler.faults.foreign and not reconciler.answered:
        raise WrongBatchError(
            f"Not one result of {snapshot.batch_id} answers a request of the shard that adopted it; the first is "
            f"{reconciler.faults.foreign_sample}. Nothing was written.",
            batch_id=snapshot.batch_id,
            custom_id=reconciler.faults.foreign_sample or "",
        )


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return None if start is None or end is None else (end - start).total_seconds()


_FREE = Cost(Decimal(0), Decimal(0))


def _report_faults(snapshot: BatchSnapshot, faults: StreamFaults, missing: int, names: Sequence[str]) -> None:
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

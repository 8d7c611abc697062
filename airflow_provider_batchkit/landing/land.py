"""Landing: an ended batch's results into the table, its outcomes into the ledger, and its bill, all in one transaction.

The order inside: results are streamed into a stage (temporary tables); the job is locked; the batch row moves to ``landed``; the outcomes
go from the stage into the ledger, and the rows into the table; commit. Killed anywhere before the commit, nothing happened.
Memory: one map of a batch's ids and keys, what the ledger keeps of its answers, and one block of results.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy.engine import Connection, Engine

from airflow_provider_batchkit.blocks import ResultBlock
from airflow_provider_batchkit.exceptions import BatchInputError, WrongBatchError
from airflow_provider_batchkit.landing.report import NAMED, LandedBatch, LandingReport, log_faults
from airflow_provider_batchkit.landing.rounds import NO_LATER, Later, Overtaken, lock_jobs
from airflow_provider_batchkit.landing.stage import AskedKeys, Stage, StageTables
from airflow_provider_batchkit.landing.table import ResultTable, WriteDisposition
from airflow_provider_batchkit.landing.write import TableWriter, prepare_connection, queue_for_table, settle_outcomes
from airflow_provider_batchkit.ledger.account import note_landing
from airflow_provider_batchkit.ledger.engine import begin_writing, prepare_engine
from airflow_provider_batchkit.ledger.ledger import BatchRecord, Ledger
from airflow_provider_batchkit.ledger.outputs import output_schema_of
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.model import ANSWERED, BatchItem, BatchSnapshot, RequestStatus
from airflow_provider_batchkit.pricing import PriceBook
from airflow_provider_batchkit.progress import Progress
from airflow_provider_batchkit.results import Reconciler
from airflow_provider_batchkit.schema import AnswerReader, OutputSchema
from airflow_provider_batchkit.tally import TallyBuilder

log = logging.getLogger(__name__)

#: requests without a result line that are staged together
_AT_A_TIME = 1_000
#: reads a batch's first answers, each once, through a reconciler; told how many results the API counts, and tells how many bytes came
ReadBlocks = Callable[[str, Reconciler, int, Callable[[int], None]], Iterator[ResultBlock]]


def land_batches(
    ledger: Ledger,
    snapshots: Sequence[BatchSnapshot],
    table_name: str,
    read_blocks: ReadBlocks,
    price_book: PriceBook,
    *,
    disposition: WriteDisposition = WriteDisposition.MERGE,
    include_failed: bool = False,
    portable: bool = False,
) -> LandingReport:
    """Land ended batches in the order given. Each batch is one transaction; ``replace`` is one for all of them.

    :param snapshots: the batches as the API shows them, all ended
    :param table_name: ``table`` or ``schema.table`` in the ledger's database; created when missing
    :param include_failed: also write a row, without a response, for each request that was not answered
    :param portable: use no database's own bulk path
    :raises TableError: the table does not fit; nothing was written
    :raises ResultStreamError: the results could not be read to their end; nothing of that batch was written
    """
    ledger.ensure()
    records = [ledger.find(s.batch_id) for s in snapshots]
    table = ResultTable(table_name, _common_key(ledger, records, snapshots), _common_schema(ledger, records, snapshots))
    if not snapshots and not table.exists(ledger.engine):
        # no batch tells the key that a new table needs
        return LandingReport(table=table_name)
    if snapshots and not table.check(ledger.engine):
        table.create(ledger.engine, unique_key=disposition is not WriteDisposition.APPEND)
    landing = _Landing(ledger, table, read_blocks, price_book, disposition, include_failed, portable)
    batches = list(zip(snapshots, records, strict=True))
    together = [batches] if disposition is WriteDisposition.REPLACE else [[batch] for batch in batches]
    report = LandingReport(table=table_name)
    engine = prepare_engine(ledger.engine)
    for one_transaction in together:
        for batch in _land_together(engine, landing, one_transaction):
            report.include(batch)
    return report


def _land_together(engine: Engine, landing: _Landing, batches: Sequence[tuple[BatchSnapshot, BatchRecord | None]]) -> list[LandedBatch]:
    while True:
        try:
            with engine.begin() as connection:
                return landing.land(connection, batches)
        except Overtaken as e:
            log.info("%s Nothing was written: they are read again.", e)


def _common_key(ledger: Ledger, records: Sequence[BatchRecord | None], snapshots: Sequence[BatchSnapshot]) -> list[tuple[str, str]]:
    keys = {tuple(ledger.key_columns(r.job_id)) if r is not None else () for r in records}
    if len(keys) > 1:
        raise BatchInputError(
            f"The batches {', '.join(s.batch_id for s in snapshots)} have different keys "
            f"({'; '.join(sorted(', '.join(c for c, _ in k) or 'custom_id' for k in keys))}) and cannot land in one table. "
            "Nothing was written."
        )
    return list(keys.pop()) if keys else []


def _common_schema(ledger: Ledger, records: Sequence[BatchRecord | None], snapshots: Sequence[BatchSnapshot]) -> OutputSchema | None:
    texts = {output_schema_of(ledger.engine, job_id) for job_id in {r.job_id for r in records if r is not None}}
    if None in records:
        texts.add(None)
    if len(texts) > 1:
        raise BatchInputError(
            f"The batches {', '.join(s.batch_id for s in snapshots)} asked with different output schemas, or some with none, and cannot "
            "land together. Fetch those of one schema at a time. Nothing was written."
        )
    text = texts.pop() if texts else None
    return None if text is None else OutputSchema(text)


@dataclass(frozen=True, slots=True)
class _Filled:
    """A batch that has been read to its end."""

    landed: LandedBatch
    stage: StageTables
    record: BatchRecord | None
    later: Later


@dataclass(slots=True)
class _Landing:
    ledger: Ledger
    table: ResultTable
    read_blocks: ReadBlocks
    price_book: PriceBook
    disposition: WriteDisposition
    include_failed: bool
    portable: bool

    def land(self, connection: Connection, batches: Sequence[tuple[BatchSnapshot, BatchRecord | None]]) -> list[LandedBatch]:
        """Land batches in the connection's transaction. Nothing but stages is written before the last result is read."""
        prepare_connection(connection)
        together = [record for _, record in batches if record is not None]
        filled = [self._fill(connection, snapshot, record, together) for snapshot, record in batches]
        now, started = datetime.now(UTC), time.monotonic()
        writer = TableWriter(connection, self.table, self.disposition, include_failed=self.include_failed, landed_at=now)
        begin_writing(connection)
        lock_jobs(connection, together)
        for batch in filled:
            if batch.record is not None:
                self._book(connection, batch.record, batch.landed, now)
                batch.later.check(connection, batch.record)
                settle_outcomes(connection, batch.stage, batch.record)
        queue_for_table(connection, self.table)
        if self.disposition is WriteDisposition.REPLACE:
            writer.empty()
        for batch in filled:
            writer.write(batch.stage.rows, batch.landed.snapshot.batch_id, batch.record)
            batch.stage.drop(connection)
        written_s = time.monotonic() - started
        for batch in filled:
            if batch.record is not None:
                note_landing(connection, batch.record.job_id, batch.record.shard, batch.landed.read_s + written_s / len(filled))
        return [batch.landed for batch in filled]

    def _fill(
        self, connection: Connection, snapshot: BatchSnapshot, record: BatchRecord | None, together: Sequence[BatchRecord]
    ) -> _Filled:
        """Stream the results into a stage; ids without a line become ``missing`` rows. The map of keys ends with it."""
        started = time.monotonic()
        keys = None if record is None else AskedKeys(self.ledger.rows_of(record))
        later = NO_LATER
        if record is not None and keys is not None:
            with self.ledger.engine.connect() as reading:
                later = Later.of(reading, record, together, keys)
        stage = Stage(connection, self.table, keys, later.keys, portable=self.portable)
        answers = None if self.table.schema is None else AnswerReader(self.table.schema)
        tally = TallyBuilder(self.price_book, snapshot.created_at)
        reconciler = Reconciler(None if keys is None else keys.billed)
        total = snapshot.counts.total
        progress = Progress(log, f"landing {snapshot.batch_id}", total)
        with stage.filling():
            for results in self.read_blocks(snapshot.batch_id, reconciler, total, lambda size: progress.add(0, size)):
                costs = tally.add_all(results)
                if answers is None:
                    stage.put(results, costs)
                else:
                    checked, values = answers.read_all(results)
                    stage.put(checked, costs, values)
                progress.rows += len(results)
            _refuse_anothers(snapshot, reconciler)
            missing = []
            if keys is not None and len(keys.billed) > len(reconciler.answered):
                missing = [(custom_id, key) for custom_id, key in keys.billed.items() if custom_id not in reconciler.answered]
            for start in range(0, len(missing), _AT_A_TIME):
                part = missing[start : start + _AT_A_TIME]
                absent = ResultBlock.of([BatchItem(custom_id, RequestStatus.MISSING) for custom_id, _ in part])
                absent.keys = [key for _, key in part]
                stage.put(absent, tally.add_all(absent))
        progress.done()
        names = [] if keys is None else [key for custom_id, billed in missing[:NAMED] for key in (billed, *keys.copies(custom_id))]
        log_faults(snapshot, reconciler.faults, len(missing), names)
        rows = stage.counts.total() if self.include_failed else sum(stage.counts[status.value] for status in ANSWERED)
        first = record is None or record.state is not BatchState.LANDED
        read_s = time.monotonic() - started
        landed = LandedBatch(snapshot, stage.counts, tally.tally(), reconciler.faults, names, rows, first, read_s)
        return _Filled(landed, stage.tables, record, later)

    def _book(self, connection: Connection, record: BatchRecord, landed: LandedBatch, now: datetime) -> None:
        """Move the batch to ``landed``, with its bill. Also a lock: a second landing of the batch waits here."""
        self.ledger.landed(
            connection,
            record,
            landed.tally,
            {
                "ended_at": landed.snapshot.ended_at,
                "landed_at": now,
                "landed_table": self.table.name,
                "counts": json.dumps(dict(sorted(landed.counts.items()))),
                "source_rows": landed.counts.total(),
            },
        )


def _refuse_anothers(snapshot: BatchSnapshot, reconciler: Reconciler) -> None:
    if reconciler.faults.foreign and not reconciler.answered:
        raise WrongBatchError(
            f"Not one result of {snapshot.batch_id} answers a request of the shard that adopted it; the first is "
            f"{reconciler.faults.foreign_sample}. Nothing was written.",
            batch_id=snapshot.batch_id,
            custom_id=reconciler.faults.foreign_sample or "",
        )

"""Landing: an ended batch's results into the table, its outcomes into the ledger, and its bill, all in one transaction.

The order inside: results are streamed into a stage (temporary tables); the job and the table are locked; what has landed meanwhile is
looked at again; the batch row moves to ``landed``; the outcomes go from the stage into the ledger, and the rows into the table; commit.
Killed anywhere before the commit, nothing happened.
Memory: one map of a batch's ids and keys, what the ledger keeps of its answers, and one block of results.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.api.results import Reconciler
from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.cost.tally import TallyBuilder
from airflow_provider_batchkit.exceptions import BatchInputError, BatchKitError, ReplaceRefusedError, WrongBatchError
from airflow_provider_batchkit.landing.answers import AnswerReader
from airflow_provider_batchkit.landing.report import NAMED, LandedBatch, LandingReport, log_faults, log_unfinished
from airflow_provider_batchkit.landing.rounds import NO_OTHERS, OtherRounds, Overtaken, lock_jobs
from airflow_provider_batchkit.landing.stage import AskedKeys, Stage, StageTables
from airflow_provider_batchkit.landing.table import ResultTable, WriteDisposition
from airflow_provider_batchkit.landing.write import TableWriter, prepare_connection, queue_for_table, settle_outcomes
from airflow_provider_batchkit.ledger import journal
from airflow_provider_batchkit.ledger.account import note_duration
from airflow_provider_batchkit.ledger.engine import begin_writing, prepare_engine
from airflow_provider_batchkit.ledger.landings import Landed, generation, landed_in, note_landing, older_batches, younger_is_there
from airflow_provider_batchkit.ledger.ledger import Ledger
from airflow_provider_batchkit.ledger.records import OUR_CUSTOM_ID, BatchRecord
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.model import ANSWERED, BatchItem, BatchSnapshot, RequestStatus, common_key_type, key_kind
from airflow_provider_batchkit.progress import Progress
from airflow_provider_batchkit.request.failed import FailedKinds
from airflow_provider_batchkit.schema import OutputSchema

log = logging.getLogger(__name__)

#: requests without a result line that are staged together
_AT_A_TIME = 1_000
#: reads a batch's first answers, each once, through a reconciler; told how many results the API counts, and tells how many bytes came
ReadBlocks = Callable[[str, Reconciler, int, Callable[[int], None]], Iterator[ResultBlock]]


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that is to land, and its row in the ledger; None for one that was submitted elsewhere."""

    batch_id: str
    record: BatchRecord | None


#: a batch as the API shows it now, ended
Look = Callable[[Batch], BatchSnapshot]


def land_batches(
    ledger: Ledger,
    batches: Sequence[Batch],
    table_name: str,
    look: Look,
    read_blocks: ReadBlocks,
    price_book: PriceBook,
    *,
    disposition: WriteDisposition = WriteDisposition.MERGE,
    include_failed: bool = False,
    portable: bool = False,
    rewrite: bool = False,
) -> LandingReport:
    """Land ended batches in the order given. Each batch is one transaction; ``replace`` is one for all of them.

    A batch that has landed in the table is not written again; its counts and its bill come from the ledger. Where results were missing,
    they are read again, and what the table lacks is written. Where one batch cannot land, the others do before the error is raised.

    :param table_name: ``table`` or ``schema.table`` in the ledger's database; created when missing
    :param look: raises when a batch cannot be read
    :param include_failed: also write a row, without a response, for each request that was not answered
    :param portable: use no database's own bulk path
    :param rewrite: write also what has landed in the table before
    :raises TableError: the table does not fit; nothing was written
    :raises ResultStreamError: the results could not be read to their end; nothing of that batch was written
    :raises WrongBatchError: a batch holds results that its row did not ask; nothing of that batch was written
    :raises ReplaceRefusedError: ``replace`` would have deleted rows without an answer to put in their place; nothing was written
    """
    ledger.ensure()
    report = LandingReport(table=table_name)
    if not batches:
        return report
    table = ResultTable(table_name, _common_key(ledger, batches), _common_schema(ledger, batches))
    exists = table.check(ledger.engine)
    if not exists:
        table.create(ledger.engine, unique_key=disposition is not WriteDisposition.APPEND)
    else:
        table.extend(ledger.engine)
    landing = _Landing(ledger, table, look, read_blocks, price_book, disposition, include_failed, portable)
    plan = _Plan.make(landing, batches, rewrite=rewrite)
    together = [batches] if disposition is WriteDisposition.REPLACE else [[batch] for batch in batches]
    failures: list[BatchKitError] = []
    for one_transaction in together:
        try:
            plan = landing.land_together(plan, one_transaction, report)
        except BatchKitError as e:
            failures.append(e)
    if failures:
        # the one that waiting or a retry may mend: the others come up again behind it
        first = min(failures, key=lambda e: (e.wait is None, not e.retryable))
        for other in failures:
            if other is not first:
                log.warning("%s", other)
        first.landed = report.first
        raise first
    return report


def check_table(ledger: Ledger, table_name: str | None, key_columns: Sequence[tuple[str, str]], schema: OutputSchema | None) -> None:
    """:raises TableError: for a key or a schema that the result table could not hold; without a name, that no table could"""
    table = ResultTable(table_name or "results", key_columns, schema)
    if table_name is None:
        table.check_names(ledger.engine.dialect)
    else:
        table.check(ledger.engine)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What of a fetch's batches is to be written to the table: those that have not landed there under ``number``.

    A table that is missing, or empty although rows were written to it, is filled anew under the next number. So the number tells of every
    batch that has ever landed in the table whether its rows are there.
    """

    batches: Sequence[Batch]
    number: int
    #: the latest landing of each of the batches in the table
    landed: Mapping[str, Landed]
    #: the user insists on writing what has landed
    rewrites: bool

    @classmethod
    def make(cls, landing: _Landing, batches: Sequence[Batch], *, rewrite: bool) -> _Plan:
        with landing.ledger.engine.connect() as connection:
            name, ids = landing.table.identity(connection), [batch.batch_id for batch in batches]
            return cls(batches, _number(connection, landing.table), landed_in(connection, ids, name), rewrite)

    def has_landed(self, batch: Batch) -> bool:
        """Whether the batch is in the table already, and stays as it is."""
        return not self.rewrites and batch.batch_id in self.landed and self.landed[batch.batch_id].number == self.number

    def is_torn(self, batch: Batch) -> bool:
        """Whether the batch is in the table without some of its answers."""
        return batch.record is not None and self.has_landed(batch) and not self.landed[batch.batch_id].complete


def _number(connection: Connection, table: ResultTable) -> int:
    """The number under which a batch lands in the table now."""
    last, written = generation(connection, table.identity(connection))
    lost = written and connection.execute(sa.select(sa.literal(1)).select_from(table.table).limit(1)).first() is None
    return max(last + lost, 1)


def _common_key(ledger: Ledger, batches: Sequence[Batch]) -> list[tuple[str, str]]:
    keys = {tuple(ledger.key_columns(b.record.job_id)) if b.record is not None else () for b in batches}
    # a source may tell its types to one job and not to another, which an earlier release submitted
    if len({tuple((column, key_kind(type_name)) for column, type_name in key) for key in keys}) > 1:
        raise BatchInputError(
            f"The batches {_names(batches)} have different keys "
            f"({'; '.join(sorted(', '.join(f'{c} {t}' for c, t in k) or 'custom_id' for k in keys))}) and cannot land in one table. "
            "Nothing was written."
        )
    return [(alike[0][0], common_key_type({type_name for _, type_name in alike})) for alike in zip(*keys, strict=True)]


def _common_schema(ledger: Ledger, batches: Sequence[Batch]) -> OutputSchema | None:
    jobs = {b.record.job_id if b.record is not None else None for b in batches}
    texts = {None if job_id is None else ledger.output_schema_of(job_id) for job_id in jobs}
    if len(texts) > 1:
        raise BatchInputError(
            f"The batches {_names(batches)} asked with different output schemas, or some with none, and cannot "
            "land together. Fetch those of one schema at a time. Nothing was written."
        )
    text = texts.pop()
    return None if text is None else OutputSchema(text)


def _names(batches: Sequence[Batch]) -> str:
    return ", ".join(batch.batch_id for batch in batches)


@dataclass(frozen=True, slots=True)
class _Filled:
    """A batch that has been read to its end."""

    landed: LandedBatch
    stage: StageTables
    record: BatchRecord | None
    others: OtherRounds
    #: keys whose outcome in another round stands
    left_out: AbstractSet[str]
    #: of the journal when it was read
    last_part: int | None


@dataclass(slots=True)
class _Landing:
    ledger: Ledger
    table: ResultTable
    look: Look
    read_blocks: ReadBlocks
    price_book: PriceBook
    disposition: WriteDisposition
    include_failed: bool
    portable: bool

    def land_together(self, plan: _Plan, batches: Sequence[Batch], report: LandingReport) -> _Plan:
        """Land batches in one transaction, or tell of them where all have landed already. Gives the plan for the next ones."""
        while True:
            if all(map(plan.has_landed, batches)) or self._would_replace_younger(plan, batches):
                late = self._look_for_the_rest(plan, batches)
                if late is None:
                    for batch in batches:
                        log.info("%s has landed in %s before; nothing is written for it again", batch.batch_id, self.table.name)
                        unfinished = self.ledger.unfinished(batch.record)
                        report.recall(plan.landed[batch.batch_id], unfinished, is_foreign=batch.record is None)
                    return plan
                seen = late
            else:
                seen = [(self.look(batch), batch.record) for batch in batches]
            try:
                with prepare_engine(self.ledger.engine).begin() as connection:
                    landed = self._land(connection, seen, plan)
            except Overtaken as e:
                log.info("%s Nothing was written: they are read again.", e)
                plan = _Plan.make(self, plan.batches, rewrite=plan.rewrites)
                continue
            for one in landed:
                report.include(one)
            return plan

    def _would_replace_younger(self, plan: _Plan, batches: Sequence[Batch]) -> bool:
        """Whether a ``replace`` that fills the table anew would delete the rows of a later run, which has filled it before."""
        known = [plan.landed[batch.batch_id] for batch in batches if batch.batch_id in plan.landed]
        if self.disposition is not WriteDisposition.REPLACE or plan.rewrites or len(known) < len(batches):
            return False
        with self.ledger.engine.connect() as connection:
            name = self.table.identity(connection)
            return all(younger_is_there(connection, name, plan.number, one) for one in known)

    def _look_for_the_rest(self, plan: _Plan, batches: Sequence[Batch]) -> list[tuple[BatchSnapshot, BatchRecord | None]] | None:
        """A batch that landed without some of its answers, when it can be read again; None when nothing more can be had."""
        (batch, *others) = batches
        if others or not plan.is_torn(batch) or self.disposition is WriteDisposition.REPLACE:
            return None
        try:
            return [(self.look(batch), batch.record)]
        except BatchKitError as e:
            log.warning("%s landed in %s without all of its answers, and cannot be read again: %s", batch.batch_id, self.table.name, e)
            return None

    def _land(self, connection: Connection, batches: Sequence[tuple[BatchSnapshot, BatchRecord | None]], plan: _Plan) -> list[LandedBatch]:
        """Land batches in the connection's transaction. Nothing but stages is written before the last result is read."""
        prepare_connection(connection)
        together = [record for _, record in batches if record is not None]
        filled = [self._fill(connection, snapshot, record, together) for snapshot, record in batches]
        if self.disposition is WriteDisposition.REPLACE:
            _refuse_to_lose(self.table, [batch.landed for batch in filled])
        now, started = datetime.now(UTC), time.monotonic()
        writer = TableWriter(connection, self.table, self.disposition, include_failed=self.include_failed, landed_at=now)
        begin_writing(connection)
        lock_jobs(connection, together)
        queue_for_table(connection, self.table)
        name = self.table.identity(connection)
        self._look_again(connection, name, filled, plan)
        for batch in filled:
            batch_id = batch.landed.snapshot.batch_id
            before = None if plan.rewrites else plan.landed.get(batch_id)
            # what fills a table anew is as old as it was
            values = _values(batch.landed, now if before is None else before.landed_at)
            note_landing(connection, batch_id, name, plan.number, values)
            if batch.record is not None:
                columns = {column: values[column] for column in ("ended_at", "landed_at", "counts")}
                columns |= {"landed_table": self.table.name, "source_rows": batch.landed.counts.total()}
                self.ledger.landed(connection, batch.record, batch.landed.tally, columns)
                settle_outcomes(connection, batch.stage, batch.record, batch.left_out)
        if self.disposition is WriteDisposition.REPLACE:
            writer.empty()
        for batch in filled:
            batch_id = batch.landed.snapshot.batch_id
            writer.write(batch.stage.rows, batch_id, batch.record, older=self._older(connection, name, batch_id, plan))
            batch.stage.drop(connection)
        written_s = time.monotonic() - started
        for batch in filled:
            if batch.record is not None:
                note_duration(connection, batch.record.job_id, batch.record.shard, batch.landed.read_s + written_s / len(filled))
        return [batch.landed for batch in filled]

    def _older(self, connection: Connection, name: str, batch_id: str, plan: _Plan) -> sa.Select[Any] | None:
        """The batches whose rows this one may overwrite, when it has landed before: those that landed earlier. None for all."""
        before = None if plan.rewrites else plan.landed.get(batch_id)
        if before is None or (before.number < plan.number and not younger_is_there(connection, name, plan.number, before)):
            return None
        return older_batches(name, before)

    def _look_again(self, connection: Connection, name: str, filled: Sequence[_Filled], plan: _Plan) -> None:
        """To be called under the locks.

        :raises Overtaken: when another landing, a later round or a further row came between the reading of the results and the locks
        """
        ids = [batch.landed.snapshot.batch_id for batch in filled]
        if landed_in(connection, ids, name) != {batch_id: plan.landed[batch_id] for batch_id in ids if batch_id in plan.landed}:
            raise Overtaken(f"{', '.join(ids)} landed in {self.table.name} while their results were read.")
        together = [Batch(batch.landed.snapshot.batch_id, batch.record) for batch in filled]
        if _number(connection, self.table) != plan.number or self._would_replace_younger(plan, together):
            raise Overtaken(f"{self.table.name} was emptied or filled while the results were read.")
        for batch in filled:
            if batch.record is None:
                continue
            batch.others.check(connection, batch.record)
            if journal.last_part(connection, batch.record.job_id, batch.record.shard) != batch.last_part:
                raise Overtaken(f"Rows were added to {batch.record} while its results were read.")

    def _fill(
        self, connection: Connection, snapshot: BatchSnapshot, record: BatchRecord | None, together: Sequence[BatchRecord]
    ) -> _Filled:
        """Stream the results into a stage; ids without a line become ``missing`` rows. The map of keys ends with it."""
        started = time.monotonic()
        last_part = None if record is None else self.ledger.last_part(record)
        keys = None if record is None else AskedKeys(self.ledger.rows_of(record))
        others = NO_OTHERS
        if record is not None and keys is not None:
            with self.ledger.engine.connect() as reading:
                others = OtherRounds.of(reading, record, together, keys)
        stage = Stage(connection, self.table, keys, others.ranks, portable=self.portable)
        answers = None if self.table.schema is None else AnswerReader(self.table.schema)
        tally = TallyBuilder(self.price_book, snapshot.created_at)
        foreign = FailedKinds() if record is None else None
        reconciler = Reconciler(None if keys is None else keys.billed)
        total = snapshot.counts.total
        progress = Progress(log, f"landing {snapshot.batch_id}", total)
        with stage.filling():
            for results in self.read_blocks(snapshot.batch_id, reconciler, total, lambda size: progress.add(0, size)):
                if foreign is not None:
                    _refuse_our_own(snapshot, results)
                    foreign.add(results.custom_ids, results.statuses, results.error_types, results.error_messages)
                costs = tally.add_all(results)
                if answers is None:
                    stage.put(results, costs)
                else:
                    checked, values = answers.read_all(results)
                    stage.put(checked, costs, values)
                progress.rows += len(results)
            missing = []
            if keys is not None and len(keys.billed) > len(reconciler.answered):
                missing = [(custom_id, key) for custom_id, key in keys.billed.items() if custom_id not in reconciler.answered]
            if record is not None and reconciler.faults.foreign and missing:
                raise _wrong(snapshot, record, reconciler, len(missing))
            for start in range(0, len(missing), _AT_A_TIME):
                part = missing[start : start + _AT_A_TIME]
                absent = ResultBlock.of([BatchItem(custom_id, RequestStatus.MISSING) for custom_id, _ in part])
                absent.keys = [key for _, key in part]
                stage.put(absent, tally.add_all(absent))
        progress.done()
        names = [] if keys is None else [key for custom_id, billed in missing[:NAMED] for key in (billed, *keys.copies(custom_id))]
        log_unfinished(snapshot.batch_id, stage.unfinished)
        log_faults(snapshot, reconciler.faults, len(missing), names)
        rows = stage.counts.total() if self.include_failed else sum(stage.counts[status.value] for status in ANSWERED)
        first = record is None or record.state is not BatchState.LANDED
        read_s = time.monotonic() - started
        landed = LandedBatch(
            snapshot, stage.counts, stage.unfinished, tally.tally(), reconciler.faults, names, rows, first, read_s, foreign
        )
        return _Filled(landed, stage.tables, record, others, stage.left_out, last_part)


def _values(landed: LandedBatch, now: datetime) -> dict[str, object]:
    """Columns of a landing."""
    return {
        "landed_at": now,
        "rows_written": landed.rows,
        "rows_answered": sum(landed.counts[status.value] for status in ANSWERED),
        "complete": landed.complete and not landed.faults.foreign,
        "counts": json.dumps(dict(sorted(landed.counts.items()))),
        "tally": json.dumps(landed.tally.to_json(with_lines=True)),
        "created_at": landed.snapshot.created_at,
        "ended_at": landed.snapshot.ended_at,
    }


def _refuse_to_lose(table: ResultTable, landed: Sequence[LandedBatch]) -> None:
    """The floor of a ``replace``: the old rows go only when every request has a readable result, and some have an answer."""
    torn = [one for one in landed if not one.complete]
    answered = sum(one.counts[status.value] for one in landed for status in ANSWERED)
    if not torn and answered:
        return
    faults = [
        f"{one.snapshot.batch_id}: {one.counts[RequestStatus.MISSING.value]:,} requests without a result line, {one.faults.broken:,} "
        f"unreadable lines, {one.faults.short:,} lines fewer than the API counts"
        for one in torn
    ]
    why = "; ".join(faults) or f"none of {sum(one.counts.total() for one in landed):,} rows has an answer"
    raise ReplaceRefusedError(
        f"The rows of {table.name} were to be replaced, and {why}. Nothing was written or deleted: the old rows stay. What was answered is "
        "billed and can be read for 29 days. Run the task again to read the results again, or land what there is with "
        'write_disposition="merge".',
        torn=bool(torn),
    )


def _refuse_our_own(snapshot: BatchSnapshot, results: ResultBlock) -> None:
    """A batch that the ledger does not have, and that this package sent all the same, is not keyed by its rows' keys."""
    ours = next((custom_id for custom_id in results.custom_ids if OUR_CUSTOM_ID.fullmatch(custom_id)), None)
    if ours is not None:
        raise WrongBatchError(
            f"{snapshot.batch_id} was sent by this provider for job {ours.partition('-')[0]} ({ours} is one of its results), and no row of "
            "this ledger has it. Nothing was written. Fetch it with the ledger_conn_id, or else the sql_conn_id, that submitted it; when "
            "that is this one, clear the submit task, which settles what is in doubt and gives the ids of its own batches. Its answers, "
            f"without their rows' keys, can be read with BatchKit().retrieve({snapshot.batch_id!r})."
        )


def _wrong(snapshot: BatchSnapshot, record: BatchRecord, reconciler: Reconciler, missing: int) -> WrongBatchError:
    faults = reconciler.faults
    return WrongBatchError(
        f"{snapshot.batch_id} has {faults.foreign:,} results that {record} did not ask, the first is {faults.foreign_sample}, and lacks "
        f"{missing:,} that it did ask: it is another job's. Nothing of it was written. Decide what becomes of the row: "
        f"{record.settle_command}."
    )

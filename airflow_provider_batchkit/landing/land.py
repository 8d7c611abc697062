"""Landing: an ended batch's results into the table, its outcomes into the ledger, and its bill, all in one transaction.

The order inside: results are streamed into a stage (temporary tables); the job and the table are locked; the ledger is checked for what
has landed meanwhile; the batch row moves to ``landed``; the outcomes go from the stage into the ledger, and the rows into the table;
commit. A crash anywhere before the commit changes nothing.
Memory: one map of a batch's ids and keys, what the ledger keeps of its answers, and one block of results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from airflow_provider_batchkit.landing.plan import Batch, Plan, common_key, common_schema
from airflow_provider_batchkit.landing.reading import ReadBatch, Reading, Results, landing_values, refuse_to_lose
from airflow_provider_batchkit.landing.refusal import refusal
from airflow_provider_batchkit.landing.report import LandedBatch, LandingReport
from airflow_provider_batchkit.landing.stage import TemporaryStage
from airflow_provider_batchkit.landing.standing import Overtaken, lock_jobs
from airflow_provider_batchkit.landing.table import ResultTable, WriteDisposition
from airflow_provider_batchkit.landing.target import LandingOptions, Seen, Target
from airflow_provider_batchkit.landing.warehouse.base import Warehouse
from airflow_provider_batchkit.landing.write import TableWriter, prepare_connection, queue_for_table, settle_outcomes
from airflow_provider_batchkit.ledger import journal
from airflow_provider_batchkit.ledger.account import note_duration
from airflow_provider_batchkit.ledger.engine import begin_writing, prepare_engine
from airflow_provider_batchkit.ledger.landings import note_landing, older_batches, younger_is_there
from airflow_provider_batchkit.ledger.ledger import Ledger
from airflow_provider_batchkit.schema import OutputSchema


def land_batches(ledger: Ledger, batches: Sequence[Batch], table_name: str, results: Results, options: LandingOptions) -> LandingReport:
    """Land ended batches in the order given. Each batch is one transaction; ``replace`` is one for all of them.

    A batch that has landed in the table is not written again; its counts and its bill come from the ledger. Where results were missing,
    they are read again, and the rows that the table lacks are written. Where one batch cannot land, the others land before the error is
    raised.

    :param table_name: ``table`` or ``schema.table`` in the ledger's database; created when missing
    :raises TableError: the table does not fit; nothing was written
    :raises ResultStreamError: the results could not be read to their end; nothing of that batch was written
    :raises WrongBatchError: a batch holds results that its row did not ask; nothing of that batch was written
    :raises ReplaceRefusedError: ``replace`` would have deleted rows without an answer to put in their place; nothing was written
    """
    ledger.ensure()
    report = LandingReport(table=table_name)
    if not batches:
        return report
    table = ResultTable(table_name, common_key(ledger, batches), common_schema(ledger, batches), disposition=options.disposition)
    exists = table.check(ledger.engine)
    if not exists:
        table.create(ledger.engine, unique_key=options.disposition is not WriteDisposition.APPEND)
    else:
        table.extend(ledger.engine)
    with ledger.engine.connect() as connection:
        known_as = table.identity(connection)
    _Beside(ledger, table, table_name, known_as, Reading(ledger, table, results, options.include_failed), options).land_all(batches, report)
    return report


def check_table(
    ledger: Ledger,
    table_name: str | None,
    key_columns: Sequence[tuple[str, str]],
    schema: OutputSchema | None,
    warehouse: Warehouse | None = None,
    widest: Mapping[str, Sequence[Any]] | None = None,
    disposition: WriteDisposition | None = None,
) -> None:
    """Find what would keep results from landing, before anything is sent.

    :param widest: key column → the keys of the source that need the most room
    :param disposition: how results will be written, where the task knows
    :raises TableError: the result table could not hold a key or the schema; without a name, no table could
    :raises WarehouseBusyError: no staging table can be made beside the table
    """
    table = ResultTable(table_name or "results", key_columns, schema, widest, disposition)
    if warehouse is not None:
        with warehouse.open() as connection:
            warehouse.check(connection, table)
            warehouse.probe(connection, table)
    elif table_name is None:
        table.check_names(ledger.engine.dialect)
    else:
        table.check(ledger.engine)


@dataclass(slots=True)
class _Beside(Target):
    """A table in the ledger's database."""

    def is_empty(self, books: Connection) -> bool:
        return self.table.is_empty(books)

    def land(self, plan: Plan, batches: Sequence[Batch], late: Seen | None, report: LandingReport) -> Plan:
        """Land batches in one transaction."""
        seen = late or self.look_at(batches)
        try:
            with prepare_engine(self.ledger.engine).begin() as connection:
                landed = self._land(connection, seen, plan)
        except (OperationalError, InterfaceError):
            raise
        except DBAPIError as e:
            refused = None if e.orig is None else refusal(e.orig, self.table.name, batches[0].batch_id)
            if refused is None:
                raise
            raise refused from e
        for one in landed:
            report.include(one)
        return plan

    def _land(self, connection: Connection, batches: Seen, plan: Plan) -> list[LandedBatch]:
        """Land batches in the connection's transaction. Only stages are written before the last result is read."""
        prepare_connection(connection)
        together = [record for _, record in batches if record is not None]
        filled = [
            self.reading.read(
                lambda keys, ranks: TemporaryStage(connection, self.table, keys, ranks, portable=self.options.portable),
                snapshot,
                record,
                together,
            )
            for snapshot, record in batches
        ]
        if self.options.replaces:
            refuse_to_lose(self.table, [batch.landed for batch in filled])
        now, started = datetime.now(UTC), time.monotonic()
        writer = TableWriter(connection, self.table, self.options.disposition, include_failed=self.options.include_failed, landed_at=now)
        begin_writing(connection)
        lock_jobs(connection, together)
        queue_for_table(connection, self.table)
        self._look_again(connection, filled, plan)
        for batch in filled:
            note_landed(self.ledger, connection, batch, plan, now, self.table.name)
        if self.options.replaces:
            writer.empty()
        for batch in filled:
            batch_id = batch.landed.snapshot.batch_id
            writer.write(batch.stage.tables.rows, batch_id, batch.record, older=older_than(connection, batch_id, plan))
            batch.stage.tables.drop(connection)
        written_s = time.monotonic() - started
        for batch in filled:
            if batch.record is not None:
                note_duration(connection, batch.record.job_id, batch.record.shard, batch.landed.read_s + written_s / len(filled))
        return [batch.landed for batch in filled]

    def _look_again(self, connection: Connection, filled: Sequence[ReadBatch[TemporaryStage]], plan: Plan) -> None:
        """Check under the locks that what was read must still land.

        :raises Overtaken: another landing, a later round or a further row came between the reading of the results and the locks
        """
        look_again(connection, filled, plan, lambda: self.is_empty(connection))
        if self.would_replace_younger(connection, plan, [Batch(batch.batch_id, batch.record) for batch in filled]):
            raise Overtaken(f"{self.table.name} was filled while the results were read.")


def note_landed(ledger: Ledger, connection: Connection, read: ReadBatch[Any], plan: Plan, now: datetime, spelled: str | None) -> None:
    """Write a batch's landing, its outcomes and its bill to the ledger, in the connection's transaction.

    :param spelled: the place where it lands, as the task names it; None where the ledger's row keeps its value
    """
    before = plan.before(read.batch_id)
    # a batch that fills a table anew keeps the time of its earlier landing
    values = landing_values(read.landed, now if before is None else before.landed_at)
    note_landing(connection, read.batch_id, plan.table, plan.number, values)
    if read.record is not None:
        columns = {column: values[column] for column in ("ended_at", "landed_at", "counts")}
        columns |= {"source_rows": read.landed.counts.total()} | ({} if spelled is None else {"landed_table": spelled})
        ledger.landed(connection, read.record, read.landed.tally, columns)
        settle_outcomes(connection, read.stage.tables, read.record, read.left_out, any_failed=read.stage.any_failed)


def look_again(connection: Connection, filled: Sequence[ReadBatch[Any]], plan: Plan, is_empty: Callable[[], bool]) -> None:
    """:raises Overtaken: another landing, a later round or a further row came after the results were read"""
    changed = plan.has_changed(connection, [batch.batch_id for batch in filled], is_empty)
    if changed is not None:
        raise Overtaken(changed)
    for batch in filled:
        if batch.record is None:
            continue
        batch.others.check(connection, batch.record)
        if journal.last_part(connection, batch.record.job_id, batch.record.shard) != batch.last_part:
            raise Overtaken(f"Rows were added to {batch.record} while its results were read.")


def older_than(connection: Connection, batch_id: str, plan: Plan) -> sa.Select[Any] | None:
    """The batches whose rows this one may overwrite. If it has landed before, they are those that landed earlier; None for all."""
    before = plan.before(batch_id)
    if before is None or (before.number < plan.number and not younger_is_there(connection, plan.table, plan.number, before)):
        return None
    return older_batches(plan.table, before)

"""Results → files, one for each batch, with the outcomes and the bill in the ledger.

A file is written under another name and moved to its place inside the ledger's transaction, which commits afterwards. After a crash
between the two, the batch has not landed, and its next landing replaces the file by one with the same rows. After an earlier crash there
is no file. Memory: as in any landing, and one row group where the files are Parquet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, BinaryIO, Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.landing.formats import FileColumn, require, row_writer, where
from airflow_provider_batchkit.landing.land import look_again, note_landed
from airflow_provider_batchkit.landing.plan import Batch, Plan, common_key, common_schema
from airflow_provider_batchkit.landing.reading import Reading, Results
from airflow_provider_batchkit.landing.report import LandedBatch, LandingReport
from airflow_provider_batchkit.landing.stage import AskedKeys, TemporaryStage
from airflow_provider_batchkit.landing.standing import lock_jobs
from airflow_provider_batchkit.landing.table import ResultTable, WriteDisposition
from airflow_provider_batchkit.landing.target import LandingOptions, Seen, Target
from airflow_provider_batchkit.landing.write import prepare_connection
from airflow_provider_batchkit.ledger import Ledger
from airflow_provider_batchkit.ledger.account import note_duration
from airflow_provider_batchkit.ledger.bulk import BulkColumns
from airflow_provider_batchkit.ledger.engine import begin_writing, prepare_engine
from airflow_provider_batchkit.ledger.records import BatchRecord
from airflow_provider_batchkit.ledger.tables import batch as batch_table
from airflow_provider_batchkit.model import ANSWERED, BatchSnapshot

log = logging.getLogger(__name__)

_ANSWERED = frozenset(status.value for status in ANSWERED)
#: kinds of the result columns that are not text
_RESULT_KINDS = {
    "input_tokens": "integer",
    "output_tokens": "integer",
    "cost_usd": "usd",
    "landed_at": "timestamptz",
    "round": "int",
}
#: the columns of a stage that the ledger keeps of a failed row
_FAILED = frozenset(
    {
        *("custom_id", "status", "error_type", "error_message"),
        *("batchkit_batch_cost", "batchkit_standard_cost", "batchkit_key", "batchkit_asked"),
    }
)


class OutputFiles(Protocol):
    """The place of result files. A file is found by its batch."""

    #: name of all the files together, with ``*`` in place of the batch's id; the ledger knows them by it
    name: str
    #: ``jsonl`` or ``parquet``
    form: str

    # whether the file of a batch is in its place
    def exists(self, batch_id: str) -> bool: ...

    # gives a file under another name; entering it opens it, leaving it closes it
    def create(self, batch_id: str) -> NewFile: ...


class NewFile(AbstractContextManager[BinaryIO], Protocol):
    """A file of a batch that is not in its place yet."""

    # moves the file to its place in one step, over a file that is there
    def publish(self) -> None: ...

    # removes the file, unless it is in its place
    def discard(self) -> None: ...


class FileStage(TemporaryStage):
    """Writes a batch's rows to a file. Its temporary tables hold what the ledger keeps of them."""

    def __init__(
        self,
        connection: Connection,
        table: ResultTable,
        keys: AskedKeys | None,
        ranks: Mapping[str, int],
        *,
        stream: BinaryIO,
        form: str,
        constants: Mapping[str, Any],
        include_failed: bool,
    ) -> None:
        """:param constants: column → the value that is the same in all rows"""
        super().__init__(connection, table, keys, ranks)
        self._names = [*(name for name, _ in table.key_columns), *(name for name, _ in table.answer_columns), *dict(self.columns)]
        self._constants = constants
        self._include_failed = include_failed
        self._writer = row_writer(form, stream, file_columns(table))
        self._loader = self

    def _staged_columns(self) -> list[tuple[str, Any]]:
        return [(name, type_) for name, type_ in self.columns if name in _FAILED]

    @contextmanager
    def filling(self) -> Iterator[None]:
        """After the block, the rows are in the file, apart from those that the stream still buffers."""
        try:
            with super().filling():
                yield
        except BaseException:
            # an unclosed Parquet writer would write its end when it is collected, to a stream that is closed by then
            with suppress(Exception):
                self._writer.close()
            raise
        self._writer.close()

    def write(self, columns: BulkColumns) -> None:
        """Add rows, in the order of a stage's columns."""
        named: dict[str, Sequence[Any]] = dict(zip(self._names, columns, strict=True))
        failed = [key is not None for key in named["batchkit_key"]]
        if any(failed):
            self._bulk.write(where([named[name] for name, _ in self._staged_columns()], failed))
        statuses = named["status"]
        named |= {name: [value] * len(statuses) for name, value in self._constants.items()}
        wanted = [self._include_failed or status in _ANSWERED for status in statuses]
        if any(wanted):
            self._writer.write(where([named[name] for name in self._result_table.column_names], wanted))


def file_columns(table: ResultTable) -> list[FileColumn]:
    """The columns of a result file: those of a new table."""
    schema = () if table.schema is None else table.schema.columns
    kinds = {name: _RESULT_KINDS.get(name, "text") for name in table.result_names}
    kinds |= {column.name: column.kind for column in schema} | dict(table.key_columns)
    return [FileColumn(name, kinds[name]) for name in table.column_names]


def land_files(ledger: Ledger, files: OutputFiles, batches: Sequence[Batch], results: Results, options: LandingOptions) -> LandingReport:
    """Land ended batches, in the order given, each in its own file.

    A batch that has landed and whose file exists is not read again. A missing file is written anew, and so is a file that lacks answers
    when these are available.

    :raises ResultStreamError: the results could not be read to their end; that batch has no file
    :raises WrongBatchError: a batch holds results that its row did not ask; that batch has no file
    """
    ledger.ensure()
    report = LandingReport(table=files.name)
    if not batches:
        return report
    require(files.form)
    table = ResultTable("results", common_key(ledger, batches), common_schema(ledger, batches))
    reading = Reading(ledger, table, results, options.include_failed)
    _Files(ledger, table, files.name, files.name, reading, replace(options, disposition=WriteDisposition.MERGE), files).land_all(
        batches, report
    )
    return report


@dataclass(slots=True)
class _Files(Target):
    """Files, one a batch."""

    files: OutputFiles

    def is_empty(self, books: Connection) -> bool:
        """Always False: each file is looked for by itself."""
        return False

    def has_landed(self, plan: Plan, batches: Sequence[Batch]) -> bool:
        return all(plan.has_landed(batch) and self.files.exists(batch.batch_id) for batch in batches)

    def land(self, plan: Plan, batches: Sequence[Batch], late: Seen | None, report: LandingReport) -> Plan:
        """Land a batch in its file."""
        for snapshot, record in late or self.look_at(batches):
            report.include(self._land(snapshot, record, plan))
        return plan

    def _land(self, snapshot: BatchSnapshot, record: BatchRecord | None, plan: Plan) -> LandedBatch:
        now, batch_id = datetime.now(UTC), snapshot.batch_id
        before = plan.before(batch_id)
        constants = {
            "batch_id": batch_id,
            "landed_at": now if before is None else before.landed_at,
            "round": 1 if record is None else record.round,
        }
        created = self.files.create(batch_id)
        try:
            with prepare_engine(self.ledger.engine).begin() as connection:
                prepare_connection(connection)
                with created as stream:
                    read = self.reading.read(
                        lambda keys, ranks: FileStage(
                            connection,
                            self.table,
                            keys,
                            ranks,
                            stream=stream,
                            form=self.files.form,
                            constants=constants,
                            include_failed=self.options.include_failed,
                        ),
                        snapshot,
                        record,
                        [] if record is None else [record],
                    )
                started = time.monotonic()
                begin_writing(connection)
                lock_jobs(connection, [] if record is None else [record])
                look_again(connection, [read], plan, lambda: False)
                # the ledger also keeps the name of a table that the batch has landed in
                note_landed(self.ledger, connection, read, plan, now, self._spelled(connection, record))
                created.publish()
                read.stage.tables.drop(connection)
                if record is not None:
                    note_duration(connection, record.job_id, record.shard, read.landed.read_s + time.monotonic() - started)
        finally:
            created.discard()
        return read.landed

    def _spelled(self, connection: Connection, record: BatchRecord | None) -> str | None:
        if record is None:
            return None
        found = sa.select(batch_table.c.landed_table).where(batch_table.c.job_id == record.job_id, batch_table.c.shard == record.shard)
        return self.files.name if connection.execute(found).scalar() is None else None

"""Journaled jobs. A fetch: batch ids → their rows in the ledger → the API → the table.

A batch that the API does not show for a moment is looked for again. A batch that stays missing is reported, and its rows are asked again
only when the user says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.api.polling import ENDED
from airflow_provider_batchkit.api.results import Reconciler
from airflow_provider_batchkit.exceptions import (
    BatchGoneError,
    BatchInputError,
    BatchKitError,
    BatchNotEndedError,
    BatchNotVisibleError,
    BatchUnavailableError,
    BatchVanishedError,
    SubmitUncertainError,
    TurnTakenError,
)
from airflow_provider_batchkit.jobs.settle import DEFAULT_TIMES, PATIENCE_S, Settler, SettleTimes, any_visible, unseen_since
from airflow_provider_batchkit.jobs.waiting import WaitFor
from airflow_provider_batchkit.kit import BatchKit
from airflow_provider_batchkit.landing import (
    Batch,
    BatchFigures,
    LandingOptions,
    LandingReport,
    OutputFiles,
    Results,
    Warehouse,
    WriteDisposition,
    land_batches,
    land_elsewhere,
    land_files,
)
from airflow_provider_batchkit.ledger import BatchRecord, BatchState, Ledger
from airflow_provider_batchkit.model import BatchSnapshot

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 300.0
#: a turn is free when its time is over, by the ledger's clock
_BEHIND_A_TURN = timedelta(seconds=1)
#: start of the ledger's note of a batch that answered 404 for too long; unlike an archived batch, it may appear again
VANISHED = "not visible"


@dataclass(frozen=True, slots=True)
class TableIn:
    """A result table: ``table`` or ``schema.table``, in a database."""

    name: str
    #: None for the ledger's own database
    warehouse: Warehouse | None = None


@dataclass(frozen=True, slots=True)
class FetchingTask:
    """The task instance that fetches. In its DAG run an older version of the ledger may know a batch by another id."""

    dag_id: str
    run_id: str
    #: a UUIDv7: where the table is in another database, the attempt with the greater id takes over
    attempt_id: str = ""


def fetch_job(
    kit: BatchKit,
    ledger: Ledger,
    batch_ids: Sequence[str],
    target: TableIn | OutputFiles,
    task: FetchingTask,
    options: LandingOptions,
    *,
    times: SettleTimes = DEFAULT_TIMES,
    unseen: Mapping[str, datetime] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> LandingReport:
    """Land batches. Waits up to a minute for a batch that the API does not show; the error's ``wait`` says how to wait longer.

    :param target: the result table, or the place of result files, for which the disposition does not count
    :param unseen: ``unseen`` of the previous error's ``wait``, when this fetch goes on after it
    :raises BatchKitError: when a batch cannot land; ``landed`` of the error lists what landed before it
    :raises BatchUnavailableError: when a batch cannot be read; the others have landed, unless all replace the table's rows together
    :raises BatchInputError: for ``replace`` with a job that asks only part of the source's rows; nothing was deleted
    """
    ledger.ensure()
    slept, landed, since = 0.0, list[BatchFigures](), dict(unseen or {})
    while True:
        try:
            fetch = _Fetch(kit, ledger, times, since)
            batches = [fetch.find(batch_id, task) for batch_id in batch_ids]
            if options.replaces:
                _refuse_parts(ledger, batches)
            results = Results(fetch.look, fetch.read_blocks, kit.price_book)
            if not isinstance(target, TableIn):
                report = land_files(ledger, target, batches, results, options)
            elif target.warehouse is None:
                report = land_batches(ledger, batches, target.name, results, options)
            else:
                report = land_elsewhere(ledger, target.warehouse, batches, target.name, results, options, attempt_id=task.attempt_id)
        except BatchKitError as e:
            if isinstance(e, TurnTakenError):
                e.wait = WaitFor((), e.free_at + _BEHIND_A_TURN, e.free_at + _BEHIND_A_TURN, str(e), about="turn")
            landed += e.landed
            e.landed = landed
            if e.wait is None or e.wait.batch_ids:
                raise
            pause = max((e.wait.until - ledger.now()).total_seconds(), 0.0)
            if slept + pause > PATIENCE_S:
                raise
            sleep(pause)
            slept += pause
        else:
            report.first[:0] = landed
            _count_equal_keys(ledger, batches, target, options, report)
            return report


class _Fetch:
    """Looks at the batches of one fetch."""

    def __init__(self, kit: BatchKit, ledger: Ledger, times: SettleTimes, unseen: dict[str, datetime]) -> None:
        """:param unseen: what the API does not show → since when, where the ledger does not keep it; it is updated here"""
        self._kit = kit
        self._ledger = ledger
        self._times = times
        self._records: dict[str, BatchRecord | None] = {}
        self._unseen = unseen

    def find(self, batch_id: str, task: FetchingTask) -> Batch:
        """The batch with this id, and its row in the ledger.

        :raises BatchUnavailableError: when its requests were never accepted
        :raises SubmitUncertainError: when its row is in doubt, which happens only to rows of an older version of the ledger
        """
        record = self._ledger.row_of(batch_id, task.dag_id, task.run_id)
        if record is not None and record.state is BatchState.SENDING:
            record = self._prove(batch_id, record)
        if record is not None and record.batch_id is None:
            raise BatchUnavailableError(
                f"{batch_id} stands for {record}, which is {record.state.value}: its rows were never accepted, and nothing was billed for "
                "them. Nothing was written. Clear the submit task: it sends them and nothing else."
            )
        found = batch_id if record is None or record.batch_id is None else record.batch_id
        self._records[found] = record
        return Batch(found, record)

    def _prove(self, batch_id: str, record: BatchRecord) -> BatchRecord:
        wait = Settler(self._kit, self._ledger, self._times, lease=None).look([record])
        if wait is not None:
            error = SubmitUncertainError(f"{batch_id} was never proved to be {record}. {wait.why} Nothing was written.")
            error.wait = wait
            raise error
        return self._ledger.get(record.job_id, record.shard)

    def look(self, batch: Batch) -> BatchSnapshot:
        """Look at the batch, which must have ended."""
        try:
            found = self._kit.get(batch.batch_id)
        except BatchNotVisibleError as e:
            raise self._not_visible(batch.batch_id, e) from e
        self._unseen.pop(batch.batch_id, None)
        if batch.record is not None:
            self._ledger.note_unseen(batch.record, None)
        if found.archived_at is not None:
            why = f"archived at {found.archived_at:%Y-%m-%d %H:%M} UTC: results can be read for 29 days after creation"
            raise self._gone(batch.batch_id, batch.record, why)
        if found.processing_status != ENDED:
            raise BatchNotEndedError(
                f"Batch {batch.batch_id} is {found.processing_status}: its results come when it has ended. Nothing is lost; wait for it."
            )
        return found

    def read_blocks(self, batch_id: str, reconciler: Reconciler, expected: int, on_bytes: Callable[[int], None]) -> Iterator[ResultBlock]:
        """:meth:`BatchKit.read_blocks` of a batch that :meth:`look` has shown. Its results may still answer 404 for a while."""
        try:
            yield from self._kit.read_blocks(batch_id, reconciler, expected, on_bytes)
        except BatchNotVisibleError as e:
            what = f"the results of {batch_id}"
            raise self._unseen_for_now(e, what, self._unseen.setdefault(what, self._ledger.now())) from e
        self._unseen.pop(f"the results of {batch_id}", None)

    def _unseen_for_now(self, error: BatchNotVisibleError, what: str, since: datetime) -> BatchNotVisibleError:
        """``error`` with a ``wait`` for another look, as long as the task need not be retried for it."""
        now, absence = self._ledger.now(), timedelta(seconds=self._times.absence_s)
        if now - since <= absence:
            pause = min(
                max((now - since).total_seconds(), _FIRST_PAUSE_S), _LONGEST_PAUSE_S, (since + absence - now).total_seconds() + 0.01
            )
            why = f"The API answers 404 for {what}. It is looked for again until {since + absence:%H:%M:%S} UTC at least."
            error.wait = WaitFor((), now + timedelta(seconds=pause), since + absence, why, about="unseen", unseen=dict(self._unseen))
        else:
            error.add_note(f"The API has answered 404 for {what} since {since:%Y-%m-%d %H:%M:%S} UTC. A retry of the task looks again.")
        return error

    def _not_visible(self, batch_id: str, error: BatchNotVisibleError) -> BatchUnavailableError:
        """The error for a 404. It asks to wait, unless the 404s have lasted too long while other batches of the connection are visible."""
        import anthropic

        record = self._records[batch_id]
        if record is None:
            if batch_id not in self._unseen:
                log.warning("%s is not in the ledger: if the API does not show it, its id may be wrong.", batch_id)
            return self._unseen_for_now(error, batch_id, self._unseen.setdefault(batch_id, self._ledger.now()))
        now, absence = self._ledger.now(), timedelta(seconds=self._times.absence_s)
        since = unseen_since(record, now, absence) or now
        self._ledger.note_unseen(record, since, now)
        if now - since <= absence:
            return self._unseen_for_now(error, f"{batch_id}, which is {record}", since)
        try:
            seen = any_visible(self._kit, self._ledger.witnesses(record, self._kit.workspaces))
        except (BatchUnavailableError, anthropic.APIError) as e:
            error.add_note(f"Looking for the connection's earlier batches failed, so nothing shows that it is gone: {e}")
            return error
        if not seen:
            error.add_note(
                "None of the connection's earlier batches is visible either, so nothing shows that it is gone. If you know that it is: "
                f"{record.settle_command}."
            )
            return error
        return self._gone(batch_id, record, f"{VANISHED} from {since:%Y-%m-%d %H:%M:%S} to {now:%H:%M:%S} UTC")

    def _gone(self, batch_id: str, record: BatchRecord | None, why: str) -> BatchUnavailableError:
        vanished = why.startswith(VANISHED)
        if record is None or record.state is BatchState.LANDED:
            return (BatchNotVisibleError if vanished else BatchUnavailableError)(
                f"Batch {batch_id} was {why}. Its answers can no longer be had; what landed before is in your table and the ledger."
            )
        if record.state is BatchState.SUBMITTED:
            self._ledger.gone(record, why)
        error = (BatchVanishedError if vanished else BatchGoneError)(
            f"Batch {batch_id} was {why}. It has not landed: it is {record}, and its {record.requests:,} requests have no answer. It may "
            "have been billed. They are asked again, and billed again, only when you say so: by retry_gone=True and a further round of the "
            "task (max_rounds), or in a task with only_failed_of and retry_gone=True."
        )
        error.batch_id, error.reason = batch_id, why
        return error


def _count_equal_keys(
    ledger: Ledger, batches: Sequence[Batch], target: TableIn | OutputFiles, options: LandingOptions, report: LandingReport
) -> None:
    """Count the keys that several jobs have written. Batches are written in the order given, so the answer of the later one stays."""
    if not isinstance(target, TableIn) or options.disposition is WriteDisposition.APPEND:
        return
    records = [batch.record for batch in batches if batch.record is not None]
    jobs = {record.job_id for record in records}
    if len(jobs) < 2:
        return
    report.overridden = ledger.written_again(records, include_failed=options.include_failed)
    report.rows -= report.overridden
    if report.overridden:
        log.warning(
            "%s answers have a key that another of the %d jobs of this fetch has answered, too. %s keeps one row for each key, that of the "
            "batch whose id comes later. The others were paid for. To keep them all, give each job a table of its own, make what tells the "
            'jobs apart part of key, or fetch with write_disposition="append".',
            f"{report.overridden:,}",
            len(jobs),
            target.name,
        )


def _refuse_parts(ledger: Ledger, batches: Sequence[Batch]) -> None:
    for job_id in {batch.record.job_id for batch in batches if batch.record is not None}:
        if ledger.skips_unchanged(job_id):
            raise BatchInputError(
                f"The job {job_id} was submitted with skip_unchanged, so its batches answer the changed rows only, and "
                'write_disposition="replace" would delete all others. Nothing was deleted or written. Fetch with "merge".'
            )

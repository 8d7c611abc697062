"""Journaled jobs. A submit: source items → requests → shards → ledger → API, in the order of writes that never pays twice.

1. the job's lease is taken, and rows that an earlier attempt left as ``sending`` are settled;
2. the source is read to its end, rendered, checked and written to disk, so bad input costs nothing;
3. for each shard: its requests and its batch row are committed as ``sending``, then the POST, then the batch id.

A later attempt skips every row that the ledger has in flight or landed; the ledger knows a row by its key.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import chain

from airflow_provider_batchkit.cost.checks import check_shards
from airflow_provider_batchkit.cost.estimate import Estimate, estimate_shards
from airflow_provider_batchkit.exceptions import (
    BatchInputError,
    CostLimitError,
    LeaseLostError,
    LedgerError,
    RequestError,
    SubmitRefusedError,
    SubmitThrottledError,
    SubmitUncertainError,
)
from airflow_provider_batchkit.jobs.caps import NO_LIMITS, Limits, Spending
from airflow_provider_batchkit.jobs.prime import Priming
from airflow_provider_batchkit.jobs.settle import DEFAULT_TIMES, PATIENCE_S, Settler, SettleTimes
from airflow_provider_batchkit.jobs.waiting import WaitFor
from airflow_provider_batchkit.kit import BatchKit
from airflow_provider_batchkit.landing import Warehouse, WriteDisposition
from airflow_provider_batchkit.ledger import BatchRecord, BatchState, Intent, JobRecord, Ledger
from airflow_provider_batchkit.ledger.reasons import WORTH_A_ROUND, Wanted
from airflow_provider_batchkit.model import MAX_BYTES_PER_BATCH, MAX_REQUESTS_PER_BATCH, BatchSnapshot
from airflow_provider_batchkit.request.block import RequestBlock
from airflow_provider_batchkit.request.dedupe import RowCounts, dedupe
from airflow_provider_batchkit.request.scratch import scratch_folder
from airflow_provider_batchkit.request.shards import Shard, ShardWriter, remove_shard_files, split_shard

log = logging.getLogger(__name__)

#: so many void shards of one attempt end it: their POSTs ended unseen and proved never to have been accepted
_DOUBTS = 5
#: an attempt waits no longer than this for an API that keeps refusing with "not now"
_THROTTLED_AT_MOST = timedelta(hours=24)


@dataclass(slots=True)
class SubmitReport(RowCounts):
    """The result of one attempt of a submit, and all batches of its job."""

    #: ids of all batches of the job, in the order of its shards
    batch_ids: list[str] = field(default_factory=list)
    #: requests sent by this attempt
    asked: int = 0
    #: batches that a rehearsal would create
    batches: int = 0
    #: the estimated cost of what this attempt sends; None when it has nothing to send
    estimate: Estimate | None = None
    #: the wait of the rest of the job; submit again when it is over
    waits_for: WaitFor | None = None

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows: {self.asked:,} asked now, {self.copies:,} share a request, {self.known:,} were asked before, "
            f"{self.unchanged:,} are answered and unchanged, {self.passed_over:,} are not to be asked; "
            f"{len(self.batch_ids)} batches: {', '.join(self.batch_ids)}"
        )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a job's task. It may consist of several legs with waits between them."""

    kit: BatchKit
    ledger: Ledger
    job: JobRecord
    #: the task instance's id, a UUIDv7
    attempt_id: str
    #: when its first leg began; aware
    since: datetime
    #: the Airflow connection of the API
    anthropic_conn_id: str = "anthropic_default"
    #: candidates that the previous leg waited for
    waited_for: Sequence[str] = ()
    #: returns whether the task was killed and must send nothing more
    stopped: Callable[[], bool] = lambda: False
    #: a digest of what a mapped task instance asks; None for a task that is not mapped
    asked: str | None = None

    @property
    def job_id(self) -> str:
        return self.job.job_id

    def batch_ids(self) -> list[str]:
        """Ids of the job's batches that run, have landed or are gone, by shard. Gone ones are included, so that a fetch reports them."""
        return [b.batch_id for b in self.ledger.batches(self.job_id) if b.batch_id]


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """The options of a submit."""

    max_requests: int = MAX_REQUESTS_PER_BATCH
    #: most bytes in the body of one batch
    max_bytes: int = MAX_BYTES_PER_BATCH
    #: whether to leave out rows whose request has succeeded in another run of the task and landed in the same table
    skip_unchanged: bool = False
    #: the task's result table; None where the task does not know it
    table: str | None = None
    #: the times of looking for a shard that an earlier attempt may have sent, before it counts as never accepted
    times: SettleTimes = DEFAULT_TIMES
    #: the caps on the job's cost
    limits: Limits = NO_LIMITS
    #: the way in which the job's first request primes the cache; None sends all requests at once
    priming: Priming | None = None
    #: the number of the round, from 1; it may ask rows again that earlier rounds have asked
    round_number: int = 1
    #: the text of the :class:`~airflow_provider_batchkit.schema.OutputSchema` that the requests ask for
    output_schema: str | None = None
    #: the database of the result table; None where it is the ledger's or not known
    results: Warehouse | None = None
    #: how results will be written to the table, where the task knows
    disposition: WriteDisposition | None = None
    #: whether requests without a key of their own are known by their position
    by_position: bool = False

    def table_in(self, ledger: Ledger) -> str | None:
        """The name by which the ledger knows the result table."""
        if self.table is None:
            return None
        if self.results is None:
            return ledger.table_name(self.table)
        with self.results.open() as connection:
            return self.results.known_as(connection, self.table)


def submit_job(
    attempt: Attempt,
    requests: Iterable[RequestBlock],
    options: SubmitOptions,
    *,
    only: Iterable[str] | None = None,
    before_send: Callable[[], None] = lambda: None,
) -> SubmitReport:
    """Submit those of ``requests`` that the job does not have in flight or landed.

    :param requests: built with the job's id; consumed once, to its end, before anything is sent
    :param only: keys of the rows to ask; None for all
    :param before_send: called once the source has been read and checked, before the first POST
    :raises RequestError: for bad input, a key that comes twice, or a request that the API would refuse; this attempt has sent nothing
    :raises CostLimitError: when the job may cost more than the limits allow; this attempt has sent nothing
    :raises SubmitRefusedError: when the API refused a shard; ``submitted`` lists the job's running batches
    :raises SubmitUncertainError: when it cannot be decided whether a shard was accepted; a retry, or a person, decides it
    :raises LeaseLostError: when a younger attempt has begun
    """
    ledger, job = attempt.ledger, attempt.job
    ledger.ensure()
    lease = ledger.open_job(job, attempt.attempt_id)
    sender = _Sender(attempt, lease, options)
    wait = sender.settle()
    if wait is not None:
        return SubmitReport(waits_for=wait, batch_ids=attempt.batch_ids())
    with scratch_folder() as folder:
        started = time.monotonic()
        try:
            writer, report = _write_new(attempt, requests, options, folder, only)
        except RequestError as e:
            e.submitted = attempt.batch_ids()
            raise
        shards = writer.close()
        rendering_s = time.monotonic() - started
        before_send()
        ledger.note_output_schema(job.job_id, lease, options.output_schema, sends=bool(shards))
        ledger.note_skipping(job.job_id, skips=options.skip_unchanged, asked=attempt.asked)
        ledger.add_copies(job.job_id, lease, writer.earlier_copies())
        if shards or report.unchanged:
            ledger.note_rendering(job.job_id, rendering_s, report.unchanged)
        if shards:
            spending = Spending(attempt.kit, ledger, job, lease, options.limits)
            try:
                report.estimate = spending.estimate(shards, check_shards(attempt.kit, shards, writer.samples))
                log.info("Estimate for %s", report.estimate)
                with spending.allowed(report.estimate):
                    report.waits_for = sender.send_all(shards, spending, report)
            except (CostLimitError, RequestError) as e:
                e.submitted = attempt.batch_ids()
                raise
    if report.waits_for is None:
        ledger.note_sent(job.job_id, lease, options.round_number)
    report.batch_ids = attempt.batch_ids()
    return report


def rehearse_job(
    attempt: Attempt, requests: Iterable[RequestBlock], options: SubmitOptions, *, only: Iterable[str] | None = None
) -> SubmitReport:
    """What :func:`submit_job` would send, with its estimate. It calls the API only to count the tokens of a sample, and journals nothing.

    :raises RequestError: for bad input, as a submit does
    """
    ledger, job = attempt.ledger, attempt.job
    with scratch_folder() as folder:
        writer, report = _write_new(attempt, requests, options, folder, only)
        shards = writer.close()
        report.batches = len(shards)
        report.estimate = estimate_shards(
            shards,
            check_shards(attempt.kit, shards, writer.samples),
            attempt.kit.price_book,
            datetime.now(UTC),
            output_per_request=ledger.output_per_request(job.dag_id, job.task_id) if ledger.exists() else None,
        )
    return report


def _write_new(
    attempt: Attempt, requests: Iterable[RequestBlock], options: SubmitOptions, folder: str, only: Iterable[str] | None
) -> tuple[ShardWriter, SubmitReport]:
    """Write the requests that the job has not asked yet into shards."""
    ledger, job = attempt.ledger, attempt.job
    exists = ledger.exists()
    writer = ShardWriter(
        folder,
        first_number=ledger.next_shard(job.job_id) if exists else 0,
        max_requests=options.max_requests,
        max_bytes=options.max_bytes,
        first_alone=options.priming is not None and not (exists and attempt.batch_ids()),
    )
    known = ledger.known(job.job_id, options.round_number) if exists else ()
    answered = ledger.answered(job, options.table_in(ledger)) if exists and options.skip_unchanged else ()
    counts = dedupe(requests, known, writer, folder, only=only, answered=answered, by_position=options.by_position)
    return writer, SubmitReport(**asdict(counts))


class _Sender:
    """Sends the shards of one attempt of a job."""

    def __init__(self, attempt: Attempt, lease: int, options: SubmitOptions) -> None:
        self._attempt = attempt
        self._kit = attempt.kit
        self._ledger = attempt.ledger
        self._job_id = attempt.job_id
        self._lease = lease
        self._options = options
        self._settler = Settler(attempt.kit, attempt.ledger, options.times, lease=lease, since=attempt.since, waited_for=attempt.waited_for)

    def settle(self) -> WaitFor | None:
        """Settle the rows in doubt; returns the wait that is needed before that is possible.

        :raises SubmitUncertainError: when it cannot be decided, or several POSTs of this attempt proved never to have been accepted
        """
        wait = self._settler.settle(self._job_id)
        void = self._ledger.count_void(self._job_id, self._attempt.since)
        if wait is None and void >= _DOUBTS:
            error = SubmitUncertainError(
                f"{void} POSTs of this attempt ended without an answer, and none of them was accepted. Nothing is billed for them. The "
                "network, or a gateway, does not take them: a retry of the task sends the rows again."
            )
            error.submitted = self._attempt.batch_ids()
            raise error
        return wait

    def send_all(self, shards: Iterable[Shard], spending: Spending, report: SubmitReport) -> WaitFor | None:
        """Send one shard after another, and count in the report the requests that were sent.

        :returns: the wait that is needed before the rest of the job can go on
        """
        priming, wait = self._options.priming, None
        for shard in shards:
            if priming is not None:
                wait = priming.wait(self._kit, self._ledger.batches(self._job_id))
            wait = wait or self.send(shard, spending)
            if wait is not None:
                return wait
            report.asked += shard.requests
        return None

    def send(self, shard: Shard, spending: Spending) -> WaitFor | None:
        """Send a shard until the API has it: in two halves after a 413, and again after a POST that proved never to have been accepted.

        :returns: the wait that is needed before the rest of the job can go on
        """
        waiting = deque([shard])
        while waiting:
            if self._attempt.stopped():
                raise LeaseLostError("The task was killed and cancel_on_kill is set: nothing more is sent.")
            # a failed shard keeps its number in the ledger, so each sending gets a new number
            piece = replace(waiting.popleft(), number=self._ledger.next_shard(self._job_id))
            self._intend(piece, spending)
            log.info("Sending shard %d: %s requests, %s bytes", piece.number, f"{piece.requests:,}", f"{piece.bytes:,}")
            again: list[Shard] = []
            try:
                self._note(piece, self._post(piece))
            except SubmitUncertainError as e:
                wait = self._give_up(piece, e)
                if wait is not None:
                    return wait
                if self._ledger.get(self._job_id, piece.number).state is BatchState.VOID:
                    again = [piece]
                else:
                    remove_shard_files(piece)
            except SubmitThrottledError as e:
                return self._pause(piece, e)
            except SubmitRefusedError as e:
                again = self._halves(piece, e)
            waiting.extendleft(reversed(again))
        return None

    def _intend(self, piece: Shard, spending: Spending) -> None:
        sent_by, caps = (self._attempt.anthropic_conn_id, self._kit.workspaces[0]), self._options.limits
        intent = Intent(*sent_by, spending.bound(piece), caps.budget, self._options.round_number)
        self._ledger.intend(self._job_id, self._lease, piece, intent)

    def _post(self, piece: Shard) -> BatchSnapshot:
        def fence() -> None:
            self._ledger.check_lease(self._job_id, self._lease)
            if self._attempt.stopped():
                raise LeaseLostError("The task was killed and cancel_on_kill is set: the POST under way was broken off.")

        try:
            return self._kit.send(piece, fence=fence, post_s=self._options.times.post_s, throttle_wait_s=PATIENCE_S)
        except LeaseLostError as e:
            # the body was not sent completely, and the API never accepts such a body
            with suppress(LedgerError):
                self._ledger.rejected(self._job_id, piece.number, str(e))
            raise

    def _halves(self, piece: Shard, error: SubmitRefusedError) -> list[Shard]:
        """The two halves to send in place of a shard that the API refused."""
        self._ledger.rejected(self._job_id, piece.number, str(error))
        if error.status != 413 or piece.requests == 1:
            error.submitted = self._attempt.batch_ids()
            raise error
        log.warning("%s Cutting it in two.", error)
        return split_shard(piece)

    def _note(self, piece: Shard, found: BatchSnapshot) -> None:
        try:
            self._ledger.submitted(self._job_id, piece.number, found)
        except LedgerError as e:
            e.add_note(
                f"The API accepted {found.batch_id} for it, which runs and is billed. {piece.requests:,} answers can be read with "
                f"BatchKit().retrieve({found.batch_id!r})."
            )
            raise
        if self._attempt.stopped():
            # the kill handler could not cancel this batch, because it did not know the id
            self._kit.cancel_all([found.batch_id])
        remove_shard_files(piece)
        log.info("Submitted %s with %s requests, %s bytes", found.batch_id, f"{piece.requests:,}", f"{piece.bytes:,}")

    def _give_up(self, piece: Shard, error: SubmitUncertainError) -> WaitFor | None:
        log.warning("%s", error)
        self._ledger.doubt(self._job_id, piece.number)
        return self.settle()

    def _pause(self, piece: Shard, error: SubmitThrottledError) -> WaitFor:
        """The wait, without a worker slot, for an API that refuses with "not now"."""
        self._ledger.rejected(self._job_id, piece.number, str(error))
        now = datetime.now(UTC)
        latest = self._attempt.since + _THROTTLED_AT_MOST
        until = now + timedelta(seconds=error.pause_s)
        if not error.pause_s or until > latest:
            error.submitted = self._attempt.batch_ids()
            raise error
        return WaitFor((), until, latest, str(error), about="throttle")


def failed_keys_of(
    ledger: Ledger, batch_ids: Iterable[str], *, dag_id: str, run_id: str, which: Wanted = WORTH_A_ROUND, gone: bool = False
) -> Iterator[str]:
    """Keys of the rows that failed in these batches in a way that is worth asking again.

    :param dag_id: DAG of the asking task, with ``run_id``: in its run an older version of the ledger may know a batch by another id
    :param which: the failures that are worth asking again
    :param gone: include all rows of batches that were deleted or archived before they landed
    :raises BatchInputError: for a batch that has not landed, or that the ledger does not have
    """
    ledger.ensure()
    records = [_asked_record(ledger, batch_id, dag_id, run_id, gone=gone) for batch_id in batch_ids]
    return chain.from_iterable(
        ledger.keys_of(r) if r.state is BatchState.GONE else ledger.failed_keys(r.job_id, which, r.shard) for r in records
    )


def _asked_record(ledger: Ledger, batch_id: str, dag_id: str, run_id: str, *, gone: bool) -> BatchRecord:
    record = ledger.row_of(batch_id, dag_id, run_id)
    if record is None:
        raise BatchInputError(
            f"The ledger does not know the batch {batch_id}, so it cannot tell which of its rows to ask again. It must be one that this "
            "provider submitted with the same ledger. Nothing was sent."
        )
    if record.state is BatchState.GONE and not gone:
        raise BatchInputError(
            f"The batch {batch_id} was deleted or archived before it landed ({record.note}). It may have been billed. Nothing was sent. "
            "With retry_gone=True all its rows are asked again, and billed again."
        )
    if record.state not in (BatchState.LANDED, BatchState.GONE):
        raise BatchInputError(
            f"The batch {batch_id} has not landed, so nobody knows which of its rows to ask again. Fetch it first. Nothing was sent."
        )
    return record

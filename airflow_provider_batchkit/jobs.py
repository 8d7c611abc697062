"""Journaled jobs. A submit: source items → requests → shards → ledger → API, in the order of writes that never pays twice.

1. the job's lease is taken; whatever an earlier attempt left as ``sending`` is settled;
2. the source is read to its end, rendered, checked and written to disk, so bad input costs nothing;
3. for each shard: its requests and its batch row are committed as ``sending``, then the POST, then the batch id.

An attempt after another skips every row that the ledger has in flight or landed: a row is known by its key.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from airflow_provider_batchkit.estimate import SAMPLES, Estimate, estimate_shards
from airflow_provider_batchkit.exceptions import (
    BatchInputError,
    BatchUnavailableError,
    CostLimitError,
    LedgerError,
    SubmitRefusedError,
    SubmitThrottledError,
    SubmitUncertainError,
    WrongBatchError,
)
from airflow_provider_batchkit.kit import BatchKit
from airflow_provider_batchkit.landing import LandingReport, WriteDisposition, land_batches
from airflow_provider_batchkit.ledger import BatchRecord, BatchState, JobRecord, Landed, Ledger
from airflow_provider_batchkit.ledger.account import note_rendering
from airflow_provider_batchkit.ledger.history import answered, output_per_request
from airflow_provider_batchkit.ledger.outputs import note_output_schema
from airflow_provider_batchkit.ledger.rounds import failed_keys, note_sent
from airflow_provider_batchkit.model import MAX_BYTES_PER_BATCH, MAX_REQUESTS_PER_BATCH, BatchSnapshot
from airflow_provider_batchkit.prepared import RequestBlock
from airflow_provider_batchkit.priming import Hold, Priming
from airflow_provider_batchkit.reconcile import SETTLE_S, Settler
from airflow_provider_batchkit.scratch import scratch_folder
from airflow_provider_batchkit.shards import Shard, ShardWriter, remove_shard_files, split_shard
from airflow_provider_batchkit.spending import NO_LIMITS, Limits, Spending
from airflow_provider_batchkit.spool import RowCounts, spool

log = logging.getLogger(__name__)

#: POSTs of one shard, in one attempt, whose end nobody saw and that proved never to have been accepted
_DOUBTS = 5
#: exchanges of wrongly adopted batches in one fetch
_EXCHANGES = 10


@dataclass(slots=True)
class SubmitReport(RowCounts):
    """What one attempt of a submit did, and all batches of its job."""

    #: of the whole job, in the order of its shards
    batch_ids: list[str] = field(default_factory=list)
    #: requests sent by this attempt
    asked: int = 0
    #: batches that a rehearsal would create
    batches: int = 0
    #: of what this attempt sends; None when it has nothing to send
    estimate: Estimate | None = None
    #: the primer that the rest of the job waits for: submit again when it has ended
    waits_for: Hold | None = None


def submit_job(
    kit: BatchKit,
    ledger: Ledger,
    job: JobRecord,
    requests: Iterable[RequestBlock],
    *,
    anthropic_conn_id: str,
    max_requests: int = MAX_REQUESTS_PER_BATCH,
    max_bytes: int = MAX_BYTES_PER_BATCH,
    skip_unchanged: bool = False,
    settle_seconds: float = SETTLE_S,
    before_send: Callable[[], None] = lambda: None,
    limits: Limits = NO_LIMITS,
    priming: Priming | None = None,
    round_number: int = 1,
    only: Iterable[str] | None = None,
    output_schema: str | None = None,
) -> SubmitReport:
    """Submit whatever of ``requests`` the job has not in flight or landed.

    :param requests: built with the job's id; consumed once, to its end, before anything is sent
    :param skip_unchanged: leave rows out whose request has succeeded in another run of the task
    :param round_number: from 1; what the rounds before it asked may be asked again in it, where ``only`` says so
    :param only: keys of the rows to ask; None for all
    :param settle_seconds: how long a shard that an earlier attempt may have sent is looked for before it counts as never accepted
    :param before_send: called once the source has been read and found good, before the first POST
    :param limits: what the job may cost
    :param priming: send the job's first request alone; the rest is not sent before it has ended (``waits_for`` in the report)
    :param output_schema: the text of the :class:`~airflow_provider_batchkit.schema.OutputSchema` that ``requests`` ask for
    :raises RequestError: bad input, a key that comes twice; nothing was sent by this attempt
    :raises CostLimitError: it may cost more than ``limits`` allow; nothing was sent by this attempt
    :raises SubmitRefusedError: the API refused a shard; ``submitted`` lists the job's batches that run
    :raises SubmitUncertainError: the next attempt settles it
    :raises LeaseLostError: a newer attempt has begun
    """
    ledger.ensure()
    lease = ledger.open_job(job)
    settler = Settler(kit, ledger, settle_seconds=settle_seconds, fence=lambda: ledger.check_lease(job.job_id, lease))
    settler.settle(job.job_id)
    report = SubmitReport()
    with scratch_folder() as folder:
        first_new = ledger.next_shard(job.job_id)
        first_alone = priming is not None and not running_ids(ledger, job.job_id)
        writer = ShardWriter(folder, first_number=first_new, max_requests=max_requests, max_bytes=max_bytes, first_alone=first_alone)
        started = time.monotonic()
        history = answered(ledger.engine, job) if skip_unchanged else ()
        spool(requests, ledger.known(job.job_id, round_number), writer, folder, report, only=only, answered=history)
        shards = writer.close()
        rendering_s = time.monotonic() - started
        before_send()
        note_output_schema(ledger.engine, job.job_id, lease, output_schema, sends=bool(shards))
        spending = Spending(kit, ledger, job, lease, limits)
        ledger.add_copies(job.job_id, lease, writer.earlier_copies())
        if shards or report.unchanged:
            note_rendering(ledger.engine, job.job_id, rendering_s, report.unchanged)
        if shards:
            report.estimate = spending.estimate(shards, writer.samples(SAMPLES))
            log.info("Estimate for %s", report.estimate)
            try:
                with spending.allowed(report.estimate):
                    for shard in shards:
                        if priming is not None:
                            report.waits_for = priming.hold(kit, ledger.batches(job.job_id))
                        if report.waits_for is not None:
                            break
                        _send(kit, ledger, settler, job, lease, shard, anthropic_conn_id, spending, round_number)
                        report.asked += shard.requests
            except CostLimitError as e:
                e.submitted = running_ids(ledger, job.job_id)
                raise
    doubtful = [b for b in ledger.batches(job.job_id) if b.state is BatchState.SENDING]
    if doubtful:
        raise SubmitUncertainError(
            f"{len(doubtful)} shards of job {job.job_id} had taken batches for their own that proved to be other jobs'. The next attempt "
            "looks for their own, and sends them if they were never accepted."
        )
    if report.waits_for is None:
        note_sent(ledger.engine, job.job_id, lease, round_number)
    report.batch_ids = running_ids(ledger, job.job_id)
    return report


def rehearse_job(
    kit: BatchKit,
    ledger: Ledger,
    job: JobRecord,
    requests: Iterable[RequestBlock],
    *,
    max_requests: int = MAX_REQUESTS_PER_BATCH,
    max_bytes: int = MAX_BYTES_PER_BATCH,
    skip_unchanged: bool = False,
    priming: Priming | None = None,
    only: Iterable[str] | None = None,
) -> SubmitReport:
    """What :func:`submit_job` would send, with its estimate. Sends nothing but the token counts of a sample, and journals nothing.

    :raises RequestError: bad input, as a submit raises it
    """
    report = SubmitReport()
    exists = ledger.exists()
    with scratch_folder() as folder:
        first_new = ledger.next_shard(job.job_id) if exists else 0
        first_alone = priming is not None and not (exists and running_ids(ledger, job.job_id))
        writer = ShardWriter(folder, first_number=first_new, max_requests=max_requests, max_bytes=max_bytes, first_alone=first_alone)
        known = ledger.known(job.job_id) if exists else ()
        history = answered(ledger.engine, job) if exists and skip_unchanged else ()
        spool(requests, known, writer, folder, report, only=only, answered=history)
        shards = writer.close()
        report.batches = len(shards)
        report.estimate = estimate_shards(
            shards,
            writer.samples(SAMPLES),
            kit.price_book,
            datetime.now(UTC),
            count_tokens=kit.count_tokens,
            output_per_request=output_per_request(ledger.engine, job.dag_id, job.task_id) if exists else None,
        )
    return report


def running_ids(ledger: Ledger, job_id: str) -> list[str]:
    """Ids of the job's batches that run or have landed, by shard."""
    return [b.batch_id for b in ledger.batches(job_id) if b.batch_id and b.state in (BatchState.SUBMITTED, BatchState.LANDED)]


def _send(
    kit: BatchKit,
    ledger: Ledger,
    settler: Settler,
    job: JobRecord,
    lease: int,
    shard: Shard,
    anthropic_conn_id: str,
    spending: Spending,
    round_number: int,
) -> None:
    """Send a shard until the API has it: in two halves after a 413, and again after a POST that proved never to have been accepted."""
    waiting = deque([shard])
    doubts = 0
    while waiting:
        # shards that failed keep their numbers in the ledger
        piece = replace(waiting.popleft(), number=ledger.next_shard(job.job_id))
        ledger.intend(job.job_id, lease, piece, anthropic_conn_id, spending.bound(piece), spending.budget, round_number)
        try:
            found = kit.send(piece, fence=lambda: ledger.check_lease(job.job_id, lease), answer_timeout_s=settler.answer_timeout_s)
        except SubmitUncertainError as e:
            log.warning("%s", e)
            doubts += 1
            settler.settle(job.job_id)
            if ledger.get(job.job_id, piece.number).state is not BatchState.VOID:
                remove_shard_files(piece)
            elif doubts < _DOUBTS:
                waiting.appendleft(piece)
            else:
                e.submitted = running_ids(ledger, job.job_id)
                raise
        except (SubmitRefusedError, SubmitThrottledError) as e:
            ledger.rejected(job.job_id, piece.number, str(e))
            if isinstance(e, SubmitRefusedError) and e.status == 413 and piece.requests > 1:
                log.warning("%s Cutting it in two.", e)
                waiting.extendleft(reversed(split_shard(piece)))
                continue
            e.submitted = running_ids(ledger, job.job_id)
            raise
        else:
            try:
                ledger.submitted(job.job_id, piece.number, found)
            except LedgerError as e:
                e.add_note(f"The API accepted {found.batch_id} for it, which runs and is billed; fetch it by its id to keep its answers.")
                raise
            remove_shard_files(piece)
            log.info("Submitted %s with %s requests, %s bytes", found.batch_id, f"{piece.requests:,}", f"{piece.bytes:,}")


def fetch_job(
    kit: BatchKit,
    ledger: Ledger,
    batch_ids: Sequence[str],
    table: str,
    *,
    dag_id: str,
    run_id: str,
    settle_seconds: float = SETTLE_S,
    **options: Any,
) -> LandingReport:
    """Land batches; a batch that an attempt adopted wrongly is exchanged for the job's own first.

    :param dag_id: of the fetching task, with ``run_id``: tells whose batch is meant after an exchange
    :param options: see :func:`~airflow_provider_batchkit.landing.land_batches`
    :raises WrongBatchError: an adopted batch is another job's, and the job's own was never accepted
    """
    ledger.ensure()
    settler = Settler(kit, ledger, settle_seconds=settle_seconds)
    for _ in range(_EXCHANGES):
        ids = [_current_id(ledger, settler, batch_id, dag_id, run_id) for batch_id in batch_ids]
        snapshots, gone = _readable(kit, ledger, ids, table, may_recall=options.get("disposition") is not WriteDisposition.REPLACE)
        try:
            report = land_batches(ledger, snapshots, table, kit.read_blocks, kit.price_book, **options)
        except WrongBatchError as e:
            log.warning("%s", e)
            record = ledger.find(e.batch_id)
            assert record is not None, "only a journaled batch can be another job's"
            fresh = ledger.disown(record, kit.get(e.batch_id), e.custom_id)
            # this row alone: others of the job may be a living submit's
            settler.settle_shard(fresh)
        else:
            for landed in gone:
                log.info("%s has landed in %s before, and its results are gone; nothing is written for it", landed.batch_id, table)
                report.recall(landed)
            return report
    raise LedgerError(f"The batches {', '.join(batch_ids)} could not be told apart. Nothing was written; run the task again.")


def _readable(
    kit: BatchKit, ledger: Ledger, batch_ids: Iterable[str], table: str, *, may_recall: bool
) -> tuple[list[BatchSnapshot], list[Landed]]:
    """Batches whose results can be read, and those that are gone but have landed in the table before."""
    snapshots: list[BatchSnapshot] = []
    gone: list[Landed] = []
    for batch_id in batch_ids:
        landed = ledger.landed_in(batch_id, table) if may_recall else None
        try:
            found = kit.get(batch_id)
        except BatchUnavailableError:
            if landed is None:
                raise
            gone.append(landed)
        else:
            if landed is not None and found.archived_at is not None:
                gone.append(landed)
            else:
                snapshots.append(found)
    return snapshots, gone


def _current_id(ledger: Ledger, settler: Settler, batch_id: str, dag_id: str, run_id: str) -> str:
    """The id that stands for ``batch_id`` in this run's jobs, after any exchange."""
    seen = set()
    while batch_id not in seen:
        seen.add(batch_id)
        record = ledger.replacement(batch_id, dag_id, run_id)
        if record is None:
            return batch_id
        if record.state is BatchState.SENDING:
            settler.settle_shard(record)
            record = ledger.get(record.job_id, record.shard)
        if record.batch_id is None:
            raise BatchUnavailableError(
                f"{batch_id} was taken for {record} while it ran, and is another job's; it was given to that job. The rows of this one "
                "were never accepted, and nothing was billed for them. Clear the submit task: it sends them and nothing else."
            )
        batch_id = record.batch_id
    return batch_id


def failed_keys_of(ledger: Ledger, batch_ids: Iterable[str], *, dag_id: str, run_id: str, invalid_output: bool = False) -> Iterator[str]:
    """Keys of the rows that failed in these batches in a way that is worth asking again.

    :param dag_id: of the asking task, with ``run_id``: tells whose batch is meant when one was exchanged
    :param invalid_output: count answers that do not fit the schema among them
    :raises BatchInputError: for a batch that has not landed, or that the ledger does not have
    """
    ledger.ensure()
    landed = [_landed_record(ledger, batch_id, dag_id, run_id) for batch_id in batch_ids]
    return chain.from_iterable(failed_keys(ledger.engine, r.job_id, r.shard, invalid_output=invalid_output) for r in landed)


def _landed_record(ledger: Ledger, batch_id: str, dag_id: str, run_id: str) -> BatchRecord:
    record, current, seen = ledger.find(batch_id), batch_id, set()
    while current not in seen and (follower := ledger.replacement(current, dag_id, run_id)) is not None:
        seen.add(current)
        record, current = follower, follower.batch_id or ""
    if record is None:
        raise BatchInputError(
            f"The ledger does not know the batch {batch_id}, so it cannot tell which of its rows to ask again. It must be one that this "
            "provider submitted with the same sql_conn_id. Nothing was sent."
        )
    if record.state is not BatchState.LANDED:
        raise BatchInputError(
            f"The batch {batch_id} has not landed, so nobody knows which of its rows to ask again. Fetch it first. Nothing was sent."
        )
    return record

"""One resumable step of a task: it does what can be done now, and returns a :class:`WaitFor` for the rest.

Only the ledger records how far a job has come. A step may be called again at any time: after a wait, however it ended, by a retry, or when
the task was cleared. A step that can only wait holds its worker for a minute at most.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Protocol

from airflow_provider_batchkit.cost.budget import Budget
from airflow_provider_batchkit.exceptions import BatchKitError, BudgetExceededError
from airflow_provider_batchkit.jobs.rounds import Round
from airflow_provider_batchkit.jobs.submit import Attempt, SubmitOptions, SubmitReport, failed_keys_of, rehearse_job, submit_job
from airflow_provider_batchkit.jobs.waiting import Done, WaitFor
from airflow_provider_batchkit.landing import BatchFigures, LandingReport, WriteDisposition, check_table
from airflow_provider_batchkit.ledger import BatchRecord, BatchState, Ledger
from airflow_provider_batchkit.ledger.reasons import WORTH_A_ROUND, Wanted
from airflow_provider_batchkit.progress import counts_text
from airflow_provider_batchkit.request.build import RequestBuilder
from airflow_provider_batchkit.request.failures import Reason
from airflow_provider_batchkit.schema import OutputSchema
from airflow_provider_batchkit.source.files import FileRows
from airflow_provider_batchkit.source.rows import Items
from airflow_provider_batchkit.source.types import KeyTypes

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Callbacks of a step. Each is called as soon as its part is done, since a later part of the step may fail."""

    # called when requests were sent, now or by an earlier attempt
    def asked(self, report: SubmitReport) -> None: ...

    # called with the batches of the job that run or have landed
    def running(self, batch_ids: Sequence[str]) -> None: ...

    # called with batches that have landed for the first time
    def landed(self, batches: Iterable[BatchFigures]) -> None: ...

    # called when a submit that began at ``began`` has reserved from a budget with alerts, or the budget refused it; an earlier submit may
    # have died before this call
    def budgeted(self, ledger: Ledger, budget: Budget, began: datetime, refused: BudgetExceededError | None) -> None: ...


@dataclass(frozen=True, slots=True)
class Asking:
    """The rows and requests of a job, and how they are built."""

    options: SubmitOptions
    #: columns that identify a row
    key: Sequence[str]
    #: opens the source, which every round reads anew
    open_source: Callable[[], Iterable[Any] | Items]
    #: builds the requests of a round
    builder: Callable[[Round], RequestBuilder]
    #: ids of landed batches: the first round asks only the rows that failed in them
    only_failed_of: Sequence[str] | None = None
    rounds: Sequence[Round] = (Round(),)
    #: the failed rows that a round without outcomes of its own asks again
    which: Wanted = WORTH_A_ROUND
    #: whether to ask again the rows of batches that were deleted or archived before they landed
    retry_gone: bool = False

    def round(self, number: int) -> Round:
        """The round with this number. A round beyond the last replaces one that the account has stopped, and asks as the first does."""
        return self.rounds[number - 1] if number <= len(self.rounds) else self.rounds[0]

    def wanted(self, number: int) -> Wanted:
        """The failed rows that the later round with this number asks."""
        if number > len(self.rounds):
            return replace(self.which, reasons={Reason.ACCOUNT})
        return replace(self.which, outcomes=self.rounds[number - 1].ask)


def ask(
    attempt: Attempt, asking: Asking, listener: Listener, round_number: int = 1, *, rehearse: bool = False
) -> Done[SubmitReport] | WaitFor:
    """Send what a round of the job has not sent yet, or find out what it would send: one step of a task."""
    only = _only(attempt, asking, round_number)
    types, source = KeyTypes(asking.key), asking.open_source()
    requests = asking.builder(asking.round(round_number)).pieces(source, types.see)
    options = replace(asking.options, round_number=round_number)
    with (
        source.naming_places() if isinstance(source, FileRows) else nullcontext(),
        closing(source) if isinstance(source, Items) else nullcontext(),
    ):
        if rehearse:
            return Done(rehearse_job(attempt, requests, options, only=only))
        with _budget_heard(attempt, options.limits.budget, listener):
            report = submit_job(attempt, requests, options, only=only, before_send=lambda: _note_key(attempt, options, types))
    if report.batch_ids and (report.waits_for is None or report.rows):
        # without a read source there is only the wait to report
        listener.asked(report)
        log.info("%s", report)
    return report.waits_for or Done(report)


@contextmanager
def _budget_heard(attempt: Attempt, budget: Budget | None, listener: Listener) -> Iterator[None]:
    """Call the listener's ``budgeted`` after the submit, however it ended: the budget also counts what was sent before a refusal."""
    if budget is None or not budget.alert_at:
        yield
        return
    began = datetime.now(UTC)
    try:
        yield
    except BatchKitError as e:
        if not attempt.stopped():
            listener.budgeted(attempt.ledger, budget, began, e if isinstance(e, BudgetExceededError) else None)
        raise
    listener.budgeted(attempt.ledger, budget, began, None)


def _only(attempt: Attempt, asking: Asking, round_number: int) -> Iterable[str] | None:
    """Keys of the rows that a round asks; None for all."""
    ledger, job = attempt.ledger, attempt.job
    if round_number > 1:
        gone = gone_batches(ledger, job.job_id) if asking.retry_gone else []
        return chain(ledger.failed_keys(job.job_id, asking.wanted(round_number)), *map(ledger.unasked, gone))
    if asking.only_failed_of is None:
        return None
    batch_ids, which = asking.only_failed_of, asking.which
    return failed_keys_of(ledger, batch_ids, dag_id=job.dag_id, run_id=job.run_id, which=which, gone=asking.retry_gone)


def gone_batches(ledger: Ledger, job_id: str) -> list[BatchRecord]:
    """The batches that are gone and have rows that no later round has asked."""
    return [b for b in ledger.batches(job_id) if b.state is BatchState.GONE and any(True for _ in ledger.unasked(b))]


def _note_key(attempt: Attempt, options: SubmitOptions, types: KeyTypes) -> None:
    """Journal the key's columns and types for the result table, and refuse now what no table could hold later."""
    if types.rows_seen:
        ledger, job_id, schema = attempt.ledger, attempt.job_id, options.output_schema
        columns = types.result(ledger.key_columns(job_id))
        parsed = None if schema is None else OutputSchema(schema)
        check_table(ledger, options.table, columns, parsed, options.results, types.widest, options.disposition)
        ledger.set_key_columns(job_id, columns, types.characters)


@dataclass(frozen=True, slots=True)
class Landing:
    """The place where a task's batches land, and the way in which they are written."""

    table: str
    disposition: WriteDisposition
    #: :func:`~airflow_provider_batchkit.jobs.fetch.fetch_job` with the task's options
    fetch: Callable[[Sequence[str], WriteDisposition], LandingReport]
    listener: Listener

    def land(self, batch_ids: Sequence[str], disposition: WriteDisposition | None = None) -> Done[LandingReport] | WaitFor:
        """Land batches: one step of a task. ``disposition`` replaces the task's own."""
        try:
            report = self.fetch(batch_ids, disposition or self.disposition)
        except BatchKitError as e:
            self.listener.landed(e.landed)
            wait: WaitFor | None = e.wait
            if wait is None or wait.latest < datetime.now(UTC):
                raise
            log.warning("%s", e)
            return wait
        self.listener.landed(report.first)
        log.info("Landed %s rows in %s; outcomes: %s", f"{report.rows:,}", self.table, counts_text(report.counts))
        return Done(report)

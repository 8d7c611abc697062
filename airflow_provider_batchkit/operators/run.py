"""Run: submit, wait and land in one deferrable task, in rounds that ask again what failed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.api.polling import Ended, GaveUp, PollState, validate_event
from airflow_provider_batchkit.exceptions import (
    BatchGoneError,
    BatchInputError,
    BatchNotEndedError,
    BatchVanishedError,
    BatchWaitTimeout,
    CostLimitError,
    PollError,
    ReplaceRefusedError,
)
from airflow_provider_batchkit.hooks.ledger import ledger_of
from airflow_provider_batchkit.jobs.rounds import Round, parse_rounds
from airflow_provider_batchkit.links import push_console_link
from airflow_provider_batchkit.model import ANSWERED
from airflow_provider_batchkit.operators.fetch import LandingOperator, refuse_replace
from airflow_provider_batchkit.operators.metrics import count_landed
from airflow_provider_batchkit.operators.publish import publish_summary
from airflow_provider_batchkit.operators.submit import SubmitBatchOperator
from airflow_provider_batchkit.operators.tasks import Leg, attempt_began, batchkit_errors, wait_for, waited
from airflow_provider_batchkit.request.failures import ADVICE, Reason
from airflow_provider_batchkit.request.system import system_problem_of_task

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_batchkit.ledger import BatchRecord, Ledger
    from airflow_provider_batchkit.ledger.rounds import Outcome

#: how much later than the trigger's own deadline Airflow ends a deferral that never came back
_GRACE_S = 300.0
_WEEK_S = 7 * 24 * 3600.0


class RunBatchOperator(SubmitBatchOperator, LandingOperator):
    """Ask Claude about every row of a source and write the answers to a table; what failed is asked again. Returns a summary.

    One task in place of submit, wait and fetch. It takes the parameters of :class:`SubmitBatchOperator` and those of
    :class:`FetchBatchOperator` but ``batch_id``, and waits in the triggerer, without a worker slot.

    A round's answers land as soon as its batches have ended. The next round asks again only rows that failed for a passing reason:
    expired, canceled, overloaded, rate limited, timed out, API errors, a download that failed; never what the API refused, nor a row whose
    result line is missing (its answer may be billed: clear the task to read the results again). Where the account is the reason (credit, a
    usage limit, a disabled organization) the task stops asking and says so: clear it when that is mended.

    Rows that the source has gained meanwhile wait for the next DAG
    run. Rows of a batch that was deleted or archived before it landed are asked again with ``retry_gone``. Where the task stands is in the
    ledger: a retry or a cleared task goes on from there, and pays for nothing twice. When ``max_cost_usd`` or the ``budget`` has no room
    for another round, the task ends with the answers it has.

    The summary holds what fetch's does, over all rounds: ``counts`` are rows by their last outcome, ``cost_tally`` is what all rounds
    cost, ``rounds`` says what each asked and got, ``failed`` which rows have no answer and why, ``stopped`` why no further round was
    asked. The batch ids are pushed under ``batch_ids``, too, and the first under ``batch_id``.

    :param max_rounds: how often a row may be asked, from 1
    :param rounds: in place of ``max_rounds``, a list of :class:`~airflow_provider_batchkit.Round`. The first asks every row; each later one
        says which outcomes it asks again and what it changes: ``[Round(), Round(ask=["truncated"], max_tokens=800)]``. A row keeps its
        best outcome: finished, truncated, invalid_output, paused, refused, errored, canceled, expired, missing; of equals the latest
    :param retry_invalid_output: also ask again for answers that do not fit the schema; each of them is billed
    :param poke_interval: seconds between looks at running batches
    :param timeout: seconds that a round's batches are waited for; then the task fails, the batches go on, and a retry waits again
    :param cancel_on_kill: cancel the running batches when the task is killed, also while it waits. Off by default: clearing a task counts
        as killing it on Airflow 3.3, and paid work must survive that
    """

    def __init__(
        self,
        *,
        table: str,
        max_rounds: int = 1,
        rounds: Sequence[Round] | None = None,
        poke_interval: float = 60.0,
        timeout: float = _WEEK_S,
        **kwargs: Any,
    ) -> None:
        super().__init__(table=table, **kwargs)
        try:
            self.rounds = parse_rounds(rounds, max_rounds, retry_invalid_output=self.retry_invalid_output)
        except BatchInputError as e:
            raise BatchInputError(f"Task {self.task_id}: {e}") from None
        for number, one in enumerate(self.rounds, start=1):
            problem = system_problem_of_task(
                None if "system" in one.params else self.system,
                prompt=self.prompt,
                params={**self.request_params, **one.params},
                cache_system=self.cache_system,
            )
            if problem:
                raise BatchInputError(f"Task {self.task_id}: round {number}: {problem}.")
        self.poke_interval = poke_interval
        self.timeout = timeout
        self._stopped: str | None = None
        #: what had landed before this leg
        self._landed_before: set[int] = set()
        if poke_interval <= 0 or timeout <= 0:
            raise BatchInputError(f"Task {self.task_id}: poke_interval and timeout are seconds above 0.")
        if self.skip_unchanged:
            refuse_replace(f"Task {self.task_id}", self.write_disposition)

    def execute(self, context: Context) -> Any:
        self._refuse_mapped_replace(context)
        self._leg = Leg.first()
        with batchkit_errors():
            if self.is_dry_run:
                return self._nothing_to_ask(self._ask(context))
            with self._opened(context) as job:
                self._land_again(context, job)
                return self._advance(context, job)

    def execute_complete(self, context: Context, event: Any = None) -> Any:
        """The trigger has ended: with every batch, with a time-out, or because looking kept failing."""
        self._leg = Leg.first()
        with batchkit_errors():
            known = validate_event(event)
            if known["status"] == "timeout":
                raise BatchWaitTimeout(str(known["message"]))
            if known["status"] == "error":
                raise PollError(str(known["message"]))
        return self._go_on(context)

    def _go_on(self, context: Context) -> Any:
        with batchkit_errors(), self._opened(context) as job:
            if self._leg.about == "unseen":
                # it may have waited for one of these
                self._land_again(context, job)
            return self._advance(context, job)

    def _land_again(self, context: Context, job: _Job) -> None:
        """What earlier attempts have landed: the table may be another one now, or empty, and a batch that was gone may be back."""
        from airflow_provider_batchkit.ledger import BatchState

        batches = job.batches()
        for state in (BatchState.LANDED, BatchState.GONE):
            before = [b for b in batches if b.state is state]
            if before:
                self._land(context, job, before)

    @contextmanager
    def _opened(self, context: Context) -> Iterator[_Job]:
        with ledger_of(self, context) as ledger:
            ledger.ensure()
            job = _Job(ledger, self._identify(context, ledger).job_id)
            self._landed_before = job.landed()
            yield job

    def _advance(self, context: Context, job: _Job) -> Any:
        """Go on from where the ledger says that the job is, until it waits or is done."""
        from airflow_provider_batchkit.ledger import BatchState

        while True:
            round_number = self._round_to_ask(job, attempt_began(context["ti"]))
            if round_number is not None:
                self._ask_round(context, round_number)
            waited(context, self._leg)
            batches = job.batches()
            running = [b for b in batches if b.state is BatchState.SUBMITTED]
            if not running:
                return self._finish(context, job)
            self._tell(context, [str(b.batch_id) for b in batches if b.state in (BatchState.SUBMITTED, BatchState.LANDED)])
            self._land(context, job, self._wait(job, running))

    # --- asking -------------------------------------------------------------------------------------------------------------------

    def _round_to_ask(self, job: _Job, began: datetime) -> int | None:
        """The round that is to be begun now, or that an earlier attempt has not sent whole; None when there is none."""
        from airflow_provider_batchkit.ledger import BatchState, rounds

        if self._stopped is not None:
            return None
        batches = job.batches()
        begun = max((b.round for b in batches), default=0)
        sent = rounds.sent(job.ledger.engine, job.job_id)
        if begun == 0 or begun > sent or any(b.state is BatchState.SENDING for b in batches):
            return max(begun, 1)
        if any(b.state is BatchState.SUBMITTED for b in batches):
            return None
        # a failure that was there when the attempt began is what somebody has mended since
        fresh = [b.shard for b in batches if b.shard not in self._landed_before or (b.ended_at is not None and b.ended_at >= began)]
        words = rounds.stopped_by_account(job.ledger.engine, job.job_id, fresh, self._failures)
        if words is not None:
            self._stopped = f"{words} Nothing more is asked by this attempt, since {ADVICE[Reason.ACCOUNT]}: it asks these rows again."
            self.log.warning("%s", self._stopped)
            return None
        left = range(begun + 1, len(self.rounds) + 1)
        torn = rounds.torn(job.ledger.engine, job.job_id) if left else []
        if torn:
            self._stopped = (
                f"The results of {', '.join(torn)} lack lines, and what they lack may be there and billed. Nothing more is asked before "
                "they are whole: clear the task to read them again, which costs nothing."
            )
            self.log.warning("%s", self._stopped)
            return None
        if left and self.retry_gone and job.gone():
            return begun + 1
        number = next((number for number in left if self._count(job, self.rounds[number - 1])), None)
        if number is None and rounds.count_failed(job.ledger.engine, job.job_id, reasons={Reason.ACCOUNT}, failures=self._failures):
            # a round that the account has stopped does not count
            return begun + 1
        return number

    def _count(self, job: _Job, asking: Round) -> int:
        """How many rows a later round would ask again."""
        from airflow_provider_batchkit.ledger import rounds

        if asking.ask is not None:
            return rounds.count_with(job.ledger.engine, job.job_id, asking.ask)
        return rounds.count_failed(job.ledger.engine, job.job_id, reasons=self._worth_asking, failures=self._failures)

    def _asking(self, round_number: int) -> Round:
        # beyond the last round it is the first that is made up for
        return self.rounds[round_number - 1] if round_number <= len(self.rounds) else self.rounds[0]

    def _ask_round(self, context: Context, round_number: int) -> None:
        """A later round that the caps have no room for ends the asking, not the task: what landed is paid for."""
        try:
            report = self._ask(context, round_number)
        except CostLimitError as e:
            if round_number == 1:
                raise
            self._stopped = str(e)
        else:
            if report.waits_for is not None:
                wait_for(self, context, report.waits_for, self._leg, asked=report.asked)
            elif round_number == 1 and not report.batch_ids:
                self._nothing_to_ask(report)
                self._stopped = "There was nothing to ask."
            elif not report.asked and not report.known:
                self._stopped = "The source has none of the failed rows any more."
        if self._stopped is not None:
            self.log.warning("Nothing was asked in round %d: %s", round_number, self._stopped)

    def _only(self, context: Context, ledger: Ledger, job_id: str, round_number: int) -> Iterable[str] | None:
        from airflow_provider_batchkit.ledger.rounds import failed_keys, keys_with

        if round_number == 1:
            return super()._only(context, ledger, job_id, round_number)
        ask = self._asking(round_number).ask
        if ask is None:
            reasons = self._worth_asking if round_number <= len(self.rounds) else {Reason.ACCOUNT}
            failed = failed_keys(ledger.engine, job_id, reasons=reasons, failures=self._failures)
        else:
            failed = keys_with(ledger.engine, job_id, ask)
        gone = _Job(ledger, job_id).gone() if self.retry_gone else []
        return chain(failed, *(ledger.unasked(b) for b in gone))

    # --- waiting and landing ------------------------------------------------------------------------------------------------------

    def _wait(self, job: _Job, running: Sequence[BatchRecord]) -> Sequence[BatchRecord]:
        """All of the batches when they have ended, or those that are not visible, which the landing waits for; else defer."""
        hidden, open_ids = [], []
        for record in running:
            state = PollState([str(record.batch_id)], interval=self.poke_interval)
            self.hook.kit.look(state)
            if state.seen:
                job.ledger.note_unseen(record, None)
            decision = state.decide(time.monotonic())
            if isinstance(decision, GaveUp) or state.hidden():
                hidden.append(record)
            elif not isinstance(decision, Ended):
                open_ids.append(str(record.batch_id))
        if hidden or not open_ids:
            return hidden or running
        from airflow_provider_batchkit.triggers.batch import BatchTrigger

        self.defer(
            trigger=BatchTrigger(
                batch_ids=[str(record.batch_id) for record in running],
                anthropic_conn_id=self.anthropic_conn_id,
                poke_interval=float(self.poke_interval),
                deadline=time.time() + self.timeout,
                cancel_on_kill=self.cancel_on_kill,
            ),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout + _GRACE_S),
        )
        raise AssertionError("defer raises")

    def _land(self, context: Context, job: _Job, batches: Sequence[BatchRecord]) -> None:
        disposition = self.write_disposition
        if disposition == "replace" and not job.replaces(batches):
            # the job's first answers have replaced the old rows, and the later ones come beside them
            disposition = "merge"
        ids = [str(b.batch_id) for b in batches]
        try:
            report = self._fetch(context, job.ledger, ids, disposition)
        except ReplaceRefusedError as e:
            if e.torn:
                raise
            # nothing was answered: the outcomes are noted, the old rows stay, and a further round may have answers to put in their place
            self.log.warning("%s", e)
            report = self._fetch(context, job.ledger, ids, "merge")
        except BatchGoneError as e:
            if self.write_disposition == "replace" and not self.retry_gone:
                raise
            # said again at the end, unless a further round asks its rows
            self.log.warning("%s", e)
            return
        except BatchNotEndedError:
            # it was not visible a moment ago, and runs
            return
        count_landed(context["ti"], report.first)
        self.log.info("Landed %s rows in %s; outcomes: %s", f"{report.rows:,}", self.table, dict(report.counts))

    def _finish(self, context: Context, job: _Job) -> dict[str, Any]:
        from airflow_provider_batchkit.cost.tally import format_tally
        from airflow_provider_batchkit.jobs.fetch import VANISHED
        from airflow_provider_batchkit.ledger import rounds
        from airflow_provider_batchkit.request.failed import failed_text

        found = rounds.outcome(job.ledger.engine, job.job_id, reasons=self._worth_asking, failures=self._failures)
        self._tell(context, found.batch_ids)
        for round_ in found.rounds:
            self.log.info("Round %(round)d: %(rows)d rows in %(requests)d requests; outcomes: %(counts)s", round_)
        why = failed_text(found.kinds, found.counts.total())
        if why:
            self.log.warning("%s", why)
        self.log.info("Cost of %s:\n%s", ", ".join(found.batch_ids) or "no batches", format_tally(found.tally))
        summary = self._summary(found)
        publish_summary(self, context, summary, ())
        self._delete(job.ledger, found.batch_ids, found.complete_ids)
        gone = job.gone()
        if gone:
            vanished = any((b.note or "").startswith(VANISHED) for b in gone)
            raise (BatchVanishedError if vanished else BatchGoneError)(
                f"{len(gone)} batches are gone before they landed, with {sum(b.requests for b in gone):,} requests: "
                f"{'; '.join(f'{b.batch_id} was {b.note}' for b in gone)}. They may have been billed. What landed is in {self.table}. With "
                "retry_gone=True and a further round (max_rounds) their rows are asked again, and billed again."
            )
        if self.write_disposition == "replace" and found.batch_ids and not any(found.counts[status.value] for status in ANSWERED):
            raise ReplaceRefusedError(
                f"None of {found.counts.total():,} rows has an answer, so the old rows of {self.table} stay: {dict(found.counts)}."
            )
        self._check_error_rate(found.counts)
        return summary

    def _summary(self, found: Outcome) -> dict[str, Any]:
        answered = sum(found.counts[status.value] for status in ANSWERED)
        return {
            "batch_ids": found.batch_ids,
            "table": self.table,
            "rows": found.counts.total() if self.include_failed else answered,
            "counts": dict(sorted(found.counts.items())),
            "unfinished": dict(sorted(found.unfinished.items())),
            "cost_tally": found.tally.to_json(),
            "latency_s": found.latency_s,
            "rounds": found.rounds,
            "failed": [asdict(failed) for failed in found.failed],
            "stopped": self._stopped,
        }

    @staticmethod
    def _tell(context: Context, batch_ids: list[str]) -> None:
        """Where the batches are seen from outside, also while the task waits."""
        push_console_link(context, batch_ids)
        context["ti"].xcom_push(key="batch_ids", value=batch_ids)
        if batch_ids:
            context["ti"].xcom_push(key="batch_id", value=batch_ids[0])


@dataclass(frozen=True, slots=True)
class _Job:
    """The task's job in the ledger."""

    ledger: Ledger
    job_id: str

    def batches(self) -> list[BatchRecord]:
        return self.ledger.batches(self.job_id)

    def landed(self) -> set[int]:
        """Shards of the batches that have landed."""
        from airflow_provider_batchkit.ledger import BatchState

        return {b.shard for b in self.batches() if b.state is BatchState.LANDED}

    def gone(self) -> list[BatchRecord]:
        """The batches that are gone and whose rows no later round has asked, or not all of them."""
        from airflow_provider_batchkit.ledger import BatchState

        return [b for b in self.batches() if b.state is BatchState.GONE and any(True for _ in self.ledger.unasked(b))]

    def replaces(self, batches: Sequence[BatchRecord]) -> bool:
        """Whether these batches are to replace the table's rows: no other batch of the job has landed with an answer."""
        ids = {b.batch_id for b in batches}
        return not any(b.batch_id not in ids for b in self.ledger.answered_batches(self.job_id))

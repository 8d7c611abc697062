"""Run: submit, wait and land in one deferrable task, in rounds that ask failed rows again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.jobs.rounds import Round, parse_rounds
from airflow_provider_batchkit.jobs.waiting import Done, WaitFor
from airflow_provider_batchkit.operators.fetch import LandingOperator, refuse_replace
from airflow_provider_batchkit.operators.publish import publish_summary
from airflow_provider_batchkit.operators.resumable import Leg
from airflow_provider_batchkit.operators.shown import shown_of
from airflow_provider_batchkit.operators.submit import SubmitBatchOperator
from airflow_provider_batchkit.request.system import system_problem_of_task

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_batchkit.ledger import Ledger

_WEEK_S = 7 * 24 * 3600.0


class RunBatchOperator(SubmitBatchOperator, LandingOperator):
    """Ask Claude about every row of a source and write the answers to a table or to files; failed rows are asked again. Returns a summary.

    It replaces the tasks submit, wait and fetch. It takes the parameters of :class:`SubmitBatchOperator` and those of
    :class:`FetchBatchOperator` but ``batch_id``, and waits in the triggerer, without a worker slot.

    A round's answers land as soon as its batches have ended. The next round asks again only rows that failed for a passing reason:
    expired, canceled, overloaded, rate limited, timed out, API errors, a download that failed. It never asks what the API refused, nor a
    row whose result line is missing (its answer may be billed: clear the task to read the results again). Where the account is the reason
    (credit, a usage limit, a disabled organization) the task stops asking and says so: clear it when the account works again.

    Rows that the source has gained meanwhile wait for the next DAG run. Rows of a batch that was deleted or archived before it landed are
    asked again with ``retry_gone``. The ledger records the task's progress: a retry or a cleared task goes on from there, and pays for
    nothing twice. When ``max_cost_usd`` or the ``budget`` has no room for another round, the task ends with the answers it has.

    The summary has the same keys as fetch's, over all rounds: ``counts`` are rows by their last outcome, and ``cost_tally`` is the cost of
    all rounds. It also has ``rounds`` (what each round asked and got), ``failed`` (which rows have no answer, and why) and ``stopped`` (why
    no further round was asked). The XCom ``batch_ids`` holds the batch ids, and ``batch_id`` the first of them.

    :param max_rounds: how often a row may be asked, from 1
    :param rounds: in place of ``max_rounds``, a list of :class:`~airflow_provider_batchkit.Round`. The first asks every row; each later one
        names the outcomes that it asks again and what it changes: ``[Round(), Round(ask=["truncated"], max_tokens=800)]``. A row keeps its
        best outcome, in this order: finished, truncated, invalid_output, paused, refused, errored, canceled, expired, missing; of equal
        outcomes the latest
    :param retry_invalid_output: also ask answers again that do not fit the schema; each of them is billed
    :param poke_interval: seconds between looks at running batches
    :param timeout: seconds of waiting for a round's batches; then the task fails, the batches go on, and a retry waits again
    :param notify_after: age of a running batch, a timedelta or seconds, at which ``notifiers`` are told: once per task, over all its rounds
        and attempts. ``[batchkit] notify_after`` of Airflow's configuration by default
    :param notifiers: Airflow's notifiers, or functions that take the task's context, which has ``batchkit``
    :param cancel_on_kill: cancel the running batches when the task is killed, also while it waits. Off by default: clearing a task counts
        as killing it on Airflow 3.3, and paid work must survive that
    """

    def __init__(
        self,
        *,
        table: str | None = None,
        max_rounds: int = 1,
        rounds: Sequence[Round] | None = None,
        poke_interval: float = 60.0,
        timeout: float = _WEEK_S,
        notify_after: timedelta | float | None = None,
        notifiers: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(table=table, **kwargs)
        self._refuse_bad_target()
        try:
            self.rounds = parse_rounds(rounds, max_rounds, retry_invalid_output=self.retry_invalid_output)
        except BatchInputError as e:
            raise BatchInputError(f"Task {self.task_id}: {e}") from None
        self.asks, self.caps = shown_of(self)
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
        if poke_interval <= 0 or timeout <= 0:
            raise BatchInputError(f"Task {self.task_id}: poke_interval and timeout are seconds above 0.")
        self._take_notifiers(notify_after, notifiers)
        if self.skip_unchanged:
            refuse_replace(f"Task {self.task_id}", self.write_disposition)

    def execute_complete(self, context: Context, event: Any = None) -> Any:
        """The method that Airflow calls on a task that an older version of this package has deferred."""
        return self.resume(context, event, about="round")

    def _advance(self, leg: Leg, ledger: Ledger) -> Done[Any] | WaitFor:
        from airflow_provider_batchkit.jobs.run import RunStep

        self._refuse_mapped_replace(leg.context)
        if self.is_dry_run:
            return super()._advance(leg, ledger)
        if leg.about is None:
            self._prove_output()
        attempt = self._attempt(leg, ledger)
        asking, landing = self._asking(leg, attempt.job_id), self._landing(leg, ledger)
        step = RunStep(attempt, asking, landing, self.poke_interval, self.timeout)
        # a batch that was not visible, and was waited for, may be one that had landed before
        return step.advance(land_again=leg.about in (None, "unseen"))

    def _finish(self, leg: Leg, ledger: Ledger, result: Any) -> Any:
        if self.is_dry_run:
            return super()._finish(leg, ledger, result)
        if result.empty is not None:
            self._nothing_to_ask(result.empty)
        found = result.outcome
        leg.running(found.batch_ids)
        summary = {
            "batch_ids": found.batch_ids,
            "table": self.table,
            **self._file_summary(found.batch_ids),
            "rows": found.counts.total() if self.include_failed else found.answered,
            "counts": dict(sorted(found.counts.items())),
            "unfinished": dict(sorted(found.unfinished.items())),
            "cost_tally": found.tally.to_json(),
            "latency_s": found.latency_s,
            "rounds": found.rounds,
            "failed": [asdict(failed) for failed in found.failed],
            "stopped": result.stopped,
        }
        publish_summary(self, leg.context, summary, found.tally)
        self._delete(ledger, found.batch_ids, found.complete_ids)
        result.check(self._landing(leg, ledger))
        self._check_error_rate(found.counts)
        return summary

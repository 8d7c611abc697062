"""Tasks that run in legs: each leg calls one step of the job, and defers when the step returns a wait."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowSkipException, BaseOperator

from airflow_provider_batchkit.api.polling import validate_event
from airflow_provider_batchkit.cost.budget import Budget
from airflow_provider_batchkit.exceptions import BatchKitError, BatchWaitTimeout, BudgetExceededError, PollError
from airflow_provider_batchkit.hooks.ledger import ledger_of
from airflow_provider_batchkit.jobs.waiting import Done, WaitFor
from airflow_provider_batchkit.lineage import BatchLineage
from airflow_provider_batchkit.links import push_console_link
from airflow_provider_batchkit.operators.late import TellsWhenLate, figures_of
from airflow_provider_batchkit.operators.metrics import count_landed, count_submitted
from airflow_provider_batchkit.operators.tasks import OnConnection, batchkit_errors, map_index_of

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_batchkit.jobs.submit import SubmitReport
    from airflow_provider_batchkit.landing import BatchFigures
    from airflow_provider_batchkit.ledger import Ledger

#: time after the trigger's own deadline at which Airflow ends a deferral whose trigger never fired
_GRACE = timedelta(minutes=5)
#: the least time between two legs
_LEAST_PAUSE = timedelta(seconds=5)
#: time between two looks of a task whose trigger cannot look
_BROKEN_PAUSE = timedelta(minutes=1)


@dataclass(slots=True)
class Leg:
    """A task's work between two waits, which Airflow calls deferrals. It reports to Airflow what the step does."""

    context: Context
    #: when the attempt began, or the leg after its last round; aware
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    #: requests that the attempt has sent since ``since``
    sent: int = 0
    #: ``about`` of the wait before this leg; None in the first leg
    about: str | None = None
    #: the candidates that the previous leg waited for
    waited_for: tuple[str, ...] = ()
    #: whether the trigger could not look at batches during the wait before this leg
    broken: bool = False
    #: the things that the previous leg did not find, each with the time of the first such look; see :attr:`.WaitFor.unseen`
    unseen: dict[str, datetime] = field(default_factory=dict)

    @classmethod
    def after(cls, context: Context, event: Any, since: str, sent: int, about: str) -> Leg:
        """The leg that a trigger's event begins. The task does not wait any more, which the XCom ``waits_for`` then shows.

        ``dag.test()`` drops what a deferral passes on, so this reads back what the previous leg pushed. A retry has empty XComs.

        :raises BatchWaitTimeout: when the batches of a round have not ended in time
        :raises PollError: for an event that the trigger does not send, and when a round's batches could not be looked at
        """
        known, ti = validate_event(event), context["ti"]
        # in a user's own tests a task instance may have no XComs to read
        pull = getattr(ti, "xcom_pull", lambda **_: None)
        pushed = pull(task_ids=ti.task_id, key="waits_for", map_indexes=map_index_of(ti)) or {}
        ti.xcom_push(key="waits_for", value=None)
        about = about or str(pushed.get("about", "doubt"))
        if about == "round":
            if known["status"] != "ended":
                raise (BatchWaitTimeout if known["status"] == "timeout" else PollError)(str(known["message"]))
            return cls(context, about=about)
        unseen = {what: datetime.fromisoformat(when) for what, when in pushed.get("unseen", {}).items()}
        candidates = tuple(known.get("batch_ids", ())) if about == "doubt" else ()  # type: ignore[arg-type]
        began = datetime.fromisoformat(since) if since else datetime.now(UTC)
        return cls(context, began, sent, about, candidates, known["status"] == "error", unseen)

    def asked(self, report: SubmitReport) -> None:
        self.sent += report.asked
        count_submitted(self.context["ti"], report.asked)
        push_console_link(self.context, report.batch_ids)
        self.context["ti"].xcom_push(key="batch_id", value=report.batch_ids[0])

    def running(self, batch_ids: Sequence[str]) -> None:
        push_console_link(self.context, batch_ids)
        self.context["ti"].xcom_push(key="batch_ids", value=list(batch_ids))
        if batch_ids:
            self.context["ti"].xcom_push(key="batch_id", value=batch_ids[0])

    def landed(self, batches: Iterable[BatchFigures]) -> None:
        count_landed(self.context["ti"], batches)

    def budgeted(self, ledger: Ledger, budget: Budget, began: datetime, refused: BudgetExceededError | None) -> None:
        from airflow_provider_batchkit.operators.alerts import tell_of_budget

        tell_of_budget(self.context, ledger, budget, began, refused)


class ResumableOperator(TellsWhenLate, OnConnection, BatchLineage, BaseOperator):
    """A task that does what can be done now, and waits for the rest without a worker slot."""

    sql_conn_id: str | None
    ledger_conn_id: str | None
    budget: Budget | None = None
    #: whether the ledger has a job of this task
    _has_job = False

    # this class needs an __init__ of its own: an inherited one leaves a mapped task without inlets
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def execute(self, context: Context) -> Any:
        return self._go_on(Leg(context))

    def resume(self, context: Context, event: Any = None, since: str = "", asked: int = 0, about: str = "") -> Any:
        """Go on after a wait, however it ended: the ledger decides the next step. :meth:`_wait` passes on the other arguments."""
        if isinstance(event, Mapping) and event.get("status") == "late":
            return self._wait_on(context, event, {"since": since, "asked": asked, "about": about or "round"})
        with batchkit_errors():
            leg = Leg.after(context, event, since, asked, about)
        if leg.broken:
            self.log.warning("%s", event["message"])
        return self._go_on(leg)

    def _go_on(self, leg: Leg) -> Any:
        with batchkit_errors(), ledger_of(self, leg.context if self._has_job else None) as ledger:
            try:
                found = self._advance(leg, ledger)
            except BatchKitError as e:
                push_console_link(leg.context, e.submitted)
                # a task that has submitted batches is not skipped: they are paid for and must be fetched
                if isinstance(e, BudgetExceededError) and self.budget and self.budget.on_exceeded == "skip" and not e.submitted:
                    raise AirflowSkipException(str(e)) from e
                raise
            if isinstance(found, Done):
                return self._finish(leg, ledger, found.result)
        self._wait(leg, found)
        return None

    def _wait_on(self, context: Context, event: Mapping[str, Any], passed_on: dict[str, Any]) -> None:
        """Tell people that the batches of a round are late, and wait for the same batches until the same time."""
        self._defer_to(event["batch_ids"], event["deadline"], passed_on, late_after=self.tell_late(context, figures_of(event)))

    @abstractmethod
    def _advance(self, leg: Leg, ledger: Ledger) -> Done[Any] | WaitFor:
        """Do the task's next step."""

    @abstractmethod
    def _finish(self, leg: Leg, ledger: Ledger, result: Any) -> Any:
        """The task's return value, from the result of its last step."""

    def _wait(self, leg: Leg, wait: WaitFor) -> None:
        """Defer, and report the wait in the log and under the XCom key ``waits_for``."""
        now = datetime.now(UTC)
        self.log.info("%s", wait.why)
        leg.context["ti"].xcom_push(key="waits_for", value=wait.to_json())
        # the ledger's clock may be behind this one, and the next leg must not follow at once
        batch_ids, until = list(wait.batch_ids), max(wait.until, now + _LEAST_PAUSE)
        if leg.broken and wait.about != "round":
            # the trigger would fire at once
            batch_ids, until = [], min(until, now + _BROKEN_PAUSE)
        passed_on = {"since": leg.since.isoformat(), "asked": leg.sent, "about": wait.about}
        self._defer_to(batch_ids, until.timestamp(), passed_on, late_after=self.late_after if wait.about == "round" else None)

    def _defer_to(self, batch_ids: list[str], deadline: float, passed_on: dict[str, Any], *, late_after: float | None) -> None:
        from airflow_provider_batchkit.triggers.batch import BatchTrigger

        about = passed_on["about"]
        self.defer(
            trigger=BatchTrigger(
                batch_ids=batch_ids,
                anthropic_conn_id=self.anthropic_conn_id,
                poke_interval=float(getattr(self, "poke_interval", _BROKEN_PAUSE.total_seconds())),
                deadline=deadline,
                # candidates of a doubt may belong to another submitter, so they are not canceled
                cancel_on_kill=getattr(self, "cancel_on_kill", False) and about in ("primer", "round"),
                first=len(batch_ids) > 1 and about != "round",
                late_after=late_after,
            ),
            method_name="resume",
            kwargs=passed_on,
            timeout=timedelta(seconds=max(deadline - time.time(), 0.0)) + _GRACE,
        )

"""A sensor that waits for batches, without a worker slot."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import (
    AirflowException,
    AirflowSensorTimeout,
    AirflowSkipException,
    BaseSensorOperator,
    PokeReturnValue,
)

from airflow_provider_batchkit.api.polling import ENDED, Decision, Ended, GaveUp, Late, PollState, Wait, validate_event
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.hooks.ledger import ledger_at, ledger_place
from airflow_provider_batchkit.hooks.settings import DEFAULT_CONN_ID, absence_seconds
from airflow_provider_batchkit.links import ConsoleLink, push_console_link
from airflow_provider_batchkit.operators import kill
from airflow_provider_batchkit.operators.late import TellsWhenLate, figures_of
from airflow_provider_batchkit.operators.tasks import OnConnection, as_batch_ids, batchkit_errors
from airflow_provider_batchkit.progress import counts_text

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_batchkit.ledger import BatchRecord
    from airflow_provider_batchkit.model import BatchSnapshot

log = logging.getLogger(__name__)

#: seconds after the trigger's own deadline at which Airflow ends a deferral whose trigger never fired
_GRACE_S = 300.0


class BatchSensor(TellsWhenLate, OnConnection, BaseSensorOperator):
    """Wait until every batch has ended. Returns the requests per status that the API reports.

    A batch that ended with errors is still a success here: the fetch handles the outcome of each row. A batch that answers 404 is looked at
    again for at least ``[batchkit] absence_seconds``, 15 minutes by default, before the sensor fails; the log reports the first 404. In
    mode ``reschedule``, the sensor keeps its worker slot during that time.

    :param batch_id: a batch id or a list of them (templated)
    :param anthropic_conn_id: connection of type ``anthropic``
    :param deferrable: wait in the triggerer, without a worker slot; otherwise ``mode`` applies. In the triggerer ``poke_interval`` is the
        least time between looks, and old batches are looked at less often, see
        :class:`~airflow_provider_batchkit.triggers.batch.BatchTrigger`
    :param notify_after: age of a running batch, a timedelta or seconds, at which ``notifiers`` are told: once per task, over all its
        attempts, and without a worker slot until then. ``[batchkit] notify_after`` of Airflow's configuration by default
    :param notifiers: Airflow's notifiers, or functions that take the task's context, which has ``batchkit``. The ledger marks what they
        were told
    :param sql_conn_id: where no ``ledger_conn_id`` is set: SQL connection of the results, the same as the submit's. The sensor needs the
        ledger only for ``notifiers``, and in a cleared run, for batches that ``delete_after_fetch`` has deleted
    :param ledger_conn_id: SQLite or PostgreSQL connection of the ledger, the same as the submit's (templated)
    :param cancel_on_kill: cancel the batches when the task is killed. Off by default: clearing a task counts as killing it on
        Airflow 3.3, and paid work must survive that
    """

    template_fields: Sequence[str] = ("batch_id", "anthropic_conn_id", "sql_conn_id", "ledger_conn_id")
    ui_color = "#e6e8d2"
    operator_extra_links = (ConsoleLink(),)
    _asked_ledger = False

    def __init__(
        self,
        *,
        batch_id: Any,
        anthropic_conn_id: str = DEFAULT_CONN_ID,
        deferrable: bool = True,
        cancel_on_kill: bool = False,
        notify_after: timedelta | float | None = None,
        notifiers: Sequence[Any] | None = None,
        sql_conn_id: str | None = None,
        ledger_conn_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_id = batch_id
        self.anthropic_conn_id = anthropic_conn_id
        self.deferrable = deferrable
        self.cancel_on_kill = cancel_on_kill
        self.sql_conn_id = sql_conn_id
        self.ledger_conn_id = ledger_conn_id
        self._take_notifiers(notify_after, notifiers)

    @cached_property
    def _state(self) -> PollState:
        with batchkit_errors():
            return PollState(
                as_batch_ids(self.batch_id), interval=float(self.poke_interval), absence=absence_seconds(), late_after=self.late_after
            )

    def poke(self, context: Context) -> PokeReturnValue:
        state = self._state
        if not state.seen:
            push_console_link(context, state.batch_ids)
        decision = self._look(context)
        if self.reschedule:
            # the next poke runs in another process, which would not know since when a batch answers 404
            until = time.monotonic() + self.timeout
            while isinstance(decision, Wait) and state.hidden() and time.monotonic() < until:
                time.sleep(decision.seconds)
                decision = self._look(context)
        if isinstance(decision, GaveUp):
            raise AirflowException(f"{decision.reason.removesuffix('.')}. The batches are untouched; waiting again costs nothing.")
        if (progress := state.progress(time.time())) is not None:
            log.info("%s", progress)
        return PokeReturnValue(isinstance(decision, Ended), state.outcomes())

    def _look(self, context: Context) -> Decision:
        state = self._state
        with batchkit_errors():
            if state.open_ids():
                self.hook.kit.look(state)
            if state.hidden() and not self._asked_ledger:
                self._asked_ledger = True
                state.saw(self._deleted(state.hidden()))
        decision = state.decide(time.time())
        if isinstance(decision, Late) and not self.deferrable:
            state.late_after = self.tell_late(context, state.figures(time.time()))
            decision = state.decide(time.time())
        return decision

    def _deleted(self, batch_ids: Sequence[str]) -> list[BatchSnapshot]:
        """Those of the batches that have landed and that this package has deleted since, as the ledger knows them.

        Without a ledger there are none. The wait goes on when the ledger cannot be read.
        """
        try:
            place = ledger_place(self.ledger_conn_id, self.sql_conn_id)
        except BatchInputError:
            return []
        try:
            with ledger_at(place, getattr(self, "executor", None)) as ledger:
                found = ledger.deleted_after_landing(batch_ids)
        except Exception:  # the ledger only shortens the wait
            log.warning("Whether %s has landed could not be looked up in the ledger", ", ".join(batch_ids), exc_info=True)
            return []
        for record, _ in found:
            log.info("Batch %s has landed and was deleted after its fetch: there is nothing to wait for", record.batch_id)
        return [_ended(record, counts) for record, counts in found]

    def execute(self, context: Context) -> Any:
        kill.prepare(self)
        if not self.deferrable:
            return super().execute(context)
        try:
            first = self.poke(context)
        except AirflowException as e:
            if self.soft_fail or self.never_fail:
                raise AirflowSkipException(f"Skipping, as soft_fail or never_fail says: {e}") from e
            raise
        if first.is_done:
            return first.xcom_value
        self._defer_to(list(self._state.batch_ids), time.time() + self.timeout, self.late_after)
        return None

    def _defer_to(self, batch_ids: list[str], deadline: float, late_after: float | None) -> None:
        from airflow_provider_batchkit.triggers.batch import BatchTrigger

        self.defer(
            trigger=BatchTrigger(
                batch_ids=batch_ids,
                anthropic_conn_id=self.anthropic_conn_id,
                poke_interval=float(self.poke_interval),
                deadline=deadline,
                cancel_on_kill=self.cancel_on_kill,
                late_after=late_after,
            ),
            method_name="execute_complete",
            timeout=timedelta(seconds=max(deadline - time.time(), 0.0) + _GRACE_S),
        )

    def execute_complete(self, context: Context, event: Any = None) -> Any:
        """Go on after the trigger's event: every batch ended, the time ran out, looking kept failing, or a batch is late."""
        with batchkit_errors():
            known = validate_event(event)
        if known["status"] == "late":
            kill.prepare(self)
            self._defer_to(event["batch_ids"], event["deadline"], self.tell_late(context, figures_of(event)))
        if known["status"] == "timeout":
            raise AirflowSensorTimeout(str(known["message"]))
        if known["status"] == "error":
            raise AirflowException(str(known["message"]))
        self.log.info("All batches have ended: %s", counts_text(event["counts"]))
        return known["counts"]

    def on_kill(self) -> None:
        batch_ids = self._known_ids() if self.cancel_on_kill else []
        if batch_ids:
            kill.cancel_batches_of(self, lambda: batch_ids)

    def _known_ids(self) -> list[str]:
        """The batch ids, as far as they are known: none before the templates are rendered, or when the submit has pushed nothing."""
        if "_state" in self.__dict__:
            return list(self._state.batch_ids)
        if not isinstance(self.batch_id, str | list | tuple):  # a task's output that is not resolved yet
            return []
        try:
            batch_ids = as_batch_ids(self.batch_id)
        except BatchInputError:
            return []
        return [] if any("{" in batch_id for batch_id in batch_ids) else batch_ids


def _ended(record: BatchRecord, rows: Mapping[str, int]) -> BatchSnapshot:
    """A landed batch as the API has shown it, with its source rows in place of its requests."""
    from airflow_provider_batchkit.model import ANSWERED, BatchCounts, BatchSnapshot

    answered = sum(rows.get(status.value, 0) for status in ANSWERED)
    counts = BatchCounts(0, answered, *(rows.get(status, 0) for status in ("errored", "canceled", "expired")))
    assert record.batch_id is not None and record.created_at is not None, "a landed batch has both"
    return BatchSnapshot(record.batch_id, ENDED, counts, record.created_at, ended_at=record.ended_at)

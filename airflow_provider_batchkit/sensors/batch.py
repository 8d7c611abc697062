"""A sensor for batches: no worker slot while it waits."""

from __future__ import annotations

import time
from collections.abc import Sequence
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

from airflow_provider_batchkit.api.polling import Decision, Ended, GaveUp, PollState, Wait, validate_event
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.hooks.settings import DEFAULT_CONN_ID, absence_seconds
from airflow_provider_batchkit.links import ConsoleLink, push_console_link
from airflow_provider_batchkit.operators import kill
from airflow_provider_batchkit.operators.tasks import OnConnection, as_batch_ids, batchkit_errors

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

#: how much later than the trigger's own deadline Airflow ends a deferral that never came back
_GRACE_S = 300.0


class BatchSensor(OnConnection, BaseSensorOperator):
    """Wait until every batch has ended. Returns the requests per status that the API reports.

    A batch that ended with errors is still a success here: what became of each row is the fetch's matter. One that answers 404 is looked
    at again for ``[batchkit] absence_seconds`` at least, 15 minutes by default, before the sensor fails; the log says so at once. In mode
    ``reschedule``, the sensor keeps its worker slot meanwhile.

    :param batch_id: a batch id or a list of them (templated)
    :param anthropic_conn_id: connection of type ``anthropic``
    :param deferrable: wait in the triggerer, without a worker slot; ``mode`` applies otherwise. There ``poke_interval`` is the least time
        between looks, and old batches are looked at less often, see :class:`~airflow_provider_batchkit.triggers.batch.BatchTrigger`
    :param cancel_on_kill: cancel the batches when the task is killed. Off by default: clearing a task counts as killing it on
        Airflow 3.3, and paid work must survive that
    """

    template_fields: Sequence[str] = ("batch_id", "anthropic_conn_id")
    ui_color = "#e6e8d2"
    operator_extra_links = (ConsoleLink(),)

    def __init__(
        self,
        *,
        batch_id: Any,
        anthropic_conn_id: str = DEFAULT_CONN_ID,
        deferrable: bool = True,
        cancel_on_kill: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_id = batch_id
        self.anthropic_conn_id = anthropic_conn_id
        self.deferrable = deferrable
        self.cancel_on_kill = cancel_on_kill

    @cached_property
    def _state(self) -> PollState:
        with batchkit_errors():
            return PollState(as_batch_ids(self.batch_id), interval=float(self.poke_interval), absence=absence_seconds())

    def poke(self, context: Context) -> PokeReturnValue:
        state = self._state
        if not state.seen:
            push_console_link(context, state.batch_ids)
        decision = self._look()
        if self.reschedule:
            # the next poke is another process, which would know nothing of a batch that answers 404
            until = time.monotonic() + self.timeout
            while isinstance(decision, Wait) and state.hidden() and time.monotonic() < until:
                time.sleep(decision.seconds)
                decision = self._look()
        if isinstance(decision, GaveUp):
            raise AirflowException(f"{decision.reason.removesuffix('.')}. The batches are untouched; waiting again costs nothing.")
        self.log.info("%d of %d batches have ended", len(state.batch_ids) - len(state.open_ids()), len(state.batch_ids))
        return PokeReturnValue(isinstance(decision, Ended), state.outcomes())

    def _look(self) -> Decision:
        with batchkit_errors():
            if self._state.open_ids():
                self.hook.kit.look(self._state)
        return self._state.decide(time.monotonic())

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
        from airflow_provider_batchkit.triggers.batch import BatchTrigger

        self.defer(
            trigger=BatchTrigger(
                batch_ids=list(self._state.batch_ids),
                anthropic_conn_id=self.anthropic_conn_id,
                poke_interval=float(self.poke_interval),
                deadline=time.time() + self.timeout,
                cancel_on_kill=self.cancel_on_kill,
            ),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout + _GRACE_S),
        )
        return None

    def execute_complete(self, context: Context, event: Any = None) -> Any:
        """The trigger has ended: with every batch, with a time-out, or because looking kept failing."""
        with batchkit_errors():
            known = validate_event(event)
        if known["status"] == "timeout":
            raise AirflowSensorTimeout(str(known["message"]))
        if known["status"] == "error":
            raise AirflowException(str(known["message"]))
        self.log.info("All batches have ended: %s", known["counts"])
        return known["counts"]

    def on_kill(self) -> None:
        batch_ids = self._known_ids() if self.cancel_on_kill else []
        if batch_ids:
            kill.cancel_batches_of(self, lambda: batch_ids)

    def _known_ids(self) -> list[str]:
        """The batches, without a call; none before the templates are rendered, or where the task before has pushed nothing."""
        if "_state" in self.__dict__:
            return list(self._state.batch_ids)
        if not isinstance(self.batch_id, str | list | tuple):  # a task's output that was not read yet
            return []
        try:
            batch_ids = as_batch_ids(self.batch_id)
        except BatchInputError:
            return []
        return [] if any("{" in batch_id for batch_id in batch_ids) else batch_ids

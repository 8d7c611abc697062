"""The trigger. It only waits for batches on the triggerer's event loop, together with all other triggers of its connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_batchkit.api.polling import Ended, GaveUp, Late, PollState, TimedOut
from airflow_provider_batchkit.exceptions import PollError
from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
from airflow_provider_batchkit.hooks.settings import absence_seconds
from airflow_provider_batchkit.triggers.poller import ended

#: seconds between two readings of the clock by a trigger that waits only for its deadline
_CLOCK_S = 60.0


class BatchTrigger(BaseTrigger):
    """Fires once every batch has ended, the deadline has passed, a batch is late, or looking keeps failing.

    :param batch_ids: ids of the batches. When it is empty, a trigger with a deadline waits only for that, without a call to the API
    :param anthropic_conn_id: connection of type ``anthropic``
    :param poke_interval: the shortest time between two looks that are made for these batches, in seconds; the first look is made at once.
        Old batches are looked at less often: every twentieth of their age, and at least every 4 intervals (:func:`.interval_at_age`). A
        look for another trigger of the connection that shows these batches counts for them, too. A batch that answers 404 is looked at
        again after 2 s and then at growing intervals, for at least ``[batchkit] absence_seconds``; a new triggerer counts anew
    :param deadline: seconds since the epoch, by the wall clock, since a trigger may resume in another process
    :param cancel_on_kill: cancel the batches when a user kills or clears the deferred task (Airflow 3.3 and later)
    :param first: fire as soon as one of the batches has ended. The event names all batches; ``counts`` cover those that have ended
    :param late_after: age of a running batch in seconds at which the trigger fires with the status ``late``
    """

    def __init__(
        self,
        *,
        batch_ids: list[str],
        anthropic_conn_id: str,
        poke_interval: float,
        deadline: float | None = None,
        cancel_on_kill: bool = False,
        first: bool = False,
        late_after: float | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's own, without annotations
        self.batch_ids = batch_ids
        self.anthropic_conn_id = anthropic_conn_id
        self.poke_interval = poke_interval
        self.deadline = deadline
        self.cancel_on_kill = cancel_on_kill
        self.first = first
        self.late_after = late_after

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "batch_ids": self.batch_ids,
                "anthropic_conn_id": self.anthropic_conn_id,
                "poke_interval": self.poke_interval,
                "deadline": self.deadline,
                "cancel_on_kill": self.cancel_on_kill,
                # these are sent only when set: a triggerer that is updated after the workers does not know them
                **({"first": True} if self.first else {}),
                **({"late_after": self.late_after} if self.late_after is not None else {}),
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        if not self.batch_ids and self.deadline is not None:
            await _until(self.deadline)
            yield self._event("timeout", message="The time that the task waited for has come. It waited for no batch.")
            return
        if self.cancel_on_kill and not hasattr(BaseTrigger, "on_kill"):
            self.log.warning(
                "cancel_on_kill has no effect while the task waits: this Airflow does not tell a deferred task that it is killed (3.3 is "
                "the first that does). Its batches would run on and be billed."
            )
        state = PollState(
            self.batch_ids,
            interval=self.poke_interval,
            by_age=True,
            deadline=self.deadline,
            first=self.first,
            absence=absence_seconds(),
            late_after=self.late_after,
        )
        try:
            decision = await ended(
                self.anthropic_conn_id, state, lambda line: self.log.warning("%s", line), lambda line: self.log.info("%s", line)
            )
        except PollError as e:
            self.log.exception("The wait for %s broke", ", ".join(self.batch_ids))
            yield self._event("error", message=str(e))
            return
        if isinstance(decision, Ended):
            yield self._event("ended", counts=state.outcomes())
        elif isinstance(decision, Late):
            # the task tells its notifiers, and waits on until the same deadline
            yield self._event("late", deadline=self.deadline, figures=asdict(state.figures(time.time())))
        elif isinstance(decision, TimedOut):
            yield self._event(
                "timeout",
                message=f"The batches {', '.join(decision.open_ids)} did not end in time. They keep running and are billed "
                "as usual; waiting again costs nothing.",
            )
        elif isinstance(decision, GaveUp):
            yield self._event(
                "error", message=f"{decision.reason.removesuffix('.')}. The batches are untouched; waiting again costs nothing."
            )

    async def on_kill(self) -> None:
        """Cancel the batches when a user has killed or cleared the deferred task, if ``cancel_on_kill`` is set."""
        if not self.batch_ids:
            return
        if not self.cancel_on_kill:
            self.log.info("The task was killed; its batches %s go on (cancel_on_kill is off)", ", ".join(self.batch_ids))
            return
        from airflow_provider_batchkit.api.cancel import cancel_batches_async

        try:
            client = await BatchKitHook(self.anthropic_conn_id).get_async_conn()
        except Exception as e:  # noqa: BLE001 - after any error nothing can be canceled, and Airflow's own log would not name the batches
            self.log.warning(
                "The task was killed and cancel_on_kill is set, but the batches %s could not be canceled: the connection %r cannot be "
                "used (%s). They run on and are billed.",
                ", ".join(self.batch_ids),
                self.anthropic_conn_id,
                str(e) or repr(e),
            )
            return
        self.log.info("The task was killed and cancel_on_kill is set: its batches are canceled")
        async with client:
            await cancel_batches_async(client, self.batch_ids)

    def _event(self, status: str, **values: Any) -> TriggerEvent:
        return TriggerEvent({"status": status, "batch_ids": self.batch_ids, **values})


async def _until(deadline: float) -> None:
    """Sleep until ``deadline``, in seconds since the epoch. The clock is read every minute, since it may be adjusted meanwhile."""
    while (left := deadline - time.time()) > 0:  # noqa: ASYNC110 - it waits for a time, and no event announces that
        await asyncio.sleep(min(left, _CLOCK_S))

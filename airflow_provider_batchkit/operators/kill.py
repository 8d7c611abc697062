"""Canceling the batches of a task with ``cancel_on_kill`` that is killed, for the operators and the sensor.

Airflow calls ``on_kill`` in the signal handler of the thread that runs the task, and the handler uses only this module. The signal may have
interrupted an import: the imported module is then incomplete for this thread, and locked for every other one. So the handler must not
import anything: this module is loaded when the DAG is parsed, and :func:`prepare` loads what it calls before there is anything to cancel.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.api.cancel import TOTAL_S
from airflow_provider_batchkit.hooks.ledger import Place, ledger_at, ledger_place
from airflow_provider_batchkit.operators.tasks import job_of

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_batchkit.ledger import JobRecord, Ledger

log = logging.getLogger(__name__)

#: seconds for the whole handler: the bound on canceling, plus some for connections and the ledger
_BOUND_S = TOTAL_S + 5.0
#: The modules that canceling needs. The last is a part of the API's client, which would otherwise load it at the first call.
_NEEDED = (
    "airflow_provider_batchkit.hooks.batchkit",
    "airflow_provider_batchkit.kit",
    "airflow_provider_batchkit.ledger",
    "anthropic.resources.messages",
)


def prepare(task: Any) -> None:
    """Load what canceling needs, when the task may have to cancel. Call it before the task knows a batch of its own."""
    if task.cancel_on_kill:
        for name in _NEEDED:
            import_module(name)


def cancel_batches_of(task: Any, batch_ids: Callable[[], Sequence[str]]) -> None:
    """Cancel the batches of a task that is being killed. Raises nothing and returns in bounded time.

    A lock that the handler's thread held when it was interrupted (the ledger's on SQLite, Airflow's channel to the supervisor, the HTTP
    client's pool, a module's) is not released before the handler returns. So the work is done in another thread, and the handler waits for
    it no longer than ``_BOUND_S`` seconds.

    :param task: a task with a ``hook``
    :param batch_ids: returns the ids of the batches; called in the other thread
    """

    def work() -> None:
        try:
            found = batch_ids()
            if found:
                task.hook.kit.cancel_all(found)
        except Exception as e:  # noqa: BLE001 - an error of the handler would be raised in the interrupted code, at any line
            log.warning(
                "The task was killed and cancel_on_kill is set, but its batches could not be canceled: %s. They run on and are billed; "
                "cancel them in the Claude Console, or clear the task to wait for them again.",
                str(e) or repr(e),
            )

    log.info("The task was killed and cancel_on_kill is set: its batches are canceled")
    thread = threading.Thread(target=work, name="batchkit-kill", daemon=True)
    thread.start()
    thread.join(_BOUND_S)
    if thread.is_alive():
        log.warning("The batches of the killed task could not be canceled within %.0f s: those left run on and are billed.", _BOUND_S)


class OwnsBatches:
    """A task that sends the batches of a job, and cancels them when it is killed and ``cancel_on_kill`` is set."""

    cancel_on_kill: bool
    sql_conn_id: str | None
    ledger_conn_id: str | None
    _job_id: str | None = None
    #: whether the task was killed: it must send no more, since its batches are canceled
    _killed = False

    def _identify(self, context: Context, ledger: Ledger) -> JobRecord:
        """The task's job. After this call a kill may have something to cancel."""
        prepare(self)
        job = job_of(context, ledger)
        self._job_id = job.job_id
        return job

    def on_kill(self) -> None:
        if self.cancel_on_kill and self._job_id is not None:
            self._killed = True
            place, job_id = ledger_place(self.ledger_conn_id, self.sql_conn_id), self._job_id
            cancel_batches_of(self, lambda: _running_batches(place, job_id))


def _running_batches(place: Place, job_id: str) -> list[str]:
    """Ids of the job's running batches, from its ledger."""
    from airflow_provider_batchkit.ledger import BatchState

    with ledger_at(place) as ledger:
        batches = ledger.batches(job_id)
    sending = [b.shard for b in batches if b.state is BatchState.SENDING]
    if sending:
        log.warning(
            "Shard %s was being sent when the task was killed, and its batch has no id yet. If the API accepts it, it runs and is "
            "billed; the next attempt looks for it.",
            ", ".join(map(str, sending)),
        )
    return [b.batch_id for b in batches if b.batch_id and b.state is BatchState.SUBMITTED]

"""What the operators and the sensor do when a task with ``cancel_on_kill`` is killed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from airflow_provider_batchkit.api.cancel import TOTAL_S
from airflow_provider_batchkit.hooks.batchkit import BatchKitHook, sql_engine

log = logging.getLogger(__name__)

#: seconds for everything: the batches' own bound, and some for connections and the ledger
_BOUND_S = TOTAL_S + 5.0


def cancel_batches_of(hook: BatchKitHook, batch_ids: Callable[[], Sequence[str]]) -> None:
    """Cancel the batches of a task that is being killed. Raises nothing and returns in bounded time.

    Airflow calls ``on_kill`` in the signal handler of the thread that runs the task. A lock that this thread held when it was interrupted
    (the ledger's on SQLite, Airflow's channel to the supervisor, the HTTP client's pool) is not released before the handler returns. So
    the work is done in a thread of its own, which is waited for only so long.

    :param batch_ids: gives the batches; called in that thread
    """

    def work() -> None:
        try:
            found = batch_ids()
            if found:
                hook.kit.cancel_all(found)
        except Exception as e:  # noqa: BLE001 - a kill handler that raises breaks off what it interrupted, at any line
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


def running_batches(sql_conn_id: str, job_id: str) -> Callable[[], list[str]]:
    """For :func:`cancel_batches_of`: reads the batches of a job that run from its ledger."""

    def read() -> list[str]:
        from airflow_provider_batchkit.ledger import BatchState, Ledger

        with sql_engine(sql_conn_id) as engine:
            batches = Ledger(engine).batches(job_id)
        sending = [b.shard for b in batches if b.state is BatchState.SENDING]
        if sending:
            log.warning(
                "Shard %s was being sent when the task was killed, and its batch has no id yet. If the API accepts it, it runs and is "
                "billed; the next attempt looks for it.",
                ", ".join(map(str, sending)),
            )
        return [b.batch_id for b in batches if b.batch_id and b.state is BatchState.SUBMITTED]

    return read

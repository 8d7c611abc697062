"""Calls of Airflow's notifiers, in bounded time.

A notifier runs in a thread of its own. When it hangs, the task goes on after ``NOTIFIER_S`` seconds, and the thread ends with the task's
process.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_batchkit.ledger import Claim, Ledger

log = logging.getLogger(__name__)

#: seconds that a task waits for a notifier
NOTIFIER_S = 60.0


class Told(Enum):
    """How the call of a notifier ended."""

    TAKEN = "it returned"
    RAISED = "it raised, so nobody was told"
    HANGS = "it has not returned in time, and may yet"


def tell(ledger: Ledger, claim: Claim, notifier: Callable[[Any], Any], context: Context, facts: Mapping[str, Any], *, again: str) -> bool:
    """Call the notifier of a claim, see :func:`call_notifier`, and mark the result in the ledger. Returns whether it took the alert."""
    told = call_notifier(notifier, context, facts, again=again)
    if told is Told.TAKEN:
        ledger.alert_told(claim)
    elif told is Told.RAISED:
        ledger.alert_untold(claim)
    # a notifier that hangs may still tell it, so its claim is left to end by itself
    return told is Told.TAKEN


def call_notifier(notifier: Callable[[Any], Any], context: Context, facts: Mapping[str, Any], *, again: str) -> Told:
    """Call a notifier with the task's context and ``batchkit`` in it. An error is logged; only an exception that ends a process is raised.

    :param again: for the log: who calls the notifier the next time
    """
    raised: list[BaseException] = []

    def call() -> None:
        try:
            # a notifier renders its fields in place and adds them to the context, so it gets copies of both
            copy.copy(notifier)({**context, "batchkit": facts})
        except BaseException as e:  # noqa: BLE001 - the task's own thread handles it below
            raised.append(e)

    name = type(notifier).__name__
    thread = threading.Thread(target=copy_context().run, args=(call,), name=f"batchkit-{name}", daemon=True)
    thread.start()
    thread.join(NOTIFIER_S)
    if thread.is_alive():
        log.warning("%s has not returned within %.0f s, and the task goes on without it; %s tells it again", name, NOTIFIER_S, again)
        return Told.HANGS
    if not raised:
        return Told.TAKEN
    if not isinstance(raised[0], Exception):
        raise raised[0]
    log.warning("%s raised, and the task goes on; %s tells it again", name, again, exc_info=raised[0])
    return Told.RAISED

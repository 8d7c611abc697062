"""Alerts of late batches: a task tells its notifiers once when its batches have been running for longer than ``notify_after``.

No worker watches the clock: the trigger that waits for the batches fires, the task tells its notifiers, and waits on. The ledger marks what
they were told, so no retry, restart or Clear tells them again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.api.polling import Figures
from airflow_provider_batchkit.cost.budget import parse_notifiers
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.hooks.ledger import ledger_of, ledger_place
from airflow_provider_batchkit.hooks.settings import notify_after
from airflow_provider_batchkit.links import console_page
from airflow_provider_batchkit.operators.tasks import job_of, map_index_of
from airflow_provider_batchkit.progress import span_text

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

log = logging.getLogger(__name__)


class TellsWhenLate:
    """A task with ``notify_after`` and ``notifiers``, and a ledger that marks what they were told."""

    task_id: str
    sql_conn_id: str | None
    ledger_conn_id: str | None
    #: the age in seconds from which a running batch is late; None without notifiers
    late_after: float | None = None
    notifiers: Sequence[Any] = ()

    def _take_notifiers(self, after: timedelta | float | None, notifiers: Any) -> None:
        """:raises BatchInputError: when the DAG is parsed, for values with which no notifier could be told"""
        whose = f"Task {self.task_id}"
        self.notifiers = parse_notifiers(() if notifiers is None else notifiers, f"{whose}: notifiers")
        if not self.notifiers:
            if after is not None:
                raise BatchInputError(f"{whose}: notify_after tells nobody without notifiers.")
            return
        seconds: Any = after.total_seconds() if isinstance(after, timedelta) else notify_after() if after is None else after
        if seconds is None:
            raise BatchInputError(f"{whose}: notifiers needs notify_after, or [batchkit] notify_after of Airflow's configuration.")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0:
            raise BatchInputError(f"{whose}: notify_after must be a timedelta or seconds, above 0, not {after!r}.")
        try:
            ledger_place(self.ledger_conn_id, self.sql_conn_id)
        except BatchInputError:
            raise BatchInputError(
                f"{whose}: notifiers needs the ledger, which knows what they were told: give ledger_conn_id or sql_conn_id, as the submit "
                "has them, or set [batchkit] ledger_conn_id."
            ) from None
        self.late_after = float(seconds)

    def tell_late(self, context: Context, figures: Figures) -> float | None:
        """Tell the notifiers that were not told yet. An error of a notifier is logged and fails no task.

        :returns: the age of the oldest running batch, in seconds, at which to tell them again; None when all have taken the alert
        """
        from airflow_provider_batchkit.ledger.alerts import CLAIM_S
        from airflow_provider_batchkit.operators.notifiers import tell

        again = figures.age_s + CLAIM_S
        try:
            facts = late_facts(context, figures)
            with ledger_of(self) as ledger:
                ledger.ensure()
                claims, rest_told = ledger.claim_late(job_of(context, ledger).job_id, len(self.notifiers))
                if claims:
                    log.warning("%s", facts["message"])
                soon = f"in {span_text(CLAIM_S)} this task"
                told = [tell(ledger, claim, self.notifiers[claim.notifier], context, facts, again=soon) for claim in claims]
        except Exception:  # a failed alert must not end the wait for batches that still run
            log.warning("That batches are late could not be told; it is tried again in %s", span_text(CLAIM_S), exc_info=True)
            return again
        return None if rest_told and all(told) else again


def figures_of(event: Mapping[str, Any]) -> Figures:
    """The figures of late batches in a trigger's event."""
    return Figures(**event["figures"])


def late_facts(context: Context, figures: Figures) -> dict[str, Any]:
    """The value of ``batchkit`` in a notifier's context."""
    from airflow_provider_batchkit.operators.alerts import task_link

    ti, now = context["ti"], time.time()
    name = ti.task_id if map_index_of(ti) < 0 else f"{ti.task_id}[{ti.map_index}]"
    link = task_link(context)
    return {
        "message": f"Batches of {ti.dag_id}.{name} are late: {figures}. {link}",
        "batches": figures.batches,
        "batches_ended": figures.ended,
        "requests": figures.requests,
        "requests_done": figures.done,
        "batch_id": figures.oldest,
        "age": span_text(figures.age_s),
        "age_s": figures.age_s,
        "expires_in": span_text(figures.left_s),
        "expires_at": datetime.fromtimestamp(now + figures.left_s, UTC),
        "link": link,
        "console": console_page(),
    }

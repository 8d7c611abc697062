"""The link from a task to its batches in the Claude Console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from airflow.providers.common.compat.sdk import BaseOperatorLink, XCom, conf

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseOperator, Context, TaskInstanceKey

#: the Console's page of the default workspace's batches (API documentation, "Batch processing", "Tracking your batch")
CONSOLE_URL = "https://platform.claude.com/settings/workspaces/default/batches"
XCOM_KEY = "batchkit_console_link"


def push_console_link(context: Context, batch_ids: Sequence[str]) -> None:
    """Push the link to the XCom from which Airflow shows it, at once, so that it is there while the task runs, waits or has failed."""
    if batch_ids:
        context["ti"].xcom_push(key=XCOM_KEY, value=console_url(batch_ids[0]))


def console_url(batch_id: str) -> str:
    """The address of the Console's page of batches, with a batch's id after a ``#``.

    The Console documents no address of a single batch: the page is the list, and the id only helps the reader. ``[batchkit] console_url``
    sets the workspace's page.
    """
    return f"{console_page()}#{batch_id}"


def console_page() -> str:
    """The Console's page of batches, as this deployment sets it."""
    return str(conf.get("batchkit", "console_url", fallback=CONSOLE_URL))


class ConsoleLink(BaseOperatorLink):
    """The task's first batch in the Claude Console."""

    name = "Claude Console"

    @property
    def xcom_key(self) -> str:
        return XCOM_KEY

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The link that this attempt of the task instance has pushed; "" when it has none.

        Airflow calls this on the worker at the end of every leg, and stores the answer under ``xcom_key``.
        """
        return str(XCom.get_value(ti_key=ti_key, key=XCOM_KEY) or "")

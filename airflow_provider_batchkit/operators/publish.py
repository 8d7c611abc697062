"""Publishing a task's summary beside its return value: in the Storage tab, the outlets' asset events and the lineage."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import Asset

from airflow_provider_batchkit.cost.tally import format_tally, summary_line
from airflow_provider_batchkit.model import CostTally

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context


log = logging.getLogger(__name__)

#: the keys of the summary that are published under their own names; their values are JSON and small
PUBLISHED = ("batch_ids", "table", "output_path", "files", "rows", "counts", "cost_tally", "latency_s")


def publish_summary(task: Any, context: Context, summary: Mapping[str, Any], tally: CostTally) -> None:
    """Publish what landed. Call it in the task's last leg: Airflow loses what an earlier leg sets on asset events.

    :param task: the operator; its OpenLineage events include what is published
    :param summary: the task's return value
    :param tally: the task's bill, for the log
    """
    log.info("Cost of %s:\n%s", ", ".join(summary["batch_ids"]) or "no batches", format_tally(tally))
    published = {name: summary[name] for name in PUBLISHED if summary.get(name) is not None}
    _store(context, published)
    _describe_assets(context, task.outlets, published)
    task.lineage_summary = published


def _store(context: Context, published: Mapping[str, Any]) -> None:
    """Write to the task's Storage tab (Airflow 3.3 and later), whose content survives retries and clears."""
    store = context.get("task_state_store")
    if store is None:
        log.info("This Airflow has no Storage tab (3.3 is the first that has it): the summary is in this log and in the XCom.")
        return
    store.set("cost", summary_line(CostTally.from_json(published["cost_tally"])))
    for name, value in published.items():
        store.set(name, value)


def _describe_assets(context: Context, outlets: Iterable[Any], published: Mapping[str, Any]) -> None:
    """Add to the ``extra`` of every outlet asset's event."""
    for outlet in outlets:
        if isinstance(outlet, Asset):
            event = context["outlet_events"][outlet]
            event.extra = {**event.extra, **published}

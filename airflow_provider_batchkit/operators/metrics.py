"""Airflow metrics of batches. They are best effort: an error of a metric is logged and fails no task.

=================================== ======= ======================== ==============================================================
name                                kind    tags                     what
=================================== ======= ======================== ==============================================================
``batchkit.submitted_requests``     counter dag_id, task_id          requests that an attempt of a submit sent
``batchkit.rows.<status>``          counter dag_id, task_id, status  rows per outcome
``batchkit.requests``               counter dag_id, task_id, model   billed requests
``batchkit.unpriced_requests``      counter dag_id, task_id, model   billed requests of a model without a known price
``batchkit.tokens.input``           counter dag_id, task_id, model   likewise ``output``, ``cache_write``, ``cache_read``
``batchkit.batch_cost_microusd``    counter dag_id, task_id, model   cost in millionths of a dollar, rounded once per task and model
``batchkit.standard_cost_microusd`` counter dag_id, task_id, model   the same at the standard price
``batchkit.batch_latency``          timer   dag_id, task_id          from a batch's creation to its end, by the API's clock
=================================== ======= ======================== ==============================================================

A batch counts when it lands for the first time: a fetch that runs again adds nothing, so counters add up to the bill. A worker that dies
between the landing and its metrics leaves a gap in them; the ledger has none. Plain StatsD drops the tags.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import Stats

from airflow_provider_batchkit.model import CostTally

if TYPE_CHECKING:
    from airflow_provider_batchkit.landing import BatchFigures

log = logging.getLogger(__name__)


def count_submitted(ti: Any, requests: int) -> None:
    """Count the requests that an attempt sent."""
    try:
        if requests:
            Stats.incr("batchkit.submitted_requests", requests, tags=_tags(ti))
    except Exception:  # the requests are sent and journaled, so an error of the metrics backend must not fail the task
        log.warning("The metrics of this submit could not be sent", exc_info=True)


def count_landed(ti: Any, batches: Iterable[BatchFigures]) -> None:
    """Count batches that have landed for the first time."""
    try:
        _count_landed(_tags(ti), list(batches))
    except Exception:  # the results have landed, so an error of the metrics backend must not fail the task
        log.warning("The metrics of this landing could not be sent", exc_info=True)


def _count_landed(tags: dict[str, str], batches: list[BatchFigures]) -> None:
    rows: Counter[str] = Counter()
    for batch in batches:
        rows.update(batch.counts)
        if batch.latency_s is not None:
            Stats.timing("batchkit.batch_latency", timedelta(seconds=batch.latency_s), tags=tags)
    for status, count in sorted(rows.items()):
        Stats.incr(f"batchkit.rows.{status}", count, tags={**tags, "status": status})
    for model, line in CostTally.sum(batch.tally for batch in batches).models.items():
        counts = {
            "requests": line.requests,
            "unpriced_requests": line.requests if line.batch_cost_usd is None else 0,
            "tokens.input": line.input_tokens,
            "tokens.output": line.output_tokens,
            "tokens.cache_write": line.cache_write_5m_tokens + line.cache_write_1h_tokens,
            "tokens.cache_read": line.cache_read_tokens,
            "batch_cost_microusd": _micro(line.batch_cost_usd),
            "standard_cost_microusd": _micro(line.standard_cost_usd),
        }
        for name, count in counts.items():
            if count:
                Stats.incr(f"batchkit.{name}", count, tags={**tags, "model": model})


def _tags(ti: Any) -> dict[str, str]:
    return {"dag_id": ti.dag_id, "task_id": ti.task_id}


def _micro(usd: Decimal | None) -> int:
    """The cost in millionths of a dollar; 0 for an unknown cost."""
    return 0 if usd is None else int(usd.scaleb(6).to_integral_value(ROUND_HALF_EVEN))

"""The answers of the routes: the ledger's values as JSON. Money is exact text, times are ISO 8601 in UTC, spans are seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

from airflow_provider_batchkit.cost.budget import BudgetStatus
from airflow_provider_batchkit.ledger.overview import BatchView, JobDetail, JobView, Usual
from airflow_provider_batchkit.ledger.spending import Latency, Spent, ToldAlert
from airflow_provider_batchkit.links import console_url
from airflow_provider_batchkit.model import COST_QUANTUM, BatchSnapshot, RequestStatus, format_usd_exact
from airflow_provider_batchkit.request.failed import FailedRows

#: the longest life of a batch, from its creation (API documentation)
LIFE = timedelta(hours=24)


def plain(value: Any) -> Any:
    """A value in the types of JSON, for the page and for the commands."""
    match value:
        case Decimal():
            return format_usd_exact(value)
        case datetime() | date():
            return value.isoformat()
        case timedelta():
            return round(value.total_seconds(), 3)
        case Mapping():
            return {str(name): plain(one) for name, one in value.items()}
        case tuple() | list():
            return [plain(one) for one in value]
        case _:
            return value


def job_json(one: JobView) -> dict[str, Any]:
    """A line of the history."""
    values: dict[str, Any] = plain({**asdict(one), "savings_usd": one.savings_usd})
    return values


def open_job_json(ledger: str, one: JobView, batches: list[BatchView], usual: Usual) -> dict[str, Any]:
    """A job in flight, with its open batches."""
    expected = None if usual.cost_usd is None else (usual.cost_usd * one.open_requests).quantize(COST_QUANTUM)
    if expected is not None and one.open_bound_usd is not None:
        expected = min(expected, one.open_bound_usd)
    return {
        **job_json(one),
        "ledger": ledger,
        "models": list(one.models or usual.models),
        "models_of_this_job": bool(one.models),
        "expected_usd": plain(expected),
        "expires_at": plain(None if one.oldest_at is None else one.oldest_at + LIFE),
        "open": [batch_json(batch) for batch in batches],
    }


def batch_json(one: BatchView) -> dict[str, Any]:
    """A batch, with its times."""
    record = one.record
    return {
        "batch_id": record.batch_id,
        "shard": record.shard,
        "round": record.round,
        "state": one.state,
        "requests": record.requests,
        "conn_id": record.anthropic_conn_id,
        "intended_at": plain(record.intended_at),
        "submitted_at": plain(one.submitted_at),
        "created_at": plain(record.created_at),
        "ended_at": plain(record.ended_at),
        "landed_at": plain(record.landed_at),
        "table": record.landed_table,
        "note": record.note,
        "cost_usd": plain(one.batch_cost_usd),
        "bound_usd": plain(one.bound_usd),
        "budget": one.budget,
        "console_url": None if record.batch_id is None else console_url(record.batch_id),
        # the commands with which a person decides a doubt that cannot be proved
        "settle": record.settle_command if one.state == "doubt" else None,
    }


def detail_json(ledger: str, one: JobDetail, failed: list[FailedRows], others: int, *, show_content: bool) -> dict[str, Any]:
    """One job with all its details."""
    return {
        **job_json(one.job),
        "ledger": ledger,
        "bills": {model: plain({**asdict(tally), "savings_usd": tally.savings_usd}) for model, tally in one.bills.items()},
        "batch_list": [
            {
                **batch_json(batch),
                "counts": json.loads(one.counts[batch.record.shard]) if batch.record.shard in one.counts else None,
                "landing_s": one.landing_s.get(batch.record.shard),
            }
            for batch in one.batches
        ],
        "rendering_s": one.rendering_s,
        "unchanged_rows": one.unchanged_rows,
        "tables": [{"table": table, "rows": rows} for table, rows in one.tables],
        "failures": [_failed_json(row, show_content=show_content) for row in failed],
        "failures_not_shown": others,
    }


def _failed_json(one: FailedRows, *, show_content: bool) -> dict[str, Any]:
    """Rows that failed for one reason. The API's own error messages are always shown; a message about an answer may quote the answer."""
    shown = show_content or one.status == RequestStatus.ERRORED.value
    return {
        **plain(asdict(one)),
        "advice": one.advice,
        "message": one.message if shown else None,
        "message_hidden": bool(one.message) and not shown,
    }


def spent_json(one: Spent) -> dict[str, Any]:
    """A line of the spending."""
    values: dict[str, Any] = plain({**asdict(one), "savings_usd": one.savings_usd})
    return values


def budget_json(one: BudgetStatus, alerts: Sequence[ToldAlert] = ()) -> dict[str, Any]:
    """A budget in its present window, with the alerts that were sent in this window."""
    told = [{"percent": alert.percent, "told_at": alert.told_at} for alert in alerts]
    rest = {"remaining_usd": one.remaining_usd, "remaining_tokens": one.remaining_tokens, "alerts": told}
    values: dict[str, Any] = plain({**asdict(one), **rest})
    return values


def latency_json(one: Latency) -> dict[str, Any]:
    """A line of the latencies of batches."""
    values: dict[str, Any] = plain(asdict(one))
    return values


def progress_json(one: BatchSnapshot) -> dict[str, Any]:
    """What the API shows of a batch."""
    counts = one.counts
    return {
        "status": one.processing_status,
        "total": counts.total,
        "done": counts.done,
        "errored": counts.errored,
        "expired": counts.expired,
        "canceled": counts.canceled,
        "expires_at": plain(one.expires_at),
        "ended_at": plain(one.ended_at),
    }

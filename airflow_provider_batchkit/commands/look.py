"""``jobs``, ``batches``, ``failed`` and ``spend``: they print what is in the ledger."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.commands.ledgers import open_ledger, reason_of
from airflow_provider_batchkit.commands.output import show, show_document, text_of
from airflow_provider_batchkit.exceptions import BatchInputError

if TYPE_CHECKING:
    from airflow_provider_batchkit.ledger.overview import BatchView, Filter, JobView
    from airflow_provider_batchkit.model import BatchSnapshot

#: the longest life of a batch, from its creation (API documentation)
_LIFE = timedelta(hours=24)
_SPENT_DAYS = 30


def jobs(given: argparse.Namespace) -> int:
    """Print one line per job."""
    with open_ledger(given.conn_id) as ledger:
        page = ledger.overview.jobs(_filter(given, model=given.model, failed=given.failed), limit=given.limit)
    show([_job_row(one) for one in page.jobs], given.output, empty="No job fits. A job is there as soon as its task has begun to submit.")
    if page.next is not None:
        print(f"There are more; --limit shows more than {given.limit}, --until older ones.", file=sys.stderr)
    return 0


def _job_row(one: JobView) -> dict[str, Any]:
    return {
        "job": one.job_id,
        "dag_id": one.dag_id,
        "run_id": one.run_id,
        "task_id": one.task_id if one.map_index < 0 else f"{one.task_id}[{one.map_index}]",
        "state": one.state,
        "began_at": one.began_at,
        "batches": one.batches,
        "requests": one.requests,
        "failed": one.failed - one.unfinished,
        "unfinished": one.unfinished,
        "models": one.models,
        "cost_usd": one.batch_cost_usd if one.batches.get("landed") else None,
        "savings_usd": one.savings_usd if one.batches.get("landed") else None,
        "open_at_most_usd": one.open_bound_usd if one.open_requests else None,
        "budgets": one.budgets,
    }


def batches(given: argparse.Namespace) -> int:
    """Print one line per batch; for running ones with what the API's list shows."""
    with open_ledger(given.conn_id) as ledger:
        found = ledger.overview.batches(_filter(given), only_open=given.only_open, limit=given.limit)
    seen = _seen(found) if given.only_open else {}
    now = datetime.now(UTC)
    empty = "Nothing is in flight." if given.only_open else "No batch fits."
    show([_batch_row(one, seen.get(one.record.batch_id or ""), now, given.only_open) for one in found], given.output, empty=empty)
    return 0


def _batch_row(one: BatchView, snapshot: BatchSnapshot | None, now: datetime, only_open: bool) -> dict[str, Any]:
    record = one.record
    who = {
        "batch": record.batch_id,
        "dag_id": one.dag_id,
        "run_id": one.run_id,
        "task_id": one.task_id if one.map_index < 0 else f"{one.task_id}[{one.map_index}]",
        "job": record.job_id,
        "shard": record.shard,
        "state": one.state,
        "requests": record.requests,
    }
    if not only_open:
        return {
            **who,
            "created_at": record.created_at,
            "ended_at": record.ended_at,
            "landed_at": record.landed_at,
            "cost_usd": one.batch_cost_usd,
        }
    created = record.created_at
    return {
        **who,
        "api_status": None if snapshot is None else snapshot.processing_status,
        # this shows batches that ended long ago and have not landed: their task may have failed
        "ended_ago": None if snapshot is None or snapshot.ended_at is None else now - snapshot.ended_at,
        "done": None if snapshot is None else snapshot.counts.done,
        "age": now - (created or record.intended_at),
        "left": None if created is None else max(created + _LIFE - now, timedelta(0)),
        "at_most_usd": one.bound_usd,
        "budget": one.budget,
    }


def _seen(found: list[BatchView]) -> Mapping[str, BatchSnapshot]:
    """What the API shows of running batches, with one list call per connection. A connection that cannot be used is reported."""
    import anthropic
    from airflow.providers.common.compat.sdk import AirflowException

    from airflow_provider_batchkit.api.looking import listed
    from airflow_provider_batchkit.commands.ledgers import find_connection
    from airflow_provider_batchkit.exceptions import BatchKitError
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

    seen = dict[str, "BatchSnapshot"]()
    for conn_id in sorted({one.record.anthropic_conn_id for one in found}):
        wanted = {
            one.record.batch_id: one.record.created_at for one in found if one.record.batch_id and one.record.anthropic_conn_id == conn_id
        }
        if not wanted:
            continue
        try:
            find_connection(conn_id)
            seen.update(listed(BatchKitHook(conn_id).kit, wanted))
        except (anthropic.AnthropicError, AirflowException, BatchKitError) as e:
            print(f"How far the batches of the connection {conn_id!r} are cannot be told now: {reason_of(e)}.", file=sys.stderr)
    return seen


def failed(given: argparse.Namespace) -> int:
    """Print why rows of a job failed, or each failed row."""
    from airflow_provider_batchkit.hooks.settings import configured_failures

    if not given.rows and (given.status or given.error_type):
        raise BatchInputError("--status and --error-type choose among rows: give --rows, too.")
    with open_ledger(given.conn_id) as ledger:
        overview = ledger.overview
        if overview.dag_of(given.job) is None:
            raise BatchInputError(f"The ledger has no job {given.job}. `jobs` lists those that it has.")
        empty = "Every row that has landed has a whole answer."
        if given.rows:
            rows = overview.failed_page(given.job, limit=given.limit + 1, status=given.status, error_type=given.error_type)
            fits_none = "No row without a whole answer has this status and type." if given.status or given.error_type else empty
            show(rows[: given.limit], given.output, empty=fits_none)
            if len(rows) > given.limit:
                print(f"There are more; --limit shows more than {given.limit}.", file=sys.stderr)
            return 0
        reasons, others = overview.failed_rows(given.job, configured_failures())
    rows = [
        {
            "rows": one.rows,
            "status": one.status,
            "error_type": one.error_type,
            "message": one.message,
            "keys": one.keys,
            "what_helps": one.advice,
        }
        for one in reasons
    ]
    show(rows, given.output, empty=empty)
    if others:
        print(f"{others:,} more rows failed with other messages; --rows lists them.", file=sys.stderr)
    return 0


def spend(given: argparse.Namespace) -> int:
    """Print what landed batches cost, and the budgets."""
    since = given.since or datetime.now(UTC) - timedelta(days=_SPENT_DAYS)
    with open_ledger(given.conn_id) as ledger:
        books = ledger.spending
        spent = books.spent(given.by, since=since, until=given.until, dag_ids=None if given.dag_id is None else [given.dag_id])
        budgets = [(one, books.told_alerts(one)) for one in books.budgets()]
    rows: list[dict[str, Any]] = [
        {
            given.by: one.name,
            "batches": one.batches,
            "requests": one.requests,
            "input_tokens": one.input_tokens,
            "output_tokens": one.output_tokens,
            "cost_usd": one.batch_cost_usd,
            "standard_usd": one.standard_cost_usd,
            "savings_usd": one.savings_usd,
            "unpriced_requests": one.unpriced_requests,
        }
        for one in spent
    ]
    caps: list[dict[str, Any]] = [
        {
            "budget": one.name,
            "window": one.window,
            "cap_usd": one.cap_usd,
            "spent_usd": one.spent_usd,
            "reserved_usd": one.reserved_usd,
            "left_usd": one.remaining_usd,
            "cap_tokens": one.cap_tokens,
            "spent_tokens": one.spent_tokens,
            "reserved_tokens": one.reserved_tokens,
            "left_tokens": one.remaining_tokens,
            "ends_at": one.ends_at,
            "alerts": {alert.percent: alert.told_at for alert in alerts},
        }
        for one, alerts in budgets
    ]
    if given.output in ("json", "yaml"):
        show_document({"spend": rows, "budgets": caps}, given.output)
        return 0
    if len(rows) > 1:
        rows.append({given.by: "all", **{name: _total(rows, name) for name in list(rows[0])[1:]}})
    show(rows, given.output, empty=f"No batch that was created since {since:%Y-%m-%d} has landed.")
    if caps:
        print()
        told = [[f"{alert.percent} at {text_of(alert.told_at)}" for alert in alerts] for _, alerts in budgets]
        show([{**row, "alerts": alerts} for row, alerts in zip(caps, told, strict=True)], given.output, empty="")
    return 0


def _total(rows: list[dict[str, Any]], name: str) -> int | Decimal | None:
    values = [row[name] for row in rows]
    return None if None in values else sum(values)


def _filter(given: argparse.Namespace, **more: Any) -> Filter:
    from airflow_provider_batchkit.ledger.overview import Filter

    return Filter(
        dag_id=given.dag_id,
        run_id=given.run_id,
        task_id=given.task_id,
        state=given.state,
        since=given.since,
        until=given.until,
        **more,
    )

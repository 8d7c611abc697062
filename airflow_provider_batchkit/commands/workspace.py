"""``orphans`` and ``cancel``: commands for the batches that the API shows."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from airflow_provider_batchkit.commands.ledgers import confirmed, find_connection, ledger_conn_id, open_ledger, reason_of
from airflow_provider_batchkit.commands.output import show
from airflow_provider_batchkit.exceptions import BatchInputError, BatchUnavailableError
from airflow_provider_batchkit.hooks.settings import ledger_conn_ids
from airflow_provider_batchkit.progress import span_text

if TYPE_CHECKING:
    from airflow_provider_batchkit.kit import BatchKit
    from airflow_provider_batchkit.ledger.overview import BatchView
    from airflow_provider_batchkit.model import BatchSnapshot

#: days for which the API keeps results (API documentation)
_RESULTS_DAYS = 29
_LOOKED_UP = 500


def orphans(given: argparse.Namespace) -> int:
    """Print the batches of the workspace that no ledger knows."""
    since = given.since or datetime.now(UTC) - timedelta(days=_RESULTS_DAYS)
    given_names = [name.strip() for name in (given.conn_id or "").split(",") if name.strip()]
    names = given_names or ledger_conn_ids() or [ledger_conn_id(None)]
    connections, doubts = set[str](), list["BatchView"]()
    for name in names:
        # a ledger that cannot be read is an error: all of its batches would seem to be orphans
        with open_ledger(name) as ledger:
            overview = ledger.overview
            connections.update(overview.connections())
            doubts.extend(overview.in_doubt())
    if given.anthropic_conn_id:
        connections = {given.anthropic_conn_id}
    if not connections:
        raise BatchInputError("The ledger names no connection to the API yet. Give one with --anthropic-conn-id.")
    found = dict[str, tuple[str, "BatchSnapshot"]]()
    for conn_id in sorted(connections):
        kit = _kit(conn_id)
        for snapshot in _listed(kit, since, conn_id):
            found.setdefault(snapshot.batch_id, (conn_id, snapshot))
    # the ledgers are read after the list, so that they contain batches that were submitted meanwhile
    for name in names:
        with open_ledger(name) as ledger:
            ids = list(found)
            for start in range(0, len(ids), _LOOKED_UP):
                for known in ledger.claims(ids[start : start + _LOOKED_UP]):
                    del found[known]
    now = datetime.now(UTC)
    rows = [
        {
            "batch": snapshot.batch_id,
            "anthropic_conn_id": conn_id,
            "status": snapshot.processing_status,
            "requests": snapshot.counts.total,
            "done": snapshot.counts.done,
            "created_at": snapshot.created_at,
            "age": now - snapshot.created_at,
            "may_be": [str(one.record) for one in doubts if _may_be(one, snapshot)],
        }
        for conn_id, snapshot in found.values()
    ]
    show(rows, given.output, empty=f"Every batch that the workspace shows since {since:%Y-%m-%d} is in the ledger.")
    return 0


def _may_be(one: BatchView, snapshot: BatchSnapshot) -> bool:
    """Whether a batch may belong to a shard in doubt. The shard's own task settles that by proof."""
    return snapshot.counts.total == one.record.requests and snapshot.created_at > one.record.intended_at - timedelta(minutes=15)


def _listed(kit: BatchKit, since: datetime, conn_id: str) -> list[BatchSnapshot]:
    import anthropic

    try:
        return list(kit.recent(since))
    except anthropic.AnthropicError as e:
        raise BatchInputError(f"The batches of the connection {conn_id!r} cannot be listed: {reason_of(e)}.") from e


def cancel(given: argparse.Namespace) -> int:
    """Cancel a batch, after printing what that means and asking for confirmation."""
    import anthropic

    from airflow_provider_batchkit.api.cancel import Fate
    from airflow_provider_batchkit.api.polling import ENDED

    one = _owner(given)
    conn_id: str | None = given.anthropic_conn_id or (None if one is None else one.record.anthropic_conn_id)
    if conn_id is None:
        raise BatchInputError(
            f"The ledger has no batch {given.batch}. To cancel it all the same, name the connection to the API: --anthropic-conn-id. "
            "Nothing was changed."
        )
    kit = _kit(conn_id)
    try:
        shown = kit.get(given.batch)
    except (anthropic.AnthropicError, BatchUnavailableError) as e:
        raise BatchInputError(f"{reason_of(e)}. Nothing was changed.") from e
    if shown.processing_status == ENDED:
        raise BatchInputError(f"Batch {given.batch} has ended already: there is nothing to cancel. Nothing was changed.")
    whose = "no job of this ledger" if one is None else f"task {one.task_id} of run {one.run_id} of DAG {one.dag_id}"
    done = shown.counts.done
    age = span_text((datetime.now(UTC) - shown.created_at).total_seconds())
    print(
        f"Batch {given.batch} belongs to {whose}: {done:,} of {shown.counts.total:,} requests are done, and it is {age} old. It is "
        "canceled. What it has answered by then stays answered, is billed and lands; its other rows are `canceled`, and a further "
        "round of the task (max_rounds) or a task with only_failed_of asks them again."
    )
    if not given.yes and not confirmed():
        print("Nothing was changed.")
        return 1
    (end,) = kit.cancel_all(given.batch)
    if end.fate is Fate.FAILED:
        raise BatchInputError(f"Batch {given.batch} could not be canceled: {end.reason}. If it still runs, it runs on and is billed.")
    print("It had ended by then." if end.fate is Fate.ENDED else "It is being canceled; the API ends it within a minute or so.")
    return 0


def _owner(given: argparse.Namespace) -> BatchView | None:
    if given.conn_id is None and given.anthropic_conn_id is not None:
        return None
    with open_ledger(given.conn_id) as ledger:
        return ledger.overview.batch(given.batch)


def _kit(conn_id: str) -> BatchKit:
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

    find_connection(conn_id)
    return BatchKitHook(conn_id).kit

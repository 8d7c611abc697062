"""``settle JOB SHARD --void | --is BATCH``: a person decides whether a shard was accepted, and as which batch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from airflow_provider_batchkit.commands.ledgers import confirmed, find_connection, open_ledger
from airflow_provider_batchkit.exceptions import BatchInputError

if TYPE_CHECKING:
    from airflow_provider_batchkit.jobs.decide import Decision
    from airflow_provider_batchkit.ledger import Ledger


def settle(given: argparse.Namespace) -> int:
    """Print what the decision means, ask for confirmation, and carry it out."""
    if given.void == (given.batch_id is not None):
        raise BatchInputError("Say what became of the shard: either --void or --is BATCH. Nothing was changed.")
    with open_ledger(given.conn_id, migrate=True) as ledger:
        decision = _weigh(ledger, given)
        print("\n".join(decision.consequences))
        if not given.yes and not confirmed():
            print("Nothing was changed.")
            return 1
        decision.carry_out()
        print("Done. Clear the task that waits for it, or let its retry go on.")
    return 0


def _weigh(ledger: Ledger, given: argparse.Namespace) -> Decision:
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
    from airflow_provider_batchkit.jobs.decide import decide_is, decide_void

    record = next((b for b in ledger.batches(given.job) if b.shard == given.shard), None)
    if record is None:
        raise BatchInputError(f"The ledger has no shard {given.shard} of job {given.job}. Nothing was changed.")
    if given.void:
        return decide_void(ledger, record)
    conn_id = given.anthropic_conn_id or record.anthropic_conn_id
    find_connection(conn_id)
    return decide_is(BatchKitHook(conn_id).kit, ledger, record, given.batch_id)

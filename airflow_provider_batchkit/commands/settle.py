"""``settle JOB SHARD --void | --is BATCH``: a person decides what became of a shard."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from airflow_provider_batchkit.exceptions import BatchInputError, BatchKitError

if TYPE_CHECKING:
    from airflow_provider_batchkit.jobs.decide import Decision
    from airflow_provider_batchkit.ledger import Ledger


def parser() -> argparse.ArgumentParser:
    """All arguments."""
    root = argparse.ArgumentParser(prog="python -m airflow_provider_batchkit", description="Message batches of Airflow tasks.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    settle = commands.add_parser(
        "settle",
        help="decide what became of a shard that nothing proves",
        description="Decides what became of a shard whose POST nobody saw end, or whose batch holds another's results. It says what it "
        "will do and what that may cost, and asks.",
    )
    settle.add_argument("job", metavar="JOB", help="id of the job, as the task's log names it")
    settle.add_argument("shard", metavar="SHARD", type=int, help="number of the shard in the job")
    choice = settle.add_mutually_exclusive_group(required=True)
    choice.add_argument("--void", action="store_true", help="it was never accepted: its rows are asked again")
    choice.add_argument("--is", dest="batch_id", metavar="BATCH", help="this batch is its own")
    settle.add_argument("--sql-conn-id", required=True, metavar="CONN", help="Airflow connection of the ledger: the task's sql_conn_id")
    settle.add_argument("--anthropic-conn-id", metavar="CONN", help="with --is: connection to look with, by default the shard's own")
    settle.add_argument("--yes", action="store_true", help="do not ask")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """0: decided; 1: refused or not confirmed; 2: the arguments make no sense."""
    given = parser().parse_args(arguments)
    from airflow.providers.common.compat.sdk import AirflowException

    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        return _settle(given)
    except (BatchKitError, AirflowException) as e:
        print(e, file=sys.stderr)
        return 1


def _settle(given: argparse.Namespace) -> int:
    from airflow_provider_batchkit.hooks.sql import sql_engine
    from airflow_provider_batchkit.ledger import Ledger

    _find(given.sql_conn_id)
    with sql_engine(given.sql_conn_id) as engine:
        ledger = Ledger(engine)
        if not ledger.exists():
            raise BatchInputError(f"The connection {given.sql_conn_id!r} has no ledger. Nothing was changed.")
        ledger.ensure()
        decision = _weigh(ledger, given)
        print("\n".join(decision.consequences))
        if not given.yes and not _confirmed():
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
    _find(conn_id)
    return decide_is(BatchKitHook(conn_id).kit, ledger, record, given.batch_id)


def _find(conn_id: str) -> None:
    """Let the hooks find a connection wherever Airflow has it: outside a task they look into the environment and secrets backends alone.

    :raises AirflowNotFoundException: when it is nowhere
    """
    from airflow.models.connection import Connection  # the metadata database's own; the task SDK's looks for a supervisor

    found = Connection.get_connection_from_secrets(conn_id)
    os.environ.setdefault(f"AIRFLOW_CONN_{conn_id.upper()}", found.get_uri())


def _confirmed() -> bool:
    try:
        return input("Do it? Type yes: ").strip().lower() == "yes"
    except EOFError:
        return False

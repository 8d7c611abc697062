"""``ddl`` and ``prune``: they print the ledger's tables as SQL, and keep the tables small."""

from __future__ import annotations

import argparse

from airflow_provider_batchkit.commands.ledgers import confirmed, find_connection, ledger_conn_id, open_ledger
from airflow_provider_batchkit.commands.output import show_document
from airflow_provider_batchkit.exceptions import BatchInputError


def ddl(given: argparse.Namespace) -> int:
    """Print the statements that create a ledger. Nothing is run."""
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    from airflow_provider_batchkit.ledger.ddl import statements

    dialect = given.dialect or _dialect(given)
    try:
        found = statements(dialect)
    except (NoSuchModuleError, ArgumentError) as e:
        raise BatchInputError(f"SQLAlchemy knows no dialect {dialect!r}; postgresql, sqlite and mysql are some.") from e
    print(f"-- The ledger of airflow-provider-batchkit on {dialect}, for an empty database or schema.")
    print("-- Tasks need SELECT, INSERT, UPDATE and DELETE on these tables, and SELECT on the views.")
    for statement in found:
        print(f"\n{statement};")
    return 0


def _dialect(given: argparse.Namespace) -> str:
    from airflow_provider_batchkit.hooks.sql import sql_engine

    name = ledger_conn_id(given.conn_id)
    find_connection(name)
    with sql_engine(name) as engine:
        return str(engine.dialect.name)


def prune(given: argparse.Namespace) -> int:
    """Print what is deleted and what is kept, ask for confirmation, and delete."""
    with open_ledger(given.conn_id) as ledger:
        before = ledger.now() - given.older_than
        found = ledger.plan_pruning(before)
        done = 0
        if given.output in ("table", "plain"):
            _say(
                found.kept,
                f"{len(found.jobs):,} jobs without a sign of life since {before:%Y-%m-%d %H:%M} UTC",
                found.batches,
                found.source_rows,
            )
        if found.jobs and not given.yes and not confirmed():
            print("Nothing was deleted.")
            return 1
        done = sum(ledger.prune(job_id, before) for job_id in found.jobs)
    if given.output in ("json", "yaml"):
        kept = [{"jobs": jobs, "reason": reason} for reason, jobs in found.kept.most_common()]
        show_document({"pruned_jobs": done, "batches": found.batches, "rows": found.source_rows, "kept": kept}, given.output)
    elif found.jobs:
        left = len(found.jobs) - done
        print(f"Pruned {done:,} jobs." + (f" {left:,} others came to life meanwhile and were kept." if left else ""))
    return 0


def _say(kept: dict[str, int], what: str, batches: int, source_rows: int) -> None:
    print(f"To prune: {what}, with what the ledger knows of each of the {source_rows:,} rows that their {batches:,} batches answered.")
    print(
        "Their bills, the budgets' books and the history of jobs and batches stay. A task of theirs that is cleared fails and pays nothing."
    )
    for reason, jobs in sorted(kept.items(), key=lambda one: -one[1]):
        print(f"Kept: {jobs:,} equally old jobs, since {reason}.")

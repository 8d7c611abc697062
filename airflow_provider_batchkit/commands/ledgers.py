"""Finds the ledger and the connections of a command, with an error that helps where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow_provider_batchkit.exceptions import BatchInputError

if TYPE_CHECKING:
    from airflow_provider_batchkit.ledger import Ledger


@contextmanager
def open_ledger(conn_id: str | None, *, migrate: bool = False) -> Iterator[Ledger]:
    """The ledger of a connection, or of the one that the configuration names.

    :param migrate: whether to migrate it to the present version, as a task would
    :raises BatchInputError: when no ledger is named, it does not exist, it has another version, or the database cannot be reached
    """
    from sqlalchemy.exc import DBAPIError

    from airflow_provider_batchkit.hooks.ledger import ledger_at, ledger_place
    from airflow_provider_batchkit.ledger.tables import VERSION

    name = ledger_conn_id(conn_id)
    find_connection(name)
    try:
        with ledger_at(ledger_place(name, name)) as ledger:
            if not ledger.exists():
                raise BatchInputError(
                    f"The connection {name!r} has no ledger: no task has submitted through it yet. Name the ledger_conn_id of "
                    "the tasks, or else their sql_conn_id, with --conn-id. Nothing was changed."
                )
            if migrate:
                ledger.ensure()
            elif (found := ledger.version()) != VERSION:
                raise BatchInputError(
                    f"The ledger of the connection {name!r} is of version {found}, and this release reads version {VERSION}. "
                    + ("The next task that opens it migrates it." if found is None or found < VERSION else "Use the newer release.")
                )
            yield ledger
    except DBAPIError as e:
        raise BatchInputError(
            f"The ledger of the connection {name!r} cannot be read: {reason_of(e)}. Check that the database runs and that the connection's "
            f"host, login and schema are right (`airflow connections get {name}`)."
        ) from e


def reason_of(error: Exception) -> str:
    """The first line of a database driver's message, without the statement and its parameters."""
    words = str(getattr(error, "orig", None) or error).strip()
    return (words.splitlines() or [type(error).__name__])[0].rstrip(".")


def ledger_conn_id(given: str | None) -> str:
    """The connection that the user named, or else the configured one.

    :raises BatchInputError: when there is neither
    """
    from airflow.providers.common.compat.sdk import conf

    found = given or conf.get("batchkit", "ledger_conn_id", fallback=None)
    if not found:
        raise BatchInputError(
            "Which ledger? Name its connection with --conn-id, the ledger_conn_id of the tasks or else their sql_conn_id, or set "
            "ledger_conn_id in the section [batchkit] of Airflow's configuration."
        )
    return str(found)


def find_connection(conn_id: str) -> None:
    """Let the hooks find a connection wherever Airflow has it. Outside a task they look only into the environment and secrets backends.

    :raises AirflowNotFoundException: when Airflow has no such connection
    """
    from airflow.models.connection import Connection  # this one reads the metadata database; the task SDK's needs a supervisor

    found = Connection.get_connection_from_secrets(conn_id)
    os.environ.setdefault(f"AIRFLOW_CONN_{conn_id.upper()}", found.get_uri())


def confirmed() -> bool:
    """Ask the person, and return whether the answer was yes."""
    try:
        return input("Do it? Type yes: ").strip().lower() == "yes"
    except EOFError:
        return False

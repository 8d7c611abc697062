"""SQLAlchemy engines of Airflow's SQL connections.

Operators import this module when a DAG file is parsed, so SQLAlchemy and the hooks are imported where an engine is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowException, BaseHook, Connection

from airflow_provider_batchkit.exceptions import BatchInputError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

#: what to install for a connection type whose hook is missing
_EXTRAS = {"postgres": "postgres", "sqlite": "sqlite"}
#: the databases that this package knows, by the class of their hook; a hook of a user's own may derive from it
KINDS = {"PostgresHook": "postgres", "SqliteHook": "sqlite"}


@contextmanager
def sql_engine(conn_id: str) -> Iterator[Engine]:
    """A SQLAlchemy engine of a SQL connection. It keeps one connection open between uses, and looks whether that still lives before it
    is used again; at the end all are closed.

    :raises BatchInputError: when the connection is not of a SQL database, or the provider of its type is not installed
    """
    from sqlalchemy.pool import QueuePool

    from airflow_provider_batchkit.ledger import prepare_engine

    hook, _ = hook_named(conn_id)
    engine = prepare_engine(hook.get_sqlalchemy_engine({"poolclass": QueuePool, "pool_size": 1, "pool_pre_ping": True}))
    try:
        yield engine
    finally:
        engine.dispose()


def hook_named(conn_id: str) -> tuple[Any, str | None]:
    """The hook of a SQL connection, and the kind of its database where this package knows one: see :data:`KINDS`.

    :raises BatchInputError: when the connection is not of a SQL database, or the provider of its type is not installed
    """
    from airflow.providers.common.sql.hooks.sql import DbApiHook

    connection = BaseHook.get_connection(conn_id)
    hook = _hook_of(connection)
    if not isinstance(hook, DbApiHook):
        raise BatchInputError(f"The connection {conn_id!r} is a {type(hook).__name__}, not a SQL database. Nothing was sent.")
    kind = next((KINDS[cls.__name__] for cls in type(hook).__mro__ if cls.__name__ in KINDS), None)
    if kind == "postgres" and connection.extra_dejson.get("redshift"):
        kind = None  # PostgresHook reaches Redshift too, which is another database
    return hook, kind


def _hook_of(connection: Connection) -> Any:
    try:
        return connection.get_hook()
    except AirflowException as e:
        if not str(e).startswith("Unknown hook type"):
            raise
        kind = connection.conn_type
        package = f"airflow-provider-batchkit[{_EXTRAS[kind]}]" if kind in _EXTRAS else f"apache-airflow-providers-{kind}"
        raise BatchInputError(
            f"The connection {connection.conn_id!r} is of type {kind!r}, and no installed provider has a hook for it. Install "
            f"{'it' if kind in _EXTRAS else 'its provider, for most types'} with: pip install '{package}'. Nothing was sent."
        ) from e

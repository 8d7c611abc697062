"""The ledgers that the page reads. A ledger that cannot be read is reported, and does not hide the others.

Engines are kept for some minutes only, since a connection may be changed. They only read, wait for a lock for some seconds, and limit the
time of a statement, so that no request hangs for long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
from airflow.providers.common.compat.sdk import AirflowException
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DataError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from airflow_provider_batchkit.exceptions import BatchInputError, BatchKitError
from airflow_provider_batchkit.hooks.ledger import ledger_place
from airflow_provider_batchkit.hooks.sql import add_extra, hook_named, make_engine
from airflow_provider_batchkit.ledger import Ledger
from airflow_provider_batchkit.ledger.tables import VERSION

log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: seconds for which an engine is kept, and seconds without a further try after a database did not answer
_KEPT_S = 300.0
_LEFT_ALONE_S = 10.0
_CONNECT_S = 5
_STATEMENT_MS = 15_000
_LOCK_MS = 3_000


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a ledger cannot be shown, and what to do. It holds no secret: neither a password nor a statement."""

    conn_id: str
    #: ``missing`` (no connection), ``empty`` (no ledger yet), ``version``, ``down``
    kind: str
    message: str
    todo: str


class TroubleError(Exception):
    """A ledger cannot be shown."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.message)
        self.trouble = trouble


class UnfitValueError(ValueError):
    """A value that no row can have, such as a number that is too large for its column. The ledger itself can be read."""


class Ledgers:
    """Engines by connection, shared by all requests of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: dict[str, tuple[float, Engine]] = {}
        self._down: dict[str, tuple[float, Trouble]] = {}

    def read(self, conn_id: str, question: Callable[[Engine], _T]) -> _T:
        """The result of ``question`` on a ledger's engine.

        :raises TroubleError: when the ledger cannot be read
        :raises UnfitValueError: when the database refuses a value in the question
        """
        with self._lock:
            until, trouble = self._down.get(conn_id, (0.0, None))
        if trouble is not None and time.monotonic() < until:
            raise TroubleError(trouble)
        try:
            engine = self._engine(conn_id)
            _refuse_unreadable(conn_id, engine)
            return question(engine)
        except (DataError, OverflowError) as e:
            # a bad value in one user's request must not make every user's page report that the ledger is down
            raise UnfitValueError(type(e).__name__) from e
        except SQLAlchemyError as e:
            raise TroubleError(self._note(_down(conn_id, e))) from e
        except (BatchKitError, AirflowException) as e:
            raise TroubleError(self._note(_missing(conn_id, e))) from e

    def _note(self, trouble: Trouble) -> Trouble:
        log.warning("The Batches page cannot read the ledger of connection %r: %s", trouble.conn_id, trouble.message)
        with self._lock:
            self._down[trouble.conn_id] = (time.monotonic() + _LEFT_ALONE_S, trouble)
            kept = self._engines.pop(trouble.conn_id, None)
        if kept is not None:
            kept[1].dispose()
        return trouble

    def _engine(self, conn_id: str) -> Engine:
        with self._lock:
            kept = self._engines.get(conn_id)
            if kept is not None and kept[0] > time.monotonic():
                return kept[1]
        engine = _reading(conn_id)
        with self._lock:
            self._engines[conn_id] = (time.monotonic() + _KEPT_S, engine)
        if kept is not None:
            kept[1].dispose()
        return engine


def _reading(conn_id: str) -> Engine:
    """An engine that only reads, as far as the database can enforce it."""
    hook, kind = hook_named(conn_id)
    place = ledger_place(conn_id, conn_id)
    options: dict[str, Any] = {"pool_size": 2, "max_overflow": 8, "pool_timeout": _CONNECT_S}
    if kind == "postgres":
        add_extra(hook, {"connect_timeout": _CONNECT_S})
    engine = make_engine(hook, kind, poolclass=QueuePool, pool_pre_ping=True, **options)
    Ledger(engine, place.schema if kind == "postgres" else None)

    def on_connect(connection: Any, _record: Any) -> None:
        connection.execute(f"PRAGMA busy_timeout = {_LOCK_MS}")
        connection.execute("PRAGMA query_only = ON")

    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {_STATEMENT_MS}")

    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", on_connect)
    elif engine.dialect.name == "postgresql":
        sa.event.listen(engine, "begin", on_begin)
    return engine


def _refuse_unreadable(conn_id: str, engine: Engine) -> None:
    ledger = Ledger(engine)
    found = ledger.version()
    if found is None:
        raise TroubleError(
            Trouble(
                conn_id,
                "empty",
                f"There is no ledger in the database of the connection {conn_id} yet.",
                "It is made by the first task that submits. Run a DAG that has a SubmitBatchOperator or RunBatchOperator, and look again.",
            )
        )
    if found != VERSION:
        older = found < VERSION
        todo = "The next task that opens it migrates it." if older else "Install the newer release for Airflow's API server, too."
        raise TroubleError(
            Trouble(conn_id, "version", f"The ledger of {conn_id} is of version {found}; this page reads version {VERSION}.", todo)
        )


def _down(conn_id: str, error: SQLAlchemyError) -> Trouble:
    words = str(getattr(error, "orig", None) or error).strip().splitlines()
    reason = (words or [type(error).__name__])[0][:300]
    return Trouble(
        conn_id,
        "down",
        f"The ledger of the connection {conn_id} cannot be read now: {reason}",
        "Check that its database runs and can be reached from Airflow's API server. This page looks again by itself.",
    )


def _missing(conn_id: str, error: Exception) -> Trouble:
    todo = "Add the connection under Admin → Connections, or name others in [batchkit] page_ledger_conn_ids."
    if isinstance(error, BatchInputError):
        todo = "Mend the connection under Admin → Connections, or install its provider for Airflow's API server."
    return Trouble(conn_id, "missing", f"The connection {conn_id} cannot be used: {str(error).splitlines()[0][:300]}", todo)

"""Finds and opens the ledger of a task: in SQLite or PostgreSQL, beside the results or in a database of its own.

Operators import this module when a DAG file is parsed, so SQLAlchemy and the hooks are imported where a ledger is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseHook, conf

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.hooks.sql import hook_named, sql_engine

if TYPE_CHECKING:
    from airflow_provider_batchkit.landing import Warehouse
    from airflow_provider_batchkit.ledger import Ledger

#: databases that a ledger can lie in
_LEDGERS = ("sqlite", "postgres")
#: executors that run all tasks on the scheduler's machine
_ONE_MACHINE = frozenset({"LocalExecutor", "SequentialExecutor", "DebugExecutor"})
_HOW = (
    "The ledger needs a small transactional database, SQLite or PostgreSQL: name its connection in the task's ledger_conn_id, or for all "
    "tasks in [batchkit] ledger_conn_id of Airflow's configuration. Nothing was read or sent."
)


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a ledger."""

    conn_id: str
    #: the PostgreSQL schema; None for the connection's own
    schema: str | None = None

    def __str__(self) -> str:
        return f"the connection {self.conn_id!r}" + (f", schema {self.schema!r}" if self.schema else "")


def ledger_place(ledger_conn_id: str | None, sql_conn_id: str | None) -> Place:
    """The place of a task's ledger: as the task sets it, else as Airflow's configuration sets it, else beside its results.

    :raises BatchInputError: for a task whose results are files, when neither sets it
    """
    named = ledger_conn_id or conf.get("batchkit", "ledger_conn_id", fallback=None) or sql_conn_id
    if named is None:
        raise BatchInputError(f"The task has no sql_conn_id, and nothing says where its ledger lies. {_HOW}")
    return Place(named, conf.get("batchkit", "ledger_schema", fallback=None) or None)


@contextmanager
def ledger_at(place: Place, executor: str | None = None) -> Iterator[Ledger]:
    """The ledger at a place; its connections are closed after the block.

    :param executor: the task's own executor, where it has one
    :raises BatchInputError: when no ledger can lie there; nothing was read then
    """
    from airflow_provider_batchkit.ledger import Ledger

    hook, kind = hook_named(place.conn_id)
    if kind not in _LEDGERS:
        raise BatchInputError(f"No ledger can be kept in {place}, which is a {type(hook).__name__}. {_HOW}")
    if kind == "sqlite":
        _refuse_many_machines(place, executor)
        if place.schema is not None:
            raise BatchInputError(
                f"[batchkit] ledger_schema is {place.schema!r}, and the ledger is in {place.conn_id!r}, a SQLite file, which has no "
                "schemas. Take the setting away, or keep the ledger in PostgreSQL. Nothing was read or sent."
            )
    with sql_engine(place.conn_id) as engine:
        yield Ledger(engine, place.schema)


@contextmanager
def ledger_of(task: Any, context: Any = None) -> Iterator[Ledger]:
    """The ledger of a task with ``sql_conn_id`` and ``ledger_conn_id``.

    :param context: the context of a running task that may have a job. When the ledger does not know the task, the task is first looked for
        in the ledger that it would have without the setting
    :raises BatchInputError: when no ledger can lie there, or the task's jobs are in another ledger
    """
    place = ledger_place(task.ledger_conn_id, task.sql_conn_id)
    before = place if task.sql_conn_id is None else Place(task.sql_conn_id)
    with ledger_at(place, getattr(task, "executor", None)) as ledger:
        if context is not None and place != before:
            _refuse_left_behind(ledger, place, before, context["ti"])
        yield ledger


def results_of(task: Any) -> Warehouse | None:
    """The database of a task's result table; None where it is the ledger's own, and for a task without a table.

    :raises BatchInputError: when results cannot land there; nothing was read then
    """
    from airflow_provider_batchkit.landing.warehouse import warehouse_of

    if task.table is None:
        return None
    place = ledger_place(task.ledger_conn_id, task.sql_conn_id)
    if place.conn_id == task.sql_conn_id:
        return None
    hook, kind = hook_named(task.sql_conn_id)
    if kind is None:
        raise BatchInputError(
            f"Results cannot land in {task.sql_conn_id!r}, which is a {type(hook).__name__}. They land in DuckDB, MySQL, MariaDB, "
            "PostgreSQL, Snowflake and SQLite; for every other database write them to files with output_path, and load these with its own "
            "operator. Nothing was read or sent."
        )
    if kind in _LEDGERS and _address(place.conn_id) == _address(task.sql_conn_id):
        return None
    return warehouse_of(kind, task.sql_conn_id, hook.get_conn)


def _address(conn_id: str) -> str:
    return str(BaseHook.get_connection(conn_id).get_uri())


def _refuse_left_behind(ledger: Ledger, place: Place, before: Place, ti: Any) -> None:
    """:raises BatchInputError: when the task's jobs are in the ledger at its place before, and not in the one that is set now"""
    from airflow_provider_batchkit.ledger import Ledger

    if ledger.knows_task(ti.dag_id, ti.task_id):
        return
    _, kind = hook_named(before.conn_id)
    if kind not in _LEDGERS:
        return
    with sql_engine(before.conn_id) as engine:
        jobs = Ledger(engine).knows_task(ti.dag_id, ti.task_id)
    if not jobs:
        return
    move = (
        f"ALTER TABLE batchkit_… SET SCHEMA {place.schema} for each of its tables and views"
        if place.conn_id == before.conn_id
        else "for PostgreSQL pg_dump -t 'batchkit_*' and psql, for SQLite the .dump of its batchkit_ tables, with no task running"
    )
    raise BatchInputError(
        f"{place} is to hold the ledger, and it knows no job of {ti.dag_id}.{ti.task_id}; {before} has {jobs:,} of them. A ledger that is "
        f"left behind buys its rows again, so nothing was read or sent. Move its tables ({move}), or take ledger_conn_id and "
        "[batchkit] ledger_schema back. For a new beginning, which may pay again for what the old ledger holds, rename the old "
        "batchkit_job."
    )


def _refuse_many_machines(place: Place, executor: str | None) -> None:
    """:raises BatchInputError: when tasks run on several machines, each of which would have a SQLite file of its own"""
    # the setting is "LocalExecutor", "alias:module.Class", or several with commas, of which the first is the default
    name = executor or conf.get("core", "executor", fallback="LocalExecutor").split(",")[0].split("=")[-1]
    known = name.rpartition(":")[2].rpartition(".")[2].strip()
    if known not in _ONE_MACHINE and known.endswith("Executor"):
        raise BatchInputError(
            f"The ledger would lie in {place}, a SQLite file, and the {known} runs tasks on several machines, each with a file of its own: "
            "what one has sent, the others would buy again. Keep the ledger in PostgreSQL, with ledger_conn_id or [batchkit] "
            "ledger_conn_id. Nothing was read or sent."
        )

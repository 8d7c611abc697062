"""Submit, wait and fetch as one task group. Such stages form a chain: each reads the table that the one before it wrote."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from airflow.providers.common.compat.sdk import BaseOperator, TaskGroup

from airflow_provider_batchkit.operators.fetch import FetchBatchOperator, refuse_replace
from airflow_provider_batchkit.operators.submit import SubmitBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor

#: parameters that the stage itself sets on its tasks
_SET_BY_STAGE = frozenset({"batch_id", "table", "self", "kwargs"})


class BatchStage(TaskGroup):
    """The task group that :func:`batch_stage` makes, with its tasks ``submit``, ``wait`` and ``fetch``."""

    @property
    def submit(self) -> SubmitBatchOperator:
        return self._task("submit")  # type: ignore[no-any-return]

    @property
    def wait(self) -> BatchSensor:
        return self._task("wait")  # type: ignore[no-any-return]

    @property
    def fetch(self) -> FetchBatchOperator:
        return self._task("fetch")  # type: ignore[no-any-return]

    @property
    def output(self) -> Any:
        """The fetch's summary, for another task: rows, counts and the bill."""
        return self.fetch.output

    def _task(self, name: str) -> Any:
        return self.children[f"{self.group_id}.{name}"]


def batch_stage(
    group_id: str, *, table: str | None = None, outlets: Any = None, default_args: Mapping[str, Any] | None = None, **parameters: Any
) -> BatchStage:
    """A task group ``submit >> wait >> fetch``: ask about every row of a source, and land the answers in ``table`` or in files.

    Each further parameter goes to those of the three tasks that have a parameter of its name:

    - to ``submit``, all of :class:`SubmitBatchOperator`: the source, ``key``, ``prompt``, ``model``, ``max_cost_usd`` …
    - to ``wait``, all of :class:`BatchSensor` and of any sensor: ``deferrable``, ``poke_interval``, ``timeout`` …
    - to ``fetch``, all of :class:`FetchBatchOperator`: ``output_path``, ``write_disposition``, ``include_failed`` …

    So ``sql_conn_id``, ``ledger_conn_id``, ``anthropic_conn_id`` and ``cancel_on_kill`` are given once. ``stage_a >> stage_b`` runs one
    after the other.

    :param group_id: id of the group; its tasks are ``<group_id>.submit``, ``.wait`` and ``.fetch``
    :param table: result table of ``fetch``; it may be left out where ``output_path`` is given
    :param outlets: assets that ``fetch`` updates
    :param default_args: parameters that any task has (``retries``, ``pool``, ``queue`` …), for all three
    :raises TypeError: when the DAG is parsed, for a parameter that none of the three has
    :raises BatchInputError: when the DAG is parsed, for a ``replace`` with ``skip_unchanged``
    """
    tasks: dict[str, type[BaseOperator]] = {"submit": SubmitBatchOperator, "wait": BatchSensor, "fetch": FetchBatchOperator}
    names = {task: _parameters(operator) for task, operator in tasks.items()}
    unknown = sorted(set(parameters) - set().union(*names.values()))
    if unknown:
        raise TypeError(
            f"Stage {group_id}: {', '.join(unknown)} is a parameter of neither submit, wait nor fetch. What every task of Airflow has, "
            "such as retries, goes into default_args."
        )

    if parameters.get("skip_unchanged"):
        refuse_replace(f"Stage {group_id}", parameters.get("write_disposition", "merge"))

    def given(task: str) -> dict[str, Any]:
        return {name: value for name, value in parameters.items() if name in names[task]}

    stage = BatchStage(group_id=group_id, default_args=dict(default_args or {}))  # type: ignore[arg-type]  # its converter is generic
    with stage:
        submit = SubmitBatchOperator(task_id="submit", table=table, **given("submit"))
        wait = BatchSensor(task_id="wait", batch_id=submit.output, **given("wait"))
        fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table=table, outlets=outlets, **given("fetch"))
        wait >> fetch
    return stage


def _parameters(operator: type[BaseOperator]) -> set[str]:
    """Names of the parameters that an operator, or a class between it and :class:`BaseOperator`, adds to those of every task."""
    own = operator.__mro__[: operator.__mro__.index(BaseOperator)]
    return {name for cls in own if "__init__" in vars(cls) for name in inspect.signature(cls.__init__).parameters} - _SET_BY_STAGE  # type: ignore[misc]

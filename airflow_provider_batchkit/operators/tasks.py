"""Functions that the operators and the sensor share: the job's identity, the form of batch ids, and errors."""

from __future__ import annotations

import ast
import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException

from airflow_provider_batchkit.exceptions import BatchInputError, BatchKitError

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
    from airflow_provider_batchkit.ledger import JobRecord, Ledger


#: parameters that tell the instances of a mapped task apart, if they differ
_TELLING = (
    *("sql", "parameters", "input_path", "op_args", "op_kwargs", "prompt", "system", "request_params"),
    *("sql_conn_id", "source_conn_id", "input_conn_id", "table", "output_path"),
)


class OnConnection:
    """A task that calls the API over an Airflow connection. It loads the hook, and with it the API's client, at the first use."""

    anthropic_conn_id: str

    @cached_property
    def hook(self) -> BatchKitHook:
        from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

        return BatchKitHook(self.anthropic_conn_id)


@contextmanager
def batchkit_errors() -> Iterator[None]:
    """Turn this package's errors into Airflow's. A terminal error fails the task at once, whatever its ``retries``."""
    try:
        yield
    except BatchKitError as e:
        message = "\n".join([str(e), *getattr(e, "__notes__", ())])
        if e.submitted:
            message += f"\nBatches of this job that run and are billed: {', '.join(e.submitted)}."
        raise (AirflowException if e.retryable else AirflowFailException)(message) from e


def map_index_of(ti: Any) -> int:
    """The map index of a task instance; -1 when the task is not mapped."""
    return -1 if ti.map_index is None else int(ti.map_index)


def attempt_id_of(ti: Any) -> str:
    """The id of a task instance: a UUIDv7, new for every try. One without an id, as in users' tests, is the youngest attempt."""
    found = getattr(ti, "id", None)
    if found is not None:
        return str(found)
    milliseconds = f"{time.time_ns() // 1_000_000:012x}"
    return f"{milliseconds[:8]}-{milliseconds[8:]}-7{uuid.uuid4().hex[:3]}-{str(uuid.uuid4())[19:]}"


def job_of(context: Context, ledger: Ledger) -> JobRecord:
    """The job of a task instance in a ledger. It is the same on every attempt."""
    ti = context["ti"]
    return ledger.identify(ti.dag_id, ti.run_id, ti.task_id, map_index_of(ti))


def asked_by(task: Any, ti: Any) -> str | None:
    """A digest of what a mapped task instance asks, and of where it lands; None for a task that is not mapped.

    The list that a task is mapped over may have another order when it is cleared. Its map index alone does not identify it then.
    """
    if map_index_of(ti) < 0:
        return None
    told = [getattr(task, name, None) for name in _TELLING]
    if not getattr(task, "key", None) and isinstance(task.requests, list | tuple):
        # a prompt without a key is known by its position only
        told.append(task.requests)
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> str:
    """A text that is the same in every process."""
    return str(value) if isinstance(value, date | time_of_day | timedelta | Decimal | uuid.UUID) else type(value).__name__


def own_params(params: Any, dag: Any) -> dict[str, Any]:
    """The task's own ``params``, without the DAG's. Airflow merges the DAG's params into those that an operator's ``__init__`` gets. They
    are for the run's form and the templates, and the API would refuse requests that contain them.
    """
    get_param = getattr(params, "get_param", None)
    if get_param is None:
        return dict(params or {})

    def given_by_dag(name: str) -> bool:
        source = getattr(get_param(name), "source", None)
        if source is None:  # this Airflow's params do not record their source
            return dag is not None and name in dag.params and dag.params.get_param(name).value == get_param(name).value
        return bool(source == "dag")

    return {name: params[name] for name in params if not given_by_dag(name)}


def as_batch_ids(value: Any) -> list[str]:
    """A list of batch ids in order, without repeats, from one id or many as an XCom or a list rendered by Jinja gives them.

    :raises BatchInputError: for anything else
    """
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as e:
            raise BatchInputError(f"batch_id {value!r} is neither an id nor a list of ids.") from e
    ids = [value] if isinstance(value, str) else value
    if isinstance(ids, Mapping):
        raise BatchInputError(f"batch_id must be an id or a list of ids, not a mapping with {', '.join(map(str, ids))}.")
    if not isinstance(ids, Sequence):
        try:
            ids = list(ids)  # the outputs of a mapped task come as a lazy sequence
        except TypeError:
            raise BatchInputError(f"batch_id must be an id or a list of ids, not {value!r}.") from None
    flat: list[str] = []
    for item in ids:
        flat.extend(as_batch_ids(item) if not isinstance(item, str) else [item])
    bad = [item for item in flat if not item or item == "None"]
    if bad:
        raise BatchInputError("batch_id is empty. Did the submit task run, and is its output passed on?")
    return list(dict.fromkeys(flat))

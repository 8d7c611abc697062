"""What the operators and the sensor share: the job's identity, the form of batch ids, and errors."""

from __future__ import annotations

import ast
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, cast

from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException

from airflow_provider_batchkit.api.polling import validate_event
from airflow_provider_batchkit.exceptions import BatchInputError, BatchKitError
from airflow_provider_batchkit.jobs.waiting import WaitFor

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
    from airflow_provider_batchkit.ledger import JobRecord, Ledger


class OnConnection:
    """A task that calls the API over an Airflow connection. It loads the hook, and with it the API's client, when it first needs it."""

    anthropic_conn_id: str

    @cached_property
    def hook(self) -> BatchKitHook:
        from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

        return BatchKitHook(self.anthropic_conn_id)


@contextmanager
def batchkit_errors() -> Iterator[None]:
    """Tell Airflow which errors are worth a retry: a terminal one fails the task at once, whatever its ``retries``."""
    try:
        yield
    except BatchKitError as e:
        message = "\n".join([str(e), *getattr(e, "__notes__", ())])
        if e.submitted:
            message += f"\nBatches of this job that run and are billed: {', '.join(e.submitted)}."
        raise (AirflowException if e.retryable else AirflowFailException)(message) from e


def map_index_of(ti: Any) -> int:
    """Of a task instance; -1 for one that is not mapped."""
    return -1 if ti.map_index is None else int(ti.map_index)


def attempt_id_of(ti: Any) -> str:
    """The id of a task instance: a UUIDv7, new for every try. One that has none, as in tests of a user's, is the youngest attempt."""
    found = getattr(ti, "id", None)
    if found is not None:
        return str(found)
    milliseconds = f"{time.time_ns() // 1_000_000:012x}"
    return f"{milliseconds[:8]}-{milliseconds[8:]}-7{uuid.uuid4().hex[:3]}-{str(uuid.uuid4())[19:]}"


def attempt_began(ti: Any) -> datetime:
    """When the attempt of a task instance was made; now, for one that has no id."""
    found = getattr(ti, "id", None)
    if found is None:
        return datetime.now(UTC)
    return datetime.fromtimestamp(uuid.UUID(str(found)).int / (1 << 80) / 1000, UTC)


def job_of(context: Context, ledger: Ledger) -> JobRecord:
    """The job of a task instance in a ledger: the same on every attempt."""
    ti = context["ti"]
    return ledger.identify(ti.dag_id, ti.run_id, ti.task_id, map_index_of(ti))


@dataclass(frozen=True, slots=True)
class Leg:
    """A task's work between two waits, which Airflow calls deferrals."""

    #: when the attempt's first leg began; aware
    since: datetime
    #: requests that earlier legs have sent
    asked: int = 0
    #: what the leg before waited for; None in the first leg
    about: str | None = None
    #: the candidates that the leg before waited for
    waited_for: tuple[str, ...] = ()
    #: looking failed while the leg before waited
    broken: bool = False

    @classmethod
    def first(cls) -> Leg:
        """The first leg of an attempt."""
        return cls(datetime.now(UTC))

    @classmethod
    def after(cls, event: Any, *, since: str, asked: int, about: str) -> Leg:
        """The leg that a trigger's event begins.

        :param since: empty under ``dag.test()``, which drops what a deferral passes on
        :raises PollError: for an event that the trigger does not send
        """
        known = validate_event(event)
        broken = known["status"] == "error"
        waited_for = tuple(cast("Sequence[str]", known.get("batch_ids", ())))
        began = datetime.fromisoformat(since) if since else datetime.now(UTC)
        return cls(began, asked, about, waited_for if about == "doubt" else (), broken)


#: how much later than the trigger's own deadline Airflow ends a deferral that never came back
_GRACE = timedelta(minutes=5)
#: between two legs, however short the wait is
_LEAST_PAUSE = timedelta(seconds=5)
#: between two looks of a task whose trigger cannot look
_BROKEN_PAUSE = timedelta(minutes=1)


def wait_for(task: Any, context: Context, wait: WaitFor, leg: Leg, *, asked: int = 0) -> NoReturn:
    """Defer a task until what it waits for, and tell of it in the log and under the XCom key ``waits_for``.

    :param task: an operator with ``anthropic_conn_id`` and a method ``resume``
    :param asked: requests that this leg has sent
    :raises TaskDeferred: always
    """
    from airflow_provider_batchkit.triggers.batch import BatchTrigger

    now = datetime.now(UTC)
    task.log.info("%s", wait.why)
    context["ti"].xcom_push(key="waits_for", value=wait.to_json())
    # the ledger's clock may be behind this one: a leg must not be followed by the next one at once
    batch_ids, until = list(wait.batch_ids), max(wait.until, now + _LEAST_PAUSE)
    if leg.broken:
        # the trigger would come back at once
        batch_ids, until = [], min(until, now + _BROKEN_PAUSE)
    task.defer(
        trigger=BatchTrigger(
            batch_ids=batch_ids,
            anthropic_conn_id=task.anthropic_conn_id,
            poke_interval=float(getattr(task, "poke_interval", _BROKEN_PAUSE.total_seconds())),
            deadline=until.timestamp(),
            # candidates of a doubt may be somebody else's
            cancel_on_kill=getattr(task, "cancel_on_kill", False) and wait.about == "primer",
            first=len(batch_ids) > 1,
        ),
        method_name="resume",
        kwargs={"since": leg.since.isoformat(), "asked": leg.asked + asked, "about": wait.about},
        timeout=until - now + _GRACE,
    )
    raise AssertionError("defer raises")


def unseen_of(context: Context, leg: Leg) -> dict[str, datetime]:
    """What the leg before did not find, with since when; see :attr:`.WaitFor.unseen`. A retry begins anew, as its XComs do.

    They are read back from XCom, since ``dag.test()`` drops what a deferral passes on. A task instance of a user's own tests may have none.
    """
    ti = context["ti"]
    if leg.about is None or not hasattr(ti, "xcom_pull"):
        return {}
    told = ti.xcom_pull(task_ids=ti.task_id, key="waits_for", map_indexes=map_index_of(ti))
    unseen = told.get("unseen", {}) if isinstance(told, Mapping) else {}
    return {what: datetime.fromisoformat(since) for what, since in unseen.items()}


def waited(context: Context, leg: Leg) -> None:
    """The task waits no more: nobody is to read that it does."""
    if leg.about is not None:
        context["ti"].xcom_push(key="waits_for", value=None)


def own_params(params: Any, dag: Any) -> dict[str, Any]:
    """The ``params`` that a task was given itself. Airflow merges the DAG's own into what an operator's ``__init__`` gets under this name;
    they are for the run's form and the templates, and the API would refuse the requests for them.
    """
    get_param = getattr(params, "get_param", None)
    if get_param is None:
        return dict(params or {})

    def given_by_dag(name: str) -> bool:
        source = getattr(get_param(name), "source", None)
        if source is None:  # an Airflow whose params do not know where they come from
            return dag is not None and name in dag.params and dag.params.get_param(name).value == get_param(name).value
        return bool(source == "dag")

    return {name: params[name] for name in params if not given_by_dag(name)}


def as_batch_ids(value: Any) -> list[str]:
    """One id or many, as an XCom gives them or as Jinja renders a list, without repeats and in order.

    :raises BatchInputError: for anything else
    """
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as e:
            raise BatchInputError(f"batch_id {value!r} is neither an id nor a list of ids.") from e
    ids = [value] if isinstance(value, str) else value
    if isinstance(ids, Mapping) or not isinstance(ids, Sequence):
        try:
            ids = list(ids)  # a lazy sequence of a mapped task's outputs
        except TypeError:
            raise BatchInputError(f"batch_id must be an id or a list of ids, not {value!r}.") from None
    flat: list[str] = []
    for item in ids:
        flat.extend(as_batch_ids(item) if not isinstance(item, str) else [item])
    bad = [item for item in flat if not item or item == "None"]
    if bad:
        raise BatchInputError("batch_id is empty. Did the submit task run, and is its output passed on?")
    return list(dict.fromkeys(flat))

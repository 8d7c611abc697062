"""Batches that run for longer than somebody wants to hear of: told once, by the task that waits, and by nobody who holds a worker slot."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from airflow.providers.common.compat.sdk import TaskDeferred
from airflow.sdk.bases.notifier import BaseNotifier

from airflow_provider_batchkit import Budget
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.ledger.alerts import CLAIM_S
from airflow_provider_batchkit.ledger.tables import late
from airflow_provider_batchkit.operators import notifiers
from airflow_provider_batchkit.simulator import SimulatorProcess
from airflow_provider_batchkit.triggers.batch import BatchTrigger
from tests.databases import Database
from tests.integration.airflow_runs import run_source
from tests.integration.telling import Told
from tests.integration.test_fetch_operator import Task

SOON = timedelta(seconds=0.3)
ASKED: dict[str, Any] = {
    "sql": "SELECT 1 AS id, 'one' AS note UNION ALL SELECT 2, 'two'",
    "key": "id",
    "prompt": "{{ row.note }}",
    "max_tokens": 100,
    "max_requests_per_batch": 1,
    "sql_conn_id": "warehouse",
}


@pytest.fixture(autouse=True)
def running(api: SimulatorProcess) -> Iterator[None]:
    """Batches end when a test ends them."""
    api.set(clock="manual")
    yield
    api.set(clock="instant")


@pytest.fixture
def told(tmp_path: Path) -> Any:
    """What was told so far, a line each."""
    path = tmp_path / "told"
    return type("Lines", (), {"path": path, "lines": property(lambda _: path.read_text().splitlines() if path.exists() else [])})()


def submit(**parameters: Any) -> list[str]:
    from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

    found: list[str] = Task(SubmitBatchOperator, "submit", **{**ASKED, **parameters}).run()
    return found


def sensor(batch_ids: list[str], *told_by: Any, **parameters: Any) -> Task:
    from airflow_provider_batchkit.sensors.batch import BatchSensor

    given = {"poke_interval": 0.1, "notify_after": SOON, "sql_conn_id": "warehouse", **parameters}
    return Task(BatchSensor, "wait", batch_id=batch_ids, notifiers=list(told_by), **given)


def run_task(*told_by: Any, **parameters: Any) -> Task:
    from airflow_provider_batchkit.operators.batch import RunBatchOperator

    given = {**ASKED, "table": "answers", "poke_interval": 0.1, "notify_after": SOON}
    return Task(RunBatchOperator, "run", notifiers=list(told_by), **{**given, **parameters})


def event_of(deferred: TaskDeferred) -> dict[str, Any]:
    """The event of a deferral's trigger, as a triggerer makes it: from its serialized form, and through JSON."""
    path, kwargs = deferred.trigger.serialize()
    assert path.endswith("BatchTrigger")
    trigger = BatchTrigger(**json.loads(json.dumps(kwargs)))

    async def fire() -> Any:
        async with asyncio.timeout(20):
            return (await anext(trigger.run())).payload

    found: dict[str, Any] = json.loads(json.dumps(asyncio.run(fire())))
    return found


def resume(task: Task, deferred: Any, event: dict[str, Any] | None = None) -> Any:
    """The leg after a deferral."""
    return task.leg(deferred.method_name, event=event or event_of(deferred), **(deferred.kwargs or {}))


def waits(event: dict[str, Any] | None, deferred: Any) -> BatchTrigger:
    """The trigger of a task that waits on, for the same batches and until the same time."""
    assert isinstance(deferred, TaskDeferred)
    trigger = deferred.trigger
    assert isinstance(trigger, BatchTrigger)
    if event is not None:
        assert (trigger.batch_ids, trigger.deadline) == (event["batch_ids"], event["deadline"])
    return trigger


def age_claims(database: Database) -> None:
    """As if the claims had been made long ago."""
    with database.engine().begin() as connection:
        connection.execute(sa.update(late).values(claimed_at=datetime.now(UTC) - timedelta(seconds=CLAIM_S + 1)))


@pytest.mark.parametrize("kind", ["sensor", "run"])
def test_a_late_batch_is_told_once_with_the_numbers_and_a_link(
    home: Path, api: SimulatorProcess, told: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Not before its time; the task waits on with the same deadline, and ends as ever."""
    notifier = Told(told.path)
    if kind == "sensor":
        ids = submit()
        task = sensor(ids, notifier)
        first = task.run()
    else:
        task = run_task(notifier, cancel_on_kill=True)
        first = task.run()
        ids = first.trigger.batch_ids
    task.context["ti"].log_url = "http://airflow/task"
    api.end(ids[0])
    event = event_of(first)
    assert event["status"] == "late" and told.lines == []
    second = resume(task, first, event)
    trigger = waits(event, second)
    assert trigger.late_after is None and trigger.cancel_on_kill is (kind == "run")
    (line,) = told.lines
    assert line.startswith(f"Batches of d.{task.context['ti'].task_id} are late: 1 of 2 batches ended, 1 of 2 requests done, oldest ")
    assert ", expires in 23 h 59 min. http://airflow/task" in line and line in caplog.text
    api.end(ids[1])
    assert event_of(second)["status"] == "ended"
    ended = resume(task, second)
    assert ended["succeeded" if kind == "sensor" else "rows"] == 2
    assert len(told.lines) == 1


def test_numbers_are_there_for_notifiers_that_calculate(home: Path) -> None:
    """A function of the context is a notifier, too."""
    seen: list[Any] = []
    task = sensor(submit(), lambda context: seen.append(context["batchkit"]))
    first = task.run()
    resume(task, first)
    (facts,) = seen
    counted = {name: facts[name] for name in ("batches", "batches_ended", "requests", "requests_done", "batch_id")}
    assert counted == {"batches": 2, "batches_ended": 0, "requests": 2, "requests_done": 0, "batch_id": first.trigger.batch_ids[0]}
    assert 0.3 <= facts["age_s"] < 30 and facts["expires_at"] - datetime.now(UTC) < timedelta(hours=24)


def test_a_retry_a_restart_and_a_clear_do_not_tell_again(home: Path, told: Any) -> None:
    """The ledger knows that it was told: a first leg anew comes back once, tells nobody, and waits on."""
    ids = submit()
    for _ in range(3):
        task = sensor(ids, Told(told.path))
        first = task.run()
        assert waits(None, resume(task, first)).late_after is None
    assert len(told.lines) == 1


def test_a_batch_that_ends_in_time_is_not_told_of(home: Path, api: SimulatorProcess, told: Any) -> None:
    """Nor does the wait come back for it."""
    ids = submit()
    task = sensor(ids, Told(told.path), notify_after=3600)
    first = task.run()
    for batch_id in ids:
        api.end(batch_id)
    assert event_of(first)["status"] == "ended"
    resume(task, first)
    assert told.lines == []


@pytest.mark.parametrize("mode", ["poke", "reschedule"])
def test_a_sensor_on_a_worker_tells_once_over_its_pokes(home: Path, api: SimulatorProcess, told: Any, mode: str) -> None:
    """In mode reschedule each poke is another process."""
    ids = submit()
    task = sensor(ids, Told(told.path), deferrable=False, mode=mode)
    operator = task.make()
    assert not operator.poke(task.context) and told.lines == []
    time.sleep(SOON.total_seconds())
    for _ in range(3):
        operator = operator if mode == "poke" else task.make()
        assert not operator.poke(task.context)
    assert len(told.lines) == 1


def test_a_notifier_that_raises_fails_no_task_and_is_told_again_later(
    home: Path, database: Database, told: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The notifier beside it is told once all the same."""

    def broken(context: Any) -> None:
        raise RuntimeError("no network")

    ids, beside = submit(), told.path.with_name("beside")
    task = sensor(ids, Told(beside), broken)
    second = resume(task, task.run())
    again = waits(None, second).late_after
    assert again is not None and again > CLAIM_S
    assert "function raised, and the task goes on; in 10 min this task tells it again" in caplog.text and "no network" in caplog.text
    # ten minutes later it works
    task = sensor(ids, Told(beside), Told(told.path))
    assert waits(None, resume(task, task.run())).late_after is None
    assert (len(told.lines), len(beside.read_text().splitlines())) == (1, 1)


def test_a_notifier_that_hangs_holds_no_task(
    home: Path, database: Database, told: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is left to itself, and told again when its claim has ended; not at once, since it may be at work still."""
    monkeypatch.setattr(notifiers, "NOTIFIER_S", 0.3)
    ids, over = submit(), threading.Event()
    try:
        began = time.monotonic()
        task = sensor(ids, lambda _context: over.wait(60), Told(told.path))
        assert (waits(None, resume(task, task.run())).late_after or 0) > CLAIM_S
        assert time.monotonic() - began < 20 and len(told.lines) == 1
        assert "function has not returned within 0 s, and the task goes on without it" in caplog.text
    finally:
        over.set()
    task = sensor(ids, Told(told.path), Told(told.path))
    assert waits(None, resume(task, task.run())).late_after is not None
    assert len(told.lines) == 1
    age_claims(database)
    task = sensor(ids, Told(told.path), Told(told.path))
    assert waits(None, resume(task, task.run())).late_after is None
    assert len(told.lines) == 2


def test_a_notifier_of_a_budget_that_hangs_holds_no_submit(
    home: Path, told: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The requests are sent; the notifier beside it is told."""
    monkeypatch.setattr(notifiers, "NOTIFIER_S", 0.3)
    over = threading.Event()
    text = "{{ batchkit.budget }}"
    budget = Budget("b", usd=1, alert_at=["0.0001"], notifiers=[lambda _context: over.wait(60), Told(told.path, text)])  # type: ignore[arg-type]
    try:
        began = time.monotonic()
        assert len(submit(budget=budget)) == 2
        assert time.monotonic() - began < 20
        assert told.lines == ["b"] and "has not returned within 0 s" in caplog.text
    finally:
        over.set()


def test_a_ledger_that_cannot_be_written_ends_no_wait(home: Path, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again later."""
    from airflow_provider_batchkit.ledger import Ledger

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("the database is away")

    task = sensor(submit(), Told(told.path))
    first = task.run()
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "claim_late", fail)
        assert waits(None, resume(task, first)).late_after is not None
    resume(task, first)
    assert len(told.lines) == 1


def test_of_two_attempts_at_once_one_tells(home: Path, database: Database) -> None:
    """A stopped worker that goes on beside its retry."""
    from concurrent.futures import ThreadPoolExecutor

    from airflow_provider_batchkit.ledger import Ledger

    submit()
    barrier = threading.Barrier(8)

    def claim(_: int) -> int:
        ledger = Ledger(database.engine())
        barrier.wait(30)
        return len(ledger.claim_late("job", 2)[0])

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(claim, range(8))) == [0] * 7 + [2]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"notifiers": [print]}, "needs notify_after"),
        ({"notify_after": 60}, "tells nobody without notifiers"),
        ({"notifiers": [print], "notify_after": 0}, "above 0, not 0"),
        ({"notifiers": [print], "notify_after": "20h"}, "timedelta or seconds"),
        ({"notifiers": [BaseNotifier], "notify_after": 60}, "the class BaseNotifier"),
        ({"notifiers": print, "notify_after": 60}, "must be a list"),
        ({"notifiers": [print], "notify_after": 60, "sql_conn_id": None}, "needs the ledger"),
    ],
)
def test_what_could_tell_nobody_fails_the_parse(parameters: dict[str, Any], message: str) -> None:
    """Rather than a night later."""
    from airflow_provider_batchkit.sensors.batch import BatchSensor

    with pytest.raises(BatchInputError, match=message):
        BatchSensor(task_id="wait", batch_id="b", **{"sql_conn_id": "w", **parameters})


def test_the_configuration_says_after_how_long_where_the_task_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """In hours or days; a task without notifiers tells nobody. A stage hands all of it to its sensor."""
    from airflow.sdk import DAG

    from airflow_provider_batchkit.operators.stages import batch_stage
    from airflow_provider_batchkit.sensors.batch import BatchSensor

    monkeypatch.setenv("AIRFLOW__BATCHKIT__NOTIFY_AFTER", "20h")
    assert BatchSensor(task_id="wait", batch_id="b", notifiers=[print], ledger_conn_id="l").late_after == 72_000
    assert BatchSensor(task_id="wait", batch_id="b").late_after is None
    with DAG("d", schedule=None):
        stage = batch_stage("s", requests=["a"], table="t", sql_conn_id="w", notifiers=[print], notify_after=timedelta(hours=1))
    assert (stage.wait.late_after, stage.wait.sql_conn_id) == (3600, "w")
    monkeypatch.setenv("AIRFLOW__BATCHKIT__NOTIFY_AFTER", "soon")
    with pytest.raises(BatchInputError, match=r"\[batchkit\] notify_after: 'soon' is no span of time"):
        BatchSensor(task_id="wait", batch_id="b", notifiers=[print], ledger_conn_id="l")


DAG = """
import pendulum
from airflow.sdk import DAG, BaseNotifier

from airflow_provider_batchkit.operators.batch import RunBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor
from airflow_provider_batchkit.simulator.process import RemoteControl


class Told(BaseNotifier):
    template_fields = ("text",)

    def __init__(self, text):
        super().__init__()
        self.text = text

    def notify(self, context):
        RemoteControl({simulator!r}).end(context["batchkit"]["batch_id"])
        with open({path!r}, "a") as file:
            file.write(self.text + "\\n")


with DAG({dag_id!r}, schedule=None, start_date=pendulum.datetime(2026, 1, 1, tz="UTC")) as dag:
    given = dict(requests=["a"], max_tokens=100, sql_conn_id="warehouse")
    wait = dict(poke_interval=0.2, notify_after=0.5, notifiers=[Told("{{{{ ti.task_id }}}} {{{{ batchkit.link }}}}")])
    RunBatchOperator(task_id="run", table="answers", **given, **wait)
    submit = SubmitBatchOperator(task_id="submit", **given)
    BatchSensor.partial(task_id="mapped", sql_conn_id="warehouse", **wait).expand(batch_id=submit.output)
"""


def test_airflow_runs_tasks_that_tell_and_wait_on(home: Path, api: SimulatorProcess, tmp_path: Path) -> None:
    """Through Airflow's own serialization, task runner and trigger, also mapped. Whoever is told ends the batch."""
    path = tmp_path / "told"
    run = run_source(home, "late_dag", DAG.format(path=str(path), dag_id="late_dag", simulator=api.base_url))
    assert run.state == "success"
    lines = sorted(line.partition(" ") for line in path.read_text().splitlines())
    assert [task for task, _, _ in lines] == ["mapped", "run"]
    assert all("/dags/late_dag/runs/" in link for _, _, link in lines)

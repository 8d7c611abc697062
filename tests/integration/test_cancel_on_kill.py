"""``cancel_on_kill`` against the simulator over HTTP: what happens to each of many batches when the task that owns them is killed."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anthropic
import pytest
from airflow.providers.common.compat.sdk import TaskDeferred

from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
from airflow_provider_batchkit.operators.batch import RunBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor
from airflow_provider_batchkit.simulator import Simulator
from airflow_provider_batchkit.triggers.batch import BatchTrigger
from tests.connections import anthropic_connection
from tests.databases import Database

ROOT = Path(__file__).resolve().parents[2]
WHO = ["sensor", "trigger", "submit", "run"]


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch, sqlite: Database, caplog: pytest.LogCaptureFixture) -> Iterator[Simulator]:
    """A simulator whose batches end by hand, behind the default connection; ``warehouse`` is a SQLite file."""
    caplog.set_level(logging.INFO, logger="airflow_provider_batchkit")
    with Simulator(clock="manual") as simulator:
        monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection(simulator.base_url, "claude-haiku-5-5"))
        monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", sqlite.airflow_uri)
        yield simulator


def context() -> Any:
    """What the operators read of Airflow's context."""
    task = {"dag_id": "d", "run_id": "r", "task_id": "task", "map_index": -1, "xcom_push": lambda _, **__: None}
    return {"ti": type("TI", (), task)()}


def submitting(who: str, count: int, **parameters: Any) -> SubmitBatchOperator:
    """A submit or a run operator, as rendering leaves it, that asks ``count`` requests in as many batches."""
    kind, more = (RunBatchOperator, {"table": "answers"}) if who == "run" else (SubmitBatchOperator, {})
    operator = kind(
        task_id="task", requests=["x"], max_tokens=9, max_requests_per_batch=1, sql_conn_id="warehouse", cancel_on_kill=True,
        **{**more, **parameters},
    )  # fmt: skip
    operator.requests = [f"question {number}" for number in range(count)]  # type: ignore[assignment]
    return operator


def begin(who: str, sim: Simulator, count: int) -> tuple[list[str], Callable[[], None]]:
    """Batches that run, and what Airflow calls when it kills the task that they belong to."""
    if who in ("submit", "run"):
        operator = submitting(who, count)
        try:
            operator.execute(context())
        except TaskDeferred:
            assert who == "run"
        return running(sim), operator.on_kill
    kit = BatchKitHook().kit
    ids = [kit.submit([f"question {number}"], max_tokens=9, model="claude-haiku-5-5")[0] for number in range(count)]
    if who == "sensor":
        return ids, BatchSensor(task_id="wait", batch_id=ids, deferrable=False, cancel_on_kill=True).on_kill
    trigger = BatchTrigger(batch_ids=ids, anthropic_conn_id="anthropic_default", poke_interval=1, cancel_on_kill=True)
    return ids, lambda: asyncio.run(trigger.on_kill())


def running(sim: Simulator) -> list[str]:
    return [str(b["id"]) for b in sim.stats()["batches"] if b["status"] == "in_progress"]


def status(sim: Simulator) -> dict[str, str]:
    return {b["id"]: b["status"] for b in sim.stats()["batches"]}


def calls(sim: Simulator, what: str) -> int:
    return int(sim.stats()["calls"].get(what, 0))


def lines(caplog: pytest.LogCaptureFixture, level: int, *about: str) -> list[str]:
    """Lines of our own log of one level that name all of ``about``."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == level and record.name.startswith("airflow_provider_batchkit") and all(a in record.getMessage() for a in about)
    ]


@pytest.mark.parametrize("who", WHO)
def test_each_batch_is_canceled_by_itself(sim: Simulator, caplog: pytest.LogCaptureFixture, who: str) -> None:
    """The first has ended, the second is deleted, the third cannot be canceled: the others are canceled all the same."""
    ids, kill = begin(who, sim, 5)
    ended, deleted, broken, *rest = ids
    sim.end(ended)
    sim.end(deleted)
    BatchKitHook().kit.delete(deleted)
    sim.faults.add("status", endpoint="cancel", batch=broken, status=500, times=None)
    kill()
    assert status(sim) == {ended: "ended", broken: "in_progress", rest[0]: "canceling", rest[1]: "canceling"}
    assert lines(caplog, logging.INFO, ended, "ended already") and not lines(caplog, logging.WARNING, ended, "could not be canceled:")
    for failed, why in ((deleted, "404"), (broken, "500")):
        assert len(lines(caplog, logging.WARNING, f"Batch {failed} could not be canceled", why)) == 1
    (summary,) = lines(caplog, logging.WARNING, "Of 5 batches")
    for part in ("2 were canceled", "1 had ended already", "2 could not be canceled", "billed", deleted, broken):
        assert part in summary


@pytest.mark.parametrize("who", ["sensor", "trigger"])
@pytest.mark.parametrize("code", [429, 500, 529, 404])
def test_a_passing_refusal_is_tried_once_more(sim: Simulator, who: str, code: int) -> None:
    """A 404 too: the API was seen to answer it for a batch that is a second old."""
    ids, kill = begin(who, sim, 2)
    sim.faults.add("status", endpoint="cancel", batch=ids[0], status=code)
    kill()
    assert set(status(sim).values()) == {"canceling"}
    assert calls(sim, "cancel") == 3


@pytest.mark.parametrize("who", ["sensor", "trigger"])
def test_a_revoked_key_is_one_call_and_one_warning_a_batch(sim: Simulator, caplog: pytest.LogCaptureFixture, who: str) -> None:
    """401 does not mend, so nothing is tried again, and the handler does not raise."""
    ids, kill = begin(who, sim, 3)
    sim.set(keys={"another": "w"})
    kill()
    assert calls(sim, "cancel") == 3 and calls(sim, "retrieve") == 0
    assert all(len(lines(caplog, logging.WARNING, f"Batch {b} could not be canceled", "401")) == 1 for b in ids)
    assert lines(caplog, logging.WARNING, "Of 3 batches", "0 were canceled", "3 could not be canceled")


@pytest.mark.parametrize("who", ["sensor", "trigger", "submit"])
def test_without_a_connection_every_batch_is_named(sim: Simulator, caplog: pytest.LogCaptureFixture, who: str) -> None:
    """The API cannot be reached: a warning for each batch, in seconds, and no error."""
    ids, kill = begin(who, sim, 3)
    sim.stop()
    kill()
    assert all(len(lines(caplog, logging.WARNING, f"Batch {b} could not be canceled")) == 1 for b in ids)


@pytest.mark.parametrize("who", ["sensor", "trigger"])
@pytest.mark.parametrize("code", [400, 409])
def test_the_batch_and_not_the_text_tells_whether_it_has_ended(
    sim: Simulator, caplog: pytest.LogCaptureFixture, who: str, code: int
) -> None:
    """The same refusal, with a text that says the opposite of what is true."""
    (ended, running), kill = begin(who, sim, 2)
    sim.end(ended)
    sim.faults.add("status", endpoint="cancel", batch=ended, status=code, message="It is in progress", times=None)
    sim.faults.add("status", endpoint="cancel", batch=running, status=code, message="It has already ended", times=None)
    kill()
    assert lines(caplog, logging.INFO, ended, "ended already")
    assert lines(caplog, logging.WARNING, f"Batch {running} could not be canceled", str(code))


@pytest.mark.parametrize("who", ["sensor", "trigger"])
def test_a_cancel_whose_answer_is_lost_is_looked_up(
    sim: Simulator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Accepted, then cut off, late or answered with 500: the batch object says that it is being canceled."""
    monkeypatch.setattr("airflow_provider_batchkit.api.cancel.CALL_S", 0.3)
    (cut, late, wrong), kill = begin(who, sim, 3)
    sim.faults.add("cut_after_accept", endpoint="cancel", batch=cut, times=None)
    sim.faults.add("late", endpoint="cancel", batch=late, seconds=1.5, times=None)
    sim.faults.add("status_after_accept", endpoint="cancel", batch=wrong, status=500, times=None)
    kill()
    assert lines(caplog, logging.INFO, "Of 3 batches", "3 were canceled")


@pytest.mark.parametrize("who", ["sensor", "trigger"])
def test_many_are_canceled_several_at_a_time(sim: Simulator, who: str) -> None:
    """A kill handler has seconds: 24 batches at half a second each take less than a quarter of the time of one after the other."""
    _, kill = begin(who, sim, 24)
    sim.faults.add("late", endpoint="cancel", seconds=0.5, times=None)
    began = time.monotonic()
    kill()
    assert time.monotonic() - began < 3.5
    assert set(status(sim).values()) == {"canceling"}


@pytest.mark.parametrize("who", ["sensor", "trigger", "submit"])
def test_it_takes_a_bounded_time_in_all(
    sim: Simulator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Where the API hangs, those that were not reached are named like the others."""
    monkeypatch.setattr("airflow_provider_batchkit.api.cancel.TOTAL_S", 1.0)
    ids, kill = begin(who, sim, 20)
    sim.faults.add("late", endpoint="*", seconds=30, times=None)
    began = time.monotonic()
    kill()
    assert time.monotonic() - began < 5
    assert all(len(lines(caplog, logging.WARNING, f"Batch {b} could not be canceled")) == 1 for b in ids)
    assert lines(caplog, logging.WARNING, "Of 20 batches", "20 could not be canceled")


@pytest.mark.parametrize("who", WHO)
def test_a_connection_that_cannot_be_used_fails_no_handler(
    sim: Simulator,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    who: str,
) -> None:
    """The connection was deleted meanwhile."""
    ids, kill = begin(who, sim, 2)
    if who in ("submit", "run"):
        monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", "nonsense://")
    else:
        monkeypatch.delenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT")
    kill()
    assert running(sim) == ids
    # a trigger's own logger writes past the standard library's
    told = "\n".join([*lines(caplog, logging.WARNING), capsys.readouterr().out])
    assert "could not be canceled" in told and "billed" in told


def unrendered() -> Iterator[Any]:
    """What ``batch_id`` may be before the task's templates are rendered, or when the task before it has pushed nothing."""
    from airflow.sdk import DAG

    with DAG("d", schedule=None):
        yield SubmitBatchOperator(task_id="s", requests=["x"], sql_conn_id="w").output
    yield from ["", None, [], ["None"], "{{ ti.xcom_pull('submit') }}", ["{{ a }}", "{% if b %}"]]


@pytest.mark.parametrize("batch_id", list(unrendered()), ids=lambda value: type(value).__name__)
def test_a_sensor_that_is_killed_before_it_is_rendered_does_nothing(sim: Simulator, batch_id: Any) -> None:
    """There is no batch id yet, so there is nothing to cancel and nothing to raise."""
    BatchSensor(task_id="wait", batch_id=batch_id, cancel_on_kill=True).on_kill()
    assert sim.stats()["calls"] == {}


@pytest.mark.parametrize("who", ["submit", "run"])
def test_an_operator_that_is_killed_before_it_has_begun_does_nothing(sim: Simulator, who: str) -> None:
    """Neither the API nor the ledger is called."""
    submitting(who, 1).on_kill()
    assert sim.stats()["calls"] == {}


@pytest.mark.parametrize("who", ["submit", "run"])
def test_a_kill_while_a_batch_is_sent_cancels_those_before_it(sim: Simulator, caplog: pytest.LogCaptureFixture, who: str) -> None:
    """The signal interrupts the POST of the third batch, as Airflow's does; the first two are canceled inside the handler."""
    operator = submitting(who, 4)
    sim.faults.add("late", endpoint="create", after=2, seconds=3, times=None)

    class Killed(BaseException):
        """Ends the test's task, as the end of its process would."""

    def handler(*_: object) -> None:
        operator.on_kill()
        raise Killed

    def kill_in_the_third() -> None:
        while calls(sim, "create") < 3:
            time.sleep(0.01)
        time.sleep(0.2)
        signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=kill_in_the_third)
    thread.start()
    try:
        with pytest.raises(Killed):
            operator.execute(context())
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert list(status(sim).values()) == ["canceling", "canceling", "in_progress"]
    assert lines(caplog, logging.INFO, "Of 2 batches", "2 were canceled")
    assert lines(caplog, logging.WARNING, "was being sent", "next attempt")


HANDLERS = """
import asyncio, json, logging, sys
from airflow_provider_batchkit.operators.batch import RunBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor
from airflow_provider_batchkit.triggers.batch import BatchTrigger

submit = {"task_id": "s", "requests": ["a"], "max_tokens": 9, "sql_conn_id": "w"}
killed = {
    "sensor, off": BatchSensor(task_id="w", batch_id="b").on_kill,
    "sensor without a batch": BatchSensor(task_id="w", batch_id="", cancel_on_kill=True).on_kill,
    "submit, off": SubmitBatchOperator(**submit).on_kill,
    "submit without a job": SubmitBatchOperator(**submit, cancel_on_kill=True).on_kill,
    "run, off": RunBatchOperator(**submit, table="t").on_kill,
}
trigger = {"anthropic_conn_id": "a", "poke_interval": 1}
asked = {
    "trigger, off": BatchTrigger(batch_ids=["b"], **trigger),
    "trigger without a batch": BatchTrigger(batch_ids=[], cancel_on_kill=True, **trigger),
}
found = {}
for name, on_kill in killed.items():
    before = set(sys.modules)
    on_kill()
    found[name] = sorted(set(sys.modules) - before)


async def all_triggers():
    for name, trigger in asked.items():
        before = set(sys.modules)
        await trigger.on_kill()
        found[name] = sorted(set(sys.modules) - before)


asyncio.run(all_triggers())
print(json.dumps(found))
"""


def test_a_kill_handler_that_need_not_act_imports_nothing(airflow_db: Path) -> None:
    """The handler may interrupt an import, and has seconds: a module is imported only once it is known that batches are to be canceled."""
    result = subprocess.run([sys.executable, "-c", HANDLERS], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    found: dict[str, Sequence[str]] = json.loads(result.stdout.splitlines()[-1])
    assert len(found) == 7 and {name: modules for name, modules in found.items() if modules} == {}


KILLED = """
import json, sys, threading
from airflow.providers.common.compat.sdk import TaskDeferred
from airflow_provider_batchkit.operators.batch import RunBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor

who, batch_id = sys.argv[1:]
asked = {"task_id": "task", "requests": ["a"], "max_tokens": 9, "sql_conn_id": "warehouse", "cancel_on_kill": True}
match who:
    case "submit":
        task = SubmitBatchOperator(**asked)
    case "run":
        task = RunBatchOperator(**asked, table="t")
    case _:
        task = BatchSensor(task_id="task", batch_id=[batch_id], cancel_on_kill=True)
task.requests = ["a"]
ti = type("TI", (), {"dag_id": "d", "run_id": "r", "task_id": "task", "map_index": -1, "xcom_push": lambda *_, **__: None})()
if who != "sensor that has not begun":
    try:
        task.execute({"ti": ti})
    except TaskDeferred:
        pass
imported = []


class Finder:
    def find_spec(self, name, path=None, target=None):
        imported.append((threading.current_thread() is threading.main_thread(), name))


sys.meta_path.insert(0, Finder())
task.on_kill()
print(json.dumps(imported))
"""


@pytest.mark.parametrize("who", ["submit", "run", "sensor", "sensor that has not begun"])
def test_a_kill_handler_that_acts_finds_everything_loaded(airflow_db: Path, sim: Simulator, who: str) -> None:
    """A handler may interrupt an import, so a task loads what it needs before it has anything to cancel.

    What a sensor lacks that is killed before it has begun, and the little that the SDK loads with its first call, is imported in the thread
    that cancels, never in the interrupted one.
    """
    batch_id = BatchKitHook().kit.submit(["question"], max_tokens=9, model="claude-haiku-5-5")[0] if "sensor" in who else "none"
    result = subprocess.run(
        [sys.executable, "-c", KILLED, who, batch_id], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    imported: list[tuple[bool, str]] = json.loads(result.stdout.splitlines()[-1])
    assert [name for in_handler, name in imported if in_handler] == []
    if who != "sensor that has not begun":
        late = {name.partition(".")[0] for _, name in imported}
        assert late & {"airflow", "airflow_provider_batchkit", "anthropic", "sqlalchemy"} == set()
    assert list(status(sim).values()) == ["canceling"]


def test_the_kit_reports_what_became_of_each_batch(sim: Simulator) -> None:
    """One entry a batch, in the order given, each once."""
    from airflow_provider_batchkit.api.cancel import Cancellation, Fate

    (ended, running), _ = begin("sensor", sim, 2)
    sim.end(ended)
    kit = BatchKitHook().kit
    found = kit.cancel_all([running, "msgbatch_nobody", ended, running])
    assert [(c.batch_id, c.fate) for c in found] == [(running, Fate.CANCELED), ("msgbatch_nobody", Fate.FAILED), (ended, Fate.ENDED)]
    assert "404" in found[1].reason and found[0] == Cancellation(running, Fate.CANCELED)
    assert kit.cancel_all([]) == []
    assert isinstance(kit.client, anthropic.Anthropic)

"""A live batch answers 404 now and then: not visible is not gone, for no task that looks at one."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException

from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
from airflow_provider_batchkit.jobs import fetch as fetching
from airflow_provider_batchkit.simulator import SimulatorProcess
from airflow_provider_batchkit.triggers.batch import BatchTrigger
from tests.databases import Database, rows
from tests.integration.airflow_runs import run_dag
from tests.integration.test_fetch_operator import Task, fetch

PARAMS: dict[str, Any] = {"model": "claude-haiku-5-5", "max_tokens": 50}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch, api: SimulatorProcess) -> Any:
    """The default of 15 minutes, and a clock that lets a batch end at its third look."""
    monkeypatch.setenv("AIRFLOW__BATCHKIT__ABSENCE_SECONDS", "900")
    api.set(clock="polls:2")
    yield
    api.faults.clear()
    api.set(clock="instant")


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__BATCHKIT__ABSENCE_SECONDS", "0.3")


def create(kit: Any = None) -> str:
    """A batch that no ledger knows."""
    (batch_id,) = (kit or BatchKitHook().kit).submit(["hello"], **PARAMS)
    return str(batch_id)


def not_found(api: SimulatorProcess) -> int:
    """How many calls were answered with 404."""
    return int(api.stats()["statuses"].get("404", 0))


def sensor(batch_id: str | list[str], **parameters: Any) -> Task:
    from airflow_provider_batchkit.sensors.batch import BatchSensor

    return Task(BatchSensor, "wait", batch_id=batch_id, **{"poke_interval": 0.05, **parameters})


@pytest.mark.parametrize("mode", ["deferrable=True", "deferrable=False", "deferrable=False, mode='reschedule'"])
def test_a_run_whose_batch_answers_404_now_and_then_succeeds(home: Path, database: Database, api: SimulatorProcess, mode: str) -> None:
    """One second after create, once more in the middle, and for the results after the end, in every way to wait."""
    before = not_found(api)
    api.faults.add("vanish", endpoint="retrieve")
    api.faults.add("vanish", endpoint="retrieve", after=2)
    api.faults.add("vanish", endpoint="results")
    run = run_dag(
        home,
        f"""
        submit = SubmitBatchOperator(task_id="submit", requests=["hello"], max_tokens=100, sql_conn_id="warehouse")
        wait = BatchSensor(task_id="wait", batch_id=submit.output, poke_interval=0.1, {mode})
        fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse")
        wait >> fetch
        """,
    )
    assert run.state == "success"
    assert not_found(api) - before == 3
    assert rows(database, "SELECT status FROM answers") == [("succeeded",)]


def test_one_task_for_all_does_not_mind_either(home: Path, database: Database, api: SimulatorProcess) -> None:
    """RunBatchOperator, with the same three faults."""
    before = not_found(api)
    api.faults.add("vanish", endpoint="retrieve")
    api.faults.add("vanish", endpoint="retrieve", after=2)
    api.faults.add("vanish", endpoint="results")
    run = run_dag(
        home,
        """
        from airflow_provider_batchkit.operators.batch import RunBatchOperator
        RunBatchOperator(task_id="run", requests=["hello"], max_tokens=100, table="answers", sql_conn_id="warehouse", poke_interval=0.1)
        """,
    )
    assert run.state == "success"
    assert not_found(api) - before == 3
    assert rows(database, "SELECT status FROM answers") == [("succeeded",)]


def test_a_gateways_page_in_between_fails_no_task(home: Path, database: Database, api: SimulatorProcess, caplog: Any) -> None:
    """A page for a look, for the results and for the create itself: the run succeeds and pays once."""
    for endpoint in ("retrieve", "results"):
        api.faults.add("html", endpoint=endpoint)
    api.faults.add("html_after_accept")
    before = api.stats()["batches_accepted"]
    run = run_dag(
        home,
        """
        submit = SubmitBatchOperator(task_id="submit", requests=["a page"], max_tokens=100, sql_conn_id="warehouse")
        wait = BatchSensor(task_id="wait", batch_id=submit.output, poke_interval=0.1)
        fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse")
        wait >> fetch
        """,
    )
    assert run.state == "success"
    assert api.stats()["batches_accepted"] == before + 1
    assert caplog.text.count("no answer of the API") == 3


def test_a_poke_mode_sensor_remembers_over_its_pokes(api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """The time that a batch is not visible counts from the first of its looks; the failure is one that a retry may overcome."""
    impatient(monkeypatch)
    with pytest.raises(AirflowException, match=r"msgbatch_typo.*looks over .* s found nothing") as error:
        sensor("msgbatch_typo", deferrable=False, poke_interval=0.2).run()
    assert not isinstance(error.value, AirflowFailException)
    assert "its id may be wrong" in caplog.text


def test_a_rescheduled_sensor_looks_again_before_its_process_ends(api: SimulatorProcess) -> None:
    """The next process would know nothing of the 404: this one looks until the batch shows, and then lets its slot go."""
    batch_id = create()
    api.faults.add("vanish", endpoint="retrieve", times=2)
    task = sensor(batch_id, deferrable=False, mode="reschedule")
    operator = task.make()
    assert not operator.poke(task.context)
    assert operator._state.seen[batch_id].processing_status == "in_progress"


def test_a_poke_mode_sensor_says_how_far_its_batches_are(api: SimulatorProcess, caplog: pytest.LogCaptureFixture) -> None:
    """The trigger's line: at a change, and at most once a minute; not at each of its pokes."""
    caplog.set_level("INFO", logger="airflow_provider_batchkit")
    api.set(clock="manual")
    ids = [create(), create()]
    task = sensor(ids, deferrable=False)
    operator = task.make()
    for _ in range(3):
        assert not operator.poke(task.context)
    for batch_id in ids:
        api.end(batch_id)
    assert operator.poke(task.context)
    lines = [record.getMessage() for record in caplog.records if "batches ended" in record.getMessage()]
    assert len(lines) == 2
    assert re.fullmatch(r"0 of 2 batches ended, 0 of 2 requests done, oldest \d+ s, expires in 23 h 59 min", lines[0])
    assert lines[1] == "2 of 2 batches ended, 2 of 2 requests done"


def test_the_triggers_wait_ends_with_an_error_in_the_end(
    api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch, caplog: Any, capfd: Any
) -> None:
    """It knows no ledger: every id gets its time, and the log says at once what is the matter."""
    impatient(monkeypatch)

    async def event(batch_id: str) -> Any:
        trigger = BatchTrigger(batch_ids=[batch_id], anthropic_conn_id="anthropic_default", poke_interval=0.1)
        return (await anext(trigger.run())).payload

    def told() -> str:
        """Airflow's loggers write to the console on some versions, and to Python's on others."""
        return str(caplog.text) + "".join(capfd.readouterr())

    found = asyncio.run(event("msgbatch_typo"))
    assert found["status"] == "error" and "found nothing" in found["message"]
    assert "The API answers 404 for batch msgbatch_typo" in told()
    monkeypatch.setenv("AIRFLOW__BATCHKIT__ABSENCE_SECONDS", "900")
    batch_id = create()
    api.faults.add("vanish", endpoint="retrieve", times=2)
    assert asyncio.run(event(batch_id))["status"] == "ended"
    assert f"Batch {batch_id} is visible again" in told()


@pytest.mark.parametrize("endpoint", ["retrieve", "results"])
def test_a_fetch_waits_for_a_batch_that_no_ledger_knows(
    home: Path, database: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """Without a worker slot; for how long it was looked for is kept between the legs."""
    api.set(clock="instant")
    monkeypatch.setattr(fetching, "PATIENCE_S", 0.0)
    batch_id = create()
    api.faults.add("vanish", endpoint=endpoint, times=2)
    task = fetch([batch_id])
    first = task.run()
    since = task.pushed["waits_for"]["unseen"]
    assert first.kwargs["about"] == "unseen" and len(since) == 1
    second = task.go_on(first)
    assert task.pushed["waits_for"]["unseen"] == since
    assert task.go_on(second)["rows"] == 1


@pytest.mark.parametrize("endpoint", ["retrieve", "results"])
def test_a_fetch_gives_up_in_the_end_and_a_retry_looks_again(
    home: Path, database: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """The batch ended long ago, so that only the looks tell for how long nothing showed."""
    impatient(monkeypatch)
    api.set(clock="instant")
    batch_id = create()
    api.faults.add("vanish", endpoint=endpoint, times=None)
    with pytest.raises(AirflowException, match="A retry of the task looks again") as error:
        fetch([batch_id]).run()
    assert not isinstance(error.value, AirflowFailException)
    api.faults.clear()
    assert fetch([batch_id]).run()["rows"] == 1

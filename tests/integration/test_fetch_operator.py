"""FetchBatchOperator and its neighbours, leg by leg: what is refused when, what is waited for, and what is deleted from the API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException, TaskDeferred

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.simulator import SimulatorProcess
from tests.connections import anthropic_connection
from tests.databases import Database, rows

SOURCE: dict[str, Any] = {
    "sql": "SELECT id, note FROM things ORDER BY id",
    "key": "id",
    "prompt": "{{ row.note }}",
    "max_tokens": 100,
    "sql_conn_id": "warehouse",
}


class Task:
    """A task instance whose legs are run by hand, each by a new operator, as Airflow runs them."""

    def __init__(self, operator: type, task_id: str, run_id: str = "r", **parameters: Any) -> None:
        self.make: Callable[[], Any] = lambda: operator(task_id=task_id, **parameters)
        self.pushed: dict[str, Any] = {}
        task = {"dag_id": "d", "run_id": run_id, "task_id": task_id, "map_index": -1}
        push = lambda _, key, value: self.pushed.update({key: value})  # noqa: E731 - a method of a class that has no other
        pull = lambda _, key, **_whose: self.pushed.get(key)  # noqa: E731 - likewise
        self.context: Any = {"ti": type("TI", (), {**task, "xcom_push": push, "xcom_pull": pull})()}

    def run(self) -> Any:
        """The first leg; gives what it returns, or its deferral."""
        return self.leg("execute")

    def go_on(self, deferred: Any) -> Any:
        """The trigger of a deferral has fired at its deadline."""
        event = {"status": "timeout", "batch_ids": deferred.trigger.batch_ids, "message": "m"}
        return self.leg(deferred.method_name, event=event, **(deferred.kwargs or {}))

    def leg(self, method: str, **arguments: Any) -> Any:
        try:
            return getattr(self.make(), method)(self.context, **arguments)
        except TaskDeferred as deferred:
            return deferred


def fill(database: Database, count: int) -> None:
    with database.engine().begin() as connection:
        connection.exec_driver_sql("CREATE TABLE things (id INTEGER PRIMARY KEY, note TEXT)")
        for i in range(count):
            connection.exec_driver_sql(f"INSERT INTO things VALUES ({i}, 'thing {i}')")


def submit(**parameters: Any) -> Task:
    from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

    return Task(SubmitBatchOperator, "submit", **{**SOURCE, **parameters})


def fetch(batch_ids: list[str], **parameters: Any) -> Task:
    from airflow_provider_batchkit.operators.batch import FetchBatchOperator

    return Task(FetchBatchOperator, "fetch", batch_id=batch_ids, **{"table": "answers", "sql_conn_id": "warehouse", **parameters})


def test_only_what_has_landed_whole_is_deleted(home: Path, database: Database, api: SimulatorProcess) -> None:
    """Each batch by itself: one whose result line is missing is kept; a fetch that runs again deletes what it had not got to."""
    fill(database, 6)
    ids = submit(max_requests_per_batch=2).run()
    api.faults.add("missing_line", batch=ids[1], line=1, times=None)
    fetch(ids, delete_after_fetch=True).run()
    left = [batch["id"] for batch in api.stats()["batches"]]
    assert ids[1] in left
    assert not {ids[0], ids[2]} & set(left)
    # the first two of three were deleted when the worker died: what has landed whole before is deleted, and what is not there is fine
    fetch(ids, delete_after_fetch=True).run()
    assert ids[1] in [batch["id"] for batch in api.stats()["batches"]]
    assert len(rows(database, "SELECT id FROM answers")) == 5
    # with the line there, an insisting fetch lands it whole
    api.faults.clear()
    fetch([ids[1]], delete_after_fetch=True, rewrite=True).run()
    assert len(rows(database, "SELECT id FROM answers")) == 6
    assert ids[1] not in [batch["id"] for batch in api.stats()["batches"]]


@pytest.mark.parametrize("deferrable", [True, False])
def test_a_cleared_run_whose_fetch_has_deleted_its_batches_goes_on(
    home: Path, database: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch, deferrable: bool
) -> None:
    """The ledger knows that they landed and were deleted, so the sensor has nothing to wait for. Nothing is asked or paid again."""
    from airflow_provider_batchkit.sensors.batch import BatchSensor

    monkeypatch.setenv("AIRFLOW__BATCHKIT__LEDGER_CONN_ID", "warehouse")
    fill(database, 4)
    ids = submit(max_requests_per_batch=2).run()
    first = fetch(ids, delete_after_fetch=True).run()
    posts = api.stats()["posts"]
    assert submit(max_requests_per_batch=2).run() == ids
    wait = Task(BatchSensor, "wait", batch_id=ids, deferrable=deferrable)
    assert wait.run()["succeeded"] == 4
    again = fetch(ids, delete_after_fetch=True).run()
    assert (again["rows"], again["cost_tally"], api.stats()["posts"]) == (4, first["cost_tally"], posts)


def test_a_batch_that_somebody_else_has_deleted_is_looked_for(
    home: Path, database: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not landed: the sensor does not call it ended, with or without a ledger."""
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
    from airflow_provider_batchkit.sensors.batch import BatchSensor

    fill(database, 2)
    ids = submit().run()
    BatchKitHook().kit.delete(ids[0])
    for conn_id in ("warehouse", "nowhere", None):
        assert Task(BatchSensor, "wait", batch_id=ids, ledger_conn_id=conn_id).run().trigger.batch_ids == ids


def test_a_batch_that_a_key_of_another_workspace_cannot_delete_is_not_noted_as_deleted(
    home: Path, database: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 404 for its own batch is a deletion that has happened, one for another workspace's is none."""
    fill(database, 2)
    ids = submit().run()
    fetch(ids).run()
    api.set(keys={"test-key": "default", "other-key": "other"})
    monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection(api.base_url, "claude-sonnet-5", key="other-key"))
    fetch(ids, delete_after_fetch=True).run()
    assert rows(database, "SELECT deleted_at FROM batchkit_batch") == [(None,)]


def test_a_fetch_that_died_before_it_deleted_deletes_in_its_retry(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The rows are there already, and the ledger knows that they are whole."""
    fill(database, 2)
    ids = submit().run()
    fetch(ids).run()
    assert ids[0] in [batch["id"] for batch in api.stats()["batches"]]
    fetch(ids, delete_after_fetch=True).run()
    assert ids[0] not in [batch["id"] for batch in api.stats()["batches"]]


def test_a_fetch_waits_without_a_worker_slot_for_a_batch_that_is_not_visible(
    home: Path, database: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so under waits_for, and takes that back when it is done."""
    from airflow_provider_batchkit.jobs import fetch as fetching

    monkeypatch.setenv("AIRFLOW__BATCHKIT__ABSENCE_SECONDS", "900")
    monkeypatch.setattr(fetching, "PATIENCE_S", 0.0)
    fill(database, 2)
    ids = submit().run()
    api.faults.add("status", endpoint="retrieve", batch=ids[0], status=404)
    task = fetch(ids)
    deferred = task.run()
    assert (deferred.method_name, deferred.trigger.batch_ids, deferred.trigger.cancel_on_kill) == ("resume", [], False)
    assert ids[0] in task.pushed["waits_for"]["why"]
    assert task.go_on(deferred)["rows"] == 2
    assert task.pushed["waits_for"] is None


def test_a_run_says_what_its_round_waits_for(home: Path, database: Database, api: SimulatorProcess) -> None:
    """A round that takes too long fails the task, also under ``dag.test()``, which drops what a deferral passes on."""
    from airflow_provider_batchkit.operators.batch import RunBatchOperator

    fill(database, 4)
    api.set(clock="manual")
    task = Task(RunBatchOperator, "run", **{**SOURCE, "table": "answers", "max_requests_per_batch": 2, "cancel_on_kill": True})
    deferred = task.run()
    ids = deferred.trigger.batch_ids
    assert (len(ids), deferred.trigger.first, deferred.trigger.cancel_on_kill) == (2, False, True)
    assert (task.pushed["waits_for"]["batch_ids"], task.pushed["waits_for"]["about"]) == (ids, "round")
    assert all(batch_id in task.pushed["waits_for"]["why"] for batch_id in ids)
    with pytest.raises(AirflowException, match="did not end in time"):
        task.leg("resume", event={"status": "timeout", "batch_ids": ids, "message": "The batches did not end in time."})
    assert task.pushed["waits_for"] is None
    for batch_id in ids:
        api.end(batch_id)
    assert task.leg("resume", event={"status": "ended", "batch_ids": ids, "counts": {}})["rows"] == 4


def test_what_an_older_version_has_deferred_goes_on(home: Path, database: Database, api: SimulatorProcess) -> None:
    """Its deferrals name methods that this version does not use itself: of a submit's primer, and of a run's round."""
    from airflow_provider_batchkit.operators.batch import RunBatchOperator

    fill(database, 3)
    api.set(clock="manual")
    primed = submit(system="Be brief. " * 2_000, cache_system="5m", prime_cache=True)
    (primer,) = primed.run().trigger.batch_ids
    api.end(primer)
    ended = {"status": "ended", "batch_ids": [primer], "counts": {}}
    assert [primer] == primed.leg("primer_over", event=ended, asked_before=1)[:-1]
    run = Task(RunBatchOperator, "run", **{**SOURCE, "table": "answers"})
    (batch_id,) = run.run().trigger.batch_ids
    api.end(batch_id)
    assert run.leg("execute_complete", event={**ended, "batch_ids": [batch_id]})["rows"] == 3


def test_a_throttled_submit_waits_without_a_worker_slot(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The pause that the API asks for is a deferral, and the next leg sends the rows."""
    fill(database, 2)
    api.faults.add("status", status=429, retry_after=300)
    task = submit()
    before = api.stats()["batches_accepted"]
    deferred = task.run()
    assert (deferred.kwargs["about"], deferred.trigger.batch_ids) == ("throttle", [])
    assert 300 <= (deferred.timeout.total_seconds() - 300) <= 376
    assert len(task.go_on(deferred)) == 1
    assert api.stats()["batches_accepted"] == before + 1


def test_a_candidate_is_never_canceled_with_the_task(home: Path, database: Database, api: SimulatorProcess) -> None:
    """What a doubt waits for may be somebody else's batch, so cancel_on_kill does not hold for it."""
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

    fill(database, 2)
    api.set(clock="manual")
    (foreign,) = BatchKitHook().kit.submit(["a", "b"], model="claude-haiku-5-5", max_tokens=9)
    api.faults.add("cut_before_accept")
    deferred = submit(cancel_on_kill=True, settle_seconds=0.5).run()
    api.set(clock="instant")
    assert foreign in deferred.trigger.batch_ids
    assert deferred.trigger.cancel_on_kill is False


@pytest.mark.parametrize("column", ["id TEXT", "id REAL"])
def test_a_table_that_does_not_fit_is_refused_before_anything_is_sent(
    home: Path, database: Database, api: SimulatorProcess, column: str
) -> None:
    """Where the submit knows it: by ``table``, as ``batch_stage`` gives it."""
    fill(database, 2)
    result = "response TEXT, status VARCHAR(16), stop_reason TEXT, error_type TEXT, error_message TEXT, model TEXT, input_tokens BIGINT, "
    result += "output_tokens BIGINT, cost_usd TEXT, custom_id VARCHAR(64), batch_id VARCHAR(100), landed_at TIMESTAMP"
    with database.engine().begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE answers ({column}, {result})")
    posts = api.stats()["posts"]
    with pytest.raises(AirflowFailException, match=r"id .*Nothing was"):
        submit(table="answers").run()
    assert api.stats()["posts"] == posts


def test_replace_with_skip_unchanged_is_refused_when_the_dag_is_parsed() -> None:
    """By the operators that know both."""
    from airflow_provider_batchkit.operators.batch import RunBatchOperator
    from airflow_provider_batchkit.operators.stages import batch_stage

    given = {**SOURCE, "table": "answers", "skip_unchanged": True, "write_disposition": "replace"}
    with pytest.raises(BatchInputError, match=r"Task run: .*skip_unchanged"):
        RunBatchOperator(task_id="run", **given)
    with pytest.raises(BatchInputError, match=r"Stage stage: .*skip_unchanged"):
        batch_stage("stage", **given)


def test_a_dry_run_beside_a_ledger_of_an_older_version_reports(home: Path, database: Database, api: SimulatorProcess) -> None:
    """Nothing is sent; the ledger is migrated, as by any other task."""
    from airflow.providers.common.compat.sdk import AirflowSkipException

    from airflow_provider_batchkit.ledger import prepare_engine
    from tests.ledgers import KeptLedger

    fill(database, 2)
    KeptLedger(3).write(prepare_engine(database.engine()), {})
    task = submit(dry_run=True)
    with pytest.raises(AirflowSkipException):
        task.run()
    assert task.pushed["estimate"]["rows"] == 2


def test_batches_that_were_deleted_after_their_fetch_are_no_witnesses(home: Path, database: Database, api: SimulatorProcess) -> None:
    """That they are not visible says nothing; an older one that is there still counts."""
    fill(database, 2)
    submit().run()
    for number in range(3):
        task = submit(prompt=f"{number} {{{{ row.note }}}}")
        task.context["ti"].run_id = f"run-{number}"
        fetch(task.run(), delete_after_fetch=True, table=f"answers_{number}").run()
    api.faults.add("cut_before_accept")
    task = submit(prompt="last {{ row.note }}", settle_seconds=0.5)
    task.context["ti"].run_id = "last"
    assert len(task.run()) == 1


@pytest.mark.parametrize("disposition", ["merge", "replace", "append"])
def test_two_jobs_that_answer_the_same_keys_are_named_and_the_later_id_stays(
    home: Path, database: Database, api: SimulatorProcess, caplog: pytest.LogCaptureFixture, disposition: str
) -> None:
    """Two languages keyed by the product alone: half of what was paid for is not in the table. With append nothing is lost."""
    fill(database, 3)
    first, second = (
        submit().run(),
        submit(run_id="other", prompt="In French: {{ row.note }}", sql="SELECT id, note FROM things WHERE id > 0").run(),
    )
    summary = fetch([*second, *first], write_disposition=disposition).run()
    assert summary["rows"] == len(rows(database, "SELECT id FROM answers")) == (5 if disposition == "append" else 3)
    assert summary["overridden"] == (0 if disposition == "append" else 2)
    kept = {row[0] for row in rows(database, "SELECT batch_id FROM answers")}
    assert kept == ({*first, *second} if disposition == "append" else {*first})
    assert ("2 answers have a key that another of the 2 jobs" in caplog.text) == (disposition != "append")


@pytest.mark.parametrize("include_failed", [False, True])
def test_the_summarys_rows_are_those_of_the_table_with_failed_rows_among_equal_keys(
    home: Path, database: Database, api: SimulatorProcess, include_failed: bool
) -> None:
    """One job's row failed, another one's answer has its key; a fetch that runs again says the same."""
    fill(database, 3)
    first = submit(sql="SELECT id, CASE WHEN id < 2 THEN '[[sim:errored]]' ELSE note END AS note FROM things").run()
    second = submit(run_id="other", sql="SELECT id, note FROM things WHERE id > 0").run()
    for _ in range(2):
        summary = fetch([*first, *second], include_failed=include_failed).run()
        assert summary["rows"] == len(rows(database, "SELECT id FROM answers")) == (3 if include_failed else 2)
        assert summary["overridden"] == (2 if include_failed else 1)


def test_jobs_with_keys_of_their_own_are_not_named(home: Path, database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """The usual case: parts of a source."""
    fill(database, 3)
    ids = [submit(run_id=f"part{i}", sql=f"SELECT id, note FROM things WHERE id = {i}").run()[0] for i in range(3)]
    fetch(ids).run()
    assert len(rows(database, "SELECT id FROM answers")) == 3
    assert "have a key that another" not in caplog.text


def instance(task: Task, map_index: int) -> Task:
    """The instance of a mapped task."""
    task.context["ti"].map_index = map_index
    return task


def test_a_mapped_instance_whose_list_has_another_order_is_refused(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The same keys in two languages, and the list is turned round before a clear: each table would get the other one's answers."""
    fill(database, 2)
    words = ("One", "Two")
    ids = [instance(submit(prompt=f"{word} {{{{ row.note }}}}", table=word), i).run() for i, word in enumerate(words)]
    posts = api.stats()["posts"]
    for i, word in enumerate(reversed(words)):
        with pytest.raises(
            AirflowFailException, match=rf"(?s)The mapped instance {i} of d\.submit asked something else.*run and are billed: {ids[i][0]}"
        ):
            instance(submit(prompt=f"{word} {{{{ row.note }}}}", table=word), i).run()
    # with the list as it was, all goes on
    for i, word in enumerate(words):
        assert instance(submit(prompt=f"{word} {{{{ row.note }}}}", table=word), i).run() == ids[i]
    assert api.stats()["posts"] == posts


def test_a_mapped_run_whose_list_has_another_order_lands_nothing_in_the_other_table(
    home: Path, database: Database, api: SimulatorProcess
) -> None:
    """It would land what it had before it asks."""
    from airflow_provider_batchkit.operators.batch import RunBatchOperator

    fill(database, 4)

    def run(part: int, map_index: int) -> Any:
        sql = f"SELECT id, note FROM things WHERE id % 2 = {part}"
        return instance(Task(RunBatchOperator, "run", **{**SOURCE, "sql": sql, "table": f"part_{part}"}), map_index).run()

    api.set(clock="instant")
    first, posts = run(0, 0), api.stats()["posts"]
    with pytest.raises(AirflowFailException, match="The mapped instance 0"):
        run(1, 0)
    assert (run(0, 0)["batch_ids"], api.stats()["posts"] - posts) == (first["batch_ids"], 0)
    assert "part_1" not in sa.inspect(database.engine()).get_table_names()


def test_a_mapped_instance_that_has_sent_nothing_may_ask_something_else(home: Path, database: Database, api: SimulatorProcess) -> None:
    """Its first SQL was wrong, and its first batch was refused."""
    fill(database, 2)
    api.faults.add("status", status=400)
    with pytest.raises(AirflowFailException):
        instance(submit(), 0).run()
    assert len(instance(submit(sql="SELECT id, note FROM things WHERE id = 1"), 0).run()) == 1


def test_a_mapped_prompt_without_a_key_is_known_by_its_position_only(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The same list again costs nothing; another one is refused."""
    from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

    def ask(*prompts: str) -> Any:
        def rendered() -> SubmitBatchOperator:
            operator = SubmitBatchOperator(task_id="submit", requests=[], max_tokens=9, sql_conn_id="warehouse")
            operator.requests = list(prompts)  # type: ignore[assignment]  # as rendered
            return operator

        task = instance(Task(SubmitBatchOperator, "submit"), 0)
        task.make = rendered
        return task.run()

    assert ask("a", "b") == ask("a", "b")
    with pytest.raises(AirflowFailException, match="The mapped instance 0"):
        ask("b", "a")

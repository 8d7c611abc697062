"""RunBatchOperator, and asking again in the three-task form: as tasks of real DAG runs, and leg by leg where a leg matters."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException, AirflowSkipException, TaskDeferred

from airflow_provider_batchkit.jobs import fetch
from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings, answer_for
from tests.connections import anthropic_connection
from tests.databases import Database, rows
from tests.integration.airflow_runs import run_dag


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatorProcess]:
    """A simulator of the test's own: it remembers which prompts it has failed once."""
    with SimulatorProcess(SimulatorSettings(input_tokens=1000, output_tokens=100)) as process:
        monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection(process.base_url, "claude-opus-4-8"))
        yield process


#: of one request of the simulator at the batch price of claude-opus-4-8: 1,000 tokens in at $2.50 per million, 100 out at $12.50
COST = Decimal("0.00375")


def fill(database: Database, notes: dict[int, str]) -> None:
    """Write the table ``things``; ``notes`` are the prompts by id."""
    with database.engine().begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS things")
        connection.exec_driver_sql("CREATE TABLE things (id INTEGER PRIMARY KEY, note TEXT)")
        connection.execute(sa.text("INSERT INTO things VALUES (:id, :note)"), [{"id": i, "note": note} for i, note in notes.items()])


def worth_a_retry(match: str) -> Any:
    """Raises what makes Airflow try the task again: a batch that answers 404 may be back."""
    return pytest.raises(AirflowException, match=match, check=lambda e: not isinstance(e, AirflowFailException))


class Legs:
    """One task instance whose legs are run by hand, each by a new operator, as Airflow runs them."""

    def __init__(self, run_id: str = "r", map_index: int = -1, **parameters: Any) -> None:
        self.run_id, self.map_index = run_id, map_index
        self.parameters: dict[str, Any] = {
            "sql": "SELECT id, note FROM things ORDER BY id",
            "key": "id",
            "prompt": "{{ row.note }}",
            "max_tokens": 100,
            "sql_conn_id": "warehouse",
            "table": "answers",
            "settle_seconds": 1.0,
            **parameters,
        }
        self.pushed: dict[str, Any] = {}

    def run(self, method: str = "execute", **arguments: Any) -> Any:
        """Run a leg; gives what it returns, or its deferral."""
        from airflow_provider_batchkit.operators.batch import RunBatchOperator

        task = {"dag_id": "d", "run_id": self.run_id, "task_id": "run", "map_index": self.map_index}
        push = lambda _, key, value: self.pushed.update({key: value})  # noqa: E731 - a method of a class that has no other
        ti = type("TI", (), {**task, "xcom_push": push})
        try:
            return getattr(RunBatchOperator(task_id="run", **self.parameters), method)({"ti": ti()}, **arguments)
        except TaskDeferred as deferred:
            return deferred

    def resume(self) -> Any:
        """The trigger has seen all batches ended."""
        return self.run("execute_complete", event={"status": "ended", "batch_ids": [], "counts": {}})

    def go_on(self, deferred: Any, status: str = "ended") -> Any:
        """The trigger of a deferral has fired."""
        event = {"status": status, "batch_ids": deferred.trigger.batch_ids, "message": "m", "counts": {}}
        return self.run(deferred.method_name, event=event, **(deferred.kwargs or {}))


def test_three_rounds_answer_five_percent_expired_and_two_percent_overloaded_rows(
    home: Path, database: Database, api: SimulatorProcess
) -> None:
    """1,000 rows in batches of 300: every row lands, and the bill is that of 1,000 answers."""
    notes = {
        i: f"thing {i}" + ("[[sim:expired-once]]" if i % 20 == 3 else "[[sim:overloaded-once]]" if i % 50 == 7 else "") for i in range(1000)
    }
    fill(database, notes)
    before = api.stats()
    run = run_dag(
        home,
        """
        from airflow.sdk import Asset
        from airflow_provider_batchkit.operators.batch import RunBatchOperator

        RunBatchOperator(
            task_id="run", sql="SELECT id, note FROM things", key="id", prompt="{{ row.note }}", max_tokens=100, sql_conn_id="warehouse",
            table="answers", max_rounds=3, max_requests_per_batch=300, poke_interval=0.2, outlets=[Asset("things_answered")],
        )
        """,
    )
    assert run.state == "success"
    summary = run.xcom("run")
    assert (summary["rows"], summary["counts"], summary["failed"], summary["stopped"]) == (1000, {"succeeded": 1000}, [], None)
    assert [(r["round"], r["rows"], r["requests"], r["counts"]) for r in summary["rounds"]] == [
        (1, 1000, 1000, {"errored": 20, "expired": 50, "succeeded": 930}),
        (2, 70, 70, {"succeeded": 70}),
    ]
    assert Decimal(summary["cost_tally"]["batch_cost_usd"]) == 1000 * COST
    assert (
        sum(line["requests"] for line in api.stats()["bill"].values()) - sum(line["requests"] for line in before["bill"].values()) == 1000
    )
    assert api.stats()["requests_accepted"] - before["requests_accepted"] == 1070
    assert dict(rows(database, "SELECT id, response FROM answers")) == {i: answer_for(note) for i, note in notes.items()}
    assert rows(database, "SELECT SUM(batch_cost_picousd) FROM batchkit_batch") == [(1000 * int(COST * 10**12),)]
    assert rows(database, "SELECT SUM(batch_cost_picousd) FROM batchkit_request") == [(1000 * int(COST * 10**12),)]
    assert rows(database, "SELECT source_rows, requests, rounds FROM batchkit_summary") == [(1000, 1070, 2)]
    assert (run.xcom("run", "batch_ids"), run.xcom("run", "batch_id")) == (summary["batch_ids"], summary["batch_ids"][0])
    assert len(summary["batch_ids"]) == 5


def test_it_waits_without_a_worker_in_every_round(home: Path, database: Database, api: SimulatorProcess) -> None:
    """Each round defers to the trigger with its own batches, and goes on from the ledger alone."""
    fill(database, {i: f"slow {i}" + "[[sim:rate-limit-once]]" * (i == 1) for i in range(3)})
    api.set(clock="manual")
    legs = Legs(max_rounds=2, max_requests_per_batch=2, cancel_on_kill=True, timeout=60)
    first = legs.run()
    assert isinstance(first, TaskDeferred)
    assert (
        first.trigger.batch_ids
        == legs.pushed["batch_ids"]
        == [b for (b,) in rows(database, "SELECT batch_id FROM batchkit_batch ORDER BY shard")]
    )
    assert first.trigger.cancel_on_kill
    for batch_id in first.trigger.batch_ids:
        api.end(batch_id)
    second = legs.resume()
    assert isinstance(second, TaskDeferred)
    (again,) = second.trigger.batch_ids
    assert again not in first.trigger.batch_ids
    assert legs.pushed["batch_ids"] == [*first.trigger.batch_ids, again]
    assert rows(database, "SELECT COUNT(*) FROM answers") == [(2,)]
    api.end(again)
    assert legs.resume()["counts"] == {"succeeded": 3}


def test_a_primed_run_sends_the_rest_when_its_first_row_has_ended(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The first row alone, then the others, then the landing of both; a retry in between waits for the same batch."""
    fill(database, {i: f"primed {i}" for i in range(4)})
    api.set(clock="manual")
    before = api.stats()["requests_accepted"]
    legs = Legs(system="Be brief. " * 2_000, cache_system="5m", prime_cache=True)
    primer = legs.run()
    assert (primer.method_name, primer.kwargs["about"]) == ("resume", "primer")
    assert api.stats()["requests_accepted"] - before == 1
    assert legs.run().trigger.batch_ids == primer.trigger.batch_ids
    api.end(primer.trigger.batch_ids[0])
    rest = legs.go_on(primer)
    assert (rest.kwargs["about"], api.stats()["requests_accepted"] - before) == ("round", 4)
    for batch_id in rest.trigger.batch_ids:
        api.end(batch_id)
    summary = legs.resume()
    assert (summary["rows"], summary["counts"], len(summary["batch_ids"])) == (4, {"succeeded": 4}, 2)


def test_an_answer_that_does_not_fit_is_asked_again_only_where_that_is_wanted(
    home: Path, database: Database, api: SimulatorProcess
) -> None:
    """It is billed each time, so the default keeps the raw text and asks no more; the rows' columns are typed either way."""
    schema = {"type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"]}
    fill(database, {0: "a cup", 1: "a pot [[sim:invalid-output-once]]"})
    once = Legs(run_id="once", max_rounds=3, output_schema=schema, table="once").run()
    assert (once["counts"], len(once["rounds"])) == ({"invalid_output": 1, "succeeded": 1}, 1)
    assert rows(database, "SELECT id, size IS NULL, status FROM once ORDER BY id") == [(0, 0, "succeeded"), (1, 1, "invalid_output")]
    fill(database, {0: "a mug", 1: "a jar [[sim:invalid-output-once]]"})
    again = Legs(run_id="again", max_rounds=3, output_schema=schema, table="again", retry_invalid_output=True).run()
    assert (again["counts"], [r["requests"] for r in again["rounds"]]) == ({"succeeded": 2}, [2, 1])
    assert Decimal(again["cost_tally"]["batch_cost_usd"]) == 3 * COST
    assert rows(database, "SELECT id, size IS NULL, status FROM again ORDER BY id") == [(0, 0, "succeeded"), (1, 0, "succeeded")]


def test_what_asking_again_cannot_help_is_not_asked_again(home: Path, database: Database, api: SimulatorProcess) -> None:
    """A permanent error stays, a passing one is asked until the rounds are over; the summary says which is which."""
    fill(database, {1: "fine", 2: "bad [[sim:errored]]", 3: "poor [[sim:errored]]", 4: "late [[sim:expired]]", 5: "down [[sim:api-error]]"})
    summary = Legs(max_rounds=3, include_failed=True).run()
    assert [r["rows"] for r in summary["rounds"]] == [5, 2, 2]
    assert summary["counts"] == {"succeeded": 1, "errored": 3, "expired": 1}
    assert [(f["status"], f["error_type"], f["rows"], f["keys"], f["worth_asking"]) for f in summary["failed"]] == [
        ("errored", "api_error", 1, ["[5]"], True),
        ("errored", "invalid_request_error", 2, ["[2]", "[3]"], False),
        ("expired", None, 1, ["[4]"], True),
    ]
    assert rows(database, "SELECT id, status FROM answers ORDER BY id") == [
        (1, "succeeded"),
        (2, "errored"),
        (3, "errored"),
        (4, "expired"),
        (5, "errored"),
    ]
    assert rows(database, "SELECT key, shard FROM batchkit_request ORDER BY key") == [
        ("[1]", 0),
        ("[2]", 0),
        ("[3]", 0),
        ("[4]", 2),
        ("[5]", 2),
    ]


def test_one_round_is_the_default(home: Path, database: Database) -> None:
    """Without max_rounds nothing is asked twice."""
    fill(database, {1: "fine", 2: "late [[sim:expired-once]]"})
    summary = Legs().run()
    assert summary["counts"] == {"succeeded": 1, "expired": 1}
    assert len(summary["rounds"]) == 1


def test_rows_that_share_a_request_are_asked_again_as_one(home: Path, database: Database, api: SimulatorProcess) -> None:
    """Three equal rows expire together; one request answers them, and only it is billed."""
    fill(database, {1: "same [[sim:expired-once]]", 2: "same [[sim:expired-once]]", 3: "other", 4: "same [[sim:expired-once]]"})
    before = api.stats()["requests_accepted"]
    summary = Legs(max_rounds=2).run()
    assert summary["counts"] == {"succeeded": 4}
    assert [(r["rows"], r["requests"]) for r in summary["rounds"]] == [(4, 2), (3, 1)]
    assert api.stats()["requests_accepted"] - before == 3
    assert Decimal(summary["cost_tally"]["batch_cost_usd"]) == 2 * COST
    assert rows(database, "SELECT COUNT(*) FROM answers") == [(4,)]


def test_a_failed_row_that_has_changed_is_asked_as_it_is_now_and_new_rows_wait(
    home: Path, database: Database, api: SimulatorProcess
) -> None:
    """Its key has no answer, so the new request is asked, even one that another row has had answered; a row that is new is not."""
    fill(database, {1: "one", 2: "two [[sim:expired]]", 3: "three [[sim:expired]]"})
    api.set(clock="manual")
    legs = Legs(max_rounds=2)
    (batch_id,) = legs.run().trigger.batch_ids
    fill(database, {1: "one changed", 2: "one", 4: "new"})
    api.end(batch_id)
    api.set(clock="instant")
    summary = legs.resume()
    assert summary["counts"] == {"succeeded": 2, "expired": 1}
    assert dict(rows(database, "SELECT id, response FROM answers")) == {1: answer_for("one"), 2: answer_for("one")}
    assert [r["rows"] for r in summary["rounds"]] == [3, 1]


def test_rows_that_left_the_source_end_the_asking(home: Path, database: Database, api: SimulatorProcess) -> None:
    """A failed row that the source does not have any more cannot be asked: the summary says so."""
    fill(database, {1: "one", 2: "two [[sim:expired]]"})
    api.set(clock="manual")
    legs = Legs(max_rounds=5)
    (batch_id,) = legs.run().trigger.batch_ids
    fill(database, {1: "one"})
    api.end(batch_id)
    summary = legs.resume()
    assert summary["stopped"] == "The source has none of the failed rows any more."
    assert summary["failed"][0]["keys"] == ["[2]"]


def test_a_cleared_task_pays_nothing_and_lands_again(home: Path, database: Database, api: SimulatorProcess) -> None:
    """It re-attaches to all rounds, also in another table, and does not read the source; more rounds may be given to it."""
    fill(database, {1: "one", 2: "two [[sim:expired-once]]", 3: "three [[sim:expired]]"})
    legs = Legs(max_rounds=2, include_failed=True)
    first = legs.run()
    asked = api.stats()["requests_accepted"]
    fill(database, {9: "nine"})
    legs.parameters["table"] = "elsewhere"
    again = legs.run()
    assert {**again, "table": "answers"} == first
    assert api.stats()["requests_accepted"] == asked
    assert rows(database, "SELECT id, status FROM elsewhere ORDER BY id") == [(1, "succeeded"), (2, "succeeded"), (3, "expired")]
    fill(database, {3: "three"})
    legs.parameters["max_rounds"] = 3
    assert legs.run()["counts"] == {"succeeded": 3}
    assert api.stats()["requests_accepted"] == asked + 1


@pytest.mark.parametrize("disposition", ["merge", "append", "replace"])
def test_a_row_has_its_last_outcome_whatever_the_disposition_and_order(
    home: Path, database: Database, api: SimulatorProcess, disposition: str
) -> None:
    """Failed rows are replaced by a later round's; landing the first round again afterwards changes neither table nor ledger."""
    from airflow_provider_batchkit.operators.batch import FetchBatchOperator

    fill(database, {0: "of an earlier run"})
    Legs("earlier", write_disposition=disposition).run()
    fill(database, {1: "one", 2: "two [[sim:expired-once]]", 3: "three [[sim:overloaded]]", 4: "four [[sim:errored]]"})
    legs = Legs(max_rounds=2, include_failed=True, write_disposition=disposition)
    summary = legs.run()
    expected = [] if disposition == "replace" else [(0, "succeeded")]
    expected += [(1, "succeeded"), (2, "succeeded"), (3, "errored"), (4, "errored")]
    assert rows(database, "SELECT id, status FROM answers ORDER BY id") == expected
    ledger = rows(database, "SELECT key, shard, status, batch_cost_picousd FROM batchkit_request ORDER BY job_id, key")
    legs.run()
    assert rows(database, "SELECT id, status FROM answers ORDER BY id") == expected
    if disposition != "replace":
        ti = type("TI", (), {"dag_id": "d", "run_id": "r", "task_id": "f", "map_index": -1, "xcom_push": lambda *_, **__: None})
        FetchBatchOperator(
            task_id="f",
            batch_id=summary["batch_ids"][0],
            table="answers",
            sql_conn_id="warehouse",
            include_failed=True,
            write_disposition=disposition,
            rewrite=True,
        ).execute({"ti": ti()})
        assert rows(database, "SELECT id, status FROM answers ORDER BY id") == expected
    assert rows(database, "SELECT key, shard, status, batch_cost_picousd FROM batchkit_request ORDER BY job_id, key") == ledger
    (batch_of_3,) = rows(database, "SELECT batch_id FROM answers WHERE id = 3")
    assert batch_of_3 == (summary["batch_ids"][1],)


def test_a_first_round_that_is_landed_again_while_the_second_lands_leaves_its_outcomes(
    home: Path, database: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second round lands behind the first one's back, between its look at the rounds and its lock: it is read again."""
    from airflow_provider_batchkit.landing import reading
    from airflow_provider_batchkit.landing.standing import NO_OTHERS, OtherRounds
    from airflow_provider_batchkit.operators.batch import FetchBatchOperator

    fill(database, {1: "one", 2: "two [[sim:expired-once]]", 3: "three [[sim:overloaded]]"})
    legs = Legs(max_rounds=2, include_failed=True)
    summary = legs.run()
    outcomes = "SELECT key, shard, status, error_type FROM batchkit_request ORDER BY key"
    before = rows(database, outcomes), rows(database, "SELECT id, status, batch_id FROM answers ORDER BY id")
    looks: list[OtherRounds] = []

    class Late:
        @staticmethod
        def of(*args: Any) -> OtherRounds:
            looks.append(OtherRounds.of(*args) if looks else NO_OTHERS)
            return looks[-1]

    monkeypatch.setattr(reading, "OtherRounds", Late)
    ti = type("TI", (), {"dag_id": "d", "run_id": "r", "task_id": "f", "map_index": -1, "xcom_push": lambda *_, **__: None})
    first = summary["batch_ids"][0]
    fetch = FetchBatchOperator(task_id="f", batch_id=first, table="answers", sql_conn_id="warehouse", include_failed=True, rewrite=True)
    fetch.execute({"ti": ti()})
    assert len(looks) == 2 and looks[1].ranks == {"[2]": -1, "[3]": -1}
    assert (rows(database, outcomes), rows(database, "SELECT id, status, batch_id FROM answers ORDER BY id")) == before


def test_a_cap_without_room_ends_the_asking_with_what_has_landed(home: Path, database: Database, api: SimulatorProcess) -> None:
    """A round is held against the caps before it is sent; the answers of the rounds before it are kept, and the task says why."""
    fill(database, {i: f"thing {i}" + "[[sim:expired-once]]" * (i < 5) for i in range(10)})
    api.set(clock="manual")
    # 10 requests are bounded by about $0.014; half of them again do not fit beside the $0.01875 that the others cost
    legs = Legs(max_rounds=3, budget={"name": "b", "usd": "0.020"})
    (batch_id,) = legs.run().trigger.batch_ids
    api.end(batch_id)
    api.set(clock="instant")
    summary = legs.resume()
    assert summary["counts"] == {"succeeded": 5, "expired": 5}
    assert "The budget 'b' would be exceeded" in summary["stopped"]
    legs.parameters["budget"] = {"name": "b", "usd": "1"}
    assert legs.run()["counts"] == {"succeeded": 10}


def test_too_many_failures_are_judged_by_the_last_outcome(home: Path, database: Database) -> None:
    """fail_on_error_rate looks at what is failed in the end, after everything has landed."""
    fill(database, {1: "fine", 2: "late [[sim:expired-once]]", 3: "bad [[sim:errored]]"})
    assert Legs(max_rounds=2, fail_on_error_rate=0.34).run()["rows"] == 2
    with pytest.raises(AirflowFailException, match="1 of 3 rows"):
        Legs(max_rounds=2, fail_on_error_rate=0.33).run()


def test_a_wait_that_takes_too_long_fails_and_a_retry_goes_on(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The trigger's time-out is worth a retry, which waits for the same batches."""
    fill(database, {1: "slow"})
    api.set(clock="manual")
    legs = Legs()
    deferred = legs.run()
    with pytest.raises(AirflowException, match="did not end in time"):
        legs.run("execute_complete", event={"status": "timeout", "message": "The batches did not end in time."})
    with pytest.raises(AirflowException, match="refuses"):
        legs.run("execute_complete", event={"status": "error", "message": "The API refuses the key."})
    assert legs.run().trigger.batch_ids == deferred.trigger.batch_ids
    api.end(deferred.trigger.batch_ids[0])
    assert legs.run()["counts"] == {"succeeded": 1}


def test_batches_are_deleted_only_when_the_last_round_has_landed(home: Path, database: Database, api: SimulatorProcess) -> None:
    """delete_after_fetch waits for the end, and a cleared task recalls what is gone from the ledger."""
    fill(database, {1: "one", 2: "two [[sim:expired-once]]"})
    legs = Legs(max_rounds=2, delete_after_fetch=True)
    summary = legs.run()
    assert not set(summary["batch_ids"]) & {b["id"] for b in api.stats()["batches"]}
    assert legs.run() == summary


def test_an_empty_source_and_a_dry_run_end_as_in_submit(home: Path, database: Database, api: SimulatorProcess) -> None:
    """Skipped by default, and asked anew when the cleared task finds rows; a dry run sends nothing."""
    with database.engine().begin() as connection:
        connection.exec_driver_sql("CREATE TABLE things (id INTEGER PRIMARY KEY, note TEXT)")
    with pytest.raises(AirflowSkipException):
        Legs().run()
    empty = Legs(on_empty="succeed").run()
    assert (empty["batch_ids"], empty["rows"], empty["counts"]) == ([], 0, {})
    fill(database, {1: "one"})
    asked = api.stats()["requests_accepted"]
    with pytest.raises(AirflowSkipException, match="Dry run"):
        Legs(dry_run=True).run()
    assert api.stats()["requests_accepted"] == asked
    assert Legs().run()["counts"] == {"succeeded": 1}


def test_bad_parameters_and_a_table_that_does_not_fit_are_refused_before_anything_is_sent(
    home: Path, database: Database, api: SimulatorProcess
) -> None:
    """At parse time, or in the first leg: never after the bill."""
    for parameters in ({"max_rounds": 0}, {"poke_interval": 0}, {"write_disposition": "x"}, {"fail_on_error_rate": 2}):
        with pytest.raises(ValueError, match=next(iter(parameters))):
            Legs(**parameters).run()
    fill(database, {1: "one"})
    asked = api.stats()["requests_accepted"]
    with pytest.raises(AirflowFailException, match="lacks the columns"):
        Legs(table="things").run()
    with pytest.raises(AirflowFailException, match="mapped"):
        Legs(map_index=0, write_disposition="replace").run()
    assert api.stats()["requests_accepted"] == asked


@pytest.mark.parametrize("cancel", [True, False])
def test_killing_it_cancels_what_runs_only_where_that_is_asked_for(
    home: Path, database: Database, api: SimulatorProcess, cancel: bool
) -> None:
    """Batches of a round that has landed are over; only the running ones are canceled."""
    from airflow_provider_batchkit.ledger import Ledger
    from airflow_provider_batchkit.operators.batch import RunBatchOperator

    fill(database, {1: "one", 2: "two [[sim:expired-once]]"})
    api.set(clock="manual")
    legs = Legs(max_rounds=2, cancel_on_kill=cancel)
    api.end(legs.run().trigger.batch_ids[0])
    (running,) = legs.resume().trigger.batch_ids
    operator = RunBatchOperator(task_id="run", **legs.parameters)
    operator._job_id = Ledger(database.engine()).identify("d", "r", "run").job_id
    operator.on_kill()
    assert {b["id"]: b["status"] for b in api.stats()["batches"]}[running] == ("canceling" if cancel else "in_progress")


def test_a_round_in_doubt_waits_for_what_runs_and_sends_its_rows_once(home: Path, database: Database, api: SimulatorProcess) -> None:
    """A cut POST and somebody's running batch of the same size: the task waits for its end, rules it out, and sends the rows once."""
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

    fill(database, {1: "one"})
    assert Legs("before").run()["rows"] == 1
    fill(database, {1: "one", 2: "two [[sim:expired-once]]"})
    api.set(clock="manual")
    (foreign,) = BatchKitHook().kit.submit(["a", "b"], model="claude-haiku-5-5", max_tokens=9)
    api.faults.add("cut_before_accept")
    legs = Legs(max_rounds=2)
    deferred = legs.run()
    assert (deferred.trigger.batch_ids, deferred.method_name) == ([foreign], "resume")
    assert legs.pushed["waits_for"]["batch_ids"] == [foreign]
    assert foreign in legs.pushed["waits_for"]["why"]
    # its end was missed: the trigger fired because looking failed, and the task waits for a minute without a batch
    broken = legs.go_on(deferred, "error")
    assert (broken.trigger.batch_ids, broken.method_name) == ([], "resume")
    api.end(foreign)
    api.set(clock="instant")
    asked = api.stats()["requests_accepted"]
    assert legs.go_on(deferred)["counts"] == {"succeeded": 2}
    assert legs.pushed["waits_for"] is None
    assert api.stats()["requests_accepted"] == asked + 3


def test_a_batch_that_is_canceled_while_the_task_waits_is_waited_for_and_its_rows_asked_again(
    home: Path, database: Database, api: SimulatorProcess
) -> None:
    """Canceled in the Console: no row is asked again before the batch has ended, for what had run is billed and lands."""
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

    fill(database, {i: f"thing {i}" for i in range(6)})
    api.set(clock="manual")
    legs = Legs(max_rounds=2, max_requests_per_batch=3)
    deferred = legs.run()
    canceled, other = deferred.trigger.batch_ids
    BatchKitHook().kit.cancel(canceled)
    api.end(other)
    asked = api.stats()["requests_accepted"]
    assert legs.go_on(deferred).trigger.batch_ids == [canceled, other]
    assert api.stats()["requests_accepted"] == asked
    api.end(canceled)
    (again,) = legs.go_on(deferred).trigger.batch_ids
    assert api.stats()["requests_accepted"] == asked + 3
    api.end(again)
    result = legs.go_on(deferred)
    assert (result["counts"], [round_["counts"] for round_ in result["rounds"]]) == (
        {"succeeded": 6},
        [{"canceled": 3, "succeeded": 3}, {"succeeded": 3}],
    )


def test_rows_of_a_batch_that_is_gone_are_asked_again_only_when_the_user_says_so(
    home: Path, database: Database, api: SimulatorProcess
) -> None:
    """Deleted before it landed: the task says what it may have cost; with retry_gone a further round asks the rows."""
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

    fill(database, {1: "one", 2: "two", 3: "three"})
    api.set(clock="manual")
    legs = Legs(max_rounds=2, max_requests_per_batch=2)
    ids = legs.run().trigger.batch_ids
    for batch_id in ids:
        api.end(batch_id)
    BatchKitHook().kit.delete(ids[0])
    asked = api.stats()["requests_accepted"]
    for _ in range(2):
        with worth_a_retry(rf"{ids[0]} was not visible .*retry_gone=True"):
            legs.run()
    assert rows(database, "SELECT id FROM answers") == [(3,)]
    assert api.stats()["requests_accepted"] == asked
    api.set(clock="instant")
    legs.parameters["retry_gone"] = True
    summary = legs.run()
    assert sorted(rows(database, "SELECT id FROM answers")) == [(1,), (2,), (3,)]
    assert ([r["rows"] for r in summary["rounds"]], summary["counts"]) == ([1, 2], {"succeeded": 3})
    assert api.stats()["requests_accepted"] == asked + 2


def test_a_further_round_that_leaves_gone_rows_out_does_not_hide_them(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The second round asks what failed and not what is gone: the task lands it, and still says that rows have no answer."""
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

    fill(database, {1: "one", 2: "two", 3: "three [[sim:expired-once]]", 4: "four"})
    api.set(clock="manual")
    legs = Legs(max_rounds=3, max_requests_per_batch=2)
    ids = legs.run().trigger.batch_ids
    for batch_id in ids:
        api.end(batch_id)
    BatchKitHook().kit.delete(ids[0])
    api.set(clock="instant")
    with worth_a_retry("1 batches are gone before they landed, with 2 requests"):
        legs.run()
    assert sorted(rows(database, "SELECT id FROM answers")) == [(3,), (4,)]
    legs.parameters["retry_gone"] = True
    assert legs.run()["counts"] == {"succeeded": 4}


@pytest.mark.parametrize("disposition", ["merge", "replace"])
def test_an_older_runs_task_that_is_cleared_leaves_newer_answers_alone(
    home: Path, database: Database, api: SimulatorProcess, disposition: str
) -> None:
    """Monday's task runs again after Tuesday's: its summary is the old one, and nothing is asked or written."""
    fill(database, {1: "Monday"})
    monday = Legs("monday", write_disposition=disposition)
    first = monday.run()
    fill(database, {1: "Tuesday"})
    Legs("tuesday", write_disposition=disposition).run()
    asked = api.stats()["requests_accepted"]
    assert monday.run()["cost_tally"] == first["cost_tally"]
    assert rows(database, "SELECT response FROM answers") == [(answer_for("Tuesday"),)]
    assert api.stats()["requests_accepted"] == asked


def test_a_replace_deletes_nothing_while_a_batch_is_gone(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The gone half would be deleted and have nothing in its place."""
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

    fill(database, {1: "old", 2: "old too"})
    Legs("old").run()
    fill(database, {1: "new", 2: "new too"})
    api.set(clock="manual")
    legs = Legs("new", write_disposition="replace", max_requests_per_batch=1, prompt="{{ row.note }}!")
    ids = legs.run().trigger.batch_ids
    for batch_id in ids:
        api.end(batch_id)
    BatchKitHook().kit.delete(ids[0])
    for _ in range(2):
        with worth_a_retry("was not visible"):
            legs.run()
    assert sorted(rows(database, "SELECT response FROM answers")) == sorted([(answer_for("old"),), (answer_for("old too"),)])


def test_a_replace_with_failed_rows_written_replaces_once_there_are_answers(home: Path, database: Database, api: SimulatorProcess) -> None:
    """Rows without an answer do not count as the job's first answers."""
    fill(database, {1: "old", 9: "old too"})
    Legs("old").run()
    fill(database, {1: "new [[sim:expired-once]]", 2: "new too [[sim:expired-once]]"})
    summary = Legs("new", write_disposition="replace", include_failed=True, max_rounds=2).run()
    assert summary["counts"] == {"succeeded": 2}
    assert sorted(rows(database, "SELECT id, status FROM answers")) == [(1, "succeeded"), (2, "succeeded")]


@pytest.mark.parametrize("disposition", ["merge", "replace"])
def test_a_cleared_task_that_has_to_wait_fills_its_table_all_the_same(
    home: Path, database: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch, disposition: str
) -> None:
    """The table was dropped; one of the landed batches is hidden for a while when the task runs again."""
    fill(database, {i: f"thing {i}" for i in range(4)})
    legs = Legs(max_requests_per_batch=2, write_disposition=disposition)
    ids = legs.run()["batch_ids"]
    with database.engine().begin() as connection:
        connection.exec_driver_sql("DROP TABLE answers")
    monkeypatch.setattr(fetch, "PATIENCE_S", 0.0)
    monkeypatch.setenv("AIRFLOW__BATCHKIT__ABSENCE_SECONDS", "900")
    api.faults.add("status", endpoint="retrieve", batch=ids[1], status=404)
    deferred = legs.run()
    assert deferred.kwargs["about"] == "unseen"
    assert legs.go_on(deferred, "timeout")["rows"] == 4
    assert sorted(rows(database, "SELECT id FROM answers")) == [(i,) for i in range(4)]


def test_one_passing_404_costs_no_try(home: Path, database: Database, api: SimulatorProcess) -> None:
    """Right after the create the API does not show the batch: the task waits for it as for any other."""
    fill(database, {1: "one"})
    api.set(clock="manual")
    api.faults.add("status", endpoint="retrieve", status=404)
    deferred = Legs().run()
    api.set(clock="instant")
    assert (deferred.method_name, deferred.kwargs["about"]) == ("resume", "round")
    assert len(deferred.trigger.batch_ids) == 1


def test_a_gone_batch_beside_a_running_one_costs_no_try(home: Path, database: Database, api: SimulatorProcess) -> None:
    """What runs is waited for, and the end says what is gone."""
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

    fill(database, {1: "one", 2: "two", 3: "three"})
    assert Legs("before").run()["rows"] == 3
    api.set(clock="manual")
    legs = Legs(max_requests_per_batch=2)
    ids = legs.run().trigger.batch_ids
    api.end(ids[0])
    BatchKitHook().kit.delete(ids[0])
    deferred = legs.run()
    assert (deferred.kwargs["about"], deferred.trigger.batch_ids) == ("round", [ids[1]])
    api.end(ids[1])
    api.set(clock="instant")
    with worth_a_retry("1 batches are gone"):
        legs.resume()
    assert (3,) in rows(database, "SELECT id FROM answers")


def test_a_replace_whose_first_round_has_no_answer_replaces_with_the_second(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The old rows stay until there is something to put in their place."""
    fill(database, {1: "old"})
    assert Legs("old").run()["rows"] == 1
    fill(database, {2: "two [[sim:expired-once]]", 3: "three [[sim:expired-once]]"})
    one = Legs("one", write_disposition="replace")
    with pytest.raises(AirflowException, match="None of 2 rows has an answer"):
        one.run()
    assert rows(database, "SELECT id FROM answers") == [(1,)]
    assert Legs("two", write_disposition="replace", prompt="{{ row.note }}!", max_rounds=2).run()["rows"] == 2
    assert sorted(rows(database, "SELECT id FROM answers")) == [(2,), (3,)]


def test_a_retry_in_the_middle_of_a_round_sends_only_the_rest_of_it(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The second round's second batch is refused for a while: the retry sends that one, and lands both."""
    fill(database, {i: f"{i} [[sim:expired-once]]" for i in range(4)})
    api.set(clock="manual")
    legs = Legs(max_rounds=2, max_requests_per_batch=2)
    for batch_id in legs.run().trigger.batch_ids:
        api.end(batch_id)
    api.faults.add("status", endpoint="create", status=403, after=1)
    with pytest.raises(AirflowFailException, match="403"):
        legs.resume()
    deferred = legs.run()
    assert len(deferred.trigger.batch_ids) == 2
    for batch_id in deferred.trigger.batch_ids:
        api.end(batch_id)
    summary = legs.resume()
    assert [(r["rows"], r["requests"]) for r in summary["rounds"]] == [(4, 4), (4, 4)]
    assert api.stats()["requests_accepted"] == 8


# --- the three-task form ----------------------------------------------------------------------------------------------------------

AGAIN = """
submit = SubmitBatchOperator(
    task_id="submit", sql="SELECT id, note FROM things", key="id", prompt="{{ row.note }}", max_tokens=100, sql_conn_id="warehouse",
    max_requests_per_batch=2,
)
fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse")
again = SubmitBatchOperator(
    task_id="again", sql="SELECT id, note FROM things", key="id", prompt="{{ row.note }}", max_tokens=100, sql_conn_id="warehouse",
    only_failed_of=submit.output,
)
fetch2 = FetchBatchOperator(task_id="fetch2", batch_id=again.output, table="answers", sql_conn_id="warehouse")
fetch >> again
"""


def test_the_failed_rows_of_an_earlier_submit_are_asked_again(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The same operator with only_failed_of: the passing failures of both batches, and nothing else."""
    notes = {1: "a", 2: "b [[sim:expired-once]]", 3: "c [[sim:errored]]", 4: "d [[sim:overloaded-once]]"}
    fill(database, notes)
    asked = api.stats()["requests_accepted"]
    run = run_dag(home, AGAIN)
    assert run.state == "success"
    assert api.stats()["requests_accepted"] - asked == 6
    assert run.xcom("fetch2")["counts"] == {"succeeded": 2}
    assert dict(rows(database, "SELECT id, response FROM answers")) == {i: answer_for(notes[i]) for i in (1, 2, 4)}


def test_with_nothing_to_ask_again_the_second_submit_skips(home: Path, database: Database, api: SimulatorProcess) -> None:
    """on_empty says what happens: skip, by default."""
    fill(database, {1: "a", 2: "b [[sim:errored]]"})
    run = run_dag(home, AGAIN)
    assert run.states() == {"submit": "success", "fetch": "success", "again": "skipped", "fetch2": "skipped"}


@pytest.mark.parametrize(
    ("batch_ids", "message"), [("msgbatch_none", "does not know"), (None, "must be an id"), ("landed-not", "has not landed")]
)
def test_only_failed_of_wants_batches_whose_outcomes_are_known(
    home: Path, database: Database, api: SimulatorProcess, batch_ids: Any, message: str
) -> None:
    """A batch of elsewhere, an output that is None, a batch that nobody has fetched: refused, and never read as "all rows"."""
    from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

    fill(database, {1: "a"})
    ti = type("TI", (), {"dag_id": "d", "run_id": "r", "task_id": "s", "map_index": -1, "xcom_push": lambda *_, **__: None})
    source: dict[str, Any] = {
        "sql": "SELECT id, note FROM things",
        "key": "id",
        "prompt": "{{ row.note }}",
        "max_tokens": 9,
        "sql_conn_id": "warehouse",
    }
    first = SubmitBatchOperator(task_id="first", **source)
    again = SubmitBatchOperator(task_id="again", only_failed_of="{{ none }}", **source)
    asked = api.stats()["requests_accepted"]
    if batch_ids == "landed-not":
        (batch_ids,) = first.execute({"ti": ti()})
        asked += 1
    # as rendering leaves it
    again.only_failed_of = batch_ids
    ti.run_id = "r2"  # type: ignore[attr-defined]  # another job
    with pytest.raises(AirflowFailException, match=message):
        again.execute({"ti": ti()})
    assert api.stats()["requests_accepted"] == asked

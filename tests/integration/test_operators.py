"""The operators and the sensor as tasks of real DAG runs, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import csv
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.simulator import SimulatorProcess, answer_for
from tests.databases import Database, rows
from tests.integration.airflow_runs import run_dag


def fill(database: Database, *statements: str) -> None:
    with database.engine().begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


FETCH = 'fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse")\n'


def test_every_airport_gets_its_own_answer(home: Path, database: Database) -> None:
    """The 3,376 airports of vega-datasets, a table nobody here invented, quotes, slashes and all: every row is checked."""
    from vega_datasets import local_data

    with Path(local_data.airports.filepath).open(newline="") as lines:
        airports = list(csv.DictReader(lines))
    assert len(airports) == 3376
    with database.engine().begin() as connection:
        connection.exec_driver_sql("CREATE TABLE airports (iata TEXT PRIMARY KEY, name TEXT, city TEXT, state TEXT, latitude FLOAT)")
        connection.execute(sa.text("INSERT INTO airports VALUES (:iata, :name, NULLIF(:city, ''), :state, :latitude)"), airports)
    run = run_dag(
        home,
        """
        submit = SubmitBatchOperator(
            task_id="submit", sql="SELECT iata, name, city, state FROM airports", key="iata", model="claude-haiku-5-5", max_tokens=100,
            prompt="What is {{ row.name }} in {{ row.city }}, {{ row.state }} known for?",
            max_requests_per_batch=1000, sql_conn_id="warehouse",
        )
        wait = BatchSensor(task_id="wait", batch_id=submit.output, poke_interval=1)
        """,
        FETCH,
        "wait >> fetch",
    )
    assert run.state == "success"
    assert len(run.xcom("submit")) == 4
    summary = run.xcom("fetch")
    assert (summary["rows"], summary["counts"]) == (3376, {"succeeded": 3376})
    found = dict(rows(database, "SELECT iata, response FROM answers"))
    assert found == {a["iata"]: answer_for(f"What is {a['name']} in {a['city']}, {a['state']} known for?") for a in airports}


def test_prompts_from_another_task_are_sent_as_they_are(home: Path, database: Database) -> None:
    """A task's output may be the source; braces in a prompt are not Jinja, and its key is its position."""
    run = run_dag(
        home,
        """
        @task
        def prompts():
            return ["What does {{ x }} mean?", "And {% y %}?"]

        submit = SubmitBatchOperator(task_id="submit", requests=prompts(), model="claude-haiku-5-5", max_tokens=90, sql_conn_id="warehouse")
        """,
        FETCH,
    )
    assert run.state == "success"
    answers = {r[0] for r in rows(database, "SELECT response FROM answers")}
    assert answers == {answer_for("What does {{ x }} mean?"), answer_for("And {% y %}?")}
    keys = rows(database, "SELECT key FROM batchkit_request ORDER BY key")
    assert keys == [('["0"]',), ('["1"]',)]


def test_native_requests_and_row_mappings_are_sources_too(home: Path, database: Database) -> None:
    """A native request keeps its id as its key; row mappings take the prompt template; the connection's model is the default."""
    run = run_dag(
        home,
        """
        native = [{"custom_id": "n-1", "params": {"messages": [{"role": "user", "content": "native {{ no }}"}]}}]
        submit = SubmitBatchOperator(task_id="submit", requests=native, max_tokens=100, sql_conn_id="warehouse")
        mapped = SubmitBatchOperator(
            task_id="mapped", requests=[{"sku": "A", "name": "tea"}], key="sku", prompt="{{ row.name }} on {{ ds_nodash or 'no day' }}",
            max_tokens=100, sql_conn_id="warehouse",
        )
        """,
        FETCH,
        'FetchBatchOperator(task_id="f2", batch_id=mapped.output, table="skus", sql_conn_id="warehouse")',
    )
    assert run.state == "success"
    assert rows(database, "SELECT key FROM batchkit_request ORDER BY key") == [('["A"]',), ('["n-1"]',)]
    assert rows(database, "SELECT response, model FROM answers") == [(answer_for("native {{ no }}"), "claude-sonnet-5")]
    assert rows(database, "SELECT sku FROM skus") == [("A",)]


@pytest.mark.parametrize(
    ("on_empty", "states"), [("skip", ("skipped", "skipped")), ("succeed", ("success", "success")), ("fail", ("failed", "x"))]
)
def test_an_empty_source_does_what_on_empty_says(home: Path, database: Database, on_empty: str, states: tuple[str, str]) -> None:
    """Skip by default; succeed lets the rest run on nothing; fail fails."""
    fill(database, "CREATE TABLE products (sku TEXT, name TEXT)")
    run = run_dag(
        home,
        f"""
        submit = SubmitBatchOperator(
            task_id="submit", sql="SELECT * FROM products", key="sku", prompt="x", max_tokens=100, on_empty="{on_empty}",
            sql_conn_id="warehouse",
        )
        wait = BatchSensor(task_id="wait", batch_id=submit.output)
        """,
        FETCH,
    )
    assert run.states()["submit"] == states[0]
    assert run.states()["fetch"] in (states[1], "upstream_failed")


@pytest.mark.parametrize("mode", ["poke", "reschedule"])
def test_the_sensor_waits_on_a_worker_where_that_is_wanted(home: Path, database: Database, api: SimulatorProcess, mode: str) -> None:
    """deferrable=False pokes, in either mode."""
    api.set(clock="polls:2" if mode == "poke" else "instant")
    run = run_dag(
        home,
        f"""
        submit = SubmitBatchOperator(task_id="submit", requests=["a"], max_tokens=100, sql_conn_id="warehouse")
        wait = BatchSensor(task_id="wait", batch_id=submit.output, deferrable=False, mode="{mode}", poke_interval=0.2)
        """,
    )
    api.set(clock="instant")
    assert run.states() == {"submit": "success", "wait": "success"}
    assert run.xcom("wait") == {"succeeded": 1, "errored": 0, "canceled": 0, "expired": 0}


def test_a_sensor_that_times_out_fails_and_says_that_the_batch_goes_on(home: Path, api: SimulatorProcess) -> None:
    """The trigger's deadline becomes a sensor time-out; soft_fail makes it a skip."""
    api.set(clock="manual")
    run = run_dag(
        home,
        """
        submit = SubmitBatchOperator(task_id="submit", requests=["a"], max_tokens=100, sql_conn_id="warehouse")
        wait = BatchSensor(task_id="wait", batch_id=submit.output, poke_interval=0.2, timeout=0.5)
        soft = BatchSensor(task_id="soft", batch_id=submit.output, poke_interval=0.2, timeout=0.5, soft_fail=True)
        """,
    )
    api.set(clock="instant")
    assert run.states() == {"submit": "success", "wait": "failed", "soft": "skipped"}


def test_a_mapping_is_no_list_of_ids() -> None:
    """A fetch's summary in place of the submit's list: its names are not ids."""
    from airflow_provider_batchkit.exceptions import BatchInputError
    from airflow_provider_batchkit.operators.tasks import as_batch_ids

    for given in ({"batch_ids": ["a"], "table": "t"}, [{"batch_ids": ["a"]}]):
        with pytest.raises(BatchInputError, match="not a mapping with batch_ids"):
            as_batch_ids(given)


def test_a_list_of_ids_that_jinja_rendered_to_text_is_read(home: Path, database: Database) -> None:
    """The template '{{ ti.xcom_pull(...) }}' gives the list's repr; both it and the first id alone work."""
    run = run_dag(
        home,
        """
        submit = SubmitBatchOperator(
            task_id="submit", requests=["a", "b"], max_tokens=100, max_requests_per_batch=1, sql_conn_id="warehouse",
        )
        all_ = FetchBatchOperator(
            task_id="all", batch_id="{{ ti.xcom_pull(task_ids='submit') }}", table="all_answers", sql_conn_id="warehouse",
        )
        first = FetchBatchOperator(
            task_id="first", batch_id="{{ ti.xcom_pull(task_ids='submit', key='batch_id') }}", table="one_answer", sql_conn_id="warehouse",
        )
        submit >> all_ >> first
        """,
    )
    assert run.state == "success"
    assert rows(database, "SELECT COUNT(*) FROM all_answers") == [(2,)]
    assert rows(database, "SELECT COUNT(*) FROM one_answer") == [(1,)]


def test_fetch_can_be_mapped_over_the_batches(home: Path, database: Database) -> None:
    """One mapped fetch per batch lands the same table."""
    run = run_dag(
        home,
        """
        submit = SubmitBatchOperator(
            task_id="submit", requests=["a", "b", "c"], max_tokens=100, max_requests_per_batch=1, sql_conn_id="warehouse",
        )
        FetchBatchOperator.partial(task_id="fetch", table="answers", sql_conn_id="warehouse").expand(batch_id=submit.output)
        """,
    )
    assert run.state == "success"
    assert rows(database, "SELECT COUNT(*) FROM answers") == [(3,)]


def test_too_many_failures_fail_the_fetch_after_the_answers_have_landed(home: Path, database: Database) -> None:
    """fail_on_error_rate is judged last, so that no answer is lost."""
    run = run_dag(
        home,
        """
        submit = SubmitBatchOperator(task_id="submit", requests=["a", "[[sim:errored]]"], max_tokens=100, sql_conn_id="warehouse")
        strict = FetchBatchOperator(
            task_id="strict", batch_id=submit.output, table="strict", sql_conn_id="warehouse", fail_on_error_rate=0.4, retries=3,
        )
        lax = FetchBatchOperator(
            task_id="lax", batch_id=submit.output, table="lax", sql_conn_id="warehouse", fail_on_error_rate=0.5, include_failed=True,
        )
        submit >> lax >> strict
        """,
    )
    assert run.states() == {"submit": "success", "strict": "failed", "lax": "success"}
    assert rows(database, "SELECT COUNT(*) FROM strict") == [(1,)]
    assert rows(database, "SELECT COUNT(*) FROM lax") == [(2,)]


def test_delete_after_fetch_removes_the_batch(home: Path, api: SimulatorProcess) -> None:
    """Once landed, the results need not stay with the API."""
    run = run_dag(
        home,
        """
        submit = SubmitBatchOperator(task_id="submit", requests=["to be deleted"], max_tokens=100, sql_conn_id="warehouse")
        FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse", delete_after_fetch=True)
        """,
    )
    assert run.state == "success"
    assert run.xcom("submit")[0] not in {batch["id"] for batch in api.stats()["batches"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of sql, input_path and requests"),
        ({"sql": "SELECT 1", "requests": ["a"]}, "exactly one of sql, input_path and requests"),
        ({"sql": "SELECT 1", "prompt": "x"}, "sql needs key"),
        ({"sql": "SELECT 1", "key": "a"}, "sql needs key .* and prompt"),
        ({"requests": ["a"], "on_empty": "explode"}, "on_empty must be"),
    ],
)
def test_contradictory_parameters_are_refused_when_the_dag_is_parsed(arguments: dict[str, Any], message: str) -> None:
    """The author sees it as an import error, not at 3 a.m."""
    from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

    with pytest.raises(ValueError, match=message):
        SubmitBatchOperator(task_id="submit", sql_conn_id="warehouse", **arguments)


def test_the_hook_tests_its_connection(home: Path) -> None:
    """test_connection is the official hook's, on the same connection."""
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

    assert BatchKitHook().test_connection() == (True, "Connection established!")


def test_a_mapped_fetch_that_would_replace_its_siblings_is_refused(home: Path, database: Database) -> None:
    """Replacing in a mapped fetch would leave the last batch only."""
    run = run_dag(
        home,
        """
        submit = SubmitBatchOperator(
            task_id="submit", requests=["a", "b"], max_tokens=100, max_requests_per_batch=1, sql_conn_id="warehouse",
        )
        FetchBatchOperator.partial(
            task_id="fetch", table="answers", sql_conn_id="warehouse", write_disposition="replace", retries=3,
        ).expand(batch_id=submit.output)
        """,
    )
    assert run.states() == {"submit": "success", "fetch[0]": "failed", "fetch[1]": "failed"}


def test_a_refused_batch_fails_the_task_at_once_whatever_its_retries(home: Path, api: SimulatorProcess) -> None:
    """A 400 is the same on every try: no retry is burned, one POST goes out."""
    posts = api.stats()["posts"]
    api.faults.add("status", endpoint="create", status=400)
    run = run_dag(
        home,
        'submit = SubmitBatchOperator(task_id="submit", requests=["a"], max_tokens=100, sql_conn_id="warehouse", retries=2, retry_delay=0)',
    )
    assert run.states() == {"submit": "failed"}
    assert api.stats()["posts"] == posts + 1


def test_a_key_that_no_result_table_can_hold_is_refused_before_anything_is_sent(
    home: Path, api: SimulatorProcess, database: Database
) -> None:
    """A key column called status would clash with a result column: found at submit, not after the bill."""
    fill(database, "CREATE TABLE things (status TEXT)", "INSERT INTO things VALUES ('x')")
    posts = api.stats()["posts"]
    run = run_dag(
        home,
        """
        submit = SubmitBatchOperator(
            task_id="submit", sql="SELECT * FROM things", key="status", prompt="{{ row.status }}", max_tokens=100, sql_conn_id="warehouse",
        )
        """,
    )
    assert run.states() == {"submit": "failed"}
    assert api.stats()["posts"] == posts


@pytest.mark.parametrize("cancel", [True, False])
def test_killing_submit_cancels_its_batches_only_where_that_is_asked_for(home: Path, api: SimulatorProcess, cancel: bool) -> None:
    """on_kill of a running submit: cancel_on_kill decides, and paid work survives by default."""
    from airflow_provider_batchkit.links import XCOM_KEY, console_url
    from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

    api.set(clock="manual")
    operator = SubmitBatchOperator(task_id="submit", requests=["a"], max_tokens=100, sql_conn_id="warehouse", cancel_on_kill=cancel)
    pushed: dict[str, Any] = {}
    ti = type(
        "TI",
        (),
        {
            "dag_id": "d",
            "run_id": "r",
            "task_id": "submit",
            "map_index": -1,
            "xcom_push": lambda _, key, value: pushed.update({key: value}),
        },
    )
    operator.requests = ["a"]  # type: ignore[assignment]  # as rendering leaves it
    (batch_id,) = operator.execute({"ti": ti()})
    operator.on_kill()
    status = {b["id"]: b["status"] for b in api.stats()["batches"]}[batch_id]
    api.set(clock="instant")
    assert status == ("canceling" if cancel else "in_progress")
    assert pushed == {"batch_id": batch_id, XCOM_KEY: console_url(batch_id)}


@pytest.mark.parametrize("cancel", [True, False])
def test_killing_the_deferred_sensor_cancels_only_where_that_is_asked_for(home: Path, api: SimulatorProcess, cancel: bool) -> None:
    """The trigger's on_kill, which Airflow 3.3 also calls at a Clear, leaves the batch alone by default."""
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
    from airflow_provider_batchkit.triggers.batch import BatchTrigger

    api.set(clock="manual")
    (batch_id,) = BatchKitHook().kit.submit(["a"], model="claude-haiku-5-5", max_tokens=9)
    trigger = BatchTrigger(batch_ids=[batch_id], anthropic_conn_id="anthropic_default", poke_interval=1, cancel_on_kill=cancel)
    asyncio.run(trigger.on_kill())
    status = {b["id"]: b["status"] for b in api.stats()["batches"]}[batch_id]
    api.set(clock="instant")
    assert status == ("canceling" if cancel else "in_progress")


@pytest.mark.parametrize("cancel", [True, False])
def test_killing_a_poking_sensor_cancels_only_where_that_is_asked_for(home: Path, api: SimulatorProcess, cancel: bool) -> None:
    """The sensor's own on_kill, on a worker, follows cancel_on_kill too."""
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
    from airflow_provider_batchkit.sensors.batch import BatchSensor

    api.set(clock="manual")
    (batch_id,) = BatchKitHook().kit.submit(["a"], model="claude-haiku-5-5", max_tokens=9)
    BatchSensor(task_id="wait", batch_id=batch_id, deferrable=False, cancel_on_kill=cancel).on_kill()
    status = {b["id"]: b["status"] for b in api.stats()["batches"]}[batch_id]
    api.set(clock="instant")
    assert status == ("canceling" if cancel else "in_progress")

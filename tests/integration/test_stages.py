"""Stages of submit, wait and fetch: chained by their tables, and mapped over partitions; on SQLite and PostgreSQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG, Asset

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.operators.stages import BatchStage, batch_stage
from airflow_provider_batchkit.simulator import SimulatorProcess, answer_for
from tests.databases import Database, rows
from tests.integration.airflow_runs import run_dag


@pytest.fixture
def home(home: Path, database: Database) -> Path:
    """Airflow with its connections, and tickets of two days in the warehouse."""
    with database.engine().begin() as connection:
        connection.exec_driver_sql("CREATE TABLE tickets (id INTEGER PRIMARY KEY, day TEXT, body TEXT)")
        connection.exec_driver_sql("INSERT INTO tickets VALUES (1, 'mo', 'broken'), (2, 'mo', 'late'), (3, 'tu', 'thanks')")
    return home


def asked(question: str, *bodies: str) -> list[str]:
    return [answer_for(f"{question} {body}") for body in bodies]


STAGE = "from airflow_provider_batchkit.operators.stages import batch_stage\n"


def test_a_stage_reads_the_table_that_the_last_one_wrote(home: Path, database: Database) -> None:
    """The second asks about the answers of the first, and only about some of them; what they had in common was given once."""
    ended = run_dag(
        home,
        STAGE,
        """
        common = {"sql_conn_id": "warehouse", "model": "claude-haiku-5-5", "max_tokens": 50, "poke_interval": 1}
        classify = batch_stage(
            "classify", sql="SELECT id, body FROM tickets", key="id", prompt="Class {{ row.body }}", table="classes", **common
        )
        reply = batch_stage(
            "reply", sql="SELECT id, response FROM classes WHERE response LIKE '%Class la%'", key="id", table="replies",
            prompt="Reply to {{ row.response }}", write_disposition="append", **common,
        )

        @task
        def bill(summary):
            return summary["rows"]

        classify >> reply
        bill(reply.output)
        """,
    )
    assert ended.states() == {
        **{f"{stage}.{name}": "success" for stage in ("classify", "reply") for name in ("submit", "wait", "fetch")},
        "bill": "success",
    }
    (late,) = asked("Class", "late")
    assert rows(database, "SELECT id, response FROM replies") == [(2, answer_for(f"Reply to {late}"))]
    assert ended.xcom("bill") == 1


def test_a_stage_in_a_mapped_task_group_runs_for_each_partition(home: Path, database: Database, simulator: SimulatorProcess) -> None:
    """Each partition is a job of its own, from its query to the table; values of the mapping reach every templated parameter."""
    place = "?" if database.kind == "sqlite" else "%s"
    ended = run_dag(
        home,
        STAGE,
        f"""
        from airflow.sdk import task_group

        @task
        def days():
            return ["mo", "tu"]

        @task_group
        def per_day(day):
            batch_stage(
                "classify", sql="SELECT id, body FROM tickets WHERE day = {place}", parameters=[day], key="id", max_tokens=50,
                prompt="Class {{{{ row.body }}}}", table="classes", sql_conn_id="warehouse", poke_interval=1,
            )

        per_day.expand(day=days())
        """,
    )
    tasks = {f"per_day.classify.{name}[{index}]" for name in ("submit", "wait", "fetch") for index in (0, 1)}
    assert ended.states() == dict.fromkeys(["days", *tasks], "success")
    assert [ended.xcom("per_day.classify.fetch", map_index=index)["rows"] for index in (0, 1)] == [2, 1]
    answers = asked("Class", "broken", "late", "thanks")
    assert rows(database, "SELECT response FROM classes ORDER BY id") == [(answer,) for answer in answers]


@pytest.mark.parametrize("mapped", ["sql", "parameters"])
def test_mapped_operators_run_for_each_partition(home: Path, database: Database, mapped: str) -> None:
    """Without a group: a mapped submit, a sensor mapped over its batches, and a fetch mapped likewise."""
    place = "?" if database.kind == "sqlite" else "%s"
    if mapped == "sql":
        partitions = "sql=[f\"SELECT id, body FROM tickets WHERE day = '{day}'\" for day in ('mo', 'tu')]"
        query = ""
    else:
        partitions, query = "parameters=[['mo'], ['tu']]", f'sql="SELECT id, body FROM tickets WHERE day = {place}",'
    ended = run_dag(
        home,
        f"""
        submit = SubmitBatchOperator.partial(
            task_id="submit", {query} key="id", prompt="Class {{{{ row.body }}}}", max_tokens=50, sql_conn_id="warehouse"
        ).expand({partitions})
        wait = BatchSensor.partial(task_id="wait", poke_interval=1).expand(batch_id=submit.output)
        fetch = FetchBatchOperator.partial(task_id="fetch", table="classes", sql_conn_id="warehouse").expand(batch_id=submit.output)
        wait >> fetch
        """,
    )
    assert ended.states() == {f"{name}[{index}]": "success" for name in ("submit", "wait", "fetch") for index in (0, 1)}
    answers = asked("Class", "broken", "late", "thanks")
    assert rows(database, "SELECT response FROM classes ORDER BY id") == [(answer,) for answer in answers]


def test_a_mapped_run_is_the_same_job_in_every_leg(home: Path, database: Database, api: SimulatorProcess) -> None:
    """It defers for its batches, and what it asks is rendered anew in the next leg."""
    api.set(clock="polls:3")
    ended = run_dag(
        home,
        """
        from airflow_provider_batchkit.operators.batch import RunBatchOperator

        RunBatchOperator.partial(
            task_id="run", key="id", prompt="Class {{ row.body }}", max_tokens=50, sql_conn_id="warehouse", poke_interval=1, table="classes"
        ).expand(sql=["SELECT id, body FROM tickets WHERE day = '{{ 'mo' }}'", "SELECT id, body FROM tickets WHERE day = 'tu'"])
        """,
    )
    assert ended.states() == {"run[0]": "success", "run[1]": "success"}
    assert rows(database, "SELECT response FROM classes ORDER BY id") == [
        (answer,) for answer in asked("Class", "broken", "late", "thanks")
    ]


def stage(**parameters: Any) -> BatchStage:
    """A stage in a DAG of its own."""
    with DAG("stages", schedule=None):
        return batch_stage("classify", **{"table": "t", "requests": ["A"], "sql_conn_id": "warehouse", **parameters})


def test_every_parameter_reaches_the_tasks_that_have_it() -> None:
    """And no other: what several of them have is given once, and what all of Airflow's tasks have goes into ``default_args``."""
    made = stage(
        anthropic_conn_id="claude",
        cancel_on_kill=True,
        params={"top_k": 3},
        poke_interval=7,
        timeout=99,
        write_disposition="append",
        outlets=[Asset("t")],
        default_args={"retries": 5},
    )
    tasks = (made.submit, made.wait, made.fetch)
    assert [task.task_id for task in tasks] == ["classify.submit", "classify.wait", "classify.fetch"]
    assert [task.anthropic_conn_id for task in tasks] == ["claude"] * 3
    assert [task.retries for task in tasks] == [5] * 3
    assert (made.submit.sql_conn_id, made.fetch.sql_conn_id) == ("warehouse", "warehouse")
    assert (made.submit.cancel_on_kill, made.wait.cancel_on_kill, made.submit.request_params) == (True, True, {"top_k": 3})
    assert (made.wait.poke_interval, made.wait.timeout) == (7, 99)
    assert (made.fetch.table, made.fetch.write_disposition, made.fetch.outlets) == ("t", "append", [Asset("t")])
    assert (made.submit.outlets, made.wait.outlets) == ([], [])
    assert made.fetch.upstream_task_ids == {"classify.submit", "classify.wait"}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"promt": "A", "retries": 3}, TypeError, "Stage classify: promt, retries is a parameter of neither submit, wait nor fetch"),
        ({"batch_id": "b"}, TypeError, "Stage classify: batch_id is a parameter of neither"),
        ({"sql": "SELECT 1"}, BatchInputError, "Task classify.submit: give exactly one of"),
        ({"write_disposition": "upsert"}, BatchInputError, "Task classify.fetch: write_disposition must be"),
    ],
)
def test_a_wrong_parameter_is_refused_when_the_dag_is_parsed(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    """A misspelt one names the stage, a bad value the task."""
    with pytest.raises(error, match=message):
        stage(**wrong)

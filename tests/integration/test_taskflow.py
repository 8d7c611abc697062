"""``@task.claude_batch`` in real DAG runs, on SQLite and PostgreSQL: a function says what to ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import task

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.request.build import encode_params, params_digest
from airflow_provider_batchkit.simulator import SimulatorProcess, answer_for
from tests.databases import Database, rows
from tests.integration.airflow_runs import Run, run_dag

FETCH = """
wait = BatchSensor(task_id="wait", batch_id=batches, poke_interval=1)
fetch = FetchBatchOperator(task_id="fetch", batch_id=batches, table="answers", sql_conn_id="warehouse")
wait >> fetch
"""


def test_a_generator_of_rows_is_asked_row_by_row(home: Path, database: Database) -> None:
    """Its arguments come from other tasks and from the context; its rows never pass through XCom; the table is keyed by them."""
    ended = run_dag(
        home,
        """
        @task
        def start():
            return 10

        @task.claude_batch(
            key="id", prompt="About {{ row.name }} in {{ run_id[:4] }}", model="claude-haiku-5-5", max_tokens=100, sql_conn_id="warehouse",
            max_requests_per_batch=4,
        )
        def ask(first, count=2, *, dag_run):
            for number in range(first, first + count):
                yield {"id": number, "name": f"{dag_run.dag_id[:4]} {number}"}

        batches = ask(start(), count=9)
        """,
        FETCH,
    )
    assert ended.states() == {"start": "success", "ask": "success", "wait": "success", "fetch": "success"}
    batch_ids = ended.xcom("ask")
    assert len(batch_ids) == 3
    assert ended.xcom("ask", "batch_id") == batch_ids[0]
    assert dict(rows(database, "SELECT id, response FROM answers")) == {n: answer_for(f"About test {n} in manu") for n in range(10, 19)}


def test_the_rows_of_a_generator_are_not_held(home: Path, tmp_path: Path) -> None:
    """Of 5,000 rows no more than two chunks of 500 and a chunk of requests are alive at a time."""
    ended = run_dag(
        home,
        f"""
        from pathlib import Path

        class Row(dict):
            alive = peak = 0

            def __init__(self, **columns):
                super().__init__(**columns)
                Row.alive += 1
                Row.peak = max(Row.peak, Row.alive)

            def __del__(self):
                Row.alive -= 1

        @task.claude_batch(key="id", prompt="Row {{{{ row.id }}}}", model="claude-haiku-5-5", max_tokens=10, sql_conn_id="warehouse")
        def ask():
            yield from (Row(id=number) for number in range(5_000))
            Path({str(tmp_path / "peak")!r}).write_text(str(Row.peak))

        ask()
        """,
    )
    assert ended.state == "success"
    assert int((tmp_path / "peak").read_text()) <= 1_500


def test_prompts_and_native_requests_are_asked_as_they_are(home: Path, database: Database) -> None:
    """A bare decorator takes its parameters from the DAG's ``default_args``; Jinja in what the function returns is the user's own text."""
    ended = run_dag(
        home,
        """
        dag.default_args = {"sql_conn_id": "warehouse", "max_tokens": 50}

        @task.claude_batch
        def ask():
            messages = [{"role": "user", "content": "native {{ no }}"}]
            return ("Name a {{ river }}.", {"custom_id": "n-1", "params": {"messages": messages}})

        batches = ask()
        """,
        FETCH,
    )
    assert ended.state == "success"
    assert rows(database, "SELECT request_id, response, model FROM answers ORDER BY request_id") == [
        ("0", answer_for("Name a {{ river }}."), "claude-sonnet-5"),
        ("n-1", answer_for("native {{ no }}"), "claude-sonnet-5"),
    ]


def test_a_mapped_function_is_a_job_per_value(home: Path, database: Database, simulator: SimulatorProcess) -> None:
    """``partial`` and ``expand`` go to the function, and each mapped instance's batches are waited for and fetched by one of theirs."""
    ended = run_dag(
        home,
        """
        @task.claude_batch(key="id", prompt="{{ row.text }}", max_tokens=50, params={"temperature": 0.5}, sql_conn_id="warehouse")
        def ask(word, day):
            return [{"id": f"{day}-{number}", "text": f"{word} {day} {number}"} for number in range(2)]

        batches = ask.partial(word="day").expand(day=["mo", "tu", "we"])
        BatchSensor.partial(task_id="wait", poke_interval=1).expand(batch_id=batches) >> FetchBatchOperator.partial(
            task_id="fetch", table="answers", sql_conn_id="warehouse"
        ).expand(batch_id=batches)
        """,
    )
    assert ended.states() == {f"{name}[{index}]": "success" for name in ("ask", "wait", "fetch") for index in range(3)}
    assert dict(rows(database, "SELECT id, response FROM answers")) == {
        f"{day}-{n}": answer_for(f"day {day} {n}") for day in ("mo", "tu", "we") for n in range(2)
    }
    assert len(rows(database, "SELECT job_id FROM batchkit_job")) == 3


def test_a_retry_asks_only_the_rows_that_no_attempt_has_asked(
    home: Path, database: Database, simulator: SimulatorProcess, tmp_path: Path
) -> None:
    """The function is called again; rows of the first attempt's accepted batch are known by their keys, also in another order."""
    before = simulator.stats()["requests_accepted"]
    ended = run_dag(
        home,
        f"""
        from datetime import timedelta
        from pathlib import Path

        def fail_once(context, result):
            if context["ti"].try_number == 1:
                raise RuntimeError("the worker dies after its last POST")

        @task.claude_batch(
            key="id", prompt="Retry {{{{ row.id }}}}", model="claude-haiku-5-5", max_tokens=50, max_requests_per_batch=3,
            sql_conn_id="warehouse", retries=1, retry_delay=timedelta(0), post_execute=fail_once,
        )
        def ask(ti):
            with Path({str(tmp_path / "calls")!r}).open("a") as calls:
                calls.write(f"{{ti.try_number}} ")
            for number in range(6) if ti.try_number == 1 else reversed(range(8)):
                yield {{"id": number}}

        batches = ask()
        """,
        FETCH,
    )
    assert ended.state == "success"
    assert (tmp_path / "calls").read_text() == "1 2 "
    assert simulator.stats()["requests_accepted"] - before == 8
    assert dict(rows(database, "SELECT id, response FROM answers")) == {n: answer_for(f"Retry {n}") for n in range(8)}


def test_an_error_of_the_function_sends_nothing(home: Path, simulator: SimulatorProcess, capfd: pytest.CaptureFixture[str]) -> None:
    """Also one in the midst of a generator, after rows that were good: all is read before anything is sent."""
    before = simulator.stats()["requests_accepted"]
    ended = _ask(home, "yield 'Name a river.'\nraise LookupError('no more rivers')")
    assert ended.states()["ask"] == "failed"
    assert "LookupError: no more rivers" in capfd.readouterr().out
    assert simulator.stats()["requests_accepted"] == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pass", "The function ask returned nothing. Does it lack a return or a yield?"),
        ("return 'Name a river.'", "The function ask returned a str. For one request, return a list of one."),
        ("return {'a': 1}", "The function ask returned a dict. For one request, return a list of one."),
        ("return {'one', 'two'}", "The function ask returned a set, which has no order"),
        ("return 3", "The function ask returned a int. It must return a list, a generator"),
        ("import pandas\nreturn pandas.DataFrame({'prompt': ['x']})", "to_dict('records')"),
        ("return [1]", "request 0: a request is a mapping or a string, not int"),
    ],
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_function_that_returns_something_else_is_told_so(
    home: Path, simulator: SimulatorProcess, capfd: pytest.CaptureFixture[str], body: str, message: str
) -> None:
    """The error names the function and the type; the task fails at once, and nothing was sent."""
    before = simulator.stats()["requests_accepted"]
    assert _ask(home, body).states()["ask"] == "failed"
    assert message in capfd.readouterr().out
    assert simulator.stats()["requests_accepted"] == before


def _ask(home: Path, body: str) -> Run:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return run_dag(home, f'@task.claude_batch(max_tokens=50, sql_conn_id="warehouse")\ndef ask():\n{lines}\nbatches = ask()\n', FETCH)


@pytest.mark.parametrize("source", ["sql", "input_path", "requests"])
def test_a_second_source_is_refused_when_the_dag_is_parsed(source: str) -> None:
    """The function is the source."""
    more: dict[str, Any] = {source: "SELECT 1"}

    @task.claude_batch(sql_conn_id="warehouse", **more)
    def ask() -> list[str]:
        return []

    with pytest.raises(BatchInputError, match=f"what the function returns; leave {source} out"):
        ask()


def test_a_function_that_cannot_be_read_is_refused_when_the_dag_is_parsed() -> None:
    """An async one, and one whose annotation promises a mapping."""

    @task.claude_batch(sql_conn_id="warehouse")
    async def later() -> list[str]:
        return []

    @task.claude_batch(sql_conn_id="warehouse")
    def mapping() -> dict[str, str]:
        return {}

    with pytest.raises(BatchInputError, match="must not be async"):
        later()
    with pytest.raises(BatchInputError, match="annotated to return a mapping"):
        mapping()


def test_the_params_of_a_dag_are_not_sent_to_the_api(home: Path, database: Database, simulator: SimulatorProcess) -> None:
    """Airflow merges them into the parameter of the same name, of plain and of mapped tasks; the task's own are sent, the DAG's are not."""
    ended = run_dag(
        home,
        """
        dag.params.update({"day": "mo", "temperature": 0.5})
        common = {"max_tokens": 50, "sql_conn_id": "warehouse"}
        SubmitBatchOperator(task_id="plain", requests=["A {{ no }}"], params={"top_k": 3}, **common)
        SubmitBatchOperator.partial(task_id="mapped", params={"top_k": 4}, **common).expand(requests=[["B"]])

        @task.claude_batch(params={"temperature": 0.25}, **common)
        def ask(params):
            return [f"C {params['day']}"]

        ask()
        """,
    )
    assert ended.states() == {"plain": "success", "mapped[0]": "success", "ask": "success"}
    common = {"max_tokens": 50, "model": "claude-sonnet-5"}
    sent = [
        {**common, "messages": [{"role": "user", "content": "A {{ no }}"}], "top_k": 3},
        {**common, "messages": [{"role": "user", "content": "B"}], "top_k": 4},
        {**common, "messages": [{"role": "user", "content": "C mo"}], "temperature": 0.25},
    ]
    batch_ids = [*ended.xcom("plain"), *ended.xcom("mapped", map_index=0), *ended.xcom("ask")]
    asked = [custom_id.partition("-")[2] for batch_id in batch_ids for custom_id in simulator.custom_ids(batch_id)]
    assert asked == [params_digest(encode_params(params)) for params in sent]


def test_a_function_is_called_again_in_the_leg_after_a_wait(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The first row goes alone and is waited for, deferred: the rest is what the function gives then."""
    ended = run_dag(
        home,
        """
        @task.claude_batch(
            key="id", prompt="About {{ row.name }}", system="Be brief. " * 2000, cache_system="5m", prime_cache=True, poke_interval=0.2,
            model="claude-haiku-5-5", max_tokens=100, sql_conn_id="warehouse",
        )
        def ask():
            return [{"id": number, "name": f"{number}"} for number in range(5)]

        batches = ask()
        """,
        FETCH,
    )
    assert ended.state == "success"
    assert len(ended.xcom("ask")) == 2
    assert dict(rows(database, "SELECT id, response FROM answers")) == {n: answer_for(f"About {n}") for n in range(5)}

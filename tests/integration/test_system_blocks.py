"""``system`` as content blocks: what reaches the API, what the cache makes of it, and that nothing is asked twice for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_batchkit import BatchKit
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.jobs.rounds import Round
from airflow_provider_batchkit.model import BatchItem
from airflow_provider_batchkit.operators.batch import RunBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.operators.stages import batch_stage
from airflow_provider_batchkit.simulator import Simulator, SimulatorProcess, SimulatorSettings, answer_for
from tests.connections import anthropic_connection
from tests.databases import Database, rows
from tests.gateway import Gateway
from tests.integration.airflow_runs import run_dag
from tests.warehouse import kit_for

MODEL = "claude-haiku-4-5"
ANSWERS = "claude-haiku-4-5-20251001"
#: 5,000 tokens of the simulator
RULES = ("Answer in the house style, in one sentence. " * 455)[:20_000]
HOUR = {"type": "ephemeral", "ttl": "1h"}
ROWS = 6


@pytest.fixture
def api() -> Iterator[SimulatorProcess]:
    with SimulatorProcess(SimulatorSettings(cache_concurrency=None)) as process:
        yield process


@pytest.fixture
def gateway(api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch, database: Database) -> Iterator[Gateway]:
    """What is between the tasks and the API, and sees what is sent."""
    with Gateway(api.base_url) as found:
        monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection(found.base_url, MODEL))
        monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", database.airflow_uri)
        with database.engine().begin() as connection:
            connection.exec_driver_sql("CREATE TABLE products (id INTEGER, name TEXT, shop TEXT)")
            for i in range(ROWS):
                connection.exec_driver_sql(f"INSERT INTO products VALUES ({i}, 'product {i}', 'shop {i % 2}')")
        yield found


def batches(gateway: Gateway) -> list[list[dict[str, Any]]]:
    """The requests of each batch that was sent."""
    sent = zip(gateway.calls, gateway.bodies, strict=True)
    return [json.loads(body)["requests"] for call, body in sent if call == ("POST", "/v1/messages/batches")]


def system_of(row: int) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": RULES, "cache_control": HOUR},
        {"type": "text", "text": f"Sold at shop {row % 2}: {{{{ as it is }}}} {row}", "citations": None},
    ]


def request_of(row: int) -> dict[str, Any]:
    return {
        "model": MODEL, "max_tokens": 100, "system": system_of(row), "messages": [{"role": "user", "content": f"About product {row}"}]
    }  # fmt: skip


SYSTEM = """
from airflow_provider_batchkit.operators.batch import RunBatchOperator
from airflow_provider_batchkit.operators.stages import batch_stage

rules = ("Answer in the house style, in one sentence. " * 455)[:20_000]
system = [
    {"type": "text", "text": rules, "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    {"type": "text", "text": "Sold at {{ row.shop }}: {% raw %}{{ as it is }}{% endraw %} {{ row.id }}", "citations": None},
]
asked = {
    "sql": "SELECT id, name, shop FROM products ORDER BY id", "key": "id", "prompt": "About {{ row.name }}", "system": system,
    "max_tokens": 100, "sql_conn_id": "warehouse",
}
"""
TASKS = {
    "submit": 'SubmitBatchOperator(task_id="submit", **asked)',
    "run": 'RunBatchOperator(task_id="run", table="answers", poke_interval=0.2, **asked)',
    "stage": 'batch_stage("stage", table="answers", poke_interval=0.2, **asked)',
    "function": """
@task.claude_batch(**{name: value for name, value in asked.items() if name != "sql"})
def ask():
    for i in range(6):
        yield {"id": i, "name": f"product {i}", "shop": f"shop {i % 2}"}

ask()
""",
    "mapped": 'SubmitBatchOperator.partial(task_id="submit", **{n: v for n, v in asked.items() if n != "sql"}).expand(sql=[asked["sql"]])',
}


@pytest.mark.parametrize("face", TASKS)
def test_the_blocks_reach_the_api_with_each_rows_texts(airflow_db: Path, gateway: Gateway, database: Database, face: str) -> None:
    """Whatever takes the parameter: the texts are rendered over the row, not over Airflow's context, and the rest is as it was given."""
    ended = run_dag(airflow_db, SYSTEM, TASKS[face])
    assert ended.state == "success"
    (sent,) = batches(gateway)
    assert [request["params"] for request in sent] == [request_of(i) for i in range(ROWS)]
    if face in ("run", "stage"):
        assert dict(rows(database, "SELECT id, response FROM answers")) == {i: answer_for(f"About product {i}") for i in range(ROWS)}


def test_a_primed_job_reads_the_blocks_that_its_rows_share(
    airflow_db: Path, gateway: Gateway, api: SimulatorProcess, database: Database
) -> None:
    """One write and five reads of what is before the marker, though the rest of the system prompt differs; the bill says so."""
    ended = run_dag(airflow_db, SYSTEM, 'RunBatchOperator(task_id="run", table="answers", prime_cache=True, poke_interval=0.2, **asked)')
    assert ended.state == "success"
    assert [len(batch) for batch in batches(gateway)] == [1, ROWS - 1]
    bill = api.stats()["bill"][ANSWERS]
    assert (bill["cache_write_1h_tokens"], bill["cache_write_5m_tokens"], bill["cache_read_tokens"]) == (5_000, 0, (ROWS - 1) * 5_000)
    tally = ended.xcom("run")["cost_tally"]
    # by hand: $0.50 per MTok of input in a batch, twice that for a write, a tenth of it for a read
    assert Decimal(tally["cache_savings_usd"]) == 5_000 * ((ROWS - 1) * Decimal("0.45e-6") - Decimal("0.5e-6"))
    assert dict(rows(database, "SELECT id, response FROM answers")) == {i: answer_for(f"About product {i}") for i in range(ROWS)}


@pytest.mark.parametrize("change", ["", "shop", "marker"])
def test_only_rows_whose_blocks_have_changed_are_asked_again(airflow_db: Path, gateway: Gateway, database: Database, change: str) -> None:
    """skip_unchanged compares the whole system prompt, markers too."""
    task = 'RunBatchOperator(task_id="run", table="answers", skip_unchanged=True, poke_interval=0.2, **asked)'
    source = [SYSTEM, task]
    dag = "test_system_blocks"

    def run(*parts: str) -> str:
        return run_dag(airflow_db, *parts, dag_id=dag).state

    assert run(*source) == "success"
    if change == "shop":
        with database.engine().begin() as connection:
            connection.exec_driver_sql("UPDATE products SET shop = 'other' WHERE id = 3")
    elif change == "marker":
        source[0] = SYSTEM.replace('"1h"', '"5m"')
    assert run(*source) == "success"
    assert [len(batch) for batch in batches(gateway)] == [ROWS, *{"": [], "shop": [1], "marker": [ROWS]}[change]]


def test_a_later_round_may_have_a_system_prompt_of_its_own(airflow_db: Path, gateway: Gateway, database: Database) -> None:
    """``Round.params`` is over what the task has, the template of the system prompt too."""
    with database.engine().begin() as connection:
        connection.exec_driver_sql("UPDATE products SET name = '[[sim:errored]]' WHERE id = 2")
    ended = run_dag(
        airflow_db,
        "from airflow_provider_batchkit import Round",
        SYSTEM,
        """
        again = Round(ask=["errored"], params={"system": [{"type": "text", "text": "Try {{ again }}."}]})
        RunBatchOperator(task_id="run", table="answers", rounds=[Round(), again], poke_interval=0.2, **asked)
        """,
    )
    assert ended.state == "success"
    first, second = batches(gateway)
    assert len(first) == ROWS
    assert [request["params"]["system"] for request in second] == [[{"type": "text", "text": "Try {{ again }}."}]]


def test_a_rows_empty_block_stops_the_task_before_anything_is_sent(airflow_db: Path, gateway: Gateway, database: Database) -> None:
    """The row is named; no batch is made."""
    with database.engine().begin() as connection:
        connection.exec_driver_sql("UPDATE products SET shop = NULL WHERE id = 4")
    ended = run_dag(airflow_db, SYSTEM, 'system[1]["text"] = "{{ row.shop }}"', TASKS["submit"])
    assert ended.state == "failed"
    assert batches(gateway) == []


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"system": {"type": "text", "text": "x"}}, "must be a text or a list of content blocks, not dict"),
        ({"system": [{"type": "document", "text": "x"}]}, r"system\[0\] has the type 'document'"),
        ({"system": [{"type": "text", "text": ""}]}, r"system\[0\] has no text"),
        ({"system": [{"type": "text", "text": "x", "cache_control": HOUR}] * 5}, "5 cache_control markers"),
        ({"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "2h"}}]}, "a ttl of '5m' or '1h'"),
        ({"system": [{"type": "text", "text": "x", "cache_control": HOUR}], "cache_system": "1h"}, "leave one of them out"),
    ],
)
def test_blocks_that_cannot_work_are_refused_when_the_dag_is_parsed(given: dict[str, Any], problem: str) -> None:
    """By every operator, and by its task."""
    asked: dict[str, Any] = {"sql": "SELECT 1", "key": "id", "prompt": "x", "sql_conn_id": "warehouse", **given}
    with pytest.raises(BatchInputError, match=f"Task submit: .*{problem}"):
        SubmitBatchOperator(task_id="submit", **asked)
    with pytest.raises(BatchInputError, match=f"Task run: .*{problem}"):
        RunBatchOperator(task_id="run", table="t", **asked)
    from airflow.sdk import DAG

    with DAG("d", schedule=None), pytest.raises(BatchInputError, match=f"Task stage.submit: .*{problem}"):
        batch_stage("stage", table="t", **asked)
    good = {**asked, "system": "x"}
    if "cache_system" not in given:
        problem = problem.replace("system", r"system('\])?")
        with pytest.raises(BatchInputError, match=f"Task run: round 2: .*{problem}"):
            RunBatchOperator(task_id="run", table="t", rounds=[Round(), Round(ask=["errored"], params=given)], **good)


def test_the_kit_sends_the_blocks_as_they_are(api: SimulatorProcess) -> None:
    """For prompts and for native requests, which may have their own; the kit has no templates."""
    blocks = [{"type": "text", "text": RULES, "cache_control": HOUR}, {"type": "text", "text": "{{ no template }}"}]
    own = {"messages": [{"role": "user", "content": "b"}], "system": [{"type": "text", "text": "Own."}]}
    with Gateway(api.base_url) as gateway:
        kit: BatchKit = kit_for(gateway.base_url)
        kit.run(prompts=["a"], model=MODEL, max_tokens=10, system=blocks)
        kit.run([{"custom_id": "b", "params": own}], model=MODEL, max_tokens=10, system=blocks)
        assert [request["params"]["system"] for batch in batches(gateway) for request in batch] == [blocks, own["system"]]


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ([{"type": "text", "text": str(i), "cache_control": HOUR} for i in range(5)], "A maximum of 4 blocks with cache_control"),
        (
            [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b", "cache_control": HOUR}],
            "system.1.cache_control.ttl: a ttl='1h' cache_control block must not come after a ttl='5m'",
        ),
        ([{"type": "text", "text": " "}], "system: text content blocks must contain non-whitespace text"),
    ],
)
def test_the_simulator_refuses_what_the_api_refuses_of_blocks(system: Any, message: str) -> None:
    """In the line of the result, as it does with any bad params."""
    with Simulator() as simulator:
        item = asked(kit_for(simulator.base_url), system)
        assert item.error_type == "invalid_request_error"
        assert message in str(item.error_message)


def asked(kit: BatchKit, system: Any) -> BatchItem:
    """What one request with this system prompt gets, whatever the kit would say of it."""
    params: Any = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "x"}], "system": system}
    batch = kit.client.messages.batches.create(requests=[{"custom_id": "a", "params": params}])
    kit.wait(batch.id)
    return kit.retrieve(batch.id).items[0]


def test_the_longest_prefix_that_is_there_is_read_and_the_rest_is_written() -> None:
    """Two markers: the second request shares the first block, and writes the second one anew."""
    with Simulator(SimulatorSettings(cache_min_tokens=100)) as simulator:
        kit, found = kit_for(simulator.base_url), []
        for tail in ("q" * 200, "r" * 200, "q" * 200):
            system = [
                {"type": "text", "text": "p" * 400, "cache_control": HOUR},
                {"type": "text", "text": tail, "cache_control": {"type": "ephemeral"}},
            ]
            usage = asked(kit, system).usage
            assert usage is not None
            found.append((usage.cache_write_1h_tokens, usage.cache_write_5m_tokens, usage.cache_read_tokens))
        assert found == [(100, 50, 0), (0, 50, 100), (0, 0, 150)]

"""What a task may cost, as parameters of real DAG runs, on SQLite and PostgreSQL."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_batchkit.exceptions import CostLimitError
from airflow_provider_batchkit.jobs.caps import Limits
from airflow_provider_batchkit.ledger import Ledger
from airflow_provider_batchkit.simulator import Simulator, SimulatorProcess, SimulatorSettings
from tests.databases import Database
from tests.integration.airflow_runs import run_dag
from tests.warehouse import Warehouse, kit_for


@pytest.fixture(scope="module")
def connection_model() -> str:
    return "claude-opus-4-8"


SUBMIT = """
submit = SubmitBatchOperator(
    task_id="submit", requests=["Name a river.", "Name a lake."], max_tokens=1000, sql_conn_id="warehouse", {more}
)
wait = BatchSensor(task_id="wait", batch_id=submit.output, poke_interval=1)
fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse")
wait >> fetch
"""


def accepted(simulator: SimulatorProcess) -> int:
    return int(simulator.stats()["requests_accepted"])


# --- max_cost_usd and dry_run, as tasks -------------------------------------------------------------------------------------------


def test_a_task_whose_bound_is_above_max_cost_usd_sends_nothing(
    home: Path, simulator: SimulatorProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """2,000 answer tokens of opus at $12.50 and 1.1 for US-only: above two cents. It fails at once, also with retries."""
    before = accepted(simulator)
    run = run_dag(home, SUBMIT.format(more='max_cost_usd="0.02", retries=3'))
    assert run.states() == {"submit": "failed", "wait": "upstream_failed", "fetch": "upstream_failed"}
    assert accepted(simulator) == before
    # 2,000 * $12.50 = $0.025 for the answers, and 23 prompt tokens * $2.50; at most 1.1 times, and a token a byte
    output = capsys.readouterr().out
    assert "2 requests are expected to cost $0.02506 and at most $0.028" in output
    assert ": above max_cost_usd=$0.02. Nothing was sent" in output


def test_a_task_within_max_cost_usd_runs_and_logs_its_estimate(
    home: Path, simulator: SimulatorProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Both figures in one line, before the first batch."""
    before = accepted(simulator)
    with caplog.at_level(logging.INFO):
        run = run_dag(home, SUBMIT.format(more="max_cost_usd=1"))
    assert run.state == "success"
    assert accepted(simulator) == before + 2
    assert "Estimate for 2 requests: expected $0.02506, at most $0.028" in caplog.text


def test_a_dry_run_reports_and_sends_nothing(home: Path, simulator: SimulatorProcess, database: Database) -> None:
    """It skips, and so do the tasks behind it; the report is an XCom; not even the ledger's tables are made."""
    before = accepted(simulator)
    run = run_dag(home, SUBMIT.format(more="dry_run=True, max_requests_per_batch=1"))
    assert run.states() == {"submit": "skipped", "wait": "skipped", "fetch": "skipped"}
    report = run.xcom("submit", key="estimate")
    assert (report["rows"], report["requests"], report["batches"]) == (2, 2, 2)
    assert report["output_tokens"] == 2000
    assert Decimal(report["expected_usd"]) <= Decimal(report["upper_usd"])
    assert accepted(simulator) == before
    assert not Ledger(database.engine()).exists()


def test_a_task_over_its_budget_fails_or_is_skipped_and_the_next_one_fits(
    home: Path, simulator: SimulatorProcess, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tasks share $0.03, and each may cost $0.028: the second fails, or is skipped if its budget says so, until the first lands."""
    before = accepted(simulator)
    first = run_dag(home, SUBMIT.format(more='budget={"name": "team", "usd": "0.03"}').split("wait = ")[0])
    assert first.state == "success"
    refused = run_dag(home, SUBMIT.format(more='budget={"name": "team", "usd": "0.03"}'))
    assert refused.states() == {"submit": "failed", "wait": "upstream_failed", "fetch": "upstream_failed"}
    output = capsys.readouterr().out
    assert "The budget 'team' would be exceeded: cap $0.03, spent $0.00, reserved $0.028" in output
    skipped = run_dag(home, SUBMIT.format(more='budget={"name": "team", "usd": "0.03", "on_exceeded": "skip"}'))
    assert skipped.states() == {"submit": "skipped", "wait": "skipped", "fetch": "skipped"}
    assert accepted(simulator) == before + 2
    (batch_id,) = first.xcom("submit")
    landing = f'FetchBatchOperator(task_id="fetch", batch_id="{batch_id}", table="answers", sql_conn_id="warehouse")'
    assert run_dag(home, landing).state == "success"
    fits = run_dag(home, SUBMIT.format(more='budget={"name": "team", "usd": "0.03"}'))
    assert fits.state == "success"
    books = Ledger(database.engine()).budget_status("team")
    assert books is not None
    assert (books.reserved_usd, books.spent_usd) == (Decimal(0), 2 * Decimal(fits.xcom("fetch")["cost_tally"]["batch_cost_usd"]))


def test_an_amount_that_is_none_is_a_parse_error() -> None:
    """Before any run."""
    from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

    with pytest.raises(ValueError, match="max_cost_usd must be an amount in USD above 0"):
        SubmitBatchOperator(task_id="t", requests=["x"], sql_conn_id="warehouse", max_cost_usd="a lot")
    with pytest.raises(ValueError, match="The budget 'team' caps nothing"):
        SubmitBatchOperator(task_id="t", requests=["x"], sql_conn_id="warehouse", budget={"name": "team"})


# --- what counts ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator(SimulatorSettings()) as running:
        yield running


@pytest.fixture
def warehouse(database: Database, sim: Simulator) -> Warehouse:
    return Warehouse(database.engine(), kit_for(sim.base_url, timeout=5))


def products(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}"} for i in range(count)]


def bound_of_all(warehouse: Warehouse) -> Decimal:
    (row,) = warehouse.rows("SELECT SUM(bound_picousd) AS pico FROM batchkit_batch WHERE state <> 'rejected' AND state <> 'void'")
    return Decimal(row["pico"]) * Decimal("1e-12")


def test_what_earlier_attempts_sent_counts_against_the_cap(warehouse: Warehouse, sim: Simulator) -> None:
    """Ten rows were sent; five came to the source since. The bound of both is above the cap, and the error names what runs."""
    sent = warehouse.submit(products(10))
    bound = bound_of_all(warehouse)
    with pytest.raises(CostLimitError, match="earlier attempts of this task have spent or bound") as caught:
        warehouse.submit(products(15), limits=Limits(bound))
    assert caught.value.submitted == sent.batch_ids
    assert sim.stats()["requests_accepted"] == 10


def test_what_has_landed_counts_at_its_real_cost(warehouse: Warehouse, sim: Simulator) -> None:
    """The answers were short, so the same cap has room for the other five."""
    warehouse.fetch(warehouse.submit(products(10)).batch_ids)
    cap = Decimal(warehouse.rows("SELECT bound_picousd AS b FROM batchkit_batch")[0]["b"]) * Decimal("1e-12")
    assert warehouse.submit(products(15), limits=Limits(cap)).asked == 5
    assert sim.stats()["requests_accepted"] == 15


def test_what_was_refused_does_not_count(warehouse: Warehouse, sim: Simulator) -> None:
    """A rejected shard cost nothing; the next attempt has the whole cap."""
    warehouse.submit(products(10))
    cap = bound_of_all(warehouse)
    sim.faults.add("status", endpoint="create", status=400)
    with pytest.raises(Exception, match="Nothing was accepted"):
        warehouse.submit(products(10), run_id="run-2")
    assert warehouse.submit(products(10), run_id="run-2", limits=Limits(cap)).asked == 10


def test_requests_without_a_bound_are_refused_under_a_cap(warehouse: Warehouse, sim: Simulator) -> None:
    """Without a cap they are sent; after that no cap can be kept for the job."""
    search = {"type": "web_search_20250305", "name": "web_search"}
    asks = [{"custom_id": "a", "params": {"messages": [{"role": "user", "content": "news?"}], "tools": [search]}}]
    with pytest.raises(CostLimitError, match="the tool web_search_20250305, which nothing bounds"):
        warehouse.submit_requests(asks, limits=Limits(Decimal(1000)))
    assert sim.stats()["requests_accepted"] == 0
    report = warehouse.submit_requests(asks)
    more = [*asks, {"custom_id": "b", "params": {"messages": [{"role": "user", "content": "hello"}]}}]
    with pytest.raises(CostLimitError, match=f"nobody knows what {report.batch_ids[0]} of an earlier attempt may cost"):
        warehouse.submit_requests(more, limits=Limits(Decimal(1000)))


def test_earlier_runs_tell_how_long_answers_are(warehouse: Warehouse) -> None:
    """The second run of the task expects what the first was billed, to the token."""
    first = warehouse.submit(products(10), max_tokens=4000)
    assert first.estimate is not None
    assert first.estimate.output_source == "max_tokens of every request"
    landed = warehouse.fetch(first.batch_ids).tally
    second = warehouse.submit(products(20), run_id="run-2", max_tokens=4000)
    assert second.estimate is not None
    assert second.estimate.output_tokens == 2 * landed.output_tokens


def test_a_count_that_fails_does_not_stop_a_submit(warehouse: Warehouse, sim: Simulator) -> None:
    """The estimate is a courtesy; the bound does not need the API."""
    sim.faults.add("status", endpoint="count_tokens", status=500, times=100)
    report = warehouse.submit(products(3), limits=Limits(Decimal(1)))
    assert report.asked == 3
    assert report.estimate is not None
    assert report.estimate.input_source == "a token for 4 bytes"


def test_an_attempt_with_nothing_to_send_asks_for_no_count(warehouse: Warehouse, sim: Simulator) -> None:
    """A cleared task re-attaches for free."""
    warehouse.submit(products(3))
    counted = sim.stats()["calls"]["count_tokens"]
    assert warehouse.submit(products(3), limits=Limits(Decimal("0.000001"))).estimate is None
    assert sim.stats()["calls"]["count_tokens"] == counted == 3

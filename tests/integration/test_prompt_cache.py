"""Prompt caching: what a cold batch pays, what a primed one pays, and that priming never pays twice."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_batchkit.cost.budget import Budget
from airflow_provider_batchkit.cost.tally import format_tally
from airflow_provider_batchkit.exceptions import SubmitRefusedError
from airflow_provider_batchkit.jobs.caps import Limits
from airflow_provider_batchkit.jobs.prime import Priming
from airflow_provider_batchkit.jobs.submit import SubmitOptions, SubmitReport, rehearse_job, submit_job
from airflow_provider_batchkit.ledger import JobRecord
from airflow_provider_batchkit.request.build import RequestBuilder, RequestDefaults
from airflow_provider_batchkit.request.template import RowTemplate
from airflow_provider_batchkit.simulator import Simulator, SimulatorProcess, SimulatorSettings, answer_for
from airflow_provider_batchkit.source.types import KeyTypes
from tests.connections import anthropic_connection
from tests.databases import Database
from tests.integration.airflow_runs import run_dag
from tests.warehouse import Warehouse, kit_for, times_of

#: 5,000 tokens of the simulator
RULES = "Answer in the house style, in one sentence. " * 455
SYSTEM = RULES[:20_000]
ROWS = 138
MODEL = "claude-haiku-4-5"
#: the name under which it answers
ANSWERS = "claude-haiku-4-5-20251001"
JOB = JobRecord("0123456789abcdef0123", "dag", "run-1", "submit")
MARKED = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
PRIMING = Priming(ttl_s=3600, timeout_s=600)
#: every request of a cold batch writes its prefix, as most of those that others measured did
SETTINGS = SimulatorSettings(cache_concurrency=None)


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator(SETTINGS) as simulator:
        yield simulator


@pytest.fixture
def warehouse(database: Database, sim: Simulator) -> Warehouse:
    return Warehouse(database.engine(), kit_for(sim.base_url, timeout=5))


def products(count: int = ROWS) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}"} for i in range(count)]


def builder(cache_system: str | None = "1h", system: str = SYSTEM) -> RequestBuilder:
    return RequestBuilder(
        RequestDefaults(MODEL, 100, cache_system=cache_system),
        job_id=JOB.job_id,
        key=["id"],
        prompt=RowTemplate("About {{ row.name }}", name="prompt"),
        system=RowTemplate(system, name="system"),
    )


def submit(
    warehouse: Warehouse, rows: list[dict[str, Any]], priming: Priming | None = None, cache_system: str | None = "1h", **options: Any
) -> SubmitReport:
    """One leg of the job's submit."""
    types = KeyTypes(("id",))
    types.see(rows)
    return submit_job(
        warehouse.attempt(JOB),
        [builder(cache_system).build_all(rows, 0)],
        SubmitOptions(priming=priming, times=times_of(0.4), **options),
        before_send=lambda: warehouse.ledger.set_key_columns(JOB.job_id, types.result(warehouse.ledger.key_columns(JOB.job_id))),
    )


def sizes(sim: Simulator) -> list[int]:
    return [batch["size"] for batch in sim.stats()["batches"]]


def assert_paid_once(warehouse: Warehouse, sim: Simulator, batch_ids: list[str], count: int) -> None:
    """Every row is asked once and landed once, with its own answer."""
    warehouse.fetch(batch_ids)
    assert sim.stats()["requests_accepted"] == count
    rows = warehouse.rows("SELECT id, response FROM answers ORDER BY id")
    assert [(r["id"], r["response"]) for r in rows] == [(i, answer_for(f"About product {i}")) for i in range(count)]


# --- what it costs ----------------------------------------------------------------------------------------------------------------


def costs(warehouse: Warehouse, cache_system: str | None, priming: Priming | None) -> tuple[Decimal, Decimal, str]:
    """USD of a job, what caching saved, and the tally's text."""
    report = submit(warehouse, products(), priming, cache_system)
    assert report.waits_for is None
    landed = warehouse.fetch(report.batch_ids)
    assert landed.rows == ROWS
    tally = landed.tally
    assert tally.batch_cost_usd is not None and tally.cache_savings_usd is not None
    return tally.batch_cost_usd, tally.cache_savings_usd, format_tally(tally)


def test_a_batch_without_the_marker_is_the_measure(warehouse: Warehouse) -> None:
    """Nothing is cached, so nothing is saved, and the log does not speak of it."""
    usd, saved, text = costs(warehouse, None, None)
    # by hand: 5,000 tokens of system prompt a row at $0.50 per MTok in a batch of haiku-4-5
    assert usd > ROWS * 5_000 * Decimal("0.5e-6")
    assert saved == 0
    assert "cache savings" not in text


@pytest.mark.parametrize(("ttl", "write"), [("5m", Decimal("0.625e-6")), ("1h", Decimal("1.0e-6"))])
def test_a_cold_batch_pays_more_for_the_cache_than_without(warehouse: Warehouse, ttl: str, write: Decimal) -> None:
    """Every request writes and none reads: each token of the system prompt at 1.25 or 2 times the price."""
    usd, saved, text = costs(warehouse, ttl, None)
    assert saved == ROWS * 5_000 * (Decimal("0.5e-6") - write) < 0
    assert usd > ROWS * 5_000 * write
    assert "cache savings -$0." in text


@pytest.mark.parametrize(("ttl", "write"), [("5m", Decimal("0.625e-6")), ("1h", Decimal("1.0e-6"))])
def test_a_primed_job_reads_what_its_first_row_wrote(warehouse: Warehouse, sim: Simulator, ttl: str, write: Decimal) -> None:
    """One write and 137 reads at a tenth of the price."""
    usd, saved, text = costs(warehouse, ttl, PRIMING)
    read = Decimal("0.05e-6")
    assert saved == 5_000 * (Decimal("0.5e-6") - write) + (ROWS - 1) * 5_000 * (Decimal("0.5e-6") - read)
    bill = sim.stats()["bill"][ANSWERS]
    assert bill["cache_read_tokens"] == (ROWS - 1) * 5_000
    assert usd < (usd + saved) / 4
    assert "cache savings $0." in text
    assert sizes(sim) == [1, ROWS - 1]


def test_the_tally_knows_what_the_same_job_costs_without_caching(database: Database) -> None:
    """Cost and cache savings together are the bill of the job that does not cache, to the last digit."""
    bills = []
    for ttl, priming in ((None, None), ("1h", None), ("1h", PRIMING)):
        with Simulator(SETTINGS) as sim:
            warehouse = Warehouse(database.engine(), kit_for(sim.base_url, timeout=5))
            usd, saved, _ = costs(warehouse, ttl, priming)
            bills.append((usd, saved))
            ledger = ("batch", "job", "journal", "succeeded", "failed", "bill")
            warehouse.execute("DELETE FROM answers", *(f"DELETE FROM batchkit_{table}" for table in ledger))
    plain, cold, primed = bills
    assert plain[0] == sum(cold) == sum(primed)
    assert primed[0] < plain[0] < cold[0]


# --- the order of things ----------------------------------------------------------------------------------------------------------


def test_the_rest_waits_until_the_primer_has_ended(warehouse: Warehouse, sim: Simulator) -> None:
    """The first leg sends one row; while it runs nothing else goes out; then the rest, and all ids come back."""
    sim.set(clock="manual")
    first = submit(warehouse, products(10), PRIMING, max_requests=4)
    assert first.waits_for is not None
    assert first.batch_ids == [first.waits_for.batch_ids[0]]
    again = submit(warehouse, products(10), PRIMING, max_requests=4)
    assert again.waits_for == first.waits_for
    assert (sizes(sim), again.asked) == ([1], 0)
    sim.end(first.waits_for.batch_ids[0])
    last = submit(warehouse, products(10), PRIMING, max_requests=4)
    assert (sizes(sim), last.asked, last.waits_for) == ([1, 4, 4, 1], 9, None)
    assert last.batch_ids[0] == first.waits_for.batch_ids[0]
    for batch_id in last.batch_ids[1:]:
        sim.end(batch_id)
    assert_paid_once(warehouse, sim, last.batch_ids, 10)


def test_one_row_is_not_primed(warehouse: Warehouse, sim: Simulator) -> None:
    """There is no rest that could wait, also when the task is cleared while it runs."""
    sim.set(clock="manual")
    assert submit(warehouse, products(1), PRIMING).waits_for is None
    assert submit(warehouse, products(1), PRIMING).waits_for is None
    assert sizes(sim) == [1]


def test_a_row_that_asks_what_the_primer_asks_lands_with_it(warehouse: Warehouse, sim: Simulator) -> None:
    """Copies of the first row share its request, in both legs."""
    sim.set(clock="manual")
    rows = [{"id": i, "name": f"product {i % 2}"} for i in range(6)]
    first = submit(warehouse, rows, PRIMING)
    assert first.waits_for is not None
    sim.end(first.waits_for.batch_ids[0])
    last = submit(warehouse, rows, PRIMING)
    sim.end(last.batch_ids[1])
    warehouse.fetch(last.batch_ids)
    assert sizes(sim) == [1, 1]
    found = warehouse.rows("SELECT id, response FROM answers ORDER BY id")
    assert [(r["id"], r["response"]) for r in found] == [(i, answer_for(f"About product {i % 2}")) for i in range(6)]


def test_a_rehearsal_counts_the_primer(warehouse: Warehouse) -> None:
    """A dry run says how many batches there would be."""
    report = rehearse_job(warehouse.attempt(JOB), [builder().build_all(products(5), 0)], SubmitOptions(priming=PRIMING))
    assert report.batches == 2


def test_caps_hold_over_both_legs(warehouse: Warehouse, sim: Simulator) -> None:
    """A job that fits into its cap fits with its primer too; the budget counts both legs."""
    sim.set(clock="manual")
    upper = rehearse_job(warehouse.attempt(JOB), [builder().build_all(products(5), 0)], SubmitOptions()).estimate
    assert upper is not None
    limits = Limits(upper.upper_usd, Budget("cache", usd=upper.upper_usd))
    first = submit(warehouse, products(5), PRIMING, limits=limits)
    assert first.waits_for is not None
    sim.end(first.waits_for.batch_ids[0])
    assert submit(warehouse, products(5), PRIMING, limits=limits).asked == 4


# --- a primer that is of no use ---------------------------------------------------------------------------------------------------


def ended_primer(warehouse: Warehouse, sim: Simulator, rows: list[dict[str, Any]], how: str = "end") -> None:
    """Send the primer, and let it end in one way or another."""
    sim.set(clock="manual")
    first = submit(warehouse, rows, PRIMING)
    assert first.waits_for is not None
    if how == "expire":
        sim.expire(first.waits_for.batch_ids[0])
    elif how == "end":
        sim.end(first.waits_for.batch_ids[0])


@pytest.mark.parametrize(("name", "how"), [("[[sim:errored]]", "end"), ("product 0", "expire")])
def test_a_primer_without_an_answer_does_not_stop_the_rest(
    warehouse: Warehouse, sim: Simulator, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    """It cached nothing; the log says so."""
    rows = [{"id": 0, "name": name}, *products(4)[1:]]
    ended_primer(warehouse, sim, rows, how)
    report = submit(warehouse, rows, PRIMING)
    assert (report.waits_for, report.asked) == (None, 3)
    assert "has no answer, so it cached nothing" in caplog.text


def test_a_primer_that_takes_too_long_does_not_stop_the_rest(
    warehouse: Warehouse, sim: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """The time counts from its submit, so a retry does not wait anew; nor does it once the waiting is over."""
    sim.set(clock="manual")
    hold = submit(warehouse, products(4), PRIMING).waits_for
    assert hold is not None
    assert abs(hold.until - datetime.now(UTC) - timedelta(seconds=600)) < timedelta(seconds=30)
    assert submit(warehouse, products(4), Priming(3600, timeout_s=0)).asked == 3
    assert "has not been seen to end" in caplog.text


def test_when_the_waiting_is_over_the_rest_goes_out_whatever_the_primer_does(warehouse: Warehouse, sim: Simulator) -> None:
    """The leg after the trigger never waits a second time."""
    sim.set(clock="manual")
    submit(warehouse, products(4), PRIMING)
    assert submit(warehouse, products(4), Priming(3600, 600, over=True)).asked == 3


def test_a_job_whose_rest_is_under_way_waits_no_more(warehouse: Warehouse, sim: Simulator) -> None:
    """Part of the rest went out without the primer, and the next attempt sends what is left at once."""
    sim.set(clock="manual")
    submit(warehouse, products(5), PRIMING, max_requests=2)
    sim.faults.add("status", status=400, after=1)
    with pytest.raises(SubmitRefusedError):
        submit(warehouse, products(5), Priming(3600, 600, over=True), max_requests=2)
    report = submit(warehouse, products(5), PRIMING, max_requests=2)
    assert (report.waits_for, report.asked, sizes(sim)) == (None, 2, [1, 2, 2])


def test_a_primer_that_nobody_can_see_does_not_stop_the_rest(warehouse: Warehouse, sim: Simulator) -> None:
    """It was deleted: the look fails, and when the waiting is over the rest goes out."""
    ended_primer(warehouse, sim, products(4))
    warehouse.kit.delete(sim.stats()["batches"][0]["id"])
    assert submit(warehouse, products(4), PRIMING).waits_for is not None
    assert submit(warehouse, products(4), Priming(3600, 600, over=True)).asked == 3


def test_a_primer_that_ended_before_the_ttl_is_said_to_be_of_no_use(
    warehouse: Warehouse, sim: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """The retry comes an hour after the primer's end: the cache is cold again, the rest is sent all the same, and pays for it."""
    sim.set(clock="instant", skew_seconds=-4000.0)
    sim.faults.add("status", status=400, after=1)
    with pytest.raises(SubmitRefusedError):
        submit(warehouse, products(4), PRIMING)
    sim.set(skew_seconds=0.0)
    report = submit(warehouse, products(4), PRIMING)
    assert (report.waits_for, report.asked) == (None, 3)
    assert "the rest will not find it there" in caplog.text
    assert sim.stats()["bill"][ANSWERS]["cache_read_tokens"] == 0
    assert_paid_once(warehouse, sim, report.batch_ids, 4)


# --- kills ------------------------------------------------------------------------------------------------------------------------


class _Killed(BaseException):
    """A worker killed at this moment."""


def kill_after(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, call: int) -> None:
    """The worker dies when that call has returned."""
    original, calls = getattr(target, name), itertools.count(1)

    def patched(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if next(calls) == call:
            raise _Killed
        return found

    monkeypatch.setattr(target, name, patched)


@pytest.mark.parametrize("moment", ["after the POST", "after the id", "before the rest", "in the rest"])
@pytest.mark.parametrize("clock", ["instant", "polls:1"])
def test_a_kill_while_priming_never_pays_twice(
    warehouse: Warehouse, sim: Simulator, monkeypatch: pytest.MonkeyPatch, moment: str, clock: str
) -> None:
    """Killed at each step, then tried again until nothing waits: each row is asked once."""
    sim.set(clock=clock)
    moments: dict[str, tuple[Any, str, int]] = {
        "after the POST": (warehouse.kit, "send", 1),
        "after the id": (warehouse.ledger, "submitted", 1),
        "before the rest": (Priming, "wait", 2),
        "in the rest": (warehouse.kit, "send", 2),
    }
    kill_after(monkeypatch, *moments[moment])
    kills, report = 0, None
    for _ in range(6):
        try:
            report = submit(warehouse, products(7), PRIMING)
        except _Killed:
            kills += 1
        else:
            if report.waits_for is None:
                break
    assert kills == 1
    assert report is not None and report.waits_for is None
    warehouse.kit.wait(report.batch_ids, interval_s=0.01)
    assert sizes(sim) == [1, 6]
    assert_paid_once(warehouse, sim, report.batch_ids, 7)
    assert sim.stats()["bill"][ANSWERS]["cache_read_tokens"] == 6 * 5_000


# --- as a task --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, database: Database) -> Iterator[SimulatorProcess]:
    with SimulatorProcess(SETTINGS) as process:
        monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection(process.base_url, MODEL))
        monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", database.airflow_uri)
        with database.engine().begin() as connection:
            connection.exec_driver_sql("CREATE TABLE products (id INTEGER, name TEXT)")
            for row in products(12):
                connection.exec_driver_sql(f"INSERT INTO products VALUES ({row['id']}, '{row['name']}')")
        yield process


def task(**more: Any) -> str:
    options = "".join(f"{name}={value!r}, " for name, value in more.items())
    return f"""
    submit = SubmitBatchOperator(
        task_id="submit", sql="SELECT id, name FROM products ORDER BY id", key="id", prompt="About {{{{ row.name }}}}",
        system="Answer in the house style. " * 800, max_tokens=100, sql_conn_id="warehouse", cache_system="1h", prime_cache=True,
        settle_seconds=1, poke_interval=0.2, {options}
    )
    wait = BatchSensor(task_id="wait", batch_id=submit.output, poke_interval=0.2)
    fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse")
    wait >> fetch
    """


def bill_of(api: SimulatorProcess) -> Mapping[str, int]:
    bill: Mapping[str, int] = api.stats()["bill"][ANSWERS]
    return bill


def test_a_task_primes_the_cache_and_its_summary_says_what_that_saved(airflow_db: Path, api: SimulatorProcess, database: Database) -> None:
    """Submit defers until the first row is answered, then sends the rest; fetch's summary has the savings."""
    api.set(clock="polls:3")
    run = run_dag(airflow_db, task())
    assert run.state == "success"
    assert [batch["size"] for batch in api.stats()["batches"]] == [1, 11]
    assert run.xcom("submit") == [batch["id"] for batch in api.stats()["batches"]]
    assert run.xcom("submit", key="batch_id") == run.xcom("submit")[0]
    tokens = bill_of(api)["cache_write_1h_tokens"]
    assert tokens > 5_000
    assert bill_of(api)["cache_read_tokens"] == 11 * tokens
    summary = run.xcom("fetch")
    assert summary["rows"] == 12
    saved = Decimal(summary["cost_tally"]["cache_savings_usd"])
    assert saved == tokens * (11 * Decimal("0.45e-6") - Decimal("0.5e-6"))


def test_a_task_whose_primer_takes_too_long_sends_the_rest(airflow_db: Path, api: SimulatorProcess) -> None:
    """The trigger's deadline passes, and the rest goes out without the cache."""
    api.set(clock="seconds:15", cache_concurrency=None)
    run = run_dag(airflow_db, task(prime_timeout=1.0))
    assert run.state == "success"
    assert [batch["size"] for batch in api.stats()["batches"]] == [1, 11]
    assert bill_of(api)["cache_read_tokens"] == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"cache_system": "2h"}, "cache_system must be '5m' or '1h', not '2h'"),
        ({"system": None}, "cache_system marks the system prompt, and there is none"),
        ({"system": None, "params": {"system": []}}, "cache_system marks the system prompt, and there is none"),
        ({"system": [MARKED]}, r"system\[0\] has a cache_control of its own"),
        ({"system": None, "params": {"system": [MARKED]}}, r"system\[0\] has a cache_control of its own"),
        ({"system": None, "params": {"system": "s", "tools": [{"name": "t", "cache_control": {"type": "ephemeral"}}]}}, "must come first"),
        ({"cache_system": ["1h"]}, "must be '5m' or '1h'"),
        ({"cache_system": None}, "prime_cache needs cache_system"),
    ],
)
def test_what_cannot_work_is_refused_when_the_dag_is_parsed(arguments: dict[str, Any], problem: str) -> None:
    """Before anything runs, by task."""
    from airflow_provider_batchkit.exceptions import BatchInputError
    from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

    given: dict[str, Any] = {"system": "Be brief.", "cache_system": "1h", "prime_cache": True, **arguments}
    with pytest.raises(BatchInputError, match=f"Task submit: .*{problem}"):
        SubmitBatchOperator(task_id="submit", sql="SELECT 1", key="id", prompt="x", sql_conn_id="warehouse", **given)


def test_the_system_prompt_of_params_can_be_cached_too(warehouse: Warehouse, sim: Simulator) -> None:
    """A text in params is marked, also for native requests, whose own system prompt is sent as it is."""
    given = RequestBuilder(RequestDefaults(MODEL, 100, params={"system": SYSTEM}, cache_system="1h"), job_id=JOB.job_id)
    messages = [{"role": "user", "content": "native"}]
    native = [
        {"custom_id": "a", "params": {"messages": messages}},
        {"custom_id": "b", "params": {"messages": messages, "system": SYSTEM}},
    ]
    marked, own = (json.loads(request.body)["params"]["system"] for request in given.build_all(native, 0))
    assert marked == [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    assert own == SYSTEM


@pytest.mark.parametrize(
    ("system", "warning"),
    [
        (SYSTEM + "{{ row.id }}", "differs between rows"),
        ("Be brief.", "too short to be cached"),
        (SYSTEM, ""),
    ],
)
def test_a_system_prompt_that_caching_cannot_help_is_warned_of_once(caplog: pytest.LogCaptureFixture, system: str, warning: str) -> None:
    """The job runs as asked."""
    with caplog.at_level(logging.WARNING):
        builder(system=system).build_all(products(5), 0)
    assert [record.message for record in caplog.records if warning in record.message] == [record.message for record in caplog.records]
    assert len(caplog.records) == bool(warning)

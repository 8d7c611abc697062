"""Budgets: whoever submits whatever at the same time, the cap holds and the books balance. On SQLite and PostgreSQL."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.cost.budget import Budget, BudgetStatus
from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.exceptions import (
    BudgetExceededError,
    BudgetReservedError,
    CostLimitError,
    LeaseLostError,
    SubmitRefusedError,
    SubmitUncertainError,
)
from airflow_provider_batchkit.jobs.caps import Limits
from airflow_provider_batchkit.ledger import Ledger
from airflow_provider_batchkit.ledger.budgets import HOLD_S
from airflow_provider_batchkit.model import Bound
from airflow_provider_batchkit.simulator import Simulator, SimulatorProcess, SimulatorSettings
from tests.databases import Database
from tests.warehouse import Warehouse, kit_for

SETTLE = 0.8
PICO = Decimal("1e-12")
NOTHING = Decimal(0)


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator(SimulatorSettings(models={"claude-private": {}, "claude-unheard-of": {}})) as simulator:
        yield simulator


@pytest.fixture
def warehouse(database: Database, sim: Simulator) -> Warehouse:
    return Warehouse(database.engine(), kit_for(sim.base_url, timeout=5))


def products(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}"} for i in range(count)]


def within(usd: Any = None, *, name: str = "catalog", **fields: Any) -> Limits:
    return Limits(budget=Budget(name, usd=usd, **fields))


def status(warehouse: Warehouse, name: str = "catalog", at: datetime | None = None) -> BudgetStatus:
    found = warehouse.ledger.budget_status(name, at=at)
    assert found is not None
    return found


def sums(warehouse: Warehouse) -> tuple[Decimal, Decimal]:
    """(spent, reserved) in USD, added up from the batch rows one by one."""
    spent = reserved = 0
    for row in warehouse.rows("SELECT state, bound_picousd, batch_cost_picousd FROM batchkit_batch WHERE budget = 'catalog'"):
        if row["state"] == "landed":
            spent += row["batch_cost_picousd"]
        elif row["state"] in ("sending", "submitted"):
            reserved += row["bound_picousd"]
    return spent * PICO, reserved * PICO


def assert_books(warehouse: Warehouse) -> BudgetStatus:
    """The status is the sum over batches, and nobody holds anything."""
    found = status(warehouse)
    assert (found.spent_usd, found.reserved_usd) == sums(warehouse)
    assert warehouse.rows("SELECT * FROM batchkit_budget_hold") == []
    return found


def bound_of_ten(warehouse: Warehouse) -> Decimal:
    """The upper bound of ten products, learned from a job outside of any budget."""
    report = warehouse.submit(products(10), run_id="measure")
    assert report.estimate is not None and report.estimate.upper_usd is not None
    return report.estimate.upper_usd


# --- reserve, settle, release -----------------------------------------------------------------------------------------------------


def test_a_submit_reserves_its_bound_and_a_landing_settles_the_real_cost(warehouse: Warehouse) -> None:
    """Tokens likewise; what was reserved above the cost is free again."""
    report = warehouse.submit(products(10), max_requests=4, limits=within("1", tokens=1_000_000))
    assert report.estimate is not None
    found = assert_books(warehouse)
    assert (found.spent_usd, found.reserved_usd) == (NOTHING, report.estimate.upper_usd)
    assert (found.spent_tokens, found.reserved_tokens) == (0, report.estimate.upper_tokens)
    assert found.remaining_usd == 1 - found.reserved_usd
    tally = warehouse.fetch(report.batch_ids).tally
    found = assert_books(warehouse)
    assert (found.spent_usd, found.reserved_usd) == (tally.batch_cost_usd, NOTHING)
    assert (found.spent_tokens, found.reserved_tokens) == (tally.input_tokens + tally.output_tokens, 0)
    warehouse.fetch(report.batch_ids)
    assert assert_books(warehouse) == found


def test_a_job_that_does_not_fit_sends_nothing_and_is_told_all_figures(warehouse: Warehouse, sim: Simulator) -> None:
    """Not even its first shard; terminal, for no landing could make room."""
    bound = bound_of_ten(warehouse)
    before = sim.stats()["posts"]
    month_end = (datetime.now(UTC).replace(day=1) + timedelta(days=32)).replace(day=1)
    with pytest.raises(BudgetExceededError) as caught:
        warehouse.submit(products(10), max_requests=1, limits=within(bound - PICO))
    assert type(caught.value) is BudgetExceededError
    message = str(caught.value)
    for part in ("'catalog'", "cap $", "spent $0.00", "reserved $0.00", "asked at most $", f"ends {month_end:%Y-%m-%d} 00:00 UTC"):
        assert part in message
    assert sim.stats()["posts"] == before
    assert warehouse.ledger.budget_status("catalog") is None
    assert warehouse.submit(products(10), max_requests=1, limits=within(bound)).asked == 10


def test_what_batches_under_way_reserve_is_worth_a_retry(warehouse: Warehouse) -> None:
    """The first job holds most of the cap until it lands, cheaper than it might have been."""
    bound = bound_of_ten(warehouse)
    limits = within(bound * Decimal("1.5"))
    first = warehouse.submit(products(10), limits=limits)
    with pytest.raises(BudgetReservedError, match="when they land") as caught:
        warehouse.submit(products(10), run_id="run-2", limits=limits)
    assert caught.value.retryable
    warehouse.fetch(first.batch_ids)
    assert warehouse.submit(products(10), run_id="run-2", limits=limits).asked == 10
    assert_books(warehouse)


def test_tokens_are_capped_as_well(warehouse: Warehouse) -> None:
    """100 answer tokens a row alone are above 999 for ten rows."""
    with pytest.raises(BudgetExceededError, match=r"cap 999 tokens, spent 0 tokens, reserved 0 tokens, asked at most [\d,]+ tokens"):
        warehouse.submit(products(10), limits=within(tokens=999))


def test_a_refused_shard_frees_its_reservation(warehouse: Warehouse, sim: Simulator) -> None:
    """Two shards are sent, the third is refused and the fourth never tried: two are reserved."""
    sim.faults.add("status", endpoint="create", status=400, after=2)
    with pytest.raises(SubmitRefusedError):
        warehouse.submit(products(8), max_requests=2, limits=within(1))
    states = [r["state"] for r in warehouse.rows("SELECT state FROM batchkit_batch ORDER BY shard")]
    assert states == ["submitted", "submitted", "rejected"]
    assert assert_books(warehouse).reserved_usd > 0
    report = warehouse.submit(products(8), max_requests=2, limits=within(1))
    warehouse.fetch(report.batch_ids)
    assert assert_books(warehouse).reserved_usd == 0


def test_a_shard_that_was_never_accepted_keeps_one_reservation(warehouse: Warehouse, sim: Simulator) -> None:
    """Cut before acceptance, proved void, sent again in the same attempt, under a cap that has room for it once."""
    bound = bound_of_ten(warehouse)
    sim.faults.add("cut_before_accept", times=2)
    report = warehouse.submit(products(10), limits=within(bound), settle_seconds=SETTLE)
    states = [r["state"] for r in warehouse.rows("SELECT state FROM batchkit_batch WHERE budget = 'catalog' ORDER BY shard")]
    assert states == ["void", "void", "submitted"]
    assert assert_books(warehouse).reserved_usd == bound
    warehouse.fetch(report.batch_ids)
    assert_books(warehouse)


def test_the_halves_of_a_shard_share_its_reservation(database: Database) -> None:
    """413: halves, and halves of halves, under a cap that has room for the whole once."""
    with Simulator(SimulatorSettings()) as sim:
        warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
        bound = bound_of_ten(warehouse)
        sim.set(max_body_bytes=900)
        warehouse.submit(products(10), limits=within(bound))
        assert len([r for r in warehouse.rows("SELECT state FROM batchkit_batch") if r["state"] == "rejected"]) > 1
        assert 0 < assert_books(warehouse).reserved_usd <= bound


def test_a_model_that_turns_out_to_have_no_price_goes_on_counting_at_its_bound(
    warehouse: Warehouse, caplog: pytest.LogCaptureFixture
) -> None:
    """The price was known when it was submitted, and is not where it lands."""
    warehouse.kit.price_book = PriceBook({"claude-private": {"input_usd_per_mtok": 3, "output_usd_per_mtok": 15}})
    report = warehouse.submit(products(10), model="claude-private", limits=within(5))
    reserved = assert_books(warehouse).reserved_usd
    warehouse.kit.price_book = PriceBook()
    warehouse.fetch(report.batch_ids)
    found = status(warehouse)
    assert (found.spent_usd, found.reserved_usd) == (reserved, NOTHING)
    assert "goes on counting it at its upper bound" in caplog.text


def test_requests_without_a_bound_are_refused_under_a_budget(warehouse: Warehouse, sim: Simulator) -> None:
    """A cap that cannot be kept is not promised."""
    with pytest.raises(CostLimitError, match="The budget 'catalog' cannot be kept: no price is known for claude-unheard-of"):
        warehouse.submit(products(2), model="claude-unheard-of", limits=within(1000))
    assert sim.stats()["requests_accepted"] == 0


# --- windows and names ------------------------------------------------------------------------------------------------------------


def test_a_new_window_begins_at_zero_and_a_late_landing_counts_in_its_own(warehouse: Warehouse) -> None:
    """Submitted yesterday, landed today: today's books do not know it."""
    bound = bound_of_ten(warehouse)
    first = warehouse.submit(products(10), limits=within(bound, window="day"))
    yesterday = datetime.now(UTC) - timedelta(days=1)
    with warehouse.engine.begin() as connection:
        from airflow_provider_batchkit.ledger.tables import batch

        connection.execute(sa.update(batch).where(batch.c.budget == "catalog").values(budget_at=yesterday))
    assert status(warehouse).reserved_usd == 0
    assert status(warehouse, at=yesterday).reserved_usd == bound
    assert warehouse.submit(products(10), run_id="run-2", limits=within(bound, window="day")).asked == 10
    tally = warehouse.fetch(first.batch_ids).tally
    assert (status(warehouse, at=yesterday).spent_usd, status(warehouse).spent_usd) == (tally.batch_cost_usd, NOTHING)
    # for ever counts both
    with pytest.raises(BudgetExceededError):
        warehouse.submit(products(10), run_id="run-3", limits=within(bound, window="ever"))


def test_a_job_that_runs_past_a_months_end_counts_in_the_month_of_its_reservation(
    warehouse: Warehouse, sim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reserved on the last evening of October where the clocks have just gone back, sent and refused and sent again in November."""
    october, november = datetime(2026, 10, 31, 23, 59, 59, tzinfo=UTC), datetime(2026, 11, 1, 0, 0, 1, tzinfo=UTC)
    moments = [october]

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return moments[-1].astimezone(tz)

    bound = bound_of_ten(warehouse)
    real = type(warehouse.kit).send

    def send(self: Any, shard: Any, **options: Any) -> Any:
        moments.append(november)
        return real(self, shard, **options)

    monkeypatch.setattr("airflow_provider_batchkit.ledger.budgets.datetime", Clock)
    monkeypatch.setattr(type(warehouse.kit), "send", send)
    sim.faults.add("status", status=413, after=1)
    first = warehouse.submit(products(10), max_requests=5, limits=within(bound))
    assert len(first.batch_ids) == 3
    assert status(warehouse, at=october).reserved_usd == bound
    assert status(warehouse, at=november).reserved_usd == 0
    # November has all of its own room, and a landing in November settles October's books
    warehouse.submit(products(10), run_id="run-2", limits=within(bound))
    tally = warehouse.fetch(first.batch_ids).tally
    assert (status(warehouse, at=october).spent_usd, status(warehouse, at=october).reserved_usd) == (tally.batch_cost_usd, NOTHING)
    assert (status(warehouse, at=november).spent_usd, status(warehouse, at=november).reserved_usd) == (NOTHING, bound)


def test_names_do_not_share(warehouse: Warehouse) -> None:
    """Another name is another budget."""
    bound = bound_of_ten(warehouse)
    warehouse.submit(products(10), limits=within(bound))
    assert warehouse.submit(products(10), run_id="run-2", limits=within(bound, name="tickets")).asked == 10
    assert warehouse.ledger.budget_status("nobody's") is None


def test_tasks_that_give_one_name_different_caps_are_told(warehouse: Warehouse, caplog: pytest.LogCaptureFixture) -> None:
    """Each is held against its own cap and the shared sum."""
    warehouse.submit(products(2), limits=within(5))
    with pytest.raises(BudgetReservedError):
        warehouse.submit(products(2), run_id="run-2", limits=within(status(warehouse).reserved_usd))
    warehouse.submit(products(2), run_id="run-3", limits=within(6))
    assert "The budget 'catalog' has been given as" in caplog.text
    assert status(warehouse).cap_usd == 6


# --- attempts that die --------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: what it interrupts cleans nothing up in the ledger."""


def test_a_retry_replaces_what_a_killed_attempt_held(warehouse: Warehouse, sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the second of five shards: the retry fits under a cap that has room for the job once."""
    bound = bound_of_ten(warehouse)
    sent: list[int] = []
    real = type(warehouse.kit).send

    def killed_at_the_third(self: Any, shard: Any, **options: Any) -> Any:
        if len(sent) == 2:
            raise Killed
        sent.append(shard.number)
        return real(self, shard, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(warehouse.kit), "send", killed_at_the_third)
        # a killed process does not give up what it holds
        patch.setattr(Ledger, "give_up_hold", lambda *_: None)
        with pytest.raises(Killed):
            warehouse.submit(products(10), max_requests=2, limits=within(bound))
    assert len(warehouse.rows("SELECT * FROM batchkit_budget_hold")) == 1
    assert status(warehouse).reserved_usd == bound
    with pytest.raises(BudgetReservedError):
        warehouse.submit(products(1), run_id="run-2", limits=within(bound))
    report = warehouse.submit(products(10), max_requests=2, limits=within(bound), settle_seconds=SETTLE)
    assert assert_books(warehouse).reserved_usd == bound
    warehouse.fetch(report.batch_ids)
    assert assert_books(warehouse).reserved_usd == 0
    assert sim.stats()["requests_accepted"] == 20


def test_what_a_dead_attempt_holds_ends_by_itself(warehouse: Warehouse) -> None:
    """Nobody runs its job again: after six hours without an intent its hold counts no more."""
    job = warehouse.job("dead")
    budget = Budget("catalog", usd=Decimal(1), window="ever")
    lease = warehouse.ledger.open_job(job, warehouse.attempt().attempt_id)
    warehouse.ledger.reserve(job.job_id, lease, budget, Bound(Decimal("0.9"), 900))
    assert status(warehouse).reserved_usd == Decimal("0.9")
    age_holds(warehouse, HOLD_S + 1)
    assert status(warehouse).reserved_usd == 0
    with pytest.raises(LeaseLostError):
        warehouse.ledger.reserve(job.job_id, lease - 1, budget, Bound(Decimal("0.9"), 900))


def age_holds(warehouse: Warehouse, seconds: float) -> None:
    from airflow_provider_batchkit.ledger.tables import budget_hold

    with warehouse.engine.begin() as connection:
        connection.execute(sa.update(budget_hold).values(held_at=datetime.now(UTC) - timedelta(seconds=seconds)))


def test_an_attempt_that_slept_too_long_asks_again(warehouse: Warehouse, sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for dead and its room given to another: it stops before its next POST, and the cap holds."""
    bound = bound_of_ten(warehouse)
    real = type(warehouse.kit).send
    limits = within(bound * Decimal("1.2"))

    def sleep_after_the_first(self: Any, shard: Any, **options: Any) -> Any:
        found = real(self, shard, **options)
        monkeypatch.setattr(type(warehouse.kit), "send", real)
        age_holds(warehouse, HOLD_S + 1)
        warehouse.submit(products(9), run_id="run-2", limits=limits)
        return found

    monkeypatch.setattr(type(warehouse.kit), "send", sleep_after_the_first)
    with pytest.raises(BudgetReservedError) as caught:
        warehouse.submit(products(10), max_requests=2, limits=limits)
    assert len(caught.value.submitted) == 1
    found = assert_books(warehouse)
    assert found.cap_usd is not None and found.reserved_usd <= found.cap_usd


def test_a_network_that_never_takes_the_body_leaves_nothing_reserved(warehouse: Warehouse, sim: Simulator) -> None:
    """Five proved failures end the attempt; void batches count nowhere."""
    warehouse.submit(products(1), run_id="witness")
    sim.faults.add("cut_before_accept", times=5)
    with pytest.raises(SubmitUncertainError):
        warehouse.submit(products(2), settle_seconds=SETTLE, limits=within(1))
    assert assert_books(warehouse).reserved_usd == 0


# --- many at once -----------------------------------------------------------------------------------------------------------------


def _submit_at_once(url: str, base_url: str, number: int, cap: Decimal, rounds: int, barrier: Any, results: Any) -> None:
    warehouse = Warehouse(sa.create_engine(url, poolclass=sa.pool.NullPool), kit_for(base_url))
    barrier.wait()
    for n in range(rounds):
        try:
            report = warehouse.submit(products(4), run_id=f"run-{number}-{n}", max_requests=2, limits=within(cap))
            results.put("sent")
            if rounds > 1:
                warehouse.fetch(report.batch_ids, run_id=f"run-{number}-{n}", disposition="append")
        except BudgetExceededError:
            results.put("refused")
        except BaseException as e:
            results.put(repr(e))
            raise


@pytest.mark.parametrize("landing", [False, True], ids=["submit", "submit and land"])
def test_twenty_processes_never_exceed_one_cap(database: Database, landing: bool) -> None:
    """Room for seven jobs. Without landings exactly seven are sent; with landings, room comes back while others ask for it."""
    rounds = 2 if landing else 1
    with SimulatorProcess(SimulatorSettings()) as sim:
        warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
        measured = warehouse.submit(products(4), run_id="measure").estimate
        assert measured is not None and measured.upper_usd is not None
        bound = measured.upper_usd
        cap = bound * Decimal("7.5")
        before = sim.stats()["requests_accepted"]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.warehouse", "anthropic", "genai_prices.data", "psycopg", __name__])
        barrier, results = context.Barrier(20), context.Queue()
        processes = [
            context.Process(target=_submit_at_once, args=(database.url, sim.base_url, i, cap, rounds, barrier, results)) for i in range(20)
        ]
        for process in processes:
            process.start()
        highest = Decimal(0)
        while any(process.is_alive() for process in processes):
            found = warehouse.ledger.budget_status("catalog")
            highest = max(highest, found.spent_usd + found.reserved_usd) if found else highest
            time.sleep(0.1)
        ended = [results.get(timeout=10) for _ in range(20 * rounds)]
        assert set(ended) <= {"sent", "refused"}
        assert highest <= cap
        found = assert_books(warehouse)
        assert found.spent_usd + found.reserved_usd <= cap
        assert sim.stats()["requests_accepted"] - before == 4 * ended.count("sent")
        if not landing:
            assert (ended.count("sent"), found.spent_usd, found.reserved_usd) == (7, NOTHING, 7 * bound)
        batch_ids = [r["batch_id"] for r in warehouse.rows("SELECT batch_id FROM batchkit_batch WHERE budget = 'catalog'")]
        billed = warehouse.fetch(batch_ids, disposition="append").tally.batch_cost_usd
        found = assert_books(warehouse)
        assert (found.spent_usd, found.reserved_usd) == (billed, NOTHING)

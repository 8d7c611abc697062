"""The books: rows, batches, bills, tallies and the roll-up's views agree to the last digit, on SQLite and PostgreSQL."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.api.results import Reconciler, parse_blocks
from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.landing import Batch, LandingOptions, Results, land_batches
from airflow_provider_batchkit.ledger.spending import Spending
from airflow_provider_batchkit.ledger.tables import batch
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings
from tests.databases import Database
from tests.warehouse import Warehouse, kit_for

TOKENS = st.one_of(st.integers(0, 300), st.sampled_from([99_999, 100_000, 100_001, 200_001]), st.integers(0, 1_000_000))
#: what the API says of one request: its model and usage, or an outcome without an answer
ANSWERS = st.one_of(
    st.fixed_dictionaries(
        {
            "model": st.sampled_from(["claude-opus-4-8", "claude-haiku-5-5", "claude-fable-5-1", "negotiated"]),
            "usage": st.fixed_dictionaries(
                {
                    "input_tokens": TOKENS,
                    "output_tokens": TOKENS,
                    "cache_read_input_tokens": TOKENS,
                    "cache_creation": st.fixed_dictionaries({"ephemeral_5m_input_tokens": TOKENS, "ephemeral_1h_input_tokens": TOKENS}),
                    "server_tool_use": st.fixed_dictionaries({"web_search_requests": st.integers(0, 20)}),
                    "inference_geo": st.sampled_from([None, "us", "global"]),
                    "speed": st.sampled_from([None, "fast"]),
                }
            ),
        }
    ),
    st.sampled_from(["errored", "expired", "canceled", "no line"]),
)
BOOK = PriceBook({"negotiated": {"input_usd_per_mtok": "0.333333", "output_usd_per_mtok": "0.000001", "batch_discount": "0.123457"}})
TOKEN_NAMES = ("input_tokens", "output_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens", "cache_read_tokens", "web_searches")


@pytest.fixture(scope="module")
def sim() -> Iterator[Simulator]:
    with Simulator(SimulatorSettings(input_tokens=2700, output_tokens=100, models={"claude-imaginary-9": {}})) as simulator:
        yield simulator


@pytest.fixture
def warehouse(database: Database, sim: Simulator) -> Warehouse:
    return Warehouse(database.engine(), kit_for(sim.base_url))


def result_line(custom_id: str, answer: Any) -> bytes:
    """A line of the results as the API writes it."""
    if isinstance(answer, dict):
        message = {**answer, "content": [{"type": "text", "text": "yes"}], "stop_reason": "end_turn"}
        result: dict[str, Any] = {"type": "succeeded", "message": message}
    elif answer == "errored":
        result = {"type": "errored", "error": {"type": "error", "error": {"type": "api_error", "message": "no"}}}
    else:
        result = {"type": answer}
    return json.dumps({"custom_id": custom_id, "result": result}).encode() + b"\n"


def money(rows: Sequence[dict[str, Any]], name: str) -> Decimal:
    return sum((Decimal(row[name]) for row in rows), Decimal(0))


_runs = itertools.count()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.lists(ANSWERS, min_size=1, max_size=12), copies=st.integers(0, 3), shard=st.integers(1, 6))
def test_sums_are_exact_for_random_usages(warehouse: Warehouse, answers: list[Any], copies: int, shard: int) -> None:
    """Rows of the table = the ledger's requests = its batches = its bills = the tally = the views, in money and in tokens.

    The requests are submitted for real; what the API says of them is scripted, as bytes that the real parser reads.
    """
    number = next(_runs)
    run, table = f"run-{number}", f"answers_{number}"
    rows = [{"id": i, "name": f"{run} {i}"} for i in range(len(answers))]
    rows += [{"id": len(answers) + i, "name": f"{run} 0"} for i in range(copies)]
    report = warehouse.submit(rows, run_id=run, max_requests=shard)
    said = iter(answers)

    def read(batch_id: str, reconciler: Reconciler, expected: int, count: Callable[[int], None]) -> Iterator[ResultBlock]:
        record = warehouse.ledger.find(batch_id)
        assert record is not None
        ids = sorted(entry.custom_id for piece in warehouse.ledger.rows_of(record) for entry in piece if entry.asked)
        lines = [result_line(custom_id, answer) for custom_id, answer in zip(ids, said, strict=False) if answer != "no line"]
        yield from itertools.starmap(reconciler.accept_block, parse_blocks(iter(lines)))

    batches = [Batch(b, warehouse.ledger.find(b)) for b in report.batch_ids]
    results = Results(lambda b: warehouse.kit.get(b.batch_id), read, BOOK)
    landed = land_batches(warehouse.ledger, batches, table, results, LandingOptions(include_failed=True))
    tally = landed.tally
    billed = [answer for answer in answers if isinstance(answer, dict)]
    assert (landed.rows, tally.requests) == (len(rows), len(billed))

    (job,) = warehouse.rows(f"SELECT job_id FROM batchkit_job WHERE run_id = '{run}'")
    mine = f"WHERE job_id = '{job['job_id']}'"
    costs = [row["cost_usd"] for row in warehouse.rows(f"SELECT cost_usd FROM {table} WHERE cost_usd IS NOT NULL")]
    assert len(costs) == len(rows)
    assert sum(map(Decimal, costs), Decimal(0)) == tally.batch_cost_usd

    for source in ("batchkit_request", "batchkit_batch", "batchkit_bill"):
        (sums,) = warehouse.rows(
            f"SELECT COALESCE(SUM(batch_cost_picousd), 0) AS b, COALESCE(SUM(standard_cost_picousd), 0) AS s FROM {source} {mine}"
        )
        assert (sums["b"], sums["s"]) == (pico(tally.batch_cost_usd), pico(tally.standard_cost_usd)), source
    bills = warehouse.rows(f"SELECT * FROM batchkit_bill {mine}")
    for name in TOKEN_NAMES:
        assert sum(bill[name] for bill in bills) == getattr(tally, name)
    assert {bill["model"] for bill in bills} == set(tally.models)

    (summary,) = warehouse.rows(f"SELECT * FROM batchkit_summary {mine}")
    assert Decimal(summary["batch_cost_usd"]) == tally.batch_cost_usd
    assert Decimal(summary["standard_cost_usd"]) == tally.standard_cost_usd
    assert Decimal(summary["savings_usd"]) == tally.savings_usd
    assert (summary["source_rows"], summary["requests"], summary["shared_rows"]) == (len(rows), len(answers), copies)
    assert summary["dedupe_hit_ratio"] == pytest.approx(copies / len(rows))
    spend = warehouse.rows("SELECT * FROM batchkit_spend")
    every = warehouse.rows("SELECT SUM(batch_cost_picousd) AS b FROM batchkit_batch")[0]["b"]
    assert money(spend, "batch_cost_usd") == Decimal(int(every)).scaleb(-12)
    (counted,) = warehouse.rows("SELECT COALESCE(SUM(requests), 0) AS n FROM batchkit_bill")
    assert sum(row["requests"] for row in spend) == counted["n"]


def pico(usd: Decimal | None) -> int:
    assert usd is not None
    return int(usd.scaleb(12))


def products(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}"} for i in range(count)]


def test_landing_again_books_nothing_twice(warehouse: Warehouse) -> None:
    """A cleared fetch writes the same bill in the place of the old one, and names no batch as new."""
    ids = warehouse.submit(products(5), model="claude-opus-4-8", max_requests=2).batch_ids
    first = warehouse.fetch(ids)
    spend = warehouse.rows("SELECT * FROM batchkit_spend")
    again = warehouse.fetch(ids)
    assert warehouse.rows("SELECT * FROM batchkit_spend") == spend
    assert ([b.batch_id for b in first.first], again.first) == (ids, [])
    assert [Decimal(row["batch_cost_usd"]) for row in spend] == [Decimal("0.04")]
    assert [(row["batches"], row["requests"], row["input_tokens"]) for row in spend] == [(3, 5, 13_500)]


def test_spend_is_per_day_dag_task_and_model(warehouse: Warehouse) -> None:
    """Two models are two lines of the day; savings are what the standard price would have been more."""
    for model, run in (("claude-opus-4-8", "run-1"), ("claude-haiku-5-5", "run-2"), ("claude-opus-4-8", "run-3")):
        warehouse.fetch(warehouse.submit(products(10), model=model, run_id=run).batch_ids)
    lines = warehouse.rows("SELECT day, dag_id, task_id, model, batches, batch_cost_usd, savings_usd FROM batchkit_spend ORDER BY model")
    assert {str(line["day"]) for line in lines} == {datetime.now(UTC).date().isoformat()}
    # opus: 20 rows of $0.008; haiku: 10 of (2,700 * $0.10 + 100 * $0.50) / 2 per million = $0.00016
    assert [(line["dag_id"], line["task_id"], line["model"], line["batches"], Decimal(line["batch_cost_usd"])) for line in lines] == [
        ("dag", "submit", "claude-haiku-5-5", 1, Decimal("0.0016")),
        ("dag", "submit", "claude-opus-4-8", 2, Decimal("0.16")),
    ]
    assert [Decimal(line["savings_usd"]) for line in lines] == [Decimal("0.0016"), Decimal("0.16")]


def test_a_batch_that_used_two_models_is_one_batch_of_its_day_and_of_its_dag(warehouse: Warehouse) -> None:
    """Its requests and its costs are added up over both."""
    warehouse.fetch(warehouse.submit([*products(2), {"id": 2, "name": "c [[sim:advisor]]"}]).batch_ids)
    books = Spending(warehouse.engine)
    by_model = books.spent("model")
    assert [one.batches for one in by_model] == [1, 1]
    for by in ("day", "dag"):
        (one,) = books.spent(by)
        assert (one.batches, one.requests) == (1, sum(each.requests for each in by_model))
        assert one.batch_cost_usd == sum(each.batch_cost_usd or 0 for each in by_model)


def test_an_unknown_price_is_null_and_never_zero(warehouse: Warehouse) -> None:
    """The tokens count, the cost is unknown, and the view says how many requests that concerns."""
    warehouse.fetch(warehouse.submit(products(3), model="claude-imaginary-9").batch_ids)
    (spend,) = warehouse.rows("SELECT * FROM batchkit_spend")
    assert (spend["unpriced_requests"], spend["input_tokens"]) == (3, 8_100)
    (summary,) = warehouse.rows("SELECT * FROM batchkit_summary")
    for line in (spend, summary):
        assert [line[f"{name}_usd"] for name in ("batch_cost", "standard_cost", "savings")] == [None, None, None]


def test_a_summary_tells_each_steps_seconds(warehouse: Warehouse) -> None:
    """Rendering adds up over attempts; waiting goes from the first creation to the last end; open batches are counted, not summed."""
    ids = warehouse.submit(products(4), max_requests=2).batch_ids
    warehouse.fetch(ids[:1])
    (summary,) = warehouse.rows("SELECT * FROM batchkit_summary")
    assert (summary["batches"], summary["open_batches"], summary["requests"]) == (1, 1, 2)
    warehouse.fetch(ids)
    start = datetime(2026, 11, 23, 23, 0, tzinfo=UTC)
    times = [(0, 2, 100, 400), (2, 5, 90, 460)]
    with warehouse.engine.begin() as connection:
        for shard, (intended, submitted, created, ended) in enumerate(times):
            at = {"intended_at": intended, "submitted_at": submitted, "created_at": created, "ended_at": ended}
            values: dict[str, Any] = {name: start + timedelta(seconds=s) for name, s in at.items()}
            connection.execute(sa.update(batch).where(batch.c.shard == shard).values(landing_ms=1500, **values))
        connection.exec_driver_sql("UPDATE batchkit_job SET rendering_ms = 250")
    warehouse.ledger.note_rendering(warehouse.rows("SELECT job_id FROM batchkit_job")[0]["job_id"], 1.0, 0)
    (summary,) = warehouse.rows("SELECT * FROM batchkit_summary")
    steps = [summary[f"{step}_s"] for step in ("rendering", "submitting", "waiting", "landing")]
    assert steps == pytest.approx([1.25, 5, 370, 3], abs=0.002)
    assert (summary["batches"], summary["open_batches"]) == (2, 0)


def test_a_run_notes_its_own_times(warehouse: Warehouse) -> None:
    """What the roll-up reads is written on the way: at rendering, at submitting, at landing."""
    warehouse.fetch(warehouse.submit(products(3)).batch_ids)
    (summary,) = warehouse.rows("SELECT rendering_s, submitting_s, waiting_s, landing_s FROM batchkit_summary")
    assert all(value is not None and 0 <= value < 60 for value in summary.values()), summary
    assert summary["landing_s"] > 0


def test_latency_percentiles_are_by_nearest_rank(warehouse: Warehouse) -> None:
    """Latencies of 1 to 20 s: the 10th is the median, the 19th the 95th percentile; a day ends at midnight UTC."""
    warehouse.fetch(warehouse.submit(products(21), max_requests=1).batch_ids)
    midnight = datetime(2026, 11, 24, tzinfo=UTC)
    with warehouse.engine.begin() as connection:
        for shard in range(21):
            created = midnight if shard == 20 else midnight - timedelta(seconds=1)
            values = {"created_at": created, "ended_at": created + timedelta(seconds=shard + 1)}
            connection.execute(sa.update(batch).where(batch.c.shard == shard).values(**values))
    days = warehouse.rows("SELECT * FROM batchkit_latency ORDER BY day")
    assert [(str(d["day"]), d["dag_id"], d["batches"]) for d in days] == [("2026-11-23", "dag", 20), ("2026-11-24", "dag", 1)]
    assert [(d["p50_s"], d["p95_s"], d["max_s"]) for d in days] == [
        pytest.approx((10, 19, 20), abs=0.002),
        pytest.approx((21, 21, 21), abs=0.002),
    ]

"""A row is asked once: equal rows of one run, and rows that an earlier run has answered."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings, answer_for
from tests.databases import Database
from tests.warehouse import Warehouse, kit_for


@pytest.fixture
def sim() -> Iterator[Simulator]:
    """Opus at $0.008 a row."""
    with Simulator(SimulatorSettings(input_tokens=2700, output_tokens=100)) as simulator:
        yield simulator


@pytest.fixture
def warehouse(database: Database, sim: Simulator) -> Warehouse:
    """An empty database with a ledger."""
    return Warehouse(database.engine(), kit_for(sim.base_url))


def catalog(rows: int, *, changed: range = range(0), edition: str = "new") -> list[dict[str, Any]]:
    return [{"id": i, "name": f"{edition if i in changed else 'old'} product {i}"} for i in range(rows)]


def month(warehouse: Warehouse, rows: list[dict[str, Any]], run_id: str, **how: Any) -> tuple[int, Decimal]:
    """One run with ``skip_unchanged``: how many rows were asked, and the bill in USD."""
    report = warehouse.submit(rows, run_id=run_id, model="claude-opus-4-8", skip_unchanged=True, **how)
    bill = warehouse.fetch(report.batch_ids, run_id=run_id).tally.batch_cost_usd
    assert bill is not None
    assert report.asked + report.copies + report.unchanged == report.rows
    return report.asked, bill


def test_a_second_month_pays_for_what_has_changed(warehouse: Warehouse, sim: Simulator) -> None:
    """Of 2,000 rows one per cent has changed: 20 are asked, for one per cent of the first bill, and the table has every new answer."""
    assert month(warehouse, catalog(2_000), "2026-01") == (2_000, Decimal(16))
    assert month(warehouse, catalog(2_000, changed=range(500, 520)), "2026-02") == (20, Decimal("0.16"))
    assert sim.stats()["requests_accepted"] == 2_020
    answers = {r["id"]: r["response"] for r in warehouse.rows("SELECT id, response FROM answers")}
    assert answers == {i: answer_for(f"About {'new' if 500 <= i < 520 else 'old'} product {i}") for i in range(2_000)}
    assert month(warehouse, catalog(2_000, changed=range(500, 520)), "2026-03") == (0, Decimal(0))


def test_a_row_that_changes_back_is_asked_again(warehouse: Warehouse) -> None:
    """What counts is the latest answer of its key: the table holds that one."""
    month(warehouse, catalog(3), "2026-01")
    assert month(warehouse, catalog(3, changed=range(1)), "2026-02")[0] == 1
    assert month(warehouse, catalog(3), "2026-03")[0] == 1
    assert warehouse.rows("SELECT response FROM answers WHERE id = 0") == [{"response": answer_for("About old product 0")}]


def test_a_row_that_changes_back_after_a_failure_is_asked_where_the_failure_is_in_the_table(warehouse: Warehouse) -> None:
    """With include_failed the failed row may be what the table holds; without it the old answer is there still, and is not bought."""
    month(warehouse, catalog(2), "2026-01")
    changed = [{"id": 0, "name": "[[sim:errored]]"}, *catalog(2)[1:]]
    report = warehouse.submit(changed, run_id="2026-02", model="claude-opus-4-8", skip_unchanged=True)
    warehouse.fetch(report.batch_ids, run_id="2026-02", include_failed=True)
    month(warehouse, catalog(2), "2026-03")
    assert warehouse.rows("SELECT status, response FROM answers WHERE id = 0") == [
        {"status": "succeeded", "response": answer_for("About old product 0")}
    ]


def test_an_older_answer_that_was_written_again_counts_as_the_latest(warehouse: Warehouse) -> None:
    """``rewrite`` puts January's answer over February's: what February asked is asked again."""
    january = warehouse.submit(catalog(2), run_id="2026-01", model="claude-opus-4-8", skip_unchanged=True)
    warehouse.fetch(january.batch_ids, run_id="2026-01")
    new = catalog(2, changed=range(1))
    month(warehouse, new, "2026-02")
    warehouse.fetch(january.batch_ids, run_id="2026-01", rewrite=True)
    assert month(warehouse, new, "2026-03")[0] == 1
    assert warehouse.rows("SELECT response FROM answers WHERE id = 0") == [{"response": answer_for("About new product 0")}]


@pytest.mark.parametrize("how", [{"prompt": "Now about {{ row.name }}"}, {"max_tokens": 101}])
def test_a_changed_prompt_or_parameter_counts_as_changed(warehouse: Warehouse, how: dict[str, Any]) -> None:
    """The whole request is compared, not the row."""
    month(warehouse, catalog(3), "2026-01")
    assert month(warehouse, catalog(3), "2026-02", **how)[0] == 3


def test_only_what_succeeded_is_skipped(warehouse: Warehouse) -> None:
    """A row that failed last month is asked again this month, alone, and lands."""
    rows = [*catalog(3), {"id": 3, "name": "[[sim:expired-once]]"}]
    assert month(warehouse, rows, "2026-01") == (4, Decimal("0.024"))
    assert month(warehouse, rows, "2026-02") == (1, Decimal("0.008"))
    assert len(warehouse.rows("SELECT id FROM answers")) == 4


def test_what_is_still_in_flight_is_asked(warehouse: Warehouse) -> None:
    """An answer that has not landed is not in the table, and may never come."""
    warehouse.submit(catalog(3), run_id="2026-01", model="claude-opus-4-8")
    assert month(warehouse, catalog(3), "2026-02")[0] == 3


def test_a_retry_within_the_month_asks_nothing_twice(warehouse: Warehouse, sim: Simulator) -> None:
    """Rows of this run's earlier attempt are in flight, rows of last month's are unchanged: neither is asked."""
    month(warehouse, catalog(4), "2026-01")
    rows = catalog(6, changed=range(1))
    first = warehouse.submit(rows, run_id="2026-02", model="claude-opus-4-8", skip_unchanged=True)
    again = warehouse.submit(rows, run_id="2026-02", model="claude-opus-4-8", skip_unchanged=True)
    assert (first.asked, first.unchanged) == (3, 3)
    assert (again.asked, again.known, again.unchanged) == (0, 3, 3)
    assert again.batch_ids == first.batch_ids
    assert sim.stats()["requests_accepted"] == 7


def test_equal_rows_are_asked_once_and_answered_each(warehouse: Warehouse, sim: Simulator) -> None:
    """Thirty per cent of the rows repeat another row's question: 700 requests for 1,000 rows, and the roll-up says so."""
    rows = [{"id": i, "name": f"product {i % 700}"} for i in range(1_000)]
    report = warehouse.submit(rows)
    landed = warehouse.fetch(report.batch_ids)
    assert (report.asked, report.copies, landed.rows) == (700, 300, 1_000)
    assert sim.stats()["requests_accepted"] == 700
    assert landed.tally.requests == 700
    answers = {r["id"]: r["response"] for r in warehouse.rows("SELECT id, response FROM answers")}
    assert answers == {i: answer_for(f"About product {i % 700}") for i in range(1_000)}
    assert [r["dedupe_hit_ratio"] for r in warehouse.rows("SELECT dedupe_hit_ratio FROM batchkit_summary")] == [pytest.approx(0.3)]


def test_the_roll_up_shows_what_was_left_out(warehouse: Warehouse) -> None:
    """Also of a run that asked nothing and has no batch: it cost nothing, which is known."""
    month(warehouse, catalog(4), "2026-01")
    month(warehouse, catalog(4, changed=range(1)), "2026-02")
    month(warehouse, catalog(4, changed=range(1)), "2026-03")
    columns = "run_id, unchanged_rows, skip_hit_ratio, batch_cost_picousd AS pico, open_batches"
    assert warehouse.rows(f"SELECT {columns} FROM batchkit_summary ORDER BY run_id") == [
        {"run_id": "2026-01", "unchanged_rows": 0, "skip_hit_ratio": 0, "pico": 32_000_000_000, "open_batches": 0},
        {"run_id": "2026-02", "unchanged_rows": 3, "skip_hit_ratio": 0.75, "pico": 8_000_000_000, "open_batches": 0},
        {"run_id": "2026-03", "unchanged_rows": 4, "skip_hit_ratio": 1, "pico": 0, "open_batches": 0},
    ]

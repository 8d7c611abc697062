"""The ledger's outcomes: packed or not, ``batchkit_request`` shows a row for each source row."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import ReplaceRefusedError
from airflow_provider_batchkit.landing.stage import StageTables
from airflow_provider_batchkit.landing.write import settle_outcomes
from airflow_provider_batchkit.ledger import BatchRecord, outcomes
from airflow_provider_batchkit.simulator import Simulator
from tests.databases import Database
from tests.warehouse import Warehouse, kit_for


@pytest.fixture
def warehouse(database: Database) -> Iterator[Warehouse]:
    with Simulator(models={"claude-nobody-knows": {}}) as simulator:
        yield Warehouse(database.engine(), kit_for(simulator.base_url))


ODD_KEYS = ["plain", 'a "quoted" \\ one', "tab\tand\nline", "\N{TEACUP WITHOUT HANDLE}", "comma, bracket]"]


def test_every_row_is_there_once_with_its_request_and_its_cost(warehouse: Warehouse) -> None:
    """Answered, shared, and failed ones, under any key."""
    rows = [{"id": key, "n": 1, "name": f"product {place}"} for place, key in enumerate(ODD_KEYS)]
    rows += [{"id": "copy", "n": 2, "name": "product 0"}, {"id": "failed", "n": 3, "name": "[[sim:overloaded]]"}]
    (batch_id,) = warehouse.submit(rows, key=("id", "n"), model="claude-opus-4-8").batch_ids
    record = warehouse.ledger.find(batch_id)
    assert record is not None
    asked = {entry.key: entry for piece in warehouse.ledger.rows_of(record) for entry in piece}
    warehouse.fetch([batch_id])
    found = {row["key"]: row for row in warehouse.rows("SELECT * FROM batchkit_request")}
    assert found.keys() == asked.keys() and len(found) == 7
    for key, row in found.items():
        assert (row["job_id"], row["shard"], row["custom_id"]) == (record.job_id, 0, asked[key].custom_id)
        assert row["digest"] == asked[key].custom_id.removeprefix(f"{record.job_id}-")
        assert bool(row["asked"]) is asked[key].asked
        failed = '"failed"' in key
        assert (row["status"], row["error_type"]) == (("errored", "overloaded_error") if failed else ("succeeded", None))
        paid = not failed and asked[key].asked
        assert (row["batch_cost_picousd"] > 0) is paid and row["standard_cost_picousd"] == 2 * row["batch_cost_picousd"]
    assert [row["key"] for row in warehouse.rows("SELECT key FROM batchkit_failed")] == ['["failed",3]']
    with warehouse.engine.connect() as connection:
        packed = {row.key: row for row in outcomes.succeeded_rows(connection, record.job_id, record.shard)}
    assert packed.keys() == found.keys() - {'["failed",3]'}
    assert all(row.digest == found[key]["digest"] and row.batch_cost == found[key]["batch_cost_picousd"] for key, row in packed.items())


@pytest.mark.parametrize("mark", ["overloaded-once", "overloaded"])
def test_rounds_that_land_at_once_leave_one_outcome_of_a_row(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    """The first round is landed again and is at its outcomes; the second lands meanwhile. A row that was answered does not stay failed."""
    rows = [{"id": 1, "name": "one"}, {"id": 2, "name": f"two [[sim:{mark}]]"}]
    first = warehouse.submit(rows).batch_ids
    warehouse.fetch(first, include_failed=True)
    second = [batch for batch in warehouse.submit(rows, round_number=2, only=["[2]"]).batch_ids if batch not in first]
    at_work = threading.Event()

    def slow(connection: sa.Connection, stage: StageTables, record: BatchRecord, left_out: set[str], *, any_failed: bool) -> None:
        settle_outcomes(connection, stage, record, left_out, any_failed=any_failed)
        if record.round == 1:
            at_work.set()
            time.sleep(1)

    monkeypatch.setattr("airflow_provider_batchkit.landing.land.settle_outcomes", slow)
    with ThreadPoolExecutor() as pool:
        again = pool.submit(warehouse.fetch, first, include_failed=True, rewrite=True)
        assert at_work.wait(30)
        warehouse.fetch(second, include_failed=True)
        again.result(30)
    last = "succeeded" if mark == "overloaded-once" else "errored"
    assert warehouse.rows("SELECT key, status, shard FROM batchkit_request ORDER BY key") == [
        {"key": "[1]", "status": "succeeded", "shard": 0},
        {"key": "[2]", "status": last, "shard": 1},
    ]
    assert warehouse.rows("SELECT id, status FROM answers ORDER BY id") == [{"id": 1, "status": "succeeded"}, {"id": 2, "status": last}]


@pytest.mark.parametrize("order", [[1], [2, 0, 1], [2, 1, 0], [0, 1, 2]])
@pytest.mark.parametrize("disposition", ["merge", "replace"])
def test_rounds_that_land_again_in_any_order_change_no_outcome(warehouse: Warehouse, disposition: str, order: list[int]) -> None:
    """A round in the middle forgets what came before it, and nothing that came after."""
    rows = [{"id": 1, "name": "one"}, {"id": 2, "name": "two [[sim:overloaded]]"}, {"id": 3, "name": "three [[sim:expired]]"}]
    batches = [*warehouse.submit(rows).batch_ids]
    warehouse.fetch(batches)
    for number in (2, 3):
        job_id = warehouse.rows("SELECT job_id FROM batchkit_job")[0]["job_id"]
        asked = warehouse.submit(rows, round_number=number, only=list(warehouse.ledger.failed_keys(job_id)))
        batches += [batch for batch in asked.batch_ids if batch not in batches]
        warehouse.fetch(batches[-1:])
    before = warehouse.rows("SELECT key, status, shard FROM batchkit_request ORDER BY key")
    assert [(row["key"], row["status"], row["shard"]) for row in before] == [
        ("[1]", "succeeded", 0),
        ("[2]", "errored", 2),
        ("[3]", "expired", 2),
    ]
    # a round without an answer alone does not replace the others' rows
    refused = pytest.raises(ReplaceRefusedError) if (disposition, order) == ("replace", [1]) else contextlib.nullcontext()
    with refused:
        warehouse.fetch([batches[place] for place in order], disposition=disposition, rewrite=True)
    assert warehouse.rows("SELECT key, status, shard FROM batchkit_request ORDER BY key") == before
    assert warehouse.ledger.outcome(job_id).counts == {"succeeded": 1, "errored": 1, "expired": 1}


def test_rows_that_share_requests_are_kept_together(warehouse: Warehouse) -> None:
    """A thousand requests with a copy each are a handful of packed rows, and not a thousand."""
    rows = [{"id": n, "name": f"product {n % 1000}"} for n in range(2000)]
    warehouse.fetch(warehouse.submit(rows).batch_ids)
    (packed,) = warehouse.rows("SELECT COUNT(*) AS parts, SUM(source_rows) AS n FROM batchkit_succeeded")
    assert packed["n"] == 2000 and packed["parts"] < 20
    assert warehouse.rows("SELECT COUNT(DISTINCT key) AS n FROM batchkit_request") == [{"n": 2000}]


def test_the_cost_of_an_unknown_model_is_unknown_for_each_row(warehouse: Warehouse) -> None:
    """NULL, and never zero."""
    warehouse.fetch(warehouse.submit([{"id": n, "name": f"product {n}"} for n in range(3)], model="claude-nobody-knows").batch_ids)
    costs = "SELECT status, batch_cost_picousd AS b, standard_cost_picousd AS s FROM batchkit_request"
    assert warehouse.rows(costs) == [{"status": "succeeded", "b": None, "s": None}] * 3

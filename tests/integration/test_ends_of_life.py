"""Batches that end badly, and connections that change: a clear error that says what can still be had, and nothing paid twice."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import anthropic
import pytest

from airflow_provider_batchkit import BatchKit, BatchSnapshot
from airflow_provider_batchkit.api.polling import GaveUp, PollState
from airflow_provider_batchkit.exceptions import BatchNotEndedError, BatchUnavailableError, SubmitUncertainError
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings, answer_for
from tests.databases import Database
from tests.warehouse import Warehouse

KEYS = {"key-a": "workspace-a", "key-a2": "workspace-a", "key-b": "workspace-b"}
SETTLE = 0.8


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator(SimulatorSettings(keys=KEYS, clock="manual")) as simulator:
        yield simulator


def kit(sim: Simulator, key: str) -> BatchKit:
    return BatchKit(anthropic.Anthropic(api_key=key, base_url=sim.base_url, max_retries=0))


@pytest.fixture
def warehouse(sqlite: Database, sim: Simulator) -> Warehouse:
    return Warehouse(sqlite.engine(), kit(sim, "key-a"))


def products(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}"} for i in range(start, start + count)]


def test_a_rotated_key_of_the_same_workspace_changes_nothing(warehouse: Warehouse, sim: Simulator) -> None:
    """Batches belong to the workspace: another key of it fetches them, and submit re-attaches."""
    ids = warehouse.submit(products(3)).batch_ids
    sim.end(ids[0])
    warehouse.kit = kit(sim, "key-a2")
    assert warehouse.submit(products(3)).batch_ids == ids
    assert warehouse.fetch(ids).rows == 3


def test_a_revoked_key_says_that_the_batches_go_on(warehouse: Warehouse, sim: Simulator) -> None:
    """401: the message asks for another key of the same workspace; with it, everything is there."""
    ids = warehouse.submit(products(3)).batch_ids
    sim.end(ids[0])
    sim.set(keys={"key-a2": "workspace-a"})
    with pytest.raises(BatchUnavailableError, match=r"401.* revoked.* another key of the same workspace"):
        warehouse.fetch(ids)
    warehouse.kit = kit(sim, "key-a2")
    assert warehouse.fetch(ids).rows == 3


def test_a_revoked_key_ends_a_wait_at_once(warehouse: Warehouse, sim: Simulator) -> None:
    """Polling with a dead key for a day helps nobody."""
    ids = warehouse.submit(products(3)).batch_ids
    sim.set(keys={"key-b": "workspace-b"})
    state = PollState(ids, interval=60)
    warehouse.kit.look(state)
    decision = state.decide(0)
    assert isinstance(decision, GaveUp)
    assert "401" in decision.reason


def test_a_connection_to_another_workspace_is_told_so(warehouse: Warehouse, sim: Simulator) -> None:
    """Fetch names the batch and says whose key is needed."""
    ids = warehouse.submit(products(3)).batch_ids
    warehouse.kit = kit(sim, "key-b")
    with pytest.raises(BatchUnavailableError, match=f"{ids[0]} .* another workspace"):
        warehouse.fetch(ids, sleep=lambda _: None)


def test_a_key_of_another_workspace_proves_nothing_about_a_lost_post(warehouse: Warehouse, sim: Simulator) -> None:
    """Not seen is not "never accepted" when nothing of ours is seen: the rows are not sent to the other workspace's bill."""
    warehouse.submit(products(3), run_id="run-0")
    sim.faults.add("cut_after_accept")
    real, warehouse.kit = warehouse.kit, kit(sim, "key-b")
    warehouse.kit.send = real.send  # type: ignore[method-assign]  # the POST goes to the first workspace, the look to the second
    with pytest.raises(SubmitUncertainError, match=r"sees none of msgbatch_.* Nothing was sent"):
        warehouse.submit(products(3, start=10), settle_seconds=SETTLE)
    assert sim.stats()["batches_accepted"] == 2
    warehouse.kit = kit(sim, "key-a")
    sim.set(clock="instant")
    assert len(warehouse.submit(products(3, start=10), settle_seconds=SETTLE).batch_ids) == 1
    assert sim.stats()["batches_accepted"] == 2


def test_a_batch_that_shows_late_is_still_found(warehouse: Warehouse, sim: Simulator) -> None:
    """The list may lag behind the acceptance: the batch is looked for until settle_seconds are over, and beyond."""
    recent, looks = warehouse.kit.recent, []

    def lagging(since: datetime, clock: Any = None) -> Iterator[BatchSnapshot]:
        looks.append(since)
        return iter(()) if len(looks) < 2 else recent(since, clock)

    warehouse.kit.recent = lagging  # type: ignore[method-assign]  # a list that lags
    sim.set(clock="instant")
    sim.faults.add("cut_after_accept")
    report = warehouse.submit(products(3), settle_seconds=6)
    assert len(report.batch_ids) == 1
    assert sim.stats()["batches_accepted"] == 1


def test_a_batch_canceled_from_outside_lands_what_it_answered(warehouse: Warehouse, sim: Simulator) -> None:
    """Finished rows land and are billed, the rest is canceled and free."""
    sim.set(done_share=0.5)
    ids = warehouse.submit(products(20)).batch_ids
    with pytest.raises(BatchNotEndedError, match="Nothing is lost"):
        warehouse.fetch(ids)
    warehouse.kit.cancel(ids[0])
    sim.end(ids[0])
    landed = warehouse.fetch(ids)
    assert 0 < landed.counts["succeeded"] < 20
    assert landed.counts["succeeded"] + landed.counts["canceled"] == 20
    assert (landed.rows, landed.tally.requests) == (landed.counts["succeeded"],) * 2


def test_an_expired_batch_lands_as_expired_rows(warehouse: Warehouse, sim: Simulator) -> None:
    """After 24 hours the API expires what it has not answered; nothing is billed for it."""
    ids = warehouse.submit(products(4)).batch_ids
    sim.expire(ids[0])
    landed = warehouse.fetch(ids, include_failed=True)
    assert dict(landed.counts) == {"expired": 4}
    assert {r["status"] for r in warehouse.rows("SELECT status FROM answers")} == {"expired"}
    assert landed.tally.requests == 0


def test_archived_and_deleted_batches_say_what_is_left(warehouse: Warehouse, sim: Simulator) -> None:
    """What landed stays; what did not is gone, and the message says so."""
    one, two = warehouse.submit(products(4), max_requests=2).batch_ids
    for batch_id in (one, two):
        sim.end(batch_id)
    sim.archive(one)
    with pytest.raises(BatchUnavailableError, match=r"was archived at .* 29 days after creation"):
        warehouse.fetch([one])
    assert warehouse.fetch([two]).rows == 2
    warehouse.kit.delete(two)
    with pytest.raises(BatchUnavailableError, match="was deleted, or belongs to another workspace"):
        warehouse.fetch([two], "another_table")
    assert [r["response"] for r in warehouse.rows("SELECT response FROM answers ORDER BY id")] == [
        answer_for(f"About product {i}") for i in (2, 3)
    ]


def test_a_fetch_that_deleted_its_batches_can_be_cleared(warehouse: Warehouse, sim: Simulator) -> None:
    """What has landed and is gone from the API is recalled from the ledger: same counts, same bill, nothing written."""
    ids = warehouse.submit(products(4), max_requests=2).batch_ids
    for batch_id in ids:
        sim.end(batch_id)
    first = warehouse.fetch(ids)
    warehouse.kit.delete(ids[0])
    sim.archive(ids[1])
    again = warehouse.fetch(ids)
    assert (again.rows, again.counts, again.tally, again.latency_s) == (first.rows, first.counts, first.tally, first.latency_s)
    with pytest.raises(BatchUnavailableError):
        warehouse.fetch(ids, "another_table", sleep=lambda _: None)


def test_deleting_twice_is_no_error(warehouse: Warehouse, sim: Simulator) -> None:
    """A fetch that died between two deletions can run again."""
    (batch_id,) = warehouse.submit(products(1)).batch_ids
    sim.end(batch_id)
    warehouse.kit.delete(batch_id)
    warehouse.kit.delete(batch_id)
    assert sim.stats()["batches"] == []

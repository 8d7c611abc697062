"""A doubt is settled by proof alone: what runs is waited for, what has ended is read, and only what nobody can be is sent again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import anthropic
import pytest
import sqlalchemy as sa
import uuid6

from airflow_provider_batchkit import BatchSnapshot
from airflow_provider_batchkit.exceptions import (
    BatchUnavailableError,
    LeaseLostError,
    LedgerError,
    SubmitThrottledError,
    SubmitUncertainError,
)
from airflow_provider_batchkit.jobs import settle
from airflow_provider_batchkit.jobs.settle import Settler, SettleTimes, any_visible
from airflow_provider_batchkit.ledger import BatchState
from airflow_provider_batchkit.ledger.tables import batch
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings, answer_for
from tests.databases import Database
from tests.gateway import Gateway
from tests.warehouse import Warehouse, kit_for

SETTLE = 0.8


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator(SimulatorSettings(clock="manual")) as simulator:
        yield simulator


@pytest.fixture
def warehouse(database: Database, sim: Simulator) -> Warehouse:
    """A warehouse whose connection has submitted a batch before: the witness that void needs."""
    warehouse = Warehouse(database.engine(), kit_for(sim.base_url, timeout=5))
    warehouse.submit(products(1), run_id="before", prompt="Before {{ row.name }}")
    return warehouse


def products(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}"} for i in range(count)]


def newest(sim: Simulator) -> str:
    return str(sim.stats()["batches"][-1]["id"])


def die_after_the_post(warehouse: Warehouse, sim: Simulator, map_index: int = -1, *, prompt: str = "About {{ row.name }}") -> str:
    """A worker that dies right after the API has accepted its batch of three: the row stays ``sending``. Gives the batch's id."""
    real = warehouse.ledger.submitted

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    warehouse.ledger.submitted = die  # type: ignore[method-assign,assignment]  # the moment of death
    try:
        with pytest.raises(KeyboardInterrupt):
            warehouse.submit(products(3), map_index=map_index, prompt=prompt)
    finally:
        warehouse.ledger.submitted = real  # type: ignore[method-assign]
    return newest(sim)


def die_in_doubt(warehouse: Warehouse) -> None:
    """A worker that dies when the POST of its three requests has ended unseen."""
    real = warehouse.ledger.doubt

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    warehouse.ledger.doubt = die  # type: ignore[method-assign,assignment]  # the moment of death
    try:
        warehouse.submit(products(3))
    finally:
        warehouse.ledger.doubt = real  # type: ignore[method-assign]


def states(warehouse: Warehouse, run_id: str = "run-1", map_index: int = -1) -> list[str]:
    return [b.state.value for b in warehouse.ledger.batches(warehouse.job(run_id, map_index=map_index).job_id)]


def answers(warehouse: Warehouse, table: str) -> list[str]:
    return [row["response"] for row in warehouse.rows(f"SELECT response FROM {table} ORDER BY id")]


# --- candidates -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retried", [(0, 1), (1, 0)])
@pytest.mark.parametrize("ended", [(0, 1), (1, 0)])
def test_two_tasks_of_one_run_killed_around_their_posts_get_each_its_own_batch(
    warehouse: Warehouse, sim: Simulator, retried: tuple[int, int], ended: tuple[int, int]
) -> None:
    """The same rows, the same size, the same moment, and the POSTs overtake each other: neither takes the other's batch while it runs,
    in whatever order they look and the batches end.
    """
    words = ("One", "Two")
    batches: dict[int, str] = {}
    send = warehouse.kit.send

    def second_posts_first(*args: Any, **options: Any) -> Any:
        warehouse.kit.send = send  # type: ignore[method-assign]
        batches[1] = die_after_the_post(warehouse, sim, 1, prompt="Two {{ row.name }}")
        return send(*args, **options)

    warehouse.kit.send = second_posts_first  # type: ignore[method-assign]  # between the first task's intent and its POST
    batches[0] = die_after_the_post(warehouse, sim, 0, prompt="One {{ row.name }}")
    assert batches[0] != batches[1]

    def submit(task: int) -> Any:
        return warehouse.submit(products(3), map_index=task, prompt=f"{words[task]} {{{{ row.name }}}}", settle_seconds=SETTLE)

    for task in retried:
        wait = submit(task).waits_for
        assert wait is not None
        assert set(wait.batch_ids) == set(batches.values())
        assert states(warehouse, map_index=task) == ["sending"]
    for task in ended:
        sim.end(batches[task])
        for other in retried:
            submit(other)
    for task in retried:
        report = submit(task)
        assert (report.waits_for, report.asked, report.batch_ids) == (None, 0, [batches[task]])
        warehouse.fetch(report.batch_ids, f"answers_{task}")
        assert answers(warehouse, f"answers_{task}") == [answer_for(f"{words[task]} product {i}") for i in range(3)]
    assert sim.stats()["batches_accepted"] == 3


def test_a_wait_says_for_what_and_until_when(warehouse: Warehouse, sim: Simulator) -> None:
    """The candidates by id, and the time at which the API has ended them at the latest."""
    batch_id = die_after_the_post(warehouse, sim)
    wait = warehouse.submit(products(3), settle_seconds=SETTLE).waits_for
    assert wait is not None
    assert wait.batch_ids == (batch_id,)
    expires = warehouse.kit.get(batch_id).expires_at
    assert expires is not None
    assert timedelta(0) <= wait.latest - expires <= timedelta(hours=1)
    assert batch_id in wait.why
    assert f"{wait.latest:%Y-%m-%d %H:%M}" in wait.why


def test_a_batch_that_a_row_has_proved_is_nobodys_candidate(warehouse: Warehouse, sim: Simulator) -> None:
    """Running batches of this ledger's other rows are not waited for."""
    warehouse.submit(products(3), run_id="other", prompt="Other {{ row.name }}")
    sim.faults.add("cut_before_accept")
    report = warehouse.submit(products(3), settle_seconds=SETTLE)
    assert states(warehouse) == ["void", "submitted"]
    assert len(report.batch_ids) == 1


@pytest.mark.parametrize("how", ["archived", "deleted", "ended and another's", "of another size", "too old", "too young"])
def test_a_batch_that_cannot_be_the_shards_is_not_waited_for(warehouse: Warehouse, sim: Simulator, how: str) -> None:
    """Nobody can ever read an archived or a deleted one; the window of candidates goes from the intent to the doubt, with clock skew."""
    size = 2 if how == "of another size" else 3
    skew = {"too old": -3600.0, "too young": 3600.0}.get(how, 0.0)
    sim.set(skew_seconds=skew)
    (foreign,) = warehouse.kit.submit([f"Foreign {i}" for i in range(size)], model="claude-haiku-5-5", max_tokens=5)
    sim.set(skew_seconds=0.0)
    if how in ("archived", "deleted", "ended and another's"):
        sim.end(foreign)
    if how == "archived":
        sim.archive(foreign)
    if how == "deleted":
        warehouse.kit.delete(foreign)
    sim.faults.add("cut_before_accept")
    report = warehouse.submit(products(3), settle_seconds=SETTLE)
    assert (report.waits_for, states(warehouse)) == (None, ["void", "submitted"])
    assert foreign not in report.batch_ids


def test_foreign_batches_that_come_later_do_not_keep_a_doubt_open(
    warehouse: Warehouse, sim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was created after the doubt, the POST's total time, late acceptance and the clocks' skew cannot be the shard's."""
    monkeypatch.setattr(settle, "PATIENCE_S", 0.0)
    sim.faults.add("cut_before_accept")
    wait = warehouse.submit(products(3), settle_seconds=200).waits_for
    assert wait is not None
    sim.set(skew_seconds=2_000)
    (foreign,) = warehouse.kit.submit([f"Foreign {i}" for i in range(3)], model="claude-haiku-5-5", max_tokens=5)
    sim.set(skew_seconds=0.0)
    times = SettleTimes(settle_s=0.1, absence_s=0.1)
    record = warehouse.ledger.batches(warehouse.job().job_id)[0]
    look = Settler(warehouse.kit, warehouse.ledger, times, lease=1).look([record])
    assert look is None or foreign not in look.batch_ids


@pytest.mark.parametrize("skew", [-90_000.0, -7_200.0, 7_200.0, 90_000.0])
def test_clocks_that_are_hours_apart_buy_nothing_twice(
    warehouse: Warehouse, sim: Simulator, skew: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch's time is by the API's clock, which its answers tell, and the intent is by the ledger's: the batch is found all the same."""
    sim.set(skew_seconds=skew)
    batch_id = die_after_the_post(warehouse, sim)
    wait = warehouse.submit(products(3), settle_seconds=SETTLE).waits_for
    assert wait is not None
    assert wait.batch_ids == (batch_id,)
    sim.end(batch_id)
    assert warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids == [batch_id]
    assert sim.stats()["batches_accepted"] == 2
    assert f"The API's clock is {'ahead' if skew > 0 else 'behind'} of the ledger's" in caplog.text


def test_an_ended_candidate_whose_results_cannot_be_read_now_is_waited_for(warehouse: Warehouse, sim: Simulator) -> None:
    """A 404 for the results, an empty stream and a broken first line prove nothing, in either direction."""
    batch_id = die_after_the_post(warehouse, sim)
    sim.end(batch_id)
    faults: list[dict[str, Any]] = [
        {"kind": "status", "status": 404},
        {"kind": "cut_results", "line": 1, "clean": True},
        {"kind": "cut_results", "line": 1},
    ]
    for fault in faults:
        sim.faults.add(endpoint="results", **fault)
        lease = warehouse.ledger.open_job(warehouse.job(), str(uuid6.uuid7()))
        record = warehouse.ledger.batches(warehouse.job().job_id)[0]
        wait = Settler(warehouse.kit, warehouse.ledger, SettleTimes(0.0, 60.0), lease=lease).look([record])
        assert wait is not None
        assert "cannot be read now" in wait.why
        assert states(warehouse) == ["sending"]
    assert warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids == [batch_id]


def test_an_ended_candidate_that_stays_unreadable_is_named_and_left_to_a_person(warehouse: Warehouse, sim: Simulator) -> None:
    """After the waiting the task fails in a way that a retry may overcome, and says what a person can type."""
    batch_id = die_after_the_post(warehouse, sim)
    sim.end(batch_id)
    sim.faults.add("status", endpoint="results", status=404, times=None)
    time.sleep(0.3)
    with pytest.raises(SubmitUncertainError, match=rf"may be {batch_id}.*settle \w+ 0 --sql-conn-id CONN") as caught:
        warehouse.submit(products(3), settle_seconds=SETTLE)
    assert caught.value.retryable
    assert sim.stats()["batches_accepted"] == 2
    sim.faults.clear()
    assert warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids == [batch_id]


def test_two_shards_of_one_size_get_each_its_own_batch(warehouse: Warehouse, sim: Simulator) -> None:
    """The job's id in a first line is no proof: the line must be a request of the row's own journal."""
    sim.set(clock="instant")
    first, second = warehouse.submit(products(6), max_requests=3).batch_ids
    warehouse.execute(
        f"UPDATE batchkit_batch SET state = 'sending', batch_id = NULL, created_at = NULL WHERE batch_id IN ('{first}', '{second}')"
    )
    # the list shows the younger one first
    assert warehouse.submit(products(6), max_requests=3, settle_seconds=SETTLE).batch_ids == [first, second]
    warehouse.fetch([first, second])
    assert answers(warehouse, "answers") == [answer_for(f"About product {i}") for i in range(6)]
    assert sim.stats()["batches_accepted"] == 3


# --- void -------------------------------------------------------------------------------------------------------------------------


def test_the_deadline_counts_from_the_doubt_and_not_from_the_intent(warehouse: Warehouse, sim: Simulator) -> None:
    """A row that was written an hour ago, whose sender is found dead now, may have been sent a moment ago."""
    sim.faults.add("cut_before_accept")
    job = warehouse.job()
    with pytest.raises(KeyboardInterrupt):
        _dies_while_it_settles(warehouse)
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    with warehouse.engine.begin() as connection:
        connection.execute(sa.update(batch).where(batch.c.job_id == job.job_id).values(intended_at=hour_ago, doubt_at=None))
    lease = warehouse.ledger.open_job(job, str(uuid6.uuid7()))
    (record,) = warehouse.ledger.batches(job.job_id)
    assert record.doubt_at is not None
    assert record.doubt_at - record.intended_at >= timedelta(hours=1)
    settler = Settler(warehouse.kit, warehouse.ledger, SettleTimes(60.0, 0.0), lease=lease)
    for _ in range(3):
        assert settler.look([record]) is not None
    assert states(warehouse) == ["sending"]


def _dies_while_it_settles(warehouse: Warehouse) -> None:
    def die(*_: Any) -> Iterator[BatchSnapshot]:
        raise KeyboardInterrupt

    recent, warehouse.kit.recent = warehouse.kit.recent, die  # type: ignore[method-assign,assignment]  # the moment of death
    try:
        warehouse.submit(products(3))
    finally:
        warehouse.kit.recent = recent  # type: ignore[method-assign]


def test_the_doubt_keeps_its_time_over_attempts(warehouse: Warehouse, sim: Simulator) -> None:
    """Whoever opens the job later does not begin it anew, or a doubt would never end while attempts come and go."""
    batch_id = die_after_the_post(warehouse, sim)
    job = warehouse.job()
    times = set()
    for _ in range(3):
        warehouse.ledger.open_job(job, str(uuid6.uuid7()))
        times.add(warehouse.ledger.batches(job.job_id)[0].doubt_at)
    assert len(times) == 1
    assert warehouse.kit.get(batch_id).processing_status == "in_progress"


@pytest.mark.parametrize("settle_s", [0.1, 3.0, 900.0, 86_400.0])
def test_settle_seconds_are_more_than_a_post_and_late_acceptance_take(settle_s: float) -> None:
    """What is left is for slow visibility."""
    times = SettleTimes(settle_s)
    assert times.post_s < times.window_s < settle_s


def test_only_a_look_that_began_after_the_deadline_can_show_that_nothing_was_accepted(warehouse: Warehouse, sim: Simulator) -> None:
    """The list takes longer than the rest of settle_seconds, and answers with what was there when it was asked: bought once."""
    shown = threading.Event()
    recent = warehouse.kit.recent

    def slow(since: datetime, clock: Any = None) -> Iterator[BatchSnapshot]:
        found = [] if not shown.is_set() else list(recent(since, clock))
        if not shown.is_set():
            time.sleep(2 * SETTLE)
            shown.set()
        return iter(found)

    warehouse.kit.recent = slow  # type: ignore[method-assign]  # a list that lags behind
    sim.faults.add("cut_after_accept")
    report = warehouse.submit(products(3), settle_seconds=SETTLE)
    assert report.waits_for is not None
    sim.end(newest(sim))
    assert len(warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids) == 1
    assert sim.stats()["batches_accepted"] == 2


def test_a_batch_that_is_missing_from_the_list_for_a_moment_is_not_bought_again(warehouse: Warehouse, sim: Simulator) -> None:
    """One empty look after the deadline proves nothing: the series of empty looks must be longer than a batch may be missing."""
    recent, looks = warehouse.kit.recent, 0

    def flickering(since: datetime, clock: Any = None) -> Iterator[BatchSnapshot]:
        nonlocal looks
        looks += 1
        return iter(()) if looks < 2 else recent(since, clock)

    batch_id = die_after_the_post(warehouse, sim)
    warehouse.kit.recent = flickering  # type: ignore[method-assign]  # a list that misses a batch once
    attempt = warehouse.attempt()
    times = SettleTimes(0.0, 0.5)
    lease = warehouse.ledger.open_job(warehouse.job(), attempt.attempt_id)
    settler = Settler(warehouse.kit, warehouse.ledger, times, lease=lease)
    time.sleep(0.05)
    wait = settler.settle(warehouse.job().job_id)
    assert wait is not None
    assert wait.batch_ids == (batch_id,)
    (record,) = warehouse.ledger.batches(warehouse.job().job_id)
    # the series is broken: the next empty look begins another one
    assert record.unseen_since is None


def test_the_wait_for_a_void_is_kept_in_the_ledger(warehouse: Warehouse, sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first empty look is noted, so that the next leg, or the next attempt, goes on from there."""
    monkeypatch.setattr(settle, "PATIENCE_S", 0.0)
    sim.faults.add("cut_before_accept")
    job = warehouse.job()
    wait = warehouse.submit(products(3), settle_seconds=100).waits_for
    assert wait is not None
    assert (wait.batch_ids, wait.about) == ((), "doubt")
    lease = warehouse.ledger.open_job(job, str(uuid6.uuid7()))
    (record,) = warehouse.ledger.batches(job.job_id)
    settler = Settler(warehouse.kit, warehouse.ledger, SettleTimes(0.0, 0.3), lease=lease)
    assert settler.look([record]) is not None
    (record,) = warehouse.ledger.batches(job.job_id)
    assert record.unseen_since is not None
    time.sleep(0.35)
    # another process
    again = Settler(warehouse.kit, warehouse.ledger, SettleTimes(0.0, 0.3), lease=lease)
    assert again.look([record]) is None
    assert states(warehouse) == ["void"]


def test_a_younger_attempt_begins_the_series_of_looks_anew(warehouse: Warehouse, sim: Simulator) -> None:
    """Nobody looked while no attempt lived: the batch may have shown meanwhile."""
    batch_id = die_after_the_post(warehouse, sim)
    job, times = warehouse.job(), SettleTimes(0.0, 0.3)
    recent = warehouse.kit.recent
    for _ in range(2):
        lease = warehouse.ledger.open_job(job, str(uuid6.uuid7()))
        (record,) = warehouse.ledger.batches(job.job_id)
        assert record.unseen_since is None
        warehouse.kit.recent = lambda *_: iter(())  # type: ignore[method-assign]  # the list misses it, each time for a moment
        time.sleep(0.4)
        assert Settler(warehouse.kit, warehouse.ledger, times, lease=lease).look([record]) is not None
        warehouse.kit.recent = recent  # type: ignore[method-assign]
    assert states(warehouse) == ["sending"]
    assert warehouse.submit(products(3), settle_seconds=SETTLE).waits_for.batch_ids == (batch_id,)  # type: ignore[union-attr]


def test_a_look_that_comes_too_late_begins_another_series(warehouse: Warehouse, sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The triggerer was down for hours between two looks."""
    monkeypatch.setattr(settle, "_LOOK_OVERDUE", timedelta(seconds=0.1))
    sim.faults.add("cut_before_accept")
    monkeypatch.setattr(settle, "PATIENCE_S", 0.0)
    warehouse.submit(products(3), settle_seconds=100)
    job, times = warehouse.job(), SettleTimes(0.0, 0.2)
    lease = warehouse.ledger.open_job(job, str(uuid6.uuid7()))
    for _ in range(3):
        (record,) = warehouse.ledger.batches(job.job_id)
        assert Settler(warehouse.kit, warehouse.ledger, times, lease=lease).look([record]) is not None
        time.sleep(0.5)
    assert states(warehouse) == ["sending"]


def test_what_a_stopped_attempt_saw_does_not_count_any_more(warehouse: Warehouse, sim: Simulator) -> None:
    """It has listed, and is stopped before it writes; the living attempt ends the series meanwhile. The old time is not written."""
    die_after_the_post(warehouse, sim)
    job = warehouse.job()
    old = warehouse.ledger.open_job(job, str(uuid6.uuid7()))
    (stale,) = warehouse.ledger.batches(job.job_id)
    lease = warehouse.ledger.open_job(job, str(uuid6.uuid7()))
    now = warehouse.ledger.now()
    with pytest.raises(LeaseLostError):
        warehouse.ledger.note_unseen(stale, now, now, lease=old)
    # also where it holds the lease: whoever has looked in between knows better
    (record,) = warehouse.ledger.batches(job.job_id)
    warehouse.ledger.note_unseen(record, now, now, lease=lease)
    (newer,) = warehouse.ledger.batches(job.job_id)
    warehouse.ledger.note_unseen(newer, None, lease=lease)
    assert warehouse.ledger.void(newer, "it was seen meanwhile", lease) is False
    assert states(warehouse) == ["sending"]


@pytest.mark.parametrize("fault", [{"status": 529}, {"status": 500}, {"status": 429}])
def test_a_proof_that_the_api_does_not_answer_is_waited_for(warehouse: Warehouse, sim: Simulator, fault: dict[str, Any]) -> None:
    """An overloaded API proves nothing, and fails nothing."""
    batch_id = die_after_the_post(warehouse, sim)
    sim.end(batch_id)
    sim.faults.add("status", endpoint="results", **fault)
    assert warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids == [batch_id]


def test_a_candidate_that_should_have_ended_long_ago_is_named(warehouse: Warehouse, sim: Simulator) -> None:
    """The API ends every batch within a day: one that runs on is left to a person, and no task loops over it."""
    batch_id = die_after_the_post(warehouse, sim)
    real = warehouse.kit.recent

    def old(since: datetime, clock: Any = None) -> Iterator[BatchSnapshot]:
        for found in real(since, clock):
            yield replace(found, expires_at=datetime.now(UTC) - timedelta(hours=2))

    warehouse.kit.recent = old  # type: ignore[method-assign]
    with pytest.raises(SubmitUncertainError, match=rf"{batch_id}, which still runs .*settle \w+ 0"):
        warehouse.submit(products(3), settle_seconds=SETTLE)


def test_a_stray_line_before_the_jobs_own_does_not_rule_its_batch_out(warehouse: Warehouse, sim: Simulator) -> None:
    """A few lines are read before a batch is called another's."""
    batch_id = die_after_the_post(warehouse, sim)
    sim.end(batch_id)
    sim.faults.add("foreign_line", line=1)
    assert warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids == [batch_id]


def test_a_shard_that_comes_to_nothing_in_every_leg_ends_the_attempt(
    warehouse: Warehouse, sim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each doubt is settled in a later leg of the same attempt: after five of them it fails, and does not go on for ever."""
    sim.faults.add("cut_before_accept", times=None)
    monkeypatch.setattr(settle, "PATIENCE_S", 0.0)
    attempt = warehouse.attempt()

    def legs() -> None:
        for _ in range(400):
            assert warehouse.submit(products(2), attempt=attempt, settle_seconds=SETTLE).waits_for is not None
            time.sleep(0.06)

    with pytest.raises(SubmitUncertainError, match="5 POSTs of this attempt"):
        legs()
    assert states(warehouse) == ["void"] * 5


def test_nothing_is_void_without_a_witness(database: Database, sim: Simulator) -> None:
    """A connection that has never submitted anything may have a key of another workspace. A person can decide it."""
    warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
    sim.faults.add("cut_before_accept")
    with pytest.raises(SubmitUncertainError, match=r"has submitted no batch before.* settle \w+ 0 .*--void") as caught:
        warehouse.submit(products(3), settle_seconds=SETTLE)
    assert caught.value.retryable
    assert (states(warehouse), sim.stats()["posts"]) == (["sending"], 1)
    # what the connection submits later proves nothing: its key may have been changed in between
    warehouse.submit(products(1), run_id="later")
    with pytest.raises(SubmitUncertainError, match="has submitted no batch before"):
        warehouse.submit(products(3), settle_seconds=SETTLE)
    assert sim.stats()["batches_accepted"] == 1


def test_a_witness_of_another_workspace_proves_nothing(database: Database) -> None:
    """Accepted with one key; then the connection gets a key of another workspace, and submits there: the row is not void."""
    with Simulator(SimulatorSettings(clock="manual", keys={"key-a": "a", "key-b": "b"})) as sim:
        warehouse = Warehouse(database.engine(), kit_for(sim.base_url, api_key="key-a"))
        warehouse.submit(products(1), run_id="before")
        die_after_the_post(warehouse, sim)
        warehouse.kit = kit_for(sim.base_url, api_key="key-b")
        warehouse.submit(products(1), run_id="tuesday")
        with pytest.raises(SubmitUncertainError, match="sent it with a key of the workspace a, and has one of b now"):
            warehouse.submit(products(3), settle_seconds=SETTLE)
        assert sim.stats()["batches_accepted"] == 3


def test_a_key_that_is_changed_and_changed_back_makes_nothing_void(database: Database) -> None:
    """The connection had another workspace's key for one task, which died behind its POST: batches of its first workspace prove nothing."""
    with Simulator(SimulatorSettings(clock="manual", keys={"key-a": "a", "key-b": "b"})) as sim:
        warehouse = Warehouse(database.engine(), kit_for(sim.base_url, api_key="key-a"))
        warehouse.submit(products(1), run_id="before")
        warehouse.kit = kit_for(sim.base_url, api_key="key-b")
        sent = die_after_the_post(warehouse, sim)
        warehouse.kit = kit_for(sim.base_url, api_key="key-a")
        for _ in range(2):
            with pytest.raises(SubmitUncertainError, match="sent it with a key of the workspace b, and has one of a now"):
                warehouse.submit(products(3), settle_seconds=SETTLE)
        assert (states(warehouse), sim.stats()["batches_accepted"]) == (["sending"], 2)
        # with the key that it was sent with it is found
        sim.end(sent)
        warehouse.kit = kit_for(sim.base_url, api_key="key-b")
        assert warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids == [sent]


def test_a_batch_of_another_keys_workspace_is_not_gone(database: Database) -> None:
    """The same at the fetch: it answers 404 for long, beside visible batches of the connection's first workspace."""
    with Simulator(SimulatorSettings(keys={"key-a": "a", "key-b": "b"})) as sim:
        warehouse = Warehouse(database.engine(), kit_for(sim.base_url, api_key="key-a"))
        warehouse.submit(products(1), run_id="before")
        warehouse.kit = kit_for(sim.base_url, api_key="key-b")
        sent = warehouse.submit(products(3)).batch_ids
        warehouse.kit = kit_for(sim.base_url, api_key="key-a")
        with pytest.raises(BatchUnavailableError, match="None of the connection's earlier batches") as caught:
            warehouse.fetch(sent, settle_seconds=SETTLE)
        assert (states(warehouse), caught.value.retryable) == (["submitted"], True)
        warehouse.kit = kit_for(sim.base_url, api_key="key-b")
        assert warehouse.fetch(sent).rows == 3


@pytest.mark.parametrize("names", [True, False], ids=["the API names the workspace", "a gateway drops the name"])
def test_a_new_key_of_the_same_workspace_settles(database: Database, names: bool) -> None:
    """A key is renewed between the POST, which the API never accepted, and the retry."""
    with Simulator(SimulatorSettings(keys={"key-1": "a", "key-2": "a"})) as sim:
        kits = [kit_for(sim.base_url, api_key=key) for key in ("key-1", "key-2")]
        for kit in kits if not names else ():
            kit.note_workspace = lambda _: None  # type: ignore[method-assign,assignment]  # the header is not there
        warehouse = Warehouse(database.engine(), kits[0])
        warehouse.submit(products(1), run_id="before")
        sim.faults.add("cut_before_accept")
        with pytest.raises(KeyboardInterrupt):
            die_in_doubt(warehouse)
        warehouse.kit = kits[1]
        assert len(warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids) == 1
        assert states(warehouse) == ["void", "submitted"]


def test_a_deleted_witness_is_none_and_the_next_one_counts(warehouse: Warehouse, sim: Simulator) -> None:
    """A batch that was deleted before it landed does not keep the connection from settling for ever."""
    deleted = warehouse.submit(products(2), run_id="deleted").batch_ids[0]
    sim.end(deleted)
    warehouse.kit.delete(deleted)
    sim.faults.add("cut_before_accept")
    warehouse.submit(products(3), settle_seconds=SETTLE)
    assert states(warehouse) == ["void", "submitted"]


# --- attempts ---------------------------------------------------------------------------------------------------------------------


def test_an_older_attempt_that_thaws_late_is_refused_and_the_newer_one_goes_on(warehouse: Warehouse, sim: Simulator) -> None:
    """Attempt 1 is stopped before it opens the job, attempt 2 sends, attempt 1 thaws: it changes nothing."""
    older, newer = warehouse.attempt(), warehouse.attempt()
    report = warehouse.submit(products(3), attempt=newer)
    with pytest.raises(LeaseLostError, match="older than") as caught:
        warehouse.submit(products(3), attempt=older)
    assert caught.value.retryable
    assert warehouse.submit(products(3), attempt=newer).batch_ids == report.batch_ids
    assert (states(warehouse), sim.stats()["batches_accepted"]) == (["submitted"], 2)


@pytest.mark.parametrize("moment", ["between its shards", "between its POST and its note"])
def test_an_older_attempt_that_thaws_inside_the_newer_one_is_refused_and_disturbs_nothing(
    warehouse: Warehouse, sim: Simulator, moment: str
) -> None:
    """It neither takes the lease nor settles what the living attempt is sending."""
    older, newer = warehouse.attempt(), warehouse.attempt()
    refused = []
    method = "next_shard" if moment == "between its shards" else "submitted"
    real, calls = getattr(warehouse.ledger, method), 0

    def thaw_then(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (3 if method == "next_shard" else 1):
            with pytest.raises(LeaseLostError, match="older than"):
                warehouse.submit(products(6), max_requests=3, attempt=older, settle_seconds=SETTLE)
            refused.append(older)
        return real(*args)

    setattr(warehouse.ledger, method, thaw_then)
    report = warehouse.submit(products(6), max_requests=3, attempt=newer, settle_seconds=SETTLE)
    assert (len(refused), len(report.batch_ids), report.waits_for) == (1, 2, None)
    assert (states(warehouse), sim.stats()["batches_accepted"]) == (["submitted"] * 2, 3)


def test_an_older_attempt_that_thaws_while_the_newer_one_settles_takes_nothing(warehouse: Warehouse, sim: Simulator) -> None:
    """The zombie's answer arrives after the newer attempt has begun: its id is noted, whoever holds the lease, and nobody fails."""
    older, newer = warehouse.attempt(), warehouse.attempt()
    real = warehouse.ledger.submitted
    reports = []

    def noted_after_the_newer_attempt(*args: Any) -> None:
        warehouse.ledger.submitted = real  # type: ignore[method-assign]
        reports.append(warehouse.submit(products(3), attempt=newer, settle_seconds=SETTLE))
        real(*args)

    warehouse.ledger.submitted = noted_after_the_newer_attempt  # type: ignore[method-assign,assignment]  # the sender is stopped right after its POST
    with pytest.raises(LeaseLostError):
        warehouse.submit(products(3), attempt=older, settle_seconds=SETTLE)
    assert reports[0].waits_for is not None
    assert warehouse.submit(products(3), attempt=newer, settle_seconds=SETTLE).batch_ids == [newest(sim)]
    assert sim.stats()["batches_accepted"] == 2


def test_the_same_id_twice_is_no_error(warehouse: Warehouse, sim: Simulator) -> None:
    """The sender's answer and the retry's proof meet in one row."""
    batch_id = die_after_the_post(warehouse, sim)
    found = warehouse.kit.get(batch_id)
    job_id = warehouse.job().job_id
    for _ in range(2):
        warehouse.ledger.submitted(job_id, 0, found)
    sim.end(batch_id)
    warehouse.fetch([batch_id])
    warehouse.ledger.submitted(job_id, 0, found)
    assert warehouse.ledger.get(job_id, 0).state is BatchState.LANDED


def test_a_batch_belongs_to_one_row(warehouse: Warehouse, sim: Simulator) -> None:
    """Two rows cannot have one batch, and the error names both."""
    batch_id = die_after_the_post(warehouse, sim)
    die_after_the_post(warehouse, sim, 7)
    found = warehouse.kit.get(batch_id)
    warehouse.ledger.submitted(warehouse.job().job_id, 0, found)
    with pytest.raises(LedgerError, match=rf"{batch_id} is already shard 0 of job"):
        warehouse.ledger.submitted(warehouse.job(map_index=7).job_id, 0, found)


def test_a_run_that_is_deleted_and_made_anew_begins_with_the_youngest_attempt(warehouse: Warehouse) -> None:
    """Its try numbers begin again; ids of attempts do not."""
    first = warehouse.submit(products(3), attempt=warehouse.attempt())
    again = warehouse.submit(products(3), attempt=warehouse.attempt())
    assert (again.batch_ids, again.asked) == (first.batch_ids, 0)


def test_a_move_that_somebody_else_has_made_is_no_error(warehouse: Warehouse, sim: Simulator) -> None:
    """One looks at a row while another proves and lands it: void finds it settled."""
    batch_id = die_after_the_post(warehouse, sim)
    job = warehouse.job()
    lease = warehouse.ledger.open_job(job, str(uuid6.uuid7()))
    (record,) = warehouse.ledger.batches(job.job_id)
    warehouse.ledger.submitted(job.job_id, 0, warehouse.kit.get(batch_id))
    sim.end(batch_id)
    warehouse.fetch([batch_id])
    assert warehouse.ledger.void(record, "too late", lease) is False
    assert states(warehouse) == ["landed"]


@pytest.mark.parametrize("moment", ["between two shards", "during the upload"])
def test_a_killed_submit_sends_nothing_more(warehouse: Warehouse, sim: Simulator, moment: str) -> None:
    """Its handler has canceled what was sent; Airflow lets the task go on until it is killed for good. Nothing is left in doubt."""
    looks = 0

    def stopped() -> bool:
        nonlocal looks
        looks += 1
        return looks > (2 if moment == "between two shards" else 1)

    killed = warehouse.attempt(stopped=stopped)
    with pytest.raises(LeaseLostError, match="was killed"):
        warehouse.submit(products(6), max_requests=2, attempt=killed)
    assert states(warehouse) == (["submitted"] if moment == "between two shards" else ["rejected"])
    assert len(warehouse.submit(products(6), max_requests=2, settle_seconds=SETTLE).batch_ids) == 3
    assert sim.stats()["requests_accepted"] == 7


def test_an_attempt_gives_up_after_five_posts_that_came_to_nothing(warehouse: Warehouse, sim: Simulator) -> None:
    """A network that never takes the body is not tried for ever."""
    sim.faults.add("cut_before_accept", times=None)
    with pytest.raises(SubmitUncertainError):
        warehouse.submit(products(2), settle_seconds=SETTLE)
    assert states(warehouse) == ["void"] * 5


# --- the POST ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_post_whose_sender_was_stopped_does_not_complete(warehouse: Warehouse, sim: Simulator, moment: str) -> None:
    """The last bytes leave only after a look at lease and clock: a sender that slept through its time breaks off."""
    check = warehouse.ledger.check_lease

    def stopped_around(job_id: str, lease: int) -> None:
        if moment == "before":
            time.sleep(SETTLE)
        check(job_id, lease)
        if moment == "after":
            time.sleep(SETTLE)

    warehouse.ledger.check_lease = stopped_around  # type: ignore[method-assign]  # between the body and its last bytes
    with pytest.raises(SubmitThrottledError, match=r"broken off.*Nothing of its shard was accepted"):
        warehouse.submit(products(3), settle_seconds=SETTLE)
    warehouse.ledger.check_lease = check  # type: ignore[method-assign]
    time.sleep(0.2)
    assert (states(warehouse), sim.stats()["batches_accepted"]) == (["rejected"], 1)
    assert len(warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids) == 1


def test_a_post_has_a_total_time(warehouse: Warehouse, sim: Simulator) -> None:
    """An answer that comes later than that is not waited for; the batch is found."""
    sim.faults.add("late", seconds=3.0)
    started = time.monotonic()
    report = warehouse.submit(products(3), settle_seconds=2.0)
    assert time.monotonic() - started < 3.0
    assert report.waits_for is not None
    sim.end(newest(sim))
    assert len(warehouse.submit(products(3), settle_seconds=2.0).batch_ids) == 1
    assert sim.stats()["batches_accepted"] == 2


def test_a_long_wait_of_a_throttled_post_is_not_slept(warehouse: Warehouse, sim: Simulator) -> None:
    """More than a minute is waited for without a worker slot; the pauses of workers that were refused together differ."""
    sim.faults.add("status", status=429, retry_after=600, times=5)
    untils = []
    for number in range(5):
        report = warehouse.submit(products(3), run_id=f"worker-{number}")
        assert report.waits_for is not None
        assert (report.waits_for.about, report.waits_for.batch_ids) == ("throttle", ())
        untils.append((report.waits_for.until - datetime.now(UTC)).total_seconds())
        assert states(warehouse, f"worker-{number}") == ["rejected"]
    assert all(599 <= seconds <= 751 for seconds in untils)
    assert max(untils) - min(untils) > 1
    assert len(warehouse.submit(products(3), run_id="worker-0").batch_ids) == 1


def test_an_api_that_says_not_now_for_a_day_fails_the_attempt(warehouse: Warehouse, sim: Simulator) -> None:
    """A retry may overcome it; nothing was accepted."""
    sim.faults.add("status", status=429, retry_after=600)
    yesterday = warehouse.attempt(since=datetime.now(UTC) - timedelta(hours=24))
    with pytest.raises(SubmitThrottledError, match="Nothing of this shard was accepted") as caught:
        warehouse.submit(products(3), attempt=yesterday)
    assert caught.value.retryable


# --- job ids ----------------------------------------------------------------------------------------------------------------------


def test_two_deployments_that_run_the_same_dag_in_one_workspace_have_different_jobs(sqlite: Database, postgres: Database) -> None:
    """Their custom_ids differ, so that neither can take the other's batch for its own."""
    jobs = [Warehouse(database.engine(), kit_for("http://127.0.0.1:9")).job() for database in (sqlite, postgres)]
    assert jobs[0].job_id != jobs[1].job_id


def test_a_ledger_that_was_moved_keeps_its_jobs(warehouse: Warehouse) -> None:
    """A job is found by its task instance; only a new one gets an id of the ledger."""
    before = warehouse.submit(products(3))
    warehouse.execute("UPDATE batchkit_version SET ledger_id = 'moved'")
    after = warehouse.submit(products(3))
    assert (after.batch_ids, after.asked) == (before.batch_ids, 0)


# --- what is on the way to the API ------------------------------------------------------------------------------------------------


def test_a_gateway_that_repeats_a_post_has_its_second_batch_named(
    warehouse: Warehouse, sim: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """One of the two is the row's, and nothing is sent again; the other is billed, and the log says so."""
    real = warehouse.kit
    sim.set(clock="instant")
    posts: list[str] = []

    def change(method: str, path: str, status: int, body: bytes) -> bytes:
        if (method, path) != ("POST", "/v1/messages/batches"):
            return body
        posts.append(path)
        return b"<html>gateway</html>"

    with Gateway(sim.base_url, change=change, repeat_posts=2) as gateway:
        warehouse.kit = kit_for(gateway.base_url)
        report = warehouse.submit(products(3), settle_seconds=SETTLE)
    warehouse.kit = real
    own, twin = report.batch_ids[0], next(b["id"] for b in sim.stats()["batches"][1:] if b["id"] not in report.batch_ids)
    assert (len(posts), sim.stats()["batches_accepted"]) == (1, 3)
    assert f"{twin} answers the same 3 requests as" in caplog.text and "Both are billed" in caplog.text
    assert f"Found {own}" in caplog.text
    assert warehouse.fetch([own]).rows == 3


def test_a_batch_of_unknown_size_is_not_ruled_out(warehouse: Warehouse, sim: Simulator) -> None:
    """A list that leaves its counts out may hold the row's batch: its results tell."""
    batch_id = die_after_the_post(warehouse, sim)
    sim.end(batch_id)

    def change(method: str, path: str, status: int, body: bytes) -> bytes:
        if "limit=" not in path:
            return body
        page = json.loads(body)
        return json.dumps({**page, "data": [{**one, "request_counts": None} for one in page["data"]]}).encode()

    with Gateway(sim.base_url, change=change) as gateway:
        real, warehouse.kit = warehouse.kit, kit_for(gateway.base_url)
        assert warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids == [batch_id]
        warehouse.kit = real


def test_a_refused_key_is_not_a_key_of_another_workspace(warehouse: Warehouse, sim: Simulator) -> None:
    """Witnesses that answer 401 or a page say nothing about the workspace."""
    known = [b["id"] for b in sim.stats()["batches"]]
    faults: list[tuple[str, dict[str, Any]]] = [("status", {"status": 401}), ("status", {"status": 500}), ("html", {})]
    for kind, fields in faults:
        sim.faults.clear()
        sim.faults.add(kind, endpoint="retrieve", times=None, **fields)
        with pytest.raises((BatchUnavailableError, anthropic.APIError)):
            any_visible(warehouse.kit, known)
    sim.faults.clear()
    sim.faults.add("vanish", times=None)
    assert not any_visible(warehouse.kit, known)
    sim.faults.clear()
    assert any_visible(warehouse.kit, ["msgbatch_x", *known])

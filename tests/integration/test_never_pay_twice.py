"""Whatever breaks between us and the API: every row is asked once, and every answer lands."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import (
    BatchUnavailableError,
    LeaseLostError,
    LedgerError,
    SubmitRefusedError,
    SubmitThrottledError,
    SubmitUncertainError,
)
from airflow_provider_batchkit.ledger import BatchState, JobRecord, make_job_id
from airflow_provider_batchkit.reconcile import Settler
from airflow_provider_batchkit.simulator import Simulator, SimulatorProcess, SimulatorSettings, answer_for
from tests.databases import Database
from tests.warehouse import Warehouse, kit_for

SETTLE = 0.4


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator(SimulatorSettings()) as simulator:
        yield simulator


@pytest.fixture
def warehouse(database: Database, sim: Simulator) -> Warehouse:
    return Warehouse(database.engine(), kit_for(sim.base_url, timeout=5))


def products(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}"} for i in range(start, start + count)]


def states(warehouse: Warehouse) -> list[str]:
    return [r["state"] for r in warehouse.rows("SELECT state FROM batchkit_batch ORDER BY job_id, shard")]


def assert_paid_once(warehouse: Warehouse, sim: Simulator, count: int) -> None:
    """Every row asked once, landed once, with its own answer."""
    assert sim.stats()["requests_accepted"] == count
    rows = warehouse.rows("SELECT id, response FROM answers ORDER BY id")
    assert [(r["id"], r["response"]) for r in rows] == [(i, answer_for(f"About product {i}")) for i in range(count)]


# --- the POST whose end nobody saw ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [1, 2, 5])
@pytest.mark.parametrize("clock", ["instant", "manual"])
def test_a_connection_cut_after_acceptance_makes_one_batch_per_shard(warehouse: Warehouse, sim: Simulator, cuts: int, clock: str) -> None:
    """Five shards, the first POSTs cut after the API took them: each is found again, proved when ended, adopted when running."""
    sim.set(clock=clock)
    sim.faults.add("cut_after_accept", times=cuts)
    report = warehouse.submit(products(15), max_requests=3, settle_seconds=SETTLE)
    stats = sim.stats()
    assert (stats["posts"], stats["batches_accepted"]) == (5, 5)
    assert len(set(report.batch_ids)) == 5
    for batch_id in report.batch_ids:
        sim.end(batch_id)
    warehouse.fetch(report.batch_ids, settle_seconds=SETTLE)
    assert_paid_once(warehouse, sim, 15)


def test_a_connection_cut_before_acceptance_is_proved_void_and_sent_again(warehouse: Warehouse, sim: Simulator) -> None:
    """Nothing shows up for settle_seconds: the shard was never accepted, and goes out again in the same attempt."""
    sim.faults.add("cut_before_accept", times=2)
    report = warehouse.submit(products(3), settle_seconds=SETTLE)
    assert sim.stats()["posts"] == 3
    assert states(warehouse) == ["void", "void", "submitted"]
    warehouse.fetch(report.batch_ids)
    assert_paid_once(warehouse, sim, 3)


def test_a_network_that_never_takes_the_body_ends_the_attempt_with_nothing_billed(warehouse: Warehouse, sim: Simulator) -> None:
    """After five proved failures the attempt gives up; the next one finds all rows free."""
    sim.faults.add("cut_before_accept", times=5)
    with pytest.raises(SubmitUncertainError):
        warehouse.submit(products(2), settle_seconds=0.1)
    report = warehouse.submit(products(2), settle_seconds=0.1)
    warehouse.fetch(report.batch_ids)
    assert_paid_once(warehouse, sim, 2)


@pytest.mark.parametrize("fault", [{"kind": "status_after_accept", "status": 500}, {"kind": "late", "seconds": 3.0}])
def test_a_server_error_or_a_late_answer_is_reconciled(database: Database, sim: Simulator, fault: dict[str, Any]) -> None:
    """A 500 and a time-out prove nothing: the batch is looked for, and found."""
    warehouse = Warehouse(database.engine(), kit_for(sim.base_url, timeout=1))
    sim.faults.add(**fault)
    report = warehouse.submit(products(4), settle_seconds=SETTLE)
    assert (sim.stats()["posts"], len(report.batch_ids)) == (1, 1)
    warehouse.fetch(report.batch_ids)
    assert_paid_once(warehouse, sim, 4)


@pytest.mark.parametrize("skew", [-600.0, 600.0])
def test_clocks_may_differ(warehouse: Warehouse, sim: Simulator, skew: float) -> None:
    """An API clock ten minutes off in either direction hides no batch."""
    sim.set(skew_seconds=skew)
    sim.faults.add("cut_after_accept")
    warehouse.submit(products(2), settle_seconds=SETTLE)
    assert sim.stats()["batches_accepted"] == 1


def test_a_batch_is_found_behind_a_page_of_others(warehouse: Warehouse, sim: Simulator) -> None:
    """As many pages as needed: the batch lies behind a thousand younger ones."""
    sim.faults.add("cut_after_accept")
    sent = warehouse.kit.send

    def send_and_bury(shard: Any, **options: Any) -> Any:
        try:
            return sent(shard, **options)
        finally:
            for i in range(1005):
                warehouse.kit.client.messages.batches.create(
                    requests=[
                        {
                            "custom_id": f"x{j}",
                            "params": {"model": "claude-haiku-5-5", "max_tokens": 5, "messages": [{"role": "user", "content": f"{i}"}]},
                        }
                        for j in range(1)
                    ]
                )

    warehouse.kit.send = send_and_bury  # type: ignore[method-assign]  # what happens between the POST and the look
    report = warehouse.submit(products(2), settle_seconds=SETTLE)
    assert len(report.batch_ids) == 1
    assert sim.stats()["batches_accepted"] == 1006


def test_others_batches_are_left_alone(warehouse: Warehouse, sim: Simulator) -> None:
    """Of those of the same size, claimed ones are left out, ended ones of somebody else are disproved; other sizes do not count."""
    claimed = warehouse.submit(products(3), run_id="run-0").batch_ids
    foreign = warehouse.kit.submit(["a", "b", "c"], model="claude-haiku-5-5", max_tokens=5)
    sim.faults.add("cut_before_accept")
    report = warehouse.submit(products(3), run_id="run-1", settle_seconds=SETTLE)
    assert not set(report.batch_ids) & {*claimed, *foreign}
    # of the two candidates only the unclaimed one was read, once
    assert sim.stats()["calls"]["results"] == 1
    assert sim.stats()["requests_accepted"] == 9
    assert warehouse.rows("SELECT state FROM batchkit_batch WHERE state = 'void'") == [{"state": "void"}]


def test_a_running_batch_of_another_size_is_not_adopted(warehouse: Warehouse, sim: Simulator) -> None:
    """What cannot be ours by its size is not guessed to be."""
    sim.set(clock="manual")
    foreign = warehouse.kit.submit(["a", "b"], model="claude-haiku-5-5", max_tokens=5)
    sim.faults.add("cut_before_accept")
    report = warehouse.submit(products(3), settle_seconds=SETTLE)
    assert not set(report.batch_ids) & set(foreign)
    assert sim.stats()["requests_accepted"] == 5


def test_proving_a_batch_reads_its_first_line_only(warehouse: Warehouse, sim: Simulator) -> None:
    """The rest of the results is not downloaded: a stream that breaks soon after still proves the batch."""
    report = warehouse.submit(products(400))
    sim.faults.add("cut_results", line=60)
    first = Settler(warehouse.kit, warehouse.ledger).first_custom_id(report.batch_ids[0])
    assert first is not None
    assert first.startswith(make_job_id("dag", "run-1", "submit"))


def _sending(warehouse: Warehouse, sim: Simulator, run_id: str, count: int, *, prompt: str) -> None:
    """A worker that dies right after the API accepted its batch: the row stays ``sending``."""
    real = warehouse.ledger.submitted

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    warehouse.ledger.submitted = die  # type: ignore[method-assign,assignment]  # the moment of death
    try:
        warehouse.submit(products(count), run_id=run_id, prompt=prompt)
    except KeyboardInterrupt:
        pass
    finally:
        warehouse.ledger.submitted = real  # type: ignore[method-assign]


def test_two_jobs_that_adopted_each_others_running_batch_are_sorted_out_at_landing(warehouse: Warehouse, sim: Simulator) -> None:
    """Same size, same moment, both workers dead: the adoption is a guess, the landing proves it, and nobody pays or loses."""
    sim.set(clock="manual")
    _sending(warehouse, sim, "run-1", 3, prompt="One {{ row.name }}")
    _sending(warehouse, sim, "run-2", 3, prompt="Two {{ row.name }}")
    first, second = (b["id"] for b in sorted(sim.stats()["batches"], key=lambda b: b["created_at"]))
    one, two = (make_job_id("dag", run, "submit") for run in ("run-1", "run-2"))
    # each takes the other's
    warehouse.ledger.adopt(one, 0, warehouse.kit.get(second))
    warehouse.ledger.adopt(two, 0, warehouse.kit.get(first))
    for batch_id in (first, second):
        sim.end(batch_id)
    warehouse.fetch([second], "answers_one", run_id="run-1", settle_seconds=SETTLE)
    warehouse.fetch([first], "answers_two", run_id="run-2", settle_seconds=SETTLE)
    for table, word in (("answers_one", "One"), ("answers_two", "Two")):
        rows = warehouse.rows(f"SELECT id, response FROM {table} ORDER BY id")
        assert [r["response"] for r in rows] == [answer_for(f"{word} product {i}") for i in range(3)]
    assert sim.stats()["requests_accepted"] == 6
    # submit again for both: nothing is sent
    assert warehouse.submit(products(3), run_id="run-1", prompt="One {{ row.name }}").batch_ids == [first]
    assert warehouse.submit(products(3), run_id="run-2", prompt="Two {{ row.name }}").batch_ids == [second]
    assert sim.stats()["requests_accepted"] == 6


def test_an_adopted_batch_of_a_job_that_still_looks_for_it_is_handed_over(warehouse: Warehouse, sim: Simulator) -> None:
    """The owner's row is still ``sending``: it gets its batch; the wrong adopter's rows prove never accepted and are sent anew."""
    sim.set(clock="manual")
    _sending(warehouse, sim, "run-1", 3, prompt="One {{ row.name }}")
    (batch,) = sim.stats()["batches"]
    sim.faults.add("cut_before_accept")
    report = warehouse.submit(products(3), run_id="run-2", settle_seconds=SETTLE)
    assert report.batch_ids == [batch["id"]]  # adopted by guess
    sim.end(batch["id"])
    with pytest.raises(BatchUnavailableError, match="Clear the submit task"):
        warehouse.fetch(report.batch_ids, run_id="run-2", settle_seconds=SETTLE)
    owner = warehouse.ledger.find(batch["id"])
    assert owner is not None
    assert owner.job_id == make_job_id("dag", "run-1", "submit")
    sim.set(clock="instant")
    again = warehouse.submit(products(3), run_id="run-2", settle_seconds=SETTLE)
    warehouse.fetch(again.batch_ids, run_id="run-2")
    assert warehouse.fetch([batch["id"]], "answers_one", run_id="run-1").rows == 3
    assert sim.stats()["requests_accepted"] == 6


def test_a_sender_that_is_alive_after_all_keeps_its_batch(warehouse: Warehouse, sim: Simulator) -> None:
    """While the retry looks, the first attempt's answer arrives and is noted: nothing is void, nothing is sent again."""
    sim.set(clock="manual")
    _sending(warehouse, sim, "run-1", 3, prompt="About {{ row.name }}")
    (batch,) = sim.stats()["batches"]
    job = make_job_id("dag", "run-1", "submit")

    def note_while_looking(_: float) -> None:
        warehouse.ledger.submitted(job, 0, warehouse.kit.get(batch["id"]))

    Settler(warehouse.kit, warehouse.ledger, settle_seconds=SETTLE, sleep=note_while_looking).settle(job)
    record = warehouse.ledger.get(job, 0)
    assert (record.state, record.batch_id, record.adopted) == (BatchState.SUBMITTED, batch["id"], False)
    with pytest.raises(LedgerError, match="is submitted by now and was not moved to void"):
        warehouse.ledger.void(job, 0, "too late")


def test_a_batch_that_was_taken_by_guess_goes_back_to_its_living_sender(warehouse: Warehouse, sim: Simulator) -> None:
    """The sender's own note beats the guess; the guesser's rows are looked for again and sent once."""
    sim.set(clock="manual")
    _sending(warehouse, sim, "run-1", 3, prompt="One {{ row.name }}")
    (batch,) = sim.stats()["batches"]
    sim.faults.add("cut_before_accept")
    assert warehouse.submit(products(3), run_id="run-2", settle_seconds=SETTLE).batch_ids == [batch["id"]]
    warehouse.ledger.submitted(make_job_id("dag", "run-1", "submit"), 0, warehouse.kit.get(batch["id"]))
    two = make_job_id("dag", "run-2", "submit")
    assert [b.state.value for b in warehouse.ledger.batches(two)] == ["void", "sending"]
    sim.set(clock="instant")
    report = warehouse.submit(products(3), run_id="run-2", settle_seconds=SETTLE)
    sim.end(batch["id"])
    assert warehouse.fetch(report.batch_ids, run_id="run-2", settle_seconds=SETTLE).rows == 3
    assert warehouse.fetch([batch["id"]], "answers_one", run_id="run-1").rows == 3
    assert sim.stats()["requests_accepted"] == 6


def test_a_batch_that_another_job_took_by_guess_is_not_given_up(warehouse: Warehouse, sim: Simulator) -> None:
    """What may be ours was taken by another job and still runs: we neither send nor conclude, and find it when it has ended."""
    sim.set(clock="manual")
    _sending(warehouse, sim, "run-1", 3, prompt="One {{ row.name }}")
    (batch,) = sim.stats()["batches"]
    sim.faults.add("cut_before_accept")
    warehouse.submit(products(3), run_id="run-2", settle_seconds=SETTLE)
    with pytest.raises(SubmitUncertainError, match=f"may be {batch['id']}.* Nothing was sent"):
        warehouse.submit(products(3), run_id="run-1", prompt="One {{ row.name }}", settle_seconds=SETTLE)
    sim.end(batch["id"])
    assert warehouse.submit(products(3), run_id="run-1", prompt="One {{ row.name }}", settle_seconds=SETTLE).batch_ids == [batch["id"]]
    assert sim.stats()["requests_accepted"] == 3


# --- refusals ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refused_shard_is_rejected_and_its_rows_are_free(warehouse: Warehouse, sim: Simulator, status: int) -> None:
    """Final for this attempt; once the cause is mended, the next one sends the same rows."""
    sim.faults.add("status", endpoint="create", status=status)
    with pytest.raises(SubmitRefusedError, match="Nothing was accepted or billed"):
        warehouse.submit(products(2))
    assert states(warehouse) == ["rejected"]
    warehouse.fetch(warehouse.submit(products(2)).batch_ids)
    assert_paid_once(warehouse, sim, 2)


def test_a_413_below_our_own_count_is_cut_in_two(database: Database) -> None:
    """The API's limit is lower than we think: halves, and halves of halves, until they fit; copies go with their questions."""
    with Simulator(SimulatorSettings(max_body_bytes=1200)) as sim:
        warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
        rows = [*products(12), {"id": 99, "name": "product 3"}]
        report = warehouse.submit(rows)
        assert "rejected" in states(warehouse)
        assert sim.stats()["requests_accepted"] == 12
        warehouse.fetch(report.batch_ids)
        answers = {r["id"]: r["response"] for r in warehouse.rows("SELECT id, response FROM answers")}
        assert answers == {r["id"]: answer_for(f"About {r['name']}") for r in rows}


def test_a_single_request_that_is_too_large_is_refused(database: Database) -> None:
    """It cannot be cut; the error says what to do."""
    with Simulator(SimulatorSettings(max_body_bytes=300)) as sim:
        warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
        with pytest.raises(SubmitRefusedError, match=r"413 .*Lower max_bytes_per_batch"):
            warehouse.submit([{"id": 1, "name": "x" * 500}])


def test_throttling_that_outlasts_the_bound_leaves_the_rows_free(warehouse: Warehouse, sim: Simulator) -> None:
    """429 with a long retry-after: the attempt ends, nothing is in doubt."""
    sim.faults.add("status", endpoint="create", status=429, retry_after=3600)
    with pytest.raises(SubmitThrottledError):
        warehouse.submit(products(2))
    assert states(warehouse) == ["rejected"]
    warehouse.fetch(warehouse.submit(products(2)).batch_ids)
    assert_paid_once(warehouse, sim, 2)


# --- fencing ----------------------------------------------------------------------------------------------------------------------


def test_an_attempt_that_lost_its_lease_sends_nothing_more(warehouse: Warehouse, sim: Simulator) -> None:
    """A zombie wakes up after its retry has begun: it stops before its next POST."""
    rows = products(6)

    def rows_with_a_retry_meanwhile() -> Iterator[dict[str, Any]]:
        yield from rows
        warehouse.submit(rows, max_requests=3)

    with pytest.raises(LeaseLostError, match=r"Another attempt of job .* has begun"):
        warehouse.submit(rows_with_a_retry_meanwhile(), max_requests=3)
    assert sim.stats()["requests_accepted"] == 6


def test_a_lease_lost_during_the_upload_aborts_it(warehouse: Warehouse, sim: Simulator) -> None:
    """The last bytes of a body go out only while the lease is held, so what is aborted there was never accepted."""
    job = make_job_id("dag", "run-1", "submit")
    check = warehouse.ledger.check_lease

    def lose_then_check(job_id: str, lease: int) -> None:
        warehouse.ledger.open_job(JobRecord(job, "dag", "run-1", "submit"))
        check(job_id, lease)

    warehouse.ledger.check_lease = lose_then_check  # type: ignore[method-assign]  # the retry begins during the upload
    with pytest.raises(LeaseLostError):
        warehouse.submit(products(3))
    warehouse.ledger.check_lease = check  # type: ignore[method-assign]
    time.sleep(0.2)
    assert sim.stats()["batches_accepted"] == 0
    warehouse.fetch(warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids)
    assert_paid_once(warehouse, sim, 3)


def _attempt(url: str, base_url: str, barrier: Any, results: Any) -> None:
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    warehouse = Warehouse(engine, kit_for(base_url))
    warehouse.ledger.ensure()
    barrier.wait()
    try:
        results.put(("done", warehouse.submit(products(40), max_requests=5, settle_seconds=1.0).batch_ids))
    except (LeaseLostError, LedgerError) as e:
        results.put((type(e).__name__, []))


def test_two_processes_with_one_job_send_each_request_once(database: Database) -> None:
    """Two attempts at the same moment: eight shards in all, whoever sends them; the newer attempt has them all."""
    with SimulatorProcess(SimulatorSettings()) as sim:
        context = multiprocessing.get_context("spawn")
        barrier, results = context.Barrier(2), context.Queue()
        attempts = [context.Process(target=_attempt, args=(database.url, sim.base_url, barrier, results)) for _ in range(2)]
        for attempt in attempts:
            attempt.start()
        ended = [results.get(timeout=60) for _ in attempts]
        for attempt in attempts:
            attempt.join()
        assert "done" in [how for how, _ in ended]
        warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
        report = warehouse.submit(products(40), max_requests=5, settle_seconds=1.0)
        assert report.asked == 0
        assert sim.stats()["requests_accepted"] == 40
        assert warehouse.fetch(report.batch_ids).rows == 40


# --- the ledger -------------------------------------------------------------------------------------------------------------------


def test_an_illegal_move_raises_and_changes_nothing(warehouse: Warehouse) -> None:
    """A landed batch cannot be rejected."""
    warehouse.fetch(warehouse.submit(products(1)).batch_ids)
    job = make_job_id("dag", "run-1", "submit")
    with pytest.raises(LedgerError, match="is landed and cannot become rejected"):
        warehouse.ledger.rejected(job, 0, "no")
    assert warehouse.ledger.get(job, 0).state is BatchState.LANDED
    assert warehouse.rows("SELECT COUNT(*) AS n FROM batchkit_request") == [{"n": 1}]


def test_tables_of_another_version_are_refused(warehouse: Warehouse) -> None:
    """An older provider must not write into a newer ledger."""
    warehouse.ledger.ensure()
    warehouse.execute("UPDATE batchkit_version SET version = 99")
    with pytest.raises(LedgerError, match="of version 99"):
        warehouse.submit(products(1))

"""Whatever breaks between us and the API: every row is asked once, and every answer lands."""

from __future__ import annotations

import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
import sqlalchemy as sa

from airflow_provider_batchkit import BatchKit
from airflow_provider_batchkit.exceptions import (
    BatchInputError,
    LeaseLostError,
    LedgerError,
    SubmitRefusedError,
    SubmitThrottledError,
    SubmitUncertainError,
)
from airflow_provider_batchkit.jobs.settle import DEFAULT_TIMES, Settler
from airflow_provider_batchkit.ledger import BatchState
from airflow_provider_batchkit.simulator import Simulator, SimulatorProcess, SimulatorSettings, answer_for
from tests.databases import Database
from tests.warehouse import Warehouse, kit_for

SETTLE = 0.8


@pytest.fixture
def warehouse(database: Database, sim: Simulator) -> Warehouse:
    """A warehouse whose connection has submitted one batch of one request before: the witness that void needs."""
    warehouse = Warehouse(database.engine(), kit_for(sim.base_url, timeout=5))
    warehouse.submit(products(1), run_id="before", prompt="Before {{ row.name }}")
    return warehouse


def products(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}"} for i in range(start, start + count)]


def states(warehouse: Warehouse) -> list[str]:
    return [b.state.value for b in warehouse.ledger.batches(warehouse.job().job_id)]


def assert_paid_once(warehouse: Warehouse, sim: Simulator, count: int) -> None:
    """Every row asked once, beside that of the witness, landed once, with its own answer."""
    assert sim.stats()["requests_accepted"] == count + 1
    rows = warehouse.rows("SELECT id, response FROM answers ORDER BY id")
    assert [(r["id"], r["response"]) for r in rows] == [(i, answer_for(f"About product {i}")) for i in range(count)]


# --- the POST whose end nobody saw ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [1, 2, 5])
@pytest.mark.parametrize("clock", ["instant", "manual"])
def test_a_connection_cut_after_acceptance_makes_one_batch_per_shard(warehouse: Warehouse, sim: Simulator, cuts: int, clock: str) -> None:
    """Five shards, the first POSTs cut after the API took them: each is found again and proved, a running one once it has ended."""
    sim.set(clock=clock)
    sim.faults.add("cut_after_accept", times=cuts)
    report = warehouse.submit(products(15), max_requests=3, settle_seconds=SETTLE)
    waits = 0
    while report.waits_for is not None:
        waits += 1
        for batch_id in report.waits_for.batch_ids:
            sim.end(batch_id)
        report = warehouse.submit(products(15), max_requests=3, settle_seconds=SETTLE)
    stats = sim.stats()
    assert (waits, stats["posts"], stats["batches_accepted"]) == (0 if clock == "instant" else cuts, 6, 6)
    assert len(set(report.batch_ids)) == 5
    for batch_id in report.batch_ids:
        sim.end(batch_id)
    warehouse.fetch(report.batch_ids, settle_seconds=SETTLE)
    assert_paid_once(warehouse, sim, 15)


def test_a_connection_cut_before_acceptance_is_proved_void_and_sent_again(warehouse: Warehouse, sim: Simulator) -> None:
    """Nothing shows up for settle_seconds: the shard was never accepted, and goes out again in the same attempt."""
    sim.faults.add("cut_before_accept", times=2)
    report = warehouse.submit(products(3), settle_seconds=SETTLE)
    assert sim.stats()["posts"] == 4
    assert states(warehouse) == ["void", "void", "submitted"]
    warehouse.fetch(report.batch_ids)
    assert_paid_once(warehouse, sim, 3)


def test_a_network_that_never_takes_the_body_ends_the_attempt_with_nothing_billed(warehouse: Warehouse, sim: Simulator) -> None:
    """After five proved failures the attempt gives up; the next one finds all rows free."""
    sim.faults.add("cut_before_accept", times=5)
    with pytest.raises(SubmitUncertainError):
        warehouse.submit(products(2), settle_seconds=SETTLE)
    report = warehouse.submit(products(2), settle_seconds=SETTLE)
    warehouse.fetch(report.batch_ids)
    assert_paid_once(warehouse, sim, 2)


@pytest.mark.parametrize("fault", [{"kind": "status_after_accept", "status": 500}, {"kind": "late", "seconds": 3.0}])
def test_a_server_error_or_a_late_answer_is_reconciled(database: Database, sim: Simulator, fault: dict[str, Any]) -> None:
    """A 500 and a time-out prove nothing: the batch is looked for, and found."""
    warehouse = Warehouse(database.engine(), kit_for(sim.base_url, timeout=1))
    warehouse.submit(products(1), run_id="before", prompt="Before {{ row.name }}")
    sim.faults.add(**fault)
    report = warehouse.submit(products(4), settle_seconds=SETTLE)
    assert (sim.stats()["posts"], len(report.batch_ids)) == (2, 1)
    warehouse.fetch(report.batch_ids)
    assert_paid_once(warehouse, sim, 4)


@pytest.mark.parametrize("skew", [-600.0, 600.0])
def test_clocks_may_differ(warehouse: Warehouse, sim: Simulator, skew: float) -> None:
    """An API clock ten minutes off in either direction hides no batch."""
    sim.set(skew_seconds=skew)
    sim.faults.add("cut_after_accept")
    warehouse.submit(products(2), settle_seconds=SETTLE)
    assert sim.stats()["batches_accepted"] == 2


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
    assert sim.stats()["batches_accepted"] == 1007


def test_others_batches_are_left_alone(warehouse: Warehouse, sim: Simulator) -> None:
    """Of those of the same size, claimed ones are left out, ended ones of somebody else are disproved; other sizes do not count."""
    claimed = warehouse.submit(products(3), run_id="run-0").batch_ids
    foreign = warehouse.kit.submit(["a", "b", "c"], model="claude-haiku-5-5", max_tokens=5)
    sim.faults.add("cut_before_accept")
    report = warehouse.submit(products(3), run_id="run-1", settle_seconds=SETTLE)
    assert not set(report.batch_ids) & {*claimed, *foreign}
    # of the two candidates only the unclaimed one was read, once
    assert sim.stats()["calls"]["results"] == 1
    assert sim.stats()["requests_accepted"] == 10
    assert warehouse.rows("SELECT state FROM batchkit_batch WHERE state = 'void'") == [{"state": "void"}]


def test_proving_a_batch_reads_its_first_lines_only(warehouse: Warehouse, sim: Simulator) -> None:
    """The rest of the results is not downloaded: a stream that breaks soon after still proves the batch."""
    report = warehouse.submit(products(400))
    sim.faults.add("cut_results", line=60)
    first = Settler(warehouse.kit, warehouse.ledger, DEFAULT_TIMES, lease=None).first_custom_ids(report.batch_ids[0])
    assert len(first) == 5
    assert all(custom_id.startswith(warehouse.job().job_id) for custom_id in first)


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


def test_throttling_that_outlasts_a_minute_leaves_the_rows_free(warehouse: Warehouse, sim: Simulator) -> None:
    """429 with a long retry-after: the job waits without a worker slot, nothing is in doubt."""
    sim.faults.add("status", endpoint="create", status=429, retry_after=3600)
    assert warehouse.submit(products(2)).waits_for is not None
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
    assert sim.stats()["requests_accepted"] == 7


def test_a_lease_lost_during_the_upload_aborts_it(warehouse: Warehouse, sim: Simulator) -> None:
    """The last bytes of a body go out only while the lease is held, so what is aborted there was never accepted."""
    check = warehouse.ledger.check_lease

    def lose_then_check(job_id: str, lease: int) -> None:
        warehouse.ledger.open_job(warehouse.job(), warehouse.attempt().attempt_id)
        check(job_id, lease)

    warehouse.ledger.check_lease = lose_then_check  # type: ignore[method-assign]  # the retry begins during the upload
    with pytest.raises(LeaseLostError):
        warehouse.submit(products(3))
    warehouse.ledger.check_lease = check  # type: ignore[method-assign]
    time.sleep(0.2)
    assert sim.stats()["batches_accepted"] == 1
    # its sender knows that the body was not completed: the next attempt need not look for it
    assert states(warehouse) == ["rejected"]
    warehouse.fetch(warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids)
    assert_paid_once(warehouse, sim, 3)


def _attempt(url: str, base_url: str, barrier: Any, results: Any) -> None:
    engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
    warehouse = Warehouse(engine, kit_for(base_url))
    warehouse.ledger.ensure()
    barrier.wait()
    try:
        results.put(("done", warehouse.submit(products(40), max_requests=5, settle_seconds=4.0).batch_ids))
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
        report = warehouse.submit(products(40), max_requests=5, settle_seconds=4.0)
        assert report.asked == 0
        assert sim.stats()["requests_accepted"] == 40
        assert warehouse.fetch(report.batch_ids).rows == 40


# --- the ledger -------------------------------------------------------------------------------------------------------------------


def test_an_illegal_move_raises_and_changes_nothing(warehouse: Warehouse) -> None:
    """A landed batch cannot be rejected."""
    warehouse.fetch(warehouse.submit(products(1)).batch_ids)
    job = warehouse.job().job_id
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


# --- what changes between two attempts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [("b", "a"), ("a",), ("a", "name"), ("a", "b", "name")])
def test_another_key_in_a_retry_puts_no_answer_under_another_row(warehouse: Warehouse, sim: Simulator, key: tuple[str, ...]) -> None:
    """The ledger knows rows by the values of their key alone: with its columns in another order, values would change places."""
    rows = [{"a": f"x{i}", "b": f"y{i}", "name": f"product {i}"} for i in range(4)]
    sim.faults.add("status", status=400, after=1)
    with pytest.raises(SubmitRefusedError):
        warehouse.submit(rows, key=("a", "b"), max_requests=2)
    with pytest.raises(BatchInputError, match=r"by the key \(a, b\), and its key is now .*Nothing was sent by this attempt"):
        warehouse.submit(rows, key=key, max_requests=2)
    assert sim.stats()["requests_accepted"] == 3
    warehouse.fetch(warehouse.submit(rows, key=("a", "b"), max_requests=2).batch_ids)
    found = warehouse.rows("SELECT a, b, response FROM answers ORDER BY a")
    assert [tuple(row.values()) for row in found] == [(f"x{i}", f"y{i}", answer_for(f"About product {i}")) for i in range(4)]


def test_a_key_may_change_while_nothing_was_accepted(warehouse: Warehouse, sim: Simulator) -> None:
    """A DAG that is mended after the API refused everything goes on with its new key."""
    rows = [{"a": f"x{i}", "b": f"y{i}", "name": f"product {i}"} for i in range(2)]
    sim.faults.add("status", status=400)
    with pytest.raises(SubmitRefusedError):
        warehouse.submit(rows, key=("a",))
    warehouse.fetch(warehouse.submit(rows, key=("b",)).batch_ids)
    assert [row["b"] for row in warehouse.rows("SELECT b FROM answers ORDER BY b")] == ["y0", "y1"]


@pytest.mark.parametrize("retry_after", ["nan", "inf", "1e400", "99999999999999", "-5", "soon"])
def test_a_retry_after_that_is_no_time_to_wait_fails_no_task(warehouse: Warehouse, sim: Simulator, retry_after: str) -> None:
    """What the header says decides how long to wait, a day at most, and nothing else."""
    sim.faults.add("status", status=429, headers={"retry-after": retry_after})
    if retry_after in ("inf", "1e400", "99999999999999"):
        with pytest.raises(SubmitThrottledError, match="Nothing of this shard was accepted or billed"):
            warehouse.submit(products(3))
        assert states(warehouse) == ["rejected"]
    assert warehouse.submit(products(3)).waits_for is None
    assert (states(warehouse)[-1], sim.stats()["posts"], sim.stats()["batches_accepted"]) == ("submitted", 3, 2)


@pytest.mark.parametrize("status", [406, 410, 424, 425, 460, 499, 529])
def test_a_gateways_page_with_a_status_of_its_own_is_no_refusal(warehouse: Warehouse, sim: Simulator, status: int) -> None:
    """A proxy says 499 of a client that went away, whatever the API did with the request: the batch is looked for."""
    sim.faults.add("html_after_accept", status=status)
    assert len(warehouse.submit(products(3), settle_seconds=SETTLE).batch_ids) == 1
    assert sim.stats()["requests_accepted"] == 4


def test_cache_writes_of_a_lifetime_that_nobody_knows_make_the_cost_unknown(warehouse: Warehouse, sim: Simulator) -> None:
    """A split that tells less than the sum beside it leaves tokens without a price: they are never billed at nothing."""
    usage = {"input_tokens": 10, "output_tokens": 5, "cache_creation_input_tokens": 1000}
    known = {"ephemeral_5m_input_tokens": 400, "ephemeral_1h_input_tokens": 600}
    splits = [{"ephemeral_24h_input_tokens": 1000}, known | {"ephemeral_1h_input_tokens": 0}, known, None]
    for line, split in enumerate(splits, start=1):
        sim.faults.add("set_member", member="result.message.usage", value=usage | {"cache_creation": split}, line=line)
    report = warehouse.fetch(warehouse.submit(products(4)).batch_ids)
    costs = warehouse.rows("SELECT cost_usd FROM answers")
    assert sorted(row["cost_usd"] is None for row in costs) == [False, False, True, True]
    assert report.tally.batch_cost_usd is None
    assert len(warehouse.rows("SELECT id FROM answers WHERE status = 'succeeded'")) == 4


def test_a_connection_without_a_key_leaves_no_doubt(warehouse: Warehouse, sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client refuses to make the request: nothing left this machine, so nothing has to be looked for once the key is there."""
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    good = warehouse.kit
    warehouse.kit = BatchKit(anthropic.Anthropic(base_url=sim.base_url, max_retries=0))
    with pytest.raises(SubmitThrottledError, match=r"could not be sent with this connection: .*Nothing of it was accepted"):
        warehouse.submit(products(3))
    warehouse.kit = good
    assert len(warehouse.submit(products(3)).batch_ids) == 1
    assert (states(warehouse), sim.stats()["requests_accepted"]) == (["rejected", "submitted"], 4)


@pytest.mark.parametrize("url", ["127.0.0.1:1/", "ftp://127.0.0.1:1/"])
def test_an_address_that_no_request_can_be_sent_to_leaves_no_doubt(warehouse: Warehouse, url: str) -> None:
    """A host without its scheme, for one."""
    warehouse.kit = kit_for(url)
    with pytest.raises(SubmitThrottledError, match="could not be sent with this connection"):
        warehouse.submit(products(3))
    assert states(warehouse) == ["rejected"]


def test_a_connection_that_breaks_while_the_body_goes_out_leaves_no_doubt(
    warehouse: Warehouse, sim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API never takes a body that is not complete, so the batch need not be looked for: it is sent again."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def break_off() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                connection.recv(1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                connection.close()

        threading.Thread(target=break_off, daemon=True).start()
        warehouse.kit, good = kit_for(f"http://127.0.0.1:{server.getsockname()[1]}"), warehouse.kit
        monkeypatch.setattr(warehouse.kit, "model_info", lambda _: {})
        monkeypatch.setattr(warehouse.kit, "count_tokens", lambda _: 1)
        monkeypatch.setattr("airflow_provider_batchkit.jobs.submit.PATIENCE_S", 0.0)
        large = [{"id": i, "name": "x" * 4_000_000} for i in range(4)]
        report = warehouse.submit(large)
    assert report.waits_for is not None and report.waits_for.about == "throttle"
    assert "before its upload was complete" in report.waits_for.why
    assert states(warehouse) == ["rejected"]
    warehouse.kit = good
    assert len(warehouse.submit(products(3)).batch_ids) == 1
    assert sim.stats()["requests_accepted"] == 4

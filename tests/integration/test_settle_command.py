"""``settle JOB SHARD --void | --is BATCH``: what nothing proves is decided by a person, who is told first what that means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_batchkit.commands.registry import main
from airflow_provider_batchkit.exceptions import BatchGoneError, SubmitUncertainError, WrongBatchError
from airflow_provider_batchkit.ledger import BatchState
from airflow_provider_batchkit.simulator import Simulator, answer_for
from tests.connections import anthropic_connection
from tests.databases import Database
from tests.warehouse import Warehouse, kit_for

SETTLE = 0.8


@pytest.fixture
def warehouse(database: Database, sim: Simulator, airflow_db: Path, monkeypatch: pytest.MonkeyPatch) -> Warehouse:
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", database.airflow_uri)
    monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection(sim.base_url))
    return Warehouse(database.engine(), kit_for(sim.base_url))


def products(count: int = 3) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}"} for i in range(count)]


def undecided(warehouse: Warehouse, sim: Simulator) -> str:
    """A first POST of a connection that was cut before it was accepted: no witness, so that nothing proves it. Gives the job's id."""
    sim.faults.add("cut_before_accept")
    with pytest.raises(SubmitUncertainError):
        warehouse.submit(products(), settle_seconds=SETTLE)
    return warehouse.job().job_id


def settle(*arguments: str) -> int:
    return main(["settle", *arguments, "--sql-conn-id", "warehouse", "--yes"])


def test_void_frees_the_rows_and_says_what_that_may_cost(warehouse: Warehouse, sim: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    """The next attempt asks them."""
    job = undecided(warehouse, sim)
    assert settle(job, "0", "--void") == 0
    said = capsys.readouterr().out
    assert "sends its 3 requests again" in said
    assert "paid a second time: at most $0." in said
    assert len(warehouse.submit(products(), settle_seconds=SETTLE).batch_ids) == 1
    assert sim.stats()["requests_accepted"] == 3


def test_is_gives_the_shard_its_batch_and_says_whether_that_is_proved(
    warehouse: Warehouse, sim: Simulator, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ended batch is read first."""
    sim.faults.add("cut_after_accept")
    warehouse.kit.recent = lambda *_: iter(())  # type: ignore[method-assign]  # a list that never shows it
    with pytest.raises(SubmitUncertainError):
        warehouse.submit(products(), settle_seconds=SETTLE)
    job, batch_id = warehouse.job().job_id, sim.stats()["batches"][0]["id"]
    assert settle(job, "0", "--is", batch_id) == 0
    assert "proves it" in capsys.readouterr().out
    assert warehouse.submit(products()).batch_ids == [batch_id]
    warehouse.fetch([batch_id])
    assert [r["response"] for r in warehouse.rows("SELECT response FROM answers ORDER BY id")] == [
        answer_for(f"About product {i}") for i in range(3)
    ]


def test_a_running_batch_can_be_named_and_a_fetch_still_refuses_anothers(
    warehouse: Warehouse, sim: Simulator, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person may be wrong: nothing of another job's batch is written, and the row can be decided again."""
    sim.set(clock="manual")
    job = undecided(warehouse, sim)
    (foreign,) = warehouse.kit.submit(["a", "b", "c"], model="claude-haiku-5-5", max_tokens=5)
    assert settle(job, "0", "--is", foreign) == 0
    assert "nothing proves whose it is before it has ended" in capsys.readouterr().out
    sim.end(foreign)
    with pytest.raises(WrongBatchError, match=f"settle {job} 0 --sql-conn-id CONN"):
        warehouse.fetch([foreign])
    assert settle(job, "0", "--void") == 0
    assert "stays billed" in capsys.readouterr().out
    sim.set(clock="instant")
    warehouse.fetch(warehouse.submit(products()).batch_ids)
    assert warehouse.rows("SELECT COUNT(*) AS n FROM answers") == [{"n": 3}]


def test_what_makes_no_sense_is_refused_and_changes_nothing(
    warehouse: Warehouse, sim: Simulator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another job's batch, another size, another's results, a shard that is decided or is not there."""
    job = undecided(warehouse, sim)
    own = warehouse.submit(products(2), run_id="other", prompt="Other {{ row.name }}").batch_ids[0]
    two, three = (warehouse.kit.submit([str(i) for i in range(n)], model="claude-haiku-5-5", max_tokens=5)[0] for n in (2, 3))
    other = warehouse.job("other").job_id
    for arguments, message in (
        ((job, "0", "--is", own), "in the ledger already"),
        ((job, "0", "--is", two), "has 2 requests"),
        ((job, "0", "--is", three), "did not ask"),
        ((job, "0", "--is", "msgbatch_none"), "cannot be seen"),
        ((job, "7", "--void"), "has no shard 7"),
        (("nojob", "0", "--void"), "has no shard 0"),
    ):
        assert settle(*arguments) == 1
        assert message in capsys.readouterr().err
    warehouse.fetch([own], run_id="other")
    assert settle(other, "0", "--void") == 1
    assert "is landed: there is nothing to decide" in capsys.readouterr().err
    assert warehouse.ledger.get(job, 0).state is BatchState.SENDING


@pytest.mark.parametrize("choice", ["--void", "--is"])
def test_a_row_that_changes_while_a_person_reads_is_left_alone(
    warehouse: Warehouse, sim: Simulator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    """The waiting task proves the shard before "yes" is typed: nothing proved is given up or overwritten."""
    sim.faults.add("cut_after_accept")
    recent, warehouse.kit.recent = warehouse.kit.recent, lambda *_: iter(())  # type: ignore[method-assign]
    with pytest.raises(SubmitUncertainError):
        warehouse.submit(products(), settle_seconds=SETTLE)
    warehouse.kit.recent = recent  # type: ignore[method-assign]
    job, own = warehouse.job().job_id, sim.stats()["batches"][0]["id"]
    sim.set(clock="manual")
    (foreign,) = warehouse.kit.submit(["a", "b", "c"], model="claude-haiku-5-5", max_tokens=5)

    def reads(_: str) -> str:
        assert warehouse.submit(products(), settle_seconds=SETTLE).batch_ids == [own]
        return "yes"

    monkeypatch.setattr("builtins.input", reads)
    arguments = ["settle", job, "0", "--sql-conn-id", "warehouse", choice, *([foreign] if choice == "--is" else [])]
    assert main(arguments) == 1
    assert "by now. Nothing was changed; look again" in capsys.readouterr().err
    record = warehouse.ledger.get(job, 0)
    assert (record.state, record.batch_id) == (BatchState.SUBMITTED, own)


def test_connections_of_airflows_own_database_are_found(
    warehouse: Warehouse, sim: Simulator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    """Most deployments have them there. One that is nowhere is a line, and no traceback."""
    from airflow.models.connection import Connection
    from airflow.utils.session import create_session

    job = undecided(warehouse, sim)
    with create_session() as session:
        session.query(Connection).filter(Connection.conn_id == "from_the_database").delete()
        session.add(Connection(conn_id="from_the_database", uri=database.airflow_uri))
    monkeypatch.setenv("AIRFLOW_CONN_FROM_THE_DATABASE", "")
    monkeypatch.delenv("AIRFLOW_CONN_FROM_THE_DATABASE")
    assert main(["settle", job, "0", "--sql-conn-id", "nowhere", "--void", "--yes"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main(["settle", job, "0", "--sql-conn-id", "from_the_database", "--void", "--yes"]) == 0
    assert warehouse.ledger.get(job, 0).state is BatchState.VOID


def test_a_gone_batch_can_be_given_up(warehouse: Warehouse, sim: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    """Its budget is freed and its rows are asked again, because a person says so."""
    warehouse.submit(products(1), run_id="before")
    ids = warehouse.submit(products()).batch_ids
    warehouse.kit.delete(ids[0])
    with pytest.raises(BatchGoneError):
        warehouse.fetch(ids, settle_seconds=SETTLE)
    assert settle(warehouse.job().job_id, "0", "--void") == 0
    assert "stays billed" in capsys.readouterr().out
    assert warehouse.submit(products()).asked == 3


def test_a_shard_whose_sender_may_be_alive_is_left_alone(warehouse: Warehouse, sim: Simulator, capsys: pytest.CaptureFixture[str]) -> None:
    """Its doubt has not begun."""
    job = undecided(warehouse, sim)
    warehouse.execute("UPDATE batchkit_batch SET doubt_at = NULL")
    assert settle(job, "0", "--void") == 1
    assert "its sender may be alive" in capsys.readouterr().err
    assert warehouse.ledger.get(job, 0).state is BatchState.SENDING


@pytest.mark.parametrize(("typed", "code"), [("yes\n", 0), ("no\n", 1), ("", 1)])
def test_it_asks_before_it_acts(warehouse: Warehouse, sim: Simulator, typed: str, code: int) -> None:
    """As a person types it: a program of its own, and an answer on standard input."""
    job = undecided(warehouse, sim)
    command = [sys.executable, "-m", "airflow_provider_batchkit", "settle", job, "0", "--sql-conn-id", "warehouse", "--void"]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Do it? Type yes:" in done.stdout
    assert warehouse.ledger.batches(job)[0].state is (BatchState.SENDING if code else BatchState.VOID)

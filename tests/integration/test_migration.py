"""A ledger that an older version wrote is opened where it lies: running jobs keep their ids and land, what was unproved is settled."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import BatchInputError, LedgerError, SubmitUncertainError
from airflow_provider_batchkit.ledger import BatchState
from airflow_provider_batchkit.ledger.tables import VERSION
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings, answer_for
from tests.databases import Database
from tests.ledgers import VERSIONS, KeptLedger
from tests.warehouse import Warehouse, kit_for

SETTLE = 0.8


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator(SimulatorSettings(clock="manual")) as simulator:
        yield simulator


class Kept:
    """A kept ledger in a database, with its batches in a simulator."""

    def __init__(self, database: Database, sim: Simulator, version: int) -> None:
        self.warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
        self.ledger = KeptLedger(version)
        self.ids = {run: self.ledger.send(self.warehouse.kit.client, run) for run in self.ledger.runs}
        self.ledger.write(self.warehouse.engine, self.ids)
        self.sim = sim

    def end(self, *runs: str) -> None:
        for run in runs:
            self.sim.end(self.ids[run])

    def answers(self, table: str) -> list[tuple[Any, ...]]:
        return [(r["id"], r["response"]) for r in self.warehouse.rows(f"SELECT id, response FROM {table} ORDER BY id")]

    def submit(self, run: str, rows: int = 3) -> Any:
        products = [{"id": i, "name": f"product {i}"} for i in range(rows)]
        return self.warehouse.submit(products, run_id=run, prompt=f"{run.capitalize()} {{{{ row.name }}}}", settle_seconds=SETTLE)


@pytest.fixture(params=VERSIONS)
def kept(request: pytest.FixtureRequest, database: Database, sim: Simulator) -> Kept:
    return Kept(database, sim, request.param)


def expected(run: str, rows: int = 3) -> list[tuple[int, str]]:
    return [(i, answer_for(f"{run.capitalize()} product {i}")) for i in range(rows)]


def test_a_kept_ledger_is_opened_once_by_however_many_tasks(kept: Kept) -> None:
    """The version is the present one afterwards, opening again changes nothing, and the tables are those of a fresh ledger."""
    for _ in range(2):
        kept.warehouse.ledger.ensure()
        (row,) = kept.warehouse.rows("SELECT version, ledger_id FROM batchkit_version")
        assert row["version"] == VERSION
        assert len(row["ledger_id"]) == 32
    columns = {column["name"] for column in sa.inspect(kept.warehouse.engine).get_columns("batchkit_batch")}
    assert {"doubt_at", "unseen_since"} <= columns
    assert not {"adopted", "adopted_id", "replaced_by"} & columns
    assert kept.warehouse.rows("SELECT COUNT(*) AS n FROM batchkit_summary") != [{"n": 0}]


def test_tasks_that_open_an_old_ledger_at_once_migrate_it_once(kept: Kept, database: Database, sim: Simulator) -> None:
    """Five workers of the new version begin at the same moment."""
    with ThreadPoolExecutor(5) as pool:
        workers = [Warehouse(database.engine(), kit_for(sim.base_url)) for _ in range(5)]
        for done in [pool.submit(worker.ledger.ensure) for worker in workers]:
            done.result(60)
    assert [row["version"] for row in kept.warehouse.rows("SELECT version FROM batchkit_version")] == [VERSION]
    assert len(kept.warehouse.rows("SELECT * FROM batchkit_landing")) == len(kept.warehouse.rows("SELECT * FROM batchkit_bill"))


def test_a_view_of_the_users_own_on_the_ledger_does_not_stop_a_migration_on_postgres(postgres: Database, sim: Simulator) -> None:
    """Somebody has built a dashboard on all columns: those that nothing reads any more stay, and jobs go on."""
    kept = Kept(postgres, sim, 3)
    kept.warehouse.execute("CREATE VIEW dashboard AS SELECT b.*, j.dag_id FROM batchkit_batch b JOIN batchkit_job j USING (job_id)")
    kept.warehouse.ledger.ensure()
    assert kept.warehouse.rows("SELECT COUNT(*) AS n FROM dashboard WHERE state = 'sending'") == [{"n": 3}]
    sim.set(clock="instant")
    assert len(kept.warehouse.submit([{"id": 1, "name": "x"}], run_id="new").batch_ids) == 1


def test_a_job_that_left_rows_out_is_known_after_the_migration(database: Database, sim: Simulator) -> None:
    """A replace by its fetch would delete the rows that were left out."""
    kept = Kept(database, sim, 3)
    kept.warehouse.execute(f"UPDATE batchkit_job SET unchanged_rows = 2 WHERE job_id = '{kept.ledger.job_id('running')}'")
    kept.end("running")
    with pytest.raises(BatchInputError, match="skip_unchanged"):
        kept.warehouse.fetch([kept.ids["running"]], run_id="running", disposition="replace")


def test_an_old_provider_that_still_runs_is_refused_by_the_migrated_ledger(kept: Kept) -> None:
    """What it reads of a row is not there any more, so that it stops before it sends, and its version check names the new one."""
    kept.warehouse.ledger.ensure()
    with pytest.raises(sa.exc.SQLAlchemyError):
        kept.warehouse.rows("SELECT adopted FROM batchkit_batch")


def test_a_running_job_keeps_its_id_and_lands(kept: Kept) -> None:
    """A retry of its submit re-attaches and sends nothing; its batch lands under its keys."""
    report = kept.submit("running")
    assert (report.batch_ids, report.asked) == ([kept.ids["running"]], 0)
    assert kept.warehouse.job("running").job_id == kept.ledger.job_id("running")
    kept.end("running")
    kept.warehouse.fetch(report.batch_ids, run_id="running")
    assert kept.answers("answers") == expected("running")
    assert kept.sim.stats()["batches_accepted"] == len(kept.ids)


def test_what_has_landed_is_known_by_its_table(kept: Kept) -> None:
    """The fetch of a landed batch fills its table anew where it is missing, and leaves it alone where it is not."""
    kept.end("landed")
    assert kept.warehouse.fetch([kept.ids["landed"]], run_id="landed").rows == 3
    kept.warehouse.execute("UPDATE answers SET response = 'newer'")
    assert kept.warehouse.fetch([kept.ids["landed"]], run_id="landed").rows == 3
    assert {response for _, response in kept.answers("answers")} == {"newer"}


@pytest.mark.parametrize("fetched_by", ["the id that was handed on", "a submit that ran again"])
def test_batches_that_two_jobs_took_crosswise_land_each_in_its_own_table(database: Database, sim: Simulator, fetched_by: str) -> None:
    """Version 3 gave each of two runs the other's batch. Both rows are settled by proof, whichever id their tasks know."""
    kept = Kept(database, sim, 3)
    kept.end("one", "two")
    for run, handed_on in (("one", "two"), ("two", "one")):
        ids = [kept.ids[handed_on]] if fetched_by == "the id that was handed on" else kept.submit(run).batch_ids
        kept.warehouse.fetch(ids, f"answers_{run}", run_id=run, settle_seconds=SETTLE)
        assert kept.answers(f"answers_{run}") == expected(run)
        record = kept.warehouse.ledger.batches(kept.ledger.job_id(run))[0]
        assert (record.state, record.batch_id) == (BatchState.LANDED, kept.ids[run])
    assert sim.stats()["batches_accepted"] == len(kept.ids)


def test_a_fetch_waits_for_the_end_of_the_batch_that_proves_its_row(database: Database, sim: Simulator) -> None:
    """The id that was handed on has ended and is another run's; the row's own batch still runs."""
    kept = Kept(database, sim, 3)
    kept.end("two")
    with pytest.raises(SubmitUncertainError, match="was never proved") as caught:
        kept.warehouse.fetch([kept.ids["two"]], "answers_one", run_id="one", settle_seconds=SETTLE)
    assert kept.ids["one"] in caught.value.wait.batch_ids
    kept.end("one")
    kept.warehouse.fetch([kept.ids["two"]], "answers_one", run_id="one", settle_seconds=SETTLE)
    assert kept.answers("answers_one") == expected("one")


def test_a_batch_that_was_exchanged_is_found_by_the_id_that_its_tasks_know(database: Database, sim: Simulator) -> None:
    """Version 3 had taken the owner's batch for the chain's, and had found the chain's own at landing."""
    kept = Kept(database, sim, 3)
    kept.end("owner", "chain")
    for run in ("owner", "chain"):
        kept.warehouse.fetch([kept.ids["owner"]], f"answers_{run}", run_id=run, settle_seconds=SETTLE)
        assert kept.answers(f"answers_{run}") == expected(run, 4)


def test_a_row_that_was_being_sent_is_settled_by_the_next_attempt(kept: Kept) -> None:
    """Its worker died under the old version: the doubt begins with the first attempt under the new one."""
    report = kept.submit("sending", 5)
    assert report.waits_for.batch_ids == (kept.ids["sending"],)
    kept.end("sending")
    assert kept.submit("sending", 5).batch_ids == [kept.ids["sending"]]
    assert kept.sim.stats()["batches_accepted"] == len(kept.ids)


@pytest.mark.parametrize("version", [2, 99])
def test_a_version_that_cannot_be_migrated_is_refused_and_left_alone(database: Database, version: int) -> None:
    """Nothing is made, changed or dropped."""
    warehouse = Warehouse(database.engine(), kit_for("http://127.0.0.1:9"))
    warehouse.execute("CREATE TABLE batchkit_version (version INTEGER PRIMARY KEY)", f"INSERT INTO batchkit_version VALUES ({version})")
    with pytest.raises(LedgerError, match=f"of version {version}"):
        warehouse.ledger.ensure()
    assert sa.inspect(warehouse.engine).get_table_names() == ["batchkit_version"]

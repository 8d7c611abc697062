"""Landings that meet in one table queue: none fails, none is lost, and none is written twice."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.landing import ResultTable
from airflow_provider_batchkit.landing.write import queue_for_table
from airflow_provider_batchkit.ledger import engine as ledger_engine
from airflow_provider_batchkit.ledger.engine import prepare_engine, write_transaction
from airflow_provider_batchkit.simulator import Simulator
from tests.databases import Database, sqlite_database
from tests.warehouse import Warehouse, kit_for

FETCHES = 5
PROCESSES = 3


@pytest.fixture(params=["delete", "wal"])
def journal_mode(request: pytest.FixtureRequest, sqlite: Database) -> str:
    """The test runs on a file with a rollback journal and on one with a write-ahead log."""
    with sqlite3.connect(sqlite.url.removeprefix("sqlite:///")) as connection:
        connection.execute(f"PRAGMA journal_mode = {request.param}")
    connection.close()
    return str(request.param)


def fetch_elsewhere(path: str, base_url: str, batch_ids: list[str]) -> int:
    """A fetch in a process of its own. Returns the number of rows."""
    return Warehouse(sqlite_database(Path(path)).engine(), kit_for(base_url)).fetch(batch_ids).rows


def foreign_batches(warehouse: Warehouse, rows: int) -> list[list[str]]:
    """Batches that no ledger knows: all of them have the keys item-0, item-1 and so on."""
    prompts = [f"Question {i}" for i in range(rows)]
    return [warehouse.kit.submit(prompts, model="claude-haiku-5-5", max_tokens=20) for _ in range(FETCHES)]


def own_batches(warehouse: Warehouse, rows: int) -> list[list[str]]:
    """Batches of jobs of the ledger, each with keys of its own."""
    items = [[{"id": n * rows + i, "name": f"p{i}"} for i in range(rows)] for n in range(FETCHES)]
    return [warehouse.submit(rows, run_id=f"run-{n}").batch_ids for n, rows in enumerate(items)]


@pytest.mark.parametrize("disposition", ["merge", "append", "replace"])
@pytest.mark.parametrize("batches", [own_batches, foreign_batches])
def test_fetches_queue_on_one_sqlite_file(
    sqlite: Database, sim: Simulator, journal_mode: str, disposition: str, batches: Callable[[Warehouse, int], list[list[str]]]
) -> None:
    """Each has connections of its own, and all of them have read their results before the first one writes."""
    warehouse = Warehouse(sqlite.engine(), kit_for(sim.base_url))
    ids = batches(warehouse, 2_000)
    others = [Warehouse(sqlite.engine(), kit_for(sim.base_url)) for _ in ids]
    warehouse.fetch(ids[0], disposition=disposition)
    with ThreadPoolExecutor(FETCHES) as pool:
        landed = [pool.submit(other.fetch, batch, disposition=disposition) for other, batch in zip(others, ids, strict=True)]
        assert [future.result().rows for future in landed] == [2_000] * FETCHES
    once = disposition == "replace" or (disposition == "merge" and batches is foreign_batches)
    assert warehouse.rows("SELECT COUNT(*) AS n FROM answers") == [{"n": 2_000 * (1 if once else FETCHES)}]
    assert warehouse.rows("SELECT MAX(n) AS n FROM (SELECT COUNT(*) AS n FROM answers GROUP BY batch_id, custom_id)") == [{"n": 1}]


@pytest.mark.parametrize("journal_mode", ["wal"], indirect=True)
def test_fetches_of_several_processes_queue_on_one_sqlite_file(sqlite: Database, sim: Simulator, journal_mode: str) -> None:
    """As several workers of an installation do."""
    warehouse = Warehouse(sqlite.engine(), kit_for(sim.base_url))
    ids = foreign_batches(warehouse, 5_000)[:PROCESSES]
    path = sqlite.url.removeprefix("sqlite:///")
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        landed = [pool.submit(fetch_elsewhere, path, sim.base_url, batch) for batch in ids]
        assert [future.result() for future in landed] == [5_000] * PROCESSES
    assert warehouse.rows("SELECT COUNT(*) AS n, COUNT(DISTINCT custom_id) AS ids FROM answers") == [{"n": 5_000, "ids": 5_000}]


def test_a_landing_waits_for_a_writer_and_holds_nothing_while_it_downloads(sqlite: Database, sim: Simulator, journal_mode: str) -> None:
    """A batch from elsewhere merges while another connection writes, and a reader reads on meanwhile."""
    warehouse = Warehouse(sqlite.engine(), kit_for(sim.base_url))
    ids = warehouse.kit.submit(["Name a river.", "Name a lake."], model="claude-haiku-5-5", max_tokens=20)
    warehouse.fetch(ids)
    results = sim.stats()["calls"]["results"]
    with ThreadPoolExecutor(1) as pool:
        with write_transaction(warehouse.engine) as writing:
            writing.exec_driver_sql("DELETE FROM answers")
            landing = pool.submit(lambda: _land_without_ensure(sqlite, sim, ids))
            while sim.stats()["calls"]["results"] == results and not landing.done():
                time.sleep(0.01)
            time.sleep(0.5)
            assert not landing.done()
            assert warehouse.rows("SELECT COUNT(*) AS n FROM answers") == [{"n": 2}]
        assert landing.result(timeout=60) == 2
    assert warehouse.rows("SELECT COUNT(*) AS n FROM answers") == [{"n": 2}]


def _land_without_ensure(database: Database, sim: Simulator, ids: list[str]) -> int:
    """A fetch whose tables exist, so that it takes no lock before its results are read."""
    warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
    warehouse.ledger.ensure = lambda: None  # type: ignore[method-assign]
    return warehouse.fetch(ids, rewrite=True).rows


def test_a_writer_outwaits_a_queue_that_is_longer_than_one_wait(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is held for several times as long as SQLite waits for it in one attempt."""
    monkeypatch.setattr(ledger_engine, "_SQLITE_BUSY_MS", 100)
    first, second = prepare_engine(sqlite.engine()), prepare_engine(sqlite.engine())
    with ThreadPoolExecutor(1) as pool:
        with write_transaction(first) as connection:
            connection.exec_driver_sql("CREATE TABLE t (n INTEGER)")
            begun = threading.Event()

            def write() -> None:
                begun.set()
                with write_transaction(second) as connection:
                    connection.exec_driver_sql("INSERT INTO t VALUES (1)")

            waiting = pool.submit(write)
            begun.wait()
            time.sleep(1)
        waiting.result(timeout=30)
    with first.connect() as connection:
        assert connection.execute(sa.text("SELECT n FROM t")).scalars().all() == [1]


@pytest.mark.parametrize("spelling", ["t", "public.t"])
def test_two_spellings_of_a_table_have_one_queue(postgres: Database, sim: Simulator, spelling: str) -> None:
    """A landing in public.t that has begun to write holds up one in t, and the other way round; both land."""
    warehouse = Warehouse(postgres.engine(), kit_for(sim.base_url))
    first, second = (warehouse.submit([{"id": 1, "name": name}], run_id=name).batch_ids for name in ("lamp", "cup"))
    warehouse.fetch(first, "t")
    with ThreadPoolExecutor(1) as pool:
        with warehouse.engine.begin() as writing:
            queue_for_table(writing, ResultTable("public.t" if spelling == "t" else "t", [("id", "integer")]))
            landing = pool.submit(Warehouse(postgres.engine(), kit_for(sim.base_url)).fetch, second, spelling)
            with pytest.raises(TimeoutError):
                landing.result(timeout=2)
        assert landing.result(timeout=30).rows == 1
    assert warehouse.rows("SELECT COUNT(*) AS n FROM t") == [{"n": 1}]


def identity(engine: sa.Engine, name: str, *before: str) -> str:
    """The identity of a table on a connection that has run some statements."""
    with engine.connect() as connection:
        for statement in before:
            connection.exec_driver_sql(statement)
        return ResultTable(name, []).identity(connection)


def test_a_table_of_postgresql_has_one_name_under_any_search_path(postgres: Database) -> None:
    """The schema is the one in which a statement finds the table; a table that is not there has the name that it would get."""
    engine = postgres.engine()
    with engine.begin() as connection:
        for statement in (
            "CREATE SCHEMA shop", 'CREATE SCHEMA "a.b"', "CREATE TABLE t (n INT)", "CREATE TABLE shop.t (n INT)",
            'CREATE TABLE "T" (n INT)',
            'CREATE TABLE shop."%% odd ""name""" (n INT)', 'CREATE TABLE "a.b".c (n INT)',
        ):  # fmt: skip
            connection.exec_driver_sql(statement)
    assert identity(engine, "t") == identity(engine, "public.t") == "public.t"
    assert identity(engine, "t", "SET search_path = shop, public") == identity(engine, "shop.t") == "shop.t"
    assert identity(engine, "T", "SET search_path = shop, public") == "public.T"
    assert identity(engine, 'shop.% odd "name"') == 'shop.% odd "name"'
    assert identity(engine, "a.b.c") == "a.b.c"
    assert identity(engine, "new") == "public.new"
    assert identity(engine, "new", "SET search_path = shop") == "shop.new"
    assert identity(engine, "nowhere.new") == "nowhere.new"


def test_a_table_of_sqlite_has_one_name_in_any_case(sqlite: Database) -> None:
    """SQLite ignores the case of a to z, and ``main`` is the file itself."""
    engine = sqlite.engine()
    assert {identity(engine, name) for name in ("answers", "Answers", "main.answers", "MAIN.ANSWERS")} == {"answers"}
    assert identity(engine, "Other.Answers") == "other.answers"
    assert identity(engine, "ÄPFEL") == "Äpfel"


def test_two_spellings_on_sqlite_are_one_table(sqlite: Database, sim: Simulator) -> None:
    """What one fetch wrote to Answers the next one finds as main.answers."""
    warehouse = Warehouse(sqlite.engine(), kit_for(sim.base_url))
    ids = warehouse.submit([{"id": 1, "name": "lamp"}]).batch_ids
    assert [warehouse.fetch(ids, name).rows for name in ("Answers", "answers", "main.answers", "MAIN.Answers")] == [1, 1, 1, 1]
    assert warehouse.rows("SELECT COUNT(*) AS n FROM answers") == [{"n": 1}]

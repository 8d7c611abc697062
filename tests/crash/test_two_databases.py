"""The two-database landing, killed at every step, with zombies that go on after a younger attempt has taken over.

Each step of the protocol is one call to the ledger or to the warehouse. A kill before or after a call is an exception that nothing of ours
catches, or for a real process ``os._exit``; a zombie is an attempt that rests within a call while others run, and then goes on.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import BatchGoneError, BatchKitError, LeaseLostError
from airflow_provider_batchkit.landing import elsewhere
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings
from tests.databases import Database
from tests.results import Results, results_in
from tests.warehouse import Warehouse, kit_for

#: (ledger, results)
PAIRS = [("sqlite", "duckdb"), ("postgres", "mysql-pymysql"), ("sqlite", "snowflake")]
#: likewise, with ``make test ARGS='-m long'``
RARER = [("sqlite", "sqlite"), ("postgres", "postgres-psycopg3"), ("sqlite", "postgres-psycopg2"), ("postgres", "duckdb")]
HOW = ["merge", "append", "replace"]
#: the steps: where they are, and what they are called
STEPS = [
    ("ledger", "open_load"),
    ("ledger", "prepare_load"),
    ("results", "stage"),
    ("ledger", "wait_for_turn"),
    ("results", "raise_fence"),
    ("results", "marked"),
    ("results", "publish"),
    ("module", "flip"),
    ("results", "drop"),
    ("ledger", "give_turn_back"),
]


class Killed(BaseException):
    """A worker's death: nothing of ours catches it."""


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator(SimulatorSettings()) as simulator:
        yield simulator


@pytest.fixture(
    params=[*(pytest.param(pair, id="+".join(pair)) for pair in PAIRS)]
    + [pytest.param(pair, id="+".join(pair), marks=pytest.mark.long) for pair in RARER]
)
def pair(request: pytest.FixtureRequest, tmp_path: Path, sim: Simulator) -> Iterator[tuple[Warehouse, Results]]:
    ledger, results = request.param
    if ledger == "sqlite":
        engine = sa.create_engine(f"sqlite:///{tmp_path}/ledger.db", poolclass=sa.pool.NullPool)
    else:
        database: Database = request.getfixturevalue(ledger)
        engine = database.engine()
    with results_in(results, tmp_path, request) as found:
        yield Warehouse(engine, kit_for(sim.base_url)), found


def at(where: str, name: str, warehouse: Warehouse, results: Results, monkeypatch: pytest.MonkeyPatch, do: Callable[..., Any]) -> None:
    """Have ``do(real, *arguments)`` run in place of a step."""
    owner: Any = {"ledger": warehouse.ledger, "results": results.adapter, "module": elsewhere}[where]
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: do(real, *a, **k))


def submit(warehouse: Warehouse, run: str) -> list[str]:
    rows = [{"id": i, "name": f"thing {i} of {run}"} for i in range(4)]
    return warehouse.submit(rows, run_id=run).batch_ids


def check(warehouse: Warehouse, results: Results, landed: list[str], how: str) -> None:
    """Each batch has one landing in the ledger, and the table what the last of them leaves."""
    found = warehouse.rows("SELECT batch_id FROM batchkit_landing ORDER BY landed_at")
    assert sorted(row["batch_id"] for row in found) == sorted(landed)
    assert {row["state"] for row in warehouse.rows("SELECT state FROM batchkit_batch")} == {"landed"}
    assert warehouse.rows("SELECT * FROM batchkit_prepared") == []
    assert warehouse.rows("SELECT SUM(requests) AS n FROM batchkit_spend") == [{"n": 4 * len(landed)}]
    rows = results.rows("SELECT id, batch_id FROM answers")
    assert len(set(rows)) == len(rows)
    if how == "append":
        assert sorted(rows) == sorted(itertools.product(range(4), landed))
    else:
        assert sorted(rows) == [(i, landed[-1]) for i in range(4)]


def staged(results: Results) -> list[str]:
    return [name for name in results.tables() if name.startswith("batchkit_stage")]


@pytest.mark.parametrize("how", HOW)
def test_a_worker_that_is_killed_at_any_step_loses_nothing_and_writes_nothing_twice(
    pair: tuple[Warehouse, Results], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each step, one run for each; the retry lands, and the earlier runs' rows stay where they belong."""
    warehouse, results = pair
    landed: list[str] = []
    monkeypatch.setattr(elsewhere, "TURN_S", 0.3)
    for number, ((where, name), when) in enumerate(itertools.product(STEPS, ("before", "after"))):
        (batch_id,) = submit(warehouse, f"run-{number}")

        def die(real: Callable[..., Any], *arguments: Any, _when: str = when, **more: Any) -> Any:
            if _when == "after":
                real(*arguments, **more)
            raise Killed

        with monkeypatch.context() as patch:
            at(where, name, warehouse, results, patch, die)
            # the turn is given back in an orderly way, which a killed worker does not do
            if name != "give_turn_back":
                at("ledger", "give_turn_back", warehouse, results, patch, lambda *_: None)
            with pytest.raises(Killed):
                warehouse.fetch([batch_id], into=results.adapter, disposition=how, run_id=f"run-{number}")
        report = warehouse.fetch([batch_id], into=results.adapter, disposition=how, run_id=f"run-{number}")
        assert report.rows == 4, (name, when)
        landed.append(batch_id)
        check(warehouse, results, landed, how)
    (batch_id,) = submit(warehouse, "last")
    warehouse.fetch([batch_id], into=results.adapter, disposition=how, run_id="last")
    # what a worker leaves that dies between its landing and the drop goes with the next landing in the table
    assert staged(results) == []


@pytest.mark.parametrize("step", [("results", "publish"), ("results", "stage"), ("ledger", "prepare_load"), ("ledger", "wait_for_turn")])
@pytest.mark.parametrize("how", HOW)
def test_a_stopped_worker_that_goes_on_changes_nothing(
    pair: tuple[Warehouse, Results], how: str, step: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rests at a step while its retry lands, and the next run's fetch after that. Thawed, it finds itself behind the fence."""
    warehouse, results = pair
    where, name = step
    monkeypatch.setattr(elsewhere, "TURN_S", 0.3)
    (first,), (second,) = submit(warehouse, "run-1"), submit(warehouse, "run-2")

    def rest(real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        patch.undo()
        for batch_id, run in ((first, "run-1"), (second, "run-2")):
            warehouse.fetch([batch_id], into=results.adapter, disposition=how, run_id=run)
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        at(where, name, warehouse, results, patch, rest)
        with contextlib.suppress(LeaseLostError):
            warehouse.fetch([first], into=results.adapter, disposition=how, run_id="run-1")
    check(warehouse, results, [first, second], how)


@pytest.mark.parametrize("how", HOW)
def test_a_publish_that_arrives_late_is_refused_by_the_fence(
    pair: tuple[Warehouse, Results], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement itself, sent by an attempt that is long dead, while the next run has landed already."""
    warehouse, results = pair
    monkeypatch.setattr(elsewhere, "TURN_S", 0.3)
    (first,), (second,) = submit(warehouse, "run-1"), submit(warehouse, "run-2")
    late: list[Any] = []

    def send(real: Callable[..., Any], connection: Any, *arguments: Any) -> Any:
        late.append(lambda fresh: real(fresh, *arguments))
        raise Killed

    with monkeypatch.context() as patch:
        at("results", "publish", warehouse, results, patch, send)
        at("results", "drop", warehouse, results, patch, lambda *_: None)
        with pytest.raises(Killed):
            warehouse.fetch([first], into=results.adapter, disposition=how, run_id="run-1")
    with monkeypatch.context() as patch:
        at("results", "drop", warehouse, results, patch, lambda *_: None)
        warehouse.fetch([second], into=results.adapter, disposition=how, run_id="run-2")
    with results.adapter.open() as connection:
        assert late[0](connection) is False
    rows = results.rows("SELECT id, batch_id FROM answers")
    assert sorted(rows) == [(i, second) for i in range(4)]
    warehouse.fetch([first], into=results.adapter, disposition=how, run_id="run-1")
    check(warehouse, results, [second, first], how)


def test_a_publish_whose_worker_died_is_written_down_by_the_next_fetch_before_it_publishes(
    pair: tuple[Warehouse, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the retry of the first would find no landing and overwrite the second's newer answers."""
    warehouse, results = pair
    monkeypatch.setattr(elsewhere, "TURN_S", 0.3)
    (first,), (second,) = submit(warehouse, "run-1"), submit(warehouse, "run-2")

    def die(real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        at("module", "flip", warehouse, results, patch, die)
        with pytest.raises(Killed):
            warehouse.fetch([first], into=results.adapter, run_id="run-1")
    assert warehouse.rows("SELECT state FROM batchkit_batch WHERE state = 'prepared'") == [{"state": "prepared"}]
    assert warehouse.rows("SELECT * FROM batchkit_spend") == []
    warehouse.fetch([second], into=results.adapter, run_id="run-2")
    assert len(warehouse.rows("SELECT * FROM batchkit_landing")) == 2
    warehouse.fetch([first], into=results.adapter, run_id="run-1")
    check(warehouse, results, [first, second], "merge")


def test_what_was_published_is_landed_without_the_api_a_month_later(
    pair: tuple[Warehouse, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker is there, and outcomes and bill were prepared: nothing is read again."""
    warehouse, results = pair
    monkeypatch.setattr(elsewhere, "TURN_S", 0.3)
    (batch_id,) = submit(warehouse, "run-1")

    def die(real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        at("module", "flip", warehouse, results, patch, die)
        with pytest.raises(Killed):
            warehouse.fetch([batch_id], into=results.adapter)

    def nobody(*_: Any, **__: Any) -> Any:
        raise AssertionError("the API was called")

    monkeypatch.setattr(warehouse.kit, "get", nobody)
    monkeypatch.setattr(warehouse.kit, "read_blocks", nobody)
    report = warehouse.fetch([batch_id], into=results.adapter)
    assert (report.rows, len(report.first)) == (4, 1)
    check(warehouse, results, [batch_id], "merge")


@pytest.mark.parametrize("published", [True, False], ids=["published", "not published"])
def test_results_that_can_be_read_no_more_are_given_up_behind_the_fence_alone(
    pair: tuple[Warehouse, Results], monkeypatch: pytest.MonkeyPatch, published: bool
) -> None:
    """The publish of a dead attempt may arrive after the marker was looked for: the fence decides which of the two it was."""
    warehouse, results = pair
    monkeypatch.setattr(elsewhere, "TURN_S", 0.3)
    (batch_id,) = submit(warehouse, "run-1")
    late: list[Callable[[Any], bool]] = []

    def send(real: Callable[..., Any], connection: Any, *arguments: Any) -> Any:
        late.append(lambda fresh: real(fresh, *arguments))
        raise Killed

    with monkeypatch.context() as patch:
        at("results", "publish", warehouse, results, patch, send)
        with pytest.raises(Killed):
            warehouse.fetch([batch_id], into=results.adapter)
    real_get = warehouse.kit.get

    def archived(found: str) -> Any:
        if published:
            with results.adapter.open() as connection:
                assert late[0](connection)
        snapshot = real_get(found)
        return replace(snapshot, archived_at=snapshot.created_at)

    monkeypatch.setattr(warehouse.kit, "get", archived)
    if published:
        assert warehouse.fetch([batch_id], into=results.adapter).rows == 4
        check(warehouse, results, [batch_id], "merge")
        return
    with pytest.raises(BatchGoneError, match="archived"):
        warehouse.fetch([batch_id], into=results.adapter)
    assert warehouse.rows("SELECT state FROM batchkit_batch") == [{"state": "gone"}]
    with results.adapter.open() as connection:
        assert late[0](connection) is False
    assert results.rows("SELECT * FROM answers") == []


def test_a_fetch_without_rows_to_write_lands_without_a_publish(pair: tuple[Warehouse, Results]) -> None:
    """Its outcomes and its bill are in the ledger all the same."""
    warehouse, results = pair
    sent = warehouse.submit([{"id": 1, "name": "[[sim:overloaded]]"}], prompt="{{ row.name }}")
    report = warehouse.fetch(sent.batch_ids, into=results.adapter)
    assert (report.rows, dict(report.counts)) == (0, {"errored": 1})
    assert warehouse.rows("SELECT state FROM batchkit_batch") == [{"state": "landed"}]
    assert warehouse.rows("SELECT rows_written FROM batchkit_landing") == [{"rows_written": 0}]


def test_replace_keeps_the_old_rows_until_every_batch_is_whole(pair: tuple[Warehouse, Results], sim: Simulator) -> None:
    """One load for all batches of the fetch, and one publish."""
    warehouse, results = pair
    (old,) = submit(warehouse, "run-1")
    warehouse.fetch([old], into=results.adapter, disposition="replace", run_id="run-1")
    rows = [{"id": i, "name": f"new {i}"} for i in range(4)]
    ids = warehouse.submit(rows, run_id="run-2", max_requests=2).batch_ids
    sim.faults.add("missing_line", batch=ids[1], line=1, times=None)
    with pytest.raises(BatchKitError, match="were to be replaced"):
        warehouse.fetch(ids, into=results.adapter, disposition="replace", run_id="run-2")
    assert {batch_id for (batch_id,) in results.rows("SELECT batch_id FROM answers")} == {old}
    sim.faults.clear()
    warehouse.fetch(ids, into=results.adapter, disposition="replace", run_id="run-2")
    assert sorted(results.rows("SELECT id, batch_id FROM answers")) == [(0, ids[0]), (1, ids[0]), (2, ids[1]), (3, ids[1])]


#: who dies in its flip, and when: the landing that rests in it, or the one that lands meanwhile
DEATHS = [("nobody", ""), *itertools.product(("resting", "meanwhile"), ("before", "after"))]


@pytest.mark.parametrize("tables", ["one table", "two tables"])
@pytest.mark.parametrize("rests", ["first", pytest.param("second", marks=pytest.mark.long)])
@pytest.mark.parametrize("how", HOW)
def test_two_rounds_of_a_job_that_land_at_once_leave_each_row_its_best_outcome(
    pair: tuple[Warehouse, Results], how: str, rests: str, tables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round lands while the other rests in its flip, and either is killed there. Two tables have two turns; in one table the later
    landing takes the turn and notes what the other has published. The first round has landed in a third table before.
    """
    warehouse, results = pair
    monkeypatch.setattr(elsewhere, "TURN_S", 0.3)
    rows = [{"id": 1, "name": "late [[sim:expired-once]]"}, {"id": 2, "name": "fine"}, {"id": 3, "name": "never [[sim:overloaded]]"}]
    for number, (who, when) in enumerate(DEATHS):
        run, prompt = f"run-{number}", f"{{{{ row.name }}}} {number}"
        (first,) = warehouse.submit(rows, prompt=prompt, run_id=run).batch_ids
        warehouse.fetch([first], "before", into=results.adapter, disposition=how, run_id=run)
        again = warehouse.submit(rows, prompt=prompt, round_number=2, only=["[1]", "[3]"], run_id=run).batch_ids
        (second,) = [batch_id for batch_id in again if batch_id != first]
        rounds = {"first": (f"first_{number}", [first]), "second": (f"second_{number}", [second])}
        if tables == "one table":
            # a replace by the second round alone would rightly delete the first one's rows
            rounds["second"] = (f"first_{number}", [first, second] if how == "replace" else [second])

        def land(which: str, _rounds: dict[str, tuple[str, list[str]]] = rounds, _run: str = run) -> None:
            table, ids = _rounds[which]
            warehouse.fetch(ids, table, into=results.adapter, disposition=how, include_failed=True, run_id=_run)

        def rest(which: str, dies: str, meanwhile: Callable[[], None] = lambda: None, _land: Callable[[str], None] = land) -> None:
            """Land a round and do something else just before its flip; ``dies`` is "before", "after" or nothing."""

            def in_flip(real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
                patch.undo()
                meanwhile()
                found = None if dies == "before" else real(*arguments, **more)
                if dies:
                    at("ledger", "give_turn_back", warehouse, results, patch, lambda *_: None)
                    raise Killed
                return found

            with monkeypatch.context() as patch, pytest.raises(Killed) if dies else contextlib.nullcontext():
                at("module", "flip", warehouse, results, patch, in_flip)
                _land(which)

        other = "second" if rests == "first" else "first"
        rest(rests, when if who == "resting" else "", functools.partial(rest, other, when if who == "meanwhile" else ""))
        for which in (rests, other):
            land(which)
        of_job = f"WHERE job_id = '{warehouse.job(run).job_id}'"
        (last,) = warehouse.rows(f"SELECT shard FROM batchkit_batch WHERE batch_id = '{second}'")
        failed = warehouse.rows(f"SELECT key, status, shard FROM batchkit_failed {of_job}")
        assert failed == [{"key": "[3]", "status": "errored", "shard": last["shard"]}], (who, when)
        found = {row["key"]: row["status"] for row in warehouse.rows(f"SELECT key, status FROM batchkit_request {of_job}")}
        assert found == {"[1]": "succeeded", "[2]": "succeeded", "[3]": "errored"}, (who, when)
        landed = warehouse.rows(f"SELECT batch_id FROM batchkit_landing WHERE batch_id IN ('{first}', '{second}')")
        assert sorted(row["batch_id"] for row in landed) == sorted([first, first, second]), (who, when)
        best = [(1, "succeeded", second), (2, "succeeded", first), (3, "errored", second)]
        alone = [(1, "expired", first), (2, "succeeded", first), (3, "errored", first)]
        there = {f"first_{number}": best} if tables == "one table" else {f"first_{number}": alone, f"second_{number}": [best[0], best[2]]}
        for table, expected in there.items():
            assert sorted(results.rows(f"SELECT id, status, batch_id FROM {table}")) == expected, (who, when, table)
    if how != "replace":
        # there, what a killed worker prepared for the first round alone stays when both rounds land as one load
        assert warehouse.rows("SELECT * FROM batchkit_prepared") == []


_CHILD = """
import os, sys
import duckdb, sqlalchemy as sa
from airflow_provider_batchkit.landing import elsewhere
from airflow_provider_batchkit.landing.warehouse import warehouse_of
from tests.warehouse import Warehouse, kit_for
folder, base_url, batch_id, where, name, when, how, run = sys.argv[1:]
warehouse = Warehouse(sa.create_engine(f"sqlite:///{folder}/ledger.db", poolclass=sa.pool.NullPool), kit_for(base_url))
adapter = warehouse_of("duckdb", "results", lambda: duckdb.connect(f"{folder}/results.duckdb"))
owner = {"ledger": warehouse.ledger, "results": adapter, "module": elsewhere}[where]
real = getattr(owner, name)
def die(*a, **k):
    if when == "after":
        real(*a, **k)
    os._exit(9)
setattr(owner, name, die)
warehouse.fetch([batch_id], into=adapter, disposition=how, run_id=run)
"""


@pytest.mark.parametrize("how", HOW)
def test_a_process_that_ends_at_once_loses_nothing(
    sim: Simulator, tmp_path: Path, request: pytest.FixtureRequest, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``os._exit`` in a process of its own, SQLite and DuckDB: what is not committed is gone, and locks are free."""
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    monkeypatch.setattr(elsewhere, "TURN_S", 0.3)
    warehouse = Warehouse(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db", poolclass=sa.pool.NullPool), kit_for(sim.base_url))
    landed: list[str] = []
    with results_in("duckdb", tmp_path, request) as results:
        steps = [
            ("ledger", "prepare_load", "after"),
            ("results", "stage", "after"),
            ("results", "publish", "after"),
            ("module", "flip", "after"),
        ]
        for number, step in enumerate(steps):
            (batch_id,) = submit(warehouse, f"run-{number}")
            arguments = [str(tmp_path), sim.base_url, batch_id, *step, how, f"run-{number}"]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
            child = subprocess.run([sys.executable, "-c", textwrap.dedent(_CHILD), *arguments], env=environment, timeout=120, check=False)
            assert child.returncode == 9
            warehouse.fetch([batch_id], into=results.adapter, disposition=how, run_id=f"run-{number}")
            landed.append(batch_id)
            check(warehouse, results, landed, how)

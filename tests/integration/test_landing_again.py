"""What lands where, and what a fetch that runs again may touch: nothing newer is overwritten, nothing good deleted, nothing left out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.cost.budget import Budget
from airflow_provider_batchkit.exceptions import (
    BatchGoneError,
    BatchInputError,
    BatchNotEndedError,
    BatchNotVisibleError,
    ReplaceRefusedError,
    ResultStreamError,
    WrongBatchError,
)
from airflow_provider_batchkit.jobs.caps import Limits
from airflow_provider_batchkit.jobs.submit import failed_keys_of
from airflow_provider_batchkit.ledger import BatchState
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings, answer_for
from tests.databases import Database
from tests.warehouse import Warehouse, kit_for

SETTLE = 0.8


@pytest.fixture
def warehouse(database: Database, sim: Simulator) -> Warehouse:
    return Warehouse(database.engine(), kit_for(sim.base_url))


def products(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}"} for i in range(start, start + count)]


def responses(warehouse: Warehouse, table: str = "answers") -> dict[int, str]:
    return {row["id"]: row["response"] for row in warehouse.rows(f"SELECT id, response FROM {table}")}


# --- a fetch that has landed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disposition", ["merge", "append", "replace"])
def test_an_older_runs_fetch_that_runs_again_leaves_newer_answers_alone(warehouse: Warehouse, disposition: str) -> None:
    """Monday's fetch is cleared after Tuesday's has landed: its summary is the old one, and the table is Tuesday's."""
    monday = warehouse.submit(products(3), run_id="monday", prompt="Monday {{ row.name }}").batch_ids
    first = warehouse.fetch(monday, run_id="monday", disposition=disposition)
    tuesday = warehouse.submit(products(3), run_id="tuesday", prompt="Tuesday {{ row.name }}").batch_ids
    warehouse.fetch(tuesday, run_id="tuesday", disposition=disposition)
    before = warehouse.rows("SELECT id, response, batch_id FROM answers ORDER BY id, response")
    again = warehouse.fetch(monday, run_id="monday", disposition=disposition)
    assert (again.rows, again.counts, again.tally, again.batch_ids) == (first.rows, first.counts, first.tally, first.batch_ids)
    assert warehouse.rows("SELECT id, response, batch_id FROM answers ORDER BY id, response") == before
    # unless the user insists
    warehouse.fetch(monday, run_id="monday", disposition=disposition, rewrite=True)
    assert answer_for("Monday product 0") in responses(warehouse).values()


@pytest.mark.parametrize("lost", ["DROP TABLE answers", "DELETE FROM answers"])
@pytest.mark.parametrize("disposition", ["merge", "append", "replace"])
def test_a_table_that_is_missing_or_empty_is_filled_anew(warehouse: Warehouse, lost: str, disposition: str) -> None:
    """From the same results, for free."""
    ids = warehouse.submit(products(4), max_requests=2).batch_ids
    warehouse.fetch(ids, disposition=disposition)
    warehouse.execute(lost)
    assert warehouse.fetch(ids, disposition=disposition).rows == 4
    assert sorted(responses(warehouse)) == [0, 1, 2, 3]
    assert {row["number"] for row in warehouse.rows("SELECT number FROM batchkit_landing")} == {1, 2}


def test_filling_a_table_anew_goes_on_where_it_broke_off(warehouse: Warehouse, sim: Simulator) -> None:
    """The first batch is in the table again, the second not yet, when the fetch is killed: the retry brings the second."""
    ids = warehouse.submit(products(4), max_requests=2).batch_ids
    warehouse.fetch(ids)
    warehouse.execute("DELETE FROM answers")
    sim.faults.add("status", endpoint="results", batch=ids[1], status=404, times=None)
    with pytest.raises(BatchNotVisibleError):
        warehouse.fetch(ids, sleep=lambda _: None)
    assert sorted(responses(warehouse)) == [0, 1]
    sim.faults.clear()
    warehouse.fetch(ids)
    assert sorted(responses(warehouse)) == [0, 1, 2, 3]


def test_a_second_table_is_a_landing_of_its_own(warehouse: Warehouse) -> None:
    """The same batch in two tables, and each fetch writes nothing again."""
    ids = warehouse.submit(products(2)).batch_ids
    for _ in range(2):
        for table in ("one", "two"):
            warehouse.fetch(ids, table)
    rows = warehouse.rows("SELECT table_name, number FROM batchkit_landing ORDER BY table_name")
    assert [(row["table_name"].rpartition(".")[2], row["number"]) for row in rows] == [("one", 1), ("two", 1)]
    assert warehouse.ledger.find(ids[0]).state is BatchState.LANDED  # type: ignore[union-attr]


def test_a_batch_of_somebody_else_is_not_written_twice_either(warehouse: Warehouse) -> None:
    """A batch that this provider did not submit, in append mode."""
    ids = warehouse.kit.submit(["a", "b"], model="claude-haiku-5-5", max_tokens=5)
    first = warehouse.fetch(ids, disposition="append")
    warehouse.execute("UPDATE answers SET response = 'newer'")
    assert warehouse.fetch(ids, disposition="append").counts == first.counts
    assert {row["response"] for row in warehouse.rows("SELECT response FROM answers")} == {"newer"}


def test_two_fetches_of_one_batch_at_once_write_it_once(warehouse: Warehouse, database: Database, sim: Simulator) -> None:
    """A zombie and its retry: whoever comes second looks again under the table's lock, and writes nothing."""
    ids = warehouse.submit(products(50)).batch_ids
    sim.faults.add("trickle", seconds=0.01, times=2)
    reports = []

    def fetch() -> None:
        own = Warehouse(database.engine(), kit_for(sim.base_url))
        reports.append(own.fetch(ids, disposition="append"))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.rows for report in reports] == [50, 50]
    assert sorted(len(report.first) for report in reports) == [0, 1]
    assert warehouse.rows("SELECT COUNT(*) AS n FROM answers") == [{"n": 50}]
    assert warehouse.rows("SELECT COUNT(*) AS n FROM batchkit_landing") == [{"n": 1}]


def test_rows_that_are_added_while_their_batch_lands_are_not_left_out(warehouse: Warehouse, sim: Simulator, database: Database) -> None:
    """A submit that runs again adds a row that shares a request, between the reading of the results and the landing."""
    ids = warehouse.submit(products(3)).batch_ids
    rows = [*products(3), {"id": 9, "name": "product 1"}]
    other = Warehouse(database.engine(), kit_for(sim.base_url))
    read = warehouse.kit.read_blocks
    added: list[Any] = []

    def reading(*args: Any) -> Iterator[Any]:
        yield from read(*args)
        if not added:
            added.append(other.submit(rows))

    warehouse.kit.read_blocks = reading  # type: ignore[method-assign,assignment]  # the submit comes when the last result has been read
    warehouse.fetch(ids)
    assert added[0].copies == 1
    assert responses(warehouse)[9] == answer_for("About product 1")


@pytest.mark.parametrize("deleted", [True, False])
def test_a_new_row_that_asks_what_a_landed_batch_has_answered_gets_its_answer(warehouse: Warehouse, sim: Simulator, deleted: bool) -> None:
    """A cleared run whose source has gained a row: it is asked, since its answer will not come with the landed batch."""
    first = warehouse.submit(products(3)).batch_ids
    warehouse.fetch(first)
    if deleted:
        warehouse.kit.delete(first[0])
    report = warehouse.submit([*products(3), {"id": 9, "name": "product 1"}, {"id": 10, "name": "product 1"}])
    assert (report.asked, report.copies, report.known) == (1, 1, 3)
    warehouse.fetch(report.batch_ids)
    assert responses(warehouse) == {
        **{i: answer_for(f"About product {i}") for i in range(3)},
        9: answer_for("About product 1"),
        10: answer_for("About product 1"),
    }


# --- nothing to land --------------------------------------------------------------------------------------------------------------


def test_a_fetch_without_batches_makes_no_table(warehouse: Warehouse) -> None:
    """The first run had no rows: a later one with rows makes the table with its own key."""
    assert warehouse.fetch([]).rows == 0
    assert not sa.inspect(warehouse.engine).has_table("answers")
    warehouse.fetch(warehouse.submit(products(2)).batch_ids)
    assert sorted(responses(warehouse)) == [0, 1]


def test_a_replace_without_batches_leaves_the_old_rows(warehouse: Warehouse) -> None:
    """Nothing was asked, so nothing takes their place."""
    warehouse.fetch(warehouse.submit(products(2)).batch_ids, disposition="replace")
    assert warehouse.fetch([], disposition="replace").batch_ids == []
    assert sorted(responses(warehouse)) == [0, 1]


# --- the floor of replace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"kind": "cut_results", "line": 3, "clean": True}, id="half a stream"),
        pytest.param({"kind": "missing_line", "line": 2}, id="a missing line"),
    ],
)
def test_replace_keeps_the_old_rows_when_a_line_is_missing(warehouse: Warehouse, sim: Simulator, fault: dict[str, Any]) -> None:
    """The task fails and says so, in a way that a retry may overcome; with the whole stream the rows are replaced."""
    warehouse.fetch(warehouse.submit(products(3), run_id="old", prompt="Old {{ row.name }}").batch_ids, run_id="old")
    ids = warehouse.submit(products(5), max_requests=4).batch_ids
    sim.faults.add(batch=ids[0], times=None, **fault)
    with pytest.raises(ReplaceRefusedError, match=r"Nothing was written or deleted: the old rows stay") as caught:
        warehouse.fetch(ids, disposition="replace")
    assert (caught.value.retryable, caught.value.torn) == (True, True)
    assert responses(warehouse) == {i: answer_for(f"Old product {i}") for i in range(3)}
    assert {b.state for b in warehouse.ledger.batches(warehouse.job().job_id)} == {BatchState.SUBMITTED}
    sim.faults.clear()
    warehouse.fetch(ids, disposition="replace")
    assert responses(warehouse) == {i: answer_for(f"About product {i}") for i in range(5)}


def test_replace_keeps_the_old_rows_when_the_stream_is_empty(warehouse: Warehouse, sim: Simulator) -> None:
    """Nothing, where the API counts results, is no answer of the API: a retry may overcome it, and nothing is noted of the rows."""
    warehouse.fetch(warehouse.submit(products(3), run_id="old", prompt="Old {{ row.name }}").batch_ids, run_id="old")
    ids = warehouse.submit(products(5), max_requests=4).batch_ids
    sim.faults.add("cut_results", batch=ids[0], times=None, line=1, clean=True)
    with pytest.raises(ResultStreamError, match=r"which is empty.*the API counts 4 results") as caught:
        warehouse.fetch(ids, disposition="replace")
    assert caught.value.retryable
    assert responses(warehouse) == {i: answer_for(f"Old product {i}") for i in range(3)}
    assert {b.state for b in warehouse.ledger.batches(warehouse.job().job_id)} == {BatchState.SUBMITTED}
    sim.faults.clear()
    warehouse.fetch(ids, disposition="replace")
    assert responses(warehouse) == {i: answer_for(f"About product {i}") for i in range(5)}


def test_replace_keeps_the_old_rows_when_a_gateway_answers_with_a_page(warehouse: Warehouse) -> None:
    """HTML with 200 in place of the results: no line of it can be read."""
    warehouse.fetch(warehouse.submit(products(3), run_id="old").batch_ids, run_id="old")
    ids = warehouse.submit(products(3), prompt="New {{ row.name }}").batch_ids
    page = b"<html>\n<body>Please log in</body>\n</html>\n"
    warehouse.kit.stream_results = lambda *_, **__: iter([page])  # type: ignore[method-assign,assignment]  # the gateway
    with pytest.raises(ReplaceRefusedError, match="3 requests without a result line, 3 unreadable lines"):
        warehouse.fetch(ids, disposition="replace")
    assert sorted(responses(warehouse)) == [0, 1, 2]


def test_replace_keeps_the_old_rows_when_nothing_was_answered(warehouse: Warehouse, sim: Simulator) -> None:
    """Every row errored: lines for all, answers for none."""
    warehouse.fetch(warehouse.submit(products(3), run_id="old").batch_ids, run_id="old")
    sim.set(errored=1.0)
    ids = warehouse.submit(products(3), prompt="New {{ row.name }}").batch_ids
    with pytest.raises(ReplaceRefusedError, match="none of 3 rows has an answer") as caught:
        warehouse.fetch(ids, disposition="replace")
    assert not caught.value.torn
    assert sorted(responses(warehouse)) == [0, 1, 2]


def test_replace_with_some_failed_rows_replaces(warehouse: Warehouse, sim: Simulator) -> None:
    """A row that the API failed has a line: it is an outcome, and no reason to keep last month's table."""
    warehouse.fetch(warehouse.submit(products(9), run_id="old").batch_ids, run_id="old")
    sim.set(errored=0.5)
    landed = warehouse.fetch(warehouse.submit(products(9), prompt="New {{ row.name }}").batch_ids, disposition="replace")
    assert 0 < landed.rows < 9
    assert len(responses(warehouse)) == landed.rows


def test_replace_of_changed_rows_alone_is_refused_before_it_deletes(warehouse: Warehouse) -> None:
    """The ledger knows that the job left out what is unchanged."""
    warehouse.fetch(warehouse.submit(products(3), run_id="january").batch_ids, run_id="january")
    ids = warehouse.submit([*products(2), {"id": 2, "name": "new"}], run_id="february", skip_unchanged=True).batch_ids
    with pytest.raises(BatchInputError, match=r"skip_unchanged.*Nothing was deleted"):
        warehouse.fetch(ids, run_id="february", disposition="replace")
    assert sorted(responses(warehouse)) == [0, 1, 2]
    warehouse.fetch(ids, run_id="february")
    assert responses(warehouse)[2] == answer_for("About new")


# --- skip_unchanged ---------------------------------------------------------------------------------------------------------------


def test_a_task_of_the_same_run_does_not_count_as_an_earlier_one(warehouse: Warehouse) -> None:
    """Two mapped tasks of one run, the same rows into two tables: each asks its own."""
    first = warehouse.submit(products(3), map_index=0, skip_unchanged=True)
    warehouse.fetch(first.batch_ids, "one")
    second = warehouse.submit(products(3), map_index=1, skip_unchanged=True)
    assert (second.asked, second.unchanged) == (3, 0)


def test_what_landed_in_another_table_does_not_count(warehouse: Warehouse) -> None:
    """The task knows its table: an answer that is in another one is not in this one."""
    warehouse.fetch(warehouse.submit(products(3), run_id="january").batch_ids, "one", run_id="january")
    assert warehouse.submit(products(3), run_id="february", skip_unchanged=True, table="two").asked == 3
    assert warehouse.submit(products(3), run_id="march", skip_unchanged=True, table="one").asked == 0


def test_an_earlier_run_that_landed_in_several_tables_counts_only_where_the_table_is_known(warehouse: Warehouse) -> None:
    """Nothing tells which answer is in which table: the rows are asked."""
    for number, table in enumerate(("one", "two")):
        report = warehouse.submit(products(3), run_id="january", map_index=number)
        warehouse.fetch(report.batch_ids, table, run_id="january")
    assert warehouse.submit(products(3), run_id="february", skip_unchanged=True).asked == 3
    assert warehouse.submit(products(3), run_id="march", map_index=1, skip_unchanged=True, table="two").unchanged == 3


# --- batches that are not the row's, or not there ---------------------------------------------------------------------------------


def _swap(warehouse: Warehouse, first: str, second: str) -> None:
    """What must never happen: two rows with each other's batch."""
    warehouse.execute(
        f"UPDATE batchkit_batch SET batch_id = 'x' WHERE batch_id = '{first}'",
        f"UPDATE batchkit_batch SET batch_id = '{first}' WHERE batch_id = '{second}'",
        f"UPDATE batchkit_batch SET batch_id = '{second}' WHERE batch_id = 'x'",
    )


def test_a_batch_with_another_jobs_answers_is_refused_whole(warehouse: Warehouse) -> None:
    """Whatever led to it: nothing is written, the batch is named, and a person can decide."""
    one = warehouse.submit(products(3), run_id="one", prompt="One {{ row.name }}").batch_ids[0]
    two = warehouse.submit(products(3), run_id="two", prompt="Two {{ row.name }}").batch_ids[0]
    _swap(warehouse, one, two)
    with pytest.raises(WrongBatchError, match=rf"{two} has 3 results that .* did not ask.*Nothing of it was written.*settle \w+ 0 "):
        warehouse.fetch([two], "answers_one", run_id="one")
    assert warehouse.rows("SELECT COUNT(*) AS n FROM answers_one") == [{"n": 0}]
    assert [b.state for b in warehouse.ledger.batches(warehouse.job("one").job_id)] == [BatchState.SUBMITTED]


def test_a_line_that_nobody_asked_is_left_out_where_every_answer_is_there(warehouse: Warehouse, sim: Simulator) -> None:
    """A stray line beside a whole batch: the batch lands, the line does not, and it is counted."""
    ids = warehouse.submit(products(3)).batch_ids
    sim.faults.add("foreign_line", line=2, times=None)
    landed = warehouse.fetch(ids)
    assert (landed.rows, landed.faults.foreign, landed.complete_ids) == (3, 1, [])


def test_a_batch_with_a_stray_line_in_place_of_an_answer_is_refused(warehouse: Warehouse, sim: Simulator) -> None:
    """It may be another job's: nothing of it is written."""
    ids = warehouse.submit(products(3)).batch_ids
    sim.faults.add("foreign_line", line=2, times=None)
    sim.faults.add("missing_line", line=2, times=None)
    with pytest.raises(WrongBatchError):
        warehouse.fetch(ids)
    assert warehouse.rows("SELECT COUNT(*) AS n FROM answers") == [{"n": 0}]


def test_a_batch_of_another_ledger_is_not_landed_as_a_strangers(warehouse: Warehouse, sim: Simulator, tmp_path: Any) -> None:
    """Its rows would be keyed by custom_id, in a table of their own kind."""
    other = Warehouse(sa.create_engine(f"sqlite:///{tmp_path / 'other.db'}", poolclass=sa.pool.NullPool), kit_for(sim.base_url))
    ids = other.submit(products(3)).batch_ids
    with pytest.raises(WrongBatchError, match="was sent by this provider for job"):
        warehouse.fetch(ids)
    assert not sa.inspect(warehouse.engine).has_table("answers") or warehouse.rows("SELECT * FROM answers") == []


def test_a_batch_that_answers_404_for_a_moment_lands(warehouse: Warehouse, sim: Simulator) -> None:
    """For a look, and for the results after the end."""
    ids = warehouse.submit(products(3)).batch_ids
    sim.faults.add("status", endpoint="retrieve", status=404)
    sim.faults.add("status", endpoint="results", status=404, times=2)
    assert warehouse.fetch(ids).rows == 3
    record = warehouse.ledger.find(ids[0])
    assert record is not None
    assert (record.state, record.unseen_since) == (BatchState.LANDED, None)


def test_a_batch_that_is_not_visible_is_waited_for_before_it_is_called_gone(warehouse: Warehouse, sim: Simulator) -> None:
    """The error says how long to wait; other batches of the fetch land meanwhile."""
    ids = warehouse.submit(products(4), max_requests=2).batch_ids
    sim.faults.add("status", endpoint="retrieve", batch=ids[0], status=404, times=None)
    with pytest.raises(BatchNotVisibleError) as caught:
        warehouse.fetch(ids, sleep=lambda _: None)
    assert (caught.value.retryable, caught.value.wait.batch_ids, caught.value.wait.about) == (True, (), "unseen")
    assert sorted(responses(warehouse)) == [2, 3]
    sim.faults.clear()
    warehouse.fetch(ids)
    assert sorted(responses(warehouse)) == [0, 1, 2, 3]


def test_a_deleted_batch_becomes_gone_and_keeps_its_money(warehouse: Warehouse, sim: Simulator) -> None:
    """It may have been billed: the budget counts its bound. Its rows are asked again when the user says so, and not by themselves."""
    budget = Budget.parse({"name": "catalog", "usd": "1"})
    ids = warehouse.submit(products(4), max_requests=2, limits=Limits(budget=budget)).batch_ids
    warehouse.kit.delete(ids[0])
    with pytest.raises(BatchGoneError, match=rf"{ids[0]} was not visible from .*retry_gone=True") as caught:
        warehouse.fetch(ids, settle_seconds=SETTLE)
    assert caught.value.retryable, "what answers 404 may be back: a retry looks again"
    assert sorted(responses(warehouse)) == [2, 3]
    gone = warehouse.ledger.find(ids[0])
    assert gone is not None
    assert gone.state is BatchState.GONE
    status = warehouse.ledger.budget_status("catalog")
    assert status is not None
    assert status.reserved_usd > 0
    # a cleared submit asks nothing again
    again = warehouse.submit(products(4), max_requests=2)
    assert (again.asked, again.known, again.batch_ids) == (0, 4, ids)
    with pytest.raises(BatchInputError, match="retry_gone=True"):
        list(failed_keys_of(warehouse.ledger, ids, dag_id="dag", run_id="run-1"))
    keys = failed_keys_of(warehouse.ledger, ids, dag_id="dag", run_id="run-1", gone=True)
    assert warehouse.submit(products(4), run_id="again", only=keys).asked == 2


def test_a_gone_batch_that_is_visible_again_lands(warehouse: Warehouse, sim: Simulator) -> None:
    """What was hidden for longer than the waiting is not lost."""
    warehouse.submit(products(1), run_id="witness")
    ids = warehouse.submit(products(2)).batch_ids
    sim.faults.add("status", endpoint="retrieve", batch=ids[0], status=404, times=None)
    with pytest.raises(BatchGoneError):
        warehouse.fetch(ids, settle_seconds=SETTLE)
    sim.faults.clear()
    assert warehouse.fetch(ids).rows == 2


def test_two_passing_404s_far_apart_do_not_make_a_batch_gone(warehouse: Warehouse, sim: Simulator) -> None:
    """Hidden once after its creation, seen in between, and once more without results after its end."""
    warehouse.submit(products(1), run_id="witness")
    sim.set(clock="manual")
    ids = warehouse.submit(products(2)).batch_ids
    sim.faults.add("status", endpoint="retrieve", batch=ids[0], status=404)
    with pytest.raises(BatchNotEndedError):
        warehouse.fetch(ids, settle_seconds=5)
    time.sleep(0.3)
    sim.end(ids[0])
    sim.faults.add("status", endpoint="results", batch=ids[0], status=404)
    assert warehouse.fetch(ids, settle_seconds=SETTLE).rows == 2


def test_results_that_answer_404_for_long_fail_in_a_way_that_a_retry_may_overcome(warehouse: Warehouse, sim: Simulator) -> None:
    """The batch itself is visible, so it is not gone."""
    warehouse.submit(products(1), run_id="witness")
    ids = warehouse.submit(products(2)).batch_ids
    sim.faults.add("status", endpoint="results", batch=ids[0], status=404, times=None)
    time.sleep(0.3)
    with pytest.raises(BatchNotVisibleError) as caught:
        warehouse.fetch(ids, settle_seconds=SETTLE, sleep=lambda _: None)
    assert caught.value.retryable
    assert warehouse.ledger.find(ids[0]).state is BatchState.SUBMITTED  # type: ignore[union-attr]
    sim.faults.clear()
    assert warehouse.fetch(ids).rows == 2


@pytest.mark.parametrize("disposition", ["merge", "append", "replace"])
@pytest.mark.parametrize("order", [("monday", "tuesday"), ("tuesday", "monday")])
def test_a_table_that_several_runs_have_filled_is_filled_anew_by_each(
    warehouse: Warehouse, disposition: str, order: tuple[str, str]
) -> None:
    """It was dropped, and the fetches of both runs are cleared, in one order or the other: it is what it was."""
    runs = {"monday": products(3), "tuesday": products(3, 2)}
    ids = {run: warehouse.submit(rows, run_id=run, prompt=f"{run} {{{{ row.name }}}}").batch_ids for run, rows in runs.items()}
    for run in runs:
        warehouse.fetch(ids[run], run_id=run, disposition=disposition)
    query = "SELECT id, response FROM answers ORDER BY id, response"
    before = warehouse.rows(query)
    for _ in range(2):
        warehouse.execute("DROP TABLE answers")
        for run in order:
            warehouse.fetch(ids[run], run_id=run, disposition=disposition)
        assert warehouse.rows(query) == before
    # and stays so
    warehouse.fetch(ids["monday"], run_id="monday", disposition=disposition)
    assert warehouse.rows(query) == before


def test_answers_that_come_late_take_the_place_of_older_ones_and_not_of_newer_ones(warehouse: Warehouse, sim: Simulator) -> None:
    """Monday's rows are older than Tuesday's torn landing, Wednesday's are newer."""
    for run, rows in (("monday", products(4)), ("tuesday", products(4)), ("wednesday", products(1))):
        ids = warehouse.submit(rows, run_id=run, prompt=f"{run} {{{{ row.name }}}}").batch_ids
        if run == "tuesday":
            torn = ids
            sim.faults.add("cut_results", batch=ids[0], line=2, clean=True, times=None)
        warehouse.fetch(ids, run_id=run)
    assert sum("tuesday" in response for response in responses(warehouse).values()) <= 1
    sim.faults.clear()
    warehouse.fetch(torn, run_id="tuesday")
    assert responses(warehouse) == {
        0: answer_for("wednesday product 0"),
        **{i: answer_for(f"tuesday product {i}") for i in range(1, 4)},
    }


def test_insisting_on_one_run_does_not_unsettle_the_others(warehouse: Warehouse) -> None:
    """Monday's answers are written over Tuesday's because the user says so; Tuesday's fetch, cleared, leaves them."""
    ids = {run: warehouse.submit(products(2), run_id=run, prompt=f"{run} {{{{ row.name }}}}").batch_ids for run in ("monday", "tuesday")}
    for run, batch_ids in ids.items():
        warehouse.fetch(batch_ids, run_id=run)
    warehouse.fetch(ids["monday"], run_id="monday", rewrite=True)
    for run, batch_ids in ids.items():
        warehouse.fetch(batch_ids, run_id=run)
    assert responses(warehouse) == {i: answer_for(f"monday product {i}") for i in range(2)}


@pytest.mark.parametrize("disposition", ["merge", "append"])
def test_a_table_that_several_tasks_of_a_run_fill_is_filled_anew_by_each(warehouse: Warehouse, disposition: str) -> None:
    """Mapped fetches into one table, which was dropped: none of them takes the others' rows for its own."""
    reports = [warehouse.submit(products(2, 10 * number), map_index=number) for number in range(3)]
    for _ in range(2):
        for report in reports:
            assert warehouse.fetch(report.batch_ids, disposition=disposition).rows == 2
        assert sorted(responses(warehouse)) == [0, 1, 10, 11, 20, 21]
        assert warehouse.rows("SELECT COUNT(*) AS n FROM answers") == [{"n": 6}]
        warehouse.execute("DROP TABLE answers")


def test_a_slow_refill_does_not_overwrite_what_another_run_has_filled(warehouse: Warehouse, database: Database, sim: Simulator) -> None:
    """Both found the table empty; the younger run filled it while the older one read its results."""
    monday = warehouse.submit(products(2), run_id="monday", prompt="Monday {{ row.name }}").batch_ids
    tuesday = warehouse.submit(products(2), run_id="tuesday", prompt="Tuesday {{ row.name }}").batch_ids
    for run, ids in (("monday", monday), ("tuesday", tuesday)):
        warehouse.fetch(ids, run_id=run)
    warehouse.execute("DELETE FROM answers")
    other = Warehouse(database.engine(), kit_for(sim.base_url))
    read = warehouse.kit.read_blocks
    filled: list[Any] = []

    def reading(*args: Any) -> Iterator[Any]:
        yield from read(*args)
        if not filled:
            filled.append(other.fetch(tuesday, run_id="tuesday"))

    warehouse.kit.read_blocks = reading  # type: ignore[method-assign,assignment]  # the other comes when the last result has been read
    warehouse.fetch(monday, run_id="monday")
    assert responses(warehouse) == {i: answer_for(f"Tuesday product {i}") for i in range(2)}


def test_a_torn_landing_in_one_table_is_completed_there_whatever_lands_elsewhere(warehouse: Warehouse, sim: Simulator) -> None:
    """What one table lacks is seen in that table."""
    ids = warehouse.submit(products(4)).batch_ids
    sim.faults.add("missing_line", line=2, times=None)
    warehouse.fetch(ids, "one", include_failed=True, disposition="append")
    sim.faults.clear()
    warehouse.fetch(ids, "two")
    warehouse.fetch(ids, "one", include_failed=True, disposition="append")
    assert warehouse.rows("SELECT COUNT(*) AS n, COUNT(DISTINCT id) AS ids FROM one WHERE status = 'succeeded'") == [{"n": 4, "ids": 4}]
    assert warehouse.rows("SELECT COUNT(*) AS n FROM one") == [{"n": 4}]


def test_a_replace_after_a_torn_merge_deletes_nothing(warehouse: Warehouse, sim: Simulator) -> None:
    """What landed by merge is there; the replace has nothing to add to it."""
    ids = warehouse.submit(products(4)).batch_ids
    sim.faults.add("missing_line", line=2, times=None)
    warehouse.fetch(ids)
    sim.faults.clear()
    warehouse.fetch(ids, disposition="replace")
    assert len(responses(warehouse)) == 3
    warehouse.fetch(ids, disposition="replace", rewrite=True)
    assert len(responses(warehouse)) == 4


def test_a_replace_with_a_gone_batch_deletes_nothing(warehouse: Warehouse, sim: Simulator) -> None:
    """Also when the submit was cleared in between: its output still names the batch that is gone."""
    warehouse.fetch(warehouse.submit(products(4), run_id="old", prompt="Old {{ row.name }}").batch_ids, run_id="old")
    ids = warehouse.submit(products(4), max_requests=2).batch_ids
    warehouse.kit.delete(ids[0])
    for _ in range(2):
        with pytest.raises(BatchGoneError):
            warehouse.fetch(warehouse.submit(products(4), max_requests=2).batch_ids, disposition="replace", settle_seconds=SETTLE)
    assert responses(warehouse) == {i: answer_for(f"Old product {i}") for i in range(4)}


def test_figures_of_what_landed_before_a_wait_are_kept(warehouse: Warehouse, sim: Simulator) -> None:
    """The metrics count each batch once, also when the fetch had to look again for another one."""
    ids = warehouse.submit(products(4), max_requests=2).batch_ids
    sim.faults.add("status", endpoint="retrieve", batch=ids[1], status=404)
    assert [figures.batch_id for figures in warehouse.fetch(ids).first] == ids


def test_what_lands_last_in_a_table_decides_what_is_unchanged_there(warehouse: Warehouse) -> None:
    """An older run that lands in another table later is no newer answer in this one."""
    row, changed = [{"id": 1, "name": "a"}], [{"id": 1, "name": "b"}]
    monday = warehouse.submit(row, run_id="monday").batch_ids
    warehouse.fetch(monday, "t", run_id="monday")
    warehouse.fetch(warehouse.submit(changed, run_id="tuesday").batch_ids, "t", run_id="tuesday")
    warehouse.fetch(monday, "t2", run_id="monday")
    assert warehouse.submit(changed, run_id="wednesday", skip_unchanged=True, table="t").asked == 0
    assert warehouse.submit(row, run_id="thursday", skip_unchanged=True, table="t").asked == 1


def test_mapped_tasks_with_a_table_each_skip_what_their_own_instance_has_answered(
    warehouse: Warehouse, caplog: pytest.LogCaptureFixture
) -> None:
    """They do not name their tables: the same map index landed in one table, and that counts; the others' do not."""
    for number, table in enumerate(("one", "two")):
        warehouse.fetch(warehouse.submit(products(3), run_id="january", map_index=number).batch_ids, table, run_id="january")
    for number in range(2):
        assert warehouse.submit(products(3), run_id="february", map_index=number, skip_unchanged=True).unchanged == 3
    assert warehouse.submit(products(3), run_id="february", map_index=2, skip_unchanged=True).asked == 3
    assert "this task does not say which one is its own" in caplog.text


def test_a_key_of_another_workspace_makes_nothing_gone(database: Database) -> None:
    """None of the connection's batches is visible, so this one's absence proves nothing."""
    with Simulator(SimulatorSettings(keys={"test-key": "a", "other": "b"})) as sim:
        warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
        ids = warehouse.submit(products(2)).batch_ids
        sim.set(keys={"test-key": "b"})
        with pytest.raises(BatchNotVisibleError, match="another workspace"):
            warehouse.fetch(ids, settle_seconds=SETTLE)
        assert warehouse.ledger.find(ids[0]).state is BatchState.SUBMITTED  # type: ignore[union-attr]
        sim.set(keys={"test-key": "a"})
        assert warehouse.fetch(ids).rows == 2

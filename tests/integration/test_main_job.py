"""Rows in, answers and the bill out: submit and fetch on real databases, against the simulator over HTTP."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from functools import partial
from typing import Any

import pytest

from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.cost.tally import reprice
from airflow_provider_batchkit.exceptions import BatchInputError, RequestError, ResultStreamError, TableError
from airflow_provider_batchkit.landing.stage import AskedKeys
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings, answer_for
from tests.databases import Database
from tests.warehouse import LANDING_PATHS, Warehouse, kit_for


@pytest.fixture(params=LANDING_PATHS)
def path(request: pytest.FixtureRequest) -> str:
    """A test that takes it, or ``warehouse``, runs once for every way into a table."""
    return str(request.param)


@pytest.fixture
def database(request: pytest.FixtureRequest, path: str) -> Database:
    kind, driver, _ = LANDING_PATHS[path]
    found: Database = request.getfixturevalue(kind)
    return replace(found, url=found.url.replace("+psycopg", driver))


@pytest.fixture
def warehouse(database: Database, path: str, sim: Simulator) -> Warehouse:
    return Warehouse(database.engine(), kit_for(sim.base_url), portable=LANDING_PATHS[path][2])


def products(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}"} for i in range(start, start + count)]


def test_every_row_gets_its_own_answer_over_several_batches(warehouse: Warehouse, sim: Simulator) -> None:
    """Ten rows in shards of four: three batches, ten rows, each with the answer to its own prompt."""
    report = warehouse.submit(products(10), max_requests=4)
    assert len(report.batch_ids) == 3
    landed = warehouse.fetch(report.batch_ids)
    assert (landed.rows, dict(landed.counts)) == (10, {"succeeded": 10})
    rows = warehouse.rows("SELECT id, response, status, batch_id FROM answers ORDER BY id")
    assert [(r["id"], r["response"]) for r in rows] == [(i, answer_for(f"About product {i}")) for i in range(10)]
    assert {r["batch_id"] for r in rows} == set(report.batch_ids)
    assert sim.stats()["requests_accepted"] == 10


def test_the_bill_is_exact_in_the_table_the_ledger_and_the_tally(database: Database) -> None:
    """Opus 4.8 at 2,700 and 100 tokens: $0.008 a row as a batch, $0.016 otherwise; all three places agree to the last digit."""
    with Simulator(SimulatorSettings(input_tokens=2700, output_tokens=100)) as sim:
        warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
        report = warehouse.submit(products(25), model="claude-opus-4-8", max_requests=10)
        tally = warehouse.fetch(report.batch_ids).tally
    assert (tally.batch_cost_usd, tally.standard_cost_usd, tally.savings_usd) == (Decimal("0.2"), Decimal("0.4"), Decimal("0.2"))
    assert (tally.input_tokens, tally.output_tokens, tally.requests) == (67_500, 2_500, 25)
    assert sum(Decimal(str(r["cost_usd"])) for r in warehouse.rows("SELECT cost_usd FROM answers")) == Decimal("0.2")
    assert warehouse.rows("SELECT SUM(batch_cost_picousd) AS c, SUM(standard_cost_picousd) AS s FROM batchkit_request") == [
        {"c": 200_000_000_000, "s": 400_000_000_000}
    ]
    booked = warehouse.rows("SELECT batch_cost_picousd AS c, state, tally FROM batchkit_batch")
    assert sum(r["c"] for r in booked) == 200_000_000_000
    assert {r["state"] for r in booked} == {"landed"}
    assert sum(json.loads(r["tally"])["input_tokens"] for r in booked) == 67_500


def test_a_landed_batch_can_be_priced_again(database: Database) -> None:
    """From the ledger alone: the results may be gone by then."""
    with Simulator(SimulatorSettings(input_tokens=2700, output_tokens=100)) as sim:
        warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
        (batch_id,) = warehouse.submit(products(25), model="claude-opus-4-8").batch_ids
        assert warehouse.ledger.tally_of(batch_id) is None
        warehouse.fetch([batch_id])
    found = warehouse.ledger.tally_of(batch_id)
    assert found is not None
    tally, created_at = found
    half = PriceBook({"claude-opus-4-8": {"input_usd_per_mtok": "2.5", "output_usd_per_mtok": "12.5"}})
    assert (tally.batch_cost_usd, reprice(tally, half, created_at).batch_cost_usd) == (Decimal("0.2"), Decimal("0.1"))


def test_fetching_twice_changes_nothing(warehouse: Warehouse) -> None:
    """A cleared fetch writes the same rows and the same bill, in every disposition."""
    ids = warehouse.submit(products(5)).batch_ids
    for disposition in ("merge", "append", "replace"):
        table = f"answers_{disposition}"
        first = warehouse.fetch(ids, table, disposition=disposition)
        before = warehouse.rows(f"SELECT id, response, cost_usd FROM {table} ORDER BY id")
        second = warehouse.fetch(ids, table, disposition=disposition)
        assert warehouse.rows(f"SELECT id, response, cost_usd FROM {table} ORDER BY id") == before
        assert len(before) == 5
        assert second.tally == first.tally
    assert warehouse.rows("SELECT COUNT(*) AS n FROM batchkit_request") == [{"n": 5}]


def test_clearing_submit_costs_nothing(warehouse: Warehouse, sim: Simulator) -> None:
    """A second attempt over the same source sends nothing and gives the same batches."""
    first = warehouse.submit(products(6), max_requests=4)
    second = warehouse.submit(products(6), max_requests=4)
    assert second.batch_ids == first.batch_ids
    assert (second.asked, second.known) == (0, 6)
    assert sim.stats()["posts"] == 2


def test_a_source_that_grew_between_attempts_asks_only_what_is_new(warehouse: Warehouse, sim: Simulator) -> None:
    """Rows in flight stay in flight, rows that went away still land, and one that changed is not asked twice."""
    warehouse.submit(products(4))
    changed = [{"id": 0, "name": "another name"}, *products(5, start=2)]
    report = warehouse.submit(changed)
    assert (report.asked, report.known) == (3, 3)
    assert sim.stats()["requests_accepted"] == 7
    warehouse.fetch(report.batch_ids)
    assert [r["id"] for r in warehouse.rows("SELECT id FROM answers ORDER BY id")] == [0, 1, 2, 3, 4, 5, 6]


def test_a_new_run_asks_anew_and_merges_by_key(warehouse: Warehouse, sim: Simulator) -> None:
    """Another DAG run is another job; its answers replace those of the same keys and keep the others."""
    warehouse.fetch(warehouse.submit(products(3), run_id="run-1").batch_ids)
    warehouse.fetch(warehouse.submit(products(3, start=2), prompt="Again {{ row.name }}", run_id="run-2").batch_ids)
    rows = warehouse.rows("SELECT id, response FROM answers ORDER BY id")
    assert [r["id"] for r in rows] == [0, 1, 2, 3, 4]
    assert rows[1]["response"] == answer_for("About product 1")
    assert rows[2]["response"] == answer_for("Again product 2")


def test_equal_questions_are_sent_and_billed_once_and_land_for_every_key(warehouse: Warehouse, sim: Simulator) -> None:
    """Six rows with two different prompts: two requests, six rows, two costs above zero."""
    rows = [{"id": i, "name": "tea" if i % 2 else "cup"} for i in range(6)]
    report = warehouse.submit(rows)
    assert (report.asked, report.copies) == (2, 4)
    assert sim.stats()["requests_accepted"] == 2
    landed = warehouse.fetch(report.batch_ids)
    assert (landed.rows, landed.tally.requests) == (6, 2)
    answers = warehouse.rows("SELECT id, response, cost_usd FROM answers ORDER BY id")
    assert [a["response"] for a in answers] == [answer_for(f"About {'tea' if i % 2 else 'cup'}") for i in range(6)]
    assert sum(Decimal(str(a["cost_usd"])) for a in answers) == landed.tally.batch_cost_usd
    assert sum(Decimal(str(a["cost_usd"])) > 0 for a in answers) == 2


def test_a_copy_of_a_question_that_an_earlier_attempt_sent_lands_too(warehouse: Warehouse, sim: Simulator) -> None:
    """A new row that asks what is already in flight shares it."""
    warehouse.submit([{"id": 1, "name": "tea"}])
    report = warehouse.submit([{"id": 1, "name": "tea"}, {"id": 2, "name": "tea"}])
    assert (report.asked, report.copies) == (0, 1)
    warehouse.fetch(report.batch_ids)
    assert warehouse.rows("SELECT id, response FROM answers ORDER BY id") == [
        {"id": i, "response": answer_for("About tea")} for i in (1, 2)
    ]


def test_without_dedupe_every_row_is_asked(warehouse: Warehouse, sim: Simulator) -> None:
    """dedupe=False sends equal questions as often as they come."""
    report = warehouse.submit([{"id": i, "name": "tea"} for i in range(3)], dedupe=False)
    assert (report.asked, sim.stats()["requests_accepted"]) == (3, 3)
    assert warehouse.fetch(report.batch_ids).rows == 3


def test_failed_rows_are_counted_journaled_and_cost_nothing(warehouse: Warehouse) -> None:
    """Each outcome is told apart in the ledger; only answers land, and only they are billed."""
    marks = ["", "[[sim:errored]]", "[[sim:expired]]", "[[sim:canceled]]"]
    ids = warehouse.submit([{"id": i, "name": f"{i} {m}"} for i, m in enumerate(marks)]).batch_ids
    landed = warehouse.fetch(ids)
    assert dict(landed.counts) == {"succeeded": 1, "errored": 1, "expired": 1, "canceled": 1}
    assert (landed.rows, landed.tally.requests) == (1, 1)
    requests = warehouse.rows("SELECT key, status, error_type, batch_cost_picousd AS c FROM batchkit_request ORDER BY key")
    assert [(r["key"], r["status"]) for r in requests] == [
        ("[0]", "succeeded"),
        ("[1]", "errored"),
        ("[2]", "expired"),
        ("[3]", "canceled"),
    ]
    assert requests[1]["error_type"]
    assert [r["c"] for r in requests[1:]] == [0, 0, 0]


def test_include_failed_writes_a_row_for_each_and_never_over_an_answer(warehouse: Warehouse) -> None:
    """A failed request has a row with its error, but an answer of an earlier run stays."""
    warehouse.fetch(warehouse.submit([{"id": 1, "name": "tea"}], run_id="run-1").batch_ids)
    rows = [{"id": 1, "name": "tea [[sim:errored]]"}, {"id": 2, "name": "cup [[sim:errored]]"}]
    warehouse.fetch(warehouse.submit(rows, run_id="run-2").batch_ids, include_failed=True)
    one, two = warehouse.rows("SELECT id, response, status, error_message FROM answers ORDER BY id")
    assert (one["response"], one["status"]) == (answer_for("About tea"), "succeeded")
    assert (two["response"], two["status"]) == (None, "errored")
    assert two["error_message"]


def test_replace_leaves_nothing_of_before(warehouse: Warehouse) -> None:
    """The table holds the results of all batches of this fetch and no others."""
    warehouse.fetch(warehouse.submit(products(3), run_id="run-1").batch_ids)
    warehouse.fetch(warehouse.submit(products(4, start=10), run_id="run-2", max_requests=3).batch_ids, disposition="replace")
    assert [r["id"] for r in warehouse.rows("SELECT id FROM answers ORDER BY id")] == [10, 11, 12, 13]


def test_keys_keep_their_types(warehouse: Warehouse) -> None:
    """Text, number, date and decimal keys come back as what they were, as the table's primary key."""
    key = {"sku": "a'b\u2028\t\\N", "n": 7, "day": dt.date(2026, 1, 2), "size": decimal.Decimal("1.50")}
    warehouse.fetch(warehouse.submit([{**key, "name": "tea"}], key=("sku", "n", "day", "size")).batch_ids)
    (row,) = warehouse.rows("SELECT sku, n, day, size FROM answers")
    assert (row["sku"], row["n"], str(row["day"]), decimal.Decimal(str(row["size"]))) == (key["sku"], 7, "2026-01-02", key["size"])


def test_odd_text_survives_the_way_to_the_table(warehouse: Warehouse) -> None:
    """Tabs, newlines, backslashes, quotes, line separators and emoji in an answer arrive as they were sent."""
    odd = "a\tb\\n\\N\"'\r\u2028\u0085 \N{TEACUP WITHOUT HANDLE}"
    warehouse.fetch(warehouse.submit([{"id": 1, "name": odd}], prompt="{{ row.name }}").batch_ids)
    assert warehouse.rows("SELECT response FROM answers")[0]["response"] == answer_for(odd)


@pytest.mark.parametrize("bad", [{"id": 3}, {"id": None, "name": "x"}, {"id": 0, "name": "again"}, {"id": 4, "name": ""}])
def test_bad_input_late_in_the_source_sends_nothing(warehouse: Warehouse, sim: Simulator, bad: dict[str, Any]) -> None:
    """A missing column, a NULL key, a repeated key or an empty prompt in the last row stops the whole before anything is sent."""
    with pytest.raises(RequestError, match="Nothing was sent"):
        warehouse.submit([*products(3), bad], prompt="{{ row.name }}", max_requests=1)
    assert sim.stats()["posts"] == 0
    assert warehouse.rows("SELECT * FROM batchkit_batch") == []


def test_a_table_without_the_columns_is_refused_with_the_difference(warehouse: Warehouse) -> None:
    """The message lists what is missing; the batch stays as it was."""
    warehouse.execute("CREATE TABLE answers (id BIGINT, response TEXT)")
    ids = warehouse.submit(products(1)).batch_ids
    with pytest.raises(TableError, match="lacks the columns status, custom_id, batch_id"):
        warehouse.fetch(ids)
    assert warehouse.rows("SELECT state FROM batchkit_batch") == [{"state": "submitted"}]


def test_a_table_of_the_users_own_making_is_filled_and_its_other_columns_kept(warehouse: Warehouse) -> None:
    """No unique constraint is needed to merge, and columns that are not ours are left alone."""
    warehouse.fetch(warehouse.submit(products(2), run_id="run-1").batch_ids, "made")
    warehouse.execute(
        "CREATE TABLE own AS SELECT * FROM made WHERE id = 0", "ALTER TABLE own ADD COLUMN note TEXT", "UPDATE own SET note = 'x'"
    )
    warehouse.fetch(warehouse.submit(products(2), prompt="New {{ row.name }}", run_id="run-2").batch_ids, "own")
    assert warehouse.rows("SELECT id, response, note FROM own ORDER BY id") == [
        {"id": 0, "response": answer_for("New product 0"), "note": "x"},
        {"id": 1, "response": answer_for("New product 1"), "note": None},
    ]


def test_a_key_with_a_result_columns_name_is_refused(warehouse: Warehouse) -> None:
    """A source key called status would overwrite ours."""
    ids = warehouse.submit([{"status": 1, "name": "x"}], key=("status",)).batch_ids
    with pytest.raises(TableError, match="The key column status has the name of a result column"):
        warehouse.fetch(ids)


def test_a_batch_from_elsewhere_lands_by_custom_id(warehouse: Warehouse) -> None:
    """Fetch works on ids that no ledger knows."""
    ids = warehouse.kit.submit(["Name a river.", "Name a lake."], model="claude-haiku-5-5", max_tokens=20)
    landed = warehouse.fetch(ids)
    assert (landed.rows, landed.tally.requests) == (2, 2)
    assert {r["custom_id"]: r["response"] for r in warehouse.rows("SELECT * FROM answers")} == {
        "item-0": answer_for("Name a river."),
        "item-1": answer_for("Name a lake."),
    }


def test_batches_of_different_keys_do_not_share_a_table(warehouse: Warehouse) -> None:
    """Their rows could not be told apart."""
    one = warehouse.submit(products(1), run_id="run-1").batch_ids
    two = warehouse.submit([{"sku": "A", "name": "x"}], key=("sku",), run_id="run-2").batch_ids
    with pytest.raises(BatchInputError, match="have different keys"):
        warehouse.fetch([*one, *two])


def test_the_portable_path_writes_the_same_rows(warehouse: Warehouse) -> None:
    """Any database with a SQLAlchemy engine gets what the fast paths write."""
    ids = warehouse.submit([{"id": i, "name": f"p{i}\t\\\u2028"} for i in range(7)]).batch_ids
    warehouse.fetch(ids, "fast", portable=False)
    warehouse.fetch(ids, "portable", portable=True)
    columns = "id, response, status, stop_reason, error_type, model, input_tokens, output_tokens, cost_usd, custom_id, batch_id"
    fast, portable = (warehouse.rows(f"SELECT {columns} FROM {table} ORDER BY id") for table in ("fast", "portable"))
    assert fast == portable
    assert len(fast) == 7


def test_requests_without_a_key_are_known_by_their_request_id(warehouse: Warehouse) -> None:
    """Equal prompts are asked once and land for each position; a native id is kept in the table."""
    report = warehouse.submit_requests(
        ["Name a river.", "Name a river.", {"custom_id": "n-1", "params": {"messages": [{"role": "user", "content": "hi"}]}}]
    )
    assert (report.asked, report.copies) == (2, 1)
    warehouse.fetch(report.batch_ids)
    answers = {r["request_id"]: r["response"] for r in warehouse.rows("SELECT request_id, response FROM answers")}
    assert answers == {"0": answer_for("Name a river."), "1": answer_for("Name a river."), "n-1": answer_for("hi")}


def test_rows_that_changed_between_attempts_are_named_in_the_log(warehouse: Warehouse, caplog: pytest.LogCaptureFixture) -> None:
    """A corrected prompt is not asked again within the run, and nobody has to guess that."""
    warehouse.submit(products(3))
    report = warehouse.submit(products(3), prompt="Better {{ row.name }}")
    assert (report.asked, report.changed) == (0, 3)
    assert "3 rows have changed" in caplog.text


def test_prompts_without_a_key_in_another_order_are_refused(warehouse: Warehouse, sim: Simulator) -> None:
    """A position is all that they are known by: each would get another one's answer."""
    first = warehouse.submit_requests(["Name a river.", "Name a lake."], by_position=True)
    with pytest.raises(
        RequestError, match="request 0 has no key, and in an earlier attempt of this task it had another position"
    ) as caught:
        warehouse.submit_requests(["Name a lake.", "Name a river."], by_position=True)
    assert caught.value.submitted == first.batch_ids
    with pytest.raises(RequestError, match="request 1 has no key"):
        warehouse.submit_requests(["Name a sea.", "Name a river.", "Name a lake."], by_position=True)
    # one whose text has changed at its place is named in the log
    assert warehouse.submit_requests(["Name a river, please.", "Name a lake."], by_position=True).changed == 1
    # more of them at the end are asked, and those with an id of their own may come in any order
    native = {"custom_id": "n-1", "params": {"model": "claude-haiku-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}}
    again = warehouse.submit_requests(["Name a river.", "Name a lake.", native], by_position=True)
    assert (again.asked, again.known, again.batch_ids[:1]) == (1, 2, first.batch_ids)


@pytest.mark.parametrize("bad", ["Name a river.", {"a": 1}, b"x", 5])
def test_a_source_that_is_no_list_is_refused(warehouse: Warehouse, sim: Simulator, bad: Any) -> None:
    """Iterating a string would ask about its letters."""
    with pytest.raises(BatchInputError, match=r"requests must be a list .* Nothing was sent"):
        warehouse.submit_requests(bad)
    assert sim.stats()["posts"] == 0


def test_a_stream_that_ends_early_without_an_error_is_read_again(warehouse: Warehouse, sim: Simulator) -> None:
    """A clean end after three of ten lines is no end."""
    ids = warehouse.submit(products(10)).batch_ids
    sim.faults.add("cut_results", line=4, clean=True)
    landed = warehouse.fetch(ids)
    assert (landed.rows, landed.missing, landed.complete) == (10, [], True)


def test_a_stream_that_stays_short_is_reported_with_the_number(warehouse: Warehouse, sim: Simulator) -> None:
    """Two of ten lines never come: they are missing by name, and the summary says by how much the file is short of the API's count."""
    ids = warehouse.submit(products(10)).batch_ids
    sim.faults.add("cut_results", line=9, clean=True, times=None)
    landed = warehouse.fetch(ids)
    assert dict(landed.counts) == {"succeeded": 8, "missing": 2}
    assert (landed.faults.short, len(landed.missing), landed.complete) == (2, 2, False)


def test_lines_that_never_come_are_missing_by_name(warehouse: Warehouse, sim: Simulator) -> None:
    """A line that stays away is an outcome of its own, with its key in the summary; faulty lines are counted once each."""
    ids = warehouse.submit(products(10)).batch_ids
    sim.faults.add("missing_line", line=3, times=None)
    sim.faults.add("broken_line", line=1, times=None)
    sim.faults.add("duplicate_line", line=5, times=None)
    landed = warehouse.fetch(ids)
    assert dict(landed.counts) == {"succeeded": 9, "missing": 1}
    assert len(landed.missing) == 1
    assert landed.faults.to_json() == {"broken_lines": 1, "duplicate_lines": 1, "foreign_lines": 0, "short_by": 0}
    assert not landed.complete
    (row,) = warehouse.rows("SELECT key FROM batchkit_request WHERE status = 'missing'")
    assert [row["key"]] == landed.missing


@pytest.mark.parametrize("disposition", ["merge", "append"])
def test_lines_that_come_later_are_written_beside_what_has_landed(warehouse: Warehouse, sim: Simulator, disposition: str) -> None:
    """A fetch that runs again reads a torn batch again, and writes what was missing and nothing else; the bill is then whole."""
    ids = warehouse.submit(products(10)).batch_ids
    sim.faults.add("missing_line", line=3, times=None)
    sim.faults.add("missing_line", line=7, times=None)
    first = warehouse.fetch(ids, disposition=disposition)
    assert dict(first.counts) == {"succeeded": 8, "missing": 2}
    warehouse.execute("UPDATE answers SET response = 'newer'")
    assert dict(warehouse.fetch(ids, disposition=disposition).counts) == {"succeeded": 8, "missing": 2}
    sim.faults.clear()
    last = warehouse.fetch(ids, disposition=disposition)
    assert (dict(last.counts), last.complete, last.tally.requests) == ({"succeeded": 10}, True, 10)
    found = warehouse.rows("SELECT id, response FROM answers ORDER BY id")
    assert [r["id"] for r in found] == list(range(10))
    assert sum(r["response"] == "newer" for r in found) == 8
    assert all(r["response"] in ("newer", answer_for(f"About product {r['id']}")) for r in found)
    assert warehouse.rows("SELECT COUNT(*) AS n FROM batchkit_request WHERE status = 'succeeded'") == [{"n": 10}]
    assert warehouse.rows("SELECT number FROM batchkit_landing") == [{"number": 1}]
    # whole by now: nothing is read again
    results = sim.stats()["calls"]["results"]
    warehouse.fetch(ids, disposition=disposition)
    assert sim.stats()["calls"]["results"] == results


def test_an_attempt_without_rows_keeps_the_keys_types(warehouse: Warehouse) -> None:
    """A source that has run dry by the retry does not turn number keys into text."""
    ids = warehouse.submit(products(2)).batch_ids
    assert warehouse.submit([]).batch_ids == ids
    warehouse.fetch(ids)
    assert [r["id"] for r in warehouse.rows("SELECT id FROM answers ORDER BY id")] == [0, 1]


def test_keys_that_only_their_types_tell_apart_are_refused(warehouse: Warehouse, sim: Simulator) -> None:
    """1 and "1" would meet in one row of the table."""
    with pytest.raises(RequestError, match="came before"):
        warehouse.submit([{"id": 1, "name": "a"}, {"id": "1", "name": "b"}])
    assert sim.stats()["posts"] == 0


def test_equal_decimals_and_times_are_one_key(warehouse: Warehouse) -> None:
    """1.0 and 1.00, and one moment in two time zones, are the same key on every attempt."""
    berlin = dt.timezone(dt.timedelta(hours=1))
    one = {"n": decimal.Decimal("1.0"), "at": dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC), "name": "x"}
    two = {"n": decimal.Decimal("1.00"), "at": dt.datetime(2026, 1, 1, 13, tzinfo=berlin), "name": "x"}
    warehouse.submit([one], key=("n", "at"))
    report = warehouse.submit([two], key=("n", "at"))
    assert (report.asked, report.known) == (0, 1)
    assert warehouse.fetch(report.batch_ids).rows == 1


def test_fetches_that_begin_at_once_make_the_table_once(warehouse: Warehouse, database: Database) -> None:
    """Eight fetches of eight batches into a table that does not exist yet."""
    ids = warehouse.submit(products(16), max_requests=2).batch_ids

    def fetch(batch_id: str) -> int:
        return Warehouse(database.engine(), warehouse.kit).fetch([batch_id]).rows

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fetch, ids)) == [2] * 8
    assert warehouse.rows("SELECT COUNT(*) AS n FROM answers") == [{"n": 16}]


def test_more_rows_than_a_chunk_land_whole(warehouse: Warehouse) -> None:
    """Rows over the size of a chunk, of a statement and of a COPY, each with its own answer and cost; a second run merges over them."""
    for run in ("run-1", "run-2"):
        landed = warehouse.fetch(warehouse.submit(products(2_503), prompt=f"{run} {{{{ row.name }}}}", run_id=run).batch_ids)
        assert (landed.rows, landed.complete) == (2_503, True)
        rows = warehouse.rows("SELECT id, response, cost_usd FROM answers ORDER BY id")
        assert [(r["id"], r["response"]) for r in rows] == [(i, answer_for(f"{run} product {i}")) for i in range(2_503)]
        assert sum(Decimal(str(r["cost_usd"])) for r in rows) == landed.tally.batch_cost_usd
    assert warehouse.rows("SELECT status, COUNT(*) AS n FROM batchkit_request GROUP BY status") == [{"status": "succeeded", "n": 5_006}]


def test_one_odd_value_keeps_no_other_answer_from_landing(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop reason, an error type or a model longer than its column is cut; NUL, which PostgreSQL has not in text, is replaced there."""
    ids = warehouse.submit(products(3)).batch_ids
    stop, error, plain = (json.loads(line) for line in b"".join(warehouse.kit.stream_results(ids[0])).splitlines())
    stop["result"]["message"].update(stop_reason="s" * 65, model="m" * 101, content=[{"type": "text", "text": "a\0b"}])
    error["result"] = {"type": "errored", "error": {"error": {"type": "e" * 101, "message": "m\0" * 200}}}
    lines = [json.dumps(line).encode() + b"\n" for line in (stop, error, plain)]
    monkeypatch.setattr(warehouse.kit, "stream_results", lambda _: iter(lines))
    landed = warehouse.fetch(ids, include_failed=True)
    assert dict(landed.counts) == {"succeeded": 2, "errored": 1}
    by_id = {row["custom_id"]: row for row in warehouse.rows("SELECT * FROM answers")}
    nul = "\0" if warehouse.engine.dialect.name == "sqlite" else "\ufffd"
    odd, failed = by_id[stop["custom_id"]], by_id[error["custom_id"]]
    assert (odd["stop_reason"], odd["model"], odd["response"]) == ("s" * 64, "m" * 100, f"a{nul}b")
    assert (failed["error_type"], failed["error_message"]) == ("e" * 100, f"m{nul}" * 200)
    assert by_id[plain["custom_id"]]["stop_reason"] == "end_turn"


def test_one_question_of_many_rows_lands_for_each_and_is_paid_once(warehouse: Warehouse) -> None:
    """More rows than are written at a time share one request."""
    landed = warehouse.fetch(warehouse.submit([{"id": i, "name": "tea"} for i in range(2_503)]).batch_ids)
    assert (landed.rows, landed.tally.requests) == (2_503, 1)
    assert warehouse.rows("SELECT COUNT(*) AS n, COUNT(DISTINCT id) AS ids, MIN(response) AS a, MAX(response) AS z FROM answers") == [
        {"n": 2_503, "ids": 2_503, "a": answer_for("About tea"), "z": answer_for("About tea")}
    ]
    costs = [Decimal(str(row["cost_usd"])) for row in warehouse.rows("SELECT cost_usd FROM answers")]
    assert (sum(costs), max(costs)) == (landed.tally.batch_cost_usd, landed.tally.batch_cost_usd)


def test_a_replace_that_is_cut_leaves_the_table_as_it_was(warehouse: Warehouse, sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """All batches of a replace are one transaction: when the last cannot be read, nothing of the first is there."""
    monkeypatch.setattr(warehouse.kit, "read_blocks", partial(warehouse.kit.read_blocks, sleep=lambda _: None))
    warehouse.fetch(warehouse.submit(products(3), run_id="run-1").batch_ids)
    ids = warehouse.submit(products(4, start=10), run_id="run-2", max_requests=2).batch_ids
    sim.faults.add("cut_results", batch=ids[-1], line=1, times=None)
    with pytest.raises(ResultStreamError):
        warehouse.fetch(ids, disposition="replace")
    assert [r["id"] for r in warehouse.rows("SELECT id FROM answers ORDER BY id")] == [0, 1, 2]
    assert {r["state"] for r in warehouse.rows("SELECT state FROM batchkit_batch")} == {"landed", "submitted"}


def test_a_download_holds_no_lock(warehouse: Warehouse, database: Database, sim: Simulator) -> None:
    """While the second batch of a replace is still read, others write to the ledger and to the table's database."""
    warehouse.fetch(warehouse.submit(products(1), run_id="run-1").batch_ids)
    ids = warehouse.submit(products(4, start=10), run_id="run-2", max_requests=2).batch_ids
    sim.faults.add("trickle", batch=ids[-1], seconds=2.0)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(warehouse.fetch, ids, disposition="replace")
        while sim.stats()["calls"].get("results", 0) < 3 and not slow.done():
            time.sleep(0.01)
        Warehouse(database.engine(), warehouse.kit).submit(products(1), run_id="run-3")
        warehouse.execute("DELETE FROM answers WHERE id = 0")
        assert not slow.done()
        slow.result()
    assert [r["id"] for r in warehouse.rows("SELECT id FROM answers ORDER BY id")] == [10, 11, 12, 13]


def test_runs_with_the_same_keys_that_land_at_once_all_succeed(warehouse: Warehouse, database: Database) -> None:
    """Four runs answer the same 300 rows and land together: no deadlock, no key twice, and each row holds one run's answer."""
    runs = [f"run-{n}" for n in range(4)]
    ids = [warehouse.submit(products(300), prompt=f"{run} {{{{ row.name }}}}", run_id=run).batch_ids[0] for run in runs]
    for table in ("one", "two"):
        with ThreadPoolExecutor(4) as pool:
            landed = pool.map(lambda i: Warehouse(database.engine(), warehouse.kit).fetch([i], table).rows, ids)  # noqa: B023
            assert list(landed) == [300] * 4
        rows = warehouse.rows(f"SELECT id, response FROM {table} ORDER BY id")
        assert [r["id"] for r in rows] == list(range(300))
        assert all(r["response"] in {answer_for(f"{run} product {r['id']}") for run in runs} for r in rows)


def test_a_replace_of_many_batches_holds_one_map_of_keys_at_a_time(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million rows are ten batches in one transaction: memory must not grow with their number."""
    alive: list[weakref.ref[AskedKeys]] = []

    def watched(rows: Any) -> AskedKeys:
        assert [ref for ref in alive if ref() is not None] == []
        keys = AskedKeys(rows)
        alive.append(weakref.ref(keys))
        return keys

    monkeypatch.setattr("airflow_provider_batchkit.landing.reading.AskedKeys", watched)
    ids = warehouse.submit(products(6), max_requests=2).batch_ids
    assert warehouse.fetch(ids, disposition="replace").rows == 6
    assert len(alive) == 3

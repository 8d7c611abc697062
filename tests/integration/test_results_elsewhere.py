"""The contract of every database that results can land in while the ledger lies elsewhere."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from airflow_provider_batchkit.exceptions import TableError
from tests.results import Results
from tests.warehouse import Warehouse

THREE = [{"id": i, "name": f"thing {i}"} for i in range(3)]


def landings(ledger: Warehouse) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in ledger.rows("SELECT table_name, number, rows_written FROM batchkit_landing")]


@pytest.mark.parametrize("disposition", ["merge", "append", "replace"])
def test_answers_land_once_and_the_books_say_so(ledger: Warehouse, results: Results, disposition: str) -> None:
    """The ledger has one landing, the bill and the outcomes; the warehouse has the rows, and no staging table is left."""
    sent = ledger.submit(THREE)
    for _ in range(2):
        report = ledger.fetch(sent.batch_ids, into=results.adapter, disposition=disposition)
        assert (report.rows, report.counts["succeeded"], report.complete) == (3, 3, True)
        assert report.tally.total.batch_cost_usd is not None
    assert sorted(results.rows("SELECT id, status, batch_id FROM answers")) == [(i, "succeeded", sent.batch_ids[0]) for i in range(3)]
    assert [row[1:] for row in landings(ledger)] == [(1, 3)]
    assert landings(ledger)[0][0].startswith("results:")
    assert ledger.rows("SELECT state FROM batchkit_batch") == [{"state": "landed"}]
    assert [row["status"] for row in ledger.rows("SELECT status FROM batchkit_request")] == ["succeeded"] * 3
    assert ledger.rows("SELECT SUM(requests) AS n FROM batchkit_spend") == [{"n": 3}]
    assert not [name for name in results.tables() if name.startswith("batchkit_stage")]
    assert ledger.rows("SELECT * FROM batchkit_prepared") == []


def test_a_later_run_writes_over_what_is_there_and_leaves_the_rest(ledger: Warehouse, results: Results) -> None:
    """Merge by key: a row's own columns of the user's stay; another key stays; an earlier run's retry changes nothing."""
    first = ledger.submit(THREE)
    ledger.fetch(first.batch_ids, into=results.adapter)
    results.run("ALTER TABLE answers ADD COLUMN reviewed VARCHAR(10)")
    results.run("UPDATE answers SET reviewed = 'yes' WHERE id = 1")
    second = ledger.submit(THREE[1:], run_id="run-2", prompt="Anew {{ row.name }}")
    ledger.fetch(second.batch_ids, into=results.adapter, run_id="run-2")
    ledger.fetch(first.batch_ids, into=results.adapter)
    expected = [(0, first.batch_ids[0], None), (1, second.batch_ids[0], "yes"), (2, second.batch_ids[0], None)]
    assert sorted(results.rows("SELECT id, batch_id, reviewed FROM answers")) == expected


@pytest.mark.parametrize("disposition", ["merge", "replace"])
def test_of_two_jobs_with_the_same_keys_the_later_batch_stays(ledger: Warehouse, results: Results, disposition: str) -> None:
    """One fetch of both; a failed row never takes the place of the other job's answer."""
    first = ledger.submit([*THREE[:2], {"id": 2, "name": "[[sim:overloaded]]"}], prompt="{{ row.name }}")
    second = ledger.submit([{"id": 1, "name": "[[sim:overloaded]]"}, *THREE[2:]], run_id="run-2", prompt="{{ row.name }} ")
    for ids in ([*first.batch_ids, *second.batch_ids], [*second.batch_ids, *first.batch_ids]):
        ledger.fetch(ids, into=results.adapter, disposition=disposition, include_failed=True, rewrite=True)
        found = sorted(results.rows("SELECT id, batch_id, status FROM answers"))
        assert found == [(0, first.batch_ids[0], "succeeded"), (1, first.batch_ids[0], "succeeded"), (2, second.batch_ids[0], "succeeded")]
    third = ledger.submit(THREE[1:], run_id="run-3", prompt="Again {{ row.name }}")
    ledger.fetch([*third.batch_ids, *first.batch_ids], into=results.adapter, disposition=disposition, rewrite=True)
    found = sorted(results.rows("SELECT id, batch_id FROM answers"))
    assert found == [(0, first.batch_ids[0]), (1, first.batch_ids[0]), (2, third.batch_ids[0])]


def test_an_emptied_table_is_filled_anew(ledger: Warehouse, results: Results) -> None:
    """Under the next landing number."""
    sent = ledger.submit(THREE)
    ledger.fetch(sent.batch_ids, into=results.adapter)
    results.run("DELETE FROM answers")
    assert ledger.fetch(sent.batch_ids, into=results.adapter).rows == 3
    assert results.rows("SELECT COUNT(*) FROM answers") == [(3,)]
    assert [row[1] for row in landings(ledger)] == [1, 2]


def test_rows_that_failed_are_in_the_ledger_and_in_the_table_only_when_wanted(ledger: Warehouse, results: Results) -> None:
    """A failed row never overwrites an answer."""
    rows = [{"id": 0, "name": "fine"}, {"id": 1, "name": "[[sim:overloaded]]"}]
    sent = ledger.submit(rows, prompt="{{ row.name }}")
    report = ledger.fetch(sent.batch_ids, into=results.adapter)
    assert (report.rows, dict(report.counts)) == (1, {"succeeded": 1, "errored": 1})
    assert ledger.rows("SELECT key, status FROM batchkit_failed") == [{"key": "[1]", "status": "errored"}]
    again = ledger.submit(rows[::-1], run_id="run-2", prompt="{{ row.name }} ")
    ledger.fetch(again.batch_ids, into=results.adapter, run_id="run-2", include_failed=True)
    assert sorted(results.rows("SELECT id, status FROM answers")) == [(0, "succeeded"), (1, "errored")]


KEYS: dict[str, list[Any]] = {
    "integer": [-(2**63), 0, 2**63 - 1],
    "text": [
        "abc",
        "ABC",
        "abć",
        "abc ",
        "",
        "%s :name ? '\" \\ {{ x }}",
        "a\u2028b",
        "\u202eabc",
        "x" * 255,
        "y" * 1990,
        "'; DROP TABLE answers",
    ],
    "decimal": [Decimal("1.1"), Decimal("-12345678901234567890.12"), Decimal("0.000001")],
    "float": [0.1, -1e300, 5e-324],
    "date": [dt.date(1, 1, 1), dt.date(9999, 12, 31)],
    "timestamp": [dt.datetime.fromisoformat("2026-01-01T12:00:00.123456"), dt.datetime.fromisoformat("9999-12-31T23:59:59.999999")],
    "timestamptz": [dt.datetime(2026, 1, 1, 12, 0, 0, 1, dt.UTC), dt.datetime(2026, 1, 1, 12, tzinfo=dt.timezone(dt.timedelta(hours=5)))],
    "boolean": [True, False],
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_row_is_found_under_its_own_key_and_no_other(ledger: Warehouse, results: Results, kind: str) -> None:
    """Keys of every type, hostile ones too; twice, so that the merge compares them with those of the first landing."""
    rows = [{"id": key, "name": f"n{place}"} for place, key in enumerate(KEYS[kind])]
    for run in ("run-1", "run-2"):
        sent = ledger.submit(rows, run_id=run, prompt="{{ row.name }} " + run)
        assert ledger.fetch(sent.batch_ids, into=results.adapter, run_id=run).rows == len(rows)
        assert results.rows("SELECT COUNT(*) FROM answers") == [(len(rows),)]
    assert results.rows("SELECT COUNT(DISTINCT custom_id) FROM answers") == [(len(rows),)]


HOSTILE = [
    "%s %(x)s :name ? $1",
    "'; DROP TABLE answers; --",
    "\u2028\u2029\x85",
    "\u202eright",
    "nul \x00 here",
    "é😀\\N\\.\t\n\r",
    "z" * 5_000_000,
]


def test_hostile_answers_land_as_they_are(ledger: Warehouse, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL has no NUL in text, and keeps U+FFFD in its place."""
    sent = ledger.submit([{"id": i, "name": str(i)} for i in range(len(HOSTILE))], prompt="{{ row.name }}")
    plain = ledger.kit.read_blocks

    def hostile(*arguments: Any) -> Iterator[Any]:
        for block in plain(*arguments):
            keys = [int(key[1:-1]) for key in block.keys or ()]
            block.texts = [HOSTILE[key] for key in keys]
            yield block

    monkeypatch.setattr(ledger.kit, "read_blocks", hostile)
    ledger.fetch(sent.batch_ids, into=results.adapter)
    found = dict(results.rows("SELECT id, response FROM answers"))
    for place, text in enumerate(HOSTILE):
        wanted = text.replace("\x00", "\ufffd") if results.kind == "postgres" else text
        assert found[place] == wanted, place


def test_decimals_keep_their_digits_and_one_that_cannot_is_refused(ledger: Warehouse, results: Results) -> None:
    """The answers stay with the API, and nothing is written, where a key would be rounded."""
    ledger.ledger.ensure()
    sent = ledger.submit([{"id": Decimal("1.12345678901234567890"), "name": "n"}])
    types = [("id", "numeric(38,20)")]
    ledger.ledger.set_key_columns(ledger.job().job_id, types)
    ledger.fetch(sent.batch_ids, "exact", into=results.adapter)
    assert Decimal(str(results.rows("SELECT id FROM exact")[0][0])) == Decimal("1.12345678901234567890")
    if results.kind in ("duckdb", "mysql", "snowflake"):
        ledger.ledger.set_key_columns(ledger.job().job_id, [("id", "numeric")])
        with pytest.raises(TableError, match="has more digits than a column"):
            ledger.fetch(sent.batch_ids, "rounded", into=results.adapter)
        assert results.rows("SELECT COUNT(*) FROM rounded") == [(0,)]


def test_a_key_that_the_table_would_round_is_not_written(ledger: Warehouse, results: Results) -> None:
    """The publish looks whether every key is found again, and takes everything back."""
    if results.kind == "sqlite":
        pytest.skip("SQLite has no column that rounds a decimal")
    columns = "id DECIMAL(10,1), response VARCHAR(200), status VARCHAR(20), custom_id VARCHAR(64), batch_id VARCHAR(100)"
    results.run(f"CREATE TABLE answers ({columns})")
    sent = ledger.submit([{"id": Decimal("1.25"), "name": "n"}])
    with pytest.raises(TableError, match=r"would store the key"):
        ledger.fetch(sent.batch_ids, into=results.adapter)
    assert results.rows("SELECT COUNT(*) FROM answers") == [(0,)]
    assert ledger.rows("SELECT * FROM batchkit_landing") == []


UNFIT = {
    "lacks the columns response": "id BIGINT, status VARCHAR(20), custom_id VARCHAR(64), batch_id VARCHAR(100)",
    "does not fit the source's key: id is": "id DATE, response VARCHAR(99), status VARCHAR(20), "
    "custom_id VARCHAR(64), batch_id VARCHAR(100)",
    "NOT NULL columns without a default": "id BIGINT, owner VARCHAR(9) NOT NULL, response VARCHAR(99), status VARCHAR(20), "
    "custom_id VARCHAR(64), batch_id VARCHAR(100)",
}


@pytest.mark.parametrize("says", UNFIT)
def test_a_table_that_does_not_fit_is_refused(ledger: Warehouse, results: Results, says: str) -> None:
    """With what is missing, and before anything is read."""
    if results.kind == "sqlite" and "key" in says:
        pytest.skip("SQLite's DATE holds any number")
    results.run(f"CREATE TABLE answers ({UNFIT[says]})")
    sent = ledger.submit(THREE)
    with pytest.raises(TableError, match=says):
        ledger.fetch(sent.batch_ids, into=results.adapter)


def test_a_table_of_somebody_else_keeps_its_columns(ledger: Warehouse, results: Results) -> None:
    """Required are the key and four columns; what the table lacks is not written."""
    columns = "id BIGINT, mine VARCHAR(9) DEFAULT 'x', response VARCHAR(999), status VARCHAR(20)"
    columns += ", custom_id VARCHAR(64), batch_id VARCHAR(100)"
    results.run(f"CREATE TABLE answers ({columns})")
    sent = ledger.submit(THREE)
    ledger.fetch(sent.batch_ids, into=results.adapter)
    assert sorted(results.rows("SELECT id, mine, status FROM answers")) == [(i, "x", "succeeded") for i in range(3)]


SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "ok": {"type": "boolean"},
        "word": {"type": "string"},
        "day": {"type": "string", "format": "date"},
        "at": {"type": "string", "format": "date-time"},
        "list": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["n", "x", "ok", "word", "day", "at", "list"],
    "additionalProperties": False,
}


def test_answers_to_a_schema_are_typed_columns(ledger: Warehouse, results: Results) -> None:
    """And stay so when a second run merges over them."""
    for run in ("run-1", "run-2"):
        sent = ledger.submit(THREE, output_schema=SCHEMA, run_id=run, prompt="{{ row.name }} " + run)
        report = ledger.fetch(sent.batch_ids, into=results.adapter, run_id=run)
        assert dict(report.counts) == {"succeeded": 3}
    found = results.rows("SELECT n, x, ok, word, day, list FROM answers")
    assert len(found) == 3
    for n, x, ok, word, day, words in found:
        assert isinstance(n, int) and isinstance(x, float) and ok in (True, False, 0, 1) and isinstance(word, str)
        assert str(day)[:4].isdigit() and isinstance(words, str | list)


def test_a_key_column_that_does_not_tell_case_apart_is_refused(ledger: Warehouse, results: Results) -> None:
    """``abc`` and ``ABC`` would end in one row, with the wrong answer."""
    if results.kind != "mysql":
        pytest.skip("only MySQL and MariaDB have such collations by default")
    rest = "response LONGTEXT, status VARCHAR(20), custom_id VARCHAR(64), batch_id VARCHAR(100)"
    results.run(f"CREATE TABLE answers (id VARCHAR(50), {rest})")
    sent = ledger.submit([{"id": "abc", "name": "n"}])
    with pytest.raises(TableError, match="does not tell keys apart that differ in case"):
        ledger.fetch(sent.batch_ids, into=results.adapter)
    results.run("DROP TABLE answers", f"CREATE TABLE answers (id BIGINT, {rest}) ENGINE = MyISAM")
    with pytest.raises(TableError, match="MyISAM, which has no transactions"):
        ledger.fetch(sent.batch_ids, into=results.adapter)

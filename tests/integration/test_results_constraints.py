"""A result table that refuses rows after they were paid for: nothing is lost, the error says what to do, and the next try lands them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import BatchKitError, TableError
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings
from tests.databases import Database
from tests.results import RESULTS, Results, results_in
from tests.warehouse import Warehouse, kit_for

REST = "response VARCHAR(999), status VARCHAR(20), custom_id VARCHAR(64), batch_id VARCHAR(100)"


class Place:
    """A result table in a database of its own, or beside the ledger."""

    def __init__(self, kind: str, ledger: Warehouse, results: Results | None) -> None:
        self.kind, self.ledger, self.results = kind, ledger, results

    def run(self, *statements: str) -> None:
        if self.results is None:
            self.ledger.execute(*statements)
        else:
            self.results.run(*statements)

    def fetch(self, ids: Sequence[str], **how: Any) -> Any:
        return self.ledger.fetch(ids, into=None if self.results is None else self.results.adapter, **how)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return [tuple(row.values()) for row in self.ledger.rows(sql)] if self.results is None else self.results.rows(sql)


@pytest.fixture(params=["beside-sqlite", "beside-postgres", *RESULTS])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with Simulator(SimulatorSettings()) as simulator:
        kit = kit_for(simulator.base_url)
        if request.param.startswith("beside"):
            database: Database = request.getfixturevalue(request.param.partition("-")[2])
            yield Place(database.kind, Warehouse(database.engine(), kit), None)
            return
        with results_in(request.param, tmp_path, request) as results:
            ledger = Warehouse(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db", poolclass=sa.pool.NullPool), kit)
            yield Place(results.kind, ledger, results)


PLAIN = f"CREATE TABLE answers (id BIGINT, {REST})"
ANEW = ("DROP TABLE answers", PLAIN)
_RAISE = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'never on a Friday'; END $$"
#: what refuses rows → by kind of database ("" for the others), the statements that make it, and those that remove it
REFUSING: dict[str, dict[str, tuple[Sequence[str], Sequence[str]]]] = {
    "check": {"": ([f"CREATE TABLE answers (id BIGINT, {REST}, CHECK (length(response) < 3))"], ANEW)},
    "unique": {"": ([f"CREATE TABLE answers (id BIGINT, {REST}, UNIQUE (status))"], ANEW)},
    "unique, deferred": {
        "postgres": ([f"CREATE TABLE answers (id BIGINT, {REST}, UNIQUE (status) DEFERRABLE INITIALLY DEFERRED)"], ANEW),
    },
    "foreign key": {
        "": (
            [
                "CREATE TABLE parent (id BIGINT PRIMARY KEY)",
                f"CREATE TABLE answers (id BIGINT, {REST}, FOREIGN KEY (id) REFERENCES parent (id))",
            ],
            ["INSERT INTO parent VALUES (0), (1), (2)"],
        ),
    },
    "trigger": {
        "postgres": (
            [PLAIN, _RAISE, "CREATE TRIGGER refuse BEFORE INSERT ON answers FOR EACH ROW EXECUTE FUNCTION refuse()"],
            ["DROP TRIGGER refuse ON answers"],
        ),
        "sqlite": (
            [PLAIN, "CREATE TRIGGER refuse BEFORE INSERT ON answers BEGIN SELECT RAISE(ABORT, 'never on a Friday'); END"],
            ["DROP TRIGGER refuse"],
        ),
        "mysql": (
            [
                PLAIN,
                "CREATE TRIGGER refuse BEFORE INSERT ON answers FOR EACH ROW SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'never'",
            ],
            ["DROP TRIGGER refuse"],
        ),
    },
    "trigger that leaves rows out": {
        "postgres": (
            [
                PLAIN,
                "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
                "CREATE TRIGGER skip BEFORE INSERT ON answers FOR EACH ROW WHEN (new.id > 1) EXECUTE FUNCTION skip()",
            ],
            ["DROP TRIGGER skip ON answers"],
        ),
        "sqlite": (
            [PLAIN, "CREATE TRIGGER skip BEFORE INSERT ON answers WHEN new.id > 1 BEGIN SELECT RAISE(IGNORE); END"],
            ["DROP TRIGGER skip"],
        ),
    },
    "rule": {
        "postgres": (
            [PLAIN, "CREATE RULE skip AS ON INSERT TO answers WHERE new.id > 1 DO INSTEAD NOTHING"],
            ["DROP RULE skip ON answers"],
        ),
    },
    "narrow": {
        "": ([f"CREATE TABLE answers (id BIGINT, {REST})".replace("VARCHAR(999)", "VARCHAR(3)")], ANEW),
    },
}
_SKIPS = ("trigger that leaves rows out", "rule")
#: these do not refuse rows there: SQLite checks foreign keys only where asked to, and no length; DuckDB has no triggers and no lengths;
#: Snowflake enforces no constraint, and its emulation no length
TAKES = {
    "sqlite": ("foreign key", "narrow", "unique, deferred", "rule"),
    "duckdb": ("trigger", "narrow", "unique, deferred", *_SKIPS),
    "mysql": ("unique, deferred", *_SKIPS),
    "postgres": (),
    "snowflake": tuple(REFUSING),
}


@pytest.mark.parametrize(
    ("what", "disposition"),
    [
        *((what, "merge") for what in REFUSING),
        ("check", "append"),
        ("unique", "replace"),
        ("trigger", "append"),
        ("trigger that leaves rows out", "append"),
    ],
)
def test_rows_that_a_table_refuses_are_not_lost_and_land_once_it_takes_them(place: Place, what: str, disposition: str) -> None:
    """The error says what to do; the table and the ledger are as before; the next try lands, and pays nothing."""
    if what in TAKES[place.kind]:
        pytest.skip(f"{place.kind} has no {what} that refuses rows")
    make, mend = REFUSING[what].get(place.kind) or REFUSING[what][""]
    place.run(*make)
    sent = place.ledger.submit([{"id": i, "name": f"thing {i}"} for i in range(3)])
    requests = place.ledger.rows("SELECT COUNT(*) AS n FROM batchkit_batch")
    with pytest.raises(BatchKitError) as e:
        place.fetch(sent.batch_ids, disposition=disposition)
    for words in ("answers", "Nothing", "29 days", "try again" if e.value.retryable else "clear the task"):
        assert words in str(e.value)
    assert place.rows("SELECT COUNT(*) FROM answers") == [(0,)]
    assert place.ledger.rows("SELECT * FROM batchkit_landing") == []
    assert [row["state"] for row in place.ledger.rows("SELECT state FROM batchkit_batch")] in (["submitted"], ["prepared"])
    place.run(*mend)
    assert place.fetch(sent.batch_ids, disposition=disposition).rows == 3
    assert place.rows("SELECT COUNT(*) FROM answers") == [(3,)]
    assert len(place.ledger.rows("SELECT * FROM batchkit_landing")) == 1
    assert place.ledger.rows("SELECT COUNT(*) AS n FROM batchkit_batch") == requests
    if place.results is not None:
        assert not [name for name in place.results.tables() if name.startswith("batchkit_stage")]


def test_a_batch_that_is_refused_keeps_no_other_from_landing(place: Place) -> None:
    """Each batch is a load of its own."""
    if place.kind == "snowflake":
        pytest.skip("Snowflake enforces no CHECK")
    place.run(f"CREATE TABLE answers (id BIGINT, {REST}, CHECK (id <> 0))")
    sent = place.ledger.submit([{"id": i, "name": f"thing {i}"} for i in range(4)], max_requests=2)
    with pytest.raises(BatchKitError, match="did not take the rows of"):
        place.fetch(sent.batch_ids)
    assert sorted(place.rows("SELECT id FROM answers")) == [(2,), (3,)]


STRICT = "id INTEGER, response TEXT, status TEXT, custom_id TEXT, batch_id TEXT, cost_usd REAL, landed_at TEXT, round INTEGER"


@pytest.mark.parametrize("place", ["beside-sqlite", "sqlite"], indirect=True)
@pytest.mark.parametrize("column", ["id BLOB", "response BLOB", "round BLOB", "cost_usd INTEGER", "landed_at INTEGER", "landed_at REAL"])
def test_a_strict_column_that_takes_no_value_is_refused_before_anything_is_sent(place: Place, column: str) -> None:
    """Other tables of SQLite take any value in any column, and a STRICT one whose types fit takes the results."""
    name = column.partition(" ")[0]
    adapter = None if place.results is None else place.results.adapter
    rows = [{"id": i, "name": f"thing {i}"} for i in range(3)]
    columns = [column if one.startswith(f"{name} ") else one for one in STRICT.split(", ")]
    place.run(f"CREATE TABLE answers ({', '.join(columns)}) STRICT")
    with pytest.raises(TableError, match=f"is STRICT, and .*: {column}.*Nothing was written"):
        place.ledger.submit(rows, table="answers", results=adapter)
    assert place.ledger.rows("SELECT * FROM batchkit_batch") == []
    for anew in (f"({', '.join(columns)})", f"({STRICT}) STRICT"):
        place.run("DROP TABLE answers", f"CREATE TABLE answers {anew}")
        sent = place.ledger.submit(rows, table="answers", results=adapter)
        assert place.fetch(sent.batch_ids).rows == 3


#: kind of database → a trigger that leaves an update out, and what removes it
KEEPS_OLD: dict[str, tuple[Sequence[str], str]] = {
    "sqlite": (["CREATE TRIGGER keep BEFORE UPDATE ON answers BEGIN SELECT RAISE(IGNORE); END"], "DROP TRIGGER keep"),
    "postgres": (
        [
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
            "CREATE TRIGGER keep BEFORE UPDATE ON answers FOR EACH ROW EXECUTE FUNCTION keep()",
        ],
        "DROP TRIGGER keep ON answers",
    ),
}


@pytest.mark.parametrize("place", ["beside-sqlite", "beside-postgres", "sqlite", "postgres-psycopg3"], indirect=True)
def test_an_update_that_a_trigger_leaves_out_is_found(place: Place) -> None:
    """A merge over an older answer: the new one is paid for, and the old one would stay as if it were new."""
    make, remove = KEEPS_OLD[place.kind]
    place.run(PLAIN)
    first = place.ledger.submit([{"id": 1, "name": "old"}]).batch_ids
    place.fetch(first)
    second = place.ledger.submit([{"id": 1, "name": "new"}], run_id="later").batch_ids
    place.run(*make)
    with pytest.raises(TableError, match="29 days"):
        place.fetch(second, run_id="later")
    assert place.rows("SELECT batch_id FROM answers") == [(first[0],)]
    place.run(remove)
    place.fetch(second, run_id="later")
    assert place.rows("SELECT batch_id FROM answers") == [(second[0],)]


@pytest.mark.parametrize("place", ["beside-sqlite", "beside-postgres", "sqlite", "postgres-psycopg3"], indirect=True)
def test_a_trigger_that_changes_a_row_keeps_nothing_out(place: Place) -> None:
    """A column of the table's own that says when a row was written."""
    place.run(PLAIN.removesuffix(")") + ", seen INTEGER DEFAULT 0)")
    if place.kind == "sqlite":
        place.run("CREATE TRIGGER see AFTER UPDATE ON answers BEGIN UPDATE answers SET seen = seen + 1 WHERE id = new.id; END")
    else:
        place.run(
            "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN new.seen = old.seen + 1; RETURN new; END $$",
            "CREATE TRIGGER see BEFORE UPDATE ON answers FOR EACH ROW EXECUTE FUNCTION see()",
        )
    for name in ("old", "new"):
        ids = place.ledger.submit([{"id": 1, "name": name}, {"id": 2, "name": f"{name} [[sim:overloaded]]"}], run_id=name).batch_ids
        place.fetch(ids, run_id=name, include_failed=True)
    assert place.rows("SELECT id, seen, batch_id FROM answers ORDER BY id") == [(1, 1, ids[0]), (2, 1, ids[0])]

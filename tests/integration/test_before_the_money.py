"""What would keep results from landing in a database that is not the ledger's is found before the first POST."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import BatchKitError, TableError, WarehouseBusyError
from airflow_provider_batchkit.landing import WriteDisposition
from airflow_provider_batchkit.landing.warehouse import warehouse_of
from airflow_provider_batchkit.simulator import Simulator
from airflow_provider_batchkit.source.rows import RowItems, Rows
from tests.databases import Database
from tests.results import Results, results_in
from tests.warehouse import Warehouse

REST = "response VARCHAR(999), status VARCHAR(20), custom_id VARCHAR(64), batch_id VARCHAR(100)"


def submit(ledger: Warehouse, results: Results, key: Any = 1, disposition: WriteDisposition | None = None, **told: str) -> list[str]:
    """Submit one row for the table ``answers``."""
    source: Any = RowItems(iter([Rows(["id", "name"], [(key, "n")], told)]))
    return ledger.submit(source, table="answers", results=results.adapter, disposition=disposition).batch_ids


@contextlib.contextmanager
def refused(sim: Simulator, says: str, error: type[BatchKitError] = TableError) -> Iterator[None]:
    """Something is refused in these words, and nothing was sent."""
    with pytest.raises(error, match=says):
        yield
    assert sim.stats()["requests_accepted"] == 0


def left(results: Results) -> list[str]:
    return [name for name in results.tables() if name.startswith(("batchkit_probe", "batchkit_stage"))]


def test_what_fits_is_sent_and_lands(ledger: Warehouse, results: Results) -> None:
    """The proof that a staging table can be made leaves nothing behind."""
    ids = submit(ledger, results)
    assert not [name for name in results.tables() if name.startswith(("batchkit", "answers"))]
    assert ledger.fetch(ids, into=results.adapter).rows == 1
    assert left(results) == []


def test_what_a_killed_preflight_left_is_dropped_by_a_later_one(
    ledger: Warehouse, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is so young that its worker may be at work, or a table of somebody else's whose name begins alike."""

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(results.adapter, "count", die)
        for age in (7200, 0):
            patch.setattr(time, "time", lambda then=now - age: then)
            with pytest.raises(Killed):
                submit(ledger, results)
    old, young = sorted(left(results))
    results.run("CREATE TABLE batchkit_probe_notes (n BIGINT)")
    submit(ledger, results)
    assert old < young and sorted(left(results)) == [young, "batchkit_probe_notes"]


@pytest.mark.parametrize("column", ["id", "status", "model"])
def test_a_generated_column_that_a_landing_writes_is_refused(ledger: Warehouse, results: Results, sim: Simulator, column: str) -> None:
    """A key, a column that is required, and one that is not."""
    if results.kind == "snowflake":
        pytest.skip("fakesnow makes no virtual columns; test_results_snowflake judges described ones")
    kinds = {"id": ("BIGINT", "1"), "status": ("VARCHAR(20)", "'x'"), "model": ("VARCHAR(100)", "'x'")}
    (kind, value), columns = kinds[column], f"id BIGINT, {REST}, model VARCHAR(100), plain BIGINT"
    how = "STORED" if results.kind == "postgres" else "VIRTUAL"
    columns = columns.replace(f"{column} {kind}", f"{column} {kind} GENERATED ALWAYS AS ({value}) {how}", 1)
    results.run(f"CREATE TABLE answers ({columns})")
    with refused(sim, rf"generates columns that a landing writes \(make them plain columns\): {column}"):
        submit(ledger, results)


def test_a_generated_column_that_no_landing_writes_is_left_alone(ledger: Warehouse, results: Results) -> None:
    """It has its value of the database."""
    if results.kind == "snowflake":
        pytest.skip("fakesnow makes no virtual columns")
    how = "STORED" if results.kind == "postgres" else "VIRTUAL"
    results.run(f"CREATE TABLE answers (id BIGINT, {REST}, twice BIGINT GENERATED ALWAYS AS (id * 2) {how})")
    for _ in range(2):
        ledger.fetch(submit(ledger, results, 7), into=results.adapter, rewrite=True)
    assert results.rows("SELECT id, twice FROM answers") == [(7, 14)]


#: of a source that tells no scale: 13 decimals; 25 digits before them, which a rounding to 28 digits would hide; 27 digits before the point
WIDE = ["1.1234567890123", "1234567890123456789012345.1234567890123", "123456789012345678901234567"]


@pytest.mark.parametrize("key", WIDE)
def test_a_decimal_key_with_too_many_digits_is_refused(ledger: Warehouse, results: Results, sim: Simulator, key: str) -> None:
    """DuckDB, MySQL, MariaDB and Snowflake have decimals of a fixed scale; PostgreSQL and SQLite keep every digit."""
    if results.kind in ("duckdb", "mysql", "snowflake"):
        with refused(sim, rf"The key column id has the key {key}, which has more digits than .*DECIMAL\(38,12\).*Nothing was sent"):
            submit(ledger, results, Decimal(key))
    else:
        ledger.fetch(submit(ledger, results, Decimal(key)), into=results.adapter)
        assert Decimal(str(results.rows("SELECT id FROM answers")[0][0])) == Decimal(key)


def test_a_decimal_key_of_a_type_that_the_database_lacks_is_refused(ledger: Warehouse, results: Results, sim: Simulator) -> None:
    """The source tells NUMERIC(70,1), which PostgreSQL has."""
    if results.kind in ("duckdb", "mysql", "snowflake"):
        with refused(sim, r"The key column id is DECIMAL\(70,1\) in the source, and this database keeps DECIMAL"):
            submit(ledger, results, Decimal("1.5"), id="numeric(70,1)")
    else:
        assert ledger.fetch(submit(ledger, results, Decimal("1.5"), id="numeric(70,1)"), into=results.adapter).rows == 1


#: type of the key column of the table → a key that it keeps, and one that it does not
NARROW: dict[str, tuple[Any, Any]] = {
    "DECIMAL(10,2)": (Decimal("12345678.25"), Decimal("1.125")),
    "DECIMAL(6,0)": (999_999, 1_000_000),
    "SMALLINT": (-32_768, 32_768),
    "INTEGER": (2**31 - 1, -(2**31) - 1),
    "VARCHAR(5)": ("x" * 5, "x" * 6),
}


@pytest.mark.parametrize("column", NARROW)
@pytest.mark.parametrize("fits", [True, False], ids=["fits", "too wide"])
def test_a_key_that_a_narrow_column_would_change_is_refused(
    ledger: Warehouse, results: Results, sim: Simulator, column: str, fits: bool
) -> None:
    """The table's column may be narrower than the source's, as long as it keeps each key."""
    good, bad = NARROW[column]
    unlimited = {"sqlite": NARROW, "duckdb": ("VARCHAR(5)",), "snowflake": ("SMALLINT", "INTEGER")}
    if column in unlimited.get(results.kind, ()):
        pytest.skip("the column has no such limit")
    collation = f" COLLATE {'utf8mb4_nopad_bin'}" if results.kind == "mysql" and isinstance(bad, str) else ""
    charset = " CHARACTER SET utf8mb4" if collation else ""
    results.run(f"CREATE TABLE answers (id {column}{charset}{collation}, {REST})")
    if fits:
        ledger.fetch(submit(ledger, results, good), into=results.adapter)
        assert results.rows("SELECT id FROM answers") == [(good,)]
    else:
        with refused(sim, rf"({bad} needs more|would store the key {bad}|cannot hold the key {bad})"):
            submit(ledger, results, bad)


@pytest.mark.parametrize("there", [True, False], ids=["the table is there", "no table"])
@pytest.mark.parametrize("kind", ["postgres", "mysql"])
def test_a_user_who_may_not_create_tables_is_told_so(
    ledger: Warehouse, request: pytest.FixtureRequest, tmp_path: Path, sim: Simulator, kind: str, there: bool
) -> None:
    """A landing stages its rows in a table beside the result table, also where that exists."""
    with results_in({"postgres": "postgres-psycopg3", "mysql": "mysql-pymysql"}[kind], tmp_path, request) as owner:
        if there:
            owner.run(f"CREATE TABLE answers (id BIGINT, {REST})")
        with _poor_user(owner, request) as poor, refused(sim, "may not create it|No staging table can be made", BatchKitError):
            submit(ledger, poor)


def test_columns_that_this_user_may_not_write_are_named(
    ledger: Warehouse, request: pytest.FixtureRequest, tmp_path: Path, sim: Simulator
) -> None:
    """MariaDB shows a user's rights column by column."""
    with results_in("mysql-pymysql", tmp_path, request) as owner:
        owner.run(f"CREATE TABLE answers (id BIGINT, {REST})")
        with _poor_user(owner, request, "SELECT, CREATE, DROP") as poor, refused(sim, "may not INSERT and UPDATE: id, response, status"):
            submit(ledger, poor)


@pytest.mark.parametrize(("how", "lacks"), [("append", "DELETE"), ("replace", "DELETE"), ("merge", "UPDATE"), ("merge", "")])
@pytest.mark.parametrize("kind", ["postgres-psycopg3", "mysql-pymysql"])
def test_a_right_that_the_disposition_needs_is_found_before_anything_is_sent(
    ledger: Warehouse, request: pytest.FixtureRequest, tmp_path: Path, sim: Simulator, kind: str, how: str, lacks: str
) -> None:
    """An append and a replace delete rows, a merge updates them and deletes none."""
    with results_in(kind, tmp_path, request) as owner:
        owner.run(f"CREATE TABLE answers (id BIGINT, {REST})")
        rights = {"SELECT", "INSERT", "UPDATE", "DELETE"} - {lacks or "DELETE"}
        rights |= set() if owner.kind == "postgres" else {"CREATE", "DROP"}
        with _poor_user(owner, request, ", ".join(sorted(rights))) as poor:
            if owner.kind == "postgres":
                owner.run("GRANT CREATE, USAGE ON SCHEMA public TO batchkit_poor")
            if lacks:
                with refused(sim, rf"(GRANT {lacks}|may not INSERT and UPDATE)"):
                    submit(ledger, poor, disposition=WriteDisposition(how))
                with pytest.raises(TableError, match=rf"(GRANT {lacks}|may not INSERT and UPDATE)"):
                    ledger.fetch(submit(ledger, owner), into=poor.adapter, disposition=how)
                assert owner.rows("SELECT COUNT(*) FROM answers") == [(0,)]
            else:
                submit(ledger, poor, disposition=WriteDisposition(how))
                assert sim.stats()["requests_accepted"] == 1


@contextlib.contextmanager
def _poor_user(owner: Results, request: pytest.FixtureRequest, rights: str = "SELECT, INSERT, UPDATE, DELETE") -> Iterator[Results]:
    if owner.kind == "postgres":
        import psycopg

        database: Database = request.getfixturevalue("postgres")
        url = sa.make_url(database.url).set(drivername="postgresql", username="batchkit_poor", password="x")
        owner.run("DROP ROLE IF EXISTS batchkit_poor", "CREATE ROLE batchkit_poor LOGIN PASSWORD 'x'")
        owner.run("REVOKE CREATE ON SCHEMA public FROM PUBLIC", f"GRANT {rights} ON ALL TABLES IN SCHEMA public TO batchkit_poor")
        poor = warehouse_of("postgres", "results", lambda: psycopg.connect(url.render_as_string(hide_password=False)))
    else:
        import pymysql

        port, (name,) = request.getfixturevalue("mariadb_port"), owner.rows("SELECT DATABASE()")[0]
        owner.run("CREATE USER batchkit_poor@'127.0.0.1'", f"GRANT {rights} ON {name}.* TO batchkit_poor@'127.0.0.1'")
        poor = warehouse_of("mysql", "results", lambda: pymysql.connect(host="127.0.0.1", port=port, user="batchkit_poor", database=name))
    found = Results(owner.kind, owner.connect)
    found.adapter = poor
    try:
        yield found
    finally:
        drop = (
            ("DROP OWNED BY batchkit_poor", "DROP ROLE batchkit_poor")
            if owner.kind == "postgres"
            else ("DROP USER batchkit_poor@'127.0.0.1'",)
        )
        owner.run(*drop)


def test_a_database_that_cannot_be_written_is_found(ledger: Warehouse, tmp_path: Path, sim: Simulator) -> None:
    """A DuckDB file that is opened to be read alone."""
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    path = str(tmp_path / "results.duckdb")
    duckdb.connect(path).close()
    only_read = Results("duckdb", lambda: duckdb.connect(path, read_only=True))
    with refused(sim, "No staging table can be made in DuckDB beside answers.*read-only.*Nothing was sent", WarehouseBusyError):
        submit(ledger, only_read)


def test_a_column_of_a_domain_that_is_not_null_is_refused_like_a_not_null_column(
    ledger: Warehouse, request: pytest.FixtureRequest, tmp_path: Path, sim: Simulator
) -> None:
    """Also one domain over another; as a column that a landing writes NULL to, and as one that it does not write."""
    with results_in("postgres-psycopg3", tmp_path, request) as results:
        results.run("CREATE DOMAIN word AS TEXT NOT NULL", "CREATE DOMAIN short AS word CHECK (length(value) < 9)")
        for kind in ("word", "short"):
            results.run(f"CREATE TABLE answers (id BIGINT, {REST}, error_type {kind}, own {kind})")
            with refused(sim, "NULL in every row with an answer.*: error_type.*does not write .*: own"):
                submit(ledger, results)
            results.run("DROP TABLE answers")

"""Keys: a JOIN of the results with their source finds every row, or the row is refused before anything is sent."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError, TableError
from airflow_provider_batchkit.simulator import Simulator
from airflow_provider_batchkit.source.rows import RowItems
from airflow_provider_batchkit.source.sql import read_sql
from tests.databases import Database, opener
from tests.warehouse import LANDING_PATHS, Warehouse, kit_for

_NINES = "9" * 38

#: type of the source's column in PostgreSQL → the type that the results have, and SQL literals of keys
POSTGRES: dict[str, tuple[str, list[str]]] = {
    "smallint": ("smallint", ["-32768", "0", "32767"]),
    "integer": ("integer", ["-2147483648", "7"]),
    "bigint": ("bigint", ["9223372036854775807", "-9223372036854775808", "9007199254740993"]),
    "numeric": ("numeric", [f"{_NINES}.{_NINES}", "7", "7.50", "1e30", "-0.000000000000000000000000000000000001"]),
    "numeric(38,0)": ("numeric(38,0)", [_NINES, f"-{_NINES}", "12345678901234567890123456789012345678", "0"]),
    "numeric(20,5)": ("numeric(20,5)", ["7.4", "7.40001", "123456789012345.12345"]),
    "real": ("real", ["0.1", "3.4e38", "1e-40", "16777217", "'-0.0'"]),
    "double precision": ("double precision", ["0.1", "0.30000000000000004", "1e300", "7", "'-0.0'"]),
    "char(10)": ("character(10)", ["'ab'", "'AB'", "''", "'日本'", "'1234567890'", "' a'"]),
    "varchar(20)": ("character varying(20)", ["'ab'", "'ab '", "'AB'", "''", "'007'"]),
    "varchar": ("text", ["'ab'", "'ab '"]),
    "text": ("text", ["'ab'", "'ab '", "'Ab'", "''", "U&'\\00e9'", "U&'e\\0301'", "E'a\\tb\\\\n\"'", "'null'"]),
    "a_word": ("character(4)", ["'ab'", "'abcd'"]),
    "mood": ("mood", ["'glad'", "'so so'"]),
    "uuid": ("uuid", ["'00000000-0000-0000-0000-000000000001'", "'ffffffff-ffff-ffff-ffff-ffffffffffff'"]),
    "boolean": ("boolean", ["true", "false"]),
    "date": ("date", ["'0001-01-01'", "'0044-03-15'", "'9999-12-31'"]),
    "timestamp": ("timestamp without time zone", ["'2026-01-02 03:04:05.678901'", "'9999-12-31 23:59:59.999999'"]),
    "timestamptz": ("timestamp with time zone", ["'2026-01-02 03:04:05.678901+05:30'", "'2026-10-25 02:30+02'"]),
}  # fmt: skip

#: of SQLite, where any column takes any value
SQLITE: dict[str, list[str]] = {
    "ANY_NUMBER": ["7", "'abc'", "8.5"],
    "INTEGER": ["-9223372036854775808", "9007199254740993", "0"],
    "REAL": ["0.1", "0.30000000000000004", "1e300", "7", "-0.0"],
    "NUMERIC": ["7", "7.5", "1e16"],
    "TEXT": ["'ab'", "'ab '", "'AB'", "''", "'007'", "'1e5'", "'é'", "'e\u0301'", "'2026-01-02 03:04:05'"],
    "CHAR(10)": ["'ab'", "'ab        '"],
    "BOOLEAN": ["0", "1"],
    "DATE": ["'2026-01-02'", "'-0044-03-15'"],
    "": ["'a'", "'7'"],
}


def fill(engine: sa.Engine, type_: str, keys: list[str]) -> None:
    """A source table with these keys."""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE source (k {type_}, name VARCHAR(30))")
        for number, key in enumerate(keys):
            connection.exec_driver_sql(f"INSERT INTO source VALUES ({key}, 'thing {number}')".replace("%", "%%"))


def submit(warehouse: Warehouse, run_id: str = "run-1", sql: str = "SELECT k, name FROM source", **options: Any) -> list[str]:
    # a cursor that an error leaves open locks SQLite's tables
    with closing(read_sql(opener(warehouse.engine), sql)) as rows:
        return warehouse.submit(RowItems(rows), key=("k",), run_id=run_id, **options).batch_ids  # type: ignore[arg-type]


def joined(warehouse: Warehouse, table: str = "answers") -> list[tuple[str, str]]:
    """Name and answer of each row of the source that the results have."""
    return [(row["name"], row["response"]) for row in warehouse.rows(f"SELECT name, response FROM source JOIN {table} USING (k)")]


def warehouse_of(request: pytest.FixtureRequest, path: str, sim: Simulator) -> Warehouse:
    kind, driver, portable = LANDING_PATHS[path]
    url = request.getfixturevalue(kind).url.replace("+psycopg", driver or "+psycopg")
    return Warehouse(sa.create_engine(url, poolclass=sa.pool.NullPool), kit_for(sim.base_url), portable=portable)


@pytest.mark.parametrize("path", [path for path in LANDING_PATHS if path.startswith("p")])
def test_results_of_postgresql_join_their_source_by_every_key(request: pytest.FixtureRequest, sim: Simulator, path: str) -> None:
    """The key's column has the source column's type, and a second landing finds the rows of the first."""
    warehouse = warehouse_of(request, path, sim)
    warehouse.execute("CREATE DOMAIN a_word AS CHAR(4)", "CREATE TYPE mood AS ENUM ('glad', 'so so')")
    for type_, (wanted, keys) in POSTGRES.items():
        warehouse.execute("DROP TABLE IF EXISTS source, answers")
        fill(warehouse.engine, type_, keys)
        for _ in range(2):
            ids = submit(warehouse, f"run {type_} {_}")
            assert warehouse.fetch(ids, run_id=f"run {type_} {_}").rows == len(keys), type_
        found = joined(warehouse)
        assert len(found) == len(keys) == len(set(found)), type_
        assert all(name in answer for name, answer in found), type_
        (told,) = warehouse.rows(
            "SELECT format_type(atttypid, atttypmod) AS type FROM pg_attribute WHERE attrelid = 'answers'::regclass AND attname = 'k'"
        )
        assert told["type"] == wanted, type_


@pytest.mark.parametrize("path", [path for path in LANDING_PATHS if path.startswith("sqlite")])
def test_results_of_sqlite_join_their_source_by_every_key(request: pytest.FixtureRequest, sim: Simulator, path: str) -> None:
    """SQLite tells no types: the values do, and its affinities keep them equal."""
    warehouse = warehouse_of(request, path, sim)
    for type_, keys in SQLITE.items():
        warehouse.execute("DROP TABLE IF EXISTS source", "DROP TABLE IF EXISTS answers")
        fill(warehouse.engine, type_, keys)
        for _ in range(2):
            ids = submit(warehouse, f"run {type_} {_}")
            assert warehouse.fetch(ids, run_id=f"run {type_} {_}").rows == len(keys), type_
        found = joined(warehouse)
        assert len(found) == len(keys) == len(set(found)), (type_, found)
        assert all(name in answer for name, answer in found), type_


#: what no key can be: type, literal, and what the refusal says
REFUSED = {
    "postgres": [
        ("double precision", "'NaN'", "nan is not a number"),
        ("real", "'-Infinity'", "-inf is not a number"),
        ("numeric", "'NaN'", "NaN is not a number"),
        ("numeric", "'Infinity'", "Infinity is not a number"),
        ("date", "'infinity'", "a value that Python cannot hold.*infinity"),
        ("date", "'0044-03-15 BC'", "a value that Python cannot hold"),
        ("timestamp", "'-infinity'", "a value that Python cannot hold.*infinity"),
        ("timestamptz", "'infinity'", "a value that Python cannot hold.*infinity"),
        ("timestamptz", "'9999-12-31 23:59:59-05'", "cannot be a key|a value that Python cannot hold"),
        ("bytea", "'x'", "not supported; cast it to text"),
        ("jsonb", "'{}'", "not supported; cast it to text"),
        ("text[]", "'{a}'", "not supported; cast it to text"),
        ("time", "'03:04'", "not supported; cast it to text"),
        ("interval", "'1 day'", "not supported; cast it to text"),
        ("text", "NULL", "it is NULL"),
    ],
    "sqlite": [
        ("REAL", "9e999", "inf is not a number"), ("TEXT", "'a' || char(0) || 'b'", "NUL character"), ("", "x'00'", "not supported"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("path", ["sqlite", "psycopg3", "psycopg2"])
def test_a_key_that_cannot_be_found_again_is_refused_before_anything_is_sent(
    request: pytest.FixtureRequest, sim: Simulator, path: str
) -> None:
    """In words, with the row or the value."""
    warehouse = warehouse_of(request, path, sim)
    for type_, key, message in REFUSED[LANDING_PATHS[path][0]]:
        warehouse.execute("DROP TABLE IF EXISTS source")
        fill(warehouse.engine, type_, ["NULL" if key == "NULL" else key])
        with pytest.raises((RequestError, BatchInputError), match=message) as refused:
            submit(warehouse, f"run {type_} {key}")
        assert "row 0" in str(refused.value) and "Nothing was sent" in str(refused.value)
    assert sim.stats()["requests_accepted"] == 0


def test_keys_that_the_database_takes_for_one_are_refused_as_repeated(database: Database, sim: Simulator) -> None:
    """The two zeros of a float are equal in SQL, and so are they as keys."""
    warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
    fill(warehouse.engine, "DOUBLE PRECISION", ["0.0", "'-0.0'" if database.kind == "postgres" else "-0.0"])
    with pytest.raises(RequestError, match=r"\[0\.0\]"):
        submit(warehouse)


def test_a_key_that_changes_its_type_between_runs_is_refused(database: Database, sim: Simulator) -> None:
    """BIGINT at first, then 7.4: it would be stored as 7."""
    warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
    fill(warehouse.engine, "BIGINT", ["7", "8"])
    warehouse.fetch(submit(warehouse))
    warehouse.execute("DROP TABLE source")
    for number, (type_, key) in enumerate((("NUMERIC(5, 2)", "7.4"), ("DOUBLE PRECISION", "7.4"), ("VARCHAR(5)", "'7'"))):
        warehouse.execute("DROP TABLE IF EXISTS source")
        fill(warehouse.engine, type_, [key])
        ids = submit(warehouse, f"later {number}")
        with pytest.raises(TableError, match="does not fit the source's key: k is BIGINT and must be"):
            warehouse.fetch(ids, run_id=f"later {number}")
    assert sorted(row["k"] for row in warehouse.rows("SELECT k FROM answers")) == [7, 8]


@pytest.mark.parametrize("path", [path for path in LANDING_PATHS if path.startswith("p")])
def test_a_table_of_an_earlier_release_goes_on_as_it_was(
    request: pytest.FixtureRequest, sim: Simulator, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its key columns are wider than the source's: TEXT with padded values for CHAR, DOUBLE PRECISION for REAL. Rows are found again, and a
    warning says how to make them join.
    """
    warehouse = warehouse_of(request, path, sim)
    warehouse.execute("CREATE TYPE mood AS ENUM ('glad')")
    cases = {
        "char(10)": ("text", "'ab'", "'ab        '"), "real": ("double precision", "0.1", "0.1"), "mood": ("text", "'glad'", "'glad'"),
        "smallint": ("bigint", "7", "7"), "numeric(38,0)": ("numeric", _NINES[:20], _NINES[:20]), "varchar(3)": ("text", "'a '", "'a '"),
    }  # fmt: skip
    for number, (type_, (old, key, stored)) in enumerate(cases.items()):
        warehouse.execute("DROP TABLE IF EXISTS source, answers")
        fill(warehouse.engine, type_, [key])
        warehouse.fetch(submit(warehouse, f"make {number}"), run_id=f"make {number}")
        warehouse.execute(
            f"ALTER TABLE answers ALTER COLUMN k TYPE {old} USING {stored}::{old}",
            "UPDATE answers SET response = 'old', status = 'errored'",
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warehouse.fetch(submit(warehouse, f"again {number}"), run_id=f"again {number}")
        (row,) = warehouse.rows(f"SELECT k = {stored}::{old} AS same, response FROM answers")
        assert row["same"] and row["response"] != "old", type_
        assert ("a JOIN with the source may not find them" in caplog.text) is (type_ in ("char(10)", "real", "mood")), type_


def test_batches_whose_sources_told_more_or_less_land_together(postgres: Database, sim: Simulator) -> None:
    """One was submitted from rows of Python, or by an earlier release, the other from a query that tells INTEGER."""
    warehouse = Warehouse(postgres.engine(), kit_for(sim.base_url))
    fill(warehouse.engine, "INTEGER", ["1"])
    told = submit(warehouse)
    untold = warehouse.submit([{"k": 2, "name": "tea"}], key=("k",), run_id="run-2").batch_ids
    warehouse.fetch([*told, *untold])
    assert sorted(row["k"] for row in warehouse.rows("SELECT k FROM answers")) == [1, 2]

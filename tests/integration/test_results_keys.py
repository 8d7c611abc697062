"""The keys of results in a database that is not the ledger's: a JOIN with the source finds every row, for each type that a key may have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings
from airflow_provider_batchkit.source.rows import RowItems
from airflow_provider_batchkit.source.sql import read_sql
from tests.integration.test_keys import POSTGRES, SQLITE
from tests.results import Results
from tests.warehouse import Warehouse, kit_for

#: database → type of the source's column → SQL literals of keys
SOURCES: dict[str, dict[str, list[str]]] = {
    "sqlite": SQLITE,
    "postgres": {type_: keys for type_, (_, keys) in POSTGRES.items()},
    "duckdb": {
        "TINYINT": ["-128", "127"],
        "SMALLINT": ["-32768", "32767"],
        "INTEGER": ["-2147483648", "7"],
        "BIGINT": ["9223372036854775807", "-9223372036854775808", "9007199254740993"],
        "UTINYINT": ["0", "255"],
        "USMALLINT": ["0", "65535"],
        "UINTEGER": ["0", "4294967295"],
        "UBIGINT": ["0", "9223372036854775807"],
        "HUGEINT": ["0", "-9223372036854775808"],
        "DECIMAL(38,0)": ["9" * 38, "0", "-7"],
        "DECIMAL(20,5)": ["7.4", "7.40001", "123456789012345.12345"],
        "DECIMAL(38,20)": ["1.12345678901234567890", "7"],
        "FLOAT": ["0.1", "3.4e38", "1e-40", "16777217"],
        "DOUBLE": ["0.1", "0.30000000000000004", "1e300", "7"],
        "VARCHAR": ["'ab'", "'ab '", "'Ab'", "''", "'é'", "'e\u0301'", "'null'", "'007'"],
        "BOOLEAN": ["true", "false"],
        "UUID": ["'00000000-0000-0000-0000-000000000001'", "'ffffffff-ffff-ffff-ffff-ffffffffffff'"],
        "DATE": ["'0001-01-01'", "'0044-03-15'", "'9999-12-31'"],
        "TIMESTAMP": ["'2026-01-02 03:04:05.678901'", "'9999-12-31 23:59:59.999999'"],
        "TIMESTAMPTZ": ["'2026-01-02 03:04:05.678901+05:30'", "'2026-10-25 02:30:00+02'"],
        "mood": ["'glad'", "'so so'"],
    },
    "mysql": {
        "SMALLINT": ["-32768", "32767"],
        "INT": ["-2147483648", "7"],
        "BIGINT": ["9223372036854775807", "-9223372036854775808", "9007199254740993"],
        "INT UNSIGNED": ["0", "4294967295"],
        "DECIMAL(26,0)": ["9" * 26, "0", "-7"],
        "DECIMAL(20,5)": ["7.4", "7.40001", "123456789012345.12345"],
        "DOUBLE": ["0.1", "0.30000000000000004", "1e300", "7"],
        "CHAR(10)": ["'ab'", "''", "'日本'", "'1234567890'", "' a'"],
        "VARCHAR(20)": ["'ab'", "''", "'007'"],
        "VARCHAR(20) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin": ["'ab'", "'ab '", "'AB'", "'é'", "'e\u0301'"],
        "VARCHAR(20) CHARACTER SET latin1": ["'ab'", "'é'"],
        "TEXT": ["'ab'", "'cd'"],
        "ENUM('glad','so so')": ["'glad'", "'so so'"],
        "BOOLEAN": ["true", "false"],
        "DATE": ["'1000-01-01'", "'9999-12-31'"],
        "DATETIME(6)": ["'2026-01-02 03:04:05.678901'", "'9999-12-31 23:59:59.999999'"],
        "TIMESTAMP": ["'2026-01-02 03:04:05'", "'2037-12-31 23:59:59'"],
    },
    "snowflake": {
        "NUMBER(38,0)": ["9223372036854775807", "-9223372036854775808", "7"],
        "NUMBER(20,5)": ["7.4", "7.40001", "123456789012345.12345"],
        "FLOAT": ["0.1", "0.30000000000000004", "1e300", "7"],
        "VARCHAR": ["'ab'", "'ab '", "'Ab'", "''", "'é'", "'e\u0301'", "'null'", "'007'"],
        "CHAR(10)": ["'ab'", "'AB'"],
        "BOOLEAN": ["true", "false"],
        "DATE": ["'0044-03-15'", "'9999-12-31'"],
        "TIMESTAMP_NTZ": ["'2026-01-02 03:04:05.678901'", "'9999-12-31 23:59:59.999999'"],
        "TIMESTAMP_TZ": ["'2026-01-02 03:04:05.678901+05:30'", "'2026-10-25 02:30:00+02:00'"],
    },
}
#: statements before the first source
TYPES = {
    "postgres": ("CREATE DOMAIN a_word AS CHAR(4)", "CREATE TYPE mood AS ENUM ('glad', 'so so')"),
    "duckdb": ("CREATE TYPE mood AS ENUM ('glad', 'so so')",),
}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Warehouse]:
    """A SQLite ledger, and a kit on the simulator."""
    with Simulator(SimulatorSettings()) as simulator:
        yield Warehouse(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db", poolclass=sa.pool.NullPool), kit_for(simulator.base_url))


def submit(
    ledger: Warehouse, results: Results, run: str, columns: list[str], source: str = "source", more: Sequence[str] = ()
) -> list[str]:
    def connect() -> Any:
        connection = results.connect()
        results.adapter.prepare(connection)
        return connection

    # Snowflake gives names in upper case
    quote = results.adapter.quote_character
    names = ", ".join(f"{column} AS {quote}{column}{quote}" for column in (*columns, *more, "name"))
    with closing(read_sql(connect, f"SELECT {names} FROM {source}")) as rows:
        items: Any = RowItems(rows)
        return ledger.submit(items, key=tuple(columns), run_id=run, table="answers", results=results.adapter).batch_ids


def test_results_join_their_source_by_every_key(ledger: Warehouse, results: Results) -> None:
    """Source and results are in one database, the ledger in another. Eight types at a time are the columns of one key, and each of them
    alone finds the rows that have its values. The second landing finds the rows of the first.
    """
    results.run(*TYPES.get(results.kind, ()))
    sources = list(SOURCES[results.kind].items())
    for start in range(0, len(sources), 8):
        types = {f"k{number}": source for number, source in enumerate(sources[start : start + 8])}
        rows = max(len(keys) for _, keys in types.values())
        # each column begins again when its keys are used up
        values = [", ".join([*(keys[row % len(keys)] for _, keys in types.values()), f"'thing {row}'"]) for row in range(rows)]
        columns = ", ".join(f"{column} {type_}" for column, (type_, _) in types.items())
        utf8 = " CHARACTER SET utf8mb4" if results.kind == "mysql" else ""
        results.run(
            "DROP TABLE IF EXISTS source", "DROP TABLE IF EXISTS answers", f"CREATE TABLE source ({columns}, name VARCHAR(30)){utf8}"
        )
        results.run(*(f"INSERT INTO source VALUES ({row})" for row in values))
        for turn in range(2):
            run = f"run {start} {turn}"
            ids = submit(ledger, results, run, list(types))
            assert ledger.fetch(ids, into=results.adapter, run_id=run).rows == rows, types
            assert results.rows("SELECT COUNT(*) FROM answers") == [(rows,)], types
        for column, (type_, keys) in types.items():
            pairs = [(a, b) for a in range(rows) for b in range(rows) if a % len(keys) == b % len(keys)]
            found = results.rows(f"SELECT s.name, a.response FROM source s JOIN answers a USING ({column})")
            assert len(found) == len(set(found)) == len(pairs), type_
            assert sum(name in answer for name, answer in found) == rows, type_


def test_a_text_key_of_mariadb_s_padding_binary_collation_joins_with_a_collate(ledger: Warehouse, results: Results) -> None:
    """MariaDB compares no ``utf8mb4_bin`` with the ``utf8mb4_nopad_bin`` of the results by itself, as the README says."""
    if results.kind != "mysql":
        pytest.skip("only MariaDB has two binary collations of which neither gives way")
    results.run("CREATE TABLE source (k VARCHAR(20) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin, name VARCHAR(30))")
    results.run("INSERT INTO source VALUES ('ab', 'thing 0'), ('AB', 'thing 1')")
    assert ledger.fetch(submit(ledger, results, "run-1", ["k"]), into=results.adapter).rows == 2
    with pytest.raises(Exception, match="Illegal mix of collations"):
        results.rows("SELECT name FROM source JOIN answers USING (k)")
    found = results.rows("SELECT name, response FROM source s JOIN answers a ON s.k = a.k COLLATE utf8mb4_nopad_bin")
    assert len(found) == 2 and all(name in answer for name, answer in found)


ROUNDED = {
    "mysql": ("FLOAT", "0.1", "CAST(k AS DOUBLE)"),
    "duckdb": ("TIMESTAMP_NS", "'2026-01-01 00:00:00.123456789'", "CAST(k AS VARCHAR)"),
}


def test_a_key_whose_values_come_rounded_is_refused(ledger: Warehouse, results: Results) -> None:
    """Before anything is sent, with the cast whose values the results find again. Such a column that is no key is read as ever."""
    if results.kind not in ROUNDED:
        pytest.skip(f"{results.kind} gives the values of every type as they are")
    type_, value, cast = ROUNDED[results.kind]
    results.run(f"CREATE TABLE source (k {type_}, name VARCHAR(30))", f"INSERT INTO source VALUES ({value}, 'thing 0')")
    with pytest.raises(BatchInputError, match=r"The key column k is of a type whose values come rounded.*Nothing was sent"):
        submit(ledger, results, "run-1", ["k"])
    results.run(f"CREATE VIEW cast_source AS SELECT {cast} AS k, k AS plain, name FROM source")
    ids = submit(ledger, results, "run-2", ["k"], "cast_source", ["plain"])
    assert ledger.fetch(ids, into=results.adapter, run_id="run-2").rows == 1
    assert results.rows(f"SELECT COUNT(*) FROM source s JOIN answers a ON {cast.replace('k ', 's.k ')} = a.k") == [(1,)]


def test_the_readme_lists_the_types_that_are_tested() -> None:
    """What the README names as types of PostgreSQL's keys is what is tested here and in ``test_keys``."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    listed = text[(begin := text.index("PostgreSQL tells")) : text.index("a domain is its base type", begin)]
    named = set(re.findall(r"[A-Z][A-Z ]+[A-Z]", listed.replace("PostgreSQL", "")))
    # the README's words for a range of types, and for two types at once
    named |= {"INTEGER", "enumeration", "TIMESTAMPTZ"} if "with and without a zone" in listed and "enumerations" in listed else set()
    tested = {re.sub(r"\(.*", "", type_).upper() for type_ in POSTGRES} - {"A_WORD", "MOOD"} | {"enumeration"}
    assert named == tested

"""What is Snowflake's own among the databases of results: names, sessions, locks, and what is refused before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import BatchInputError, TableError
from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.landing.warehouse import warehouse_of
from airflow_provider_batchkit.landing.warehouse.catalog import check_columns
from airflow_provider_batchkit.landing.warehouse.snowflake import TYPES, Snowflake, found_column
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings
from tests.results import Results, fakesnow_connect, results_in
from tests.warehouse import Warehouse, kit_for

REST = "response VARCHAR, status VARCHAR, custom_id VARCHAR, batch_id VARCHAR"


@pytest.fixture
def lake(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Results]:
    with results_in("snowflake", tmp_path, request) as found:
        yield found


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Warehouse]:
    with Simulator(SimulatorSettings()) as simulator:
        yield Warehouse(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db", poolclass=sa.pool.NullPool), kit_for(simulator.base_url))


def table_named(name: str, key: str = "id", kind: str = "integer") -> ResultTable:
    return ResultTable(name, [(key, kind)])


def check(results: Results, table: ResultTable) -> bool:
    with results.adapter.open() as connection:
        return results.adapter.check(connection, table)


class Watched:
    """A connection whose statements a test sees, and may refuse, before they run."""

    def __init__(self, connection: Any, see: Callable[[str], None]) -> None:
        self._connection, self._see = connection, see

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def commit(self) -> None:
        self._see("COMMIT")
        self._connection.commit()

    def rollback(self) -> None:
        self._see("ROLLBACK")
        self._connection.rollback()

    def cursor(self) -> Any:
        cursor = self._connection.cursor()
        execute = cursor.execute

        def seen(statement: str, *more: Any) -> Any:
            self._see(statement)
            return execute(statement, *more)

        cursor.execute = seen
        return cursor


# --- names ----------------------------------------------------------------------------------------------------------------------------


def test_a_name_without_quotes_is_upper_case_and_one_with_them_is_another_table(ledger: Warehouse, lake: Results) -> None:
    """However a task spells a table, the ledger knows it by one name; a name in quotes is not folded."""
    sent = ledger.submit([{"id": 1, "name": "n"}])
    for spelled in ("products_enriched", "Shop.Products_Enriched", 'LAKE."SHOP".PRODUCTS_ENRICHED'):
        ledger.fetch(sent.batch_ids, spelled, into=lake.adapter)
    ledger.fetch(sent.batch_ids, '"products_enriched"', into=lake.adapter)
    found = ledger.rows("SELECT table_name FROM batchkit_landing ORDER BY landed_at")
    assert [row["table_name"] for row in found] == ["results:LAKE.SHOP.PRODUCTS_ENRICHED", 'results:LAKE.SHOP."products_enriched"']
    assert lake.rows("SELECT id FROM products_enriched") == [(1,)]


@pytest.mark.parametrize("name", ["my-table", "a.b.c.d", "a..b", '"open', "1st", "a b"])
def test_what_is_no_name_in_snowflake_is_refused(lake: Results, name: str) -> None:
    """And the message says how to write it."""
    with pytest.raises(TableError, match="Write it as in SQL"):
        check(lake, table_named(name))


def test_a_schema_or_a_database_that_is_not_there_is_named(lake: Results) -> None:
    """Snowflake shows neither to a role without USAGE on it."""
    for name, place in (("nowhere.answers", "LAKE.NOWHERE"), ("swamp.shop.answers", "SWAMP.SHOP")):
        with pytest.raises(TableError, match=f"is to be in {place}, which does not exist, or the role"):
            check(lake, table_named(name))


@pytest.mark.parametrize(("home", "lacks"), [((None, None), "database"), (("LAKE", None), "schema")])
def test_a_connection_without_a_schema_is_refused(lake: Results, home: tuple[str | None, str | None], lacks: str) -> None:
    """Where the table's name says none either. The emulation has a schema in every session, so the answer is put in its place."""
    adapter = Snowflake("lake", lake.connect)
    with adapter.open() as connection:
        adapter._home = home
        with pytest.raises(BatchInputError, match=f"names no {lacks}, and neither does the table answers"):
            adapter.check(connection, table_named("answers"))
        assert adapter.identity(connection, "lake.shop.answers") == "LAKE.SHOP.ANSWERS"


def test_a_column_in_lower_case_is_refused_with_its_remedy(lake: Results) -> None:
    """Such tables come from programs that quote every name; Snowflake would not find the column by ``id``."""
    lake.run(f'CREATE TABLE answers ("id" NUMBER(38,0), {REST})')
    with pytest.raises(TableError, match=r'has "id" in another case .* RENAME COLUMN "id" TO id'):
        check(lake, table_named("answers"))
    lake.run('ALTER TABLE answers RENAME COLUMN "id" TO id')
    assert check(lake, table_named("answers"))


def test_a_key_whose_name_needs_quotes_lands(ledger: Warehouse, lake: Results) -> None:
    """A reserved word is upper case as any name; one with a space stays as it is."""
    sent = ledger.submit([{"order": 1, "Line No": 2, "name": "n"}], key=("order", "Line No"))
    for _ in range(2):
        ledger.fetch(sent.batch_ids, into=lake.adapter, rewrite=True)
    assert lake.rows('SELECT "ORDER", "Line No" FROM answers') == [(1, 2)]


# --- what is refused --------------------------------------------------------------------------------------------------------------------


def test_a_view_is_refused(lake: Results) -> None:
    """Before anything is read."""
    lake.run(f"CREATE TABLE t (id NUMBER(38,0), {REST})", "CREATE VIEW answers AS SELECT * FROM t")
    with pytest.raises(TableError, match="it is a view"):
        check(lake, table_named("answers"))


def described(name: str, kind: str, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """A row of DESCRIBE TABLE, as Snowflake's documentation shows it."""
    return {"name": name, "type": kind, "kind": "COLUMN", "null?": "Y", "default": None, "expression": None, **(more or {})}


def unfit(kind: str, column: dict[str, Any], collation: str | None = None) -> str:
    """What is said of a table with this key column, or this further one."""
    names = ("RESPONSE", "STATUS", "CUSTOM_ID", "BATCH_ID") if column["name"] != "RESPONSE" else ("STATUS", "CUSTOM_ID", "BATCH_ID")
    rest = [described(name, "VARCHAR(16777216)") for name in names]
    if column["name"] != "ID":
        rest.append(described("ID", "VARCHAR(50)"))
    columns = [found_column(column, collation), *(found_column(row, None) for row in rest)]
    table = table_named("answers", kind=kind)
    try:
        check_columns(table, columns, TYPES)
    except TableError as e:
        return str(e)
    return ""


@pytest.mark.parametrize(
    ("kind", "column", "collation", "says"),
    [
        ("text", described("ID", "VARCHAR(50)"), "en-ci", "does not tell keys apart"),
        ("text", described("ID", "VARCHAR(50) COLLATE 'en-ci'"), None, "does not tell keys apart"),
        ("text", described("ID", "VARCHAR(50)"), "utf8", ""),
        ("integer", described("ID", "NUMBER(38,0)"), None, ""),
        ("integer", described("ID", "VARIANT"), None, "ID is VARIANT and must be NUMBER"),
        ("timestamptz", described("ID", "TIMESTAMP_NTZ(9)"), None, "must be TIMESTAMP_TZ"),
        ("timestamptz", described("ID", "TIMESTAMP_LTZ(9)"), None, ""),
        ("timestamp", described("ID", "TIMESTAMP_NTZ(9)"), None, ""),
        ("text", described("RESPONSE", "VARCHAR(9)", {"kind": "VIRTUAL_COLUMN", "expression": "ID"}), None, "generates columns"),
        ("text", described("OWNER", "VARCHAR(9)", {"null?": "N"}), None, "NOT NULL columns without a default"),
        ("text", described("NO", "NUMBER(38,0)", {"null?": "N", "default": "IDENTITY START 1 INCREMENT 1 NOORDER"}), None, ""),
    ],
)
def test_columns_are_judged_by_what_snowflake_shows_of_them(kind: str, column: dict[str, Any], collation: str | None, says: str) -> None:
    """Collations and virtual columns cannot be made in the emulation; these rows are as the documentation has them."""
    found = unfit(kind, column, collation).replace("id is", "ID is")
    assert says in found if says else found == ""


def test_what_the_role_lacks_is_named_before_anything_is_sent(lake: Results) -> None:
    """The emulation has no roles, so the refusals are the connector's own errors, raised in its place."""
    errors = pytest.importorskip("snowflake.connector.errors", reason="snowflake-connector-python is not installed")
    lake.run(f"CREATE TABLE answers (id NUMBER(38,0), {REST})")

    def refuse(statement: str) -> None:
        if statement.startswith(("UPDATE", "DELETE")):
            raise errors.ProgrammingError("Insufficient privileges to operate on table 'ANSWERS'", errno=3001, sqlstate="42501")

    adapter = warehouse_of("snowflake", "lake", lambda: Watched(lake.connect(), refuse))
    with adapter.open() as connection, pytest.raises(TableError, match="role of the connection 'lake' lacks UPDATE, DELETE on it"):
        adapter.check(connection, table_named("answers"))


def test_a_role_that_may_not_create_tables_is_found_before_anything_is_sent(lake: Results) -> None:
    """By a staging table that is made and dropped; one that can be made is gone afterwards."""
    errors = pytest.importorskip("snowflake.connector.errors", reason="snowflake-connector-python is not installed")

    def refuse(statement: str) -> None:
        if statement.startswith("CREATE"):
            raise errors.ProgrammingError("Insufficient privileges to operate on schema 'SHOP'", errno=3001, sqlstate="42501")

    table = table_named("answers")
    with lake.adapter.open() as connection:
        lake.adapter.probe(connection, table)
    assert not [name for name in lake.tables() if name.startswith("batchkit")]
    adapter = warehouse_of("snowflake", "lake", lambda: Watched(lake.connect(), refuse))
    with adapter.open() as connection, pytest.raises(TableError, match=r"on schema 'SHOP'.*CREATE TABLE on the schema"):
        adapter.probe(connection, table)


# --- sessions and locks -------------------------------------------------------------------------------------------------------------------


def test_markers_are_read_and_loads_published_in_sessions_that_begin_after_the_fence(
    ledger: Warehouse, lake: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each transaction of the fence takes the lock with its first statement: a later one sees what was committed before that."""
    said: list[tuple[int, str]] = []
    opened = 0

    def connect() -> Any:
        nonlocal opened
        opened += 1
        session = opened
        return Watched(lake.connect(), lambda statement: said.append((session, statement)))

    adapter = warehouse_of("snowflake", "results", connect)
    sent = ledger.submit([{"id": 1, "name": "n"}])
    ledger.fetch(sent.batch_ids, into=adapter)
    place = {what: next(n for n, (_, s) in enumerate(said) if what in s) for what in ("SET turn", "SELECT load_id", "SELECT s.")}
    raised, marked, published = place.values()
    assert len({said[n][0] for n in (raised, marked, published)}) == 3
    for n in (marked, published):
        began = next(at for at, (session, _) in enumerate(said) if session == said[n][0])
        assert began > raised
    for n, (session, statement) in enumerate(said):
        if "SET turn" in statement:
            before = [s for at, s in said[:n] if at == session][-2:]
            assert before[0].startswith("BEGIN") and "BATCHKIT_LOCK" in before[1]
    # no statement of a transaction commits it
    for session in {session for session, _ in said}:
        own = [s for at, s in said if at == session]
        for begin in (at for at, s in enumerate(own) if s.startswith("BEGIN")):
            within = own[begin + 1 : next(at for at in range(begin, len(own)) if own[at] in ("COMMIT", "ROLLBACK"))]
            assert not [s for s in within if s.startswith(("CREATE", "DROP", "ALTER"))]


def test_a_lock_without_its_row_is_no_lock(lake: Results) -> None:
    """Somebody has emptied the table: an UPDATE of no row would hold up nobody."""
    table = table_named("answers")
    with lake.adapter.open() as connection:
        lake.adapter.create(connection, table, unique_key=True)
        lake.adapter.create_books(connection, table)
        assert lake.adapter.raise_fence(connection, table, "f", 1)
        lake.adapter.run(connection, "DELETE FROM batchkit_lock")
        with pytest.raises(TableError, match="has 0 rows in place of its only one"):
            lake.adapter.raise_fence(connection, table, "f", 2)
        lake.adapter.run(connection, "DROP TABLE batchkit_lock")
        lake.adapter.create_books(connection, table)
        assert lake.adapter.raise_fence(connection, table, "f", 2) and not lake.adapter.raise_fence(connection, table, "f", 1)


def test_a_lock_that_is_not_had_in_time_is_somebody_else_s_and_no_failure() -> None:
    """Error 625: the statement waited too long, or behind too many others. Other errors are failures."""
    errors = pytest.importorskip("snowflake.connector.errors", reason="snowflake-connector-python is not installed")
    adapter = Snowflake("lake", fakesnow_connect())
    assert adapter.is_conflict(errors.ProgrammingError("has locked table 'BATCHKIT_LOCK'", errno=625, sqlstate="57014"))
    assert not adapter.is_conflict(errors.ProgrammingError("SQL execution canceled", errno=604, sqlstate="57014"))


def test_autocommit_is_on_whatever_the_connection_says() -> None:
    """The fence would be raised in a transaction that nobody commits."""
    adapter = warehouse_of("snowflake", "lake", fakesnow_connect(database="LAKE", schema="SHOP", autocommit=False))
    with adapter.open() as connection:
        adapter.run(connection, "CREATE TABLE t (n NUMBER(38,0))")
        adapter.run(connection, "INSERT INTO t VALUES (1)")
    with adapter.open() as connection:
        assert adapter.rows(connection, "SELECT n FROM t") == [(1,)]


# --- the hook -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hook_s_connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An Airflow connection whose SnowflakeHook reaches the emulation."""
    fakesnow = pytest.importorskip("fakesnow", reason="fakesnow is not installed: make test-snowflake installs it")
    why = "Airflow's Snowflake provider is not installed: make test-snowflake installs it"
    pytest.importorskip("airflow.providers.snowflake.hooks.snowflake", reason=why)
    extra = {"account": "acme", "database": "LAKE", "warehouse": "WH", "role": "LOADER", "session_parameters": {"AUTOCOMMIT": False}}
    described = {"conn_type": "snowflake", "login": "u", "password": "p", "schema": "SHOP", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", json.dumps(described))
    with fakesnow.patch(nop_regexes=["ALTER SESSION SET (?!AUTOCOMMIT)"]):
        yield "lake"


def test_results_land_through_airflow_s_hook(hook_s_connection: str, ledger: Warehouse) -> None:
    """The hook's connection names database and schema; the adapter is found by the hook's class."""
    from airflow_provider_batchkit.hooks.sql import hook_named

    hook, kind = hook_named(hook_s_connection)
    assert kind == "snowflake"
    adapter = warehouse_of(kind, hook_s_connection, hook.get_conn)
    sent = ledger.submit([{"id": i, "name": f"n{i}"} for i in range(3)])
    report = ledger.fetch(sent.batch_ids, into=adapter)
    assert (report.rows, report.complete) == (3, True)
    with closing(hook.get_conn()) as connection, closing(connection.cursor()) as cursor:
        cursor.execute("SELECT COUNT(*) FROM lake.shop.answers")
        assert cursor.fetchall() == [(3,)]
    assert ledger.rows("SELECT table_name FROM batchkit_landing") == [{"table_name": "lake:LAKE.SHOP.ANSWERS"}]

"""A table that exists: either it is refused before anything is sent or written, or results land in it as they are."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import TableError
from airflow_provider_batchkit.landing import ResultTable
from airflow_provider_batchkit.schema import OutputSchema
from airflow_provider_batchkit.simulator import Simulator
from tests.databases import Database
from tests.warehouse import Warehouse, kit_for

_UTC = dt.UTC

#: keys that the narrower column types hold, and keys that show what a type rounds, cuts or converts
EASY: dict[str, list[Any]] = {
    "boolean": [True, False],
    "integer": [7, -7],
    "numeric": [Decimal("7.5"), Decimal("-12.25")],
    "float": [0.5, -2.25],
    "text": ["abc", "x-7"],
    "timestamp": [dt.datetime(2026, 1, 2, 3, 4, 5)],  # noqa: DTZ001 # a time without a zone is what is tested
    "timestamptz": [dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=_UTC)],
    "date": [dt.date(2026, 1, 2)],
    "uuid": [uuid.UUID(int=7), uuid.UUID(int=2**127 + 1)],
}
HARD: dict[str, list[Any]] = {
    "boolean": [True],
    "integer": [2**53 + 1, -(2**62) - 1],
    "numeric": [Decimal("7.4054"), Decimal("12345678901234567890.12345")],
    "float": [0.1 + 0.2, 7.0, 1e300],
    "text": ["007", "1e5", "7", "abc  ", "x" * 70],
    "timestamp": [dt.datetime(2026, 1, 2, 3, 4, 5, 678901)],  # noqa: DTZ001
    "timestamptz": [dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=_UTC)],
    "date": [dt.date(1999, 12, 31)],
    "uuid": [uuid.UUID("12345678901234567890123456789012")],
}
COLUMN_TYPES = {
    "postgres": [
        "BOOLEAN", "SMALLINT", "INTEGER", "BIGINT", "NUMERIC", "NUMERIC(10, 2)", "NUMERIC(30, 3)", "REAL", "DOUBLE PRECISION", "MONEY",
        "TEXT", "VARCHAR", "VARCHAR(20)", "CHAR(3)", "BPCHAR", "NAME", '"char"', "a_domain", "a_number", "a_word", "an_enum", "JSONB",
        "BYTEA", "TEXT[]", "DATE", "TIMESTAMP", "TIMESTAMP(0)", "TIMESTAMPTZ", "TIMESTAMPTZ(3)", "TIME", "UUID", "INET", "XML",
    ],
    "sqlite": [
        "", "BLOB", "BOOLEAN", "INTEGER", "INT", "BIGINT", "NUMERIC", "NUM", "NUMERIC(10, 2)", "REAL", "FLOAT", "DOUBLE", "TEXT",
        "VARCHAR(20)", "CHAR(32)", "STRING", "UUID", "DATE", "DATETIME", "TIMESTAMP", "TIME", "JSON",
    ],
}  # fmt: skip
DOMAINS = (
    "CREATE DOMAIN a_domain AS VARCHAR(20)",
    "CREATE DOMAIN a_number AS NUMERIC(10, 2)",
    "CREATE DOMAIN a_word AS CHAR(3)",
    "CREATE TYPE an_enum AS ENUM ('abc', 'x-7')",
)
RESULTS = (
    "response TEXT, status TEXT, stop_reason TEXT, error_type TEXT, error_message TEXT, model TEXT, input_tokens BIGINT, "
    "output_tokens BIGINT, cost_usd NUMERIC, custom_id TEXT, batch_id TEXT, landed_at {}"
)


@pytest.fixture
def warehouse(database: Database, sim: Simulator) -> Warehouse:
    return Warehouse(database.engine(), kit_for(sim.base_url))


def results_of(warehouse: Warehouse) -> str:
    """The result columns of a table of the user's own."""
    return RESULTS.format("TIMESTAMPTZ" if warehouse.engine.dialect.name == "postgresql" else "TIMESTAMP")


def plain(value: Any) -> Any:
    """A value without what a database's type adds to it: an integer of a NUMERIC(10, 2) is 7.00."""
    return dt.datetime.combine(value, dt.time()) if type(value) is dt.date else value


def stored(warehouse: Warehouse, table: str, key_type: str) -> list[Any]:
    """The keys of a table as the driver gives them, on SQLite as values of the key's type."""
    with warehouse.engine.connect() as connection:
        if warehouse.engine.dialect.name == "postgresql" or key_type in ("integer", "float", "text"):
            return [plain(value) for value in connection.exec_driver_sql(f"SELECT k FROM {table}").scalars()]
        if key_type == "numeric":
            return [Decimal(str(value)) for value in connection.exec_driver_sql(f"SELECT k FROM {table}").scalars()]
        type_ = ResultTable(table, [("k", key_type)]).table.c.k.type
        return [plain(value) for value in connection.execute(sa.select(sa.column("k", type_)).select_from(sa.table(table))).scalars()]


def same(found: list[Any], wanted: list[Any]) -> bool:
    """Whether the values are equal, and none is text where the other is a number."""
    wanted = [plain(value) for value in wanted]
    return len(found) == len(wanted) and all(any(a == b and isinstance(a, str) == isinstance(b, str) for b in found) for a in wanted)


def lands_raw(warehouse: Warehouse, key_type: str, column: str, values: list[Any]) -> bool:
    """Whether the statements of a landing, without any check, write the values exactly and find them again."""
    ours = ResultTable("raw", [("k", key_type)]).table.c.k.type
    stage = sa.Table("raw_stage", sa.MetaData(), sa.Column("k", ours))
    target = sa.Table("raw", sa.MetaData(), sa.Column("k", ours))
    warehouse.execute("DROP TABLE IF EXISTS raw", "DROP TABLE IF EXISTS raw_stage", f"CREATE TABLE raw (k {column})")
    stage.create(warehouse.engine)
    try:
        with warehouse.engine.begin() as connection:
            connection.execute(sa.insert(stage), [{"k": value} for value in values])
            connection.execute(sa.insert(target).from_select(["k"], sa.select(stage.c.k)))
            met = connection.execute(sa.select(sa.func.count()).select_from(target.join(stage, target.c.k == stage.c.k))).scalar()
        return met == len(values) and same(stored(warehouse, "raw", key_type), values)
    except (sa.exc.DBAPIError, AttributeError, TypeError, ValueError):
        return False  # the last three: what is stored cannot be read as a key


def refused(attempt: Callable[[], Any]) -> str | None:
    """Why something was refused; None when it was not."""
    try:
        attempt()
    except TableError as e:
        return str(e)
    return None


#: refused although these values would land: the type is for something else, or cannot be told from one that changes values
REFUSED_ANYWAY = {
    "sqlite": {
        ("boolean", "DATE"), ("boolean", "DATETIME"), ("boolean", "TIMESTAMP"), ("boolean", "TIME"), ("boolean", "JSON"),
        ("boolean", "REAL"), ("boolean", "FLOAT"), ("boolean", "DOUBLE"), ("boolean", "TEXT"), ("boolean", "VARCHAR(20)"),
        ("boolean", "CHAR(32)"),
        ("integer", "BOOLEAN"), ("integer", "DATE"), ("integer", "DATETIME"), ("integer", "TIMESTAMP"), ("integer", "TIME"),
        ("integer", "JSON"),
        ("float", "BOOLEAN"), ("float", "DATE"), ("float", "DATETIME"), ("float", "TIMESTAMP"), ("float", "TIME"), ("float", "JSON"),
        ("float", "INTEGER"), ("float", "INT"), ("float", "BIGINT"),
        *((kind, column) for kind in ("timestamp", "timestamptz", "date") for column in COLUMN_TYPES["sqlite"]),
    },
    "postgresql": {("timestamptz", "TIMESTAMP"), ("date", "TIMESTAMPTZ")},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Did not recognize type:sqlalchemy.exc.SAWarning")
@pytest.mark.parametrize("key_type", EASY)
def test_a_key_column_is_refused_or_keeps_every_key(warehouse: Warehouse, database: Database, key_type: str) -> None:
    """Every key type against every column type. What is accepted takes ordinary keys, twice; a key that it would change is an error, and
    nothing of it is written. What is refused cannot take the keys.
    """
    dialect = warehouse.engine.dialect.name
    if dialect == "postgresql":
        warehouse.execute(*DOMAINS)
    easy, hard = (
        warehouse.submit([{"k": value, "name": str(value)} for value in values[key_type]], key=("k",), run_id=run_id).batch_ids
        for values, run_id in ((EASY, "easy"), (HARD, "hard"))
    )
    accepted = set()
    for number, column in enumerate(COLUMN_TYPES[database.kind]):
        table = f"t{number}"
        warehouse.execute(f"CREATE TABLE {table} (k {column}, {results_of(warehouse)})")
        refusal = refused(lambda: ResultTable(table, [("k", key_type)]).check(warehouse.engine))  # noqa: B023
        if refusal is not None:
            for words in ("does not fit the source's key: k is ", "and must be", "Nothing was written"):
                assert words in refusal, column
            raw = all(lands_raw(warehouse, key_type, column, values[key_type]) for values in (EASY, HARD))
            assert not raw or (key_type, column) in REFUSED_ANYWAY[dialect], f"{column} is refused and would do"
            continue
        accepted.add(column)
        for _ in range(2):
            warehouse.fetch(easy, table)
            assert same(stored(warehouse, table, key_type), EASY[key_type]), column
        warehouse.execute(f"DELETE FROM {table}")
        refusal = refused(lambda: warehouse.fetch(hard, table))  # noqa: B023
        if refusal is not None:
            assert "would store the key" in refusal or "cannot hold every key" in refusal, column
            assert stored(warehouse, table, key_type) == [], column
            continue
        assert same(stored(warehouse, table, key_type), HARD[key_type]), column
        warehouse.fetch(hard, table)
        assert len(stored(warehouse, table, key_type)) == len(HARD[key_type]), column
    assert accepted >= ACCEPTED[database.kind][key_type]


#: what a user has reason to make the column
ACCEPTED: dict[str, dict[str, set[str]]] = {
    "postgres": {
        "boolean": {"BOOLEAN"},
        "integer": {"SMALLINT", "INTEGER", "BIGINT", "NUMERIC", "NUMERIC(30, 3)"},
        "numeric": {"NUMERIC", "NUMERIC(10, 2)"},
        "float": {"DOUBLE PRECISION"},
        "text": {"TEXT", "VARCHAR", "VARCHAR(20)", "CHAR(3)", "a_domain"},
        "timestamp": {"TIMESTAMP", "TIMESTAMP(0)"},
        "timestamptz": {"TIMESTAMPTZ", "TIMESTAMPTZ(3)"},
        "date": {"DATE", "TIMESTAMP"},
        "uuid": {"UUID"},
    },
    "sqlite": {
        "boolean": {"", "BOOLEAN", "INTEGER", "NUM"},
        "integer": {"", "INTEGER", "INT", "BIGINT", "NUMERIC", "NUM"},
        "numeric": {"", "NUMERIC", "TEXT", "NUM", "NUMERIC(10, 2)"},
        "float": {"", "REAL", "FLOAT", "DOUBLE", "NUM"},
        "text": {"", "TEXT", "VARCHAR(20)", "CHAR(32)", "DATE", "TIMESTAMP"},
        "timestamp": {"", "DATETIME", "TIMESTAMP", "TEXT", "NUM"},
        "timestamptz": {"", "DATETIME", "TIMESTAMP", "TEXT", "NUM"},
        "date": {"", "DATE", "TEXT", "NUM"},
        "uuid": {"", "CHAR(32)", "TEXT"},
    },
}


def own_table(warehouse: Warehouse, columns: str = "", name: str = "own") -> ResultTable:
    """A table of the user's own with the key ``id``, which is to take results."""
    warehouse.execute(f"CREATE TABLE {name} (id BIGINT, {results_of(warehouse)}{columns})")
    return ResultTable(name, [("id", "integer")])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (", tenant TEXT NOT NULL", "has NOT NULL columns without a default that a landing does not write"),
        (", tenant TEXT NOT NULL DEFAULT 'x', seen TIMESTAMP DEFAULT CURRENT_TIMESTAMP NOT NULL, note TEXT", None),
        (", twice BIGINT GENERATED ALWAYS AS (id * 2) STORED", None),
    ],
)
def test_a_column_that_no_landing_writes_must_have_a_value(warehouse: Warehouse, columns: str, message: str | None) -> None:
    """NOT NULL without a default fails every INSERT; a default or an expression gives the value."""
    table = own_table(warehouse, columns)
    if message is None:
        ids = warehouse.submit([{"id": 1, "name": "lamp"}]).batch_ids
        assert warehouse.fetch(ids, "own").rows == 1
    else:
        with pytest.raises(TableError, match=f"{message}.*: tenant"):
            table.check(warehouse.engine)


def test_a_not_null_column_that_numbers_itself_is_accepted(warehouse: Warehouse) -> None:
    """A surrogate key of the user's own: an identity, a sequence, or SQLite's rowid."""
    ids = warehouse.submit([{"id": 1, "name": "lamp"}]).batch_ids
    postgres = warehouse.engine.dialect.name == "postgresql"
    own = ("BIGSERIAL PRIMARY KEY", "BIGINT GENERATED ALWAYS AS IDENTITY") if postgres else ("INTEGER PRIMARY KEY NOT NULL",)
    for number, column in enumerate(own):
        own_table(warehouse, f", n {column}", f"own{number}")
        assert warehouse.fetch(ids, f"own{number}").rows == 1


def test_a_not_null_column_that_a_trigger_fills_is_accepted(postgres: Database, sim: Simulator) -> None:
    """PostgreSQL looks for NULL after the triggers."""
    warehouse = Warehouse(postgres.engine(), kit_for(sim.base_url))
    own_table(warehouse, ", tenant TEXT NOT NULL")
    warehouse.execute(
        "CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.tenant := 'x'; RETURN NEW; END $$",
        "CREATE TRIGGER fill BEFORE INSERT ON own FOR EACH ROW EXECUTE FUNCTION fill()",
    )
    assert warehouse.fetch(warehouse.submit([{"id": 1, "name": "lamp"}]).batch_ids, "own").rows == 1


def test_result_columns_that_cannot_take_the_results_are_refused(warehouse: Warehouse) -> None:
    """A column of ours that is generated, that is NOT NULL while a landing writes NULL, or that rounds a cost or cuts a text."""
    warehouse.fetch(warehouse.submit([{"id": 1, "name": "lamp"}]).batch_ids, "made")
    postgres = warehouse.engine.dialect.name == "postgresql"
    results = results_of(warehouse)
    cases = {
        results.replace("model TEXT", "model TEXT GENERATED ALWAYS AS ('x') STORED"): "generates columns that a landing writes.*: model",
        results.replace("error_type TEXT", "error_type TEXT NOT NULL"): "NULL in every row with an answer.*: error_type",
        results.replace("response TEXT", "response INTEGER"): "response is INTEGER and must be TEXT",
    }
    if postgres:
        cases |= {
            results.replace("cost_usd NUMERIC", "cost_usd INTEGER"): "cost_usd is INTEGER and must be NUMERIC",
            results.replace("cost_usd NUMERIC", "cost_usd NUMERIC(10, 2)"): r"cost_usd is NUMERIC\(10, 2\) and must be NUMERIC\(38, 12\)",
            results.replace("status TEXT", "status VARCHAR(8)"): r"status is VARCHAR\(8\) and must be VARCHAR\(16\)",
            results.replace("landed_at TIMESTAMPTZ", "landed_at DATE"): "landed_at is DATE and must be TIMESTAMP WITH TIME ZONE",
        }
    for number, (columns, message) in enumerate(cases.items()):
        warehouse.execute(f"CREATE TABLE bad{number} (id BIGINT, {columns})")
        with pytest.raises(TableError, match=message):
            ResultTable(f"bad{number}", [("id", "integer")]).check(warehouse.engine)


def test_a_view_is_refused_unless_it_passes_everything_on(warehouse: Warehouse) -> None:
    """PostgreSQL writes through a plain view; it does not through one that computes a column or joins, and SQLite never does."""
    own_table(warehouse)
    ids = warehouse.submit([{"id": 1, "name": "lamp"}]).batch_ids
    warehouse.execute("CREATE VIEW plain AS SELECT * FROM own", "CREATE VIEW grouped AS SELECT DISTINCT * FROM own")
    grouped = ResultTable("grouped", [("id", "integer")])
    with pytest.raises(TableError, match="grouped exists and cannot be written: it is a view"):
        grouped.check(warehouse.engine)
    if warehouse.engine.dialect.name == "postgresql":
        assert warehouse.fetch(ids, "plain").rows == 1
        columns = results_of(warehouse).replace("model TEXT", "'x'::text AS model")
        names = ", ".join(c.strip() if " AS " in c else c.split()[0] for c in columns.split(","))
        warehouse.execute(f"CREATE VIEW computed AS SELECT id, {names} FROM own")
        with pytest.raises(TableError, match="the view does not pass on: model"):
            ResultTable("computed", [("id", "integer")]).check(warehouse.engine)
    else:
        with pytest.raises(TableError, match="it is a view"):
            warehouse.fetch(ids, "plain")


def test_a_schema_that_does_not_exist_is_refused(warehouse: Warehouse) -> None:
    """Before anything is sent, in words of the schema."""
    with pytest.raises(TableError, match=r"nowhere\.t is to be in the schema nowhere, which does not exist.*Nothing was written"):
        ResultTable("nowhere.t", [("id", "integer")]).check(warehouse.engine)


def test_rights_that_the_user_lacks_are_found(postgres: Database, sim: Simulator) -> None:
    """The schema may not be used, a table may not be created in it, or the table's columns may not be written."""
    warehouse = Warehouse(postgres.engine(), kit_for(sim.base_url))
    own_table(warehouse, name="public.own")
    warehouse.execute(
        "DROP ROLE IF EXISTS batchkit_reader", "CREATE ROLE batchkit_reader LOGIN PASSWORD 'x'", "CREATE SCHEMA closed",
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC", "GRANT SELECT ON own TO batchkit_reader",
        "GRANT INSERT (id, status) ON own TO batchkit_reader",
    )  # fmt: skip
    reader = sa.create_engine(warehouse.engine.url.set(username="batchkit_reader", password="x"), poolclass=sa.NullPool)
    try:
        for name, message in (
            ("closed.t", "is in the schema closed, which this user may not use"),
            ("t", "may not create it in the schema public"),
            ("own", "has columns that this user may not write or the view does not pass on: response, stop_reason"),
        ):
            with pytest.raises(TableError, match=message):
                ResultTable(name, [("id", "integer")]).check(reader)
    finally:
        warehouse.execute("DROP OWNED BY batchkit_reader", "DROP ROLE batchkit_reader")


LONG = "ä" * 32  # 64 bytes in 32 characters


@pytest.mark.parametrize("name", ["key column", "property", "table"])
def test_a_name_that_is_too_long_is_refused_before_anything_is_sent(postgres: Database, sim: Simulator, name: str) -> None:
    """PostgreSQL would cut it after 63 bytes. The dialect alone tells, so that a submit without a table can look."""
    schema = OutputSchema('{"type": "object", "properties": {"%s": {"type": "string"}}}' % (LONG if name == "property" else "title"))
    table = ResultTable(LONG if name == "table" else "t", [(LONG if name == "key column" else "id", "integer")], schema)
    engine = postgres.engine()
    with pytest.raises(TableError, match=f"the {name} '{LONG}' has 64 bytes in UTF-8, and postgresql takes 63.*Nothing was sent"):
        table.check_names(engine.dialect)
    with pytest.raises(TableError, match="64 bytes"):
        table.check(engine)


def test_names_up_to_the_limit_land(warehouse: Warehouse) -> None:
    """63 bytes are good everywhere, and SQLite has no limit."""
    key, table = "ä" * 31 + "x", "t" * 63
    if warehouse.engine.dialect.name == "sqlite":
        key *= 3
    ids = warehouse.submit([{key: 1, "name": "lamp"}], key=(key,)).batch_ids
    assert [warehouse.fetch(ids, table).rows for _ in range(2)] == [1, 1]
    assert warehouse.rows(f'SELECT "{key}" AS k FROM {table}') == [{"k": 1}]


def test_names_that_a_database_keeps_for_itself_are_refused(sqlite: Database, postgres: Database) -> None:
    """A system column of PostgreSQL, a table of SQLite's own, and a column of the stage."""
    with pytest.raises(TableError, match="'ctid' is the name of a system column"):
        ResultTable("t", [("ctid", "text")]).check_names(postgres.engine().dialect)
    with pytest.raises(TableError, match="begins with 'sqlite_'"):
        ResultTable("SQLite_answers", []).check_names(sqlite.engine().dialect)
    with pytest.raises(TableError, match="The key column batchkit_key"):
        ResultTable("t", [("batchkit_key", "text")])


def test_columns_that_differ_in_case_are_the_same_on_sqlite(sqlite: Database, sim: Simulator) -> None:
    """The table says ID and Response, the landing id and response."""
    warehouse = Warehouse(sqlite.engine(), kit_for(sim.base_url))
    warehouse.execute(f"CREATE TABLE own (ID BIGINT, {results_of(warehouse).replace('response', 'Response')})")
    assert warehouse.fetch(warehouse.submit([{"id": 1, "name": "lamp"}]).batch_ids, "Own").rows == 1


def test_a_fetch_of_nothing_makes_and_refuses_no_table(warehouse: Warehouse) -> None:
    """No batch tells the key: a table that was made for none could take none, and one that exists is not looked at."""
    warehouse.fetch([], "answers")
    ids = warehouse.submit([{"id": 1, "name": "lamp"}]).batch_ids
    assert [warehouse.fetch(batches, "answers").rows for batches in (ids, [], ids)] == [1, 0, 1]

"""A PostgreSQL that does not speak UTF-8: what it can store arrives, and what it cannot is counted or refused, never garbled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.ledger.bulk import bulk_loader
from airflow_provider_batchkit.simulator import Simulator
from airflow_provider_batchkit.source.rows import RowItems
from airflow_provider_batchkit.source.sql import read_sql
from tests.databases import Database, opener, postgres_database
from tests.warehouse import Warehouse, kit_for

DRIVERS = ["psycopg", "psycopg2"]


@pytest.fixture
def latin(postgres_url: str) -> Iterator[Database]:
    """A database that stores LATIN1, and speaks it unless a session asks for something else."""
    with postgres_database(postgres_url, "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'") as database:
        yield database


def engine_of(database: Database, driver: str, encoding: str) -> sa.Engine:
    """Connections that speak an encoding, as libpq's option has it."""
    url = sa.make_url(database.url.replace("+psycopg", f"+{driver}")).update_query_dict({"client_encoding": encoding})
    return sa.create_engine(url, poolclass=sa.pool.NullPool)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("encoding", ["LATIN1", "UTF8"])
def test_a_latin1_database_is_source_ledger_and_target(
    latin: Database, sim: Simulator, driver: str, encoding: str, portable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts and keys are read right, and answers arrive with their accents. A character that the database lacks is a question mark,
    and the log says how many there are.
    """
    warehouse = Warehouse(engine_of(latin, driver, encoding), kit_for(sim.base_url), portable=portable)
    warehouse.execute("CREATE TABLE source (k VARCHAR(20), name TEXT)", "INSERT INTO source VALUES (U&'caf\\00e9', U&'Th\\00e9 vert')")
    with closing(read_sql(opener(warehouse.engine), "SELECT k, name FROM source")) as rows:
        ids = warehouse.submit(RowItems(rows), key=("k",), prompt="{{ row.name }} 日本").batch_ids  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        assert warehouse.fetch(ids).rows == 1
    (row,) = warehouse.rows("SELECT k, response, octet_length(k) AS bytes FROM source JOIN answers USING (k)")
    assert row["k"] == "café" and row["bytes"] == 4
    assert "Thé vert ??" in row["response"] and "Ã" not in row["response"]
    assert "characters that the database's encoding (iso8859-1) lacks were written as '?'" in caplog.text
    (failed,) = warehouse.rows("SELECT count(*) AS n FROM batchkit_request WHERE status = 'succeeded' AND key = '[\"café\"]'")
    assert failed["n"] == 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_key_that_the_database_cannot_store_is_refused_before_anything_is_sent(latin: Database, sim: Simulator, driver: str) -> None:
    """Two such keys would be one."""
    warehouse = Warehouse(engine_of(latin, driver, "UTF8"), kit_for(sim.base_url))
    with pytest.raises(BatchInputError, match=r"The key 'tea 日' has a character that the database .*iso8859-1.*Nothing was sent"):
        warehouse.submit([{"id": "café", "name": "x"}, {"id": "tea 日", "name": "y"}])
    assert sim.stats()["requests_accepted"] == 0


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("portable", [False, True])
def test_a_connection_that_speaks_latin1_to_a_utf8_database_loses_nothing(
    postgres: Database, sim: Simulator, driver: str, portable: bool
) -> None:
    """The database has every character; our sessions speak UTF-8 to it."""
    warehouse = Warehouse(engine_of(postgres, driver, "LATIN1"), kit_for(sim.base_url), portable=portable)
    ids = warehouse.submit([{"id": "日本", "name": "Thé 日本"}]).batch_ids
    assert warehouse.fetch(ids).rows == 1
    (row,) = warehouse.rows("SELECT id, response FROM answers")
    assert row["id"] == "日本" and "Thé 日本" in row["response"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_bulk_rows_are_utf8_whatever_the_connection_speaks(postgres: Database, driver: str) -> None:
    """COPY would read them in the encoding of a session that nobody has prepared."""
    loaded = sa.Table("loaded", sa.MetaData(), sa.Column("a", sa.Text))
    with engine_of(postgres, driver, "LATIN1").begin() as connection:
        loaded.create(connection)
        with bulk_loader(connection, loaded) as loader:
            loader.write([["Thé 日本"]])
    with postgres.engine().connect() as connection:
        assert connection.execute(sa.select(loaded)).scalar_one() == "Thé 日本"

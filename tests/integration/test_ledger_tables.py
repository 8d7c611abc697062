"""The ledger's tables are made once, whoever comes first, and only in a database that has none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import LedgerError
from airflow_provider_batchkit.ledger import Ledger
from airflow_provider_batchkit.ledger.engine import prepare_engine, write_transaction
from airflow_provider_batchkit.ledger.rollup import VIEWS
from airflow_provider_batchkit.ledger.tables import VERSION
from tests.databases import Database


def names(engine: sa.Engine) -> set[str]:
    """Tables and views."""
    found = sa.inspect(engine)
    return {*found.get_table_names(), *found.get_view_names()}


def test_tasks_that_begin_at_once_make_the_tables_once(database: Database) -> None:
    """Eight first tasks of a new installation."""
    with ThreadPoolExecutor(8) as pool:
        for made in [pool.submit(Ledger(database.engine()).ensure) for _ in range(8)]:
            made.result()
    engine = database.engine()
    assert names(engine) >= {"batchkit_job", "batchkit_batch", *VIEWS}
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT version FROM batchkit_version").scalars().all() == [VERSION]


def test_a_table_that_is_missing_is_made_anew(database: Database) -> None:
    """A partial restore must not let a batch be paid whose outcomes have no table to go to."""
    engine = database.engine()
    Ledger(engine).ensure()
    with engine.begin() as connection:
        for view in VIEWS:
            connection.exec_driver_sql(f"DROP VIEW {view}")
        connection.exec_driver_sql("DROP TABLE batchkit_failed")
    Ledger(engine).ensure()
    assert "batchkit_failed" in names(engine)


def test_a_provider_of_another_version_that_comes_first_is_obeyed(database: Database) -> None:
    """Its tables are not committed yet when this one comes, and are when this one's turn has come."""
    engine = database.engine()
    with ThreadPoolExecutor(1) as pool:
        with write_transaction(prepare_engine(engine)) as connection:
            connection.exec_driver_sql("CREATE TABLE batchkit_version (version INTEGER PRIMARY KEY)")
            connection.exec_driver_sql("INSERT INTO batchkit_version VALUES (2)")
            ours = pool.submit(Ledger(database.engine()).ensure)
            with pytest.raises(TimeoutError):
                ours.result(timeout=1)
        with pytest.raises(LedgerError, match="of version 2"):
            ours.result(timeout=30)
    assert names(engine) == {"batchkit_version"}


def test_tables_of_another_version_are_left_as_they_are(database: Database) -> None:
    """Tables of ours beside theirs would tell the other provider nothing, and stay behind when its own are dropped."""
    engine = database.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE batchkit_version (version INTEGER PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO batchkit_version VALUES (2)")
    with pytest.raises(LedgerError, match="of version 2"):
        Ledger(engine).ensure()
    assert names(engine) == {"batchkit_version"}

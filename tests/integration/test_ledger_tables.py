"""The ledger's tables are made once, whoever comes first, and only in a database that has none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import LedgerError
from airflow_provider_batchkit.ledger import Ledger
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


def test_tables_of_another_version_are_left_as_they_are(database: Database) -> None:
    """Tables of ours beside theirs would tell the other provider nothing, and stay behind when its own are dropped."""
    engine = database.engine()
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE batchkit_version (version INTEGER PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO batchkit_version VALUES (2)")
    with pytest.raises(LedgerError, match="of version 2"):
        Ledger(engine).ensure()
    assert names(engine) == {"batchkit_version"}

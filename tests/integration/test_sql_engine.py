"""The engine of an operator: one connection, kept open, looked at before it is used again, and closed in the end."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.hooks.sql import sql_engine
from tests.databases import Database


@pytest.fixture
def postgres_connection(airflow_db: Path, postgres: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", postgres.airflow_uri)
    return postgres


def backend(engine: sa.Engine) -> int:
    """The process of the server that a use of the engine meets."""
    with engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())


def test_uses_share_a_connection_and_a_dead_one_is_replaced(postgres_connection: Database) -> None:
    """A server that was restarted, or closes what is idle, costs a new connection and no task."""
    with sql_engine("warehouse") as engine:
        first = backend(engine)
        assert backend(engine) == first
        with postgres_connection.engine().connect() as other:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({first}, 5000)")
        assert backend(engine) != first


def test_no_connection_is_left_behind(postgres_connection: Database) -> None:
    """Also in a process that goes on, as a DAG's test run does, and when a task fails or defers."""
    with contextlib.suppress(KeyboardInterrupt), sql_engine("warehouse") as engine:
        mine = backend(engine)
        raise KeyboardInterrupt
    alive = f"SELECT COUNT(*) FROM pg_stat_activity WHERE pid = {mine}"
    with postgres_connection.engine().execution_options(isolation_level="AUTOCOMMIT").connect() as other:
        for _ in range(50):
            if other.exec_driver_sql(alive).scalar_one() == 0:
                break
            other.exec_driver_sql("SELECT pg_sleep(0.1)")
        assert other.exec_driver_sql(alive).scalar_one() == 0


@pytest.mark.parametrize(
    ("kind", "package"), [("sqlite", "airflow-provider-batchkit[sqlite]"), ("mssql", "apache-airflow-providers-mssql")]
)
def test_a_missing_provider_is_named_with_what_to_install(
    airflow_db: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    """A connection whose provider is not installed says so, instead of "Unknown hook type"."""
    from airflow.providers.common.compat.sdk import AirflowException, BaseHook

    def unknown(connection: Any) -> None:
        raise AirflowException(f'Unknown hook type "{connection.conn_type}"')

    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", f"{kind}://host/name")
    # Airflow has more than one class of connections
    monkeypatch.setattr(type(BaseHook.get_connection("warehouse")), "get_hook", unknown)
    says = rf"'warehouse' is of type '{kind}'.*pip install '{re.escape(package)}'"
    with pytest.raises(BatchInputError, match=says), sql_engine("warehouse"):
        pass

"""Fixtures for the whole suite: an Airflow home of its own, and fresh databases."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.databases import Database, postgres_database, running_mariadb, running_postgres, sqlite_database

# Airflow reads its settings when it is first imported, so they are set here, before any test module is imported: the session has its own
# home and metadata database. Variables of the shell for Airflow or Anthropic are removed: no test may reach a real installation or the
# real API.
for _name in list(os.environ):
    if _name.startswith(("AIRFLOW_", "ANTHROPIC_", "OPENLINEAGE_")):
        del os.environ[_name]

AIRFLOW_HOME = Path(tempfile.mkdtemp(prefix="batchkit-airflow-home-"))
atexit.register(shutil.rmtree, AIRFLOW_HOME, ignore_errors=True)
(AIRFLOW_HOME / "dags").mkdir()
(AIRFLOW_HOME / "plugins").mkdir()

os.environ["AIRFLOW_HOME"] = str(AIRFLOW_HOME)
os.environ["AIRFLOW__CORE__UNIT_TEST_MODE"] = "True"
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
os.environ["AIRFLOW__CORE__DAGS_FOLDER"] = str(AIRFLOW_HOME / "dags")
os.environ["AIRFLOW__CORE__PLUGINS_FOLDER"] = str(AIRFLOW_HOME / "plugins")
# a batch that the simulator does not show does not exist unless a test hides it, so tests need not look for it for long
os.environ["AIRFLOW__BATCHKIT__ABSENCE_SECONDS"] = "0.2"
os.environ["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] = f"sqlite:///{AIRFLOW_HOME / 'airflow.db'}"

# No test uses TLS. Without any certificate authority a client is made at once, while reading all of them takes 30 ms, and no client can
# talk to the real API.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(AIRFLOW_HOME / "plugins")

#: tests that keep several processes busy, and those that measure seconds and must not run beside them
ALONE = ("tests/crash/", "tests/e2e/", "tests/integration/test_poller.py", "tests/unit/simulator/test_simulator_faults.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """When several workers share the tests (``make test``), one of them begins with the tests of ``ALONE``, one after the other."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc] # it has no types
        def _split_scope(self, nodeid: str) -> str:
            return "alone" if nodeid.startswith(ALONE) else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def airflow_db() -> Path:
    """Airflow's metadata database, made on first use. Gives ``AIRFLOW_HOME``; DAG files for ``dag.test()`` go into its ``dags`` folder."""
    from airflow.utils.db import initdb

    initdb()
    return AIRFLOW_HOME


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The SQLAlchemy URL of a real PostgreSQL server that ends with the session. Tests take ``database`` or ``postgres`` instead."""
    with running_postgres() as url:
        yield url


@pytest.fixture(scope="session")
def mariadb_port() -> Iterator[int]:
    """The port of a real MariaDB server that ends with the session. Where none is installed, tests that need it are skipped and say so."""
    try:
        with running_mariadb() as port:
            yield port
    except FileNotFoundError as e:
        pytest.skip(str(e))


@pytest.fixture
def sqlite(tmp_path: Path) -> Database:
    """An empty SQLite database."""
    return sqlite_database(tmp_path / "warehouse.db")


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Database]:
    """An empty PostgreSQL database, dropped after the test."""
    with postgres_database(postgres_url) as database:
        yield database


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> Database:
    """An empty database; a test that takes it runs once on SQLite and once on PostgreSQL."""
    fresh = request.getfixturevalue(request.param)
    assert isinstance(fresh, Database)
    return fresh

"""What the integration tests share: simulators, databases of results, and Airflow connections to them.

A module that wants another simulator or another default model overrides ``simulator_settings`` or ``connection_model``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.simulator import Simulator, SimulatorProcess, SimulatorSettings
from tests.connections import anthropic_connection
from tests.databases import Database
from tests.results import RESULTS, Results, results_in
from tests.warehouse import Warehouse, kit_for


@pytest.fixture(scope="module")
def simulator_settings() -> SimulatorSettings:
    return SimulatorSettings()


@pytest.fixture(scope="module")
def connection_model() -> str | None:
    """The default model of the anthropic connection."""
    return "claude-sonnet-5"


@pytest.fixture(scope="module")
def simulator(simulator_settings: SimulatorSettings) -> Iterator[SimulatorProcess]:
    """A simulator that the tests of a module share."""
    with SimulatorProcess(simulator_settings) as process:
        yield process


@pytest.fixture
def api(
    simulator: SimulatorProcess, simulator_settings: SimulatorSettings, connection_model: str | None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimulatorProcess]:
    """The module's simulator behind the connection ``anthropic_default``; each test finds it with the module's settings and no fault."""
    monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection(simulator.base_url, connection_model))
    yield simulator
    simulator.faults.clear()
    simulator.set(**msgspec.structs.asdict(simulator_settings))


@pytest.fixture
def home(airflow_db: Path, api: SimulatorProcess, database: Database, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Airflow with the connections ``anthropic_default`` to the simulator and ``warehouse`` to the test's database."""
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", database.airflow_uri)
    return airflow_db


@pytest.fixture
def sim() -> Iterator[Simulator]:
    """A simulator of the test's own, in this process."""
    with Simulator() as simulator:
        yield simulator


@pytest.fixture(params=RESULTS)
def results(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Results]:
    """Each kind of database that results can land in."""
    with results_in(request.param, tmp_path, request) as found:
        yield found


@pytest.fixture
def ledger(sim: Simulator, tmp_path: Path) -> Warehouse:
    """A SQLite ledger, and a kit on the simulator."""
    return Warehouse(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db", poolclass=sa.pool.NullPool), kit_for(sim.base_url))

"""What DAG runs of the integration tests need: a simulator, and Airflow connections to it and to the test's database.

A module that wants another simulator or another default model overrides ``simulator_settings`` or ``connection_model``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from tests.connections import anthropic_connection
from tests.databases import Database


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

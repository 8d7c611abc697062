"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.databases import postgres_database
from tests.e2e.harness import AirflowStandalone

StartAirflow = Callable[..., AirflowStandalone]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is an end-to-end test."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("e2e")


@pytest.fixture(scope="module")
def start_airflow(postgres_url: str) -> Iterator[StartAirflow]:
    """A function that starts a real Airflow on a DAGs folder, with an environment and a metadata database of its own; it ends with the
    module.

    A module starts one, in a module-scoped fixture of its own, and all its tests share it: a start takes about 20 seconds.
    """
    with contextlib.ExitStack() as stack:

        def start(dags_folder: Path, env: Mapping[str, str] | None = None, **options: float | bool | str) -> AirflowStandalone:
            metadata = stack.enter_context(postgres_database(postgres_url))
            return stack.enter_context(AirflowStandalone(dags_folder, metadata, env, **options))  # type: ignore[arg-type]

        yield start

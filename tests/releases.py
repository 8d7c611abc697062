"""The differences between the supported releases of Airflow that matter to tests: moved names and missing features."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

AIRFLOW = Version(version("apache-airflow"))

_FIRST = {
    "commands of providers": Version("3.2"),
    "the task's state store": Version("3.3"),
}


def needs(feature: str) -> pytest.MarkDecorator:
    """Skips a test when Airflow is older than the first release that has ``feature``, and gives this as the reason."""
    first = _FIRST[feature]
    return pytest.mark.skipif(first > AIRFLOW, reason=f"Airflow {AIRFLOW} lacks {feature}: {first} is the first that has it")


def parsed(path: Path, dag_id: str) -> Any:
    """A DAG of a file, parsed as Airflow's DAG processor does, and ready for ``dag.test()``.

    Airflow 3.1.0 tests only DAGs that are in its database; later releases add them to it automatically.
    """
    try:
        from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
    except ImportError:  # Airflow 3.1
        from airflow.models.dagbag import DagBag, sync_bag_to_db  # type: ignore[no-redef]
    from airflow.dag_processing.bundles.manager import DagBundlesManager

    bag = DagBag(str(path))
    assert bag.import_errors == {}
    if Version("3.2") > AIRFLOW:
        DagBundlesManager().sync_bundles_to_db()
        sync_bag_to_db(bag, "dags-folder", None)
    return bag.dags[dag_id]


def serialized(dag: Any) -> Any:
    """A DAG in the form in which Airflow stores it. Airflow compares these forms to see whether a parse has made a new version."""
    from airflow.serialization import serialized_objects

    # Airflow 3.1 has one class for both directions
    name = "DagSerialization" if hasattr(serialized_objects, "DagSerialization") else "SerializedDAG"
    return getattr(serialized_objects, name).to_dict(dag)

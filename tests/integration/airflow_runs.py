"""DAGs run through ``dag.test()``: Airflow's own task runner, XCom, templating and trigger, in this process."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import Any

from tests import releases

_numbers = itertools.count()

_HEAD = """
import pendulum
from airflow.sdk import DAG, task

from airflow_provider_batchkit.operators.batch import FetchBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor

with DAG({dag_id!r}, schedule=None, start_date=pendulum.datetime(2026, 1, 1, tz="UTC")) as dag:
{body}
"""


class Run:
    """An ended DAG run."""

    def __init__(self, dag_run: Any) -> None:
        self._run = dag_run
        self.state = str(dag_run.state.value)
        self.dag_id = str(dag_run.dag_id)

    def states(self) -> dict[str, str]:
        """State of every task; mapped ones as ``task[0]``."""
        return {ti.task_id if ti.map_index < 0 else f"{ti.task_id}[{ti.map_index}]": str(ti.state) for ti in self._run.get_task_instances()}

    def xcom(self, task_id: str, key: str = "return_value", map_index: int = -1) -> Any:
        """A pushed value."""
        from airflow.models.xcom import XComModel
        from airflow.utils.session import create_session

        with create_session() as session:
            query = XComModel.get_many(run_id=self._run.run_id, key=key, task_ids=task_id, dag_ids=self._run.dag_id, map_indexes=map_index)
            value = session.scalars(query.with_only_columns(XComModel.value)).first()
        return XComModel.deserialize_value(type("Stored", (), {"value": value})())


def run_dag(airflow_home: Path, *bodies: str, dag_id: str | None = None) -> Run:
    """Run a DAG with ``bodies`` inside its ``with DAG`` block once.

    :param dag_id: of a DAG that is to run again; a new one by default
    """
    dag_id = dag_id or f"test_{next(_numbers)}"
    body = "".join(textwrap.indent(textwrap.dedent(part), "    ") + "\n" for part in bodies)
    return run_source(airflow_home, dag_id, _HEAD.format(dag_id=dag_id, body=body))


def run_source(airflow_home: Path, dag_id: str, source: str) -> Run:
    """Put a DAG file into Airflow's DAGs folder, run its DAG once, and take the file away: ``dag.test()`` parses the whole folder."""
    path = airflow_home / "dags" / f"{dag_id}.py"
    path.write_text(source)
    try:
        return Run(releases.parsed(path, dag_id).test())
    finally:
        path.unlink()

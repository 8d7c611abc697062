"""One run of the demo's DAG through ``dag.test()``: Airflow's own task runner, operators and trigger, without its services.

A process of its own, so that Airflow's logging goes to files and not over the demo's lines: what a task logs to where Airflow's UI looks
for it, everything else to ``demo.log``.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from pathlib import Path
from typing import Any

from . import DAG_ID, DAGS_FOLDER

#: what dag.test() says of itself, and parts of Airflow that have processes and logs of their own elsewhere
_NOT_OF_A_TASK = ("airflow.sdk.definitions.dag", "airflow.api_fastapi.execution_api.routes.task_instances", "airflow.models.dagrun.DagRun")


def main() -> int:
    """Run the DAG; 0 when every task succeeded."""
    home = Path(os.environ["AIRFLOW_HOME"])
    _write_to(home / "demo.log", os.O_TRUNC)
    os.environ["AIRFLOW__LOGGING__JSON_LOGS"] = "True"  # the form of a task's log; from Airflow 3.2 on
    os.environ["AIRFLOW__LOGGING__NAMESPACE_LEVELS"] = " ".join(f"{name}=WARNING" for name in _NOT_OF_A_TASK)
    try:
        from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
    except ImportError:  # Airflow 3.1
        from airflow.models.dagbag import DagBag, sync_bag_to_db  # type: ignore[no-redef]
    from airflow.dag_processing.bundles.manager import DagBundlesManager

    bag = DagBag(str(DAGS_FOLDER / f"{DAG_ID}.py"))
    # Airflow 3.1.0 tests only DAGs that are in its database; later ones put them there by themselves.
    DagBundlesManager().sync_bundles_to_db()
    sync_bag_to_db(bag, "dags-folder", None)
    dag = bag.dags[DAG_ID]
    logging.getLogger(_NOT_OF_A_TASK[0]).setLevel(logging.WARNING)  # it has a level of its own by now
    for task in dag.tasks:
        task.on_execute_callback = [functools.partial(_log_of_task, home)]
    run = dag.test()
    _write_to(home / "demo.log")
    return 0 if str(run.state) == "success" else 1


def _log_of_task(home: Path, context: Any) -> None:
    """From here on, what is logged belongs to a task. The folders are those of Airflow's ``log_filename_template``."""
    ti = context["ti"]
    folder = home / "logs" / f"dag_id={ti.dag_id}" / f"run_id={ti.run_id}" / f"task_id={ti.task_id}"
    _write_to(folder / f"attempt={ti.try_number}.log")
    logging.getLogger(__name__).info("::group::Pre Execute")  # Airflow ends this group at once; its beginning is in the file before


def _write_to(log: Path, how: int = os.O_APPEND) -> None:
    """Write what this process prints to a file, which is made when it is not there."""
    sys.stdout.flush()
    sys.stderr.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | how, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


if __name__ == "__main__":
    sys.exit(main())

"""One run of the demo's DAG through ``dag.test()``: Airflow's own task runner, operators and trigger, without its services.

A process of its own, so that Airflow's logging goes to a file and not over the demo's lines.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from . import DAG_ID, DAGS_FOLDER


def main() -> int:
    """Run the DAG; 0 when every task succeeded."""
    log = Path(os.environ["AIRFLOW_HOME"], "demo.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
    except ImportError:  # Airflow 3.1
        from airflow.models.dagbag import DagBag, sync_bag_to_db  # type: ignore[no-redef]
    from airflow.dag_processing.bundles.manager import DagBundlesManager

    bag = DagBag(str(DAGS_FOLDER / f"{DAG_ID}.py"))
    # Airflow 3.1.0 tests only DAGs that are in its database; later ones put them there by themselves.
    DagBundlesManager().sync_bundles_to_db()
    sync_bag_to_db(bag, "dags-folder", None)
    run = bag.dags[DAG_ID].test()
    return 0 if str(run.state) == "success" else 1


if __name__ == "__main__":
    sys.exit(main())

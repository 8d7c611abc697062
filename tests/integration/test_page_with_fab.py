"""Who may see and do what on the Batches page where Airflow's users and roles are those of the FAB auth manager."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("airflow.providers.fab") is None, reason="needs apache-airflow-providers-fab")
def test_every_route_asks_for_the_rights_of_fabs_roles(tmp_path: Path) -> None:
    """Nobody, a viewer, somebody who may read another DAG, and an administrator, over every route of the app."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")}
    command = [sys.executable, "-m", "tests.integration.fab_roles", str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "as it should be" in done.stdout, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

"""The page's routes under the roles of the FAB auth manager: ``python -m tests.integration.fab_roles FOLDER``, in a process of its own,
since Airflow has one auth manager a process. Ends with "as it should be", or with the first thing that is not.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

DAGS = ("catalog_copy", "review_labels")
PASSWORD = "a password of the tests"
LIMITED = "Limited"
MANAGER = "airflow.providers.fab.auth_manager.fab_auth_manager.FabAuthManager"


def settings(folder: Path, api: str) -> None:
    """Airflow reads them when it is first imported."""
    from tests.connections import anthropic_connection
    from tests.databases import sqlite_database

    os.environ |= {
        "AIRFLOW_HOME": str(folder),
        "AIRFLOW__CORE__AUTH_MANAGER": MANAGER,
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{folder / 'airflow.db'}",
        "AIRFLOW__API_AUTH__JWT_SECRET": "a-secret-for-tests-that-is-long-enough-for-hs512-and-then-some-more",
        "AIRFLOW_CONN_WAREHOUSE": sqlite_database(folder / "warehouse.db").airflow_uri,
        "AIRFLOW_CONN_ANTHROPIC_DEFAULT": anthropic_connection(api),
        "AIRFLOW__BATCHKIT__PAGE_LEDGER_CONN_IDS": "warehouse",
    }


def make_people(manager: Any) -> None:
    """An administrator, a viewer, and somebody who may read one DAG; and the DAGs, which Airflow's database must know."""
    from airflow.models.dag import DagModel
    from airflow.models.dagbundle import DagBundleModel
    from airflow.utils.session import create_session

    with create_session() as session:
        session.add(DagBundleModel(name="page"))
        session.flush()
        session.add_all(DagModel(dag_id=dag_id, bundle_name="page", relative_fileloc="x.py", fileloc="x.py") for dag_id in DAGS)
    security = manager.security_manager
    limited = security.add_role(LIMITED)
    for resource in (f"DAG:{DAGS[1]}", "Task Instances", "DAG Runs", "Website"):
        security.add_permission_to_role(limited, security.create_permission("can_read", resource))
    for name, role in (("admin", "Admin"), ("viewer", "Viewer"), ("limited", LIMITED)):
        assert security.add_user(name, "A", "B", f"{name}@example.com", security.find_role(role), password=PASSWORD), name


def check(folder: Path, sim: Any) -> None:
    """Go over every route as everybody."""
    from airflow.api_fastapi.app import create_app as create_airflow
    from airflow.utils.db import initdb
    from fastapi.testclient import TestClient

    from airflow_provider_batchkit.ui.app import create_app
    from tests.databases import sqlite_database
    from tests.e2e.shelf import Shelf, rows
    from tests.warehouse import kit_for

    initdb()
    airflow = TestClient(create_airflow(apps="core"))
    from airflow.api_fastapi.app import get_auth_manager

    manager: Any = get_auth_manager()
    with manager.flask_app.app_context():
        make_people(manager)
    shelf = Shelf(sqlite_database(folder / "warehouse.db").engine(), kit_for(sim.base_url))
    shelf.dag_id = DAGS[1]
    shelf.fetch(shelf.submit(rows(3), run_id="landed").batch_ids, run_id="landed")
    sim.set(clock="manual")
    shelf.dag_id = DAGS[0]
    (batch_id,) = shelf.submit(rows(3), run_id="running").batch_ids
    job_id = shelf.job("running").job_id

    def client(user: str | None) -> TestClient:
        found = TestClient(create_app(), headers={"X-BatchKit": "page"}, raise_server_exceptions=False)
        if user is not None:
            answer = airflow.post("/auth/token", json={"username": user, "password": PASSWORD})
            assert answer.is_success, (user, answer.text)
            found.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
        return found

    people = {user: client(user) for user in (None, "viewer", "limited", "admin")}
    values = {"dag_id": DAGS[0], "job_id": job_id, "batch_id": batch_id}
    seen = 0
    for route in create_app().routes:
        path = re.sub(r"{(\w+)}", lambda match: values[match[1]], str(getattr(route, "path", "")))
        post = "POST" in (getattr(route, "methods", None) or ())
        expected = {None: 401, "viewer": 403 if post else 200, "limited": 403 if "/dags/" in path else 200, "admin": 200}
        for user, who in people.items():
            answer = who.request("POST" if post else "GET", path, params={"ledger": "warehouse"})
            assert answer.status_code == expected[user], (user, path, answer.status_code, answer.text)
            if user == "limited" and "/api/" in path:
                assert not re.search(f"{DAGS[0]}|{job_id}|{batch_id}", answer.text), (path, answer.text)
        seen += 1
        still = "canceling" if post else "in_progress"
        assert not post or shelf.kit.get(batch_id).processing_status == still
    assert seen >= 10
    own = people["limited"].get("/api/jobs", params={"ledger": "warehouse"}).json()["jobs"]
    assert [one["dag_id"] for one in own] == [DAGS[1]], own


if __name__ == "__main__":
    from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings

    with Simulator(SimulatorSettings()) as simulator:
        settings(Path(sys.argv[1]), simulator.base_url)
        check(Path(sys.argv[1]), simulator)
    print("as it should be")  # noqa: T201 the test reads it

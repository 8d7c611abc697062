"""Who may see and do what on the Batches page where Airflow's users and roles are those of the FAB auth manager."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import httpx
import pytest

from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from airflow_provider_batchkit.ui.access import CANCEL_EVENT
from airflow_provider_batchkit.ui.app import create_app
from tests.connections import anthropic_connection
from tests.databases import postgres_database, sqlite_database
from tests.e2e.harness import AirflowStandalone, with_airflows_driver
from tests.e2e.shelf import DAG_FILE, DAGS, Shelf, fill, run
from tests.warehouse import kit_for

FAB = "airflow.providers.fab"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec(FAB) is None, reason="needs apache-airflow-providers-fab"),
    pytest.mark.skipif(
        not any(one.name == "batchkit" for one in entry_points(group="airflow.plugins")),
        reason="the installed package is older than its plugin: install it again",
    ),
]

MANAGER = f"{FAB}.auth_manager.fab_auth_manager.FabAuthManager"
PASSWORD = "a password of the tests"
HEADERS = {"X-BatchKit": "page"}
#: reads one DAG, and nothing else
LIMITED = "Limited"
ACCESS = f'{{"{LIMITED}": {{"DAGs": {{"can_read"}}}}}}'


@dataclass(frozen=True)
class Office:
    airflow: AirflowStandalone
    sim: SimulatorProcess
    shelf: Shelf

    def client(self, user: str | None) -> httpx.Client:
        """The page's app as a user reaches it; None is not logged in."""
        headers = dict(HEADERS)
        if user is not None:
            password = self.airflow.password if user == self.airflow.user else PASSWORD
            answer = httpx.post(f"{self.airflow.url}/auth/token", json={"username": user, "password": password}, timeout=60)
            assert answer.is_success, (user, answer.status_code, answer.text, self.airflow.log_tail(20))
            headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
        return httpx.Client(base_url=f"{self.airflow.url}/batchkit", headers=headers, params={"ledger": "warehouse"}, timeout=60)


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> Iterator[Office]:
    folder = tmp_path_factory.mktemp("office")
    dags = folder / "dags"
    dags.mkdir()
    (dags / "shelf.py").write_text(
        DAG_FILE.replace("schedule=None", f"schedule=None, access_control={ACCESS} if name == {DAGS[1]!r} else None")
    )
    warehouse = sqlite_database(folder / "warehouse.db")
    with postgres_database(postgres_url) as metadata, SimulatorProcess(SimulatorSettings()) as sim:
        shelf = fill(warehouse.engine(), kit_for(sim.base_url), sim)
        env = {
            "AIRFLOW_CONN_WAREHOUSE": warehouse.airflow_uri,
            "AIRFLOW_CONN_ANTHROPIC_DEFAULT": anthropic_connection(sim.base_url),
            "AIRFLOW__BATCHKIT__PAGE_LEDGER_CONN_IDS": "warehouse",
            "AIRFLOW__CORE__AUTH_MANAGER": MANAGER,
        }
        airflow = AirflowStandalone(dags, metadata, env, startup_seconds=400)
        make_users(folder / "home", with_airflows_driver(metadata.url), airflow)
        with airflow:
            for dag_id in DAGS:
                airflow.wait_for_dag(dag_id)
            yield Office(airflow, sim, shelf)


def make_users(home: Path, url: str, airflow: AirflowStandalone) -> None:
    """An administrator, a viewer, and somebody who may read one DAG."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")}
    settings = {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": url, "AIRFLOW__CORE__AUTH_MANAGER": MANAGER, "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    env = {**inherited, "AIRFLOW_HOME": str(home), **settings}

    def call(*arguments: str) -> None:
        done = subprocess.run([sys.executable, "-m", "airflow", *arguments], env=env, check=False, capture_output=True, text=True)
        assert done.returncode == 0, (arguments[:2], done.stdout[-1000:], done.stderr[-1000:])

    call("db", "migrate")
    call("sync-perm")
    call("roles", "create", LIMITED)
    for resource in ("Task Instances", "DAG Runs", "Website"):
        call("roles", "add-perms", LIMITED, "-r", resource, "-a", "can_read")
    for name, role, password in ((airflow.user, "Admin", airflow.password), ("viewer", "Viewer", PASSWORD), ("limited", LIMITED, PASSWORD)):
        person = ("--firstname", "A", "--lastname", "B", "--email", f"{name}@example.com")
        call("users", "create", "--username", name, "--role", role, "--password", password, *person)


def addresses(dag_id: str, job_id: str, batch_id: str) -> list[tuple[str, str]]:
    """Every route of the app, with values for its path."""
    values = {"dag_id": dag_id, "job_id": job_id, "batch_id": batch_id}
    return [
        (method, re.sub(r"{(\w+)}", lambda match: values[match[1]], str(getattr(route, "path", ""))))
        for route in create_app().routes
        for method in getattr(route, "methods", None) or {"GET"}
        if method != "HEAD"
    ]


def test_every_route_asks_for_the_rights_of_fabs_roles(office: Office) -> None:
    """Nobody, a viewer, somebody who may read another DAG, and an administrator, over every route of the app."""
    (batch_id,) = run(office.shelf, office.sim, "manual__fab", 3, seconds=600)
    job_id = office.shelf.job("manual__fab").job_id
    people = {user: office.client(user) for user in (None, "viewer", "limited", office.airflow.user)}
    for method, path in addresses(DAGS[0], job_id, batch_id):
        found = {user: client.request(method, path) for user, client in people.items() if (user, method) != (office.airflow.user, "POST")}
        statuses = {user: answer.status_code for user, answer in found.items()}
        in_path = "/dags/" in path
        expected = {None: 401, "viewer": 403 if method == "POST" else 200, "limited": 403 if in_path else 200, office.airflow.user: 200}
        assert statuses == {user: expected[user] for user in statuses}, (method, path, {u: a.text[:200] for u, a in found.items()})
        if "/api/" in path:
            for word in (DAGS[0], job_id, batch_id):
                assert word not in found["limited"].text, (method, path, word)
    assert [one["dag_id"] for one in people["limited"].get("/api/jobs").json()["jobs"]] == [DAGS[1]] * 7
    assert office.shelf.kit.get(batch_id).processing_status == "in_progress"

    answer = people[office.airflow.user].post(f"/api/dags/{DAGS[0]}/batches/{batch_id}/cancel")
    assert answer.status_code == 200, answer.text
    assert office.shelf.kit.get(batch_id).processing_status in ("canceling", "ended")
    (event,) = office.airflow.get("/eventLogs", event=CANCEL_EVENT)["event_logs"]
    assert (event["owner"], event["dag_id"]) == (office.airflow.user, DAGS[0])

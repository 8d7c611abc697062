"""The routes of the Batches page: who may see what, over every route of the app, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from airflow_provider_batchkit.cost.budget import Budget
from airflow_provider_batchkit.jobs.caps import Limits
from airflow_provider_batchkit.ledger.tables import batch
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings
from airflow_provider_batchkit.ui.access import CANCEL_EVENT
from airflow_provider_batchkit.ui.app import create_app
from tests.connections import anthropic_connection
from tests.databases import Database
from tests.warehouse import Warehouse, kit_for

#: user → DAG → methods; the warehouse's jobs are of ``dag``
RIGHTS = {
    "admin": {"dag": {"GET", "PUT"}, "other": {"GET", "PUT"}},
    "viewer": {"dag": {"GET"}},
    "stranger": {"other": {"GET", "PUT"}},
    "blind": {"dag": {"GET"}},
}
#: who may see DAGs and no task instance
WITHOUT_TASKS = {"blind"}
HEADERS = {"X-BatchKit": "page"}
#: what any of the routes must be given
PARAMS = {"ledger": "warehouse", "like": "[7]"}


class PerDag(SimpleAuthManager):
    """Airflow's simple auth manager, with rights for each DAG."""

    def is_authorized_dag(self, *, method: str, user: Any, access_entity: Any = None, details: Any = None) -> bool:
        if access_entity is DagAccessEntity.TASK_INSTANCE and user.username in WITHOUT_TASKS:
            return False
        return method in RIGHTS.get(user.username, {}).get(details and details.id, set())


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator(SimulatorSettings(input_tokens=1000, output_tokens=100)) as simulator:
        yield simulator


@pytest.fixture
def warehouse(database: Database, sim: Simulator, airflow_db: Path, monkeypatch: pytest.MonkeyPatch) -> Warehouse:
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", database.airflow_uri)
    monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection(sim.base_url))
    monkeypatch.setenv("AIRFLOW__BATCHKIT__PAGE_LEDGER_CONN_IDS", "warehouse")
    return Warehouse(database.engine(), kit_for(sim.base_url))


@pytest.fixture
def auth(airflow_db: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PerDag]:
    """Airflow's auth manager, and the DAGs in its database."""
    from airflow.api_fastapi import app as api
    from airflow.models.dag import DagModel
    from airflow.models.dagbundle import DagBundleModel
    from airflow.utils.session import create_session

    with create_session() as session:
        if session.get(DagBundleModel, "page") is None:
            session.add(DagBundleModel(name="page"))
            session.flush()
        for dag_id in ("dag", "other"):
            if session.get(DagModel, dag_id) is None:
                session.add(DagModel(dag_id=dag_id, bundle_name="page", relative_fileloc="x.py", fileloc="x.py"))
    monkeypatch.setenv("AIRFLOW__CORE__AUTH_MANAGER", f"{__name__}.PerDag")
    monkeypatch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "a-secret-for-tests-that-is-long-enough-for-hs512-and-then-some-more")
    before = api.get_auth_manager_if_made() if hasattr(api, "get_auth_manager_if_made") else None
    manager = api.create_auth_manager()
    assert isinstance(manager, PerDag) and before is None
    yield manager
    api.purge_cached_app()


def client(auth: PerDag, user: str | None) -> TestClient:
    """The app as a user sees it; None is not logged in."""
    found = TestClient(create_app(), raise_server_exceptions=False)
    if user is not None:
        found.cookies.set("_token", auth.generate_jwt(SimpleAuthManagerUser(username=user, role="ADMIN")))
    return found


def products(count: int = 3, mark: str = "") -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}{mark}"} for i in range(count)]


def calls(sim: Simulator) -> int:
    """How many calls the API has had."""
    return sum(sim.stats()["calls"].values())


def landed(warehouse: Warehouse, run_id: str = "landed", **options: Any) -> str:
    """A landed job; gives its id."""
    rows = [*products(2), {"id": 7, "name": "x [[sim:errored]]"}]
    warehouse.fetch(warehouse.submit(rows, run_id=run_id, **options).batch_ids, run_id=run_id)
    return warehouse.job(run_id).job_id


def addresses(job_id: str, batch_id: str) -> list[tuple[str, str]]:
    """Every route of the app, with values for its path."""
    values = {"dag_id": "dag", "job_id": job_id, "batch_id": batch_id}
    found = [
        (method, re.sub(r"{(\w+)}", lambda match: values[match[1]], str(getattr(route, "path", ""))))
        for route in create_app().routes
        for method in getattr(route, "methods", None) or {"GET"}
        if method != "HEAD"
    ]
    assert len(found) >= 10
    return found


def test_every_route_demands_a_login(warehouse: Warehouse, sim: Simulator, auth: PerDag) -> None:
    """Enumerated from the app: also a route that somebody adds later."""
    job_id = landed(warehouse)
    sim.set(clock="manual")
    (batch_id,) = warehouse.submit(products(), run_id="running").batch_ids
    anonymous, forged = client(auth, None), client(auth, None)
    forged.cookies.set("_token", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.")
    for method, path in addresses(job_id, batch_id):
        for who, statuses in ((anonymous, {401}), (forged, {401, 403})):
            answer = who.request(method, path, params=PARAMS, headers=HEADERS)
            assert answer.status_code in statuses, (method, path, answer.text)
            assert "job" not in answer.text and batch_id not in answer.text
    assert warehouse.kit.get(batch_id).processing_status == "in_progress"


def test_who_may_see_nothing_of_a_dag_finds_nothing_of_it_on_any_route(warehouse: Warehouse, sim: Simulator, auth: PerDag) -> None:
    """Lists are filtered, and the DAG in a path is a 403; no answer names the DAG, a job, a batch or a key."""
    job_id = landed(warehouse, limits=Limits(budget=Budget("catalog", Decimal(5))))
    sim.set(clock="manual")
    (batch_id,) = warehouse.submit(products(), run_id="running").batch_ids
    stranger = client(auth, "stranger")
    for method, path in addresses(job_id, batch_id):
        answer = stranger.request(method, path, params=PARAMS, headers=HEADERS)
        assert answer.status_code == (403 if "/dags/" in path else 200), (method, path, answer.text)
        if "/api/" in path:
            for word in ('"dag"', job_id, batch_id, "running", "[7]", "catalog", "claude"):
                assert word not in answer.text, (method, path, word)
    # nor by a DAG of one's own in the path
    assert stranger.get(f"/api/dags/other/jobs/{job_id}", params={"ledger": "warehouse"}).status_code == 404
    cancel = f"/api/dags/other/batches/{batch_id}/cancel"
    assert stranger.post(cancel, params={"ledger": "warehouse"}, headers=HEADERS).status_code == 404
    assert warehouse.kit.get(batch_id).processing_status == "in_progress"


def test_who_may_see_a_dag_without_its_task_instances_finds_no_job(warehouse: Warehouse, sim: Simulator, auth: PerDag) -> None:
    """A job is a task instance: the lists leave it out, as the route of the job refuses it."""
    job_id = landed(warehouse, limits=Limits(budget=Budget("catalog", Decimal(5))))
    sim.set(clock="manual")
    (batch_id,) = warehouse.submit(products(), run_id="running").batch_ids
    blind = client(auth, "blind")
    for method, path in addresses(job_id, batch_id):
        answer = blind.request(method, path, params=PARAMS, headers=HEADERS)
        assert answer.status_code == (403 if "/dags/" in path else 200), (method, path, answer.text)
        if "/api/" in path:
            for word in ('"dag"', job_id, batch_id, "running", "[7]", "catalog", "claude"):
                assert word not in answer.text, (method, path, word)


#: what a hostile or clumsy address may hold
ODD = (
    *(
        "\0",
        "x\0y",
        "' OR 1=1 --",
        '"; DROP TABLE batchkit_job; --',
        "%",
        "~",
        "..",
        "../../etc/passwd",
        str(10**30),
        "\U0001f9ea",
        "9" * 3000,
    ),
    *("9999-12-31", "0001-01-01", "2026-11-26 x", "9999-12-31T23:59:59+00:00 x"),
)


def test_odd_values_find_nothing_and_harm_nobody(warehouse: Warehouse, sim: Simulator, auth: PerDag) -> None:
    """In every parameter and every part of a path: no fault, no statement in the answer, and the ledger is still read for everybody."""
    job_id = landed(warehouse)
    sim.set(clock="manual")
    (batch_id,) = warehouse.submit(products(), run_id="running").batch_ids
    admin = client(auth, "admin")
    values = {"dag_id": "dag", "job_id": job_id, "batch_id": batch_id}
    asked = 0
    for route in create_app().routes:
        assert isinstance(route, APIRoute)
        (method,) = route.methods
        for name in re.findall(r"{(\w+)}", route.path):
            for odd in ODD:
                path = route.path.format(**{**values, name: quote(odd, safe="")})
                answer = admin.request(method, path, params=PARAMS, headers=HEADERS)
                assert answer.status_code in (403, 404, 422), (path, answer.text)
                asked += 1
        for name in (one.alias for one in route.dependant.query_params):
            for odd in ODD:
                answer = admin.request(method, route.path.format(**values), params={**PARAMS, name: odd}, headers=HEADERS)
                # a right answer to a question that nothing fits, and of a batch that has been canceled before
                assert answer.status_code in (200, 404, 409, 422), (route.path, name, odd, answer.text)
                assert not re.search("Traceback|SELECT|sqlalche.me|psycopg", answer.text), (route.path, answer.text)
                asked += 1
        assert admin.get("/api/about").json()["troubles"] == [], route.path
    assert asked > 200
    assert len(admin.get("/api/jobs", params={"ledger": "warehouse"}).json()["jobs"]) == 2


def test_who_may_see_a_dag_sees_its_jobs_and_may_not_cancel(warehouse: Warehouse, sim: Simulator, auth: PerDag) -> None:
    """A viewer reads everything, and every answer has strict headers."""
    job_id = landed(warehouse)
    sim.set(clock="manual")
    (batch_id,) = warehouse.submit(products(), run_id="running").batch_ids
    viewer = client(auth, "viewer")
    for method, path in addresses(job_id, batch_id):
        answer = viewer.request(method, path, params=PARAMS, headers=HEADERS)
        assert answer.status_code == (403 if method == "POST" else 200), (method, path, answer.text)
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert warehouse.kit.get(batch_id).processing_status == "in_progress"


def test_what_is_in_flight_and_how_far(warehouse: Warehouse, sim: Simulator, auth: PerDag) -> None:
    """The ledger's figures, with what earlier runs cost as the expectation; the API's list is asked once in ten seconds."""
    sim.set(input_tokens=20, output_tokens=10)
    landed(warehouse)
    sim.set(clock="manual")
    (batch_id,) = warehouse.submit(products(6), run_id="running").batch_ids
    admin = client(auth, "admin")
    (one,) = admin.get("/api/in-flight").json()["jobs"]
    assert (one["run_id"], one["state"], one["open_requests"], one["ledger"]) == ("running", "submitted", 6, "warehouse")
    assert (one["models"], one["models_of_this_job"]) == (["claude-haiku-5-5"], False)
    # two of three requests were billed at $0.0000035
    assert (one["expected_usd"], [its["batch_id"] for its in one["open"]]) == ("0.000014", [batch_id])
    assert Decimal(one["open_bound_usd"]) >= Decimal(one["expected_usd"])
    before = calls(sim)
    for _ in range(3):
        seen = admin.get("/api/progress").json()
    assert (seen["batches"][batch_id]["status"], seen["batches"][batch_id]["total"]) == ("in_progress", 6)
    assert calls(sim) - before == 1
    for filters, count in (("run_id=running", 1), ("run_id=other", 0), ("task_id=submit&map_index=-1", 1)):
        assert len(admin.get(f"/api/in-flight?{filters}").json()["jobs"]) == count


def test_history_is_paged_and_filtered(warehouse: Warehouse, auth: PerDag) -> None:
    """The latest first; the pages together are all."""
    for number in range(5):
        warehouse.fetch(warehouse.submit(products(1), run_id=f"run-{number}").batch_ids, run_id=f"run-{number}")
    landed(warehouse, model="claude-opus-4-8")
    admin = client(auth, "admin")
    runs, before = list[str](), None
    while True:
        page = admin.get("/api/jobs", params={"ledger": "warehouse", "limit": 2, **({"before": before} if before else {})}).json()
        runs += [one["run_id"] for one in page["jobs"]]
        before = page["next"]
        if before is None:
            break
    assert runs == ["landed", *(f"run-{number}" for number in reversed(range(5)))]
    today = time.strftime("%Y-%m-%d", time.gmtime())
    for filters, count in (
        ({"failed": True}, 1),
        ({"model": "claude-opus-4-8"}, 1),
        ({"state": "landed"}, 6),
        ({"state": "open"}, 0),
        ({"day": today}, 6),
        ({"day": "2020-01-01"}, 0),
        ({"dag_id": "other"}, 0),
        ({"dag_id": "x' OR '1'='1"}, 0),
    ):
        assert len(admin.get("/api/jobs", params={"ledger": "warehouse", **filters}).json()["jobs"]) == count, filters
    for wrong in ({"state": "x"}, {"day": "2020-13-01"}, {"before": "x"}, {"limit": 1000}, {"ledger": "other"}):
        answer = admin.get("/api/jobs", params={"ledger": "warehouse", **wrong})
        assert answer.status_code in (404, 422) and answer.json()["detail"]["todo"], wrong


def test_one_job_has_its_timeline_its_bill_and_why_rows_failed(warehouse: Warehouse, auth: PerDag, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may quote an answer shows only where show_content says so."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    rows = [{"id": 7, "name": "x [[sim:errored]]"}, {"id": 8, "name": "y [[sim:invalid-output]]"}]
    warehouse.fetch(warehouse.submit(rows, output_schema=schema, run_id="typed").batch_ids, run_id="typed")
    admin, path = client(auth, "admin"), f"/api/dags/dag/jobs/{warehouse.job('typed').job_id}"
    one = admin.get(path, params={"ledger": "warehouse"}).json()
    (shown,) = one["batch_list"]
    assert shown["intended_at"] <= shown["submitted_at"] <= shown["landed_at"] and shown["created_at"] <= shown["ended_at"]
    assert shown["counts"]["errored"] == 1 and shown["console_url"].endswith(shown["batch_id"])
    assert one["bills"]["claude-haiku-5-5"]["input_tokens"] == 1000 and one["tables"] == [{"table": one["tables"][0]["table"], "rows": 1}]
    by_status = {row["status"]: row for row in one["failures"]}
    assert by_status["errored"]["keys"] == ["[7]"] and by_status["errored"]["message"]
    assert (by_status["invalid_output"]["message"], by_status["invalid_output"]["message_hidden"]) == (None, True)
    monkeypatch.setenv("AIRFLOW__BATCHKIT__SHOW_CONTENT", "True")
    one = admin.get(path, params={"ledger": "warehouse"}).json()
    assert all(row["message"] and not row["message_hidden"] for row in one["failures"])


def test_all_keys_of_a_reason_come_a_page_at_a_time(warehouse: Warehouse, auth: PerDag, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that failed as the named row did, and no others; a key that did not fail has none."""
    from airflow_provider_batchkit.ui import app

    marks = {0: "errored", 1: "overloaded", 2: "refusal"}
    rows = [{"id": i, "name": f"{i} [[sim:{marks[i % 4]}]]" if i % 4 in marks else f"{i}"} for i in range(20, 44)]
    warehouse.fetch(warehouse.submit(rows, run_id="typed").batch_ids, run_id="typed")
    admin, path = client(auth, "admin"), f"/api/dags/dag/jobs/{warehouse.job('typed').job_id}"
    reasons = admin.get(path, params={"ledger": "warehouse"}).json()["failures"]
    assert [one["rows"] for one in reasons] == [6, 6, 6]
    monkeypatch.setattr(app, "_KEYS", 4)
    for reason in reasons:
        asked = {"ledger": "warehouse", "like": reason["keys"][0]}
        first = admin.get(f"{path}/failed", params=asked).json()
        second = admin.get(f"{path}/failed", params={**asked, "after": first["next"]}).json()
        kind = int(reason["keys"][0].strip("[]")) % 4
        assert first["keys"] + second["keys"] == [f"[{i}]" for i in range(20, 44) if i % 4 == kind]
        assert (len(first["keys"]), second["next"]) == (4, None)
    assert admin.get(f"{path}/failed", params={"ledger": "warehouse", "like": "[23]"}).json()["keys"] == []
    elsewhere = client(auth, "stranger").get(f"{path.replace('/dag/', '/other/')}/failed", params={"ledger": "warehouse", "like": "[20]"})
    assert elsewhere.status_code == 404


def test_of_many_jobs_in_flight_the_oldest_are_shown(
    warehouse: Warehouse, sim: Simulator, auth: PerDag, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those that may be stuck; the answer says that there are more, and how far those that it shows are."""
    from airflow_provider_batchkit.ui import app

    sim.set(clock="manual")
    ids = [warehouse.submit(products(), run_id=f"run-{number}").batch_ids[0] for number in range(4)]
    admin = client(auth, "admin")
    whole = admin.get("/api/in-flight").json()
    assert ([one["run_id"] for one in whole["jobs"]], whole["more"]) == (["run-0", "run-1", "run-2", "run-3"], False)
    monkeypatch.setattr(app, "_IN_FLIGHT", 2)
    part = admin.get("/api/in-flight").json()
    assert ([one["run_id"] for one in part["jobs"]], part["more"]) == (["run-0", "run-1"], True)
    assert set(ids[:2]) <= admin.get("/api/progress").json()["batches"].keys()


def test_spend_of_a_month_has_its_batches_only(warehouse: Warehouse, auth: PerDag) -> None:
    """From its first moment to its last one, in UTC; so has the latency."""
    times = {
        "oct-first": "2026-10-01T00:00:00",
        "oct-last": "2026-10-31T23:59:59",
        "sep": "2026-09-30T23:59:59",
        "nov": "2026-11-01T00:00:00",
    }
    for run_id, at in times.items():
        job_id = landed(warehouse, run_id=run_id)
        began = datetime.fromisoformat(at).replace(tzinfo=UTC)
        with warehouse.engine.begin() as connection:
            values = {"created_at": began, "ended_at": began + timedelta(minutes=9)}
            connection.execute(sa.update(batch).where(batch.c.job_id == job_id).values(**values))
    admin = client(auth, "admin")
    found = admin.get("/api/spend", params={"ledger": "warehouse", "month": "2026-10"}).json()
    assert [(one["name"], one["batch_cost_usd"]) for one in found["spent"]] == [("2026-10-01", "0.00015"), ("2026-10-31", "0.00015")]
    assert (found["since"], found["until"]) == ("2026-10-01", "2026-10-31")
    assert sorted(one["day"] for one in found["latency"]) == ["2026-10-01", "2026-10-31"]
    (dag,) = admin.get("/api/spend", params={"ledger": "warehouse", "month": "2026-10", "by": "dag"}).json()["spent"]
    assert (dag["name"], dag["batch_cost_usd"]) == ("dag", "0.0003")
    for wrong in ("2026-13", "2026-1", "0000-01", "9999-12", "x"):
        assert admin.get("/api/spend", params={"ledger": "warehouse", "month": wrong}).status_code == 422, wrong


def test_spend_adds_up_and_shows_budgets_and_latency(warehouse: Warehouse, auth: PerDag) -> None:
    """By day, DAG and model the same whole."""
    budget = Budget("catalog", Decimal(5), alert_at=["0.0001"], notifiers=[print])
    landed(warehouse, limits=Limits(budget=budget))
    with warehouse.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE batchkit_batch SET batch_cost_picousd = 1500000000")
    (claim,) = warehouse.ledger.claim_alerts(budget)
    warehouse.ledger.alert_told(claim)
    admin = client(auth, "admin")
    for by in ("day", "dag", "model"):
        found = admin.get("/api/spend", params={"ledger": "warehouse", "by": by}).json()
        assert [one["batch_cost_usd"] for one in found["spent"]] == ["0.00015"]
    assert [(one["name"], one["cap_usd"], one["spent_usd"]) for one in found["budgets"]] == [("catalog", "5.00", "0.0015")]
    ((alert,),) = (one["alerts"] for one in found["budgets"])
    assert alert["percent"] == "0.01%" and datetime.fromisoformat(alert["told_at"]).tzinfo is not None
    assert [(one["dag_id"], one["batches"]) for one in found["latency"]] == [("dag", 1)]


def test_cancel_needs_the_right_is_noted_in_the_audit_log_and_cancels(warehouse: Warehouse, sim: Simulator, auth: PerDag) -> None:
    """A request that another site could send is refused, also of somebody who has the right."""
    from airflow.models.log import Log
    from airflow.utils.session import create_session

    sim.set(clock="manual")
    (batch_id,) = warehouse.submit(products(), run_id="running").batch_ids
    admin, path = client(auth, "admin"), f"/api/dags/dag/batches/{batch_id}/cancel"
    assert admin.post(path, params={"ledger": "warehouse"}).status_code == 403
    for site in ("cross-site", "same-site", "none"):
        answer = admin.post(path, params={"ledger": "warehouse"}, headers={**HEADERS, "Sec-Fetch-Site": site})
        assert answer.status_code == 403 and "another site" in answer.text
    assert warehouse.kit.get(batch_id).processing_status == "in_progress"
    answer = admin.post(path, params={"ledger": "warehouse"}, headers=HEADERS)
    assert (answer.status_code, answer.json()) == (200, {"batch_id": batch_id, "fate": "canceled"})
    assert warehouse.kit.get(batch_id).processing_status == "canceling"
    with create_session() as session:
        line = session.query(Log).filter(Log.event == CANCEL_EVENT, Log.extra.contains(batch_id)).one()
        assert (line.owner, line.dag_id, line.run_id, line.task_id) == ("admin", "dag", "running", "submit")
        assert json.loads(line.extra or "")["requests"] == 3
    sim.end(batch_id)
    warehouse.fetch([batch_id], run_id="running")
    answer = admin.post(path, params={"ledger": "warehouse"}, headers=HEADERS)
    assert answer.status_code == 409 and "landed" in answer.json()["detail"]["message"]


def test_a_ledger_that_cannot_be_read_is_named_and_hides_no_other(
    warehouse: Warehouse, auth: PerDag, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Down, without tables, without a connection: each says what to do, and none shows a password, a statement or a trace."""
    landed(warehouse)
    monkeypatch.setenv("AIRFLOW_CONN_DOWN", "postgres://me:secret-word@127.0.0.1:9/x")
    monkeypatch.setenv("AIRFLOW_CONN_FRESH", f"sqlite://{str(tmp_path / 'fresh.db').replace('/', '%2F')}")
    monkeypatch.setenv("AIRFLOW__BATCHKIT__PAGE_LEDGER_CONN_IDS", "down, warehouse, fresh, nowhere")
    admin = client(auth, "admin")
    about = admin.get("/api/about")
    assert about.json()["ledgers"] == ["down", "warehouse", "fresh", "nowhere"]
    assert {one["ledger"]: one["kind"] for one in about.json()["troubles"]} == {"down": "down", "fresh": "empty", "nowhere": "missing"}
    assert all(one["todo"] for one in about.json()["troubles"])
    flight = admin.get("/api/in-flight")
    assert len(flight.json()["troubles"]) == 3
    asked = admin.get("/api/jobs", params={"ledger": "down"})
    assert asked.status_code == 503 and asked.json()["detail"]["kind"] == "down"
    assert len(admin.get("/api/jobs", params={"ledger": "warehouse"}).json()["jobs"]) == 1
    for answer in (about, flight, asked):
        assert not re.search("secret-word|Traceback|SELECT|sqlalche.me", answer.text), answer.text


def test_an_api_that_does_not_answer_is_named(warehouse: Warehouse, sim: Simulator, auth: PerDag, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of jobs is there without it."""
    sim.set(clock="manual")
    warehouse.submit(products(), run_id="running")
    monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection("http://127.0.0.1:9"))
    admin = client(auth, "admin")
    assert len(admin.get("/api/in-flight").json()["jobs"]) == 1
    seen = admin.get("/api/progress").json()
    assert seen["batches"] == {} and list(seen["troubles"]) == ["anthropic_default"]


def test_without_any_ledger_the_page_knows_so(auth: PerDag) -> None:
    """It then says which setting to make."""
    assert client(auth, "admin").get("/api/about").json()["ledgers"] == []


def test_a_fault_of_our_own_shows_no_trace(warehouse: Warehouse, auth: PerDag, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words stay in the server's log."""
    from airflow_provider_batchkit.ledger.overview import Overview

    landed(warehouse)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("inner secret")

    monkeypatch.setattr(Overview, "jobs", broken)
    answer = client(auth, "admin").get("/api/jobs", params={"ledger": "warehouse"})
    assert answer.status_code == 500 and "inner secret" not in answer.text
    assert answer.headers["cache-control"] == "no-store"


def test_loading_the_plugin_costs_almost_nothing() -> None:
    """Airflow loads it in every process: only this package's two modules may come on top of what Airflow's plugins manager has."""
    code = """
import sys, time, airflow, airflow.plugins_manager, airflow.providers.common.compat.sdk as sdk
sdk.conf
before, started = set(sys.modules), time.process_time()
import airflow_provider_batchkit.ui.plugin
print(time.process_time() - started)
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = done.stdout.splitlines()[-2:]
    assert set(modules.split()) <= {f"airflow_provider_batchkit{name}" for name in ("", ".ui", ".ui.plugin")}
    assert float(seconds) <= 0.05


def test_an_airflow_that_cannot_show_the_page_has_no_entry_that_leads_to_an_error() -> None:
    """Airflow 3.1.0 gives plugins neither React nor the login's cookie."""
    import airflow

    from airflow_provider_batchkit.ui import plugin

    assert [plugin.places(version) for version in ("3.1.0", "3.1.7", "3.1.7rc1")] == [[], [], []]
    assert plugin.BatchKitPlugin.react_apps == plugin.places(airflow.__version__)


def test_the_plugin_names_its_places_below_the_base_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative address of the bundle does not work before Airflow 3.3."""
    from airflow_provider_batchkit.ui import plugin

    for version in ("3.1.8", "3.2.0rc1", "3.10.0", "4.0"):
        assert [one["destination"] for one in plugin.places(version)] == ["nav", "dag", "dag_run", "task_instance"]
        assert len({one["url_route"] for one in plugin.places(version)}) == 4
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example.com/team/a/")
    assert plugin.base_path() == "/team/a"

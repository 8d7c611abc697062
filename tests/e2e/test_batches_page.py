"""The Batches page in a real browser, in a real Airflow that lies below a path of its address."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from airflow_provider_batchkit.ui.access import CANCEL_EVENT
from tests.connections import anthropic_connection
from tests.databases import sqlite_database
from tests.e2e.browser import chromium, logged_in
from tests.e2e.conftest import StartAirflow
from tests.e2e.harness import AirflowStandalone
from tests.e2e.shelf import DAG_FILE, DAGS, Shelf, fill, run
from tests.warehouse import kit_for

pytestmark = [
    pytest.mark.skipif(
        chromium() is None or importlib.util.find_spec("playwright") is None,
        reason="needs a browser: apt-get install -y chromium, and pip install playwright",
    ),
    pytest.mark.skipif(
        not any(one.name == "batchkit" for one in entry_points(group="airflow.plugins")),
        reason="the installed package is older than its plugin: install it again",
    ),
]

WAIT_MS = 60_000
#: red, green and blue of the page's text, however its style names the colour
INK = """() => {
    const pen = document.createElement("canvas").getContext("2d");
    pen.fillStyle = getComputedStyle(document.querySelector(".bk-card")).color;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
}"""


AIRFLOW = tuple(int(part) for part in version("apache-airflow").split(".")[:3])


@dataclass(frozen=True)
class Office:
    """An Airflow with a ledger that has a history, and what fills it."""

    airflow: AirflowStandalone
    sim: SimulatorProcess
    shelf: Shelf

    def open(self, **how: Any) -> Any:
        """A page of a browser that has logged in."""
        return logged_in(self.airflow.url, self.airflow.user, self.airflow.password, **how)


#: Airflow 3.1.0 cannot show the page; 3.1.8 can
shows_it = pytest.mark.skipif(AIRFLOW < (3, 1, 8), reason="this Airflow gives plugins neither React nor the login's cookie")


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory, start_airflow: StartAirflow) -> Iterator[Office]:
    folder = tmp_path_factory.mktemp("office")
    dags = folder / "dags"
    dags.mkdir()
    (dags / "shelf.py").write_text(DAG_FILE)
    warehouse = sqlite_database(folder / "warehouse.db")
    with SimulatorProcess(SimulatorSettings()) as sim:
        shelf = fill(warehouse.engine(), kit_for(sim.base_url), sim)
        env = {
            "AIRFLOW_CONN_WAREHOUSE": warehouse.airflow_uri,
            "AIRFLOW_CONN_DOWN": "postgres://me:a-secret@127.0.0.1:9/x",
            "AIRFLOW_CONN_ANTHROPIC_DEFAULT": anthropic_connection(sim.base_url),
            "AIRFLOW__BATCHKIT__PAGE_LEDGER_CONN_IDS": "warehouse, down",
        }
        airflow = start_airflow(dags, env, startup_seconds=400, base_path="/team/a")
        for dag_id in DAGS:
            airflow.wait_for_dag(dag_id)
        yield Office(airflow, sim, shelf)


@shows_it
def test_a_running_job_advances_without_a_reload_and_can_be_canceled(office: Office) -> None:
    """Log in, see what is in flight, open the job, cancel its batch after a question; the audit log names who did it."""
    ids = run(office.shelf, office.sim, "manual__running", 300, seconds=120)
    with office.open() as page:
        page.goto(f"{office.airflow.url}/plugin/batches")
        line = page.get_by_role("row").filter(has_text="manual__running")
        line.wait_for(timeout=WAIT_MS)
        page.get_by_text("The ledger of the connection down cannot be read now").wait_for(timeout=WAIT_MS)
        assert "a-secret" not in page.content()
        bar = line.get_by_role("progressbar")
        page.wait_for_function("bar => Number(bar.ariaValueNow) > 0", arg=bar.element_handle(), timeout=WAIT_MS)
        first = int(bar.get_attribute("aria-valuenow"))
        page.wait_for_function("([bar, first]) => Number(bar.ariaValueNow) > first", arg=[bar.element_handle(), first], timeout=WAIT_MS)

        line.get_by_role("button").click()
        page.get_by_role("button", name="Cancel …").first.click()
        page.get_by_role("button", name="Let it run").click()
        assert office.shelf.kit.get(ids[0]).processing_status == "in_progress"
        page.get_by_role("row").filter(has_text=ids[0]).get_by_role("button", name="Cancel …").click()
        page.get_by_role("button", name="Cancel the batch").click()
        page.get_by_role("row").filter(has_text=ids[0]).get_by_text(re.compile("canceling|ended")).first.wait_for(timeout=WAIT_MS)
        assert page.get_by_role("row").filter(has_text=ids[0]).get_by_role("button").count() == 0
    assert office.shelf.kit.get(ids[0]).processing_status in ("canceling", "ended")
    (event,) = office.airflow.get("/eventLogs", event=CANCEL_EVENT)["event_logs"]
    assert (event["owner"], event["dag_id"], ids[0] in event["extra"]) == (office.airflow.user, DAGS[0], True)


@shows_it
def test_history_leads_to_a_job_with_its_failed_rows(office: Office) -> None:
    """Filtered by DAG and by failure; the back button of the browser leads back."""
    with office.open() as page:
        page.goto(f"{office.airflow.url}/plugin/batches#view=history")
        page.get_by_role("row").filter(has_text=DAGS[1]).first.wait_for(timeout=WAIT_MS)
        page.locator(".bk-filters select").first.select_option(DAGS[0])
        page.get_by_label("failed rows only").check()
        page.wait_for_function(f"() => !document.querySelector('.bk-table')?.innerText.includes('{DAGS[1]}')", timeout=WAIT_MS)
        page.get_by_role("row").filter(has_text="scheduled__2026-11-12").first.get_by_role("button").click()
        failed = page.get_by_label("Failures").get_by_role("row").nth(1)
        failed.wait_for(timeout=WAIT_MS)
        assert "errored" in failed.inner_text() and "[28]" in failed.inner_text()
        failed.get_by_role("button", name="more").click()
        failed.get_by_text("[144]", exact=True).wait_for(timeout=WAIT_MS)
        failed.get_by_role("button").wait_for(state="detached", timeout=WAIT_MS)
        assert page.get_by_text("landed", exact=True).count() >= 1
        page.go_back()
        page.get_by_label("failed rows only").wait_for(timeout=WAIT_MS)


@shows_it
def test_spending_adds_up_by_dag_and_shows_the_budget(office: Office) -> None:
    """Bars for days, then for DAGs; the budget with what is spent and left."""
    with office.open() as page:
        page.goto(f"{office.airflow.url}/plugin/batches#view=spend")
        page.get_by_label("Spending").get_by_role("row").nth(5).wait_for(timeout=WAIT_MS)
        page.get_by_label("Summed up by").select_option("dag")
        page.get_by_label("Spending").get_by_role("row").filter(has_text=DAGS[0]).wait_for(timeout=WAIT_MS)
        page.get_by_text("spent $").first.wait_for(timeout=WAIT_MS)
        assert "$40.00 a month" in page.locator(".bk-budget").inner_text() and "% used" in page.locator(".bk-budget").inner_text()


@shows_it
def test_what_a_month_cost_is_one_choice_away(office: Office) -> None:
    """The months before are named; one in which nothing landed says so."""
    began = datetime.now(UTC).replace(day=1)
    this, before = (f"{at:%B %Y}" for at in (began, began - timedelta(days=200)))
    with office.open() as page:
        page.goto(f"{office.airflow.url}/plugin/batches#view=spend")
        page.get_by_label("Over").select_option(label=before)
        page.get_by_text("Nothing has landed in this time.").wait_for(timeout=WAIT_MS)
        page.get_by_label("Over").select_option(label=this)
        page.get_by_text(f"batches created from {began:%Y-%m}-01 to").wait_for(timeout=WAIT_MS)


@shows_it
def test_a_job_that_has_ended_and_does_not_land_needs_a_look(office: Office) -> None:
    """Half an hour after its end, in the list and at the job; no button cancels what has ended."""
    run(office.shelf, office.sim, "manual__left", 5, seconds=0)
    with office.open() as page:
        page.goto(f"{office.airflow.url}/plugin/batches")
        line = page.get_by_role("row").filter(has_text="manual__left")
        line.get_by_text("ended", exact=True).wait_for(timeout=WAIT_MS)
        assert page.get_by_text("has not landed").count() == 0
        page.clock.set_fixed_time(datetime.now(UTC) + timedelta(hours=2))
        page.get_by_text("Everything ended 2 h 0 min ago and has not landed.").or_(
            page.get_by_text("Everything ended 1 h 59 min ago and has not landed.")
        ).first.wait_for(timeout=WAIT_MS)
        line.get_by_role("button").click()
        page.get_by_text("This job needs a look.").wait_for(timeout=WAIT_MS)
        assert page.get_by_role("button", name="Cancel …").count() == 0


@shows_it
def test_the_tab_of_a_dag_shows_its_own_jobs_only(office: Office) -> None:
    """The same page, in the place of the DAG."""
    with office.open() as page:
        page.goto(f"{office.airflow.url}/dags/{DAGS[1]}/plugin/batches-of-dag#view=history")
        page.get_by_role("row").filter(has_text="scheduled__").first.wait_for(timeout=WAIT_MS)
        assert page.locator(".bk-filters select").count() == 2 and DAGS[0] not in page.locator(".bk").inner_text()


@shows_it
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_telephone_in_light_and_dark(office: Office, dark: bool, tmp_path: Path) -> None:
    """Nothing is wider than 390 pixels, and the colours follow Airflow's."""
    with office.open(size=(390, 844), dark=dark) as page:
        for view in ("flight", "history", "spend"):
            page.goto(f"{office.airflow.url}/plugin/batches#view={view}")
            page.locator(".bk-tabs").wait_for(timeout=WAIT_MS)
            page.wait_for_timeout(1_500)
            assert page.evaluate("() => document.querySelector('.bk').scrollWidth") <= 390
            page.screenshot(path=str(tmp_path / f"{view}.png"))
        assert (sum(page.evaluate(INK)) > 380) is dark


@shows_it
def test_an_airflow_that_gives_plugins_no_react_is_named(office: Office) -> None:
    """The page says so, and what shows the same."""
    with office.open() as page:
        page.add_init_script("Object.defineProperty(globalThis, 'React', { get: () => undefined, set: () => {} })")
        page.goto(f"{office.airflow.url}/plugin/batches")
        page.get_by_text("Airflow 3.1.8 and later do").wait_for(timeout=WAIT_MS)
        assert "python -m airflow_provider_batchkit" in page.locator("body").inner_text()


def test_the_page_is_in_the_navigation_where_airflow_can_show_it(office: Office) -> None:
    """An older Airflow loads the plugin, has no entry, and works."""
    (plugin,) = (one for one in office.airflow.get("/plugins", limit=100)["plugins"] if one["name"] == "batchkit")
    assert len(plugin["react_apps"]) == (0 if AIRFLOW < (3, 1, 8) else 4)
    with office.open() as page:
        page.goto(f"{office.airflow.url}/")
        page.get_by_text("Dags", exact=True).first.wait_for(timeout=WAIT_MS)
        if AIRFLOW < (3, 1, 8):
            assert page.get_by_text("Batches", exact=True).count() == 0

"""Where a task's figures go besides its table: Storage, asset events, metrics, the Console link; and the prices that Airflow configures."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import Stats

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.hooks.settings import configured_prices
from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from tests.databases import Database
from tests.integration.airflow_runs import run_dag


@pytest.fixture(scope="module")
def simulator_settings() -> SimulatorSettings:
    return SimulatorSettings(input_tokens=2700, output_tokens=100, models={"claude-imaginary-9": {}})


@pytest.fixture(scope="module")
def connection_model() -> None:
    """Every task names its model."""


@pytest.fixture
def database(sqlite: Database) -> Database:
    return sqlite


SUBMIT = """
submit = SubmitBatchOperator(
    task_id="submit", requests=[{"id": 1, "name": "tea"}, {"id": 2, "name": "cup"}, {"id": 3, "name": "cup"}], key="id",
    prompt="About {{ row.name }}", model="claude-opus-4-8", max_tokens=100, sql_conn_id="warehouse",
)
"""
FETCH = """
from airflow.sdk import Asset, AssetAlias
fetch = FetchBatchOperator(
    task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse",
    outlets=[Asset("answers_table", extra={"owner": "data"}), AssetAlias("anything")],
)
"""
LINK = "batchkit_console_link"
PAGE = "https://platform.claude.com/settings/workspaces/default/batches"


class Recorder:
    """A metrics backend that writes down what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, dict[str, str]]] = []

    def incr(self, stat: str, count: int = 1, rate: float = 1, *, tags: dict[str, str] | None = None) -> None:
        self.seen.append((stat, count, tags or {}))

    def timing(self, stat: str, dt: Any, *, tags: dict[str, str] | None = None) -> None:
        self.seen.append((stat, dt, tags or {}))

    def ours(self) -> dict[str, Any]:
        """Name → value of the metrics of this provider."""
        return {name: value for name, value, _ in self.seen if name.startswith("batchkit.")}


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(Stats, "incr", recorder.incr)
    monkeypatch.setattr(Stats, "timing", recorder.timing)
    return recorder


def asset_extras(dag_id: str) -> list[dict[str, Any]]:
    """The extras of the asset events that a DAG's tasks made, oldest first."""
    from airflow.models.asset import AssetEvent
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        return list(session.scalars(select(AssetEvent.extra).where(AssetEvent.source_dag_id == dag_id).order_by(AssetEvent.id)))


def test_an_outlets_event_carries_the_bill(home: Path) -> None:
    """The asset event's extra is the summary: two requests for three rows, $0.016; an alias among the outlets is left alone."""
    run = run_dag(home, SUBMIT, FETCH)
    assert run.state == "success"
    (extra,) = asset_extras(run.dag_id)
    summary = run.xcom("fetch")
    assert extra == {name: summary[name] for name in ("batch_ids", "table", "rows", "counts", "cost_tally", "latency_s")}
    assert (extra["rows"], extra["cost_tally"]["batch_cost_usd"], extra["cost_tally"]["requests"]) == (3, "0.016", 2)


def test_metrics_add_up_to_the_bill_however_often_a_fetch_runs(home: Path, metrics: Recorder) -> None:
    """Two fetches of one batch: rows, tokens, micro-dollars and the latency count once."""
    again = 'again = FetchBatchOperator(task_id="again", batch_id=submit.output, table="answers", sql_conn_id="warehouse")\nfetch >> again'
    run = run_dag(home, SUBMIT, FETCH, again)
    assert run.state == "success"
    latency = metrics.ours().pop("batchkit.batch_latency")
    assert isinstance(latency, dt.timedelta)
    counted = [(name, value) for name, value, _ in metrics.seen if name.startswith("batchkit.") and name != "batchkit.batch_latency"]
    assert sorted(counted) == [
        ("batchkit.batch_cost_microusd", 16_000),
        ("batchkit.requests", 2),
        ("batchkit.rows.succeeded", 3),
        ("batchkit.standard_cost_microusd", 32_000),
        ("batchkit.submitted_requests", 2),
        ("batchkit.tokens.input", 5_400),
        ("batchkit.tokens.output", 200),
    ]
    tags = {name: tags for name, _, tags in metrics.seen}
    assert tags["batchkit.requests"] == {"dag_id": run.dag_id, "task_id": "fetch", "model": "claude-opus-4-8"}
    assert tags["batchkit.rows.succeeded"] == {"dag_id": run.dag_id, "task_id": "fetch", "status": "succeeded"}


def test_a_model_without_a_price_counts_as_unpriced(home: Path, metrics: Recorder) -> None:
    """Its tokens count, its cost is no zero among the costs."""
    run = run_dag(home, SUBMIT.replace("claude-opus-4-8", "claude-imaginary-9"), FETCH)
    assert run.state == "success"
    ours = metrics.ours()
    assert (ours["batchkit.unpriced_requests"], ours["batchkit.tokens.input"]) == (2, 5_400)
    assert "batchkit.batch_cost_microusd" not in ours


def test_a_broken_metrics_backend_fails_no_task(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers have landed; who counts them has no say in that."""

    def refuse(stat: str, *args: Any, **kwargs: Any) -> None:
        if stat.startswith("batchkit."):
            raise OSError("no route to the metrics host")

    monkeypatch.setattr(Stats, "incr", refuse)
    monkeypatch.setattr(Stats, "timing", refuse)
    assert run_dag(home, SUBMIT, FETCH).state == "success"


def test_every_task_links_to_its_batch(home: Path) -> None:
    """Submit, the sensor and fetch; a mapped fetch to its own batch each."""
    run = run_dag(
        home,
        SUBMIT.replace("max_tokens=100,", "max_tokens=100, max_requests_per_batch=1,"),
        'wait = BatchSensor(task_id="wait", batch_id=submit.output)',
        'fetch = FetchBatchOperator.partial(task_id="fetch", table="answers", sql_conn_id="warehouse").expand(batch_id=submit.output)',
        "wait >> fetch",
    )
    assert run.state == "success"
    first, second = run.xcom("submit")
    assert run.xcom("submit", LINK) == run.xcom("wait", LINK) == f"{PAGE}#{first}"
    assert [run.xcom("fetch", LINK, map_index=i) for i in (0, 1)] == [f"{PAGE}#{first}", f"{PAGE}#{second}"]


def test_a_failed_submit_links_to_what_it_has_sent(home: Path, simulator: SimulatorProcess) -> None:
    """The first shard runs and is billed when the second is refused: the link leads to it."""
    simulator.faults.add("status", status=400, after=1)
    run = run_dag(home, SUBMIT.replace("max_tokens=100,", "max_tokens=100, max_requests_per_batch=1,"))
    assert run.state == "failed"
    assert str(run.xcom("submit", LINK)).startswith(f"{PAGE}#msgbatch_")


def test_the_consoles_address_is_a_setting(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another workspace has another page."""
    monkeypatch.setenv("AIRFLOW__BATCHKIT__CONSOLE_URL", "https://console.example/workspaces/wrkspc_1/batches")
    run = run_dag(home, SUBMIT)
    assert run.xcom("submit", LINK) == f"https://console.example/workspaces/wrkspc_1/batches#{run.xcom('submit', 'batch_id')}"


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_negotiated_prices_come_from_airflows_configuration(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """At $1 and $2 per million tokens a row of 2,700 and 100 costs $0.0029, half of it in a batch; the tally says so."""
    prices = tmp_path / f"prices.{suffix}"
    fields = {"input_usd_per_mtok": "1", "output_usd_per_mtok": "2"}
    toml = "[claude-opus-4-8]\n" + "".join(f'{name} = "{value}"\n' for name, value in fields.items())
    prices.write_text(json.dumps({"claude-opus-4-8": fields}) if suffix == "json" else toml)
    monkeypatch.setenv("AIRFLOW__BATCHKIT__PRICE_OVERRIDES", str(prices))
    run = run_dag(home, SUBMIT, FETCH)
    tally = run.xcom("fetch")["cost_tally"]
    assert (Decimal(tally["batch_cost_usd"]), Decimal(tally["standard_cost_usd"])) == (Decimal("0.0029"), Decimal("0.0058"))
    assert "+overrides:" in tally["price_version"]


def test_an_unusable_price_file_stops_submit_before_anything_is_sent(
    home: Path, simulator: SimulatorProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing error in a price must not show as a wrong bill weeks later."""
    prices = tmp_path / "prices.json"
    prices.write_text('{"claude-opus-4-8": {"input_usd_per_mtok": "cheap", "output_usd_per_mtok": "2"}}')
    monkeypatch.setenv("AIRFLOW__BATCHKIT__PRICE_OVERRIDES", str(prices))
    posts = simulator.stats()["posts"]
    assert run_dag(home, SUBMIT).state == "failed"
    assert simulator.stats()["posts"] == posts
    with pytest.raises(BatchInputError, match=r"claude-opus-4-8.*input_usd_per_mtok.*cheap"):
        configured_prices()


def test_a_relative_price_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which folder a worker happens to run in must not decide about prices."""
    monkeypatch.setenv("AIRFLOW__BATCHKIT__PRICE_OVERRIDES", "prices.json")
    with pytest.raises(BatchInputError, match=r"absolute path, not 'prices\.json'"):
        configured_prices()


def test_live_prices_are_off_until_airflow_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By default nothing is fetched; switched on, an address that does not answer leaves the bundled prices, with a warning."""
    assert "+live" not in configured_prices().version
    assert caplog.text == ""
    monkeypatch.setenv("AIRFLOW__BATCHKIT__LIVE_PRICES", "True")
    monkeypatch.setenv("AIRFLOW__BATCHKIT__LIVE_PRICES_URL", "http://127.0.0.1:9/prices.json")
    assert "+live" not in configured_prices().version
    assert "http://127.0.0.1:9/prices.json" in caplog.text


def test_airflow_knows_the_links_and_the_settings() -> None:
    """The provider's registration is valid, and its defaults are what the code falls back to."""
    from airflow.providers_manager import ProvidersManager

    from airflow_provider_batchkit.get_provider_info import get_provider_info
    from airflow_provider_batchkit.links import CONSOLE_URL

    manager = ProvidersManager()
    assert "airflow_provider_batchkit.links.ConsoleLink" in manager.extra_links_class_names
    options = get_provider_info()["config"]["batchkit"]["options"]
    assert options["console_url"]["default"] == CONSOLE_URL
    assert dict(manager.provider_configs)["airflow-provider-batchkit"]["batchkit"]["options"].keys() == options.keys()

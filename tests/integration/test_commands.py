"""The commands: what somebody on call sees and does without SQL, for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.commands import registry
from airflow_provider_batchkit.commands.registry import main
from airflow_provider_batchkit.cost.budget import Budget
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.jobs.caps import Limits
from airflow_provider_batchkit.ledger import overview, spending
from airflow_provider_batchkit.ledger.ddl import statements
from airflow_provider_batchkit.ledger.tables import batch as batch_table
from airflow_provider_batchkit.ledger.tables import job as job_table
from airflow_provider_batchkit.simulator import Simulator
from tests import releases
from tests.connections import anthropic_connection
from tests.databases import Database
from tests.warehouse import Warehouse, kit_for

Out = pytest.CaptureFixture[str]


@pytest.fixture
def warehouse(database: Database, sim: Simulator, airflow_db: Path, monkeypatch: pytest.MonkeyPatch) -> Warehouse:
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", database.airflow_uri)
    monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection(sim.base_url))
    return Warehouse(database.engine(), kit_for(sim.base_url))


def products(count: int = 3, mark: str = "") -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}{mark}"} for i in range(count)]


def read(out: Out, *arguments: str) -> Any:
    """What a command prints as JSON."""
    assert main([*arguments, "--conn-id", "warehouse", "--output", "json"]) == 0
    return json.loads(out.readouterr().out)


def run(out: Out, *arguments: str) -> str:
    """What a command prints for a person."""
    assert main([*arguments, "--conn-id", "warehouse"]) == 0
    return out.readouterr().out


def age(warehouse: Warehouse, run_id: str, days: int) -> None:
    """Let a job be as old as that, with everything in it."""
    then = datetime.now(UTC) - timedelta(days=days)
    tables = job_table, batch_table
    job_id = warehouse.job(run_id).job_id
    with warehouse.engine.begin() as connection:
        connection.execute(sa.update(tables[0]).where(tables[0].c.job_id == job_id).values(created_at=then))
        times = dict.fromkeys(("intended_at", "created_at", "submitted_at", "ended_at"), then)
        connection.execute(sa.update(tables[1]).where(tables[1].c.job_id == job_id).values(**times))
        landed = (tables[1].c.job_id == job_id) & tables[1].c.landed_at.is_not(None)
        connection.execute(sa.update(tables[1]).where(landed).values(landed_at=then))


def test_what_is_in_flight_shows_its_age_its_progress_and_the_time_left(warehouse: Warehouse, sim: Simulator, capsys: Out) -> None:
    """`batches --open` asks the API's list; what has landed is not in it."""
    warehouse.fetch(warehouse.submit(products(), run_id="done").batch_ids, run_id="done")
    sim.set(clock="manual")
    running = "scheduled__2026-11-27T01:14:22.741442+00:00"
    (batch_id,) = warehouse.submit(products(5), run_id=running).batch_ids
    (line,) = read(capsys, "batches", "--open")
    assert (line["batch"], line["run_id"], line["state"], line["requests"]) == (batch_id, running, "submitted", 5)
    assert (line["api_status"], line["done"]) == ("in_progress", 0)
    assert line["age"] + line["left"] == pytest.approx(86_400, abs=5)
    assert batch_id in run(capsys, "batches", "--open", "--output", "plain")
    # what is too wide for a table is a list: the ids, which the next command takes, are whole
    said = run(capsys, "batches", "--open")
    assert f"batch        {batch_id}\n" in said and line["job"] in said and running in said
    for state, ids in (("open", [batch_id]), ("submitted", [batch_id]), ("doubt", [])):
        assert [one["batch"] for one in read(capsys, "batches", "--state", state)] == ids
    sim.end(batch_id)
    (line,) = read(capsys, "batches", "--open")
    # how long it has waited for somebody to land it
    assert (line["api_status"], line["done"]) == ("ended", 5) and 0 <= line["ended_ago"] < 60
    warehouse.fetch([batch_id], run_id=running)
    assert "Nothing is in flight." in run(capsys, "batches", "--open")


def test_an_api_that_cannot_be_asked_leaves_the_ledgers_part(
    warehouse: Warehouse, sim: Simulator, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is named, and the list is there."""
    sim.set(clock="manual")
    warehouse.submit(products())
    monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection("http://127.0.0.1:9"))
    assert main(["batches", "--open", "--conn-id", "warehouse", "-o", "json"]) == 0
    said = capsys.readouterr()
    assert [one["done"] for one in json.loads(said.out)] == [None]
    assert "batches of the connection 'anthropic_default' are cannot be told now" in said.err


def test_jobs_are_listed_the_latest_first_and_filtered(warehouse: Warehouse, sim: Simulator, capsys: Out) -> None:
    """By run, state, model and failure; the money is exact."""
    sim.set(input_tokens=1000, output_tokens=100)
    warehouse.fetch(warehouse.submit(products(), run_id="good").batch_ids, run_id="good")
    bad = [*products(2), {"id": 7, "name": "x [[sim:errored]]"}]
    warehouse.fetch(warehouse.submit(bad, run_id="bad", model="claude-opus-4-8").batch_ids, run_id="bad")
    sim.set(clock="manual")
    warehouse.submit(products(), run_id="running")
    lines = read(capsys, "jobs")
    assert [one["run_id"] for one in lines] == ["running", "bad", "good"]
    assert [one["state"] for one in lines] == ["submitted", "landed", "landed"]
    assert [one["failed"] for one in lines] == [0, 1, 0]
    # 3 x (1000 x $0.10 + 100 x $0.50) / 1e6 at the batch half
    assert (lines[2]["cost_usd"], lines[2]["savings_usd"]) == ("0.000225", "0.000225")
    assert lines[0]["cost_usd"] is None and lines[0]["open_at_most_usd"] is not None
    for arguments, runs in (
        (("--state", "open"), ["running"]),
        (("--failed",), ["bad"]),
        (("--model", "claude-opus-4-8"), ["bad"]),
        (("--run-id", "good"), ["good"]),
        (("--dag-id", "other"), []),
        (("--until", "2020-01-01"), []),
        (("--since", "2020-01-01", "--limit", "1"), ["running"]),
    ):
        assert [one["run_id"] for one in read(capsys, "jobs", *arguments)] == runs, arguments
    assert "claude-opus-4-8" in run(capsys, "jobs")


def test_failed_says_why_with_keys_and_what_helps(warehouse: Warehouse, sim: Simulator, capsys: Out) -> None:
    """The most frequent reason first; each row on request."""
    rows = [*products(2), *({"id": i, "name": f"{i} [[sim:errored]]"} for i in range(10, 14)), {"id": 20, "name": "[[sim:expired]]"}]
    warehouse.fetch(warehouse.submit(rows).batch_ids)
    job = warehouse.job().job_id
    first, second = read(capsys, "failed", job)
    assert (first["rows"], first["status"], first["keys"]) == (4, "errored", ["[10]", "[11]", "[12]"])
    assert first["message"] and "asking again" in first["what_helps"]
    helps = "worth asking again: by a further round (max_rounds of RunBatchOperator), or by a submit with only_failed_of"
    assert (second["rows"], second["status"], second["what_helps"]) == (1, "expired", helps)
    assert [one["key"] for one in read(capsys, "failed", job, "--rows", "--limit", "2")] == ["[10]", "[11]"]
    for which, keys in (
        (["--status", "expired"], ["[20]"]),
        (["--error-type", "invalid_request_error"], ["[10]", "[11]", "[12]", "[13]"]),
        (["--status", "expired", "--error-type", "invalid_request_error"], []),
    ):
        assert [one["key"] for one in read(capsys, "failed", job, "--rows", *which)] == keys
    assert main(["failed", job, "--rows", "--limit", "2", "--conn-id", "warehouse"]) == 0
    assert "There are more" in capsys.readouterr().err
    assert main(["failed", job, "--status", "expired", "--conn-id", "warehouse"]) == 1
    assert "give --rows" in capsys.readouterr().err
    assert main(["failed", "nojob", "--conn-id", "warehouse"]) == 1
    assert "has no job nojob" in capsys.readouterr().err


def test_spend_says_which_alerts_of_a_budget_were_told_and_when(warehouse: Warehouse, capsys: Out) -> None:
    """Those of the present window; a claim that nobody has taken is none."""
    budget = Budget("catalog", Decimal("0.01"), alert_at=["0.001", "0.002", 1], notifiers=[print, print])
    warehouse.submit(products(), limits=Limits(budget=budget))
    first, _ = warehouse.ledger.claim_alerts(budget)
    assert read(capsys, "spend")["budgets"][0]["alerts"] == {}
    warehouse.ledger.alert_told(first)
    (cap,) = read(capsys, "spend")["budgets"]
    assert list(cap["alerts"]) == ["0.1%", "0.2%"]
    when = datetime.fromisoformat(cap["alerts"]["0.1%"])
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=5)
    assert f"0.1% at {when:%Y-%m-%d %H:%M}" in " ".join(run(capsys, "spend", "--output", "plain").split())


@pytest.mark.parametrize(("by", "names"), [("dag", ["dag"]), ("model", ["claude-opus-4-8", "claude-haiku-5-5"]), ("day", None)])
def test_spend_adds_up_by_day_dag_and_model_with_the_budgets(
    warehouse: Warehouse, sim: Simulator, capsys: Out, by: str, names: list[str] | None
) -> None:
    """The dearest first; the parts add up to the same whole, and a budget says what is left."""
    sim.set(input_tokens=1000, output_tokens=100)
    limits = Limits(budget=Budget("catalog", Decimal("5.00")))
    for number, model in enumerate(("claude-haiku-5-5", "claude-opus-4-8")):
        run_id = f"run-{number}"
        warehouse.fetch(warehouse.submit(products(), run_id=run_id, model=model, limits=limits).batch_ids, run_id=run_id)
    found = read(capsys, "spend", "--by", by)
    assert [one[by] for one in found["spend"]] == (names or [f"{datetime.now(UTC):%Y-%m-%d}"])
    # haiku as above; opus 3 x (1000 x $5 + 100 x $25) / 1e6 / 2
    assert sum(Decimal(one["cost_usd"]) for one in found["spend"]) == Decimal("0.011475")
    (cap,) = found["budgets"]
    assert (cap["budget"], cap["cap_usd"], cap["spent_usd"], cap["left_usd"]) == ("catalog", "5.00", "0.011475", "4.988525")
    table = run(capsys, "spend", "--by", by)
    assert "catalog" in table and "$0.01148" in table
    assert "has landed" in run(capsys, "spend", "--since", "2999-01-01", "--output", "plain")


def test_orphans_are_what_no_ledger_knows(warehouse: Warehouse, sim: Simulator, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that was sent past the ledger, and one of a shard in doubt, which may be it."""
    warehouse.submit(products(), run_id="known")
    (foreign,) = warehouse.kit.submit(["a", "b"], model="claude-haiku-5-5", max_tokens=5)
    (line,) = read(capsys, "orphans")
    monkeypatch.setenv("AIRFLOW__BATCHKIT__PAGE_LEDGER_CONN_IDS", "warehouse")
    assert main(["orphans", "--output", "json"]) == 0
    assert [one["batch"] for one in json.loads(capsys.readouterr().out)] == [foreign]
    assert (line["batch"], line["requests"], line["status"], line["may_be"]) == (foreign, 2, "ended", [])
    warehouse.execute("UPDATE batchkit_batch SET state = 'sending', batch_id = NULL, requests = 2")
    assert [one["may_be"] for one in read(capsys, "orphans") if one["batch"] == foreign] == [
        [f"shard 0 of job {warehouse.job('known').job_id} (no batch id yet)"]
    ]


def test_cancel_says_what_it_means_asks_and_cancels(
    warehouse: Warehouse, sim: Simulator, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had ended, and what is nobody's, is refused in words."""
    sim.set(clock="manual")
    (batch_id,) = warehouse.submit(products()).batch_ids
    monkeypatch.setattr("builtins.input", lambda _: "no")
    assert main(["cancel", batch_id, "--conn-id", "warehouse"]) == 1
    assert "Nothing was changed." in capsys.readouterr().out
    assert warehouse.kit.get(batch_id).processing_status == "in_progress"
    assert "belongs to task submit of run run-1 of DAG dag: 0 of 3 requests" in run(capsys, "cancel", batch_id, "--yes")
    assert warehouse.kit.get(batch_id).processing_status in ("canceling", "ended")
    sim.end(batch_id)
    assert main(["cancel", batch_id, "--conn-id", "warehouse", "--yes"]) == 1
    assert "has ended already" in capsys.readouterr().err
    assert main(["cancel", "msgbatch_other", "--conn-id", "warehouse", "--yes"]) == 1
    assert "--anthropic-conn-id" in capsys.readouterr().err


def test_ddl_makes_a_ledger_that_a_task_uses_without_creating_anything(
    warehouse: Warehouse, database: Database, sim: Simulator, capsys: Out
) -> None:
    """Run as it is printed; a job then finds everything in its place."""
    assert main(["ddl", "--conn-id", "warehouse"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("-- The ledger")
    warehouse.execute(*(part for part in (one.strip() for one in script.split(";\n")) if part and not part.startswith("--\n")))
    made: list[str] = []
    sa.event.listen(warehouse.engine, "before_cursor_execute", lambda *args: made.append(args[2]))
    warehouse.fetch(warehouse.submit(products()).batch_ids)
    assert [one for one in made if one.startswith(("CREATE", "ALTER", "DROP")) and "batchkit_" in one and "_stage_" not in one] == []
    assert main(["ddl", "--dialect", "klingon"]) == 1
    assert "no dialect 'klingon'" in capsys.readouterr().err
    assert any("ENUM" not in one for one in statements("mysql"))


def test_prune_deletes_what_nothing_needs_and_says_what_it_keeps(warehouse: Warehouse, sim: Simulator, capsys: Out) -> None:
    """Old rows go, with their journal; the bill, the budget's books and the landing stay, and a cleared run pays nothing."""
    limits = Limits(budget=Budget("all time", Decimal(50), window="ever"))
    old = warehouse.submit(products(), run_id="old", limits=limits).batch_ids
    warehouse.fetch(old, run_id="old")
    warehouse.fetch(warehouse.submit(products(2), run_id="new").batch_ids, run_id="new")
    sim.set(clock="manual")
    warehouse.submit(products(1), run_id="unfetched")
    for run_id in ("old", "unfetched"):
        age(warehouse, run_id, 100)
    spent = warehouse.ledger.budget_status("all time")
    asked = sim.stats()["requests_accepted"]

    said = run(capsys, "prune", "--older-than", "90d", "--yes")
    assert "To prune: 1 jobs" in said and "each of the 3 rows" in said
    assert "Kept: 1 equally old jobs, since a batch has not landed" in said
    job = warehouse.job("old").job_id
    for table in ("journal", "succeeded", "failed"):
        assert warehouse.rows(f"SELECT * FROM batchkit_{table} WHERE job_id = '{job}'") == []
    assert len(warehouse.rows("SELECT DISTINCT job_id FROM batchkit_journal")) == 2
    assert warehouse.ledger.budget_status("all time") == spent
    assert read(capsys, "spend", "--by", "dag", "--since", "2020-01-01")["spend"][0]["requests"] == 5

    # a fetch of the run that is cleared sees that it has landed, and its submit refuses to pay again
    assert warehouse.fetch(old, run_id="old").counts == {"succeeded": 3}
    with pytest.raises(BatchInputError, match="pruned from the ledger"):
        warehouse.submit(products(), run_id="old")
    assert sim.stats()["requests_accepted"] == asked
    assert read(capsys, "prune", "--older-than", "90d", "--yes")["pruned_jobs"] == 0


def test_prune_keeps_what_a_later_run_would_pay_for_again(warehouse: Warehouse, sim: Simulator, capsys: Out) -> None:
    """Answers that skip_unchanged counts, the latest landed job of a task, and results that can still be fetched."""
    warehouse.fetch(warehouse.submit(products(), run_id="a").batch_ids, run_id="a")
    age(warehouse, "a", 100)
    assert read(capsys, "prune", "--older-than", "90d", "--yes")["kept"] == [{"jobs": 1, "reason": overview_reason("LATEST")}]
    warehouse.fetch(warehouse.submit(products(), run_id="b").batch_ids, run_id="b")
    age(warehouse, "a", 20)
    assert read(capsys, "prune", "--older-than", "7d", "--yes")["kept"] == [{"jobs": 1, "reason": overview_reason("FETCHABLE")}]
    age(warehouse, "a", 100)
    warehouse.execute("UPDATE batchkit_job SET skip_unchanged = (1=1) WHERE run_id = 'b'")
    found = read(capsys, "prune", "--older-than", "90d", "--yes")
    assert (found["pruned_jobs"], found["kept"]) == (0, [{"jobs": 1, "reason": overview_reason("SKIPS")}])
    report = warehouse.submit(products(), run_id="c", skip_unchanged=True)
    assert (report.asked, report.batch_ids) == (0, [])


def overview_reason(name: str) -> str:
    """The words of a reason to keep a job."""
    from airflow_provider_batchkit.ledger import prune

    return str(getattr(prune, name))


def test_without_a_ledger_a_command_says_what_to_do(
    database: Database, airflow_db: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection, one that is nowhere, one without tables, and a database that does not answer: a line each, and no secret."""
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", database.airflow_uri)
    monkeypatch.setenv("AIRFLOW_CONN_DOWN", "postgres://me:secret-word@127.0.0.1:9/x")
    for arguments, words in (
        (("jobs",), "--conn-id"),
        (("jobs", "--conn-id", "nowhere"), "nowhere"),
        (("jobs", "--conn-id", "warehouse"), "no task has submitted through it yet"),
        (("batches", "--conn-id", "down"), "airflow connections get down"),
        (("settle", "job", "0", "--conn-id", "warehouse"), "--void or --is"),
        (("orphans", "--conn-id", "warehouse,down"), "no task has submitted"),
    ):
        assert main(list(arguments)) == 1, arguments
        said = capsys.readouterr()
        assert words in said.err and "Traceback" not in said.err and "secret-word" not in said.err, said.err
        assert said.out == ""


def test_a_ledger_of_another_version_is_named(warehouse: Warehouse, capsys: Out) -> None:
    """Reading changes nothing."""
    warehouse.ledger.ensure()
    warehouse.execute("UPDATE batchkit_version SET version = 3")
    assert main(["jobs", "--conn-id", "warehouse"]) == 1
    assert "is of version 3" in capsys.readouterr().err
    assert warehouse.ledger.version() == 3


def test_the_choices_are_those_of_the_ledger() -> None:
    """The command line names them itself, since it may not load SQLAlchemy whenever `airflow` runs."""
    assert set(registry.STATES) == set(overview.STATES)
    assert registry.GROUPS == spending.GROUPS


def test_registering_the_commands_loads_nothing_heavy() -> None:
    """Airflow imports them whenever one of its own commands runs."""
    heavy = ("airflow", "anthropic", "sqlalchemy")
    code = f"import sys, airflow_provider_batchkit.commands.registry; print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@releases.needs("commands of providers")
def test_airflow_has_the_commands_too(warehouse: Warehouse, sim: Simulator) -> None:
    """`airflow batchkit jobs`, as a program of its own. Airflow may log a line before its output, as with its own commands."""
    warehouse.submit(products(), run_id="of-airflow")
    command = [sys.executable, "-m", "airflow", "batchkit", "jobs", "--conn-id", "warehouse", "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [one["run_id"] for one in json.loads(done.stdout[done.stdout.index("[\n") :])] == ["of-airflow"]
    done = subprocess.run([*command[:4], "failed", "nojob", "--conn-id", "warehouse"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "has no job nojob" in done.stderr

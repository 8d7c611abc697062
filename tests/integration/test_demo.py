"""The demo on a part of its catalog: its prompts, its estimate and its bill, its log, and what changes between two runs."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from decimal import Decimal
from pathlib import Path

import psutil
import pytest

from airflow_provider_batchkit.model import COST_QUANTUM
from airflow_provider_batchkit.simulator.outcomes import marker_in
from example_dags.demo import ANSWER_TOKENS, DAG_ID, PROMPT_TOKENS, services
from example_dags.demo.catalog import change_products, fill_catalog, write_reviews
from example_dags.demo.services import asked_jobs

ROOT = Path(__file__).resolve().parents[2]
ROWS = 300


def products(catalog: Path) -> dict[str, tuple[str, str]]:
    """Sku → name and attributes."""
    with closing(sqlite3.connect(catalog)) as connection:
        return {sku: (name, attributes) for sku, name, attributes in connection.execute("SELECT * FROM products")}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo that has run, as ``make demo`` runs it, with fewer products."""
    folder = tmp_path_factory.mktemp("demo")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW_", "ANTHROPIC_"))}
    command = [sys.executable, "-m", "example_dags.demo", "demo", "--rows", str(ROWS)]
    done = subprocess.run(
        command, cwd=folder, env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def logs(demo: Path) -> dict[str, list[dict[str, object]]]:
    """Task → the lines of its log, where Airflow's UI looks for it."""
    files = (demo / ".demo/airflow/logs").glob(f"dag_id={DAG_ID}/run_id=*/task_id=*/attempt=1.log")
    return {file.parent.name.removeprefix("task_id="): [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def test_the_estimate_of_the_demo_is_on_the_tokens_of_its_bill_and_its_bound_above_it(demo: Path) -> None:
    """$0.008 a row: input as it was counted, output as long as the answers, and a bound above, the same in log, ledger and terminal."""
    with closing(sqlite3.connect(demo / ".demo/catalog.db")) as connection:
        bill, bound = connection.execute("SELECT SUM(batch_cost_picousd), SUM(bound_picousd) FROM batchkit_batch").fetchone()
        tokens = connection.execute(
            "SELECT DISTINCT input_tokens, output_tokens, length(CAST(response AS BLOB)) FROM product_copy"
        ).fetchall()
    assert tokens == [(PROMPT_TOKENS, ANSWER_TOKENS, 4 * ANSWER_TOKENS)]
    assert bill * COST_QUANTUM == ROWS * Decimal("0.008") == Decimal("2.40")
    (estimate,) = (line["event"] for line in logs(demo)["submit"] if str(line["event"]).startswith("Estimate"))
    found = re.search(r"expected \$([\d.]+), at most \$([\d.]+) \(input ([\d,]+) tokens", str(estimate))
    assert found is not None, estimate
    assert Decimal(found[2]) == round(bound * COST_QUANTUM, 2)
    assert bill * COST_QUANTUM < Decimal(found[1]) < Decimal(found[2]) < 2 * bill * COST_QUANTUM
    assert int(found[3].replace(",", "")) == ROWS * PROMPT_TOKENS
    output = (demo / "stdout").read_text()
    assert "batch $2.40  standard $4.80  savings $2.40" in output
    assert f"at most ${found[2]}" in output


def test_the_log_of_each_task_lies_where_the_ui_reads_it(demo: Path) -> None:
    """Each task's own lines, the trigger's among them, and nothing of what only dag.test() says."""
    events = {task: [str(line["event"]) for line in lines] for task, lines in logs(demo).items()}
    assert set(events) == {"submit", "wait", "fetch"}
    assert any(event.startswith("Submitted msgbatch_") for event in events["submit"])
    assert any(event.startswith("1 of 1 batches ended") for event in events["wait"])
    assert any("batch $2.40" in event for event in events["fetch"])
    assert not [event for lines in events.values() for event in lines if "DAG TEST" in event]


def test_each_change_is_to_other_products_and_keeps_the_length_of_their_prompts(tmp_path: Path) -> None:
    """So that the next run asks exactly these, at the same price."""
    catalog = tmp_path / "shop" / "catalog.db"
    fill_catalog(catalog, 50)
    seen = products(catalog)
    sizes = {sku: len((name + attributes).encode()) for sku, (name, attributes) in seen.items()}
    assert len(set(sizes.values())) == 1
    changed = []
    for edition in (1, 2):
        change_products(catalog, 10, edition)
        now = products(catalog)
        changed.append({sku for sku in now if now[sku] != seen[sku]})
        seen = now
    assert [len(part) for part in changed] == [10, 10]
    assert not changed[0] & changed[1]
    assert {sku: len((name + attributes).encode()) for sku, (name, attributes) in seen.items()} == sizes


def test_some_reviews_have_a_marker_with_which_the_simulator_fails_them(tmp_path: Path) -> None:
    """Three of two hundred, each for another reason, so that the page has failed rows to show."""
    fill_catalog(tmp_path / "shop" / "catalog.db", 100)
    write_reviews(tmp_path / "reviews.csv", tmp_path / "shop" / "catalog.db")
    with (tmp_path / "reviews.csv").open(newline="") as file:
        reviews = list(csv.DictReader(file))
    assert len(reviews) == 200
    assert len({marker_in(review["text"]) for review in reviews if "[[sim:" in review["text"]}) == 3


def test_the_parts_end_within_five_seconds_with_all_that_they_have_started(tmp_path: Path) -> None:
    """Also one that does not end by itself, and a child that has a session of its own."""
    child = "import time; open('child', 'w').close(); time.sleep(300)"
    part = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True).pid, flush=True); time.sleep(300)"
    )
    process = subprocess.Popen([sys.executable, "-c", part], stdout=subprocess.PIPE, cwd=tmp_path, start_new_session=True)
    assert process.stdout is not None
    started = psutil.Process(int(process.stdout.readline()))
    began = time.monotonic()
    services._end([process])
    assert time.monotonic() - began < 5
    assert process.poll() is not None
    psutil.wait_procs([started], timeout=5)
    assert not started.is_running() or started.status() == psutil.STATUS_ZOMBIE
    process.stdout.close()


def test_a_run_whose_batches_ended_with_the_simulator_is_taken_away(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would wait for what is not there, and turn red. The run that had landed stays."""
    folder = tmp_path / "restarted"
    shutil.copytree(demo / ".demo", folder)
    home, catalog = folder / "airflow", folder / "catalog.db"
    assert services.set_aside(home, catalog) == 0 and "under way" not in capsys.readouterr().out
    with closing(sqlite3.connect(home / "airflow.db")) as airflow:
        assert [airflow.execute(f"SELECT COUNT(*) FROM {table}").fetchone() for table in ("trigger", "task_instance")] == [(0,), (3,)]
    with closing(sqlite3.connect(catalog)) as ledger, ledger:
        ledger.execute("UPDATE batchkit_batch SET state = 'submitted'")
    with closing(sqlite3.connect(home / "airflow.db")) as airflow, airflow:
        airflow.execute("UPDATE dag_run SET state = 'running'")
    assert services.set_aside(home, catalog) == 1
    assert "1 run was under way" in capsys.readouterr().out
    with closing(sqlite3.connect(catalog)) as ledger:
        assert [ledger.execute(f"SELECT COUNT(*) FROM {table}").fetchone() for table in ("batchkit_job", "batchkit_batch")] == [(0,), (0,)]
    with closing(sqlite3.connect(home / "airflow.db")) as airflow:
        assert [airflow.execute(f"SELECT COUNT(*) FROM {table}").fetchone() for table in ("dag_run", "task_instance")] == [(0,), (0,)]


def test_jobs_that_have_asked_are_counted_in_the_ledger(demo: Path, tmp_path: Path) -> None:
    """The demo's one; none before there is a ledger."""
    assert asked_jobs(demo / ".demo/catalog.db") == 1
    fill_catalog(tmp_path / "shop" / "catalog.db", 1)
    assert asked_jobs(tmp_path / "shop" / "catalog.db") == 0

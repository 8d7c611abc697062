"""Sets everything up for one randomised run, and takes it down again."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from tests.connections import anthropic_connection
from tests.crash.chaos.books import Books
from tests.crash.chaos.dag import AIRFLOW_SETTINGS, DAG_FILE, LOCAL_SETTINGS, fill_products
from tests.crash.chaos.report import Outcome
from tests.crash.chaos.storm import Storm, lots_for
from tests.crash.chaos.weather import CLOCK, LINE_SECONDS, POST_SECONDS
from tests.databases import Database, postgres_database, running_postgres, sqlite_database
from tests.e2e.harness import AirflowStandalone

ROOT = Path(__file__).resolve().parents[3]


def run_chaos(*, seed: int, kills: int, database: str = "sqlite", metadata: str = "postgres", faults: bool = True) -> Outcome:
    """Start everything, kill ``kills`` processes, compare the books.

    Airflow's home stays where something was wrong; a note in ``violations`` says where.

    :param seed: decides the order of kills, pauses, faults and clears
    :param database: ``sqlite`` or ``postgres``: where the source, the results and the ledger are
    :param metadata: the same for Airflow's own database; its SQLite refuses reports under load
    :param faults: without, the simulator answers every call and the workspace is ours alone
    """
    begun = time.monotonic()
    outcome = Outcome(seed, database)
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="batchkit-chaos-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for name in ("dags", "tmp", "settings"):
            (folder / name).mkdir()
        (folder / "settings" / "airflow_local_settings.py").write_text(LOCAL_SETTINGS)
        (folder / "dags" / "chaos.py").write_text(DAG_FILE)
        server = stack.enter_context(running_postgres()) if "postgres" in (database, metadata) else ""

        def fresh(kind: str, name: str) -> Database:
            return stack.enter_context(postgres_database(server)) if kind == "postgres" else sqlite_database(folder / name)

        warehouse, airflows_own = fresh(database, "warehouse.db"), fresh(metadata, "airflow.db")
        fill_products(warehouse.engine(), lots_for(kills))
        settings = SimulatorSettings(clock=CLOCK, seed=seed, input_tokens=2_000, output_tokens=50)
        sim = stack.enter_context(SimulatorProcess(settings))
        sim.faults.add("late", seconds=POST_SECONDS, times=None)
        sim.faults.add("trickle", seconds=LINE_SECONDS, times=None)
        env = {
            **{f"AIRFLOW__{name}": str(value) for name, value in AIRFLOW_SETTINGS.items()},
            # this checkout's package, wherever another one is installed
            "PYTHONPATH": os.pathsep.join([str(folder / "settings"), str(ROOT)]),
            "TMPDIR": str(folder / "tmp"),  # a killed task leaves its temporary files behind
            "AIRFLOW_CONN_WAREHOUSE": warehouse.airflow_uri,
            "AIRFLOW_CONN_ANTHROPIC_DEFAULT": anthropic_connection(sim.base_url),
        }
        airflow = stack.enter_context(AirflowStandalone(folder / "dags", airflows_own, env, keep_home=True))
        storm = Storm(airflow, sim, airflows_own.engine(), outcome, faults=faults)
        storm.rage(kills)
        Books(airflow, sim, warehouse.engine(), outcome, storm.run_ids).compare()
        if outcome.violations:
            if database == "sqlite":
                shutil.copy(folder / "warehouse.db", airflow.home)
            outcome.violations.append(f"Airflow's logs, and a warehouse on SQLite, are in {airflow.home}")
        else:
            stack.callback(shutil.rmtree, airflow.home, ignore_errors=True)
    outcome.seconds = time.monotonic() - begun
    if not outcome.violations:
        shutil.rmtree(airflow.home, ignore_errors=True)  # what was written while it ended
    return outcome

"""Mapped fetches on many machines: processes that share a database and the API, and no folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import sqlalchemy as sa

from airflow_provider_batchkit.simulator import SimulatorProcess, answer_for
from tests.connections import anthropic_connection
from tests.databases import Database
from tests.warehouse import Warehouse, kit_for

WORKERS = 4
ROWS = 3_000

#: one mapped task: says that it is ready, waits for the word, fetches its batch
TASK = """
import json, sys
from airflow_provider_batchkit.operators.batch import FetchBatchOperator
index, batch_id = int(sys.argv[1]), sys.argv[2]
fetch = FetchBatchOperator(task_id="fetch", batch_id=batch_id, table="answers", sql_conn_id="warehouse")
ti = type("TI", (), {"dag_id": "dag", "run_id": "run-1", "task_id": "fetch", "map_index": index, "xcom_push": lambda *_, **__: None})
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(fetch.execute({"ti": ti()})["rows"]))
"""


def test_mapped_fetches_in_processes_that_share_no_folder_land_at_once(database: Database, tmp_path: Path) -> None:
    """Four processes, each with a working and a temporary folder of its own, merge a batch each into one new table."""
    with SimulatorProcess() as sim:
        warehouse = Warehouse(database.engine(), kit_for(sim.base_url))
        source = ({"id": i, "name": f"product {i}"} for i in range(WORKERS * ROWS))
        ids = warehouse.submit(source, max_requests=ROWS).batch_ids
        assert len(ids) == WORKERS
        workers = []
        for index, batch_id in enumerate(ids):
            folder = tmp_path / f"worker-{index}"
            temporary = folder / "tmp"
            temporary.mkdir(parents=True)
            environment = {
                **os.environ,
                "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
                "AIRFLOW_HOME": str(folder),
                "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{folder}/airflow.db",
                "AIRFLOW_CONN_WAREHOUSE": database.airflow_uri,
                "AIRFLOW_CONN_ANTHROPIC_DEFAULT": anthropic_connection(sim.base_url),
                "TMPDIR": str(temporary),
                "SQLITE_TMPDIR": str(temporary),
            }
            command = [sys.executable, "-c", TASK, str(index), batch_id]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            workers.append(subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes))  # type: ignore[call-overload]
        for worker in workers:
            while (line := worker.stdout.readline()) != "ready\n":
                assert line, worker.stderr.read()[-3000:]
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        for worker in workers:
            output, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors[-3000:]
            assert json.loads(output.splitlines()[-1]) == ROWS
        rows = warehouse.rows("SELECT id, response FROM answers ORDER BY id")
        assert [(r["id"], r["response"]) for r in rows] == [(i, answer_for(f"About product {i}")) for i in range(WORKERS * ROWS)]
        with database.engine().connect() as connection:
            states = connection.execute(sa.text("SELECT state, COUNT(*) FROM batchkit_batch GROUP BY state")).fetchall()
        assert [tuple(state) for state in states] == [("landed", WORKERS)]

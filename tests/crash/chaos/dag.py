"""What Airflow runs: the DAG, its rows, the questions asked about them, and the settings of Airflow and of the settling.

The tasks of one run ask about the same rows in batches of one size, so no batch can be told from its siblings by its size.
"""

from __future__ import annotations

import sqlalchemy as sa

DAG_ID = "chaos"
MODEL = "claude-opus-4-8"
ROWS_PER_RUN = 20
ROWS_PER_BATCH = 10
RUNS_AT_ONCE = 4

#: result table → the words before a row's name in its prompt. The first two have submit, wait and fetch; the last one is a single task
TABLES = {"described": "Describe", "translated": "Translate", "rated": "Rate"}
CHAINS = ("described", "translated")
RUN_TABLE = "rated"
#: the tasks that send
SENDERS = frozenset({*(f"submit_{table}" for table in CHAINS), f"run_{RUN_TABLE}"})

#: A doubt is decided in tens of seconds. The engine's bounds follow from SETTLE_SECONDS: a POST takes half of it at most, acceptance comes
#: a sixth of it later at the latest, and the rest is how soon a batch shows in the list. Whatever the weather does has to stay below them.
SETTLE_SECONDS = 6
#: between the end of an attempt and its retry
RETRY_SECONDS = 1
#: how long a batch may be missing from the list
ABSENCE_SECONDS = 4


def question(table: str, name: str) -> str:
    """The prompt that a table's task asks about a row."""
    return f"{TABLES[table]} {name}"


DAG_FILE = f'''
from datetime import timedelta

from airflow.sdk import DAG

from airflow_provider_batchkit.operators.batch import FetchBatchOperator, RunBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor


def asking(words):
    return dict(
        sql="SELECT sku, name FROM products WHERE lot = {{{{ dag_run.conf['lot'] }}}}",
        key="sku",
        prompt=words + " {{{{ row.name }}}}",
        model="{MODEL}",
        max_tokens=100,
        max_requests_per_batch={ROWS_PER_BATCH},
        settle_seconds={SETTLE_SECONDS},
        sql_conn_id="warehouse",
        poke_interval=1,
    )


with DAG(
    "{DAG_ID}",
    schedule=None,
    max_active_runs={RUNS_AT_ONCE},
    default_args={{"retries": 50, "retry_delay": timedelta(seconds={RETRY_SECONDS})}},
):
    for table, words in {[(table, TABLES[table]) for table in CHAINS]!r}:
        submit = SubmitBatchOperator(task_id=f"submit_{{table}}", **asking(words))
        wait = BatchSensor(task_id=f"wait_{{table}}", batch_id=submit.output, poke_interval=1, timeout=3600)
        fetch = FetchBatchOperator(task_id=f"fetch_{{table}}", batch_id=submit.output, table=table, sql_conn_id="warehouse")
        submit >> wait >> fetch
    RunBatchOperator(task_id="run_{RUN_TABLE}", table="{RUN_TABLE}", timeout=3600, **asking("{TABLES[RUN_TABLE]}"))
'''

#: Every module that a task may need is imported once, in the scheduler: a forked task then begins its work in a fraction of a second.
LOCAL_SETTINGS = """
import sys

if "scheduler" in sys.argv:
    import contextlib
    import importlib
    import pkgutil

    import airflow.providers.anthropic.hooks.anthropic
    import airflow.providers.postgres.hooks.postgres
    import airflow.providers.sqlite.hooks.sqlite
    import airflow_provider_batchkit

    for found in pkgutil.walk_packages(airflow_provider_batchkit.__path__, "airflow_provider_batchkit."):
        if not {"simulator", "testing", "commands", "ui", "__main__"} & set(found.name.split(".")):
            with contextlib.suppress(ImportError):
                importlib.import_module(found.name)
"""

AIRFLOW_SETTINGS = {
    "CORE__PARALLELISM": 6,
    # a task whose supervisor is dead is only known by its silence
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": 2,
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": 10,
    "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": 2,
    "SCHEDULER__TASK_QUEUED_TIMEOUT": 30,
    "SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": 5,
    "WORKERS__MIN_HEARTBEAT_INTERVAL": 1,
    # so is a triggerer
    "TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": 6,
    # the one DAG never changes
    "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": 600,
    "BATCHKIT__ABSENCE_SECONDS": ABSENCE_SECONDS,
}


def fill_products(engine: sa.Engine, lots: int) -> None:
    """The rows that runs ask about, one lot for each run."""
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE products (sku VARCHAR(20) PRIMARY KEY, name TEXT, lot INTEGER)")
        rows = [{"s": f"S{lot}-{i}", "n": f"thing {i} of lot {lot}", "l": lot} for lot in range(lots) for i in range(ROWS_PER_RUN)]
        connection.execute(sa.text("INSERT INTO products VALUES (:s, :n, :l)"), rows)

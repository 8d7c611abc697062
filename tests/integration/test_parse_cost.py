"""What a DAG file that uses this package loads when it is parsed, which Airflow does again and again, in a process of its own.

Each test compares the modules of two fresh interpreters: one runs a DAG file that uses Airflow alone, the other one that uses this package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "airflow_provider_batchkit"

#: Modules outside this package that a parse may load beyond those of an empty DAG file: these names, and what lies below them. The
#: standard library may be used as well. Whoever adds a name measures what it costs: the whole must stay below 0.1 s of CPU.
ALLOWED = (
    "airflow.sdk",  # the parts of the task SDK that the base classes lie in
    "airflow.providers.common.compat",  # where they are imported from, on every supported Airflow
    "msgspec",  # it checks parameters; Airflow's task SDK loads it as well
)
#: Parts of this package that are loaded only in a running task: they need the SDK, SQLAlchemy or Jinja, or are merely large.
FORBIDDEN = ("hooks.batchkit", "jobs.submit", "jobs.fetch", "kit", "landing", "ledger", "request.template", "triggers", "ui")

#: A DAG file of Airflow's own parts: what making a DAG, an asset or a group of tasks loads is none of this package's.
EMPTY = """
from airflow.sdk import DAG, dag, task, Asset, BaseOperator, BaseSensorOperator, TaskGroup, ObjectStoragePath
import pendulum

DAG("daily", schedule="@daily")
with DAG("empty", schedule=[Asset("t")], start_date=pendulum.datetime(2026, 1, 1, tz="UTC")):
    first, second = BaseOperator(task_id="first"), BaseSensorOperator(task_id="second")
    first >> second
    BaseOperator(task_id="third", outlets=[Asset("t")])
    BaseOperator.partial(task_id="mapped").expand(doc_md=["a", "b"])
    with TaskGroup("group"):
        task(lambda value: None, task_id="fourth")(first.output)
"""

NAMES = """
from airflow_provider_batchkit import (
    BatchItem, BatchKit, BatchSnapshot, Budget, CostTally, PriceBook, RequestStatus, Retrieval, Usage
)
"""

FACES = """
from airflow_provider_batchkit import Budget, CostTally, RequestStatus
from airflow_provider_batchkit.decorators.claude_batch import claude_batch_task
from airflow_provider_batchkit.operators.batch import FetchBatchOperator, RunBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.operators.stages import batch_stage
from airflow_provider_batchkit.sensors.batch import BatchSensor
"""

TASKS = """
schema = {
    "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False
}
with DAG("d", schedule=None):
    source = {"sql": "SELECT 1", "key": "sku", "prompt": "{{ row.name }}", "sql_conn_id": "w", "max_tokens": 9}
    submit = SubmitBatchOperator(
        task_id="submit", **source, output_schema=schema, budget=Budget("b", usd="10"), max_cost_usd="1.5", cancel_on_kill=True
    )
    wait = BatchSensor(task_id="wait", batch_id=submit.output, cancel_on_kill=True)
    fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="t", sql_conn_id="w", outlets=[Asset("t")])
    wait >> fetch
    RunBatchOperator(
        task_id="run", input_path="x.csv", input_options={"delimiter": ";"}, key="sku", prompt="x", system="s", cache_system="1h",
        prime_cache=True, table="t", sql_conn_id="w",
    )
    SubmitBatchOperator.partial(task_id="mapped", key="sku", prompt="p", sql_conn_id="w").expand(sql=["SELECT 1", "SELECT 2"])
    batch_stage("stage", table="t", **source)

    @claude_batch_task(key="sku", model="m", sql_conn_id="w")
    def rows():
        yield {"sku": 1, "prompt": "p"}

    rows()
"""


def loaded(*code: str) -> set[str]:
    """The modules of a fresh interpreter that has run ``code``."""
    program = "\n".join([*code, "import json, sys", "print(json.dumps(sorted(sys.modules)))"])
    environment = {**os.environ, "AIRFLOW_VAR_REVIEWS_CSV": "/nowhere.csv"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def of_airflow(airflow_db: Path) -> set[str]:
    """What a DAG file loads that uses Airflow alone."""
    return loaded(EMPTY)


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a module is one of ``prefixes`` or lies below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def examples() -> str:
    """A program that runs every example as a DAG file."""
    return f"import runpy\nfor path in {[str(path) for path in sorted((ROOT / 'example_dags').glob('*.py'))]}: runpy.run_path(path)"


@pytest.mark.parametrize("code", [(NAMES,), (FACES,), (FACES, TASKS), (examples(),)], ids=["names", "faces", "tasks", "examples"])
def test_a_parse_loads_only_what_is_named_here(of_airflow: set[str], code: tuple[str, ...]) -> None:
    """The API's client, SQLAlchemy, price data and drivers wait until a task runs, also when the operators are made."""
    more = loaded(EMPTY, *code) - of_airflow
    ours = {name for name in more if below(name, (PACKAGE,))}
    assert ours, "nothing of this package was loaded: this test looks in the wrong place"
    strangers = sorted(name for name in more - ours if not below(name, ALLOWED) and name.partition(".")[0] not in sys.stdlib_module_names)
    assert strangers == []
    if code != (NAMES,):  # a DAG file that names BatchKit wants it
        assert sorted(name for name in ours if below(name, tuple(f"{PACKAGE}.{part}" for part in FORBIDDEN))) == []


def test_the_default_connection_is_the_official_hooks(airflow_db: Path) -> None:
    """The operators name it themselves, since the hook's module is not loaded with them."""
    from airflow.providers.anthropic.hooks.anthropic import AnthropicHook

    from airflow_provider_batchkit.hooks.settings import DEFAULT_CONN_ID

    assert AnthropicHook.default_conn_name == DEFAULT_CONN_ID

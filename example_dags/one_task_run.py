"""One task in place of three: it submits, waits without a worker slot, and lands; rows that failed are asked again, within a budget.

Needs two connections, ``anthropic_default`` and ``warehouse``, a SQL database with a table ``products (sku, name, attributes)``.
The budget is shared by all tasks that name it; the task fails before it sends anything that could exceed it. ``make airflow`` has all of
it ready, with the simulator for the API.
"""

from __future__ import annotations

from decimal import Decimal

import pendulum
from airflow.sdk import DAG

from airflow_provider_batchkit import Budget
from airflow_provider_batchkit.operators.batch import RunBatchOperator

with DAG(
    "one_task_run",
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    default_args={"retries": 3},
    doc_md=__doc__,
    tags=["batchkit", "example"],
):
    RunBatchOperator(
        task_id="run",
        sql="SELECT sku, name, attributes FROM products",
        key="sku",
        prompt="Give three search keywords for {{ row.name }}: {{ row.attributes }}",
        model="claude-haiku-5-5",
        max_tokens=100,
        table="product_keywords",
        max_rounds=3,
        budget=Budget("catalog", usd=Decimal(25), window="month"),
        poke_interval=5,
        sql_conn_id="warehouse",
    )

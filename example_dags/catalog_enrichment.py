"""Every month, descriptions in five languages for each product of a catalog that is new or has changed, at half price.

Needs two connections: ``anthropic_default`` and ``warehouse``, a SQL database with a table ``products (sku, name, attributes)``.
The asset ``product_copy`` tells other DAGs what a run cost, see ``catalog_cost.py``. ``make demo`` runs this file against the simulator.
"""

from __future__ import annotations

import pendulum
from airflow.sdk import DAG, Asset

from airflow_provider_batchkit.operators.batch import FetchBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor

with DAG(
    "catalog_enrichment",
    schedule="@monthly",
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    max_active_runs=1,  # a run counts as unchanged what earlier runs have landed
    default_args={"retries": 3},
    doc_md=__doc__,
    tags=["batchkit", "example"],
):
    submit = SubmitBatchOperator(
        task_id="submit",
        sql="SELECT sku, name, attributes FROM products",
        key="sku",
        prompt="Describe {{ row.name }} in English, German, French, Spanish and Polish, two sentences each: {{ row.attributes }}",
        model="claude-opus-4-8",
        max_tokens=640,
        skip_unchanged=True,  # the next month pays for products that are new or have changed
        sql_conn_id="warehouse",
    )
    wait = BatchSensor(task_id="wait", batch_id=submit.output, poke_interval=5)
    fetch = FetchBatchOperator(
        task_id="fetch", batch_id=submit.output, table="product_copy", sql_conn_id="warehouse", outlets=[Asset("product_copy")]
    )

    submit >> wait >> fetch

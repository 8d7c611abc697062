"""Three databases: rows out of the shop's own, answers into a DuckDB file and Parquet files, the ledger in PostgreSQL.

The shop's database is only read. The same answers go into a table and into a lake, each of them once, whoever is killed or cleared; a
further run asks only for products that are new or have changed.

Needs the connections ``anthropic_default``, ``shop`` (any SQL database, with a table ``products (sku, name, attributes)``), ``analytics``
(a DuckDB file) and ``ledger`` (PostgreSQL), the variable ``lake`` (a folder or a URL such as ``s3://aws_default@shop-lake``), and
``airflow-provider-batchkit[duckdb,parquet,postgres]``.
"""

from __future__ import annotations

import pendulum
from airflow.sdk import DAG

from airflow_provider_batchkit.operators.stages import batch_stage

with DAG(
    "into_duckdb",
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    max_active_runs=1,  # a run counts as unchanged what earlier runs have landed
    default_args={"retries": 3},
    doc_md=__doc__,
    tags=["batchkit", "example"],
):
    batch_stage(
        "describe",
        sql="SELECT sku, name, attributes FROM products",
        source_conn_id="shop",
        key="sku",
        prompt="Write a two-sentence description of {{ row.name }}: {{ row.attributes }}",
        model="claude-haiku-5-5",
        max_tokens=200,
        skip_unchanged=True,
        sql_conn_id="analytics",
        table="product_copy",
        output_path="{{ var.value.lake }}/product_copy/*.parquet",
        ledger_conn_id="ledger",
    )

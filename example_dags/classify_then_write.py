"""Two stages: say for each product who buys it, then write a sales pitch only for those that offices buy.

Needs two connections, ``anthropic_default`` and ``warehouse``, a SQL database with a table ``products (sku, name, attributes)``.
The second stage reads ``product_audience``, the table that the first one writes. ``make airflow`` has all of it ready, with the
simulator for the API.
"""

from __future__ import annotations

import pendulum
from airflow.sdk import DAG

from airflow_provider_batchkit.operators.stages import batch_stage

AUDIENCE = {
    "type": "object",
    "properties": {"audience": {"type": "string", "enum": ["home", "office", "outdoors"]}},
    "required": ["audience"],
}

with DAG(
    "classify_then_write",
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    default_args={"retries": 3, "sql_conn_id": "warehouse", "model": "claude-haiku-5-5", "poke_interval": 5},
    doc_md=__doc__,
    tags=["batchkit", "example"],
):
    classify = batch_stage(
        "classify",
        sql="SELECT sku, name, attributes FROM products",
        key="sku",
        prompt="Who buys {{ row.name }} ({{ row.attributes }})?",
        output_schema=AUDIENCE,  # its property becomes a column of the table
        max_tokens=100,
        table="product_audience",
    )
    write = batch_stage(
        "write",
        sql="SELECT p.sku, p.name FROM products p JOIN product_audience a ON a.sku = p.sku WHERE a.audience = 'office'",
        key="sku",
        prompt="Write one sentence that sells {{ row.name }} to an office manager.",
        max_tokens=100,
        table="office_pitch",
    )

    classify >> write

"""Answers into BigQuery: result files in Cloud Storage, which the Google provider's own operator loads.

No database holds results: the products come from Parquet files, the answers go into Parquet files, one a batch, and the ledger lies in a
small PostgreSQL. The day's partition is loaded as a whole, so a retry of the load doubles nothing.

Needs the connections ``anthropic_default``, ``ledger`` (PostgreSQL) and ``google_cloud_default``, a bucket ``shop-lake`` with the products
(``sku``, ``name``, ``attributes``), a dataset ``shop``, and ``apache-airflow-providers-google``; without it there is no such DAG.
"""

from __future__ import annotations

import pendulum
from airflow.sdk import DAG

from airflow_provider_batchkit.operators.batch import RunBatchOperator

try:
    from airflow.providers.google.cloud.transfers.gcs_to_bigquery import GCSToBigQueryOperator
except ImportError:
    GCSToBigQueryOperator = None

if GCSToBigQueryOperator is not None:
    with DAG(
        "into_bigquery",
        schedule="@daily",
        catchup=False,
        start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
        default_args={"retries": 3},
        doc_md=__doc__,
        tags=["batchkit", "example"],
    ):
        describe = RunBatchOperator(
            task_id="describe",
            input_path="gs://shop-lake/products/*.parquet",
            input_conn_id="google_cloud_default",
            key="sku",
            prompt="Write a two-sentence description of {{ row.name }}: {{ row.attributes }}",
            model="claude-haiku-5-5",
            max_tokens=200,
            output_path="gs://shop-lake/product_copy/{{ ds }}/*.parquet",
            output_conn_id="google_cloud_default",
            ledger_conn_id="ledger",
        )
        load = GCSToBigQueryOperator(
            task_id="load",
            bucket="shop-lake",
            source_objects="product_copy/{{ ds }}/*.parquet",
            source_format="PARQUET",
            destination_project_dataset_table="shop.product_copy${{ ds_nodash }}",
            time_partitioning={"type": "DAY"},
            write_disposition="WRITE_TRUNCATE",
        )

        describe >> load

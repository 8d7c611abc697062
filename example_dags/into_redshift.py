"""Answers into Redshift: result files in S3, which the Amazon provider's own operator copies.

No database holds results: the reviews come from a CSV file, the answers go into JSON lines, one file a batch, and the ledger lies in a
small PostgreSQL. The copy is by key, so a retry of it doubles nothing.

Needs the connections ``anthropic_default``, ``ledger`` (PostgreSQL), ``aws_default`` and ``redshift_default``, a bucket ``shop-lake`` with
the reviews (``review_id``, ``product``, ``text``), a table ``review_sentiment`` whose columns have the names of those in the files, and
``apache-airflow-providers-amazon``; without it there is no such DAG.
"""

from __future__ import annotations

import pendulum
from airflow.sdk import DAG

from airflow_provider_batchkit.operators.stages import batch_stage

try:
    from airflow.providers.amazon.aws.transfers.s3_to_redshift import S3ToRedshiftOperator
except ImportError:
    S3ToRedshiftOperator = None

if S3ToRedshiftOperator is not None:
    with DAG(
        "into_redshift",
        schedule="@daily",
        catchup=False,
        start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
        default_args={"retries": 3},
        doc_md=__doc__,
        tags=["batchkit", "example"],
    ):
        judge = batch_stage(
            "judge",
            input_path="s3://shop-lake/reviews/{{ ds }}.csv",
            input_conn_id="aws_default",
            key="review_id",
            prompt="Is this review of {{ row.product }} positive, negative or mixed? Answer with one word.\n\n{{ row.text }}",
            model="claude-haiku-5-5",
            max_tokens=100,
            output_path="s3://shop-lake/review_sentiment/{{ ds }}/*.jsonl",
            output_conn_id="aws_default",
            ledger_conn_id="ledger",
        )
        load = S3ToRedshiftOperator(
            task_id="load",
            s3_bucket="shop-lake",
            s3_key="review_sentiment/{{ ds }}/",
            schema="public",
            table="review_sentiment",
            copy_options=["FORMAT AS JSON 'auto'", "TIMEFORMAT 'auto'"],
            method="UPSERT",
            upsert_keys=["review_id"],
        )

        judge >> load

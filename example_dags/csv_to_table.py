"""A CSV file of reviews in object storage, one word of sentiment for each in a table.

Needs two connections, ``anthropic_default`` and ``warehouse`` (a SQL database), and a variable ``reviews_csv`` that says where the file
is, such as ``s3://shop/reviews.csv.gz`` or a local path. Its columns are ``review_id``, ``product``, ``stars`` and ``text``. For a storage
that asks for a login, give ``input_conn_id``. ``make airflow`` has all of it ready, with the simulator for the API.
"""

from __future__ import annotations

import pendulum
from airflow.sdk import DAG

from airflow_provider_batchkit.operators.batch import FetchBatchOperator, SubmitBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor

with DAG(
    "csv_to_table",
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    default_args={"retries": 3},
    doc_md=__doc__,
    tags=["batchkit", "example"],
):
    submit = SubmitBatchOperator(
        task_id="submit",
        input_path="{{ var.value.reviews_csv }}",
        key="review_id",
        prompt="Is this review of {{ row.product }} positive, negative or mixed? Answer with one word.\n\n{{ row.text }}",
        model="claude-haiku-5-5",
        max_tokens=100,
        sql_conn_id="warehouse",
    )
    wait = BatchSensor(task_id="wait", batch_id=submit.output, poke_interval=5)
    fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="review_sentiment", sql_conn_id="warehouse")

    submit >> wait >> fetch

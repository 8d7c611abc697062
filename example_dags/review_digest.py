"""TaskFlow: a Python function says what to ask. It groups the reviews of each product; Claude sums them up in one sentence.

Needs two connections, ``anthropic_default`` and ``warehouse`` (a SQL database), and a variable ``reviews_csv`` that says where the file
of ``csv_to_table.py`` is; the reviews of a product follow each other in it. The rows that the function yields are read one by one and
never pass through XCom. ``make airflow`` has all of it ready, with the simulator for the API.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pendulum
from airflow.sdk import DAG, ObjectStoragePath, task

from airflow_provider_batchkit.operators.batch import FetchBatchOperator
from airflow_provider_batchkit.sensors.batch import BatchSensor

with DAG(
    "review_digest",
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    default_args={"retries": 3},
    doc_md=__doc__,
    tags=["batchkit", "example"],
):

    @task.claude_batch(
        key="product",
        prompt="Sum up in one sentence what buyers say of {{ row.product }}:{% for text in row.texts %}\n- {{ text }}{% endfor %}",
        model="claude-haiku-5-5",
        max_tokens=100,
        sql_conn_id="warehouse",
    )
    def ask(path: str) -> Iterator[dict[str, Any]]:
        """One row for each product."""
        with ObjectStoragePath(path).open(newline="") as file:
            lines = iter(file.readline, "")  # the files of Airflow 3.1.0's storage paths cannot be iterated over
            for product, reviews in groupby(csv.DictReader(lines), key=lambda review: review["product"]):
                yield {"product": product, "texts": [review["text"] for review in reviews]}

    batches = ask("{{ var.value.reviews_csv }}")
    wait = BatchSensor(task_id="wait", batch_id=batches, poke_interval=5)
    fetch = FetchBatchOperator(task_id="fetch", batch_id=batches, table="review_digest", sql_conn_id="warehouse")

    wait >> fetch

"""The examples that load result files with another provider's operator, parsed as they are.

These providers are not installed with the tests, and nothing of them is run. In their place stands an operator that takes parameters of
the real one, by name: of ``apache-airflow-providers-google`` 22.8.0 and ``apache-airflow-providers-amazon`` 9.39.0, read from their
sources. A parameter that they do not have fails the parse.
"""

from __future__ import annotations

import runpy
import sys
from types import ModuleType
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import BaseOperator

from tests.integration.test_examples import EXAMPLES, LOADED

GOOGLE = "airflow.providers.google.cloud.transfers.gcs_to_bigquery"
AMAZON = "airflow.providers.amazon.aws.transfers.s3_to_redshift"


class GCSToBigQueryOperator(BaseOperator):
    """The real one's parameters, but for those that only say how to look at a job."""

    def __init__(
        self,
        *,
        bucket: str,
        source_objects: str | list[str],
        destination_project_dataset_table: str,
        schema_fields: Any = None,
        source_format: str = "CSV",
        create_disposition: str = "CREATE_IF_NEEDED",
        write_disposition: str = "WRITE_EMPTY",
        gcp_conn_id: str = "google_cloud_default",
        time_partitioning: Any = None,
        cluster_fields: Any = None,
        autodetect: bool | None = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.covers = f"gs://{bucket}/{source_objects}"


class S3ToRedshiftOperator(BaseOperator):
    """The real one's parameters."""

    def __init__(
        self,
        *,
        table: str,
        s3_bucket: str,
        s3_key: str,
        schema: str | None = None,
        redshift_conn_id: str = "redshift_default",
        aws_conn_id: str | None = None,
        verify: bool | str | None = None,
        column_list: list[str] | None = None,
        copy_options: list[str] | None = None,
        autocommit: bool = False,
        method: str = "APPEND",
        upsert_keys: list[str] | None = None,
        redshift_data_api_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.covers = f"s3://{s3_bucket}/{s3_key}*.jsonl"


OPERATORS = {"into_bigquery": (GOOGLE, GCSToBigQueryOperator), "into_redshift": (AMAZON, S3ToRedshiftOperator)}


def dags_of(name: str) -> list[Any]:
    """The DAGs of an example file."""
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    tasks = [task for task in found.values() if isinstance(task, BaseOperator)]
    return list({id(task.dag): task.dag for task in tasks}.values())


@pytest.mark.parametrize("name", sorted(LOADED))
def test_what_the_load_reads_is_what_the_task_before_it_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it comes behind it."""
    module, operator = OPERATORS[name]
    stub = ModuleType(module)
    setattr(stub, operator.__name__, operator)
    parts = module.split(".")
    for end in range(3, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    monkeypatch.setitem(sys.modules, module, stub)
    (dag,) = dags_of(name)
    assert dag.dag_id == name
    load = dag.get_task("load")
    (writer,) = [dag.get_task(task_id) for task_id in load.upstream_task_ids]
    assert writer.output_path == load.covers
    assert writer.table is None and writer.sql_conn_id is None and writer.ledger_conn_id == "ledger"


@pytest.mark.parametrize("name", sorted(LOADED))
def test_without_the_provider_there_is_no_such_dag(name: str) -> None:
    """A folder with all examples has no import error."""
    assert dags_of(name) == []
    assert (EXAMPLES / f"{name}.py").read_text().count("without it there is no such DAG") == 1

"""OpenLineage: the tables that a task reads and writes, and what the run cost.

This module does nothing without the OpenLineage provider, and never fails a task. OpenLineage calls these methods in a copy of the task's
process, so they see what the same leg of the task has stored on the operator.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseHook

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage

log = logging.getLogger(__name__)

#: name of our run facet, which holds what the task has published, with money as text
FACET = "batchkit"


class BatchLineage:
    """The OpenLineage methods of an operator with ``sql``, which it reads, or ``table``, which it writes, or both."""

    #: the summary that the run has published so far, see :mod:`~airflow_provider_batchkit.operators.publish`
    lineage_summary: dict[str, Any] | None = None

    def get_openlineage_facets_on_start(self) -> OperatorLineage[Any, Any] | None:
        """The tables, as far as they are known before the task has run."""
        return describe(self)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any] | None:
        """The tables, and the tokens and costs of the run."""
        return describe(self)

    def get_openlineage_facets_on_failure(self, task_instance: Any) -> OperatorLineage[Any, Any] | None:
        """The same as on completion, since a fetch may fail after its answers have landed."""
        return describe(self)


def describe(task: Any) -> OperatorLineage[Any, Any] | None:
    """The lineage of a task; None when the OpenLineage provider is not installed. Each part that fails is left out alone."""
    try:
        from airflow.providers.openlineage.extractors import OperatorLineage
    except ImportError:
        return None
    lineage: OperatorLineage[Any, Any] = OperatorLineage()
    for part in (_add_statement, _add_source_tables, _add_result_table, _add_result_files, _add_run_facet):
        try:
            part(task, lineage)
        except Exception:  # a hook may query the database for names, and an error of that database may be why the task failed
            log.warning("This task's lineage lacks a part (%s)", part.__name__, exc_info=True)
    return lineage


def _add_statement(task: Any, lineage: OperatorLineage[Any, Any]) -> None:
    from openlineage.client.facet_v2 import sql_job

    if isinstance(getattr(task, "sql", None), str):
        lineage.job_facets["sql"] = sql_job.SQLJobFacet(query=task.sql)


def _add_source_tables(task: Any, lineage: OperatorLineage[Any, Any]) -> None:
    """Add the tables that OpenLineage's parser finds in the query, by name only: columns would need a query at every start of a task."""
    from airflow.providers.openlineage.sqlparser import SQLParser

    if not isinstance(getattr(task, "sql", None), str):
        return
    hook, connection, info = _database(task.source_conn_id or task.sql_conn_id)
    if info is not None:
        parser = SQLParser(dialect=hook.get_openlineage_database_dialect(connection), default_schema=hook.get_openlineage_default_schema())
        found = parser.generate_openlineage_metadata_from_sql(sql=task.sql, hook=hook, database_info=info, use_connection=False)
        lineage.inputs += found.inputs
        lineage.run_facets |= found.run_facets


def _lands(task: Any) -> bool:
    """Whether the task writes results. A submit has their table and place too, to check them before it sends, and writes nothing there."""
    return hasattr(task, "write_disposition")


def _add_result_table(task: Any, lineage: OperatorLineage[Any, Any]) -> None:
    from airflow.providers.openlineage.sqlparser import SQLParser
    from openlineage.client.event_v2 import OutputDataset
    from openlineage.client.facet_v2 import output_statistics_output_dataset

    if not _lands(task) or not isinstance(getattr(task, "table", None), str):
        return
    hook, _, info = _database(task.sql_conn_id)
    if info is not None:
        schema, _, table = task.table.rpartition(".")
        name = ".".join(filter(None, (info.database, schema or hook.get_openlineage_default_schema(), table)))
        facets: dict[str, Any] = {}
        if task.lineage_summary is not None:
            rows = task.lineage_summary["rows"]
            facets["outputStatistics"] = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(rowCount=rows)
        name = name.upper() if info.is_uppercase_names else name
        lineage.outputs.append(OutputDataset(namespace=SQLParser.create_namespace(info), name=name, outputFacets=facets))


def _add_result_files(task: Any, lineage: OperatorLineage[Any, Any]) -> None:
    from openlineage.client.event_v2 import OutputDataset

    if not _lands(task) or getattr(task, "output_path", None) is None:
        return
    # a dataset is named by s3://bucket and the key, or by "file" and the path (OpenLineage documentation, "Dataset Naming")
    scheme, _, rest = str(task.output_path).rpartition("://")
    bucket, _, name = rest.rpartition("@")[2].partition("/") if scheme not in ("", "file") else ("", "", rest)
    lineage.outputs.append(OutputDataset(namespace=f"{scheme}://{bucket}" if bucket else "file", name=name))


def _add_run_facet(task: Any, lineage: OperatorLineage[Any, Any]) -> None:
    from openlineage.client.facet_v2 import RunFacet

    if task.lineage_summary is not None:
        lineage.run_facets[FACET] = RunFacet().with_additional_properties(**task.lineage_summary)


def _database(conn_id: str) -> tuple[Any, Any, Any]:
    """Hook, connection, and OpenLineage's information on the database, which is None for one without a name there, such as SQLite."""
    connection = BaseHook.get_connection(conn_id)
    hook = connection.get_hook()
    return hook, connection, hook.get_openlineage_database_info(connection)

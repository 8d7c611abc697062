"""OpenLineage: the tables that a task reads and writes, and what the run cost.

Nothing here is needed without the OpenLineage provider, and nothing in it fails a task: OpenLineage calls these methods beside the task
and logs what goes wrong. They run in a copy of the task's process, so they know what the same leg of the task has left on the operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseHook

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage

#: name of our run facet
FACET = "batchkit"


class BatchLineage:
    """The OpenLineage methods of an operator with ``sql`` and ``source_conn_id`` (what it reads) or ``table`` (what it writes)."""

    #: what the task has published, see :mod:`~airflow_provider_batchkit.operators.publish`
    lineage_summary: dict[str, Any] | None = None

    def get_openlineage_facets_on_start(self) -> OperatorLineage | None:
        """The tables, as far as they are known before the task has run."""
        return describe(self)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage | None:
        """The tables, and the tokens and costs of the run."""
        return describe(self)

    def get_openlineage_facets_on_failure(self, task_instance: Any) -> OperatorLineage | None:
        """The same for a failed task: what was submitted or has landed before the failure."""
        return describe(self)


def describe(task: Any) -> OperatorLineage | None:
    """What OpenLineage is told of a task; None where its provider is not installed."""
    try:
        from airflow.providers.openlineage.extractors import OperatorLineage
    except ImportError:
        return None
    lineage = OperatorLineage()
    if isinstance(getattr(task, "sql", None), str):
        lineage = _of_source(task.sql, task.source_conn_id or task.sql_conn_id)
    if isinstance(getattr(task, "table", None), str):
        lineage.outputs += _of_table(task.table, task.sql_conn_id, (task.lineage_summary or {}).get("rows"))
    if task.lineage_summary is not None:
        lineage.run_facets[FACET] = _run_facet(task.lineage_summary)
    return lineage


def _of_source(sql: str, conn_id: str) -> OperatorLineage:
    """The source's tables by OpenLineage's own parser; of a database that it does not know, the statement alone."""
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.providers.openlineage.sqlparser import SQLParser
    from openlineage.client.facet_v2 import sql_job

    hook, connection, info = _database(conn_id)
    if info is None:
        return OperatorLineage(job_facets={"sql": sql_job.SQLJobFacet(query=SQLParser.normalize_sql(sql))})
    parser = SQLParser(dialect=hook.get_openlineage_database_dialect(connection), default_schema=hook.get_openlineage_default_schema())
    # by name alone: asking the database for columns is not worth a connection at every start of a task
    return parser.generate_openlineage_metadata_from_sql(sql=sql, hook=hook, database_info=info, use_connection=False)


def _of_table(table: str, conn_id: str, rows: int | None) -> list[Any]:
    """The result table; nothing for a database that OpenLineage has no name for."""
    from airflow.providers.openlineage.sqlparser import SQLParser
    from openlineage.client.event_v2 import OutputDataset
    from openlineage.client.facet_v2 import output_statistics_output_dataset

    hook, _, info = _database(conn_id)
    if info is None:
        return []
    schema, _, name = table.rpartition(".")
    path = ".".join(part for part in (info.database, schema or hook.get_openlineage_default_schema(), name) if part)
    facets = {}
    if rows is not None:
        facets["outputStatistics"] = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(rowCount=rows)
    namespace = SQLParser.create_namespace(info)
    return [OutputDataset(namespace=namespace, name=path.upper() if info.is_uppercase_names else path, outputFacets=facets)]


def _database(conn_id: str) -> tuple[Any, Any, Any]:
    """Hook and connection, and what OpenLineage calls the database; None for one that it does not know."""
    connection = BaseHook.get_connection(conn_id)
    hook = connection.get_hook()
    return hook, connection, hook.get_openlineage_database_info(connection)


def _run_facet(summary: dict[str, Any]) -> Any:
    """The run's facet ``batchkit``: the batch ids, and once they have landed rows, outcomes and the tally, with money as text."""
    from openlineage.client.facet_v2 import RunFacet

    return RunFacet().with_additional_properties(**summary)

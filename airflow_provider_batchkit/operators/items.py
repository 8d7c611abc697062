"""The source of a submit's rows: a query, files, or a list."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.hooks.sql import open_connection

if TYPE_CHECKING:
    from airflow_provider_batchkit.source.rows import Items


def items_of(task: Any) -> Iterable[Any] | Items:
    """The items of a task's source. Nothing is read before the first item is taken.

    :param task: a :class:`SubmitBatchOperator`
    """
    if task.input_path is not None:
        from airflow_provider_batchkit.hooks.storage import input_files
        from airflow_provider_batchkit.source.files import FileRows, InputOptions

        return FileRows(input_files(task.input_path, task.input_conn_id), InputOptions.parse(task.input_options))
    if task.sql is None:
        from airflow_provider_batchkit.request.build import items_of as given

        # rendering has already replaced a literal wrapper or a task's output by its value
        return given(task.requests)
    from airflow_provider_batchkit.source.rows import RowItems
    from airflow_provider_batchkit.source.sql import read_sql

    return RowItems(read_sql(partial(open_connection, task.source_conn_id or task.sql_conn_id), task.sql, task.parameters))

"""The place of a task's result files, and the proof that files can be written there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.operators.resumable import ResumableOperator

if TYPE_CHECKING:
    from airflow_provider_batchkit.hooks.storage import ResultFiles


class OutputOperator(ResumableOperator):
    """The parameters of result files, for tasks that write them and for tasks that submit what a later task writes."""

    def __init__(
        self, *, output_path: Any = None, output_format: str | None = None, output_conn_id: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.output_path = output_path
        self.output_format = output_format
        self.output_conn_id = output_conn_id

    def _refuse_bad_output(self) -> None:
        """:raises BatchInputError: when the DAG is parsed, for a path or format of files that cannot be written"""
        from airflow_provider_batchkit.hooks.storage import output_form

        if self.output_path is None and (self.output_format or self.output_conn_id):
            raise BatchInputError(f"Task {self.task_id}: output_format and output_conn_id are for output_path, which is missing.")
        if isinstance(self.output_path, str) and "{{" not in self.output_path:
            try:
                output_form(self.output_path, self.output_format)
            except BatchInputError as e:
                raise BatchInputError(f"Task {self.task_id}: {e}") from None

    def _files(self) -> ResultFiles | None:
        from airflow_provider_batchkit.hooks.storage import ResultFiles

        return None if self.output_path is None else ResultFiles(self.output_path, self.output_format, self.output_conn_id)

    def _prove_output(self) -> None:
        """Prove the place of the results: write a file there, and delete it.

        :raises BatchInputError: when the file cannot be written, or cannot be deleted
        """
        files = self._files()
        if files is not None:
            files.check()

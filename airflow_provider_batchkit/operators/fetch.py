"""Fetch: write the results of ended batches, with their bill, to a table or to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowFailException

from airflow_provider_batchkit.exceptions import BatchInputError, BatchKitError, ErrorRateError
from airflow_provider_batchkit.hooks.ledger import results_of
from airflow_provider_batchkit.hooks.settings import DEFAULT_CONN_ID, configured_failures, settle_times
from airflow_provider_batchkit.jobs.waiting import Done, WaitFor
from airflow_provider_batchkit.links import ConsoleLink, push_console_link
from airflow_provider_batchkit.model import RequestStatus
from airflow_provider_batchkit.operators.output import OutputOperator
from airflow_provider_batchkit.operators.publish import publish_summary
from airflow_provider_batchkit.operators.resumable import Leg
from airflow_provider_batchkit.operators.tasks import as_batch_ids, attempt_id_of

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_batchkit.jobs.advance import Landing
    from airflow_provider_batchkit.landing import LandingReport
    from airflow_provider_batchkit.ledger import Ledger


def refuse_replace(what: str, write_disposition: str) -> None:
    """:raises BatchInputError: for a ``replace`` with a job that asks only the changed rows"""
    if write_disposition == "replace":
        raise BatchInputError(
            f"{what}: write_disposition='replace' with skip_unchanged would delete the rows that are answered and unchanged. Use 'merge'."
        )


class LandingOperator(OutputOperator):
    """The parameters and the landing of every task that writes results to a table or to files."""

    table: Any

    def __init__(
        self,
        *,
        write_disposition: str = "merge",
        include_failed: bool = False,
        fail_on_error_rate: float | None = None,
        delete_after_fetch: bool = False,
        rewrite: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.write_disposition = write_disposition
        self.include_failed = include_failed
        self.fail_on_error_rate = fail_on_error_rate
        self.delete_after_fetch = delete_after_fetch
        self.rewrite = rewrite
        if write_disposition not in ("merge", "append", "replace"):
            raise BatchInputError(
                f"Task {self.task_id}: write_disposition must be 'merge', 'append' or 'replace', not {write_disposition!r}."
            )
        if fail_on_error_rate is not None and not 0 <= fail_on_error_rate <= 1:
            raise BatchInputError(f"Task {self.task_id}: fail_on_error_rate must be 0.0 to 1.0, not {fail_on_error_rate!r}.")

    def _refuse_bad_target(self) -> None:
        """:raises BatchInputError: when the DAG is parsed, for results without a place, or a table without a database"""
        if self.table is None and self.output_path is None:
            raise BatchInputError(f"Task {self.task_id}: give table or output_path, or both: its results have no place.")
        if self.table is not None and self.sql_conn_id is None:
            raise BatchInputError(f"Task {self.task_id}: table needs sql_conn_id, the connection of its database.")
        if self.table is None and self.write_disposition != "merge":
            raise BatchInputError(
                f"Task {self.task_id}: write_disposition={self.write_disposition!r} is for a table. Results in files are one file a batch, "
                "which takes the place of that batch's file alone."
            )
        self._refuse_bad_output()

    def _file_summary(self, batch_ids: Sequence[str]) -> dict[str, Any]:
        """The part of the summary about files: their place, and the file of each batch."""
        files = self._files()
        return {} if files is None else {"output_path": files.name, "files": [files.url(batch_id) for batch_id in batch_ids]}

    @property
    def _place(self) -> str:
        """The place of the results, for messages."""
        return " and ".join(str(place) for place in (self.table, self.output_path) if place is not None)

    def _refuse_mapped_replace(self, context: Context) -> None:
        if self.write_disposition == "replace" and (context["ti"].map_index or 0) >= 0 and context["ti"].map_index is not None:
            raise AirflowFailException(
                "write_disposition='replace' in a mapped task: each would replace the others' rows. Nothing was written."
            )

    def _landing(self, leg: Leg, ledger: Ledger) -> Landing:
        from airflow_provider_batchkit.jobs.advance import Landing
        from airflow_provider_batchkit.jobs.fetch import FetchingTask, TableIn, fetch_job
        from airflow_provider_batchkit.landing import LandingOptions, WriteDisposition

        ti, files, results = leg.context["ti"], self._files(), results_of(self)
        table = None if self.table is None else TableIn(self.table, results)
        task = FetchingTask(ti.dag_id, ti.run_id, attempt_id_of(ti) if results is not None else "")
        fetch = partial(fetch_job, self.hook.kit, ledger, times=settle_times(), unseen=leg.unseen)

        def land(ids: Sequence[str], how: WriteDisposition) -> LandingReport:
            options = LandingOptions(how, include_failed=self.include_failed, rewrite=self.rewrite)
            found = None if table is None else fetch(ids, table, task, options)
            return _land_files_too(found, lambda: fetch(ids, files, task, options)) if files is not None else found  # type: ignore[return-value]

        return Landing(self._place, WriteDisposition.parse(self.write_disposition), land, leg)

    def _delete(self, ledger: Ledger, batch_ids: Sequence[str], complete: Sequence[str]) -> None:
        """With ``delete_after_fetch``, delete the batches that have landed whole."""
        if not self.delete_after_fetch:
            return
        for batch_id in batch_ids:
            if batch_id not in complete:
                self.log.warning("Not every request of %s has a readable result; the batch is not deleted", batch_id)
                continue
            record = ledger.find(batch_id)
            if self.hook.kit.delete(batch_id) or record is None or record.workspace in (None, *self.hook.kit.workspaces):
                ledger.deleted(batch_id)
            else:
                self.log.warning("%s is not deleted: the connection's key is not of the workspace that it was sent to", batch_id)

    def _check_error_rate(self, counts: Mapping[str, int]) -> None:
        total = sum(counts.values())
        failed = total - counts.get(RequestStatus.SUCCEEDED.value, 0)
        if self.fail_on_error_rate is not None and total and failed / total > self.fail_on_error_rate:
            raise ErrorRateError(
                f"{failed:,} of {total:,} rows have no answer ({failed / total:.2%}), above fail_on_error_rate="
                f"{self.fail_on_error_rate:.2%}: {dict(counts)}. The answers that came have landed in {self._place}."
            )


def _land_files_too(table: LandingReport | None, land: Callable[[], LandingReport]) -> LandingReport:
    """Land batches in files, after the table where there is one; returns one report for both."""
    try:
        files = land()
    except BatchKitError as e:
        e.landed = [*(table.first if table is not None else []), *e.landed]
        raise
    if table is None:
        return files
    table.complete_ids = [batch_id for batch_id in table.complete_ids if batch_id in files.complete_ids]
    return table


class FetchBatchOperator(LandingOperator):
    """Write the results of ended batches to a table or to files, with their costs. Returns a summary with the cost tally.

    The rows, each request's outcome and the batch's bill are written in one transaction per batch, so a task that was killed at any moment
    can run again. Where the ledger lies in another database, the rows still land exactly once.
    Answers to an ``output_schema`` become typed columns beside their raw text. An answer that does not fit is written with the status
    ``invalid_output``, its text and the reason, and never over an answer that fits.
    A batch that has landed in the table is not written again, so a retry or a cleared task of an older run leaves newer answers alone. A
    table that is missing or empty is filled anew. The task takes any batch id, also that of a batch submitted elsewhere, whose rows are
    keyed by ``custom_id``. The summary is also the ``extra`` of the events of outlet assets. A batch that the API does not show at the
    moment is waited for, without a worker slot.

    :param batch_id: a batch id or a list of them, usually the output of submit (templated). They are written in this order: where
        batches of several tasks answer the same key, the row of the later one stays, and a warning and ``overridden`` in the summary
        count the others
    :param table: result table, ``table`` or ``schema.table`` (templated); created when it does not exist, keyed by the source's key
    :param output_path: place of result files, instead of ``table`` or beside it: a path or URL that ``ObjectStoragePath`` takes (local,
        ``s3://``, ``gs://``, ``abfs://``). It is a folder, or a path with a ``*`` for the batch's id, ``gs://lake/copy/*.parquet``
        (templated). Each batch has one file, which is moved to its place once it is whole. Without ``table`` no database of results is
        needed
    :param output_format: ``"jsonl"`` (the default) or ``"parquet"``, needed where the path's suffix does not give it
    :param output_conn_id: connection to write ``output_path`` with; a local path needs none (templated)
    :param anthropic_conn_id: connection of type ``anthropic``
    :param sql_conn_id: SQL connection of the table
    :param ledger_conn_id: SQLite or PostgreSQL connection of the ledger, the same as the submit's: ``[batchkit] ledger_conn_id`` of
        Airflow's configuration by default, else ``sql_conn_id`` (templated)
    :param write_disposition: ``"merge"`` by key, ``"append"``, or ``"replace"`` the table's content. ``"replace"`` takes all batches
        together, and only when every request has a readable result and some have an answer; otherwise the old rows stay and the task fails
    :param include_failed: also write a row for each request that was not answered
    :param fail_on_error_rate: share of rows without an answer, 0.0 to 1.0; above it the task fails after the results have landed
    :param delete_after_fetch: delete from the API each batch that this task has landed whole
    :param rewrite: also write batches that have landed in the table before, over the rows that are there now
    """

    template_fields: Sequence[str] = (
        *("batch_id", "table", "anthropic_conn_id", "sql_conn_id", "ledger_conn_id", "output_path", "output_conn_id"),
    )
    ui_color = "#d2e3e8"
    operator_extra_links = (ConsoleLink(),)

    def __init__(
        self,
        *,
        batch_id: Any,
        table: str | None = None,
        anthropic_conn_id: str = DEFAULT_CONN_ID,
        sql_conn_id: str | None = None,
        ledger_conn_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_id = batch_id
        self.table = table
        self.anthropic_conn_id = anthropic_conn_id
        self.sql_conn_id = sql_conn_id
        self.ledger_conn_id = ledger_conn_id
        self._refuse_bad_target()

    def _advance(self, leg: Leg, ledger: Ledger) -> Done[LandingReport] | WaitFor:
        batch_ids = as_batch_ids(self.batch_id)
        self._refuse_mapped_replace(leg.context)
        push_console_link(leg.context, batch_ids)
        return self._landing(leg, ledger).land(batch_ids)

    def _finish(self, leg: Leg, ledger: Ledger, result: LandingReport) -> dict[str, Any]:
        self._say_why(ledger, result)
        summary = {**result.to_json(), "table": self.table, **self._file_summary(result.batch_ids)}
        publish_summary(self, leg.context, summary, result.tally)
        self._delete(ledger, result.batch_ids, result.complete_ids)
        self._check_error_rate(result.counts)
        return summary

    def _say_why(self, ledger: Ledger, report: LandingReport) -> None:
        """Log why rows failed. The reasons come from the ledger or, for batches that it does not know, from their results."""
        from airflow_provider_batchkit.request.failed import failed_text

        failures = configured_failures()
        kinds = ledger.failed_in(report.batch_ids, failures)
        for foreign in report.foreign_failed:
            kinds += foreign.rows(failures)
        why = failed_text(kinds, report.counts.total(), report.untold)
        if why:
            self.log.warning("%s", why)

"""Fetch: the results of ended batches into a table, with their bill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowFailException

from airflow_provider_batchkit.exceptions import BatchInputError, ErrorRateError
from airflow_provider_batchkit.hooks.ledger import results_of
from airflow_provider_batchkit.hooks.settings import DEFAULT_CONN_ID, configured_failures, settle_times
from airflow_provider_batchkit.jobs.waiting import Done, WaitFor
from airflow_provider_batchkit.links import ConsoleLink, push_console_link
from airflow_provider_batchkit.model import RequestStatus
from airflow_provider_batchkit.operators.publish import publish_summary
from airflow_provider_batchkit.operators.resumable import Leg, ResumableOperator
from airflow_provider_batchkit.operators.tasks import as_batch_ids, attempt_id_of

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_batchkit.jobs.advance import Landing
    from airflow_provider_batchkit.landing import LandingReport
    from airflow_provider_batchkit.ledger import Ledger


def refuse_replace(what: str, write_disposition: str) -> None:
    """:raises BatchInputError: for a ``replace`` of a job that asks the changed rows only"""
    if write_disposition == "replace":
        raise BatchInputError(
            f"{what}: write_disposition='replace' with skip_unchanged would delete the rows that are answered and unchanged. Use 'merge'."
        )


class LandingOperator(ResumableOperator):
    """The parameters of every task that writes results to a table, checked, and what it does with them."""

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

    def _refuse_mapped_replace(self, context: Context) -> None:
        if self.write_disposition == "replace" and (context["ti"].map_index or 0) >= 0 and context["ti"].map_index is not None:
            raise AirflowFailException(
                "write_disposition='replace' in a mapped task: each would replace the others' rows. Nothing was written."
            )

    def _landing(self, leg: Leg, ledger: Ledger) -> Landing:
        from airflow_provider_batchkit.jobs.advance import Landing
        from airflow_provider_batchkit.jobs.fetch import fetch_job
        from airflow_provider_batchkit.landing import WriteDisposition

        ti = leg.context["ti"]
        fetch = partial(
            fetch_job,
            self.hook.kit,
            ledger,
            table=self.table,
            dag_id=ti.dag_id,
            run_id=ti.run_id,
            times=settle_times(),
            unseen=leg.unseen,
            warehouse=results_of(self),
            attempt_id=attempt_id_of(ti),
            include_failed=self.include_failed,
            rewrite=self.rewrite,
        )
        return Landing(self.table, WriteDisposition.parse(self.write_disposition), lambda ids, how: fetch(ids, disposition=how), leg)

    def _delete(self, ledger: Ledger, batch_ids: Sequence[str], complete: Sequence[str]) -> None:
        """Delete the batches that have landed whole, where that is wanted."""
        if not self.delete_after_fetch:
            return
        for batch_id in batch_ids:
            if batch_id in complete:
                self.hook.kit.delete(batch_id)
                ledger.deleted(batch_id)
            else:
                self.log.warning("Not every request of %s has a readable result; the batch is not deleted", batch_id)

    def _check_error_rate(self, counts: Mapping[str, int]) -> None:
        total = sum(counts.values())
        failed = total - counts.get(RequestStatus.SUCCEEDED.value, 0)
        if self.fail_on_error_rate is not None and total and failed / total > self.fail_on_error_rate:
            raise ErrorRateError(
                f"{failed:,} of {total:,} rows have no answer ({failed / total:.2%}), above fail_on_error_rate="
                f"{self.fail_on_error_rate:.2%}: {dict(counts)}. The answers that came have landed in {self.table}."
            )


class FetchBatchOperator(LandingOperator):
    """Write the results of ended batches to a table, with their costs. Returns a summary with the cost tally.

    The rows, each request's outcome and the batch's bill are written in one transaction per batch: killed anywhere, it can run again. Where
    the ledger lies in another database, the rows land exactly once all the same.
    Answers to an ``output_schema`` are typed columns beside their raw text; one that does not fit is written with the status
    ``invalid_output``, its text and the reason, and never over an answer that fits.
    What has landed in the table is not written again, so that a retry or a cleared task of an older run leaves newer answers alone; a table
    that is missing or empty is filled anew. Works on any batch id, also one that was submitted elsewhere: its rows are keyed by
    ``custom_id``. The summary is the ``extra`` of the events of outlet assets, too. A batch that the API does not show at the moment is
    waited for, without a worker slot.

    :param batch_id: a batch id or a list of them, usually the output of submit (templated)
    :param table: result table, ``table`` or ``schema.table`` (templated); created when it does not exist, keyed by the source's key
    :param anthropic_conn_id: connection of type ``anthropic``
    :param sql_conn_id: SQL connection of the table
    :param ledger_conn_id: SQLite or PostgreSQL connection of the ledger, that of the submit: ``[batchkit] ledger_conn_id`` of Airflow's
        configuration by default, else ``sql_conn_id`` (templated)
    :param write_disposition: ``"merge"`` by key, ``"append"``, or ``"replace"`` the table's content: all batches together, and only
        when every request has a readable result and some have an answer; otherwise the old rows stay and the task fails
    :param include_failed: also write a row for each request that was not answered
    :param fail_on_error_rate: fail the task, after the results have landed, when a greater share of rows has no answer, 0.0 to 1.0
    :param delete_after_fetch: delete each batch from the API that this task has landed whole
    :param rewrite: write also what has landed in the table before, over whatever is there now
    """

    template_fields: Sequence[str] = ("batch_id", "table", "anthropic_conn_id", "sql_conn_id", "ledger_conn_id")
    ui_color = "#d2e3e8"
    operator_extra_links = (ConsoleLink(),)

    def __init__(
        self,
        *,
        batch_id: Any,
        table: str,
        anthropic_conn_id: str = DEFAULT_CONN_ID,
        sql_conn_id: str,
        ledger_conn_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_id = batch_id
        self.table = table
        self.anthropic_conn_id = anthropic_conn_id
        self.sql_conn_id = sql_conn_id
        self.ledger_conn_id = ledger_conn_id

    def _advance(self, leg: Leg, ledger: Ledger) -> Done[LandingReport] | WaitFor:
        batch_ids = as_batch_ids(self.batch_id)
        self._refuse_mapped_replace(leg.context)
        push_console_link(leg.context, batch_ids)
        return self._landing(leg, ledger).land(batch_ids)

    def _finish(self, leg: Leg, ledger: Ledger, result: LandingReport) -> dict[str, Any]:
        self._say_why(ledger, result)
        summary = result.to_json()
        publish_summary(self, leg.context, summary, result.tally)
        self._delete(ledger, result.batch_ids, result.complete_ids)
        self._check_error_rate(result.counts)
        return summary

    def _say_why(self, ledger: Ledger, report: LandingReport) -> None:
        """Why rows failed, from the ledger and, for batches that it does not know, from their results."""
        from airflow_provider_batchkit.request.failed import failed_text

        failures = configured_failures()
        kinds = ledger.failed_in(report.batch_ids, failures)
        for foreign in report.foreign_failed:
            kinds += foreign.rows(failures)
        why = failed_text(kinds, report.counts.total(), report.untold)
        if why:
            self.log.warning("%s", why)

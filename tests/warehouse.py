"""A journaled job without Airflow: it uses the same stages as the operators, on any database, against a simulator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import anthropic
import sqlalchemy as sa
import uuid6

from airflow_provider_batchkit import BatchKit
from airflow_provider_batchkit.jobs.advance import _note_key
from airflow_provider_batchkit.jobs.fetch import FetchingTask, TableIn, fetch_job
from airflow_provider_batchkit.jobs.settle import DEFAULT_TIMES, SettleTimes
from airflow_provider_batchkit.jobs.submit import Attempt, SubmitOptions, SubmitReport, submit_job
from airflow_provider_batchkit.landing import LandingOptions, LandingReport, WriteDisposition
from airflow_provider_batchkit.landing import Warehouse as Results
from airflow_provider_batchkit.ledger import JobRecord, Ledger, prepare_engine
from airflow_provider_batchkit.request.build import RequestBuilder, RequestDefaults, items_of
from airflow_provider_batchkit.request.template import RowTemplate
from airflow_provider_batchkit.schema import OutputSchema
from airflow_provider_batchkit.source.types import KeyTypes

#: every way to load a table: database, driver, and whether the load is the portable one, which works on any database
LANDING_PATHS = {
    "sqlite": ("sqlite", "", False),
    "sqlite-portable": ("sqlite", "", True),
    "psycopg3": ("postgres", "+psycopg", False),
    "psycopg2": ("postgres", "+psycopg2", False),
    "postgres-portable": ("postgres", "+psycopg", True),
}


def kit_for(base_url: str, *, api_key: str = "test-key", **client: Any) -> BatchKit:
    """A kit on a simulator."""
    return BatchKit(anthropic.Anthropic(api_key=api_key, base_url=base_url, max_retries=0, **client))


def times_of(settle_seconds: float | None, absence_seconds: float = 0.1) -> SettleTimes:
    """Settle times that are as short as a test needs."""
    return DEFAULT_TIMES if settle_seconds is None else SettleTimes(settle_seconds, absence_seconds)


class Warehouse:
    """A database with a ledger, and a kit to fill it; ``portable`` lands without the database's own bulk path."""

    def __init__(self, engine: sa.Engine, kit: BatchKit, *, portable: bool = False) -> None:
        self.engine = prepare_engine(engine)
        self.kit = kit
        self.ledger = Ledger(engine)
        self._portable = portable

    def submit(
        self,
        rows: Iterable[Mapping[str, Any]],
        *,
        prompt: str = "About {{ row.name }}",
        key: tuple[str, ...] = ("id",),
        run_id: str = "run-1",
        model: str = "claude-haiku-5-5",
        max_tokens: int = 100,
        dedupe: bool = True,
        output_schema: Any = None,
        params: Mapping[str, Any] | None = None,
        attempt: Attempt | None = None,
        map_index: int = -1,
        settle_seconds: float | None = None,
        only: Iterable[str] | None = None,
        **options: Any,
    ) -> SubmitReport:
        """Submit rows as the job of ``run_id``, in a new attempt unless one is given."""
        job = self.job(run_id, map_index=map_index)
        types = KeyTypes(key)
        schema = None if output_schema is None else OutputSchema.parse(output_schema)
        defaults = RequestDefaults(model, max_tokens, params=dict(params or {}), output_format=None if schema is None else schema.format)
        builder = RequestBuilder(defaults, job_id=job.job_id, key=key, prompt=RowTemplate(prompt, name="prompt"), dedupe=dedupe)

        def note_key() -> None:
            if how.table is not None:
                _note_key(attempt or self.attempt(job), how, types)
            elif types.rows_seen:
                self.ledger.set_key_columns(job.job_id, types.result(self.ledger.key_columns(job.job_id)), types.characters)

        text = None if schema is None else schema.text
        how = SubmitOptions(times=times_of(settle_seconds), output_schema=text, **options)
        attempt = self.attempt(job) if attempt is None else replace(attempt, job=job)
        return submit_job(attempt, builder.pieces(rows, types.see), how, only=only, before_send=note_key)

    def attempt(self, job: JobRecord | None = None, **how: Any) -> Attempt:
        """A new attempt, younger than all earlier ones, of the job of ``run-1`` unless another job is given."""
        return Attempt(self.kit, self.ledger, job or self.job(), str(uuid6.uuid7()), how.pop("since", datetime.now(UTC)), **how)

    def job(self, run_id: str = "run-1", *, task_id: str = "submit", map_index: int = -1) -> JobRecord:
        """The job of a run. The ledger is created if needed."""
        self.ledger.ensure()
        return self.ledger.identify("dag", run_id, task_id, map_index)

    def submit_requests(self, requests: Any, *, run_id: str = "run-1", **options: Any) -> SubmitReport:
        """Submit requests without rows, as the job of ``run_id``."""
        job = self.job(run_id)
        builder = RequestBuilder(RequestDefaults("claude-haiku-5-5", 100), job_id=job.job_id)
        return submit_job(
            self.attempt(job),
            builder.pieces(items_of(requests)),
            SubmitOptions(**options),
            before_send=lambda: self.ledger.set_key_columns(job.job_id, KeyTypes(()).result()),
        )

    def fetch(
        self,
        batch_ids: Iterable[str],
        table: str = "answers",
        *,
        into: Results | None = None,
        attempt_id: str | None = None,
        disposition: str = "merge",
        run_id: str = "run-1",
        settle_seconds: float | None = None,
        **options: Any,
    ) -> LandingReport:
        """Land batches in a table; with ``into``, in a table of another database."""
        how = {name: options.pop(name) for name in ("include_failed", "rewrite", "portable") if name in options}
        return fetch_job(
            self.kit,
            self.ledger,
            list(batch_ids),
            TableIn(table, into),
            FetchingTask("dag", run_id, attempt_id or str(uuid6.uuid7())),
            LandingOptions(WriteDisposition(disposition), **{"portable": self._portable, **how}),
            times=times_of(settle_seconds),
            **options,
        )

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """Rows of a query."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.exec_driver_sql(sql).mappings()]

    def execute(self, *statements: str) -> None:
        """Run statements in one transaction."""
        with self.engine.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

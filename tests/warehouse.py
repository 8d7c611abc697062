"""A journaled job without Airflow: the same stages that the operators compose, on any database, against a simulator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import anthropic
import sqlalchemy as sa

from airflow_provider_batchkit import BatchKit
from airflow_provider_batchkit.jobs import SubmitReport, fetch_job, submit_job
from airflow_provider_batchkit.landing import LandingReport, WriteDisposition
from airflow_provider_batchkit.ledger import JobRecord, Ledger, make_job_id, prepare_engine
from airflow_provider_batchkit.requests import RequestBuilder, RequestDefaults, items_of
from airflow_provider_batchkit.schema import OutputSchema
from airflow_provider_batchkit.sources import KeyTypes
from airflow_provider_batchkit.templates import RowTemplate

#: every way into a table, as database, driver, and whether it is the one that works anywhere
LANDING_PATHS = {
    "sqlite": ("sqlite", "", False),
    "sqlite-portable": ("sqlite", "", True),
    "psycopg3": ("postgres", "+psycopg", False),
    "psycopg2": ("postgres", "+psycopg2", False),
    "postgres-portable": ("postgres", "+psycopg", True),
}


def kit_for(base_url: str, **client: Any) -> BatchKit:
    """A kit on a simulator."""
    return BatchKit(anthropic.Anthropic(api_key="test-key", base_url=base_url, max_retries=0, **client))


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
        **limits: Any,
    ) -> SubmitReport:
        """Submit rows as the job of ``run_id``."""
        job = JobRecord(make_job_id("dag", run_id, "submit"), "dag", run_id, "submit")
        types = KeyTypes(key)
        schema = None if output_schema is None else OutputSchema.parse(output_schema)
        defaults = RequestDefaults(model, max_tokens, params=dict(params or {}), output_format=None if schema is None else schema.format)
        builder = RequestBuilder(defaults, job_id=job.job_id, key=key, prompt=RowTemplate(prompt, name="prompt"), dedupe=dedupe)

        def note_key() -> None:
            if types.rows_seen:
                self.ledger.set_key_columns(job.job_id, types.result(self.ledger.key_columns(job.job_id)))

        return submit_job(
            self.kit,
            self.ledger,
            job,
            builder.pieces(rows, types.see),
            anthropic_conn_id="anthropic_default",
            before_send=note_key,
            output_schema=None if schema is None else schema.text,
            **limits,
        )

    def submit_requests(self, requests: Any, *, run_id: str = "run-1", **limits: Any) -> SubmitReport:
        """Submit requests without rows, as the job of ``run_id``."""
        job = JobRecord(make_job_id("dag", run_id, "submit"), "dag", run_id, "submit")
        builder = RequestBuilder(RequestDefaults("claude-haiku-5-5", 100), job_id=job.job_id)
        return submit_job(
            self.kit,
            self.ledger,
            job,
            builder.pieces(items_of(requests)),
            anthropic_conn_id="anthropic_default",
            before_send=lambda: self.ledger.set_key_columns(job.job_id, KeyTypes(()).result()),
            **limits,
        )

    def fetch(
        self, batch_ids: Iterable[str], table: str = "answers", *, disposition: str = "merge", run_id: str = "run-1", **options: Any
    ) -> LandingReport:
        """Land batches in a table."""
        return fetch_job(
            self.kit,
            self.ledger,
            list(batch_ids),
            table,
            dag_id="dag",
            run_id=run_id,
            disposition=WriteDisposition(disposition),
            **{"portable": self._portable, **options},
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

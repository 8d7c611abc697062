"""Spending: sums by day, DAG or model, the books of budgets, and how long batches took. Nothing here writes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from airflow_provider_batchkit.cost.budget import SHARE_UNIT, BudgetStatus, window_of
from airflow_provider_batchkit.ledger.alerts import marks_of
from airflow_provider_batchkit.ledger.budgets import Budgets
from airflow_provider_batchkit.ledger.overview import usd
from airflow_provider_batchkit.ledger.rollup import DIALECTS, latency, utc_day
from airflow_provider_batchkit.ledger.tables import alert, batch, bill, job
from airflow_provider_batchkit.ledger.tables import budget as budget_table

#: the groups by which spending is summed up
GROUPS = ("day", "dag", "model")


@dataclass(frozen=True, slots=True)
class Spent:
    """The cost of landed batches. Money is USD; None when one of the requests has no known price."""

    #: the UTC day of the batches' creation, the DAG or the model
    name: str
    batches: int
    requests: int
    #: prompt tokens, cached or not
    input_tokens: int
    output_tokens: int
    batch_cost_usd: Decimal | None
    standard_cost_usd: Decimal | None
    #: requests without a known price
    unpriced_requests: int

    @property
    def savings_usd(self) -> Decimal | None:
        """Standard price less batch price."""
        return None if self.batch_cost_usd is None or self.standard_cost_usd is None else self.standard_cost_usd - self.batch_cost_usd


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds from creation to end of the batches of one DAG that were created on one day (UTC)."""

    day: date
    dag_id: str
    batches: int
    p50_s: float
    p95_s: float
    max_s: float


@dataclass(frozen=True, slots=True)
class ToldAlert:
    """An alert that was sent because a share of a budget's cap was reached."""

    #: the share of the cap, above 0 and at most 1
    share: Decimal
    #: when the first notifier had taken it
    told_at: datetime

    @property
    def percent(self) -> str:
        """The share as a percentage for people."""
        return f"{(self.share * 100).normalize():f}%"


class Spending(Budgets):
    """The books of one ledger."""

    def spent(
        self,
        by: str,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        dag_ids: Collection[str] | None = None,
        model: str | None = None,
    ) -> list[Spent]:
        """The cost of the batches created in a span. Days are in the order of time; DAGs and models come dearest first.

        :param by: one of :data:`GROUPS`
        """
        group: sa.ColumnElement[Any] = {"dag": job.c.dag_id, "model": bill.c.model}.get(by, self._day(batch.c.created_at))
        tokens = bill.c.input_tokens + bill.c.cache_write_5m_tokens + bill.c.cache_write_1h_tokens + bill.c.cache_read_tokens
        unpriced = sa.case((bill.c.batch_cost_picousd.is_(None), bill.c.requests), else_=0)
        sums = {
            "requests": bill.c.requests,
            "input_tokens": tokens,
            "output_tokens": bill.c.output_tokens,
            "batch_cost_picousd": bill.c.batch_cost_picousd,
            "standard_cost_picousd": bill.c.standard_cost_picousd,
            "unpriced": unpriced,
        }
        # A batch that used several models has one bill row per model. Its rows are summed up first: COUNT(DISTINCT) would sort all batches.
        statement = (
            sa.select(group.label("name"), *(sa.func.sum(column).label(name) for name, column in sums.items()))
            .join(batch, (batch.c.job_id == bill.c.job_id) & (batch.c.shard == bill.c.shard))
            .join(job, job.c.job_id == bill.c.job_id)
            .group_by(group, bill.c.job_id, bill.c.shard)
        )
        if since is not None:
            statement = statement.where(batch.c.created_at >= since)
        if until is not None:
            statement = statement.where(batch.c.created_at < until)
        if dag_ids is not None:
            statement = statement.where(job.c.dag_id.in_(sorted(dag_ids)))
        if model is not None:
            statement = statement.where(bill.c.model == model)
        each = statement.subquery()
        totals = sa.select(each.c.name, sa.func.count().label("batches"), *(sa.func.sum(each.c[name]).label(name) for name in sums))
        with self.engine.connect() as connection:
            rows = connection.execute(totals.group_by(each.c.name)).all()
        found = [
            Spent(
                str(row.name),
                int(row.batches),
                int(row.requests),
                int(row.input_tokens),
                int(row.output_tokens),
                None if row.unpriced else usd(row.batch_cost_picousd),
                None if row.unpriced else usd(row.standard_cost_picousd),
                int(row.unpriced),
            )
            for row in rows
        ]
        if by == "day":
            return sorted(found, key=lambda one: one.name)
        return sorted(found, key=lambda one: (-(one.batch_cost_usd or Decimal(0)), one.name))

    def budgets(self, dag_ids: Collection[str] | None = None) -> list[BudgetStatus]:
        """The books of every budget in its present window; with ``dag_ids`` only budgets in which a batch of one of these DAGs counts."""
        names = sa.select(budget_table.c.name)
        if dag_ids is not None:
            own = (batch.c.budget == budget_table.c.name) & (job.c.job_id == batch.c.job_id) & job.c.dag_id.in_(sorted(dag_ids))
            names = names.where(sa.exists().where(own))
        with self.engine.connect() as connection:
            found = connection.execute(names.order_by(budget_table.c.name)).scalars().all()
        return [status for name in found if (status := self.budget_status(name)) is not None]

    def told_alerts(self, status: BudgetStatus, *, at: datetime | None = None) -> list[ToldAlert]:
        """The alerts of a budget that were sent in the window that contains ``at`` (default: now), the lowest share first."""
        if not sa.inspect(self.engine).has_table(alert.name):
            return []
        start = window_of(status.window, at or datetime.now(UTC))[0]
        told = sa.func.min(alert.c.told_at, type_=alert.c.told_at.type).label("told_at")
        statement = (
            sa.select(alert.c.threshold, told)
            .where(*marks_of(status.name, status.window, start), alert.c.told_at.is_not(None))
            .group_by(alert.c.threshold)
            .order_by(alert.c.threshold)
        )
        with self.engine.connect() as connection:
            return [ToldAlert(Decimal(row.threshold) / SHARE_UNIT, row.told_at) for row in connection.execute(statement)]

    def latencies(self, *, since: datetime, until: datetime | None = None, dag_ids: Collection[str] | None = None) -> list[Latency]:
        """Latencies of the batches created on whole days (UTC) of a span; empty on databases without the roll-up's views."""
        if self.engine.dialect.name not in DIALECTS:
            return []
        view = latency().subquery()
        # SQLite stores dates as text
        as_text = self.engine.dialect.name == "sqlite"
        on: sa.ColumnElement[Any] = sa.cast(view.c.day, sa.Text()) if as_text else view.c.day

        def literal(at: datetime) -> sa.ColumnElement[Any]:
            return sa.literal(at.date().isoformat()) if as_text else sa.literal(at.date(), sa.Date())

        statement = sa.select(view).where(on >= literal(since))
        if until is not None:
            statement = statement.where(on < literal(until))
        if dag_ids is not None:
            statement = statement.where(view.c.dag_id.in_(sorted(dag_ids)))
        with self.engine.connect() as connection:
            rows = connection.execute(statement.order_by(view.c.day.desc(), view.c.dag_id))
            return [Latency(_date(row.day), row.dag_id, int(row.batches), row.p50_s, row.p95_s, row.max_s) for row in rows]

    def _day(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """The UTC day of a time, as text."""
        return sa.cast(utc_day(column) if self.engine.dialect.name in DIALECTS else sa.cast(column, sa.Date()), sa.String(10))


def _date(value: Any) -> date:
    return value if isinstance(value, date) else date.fromisoformat(value)

"""The reading side of the ledger: jobs and their batches, a page at a time, and why rows failed. Nothing here writes.

The command line and the Batches page read through this module and :mod:`.spending`, so that both show the same figures. Lists are limited
in SQL, and figures are summed up for the jobs of one page only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.ledger.reasons import Reasons
from airflow_provider_batchkit.ledger.records import BatchRecord, record_of
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.ledger.tables import batch, bill, failed, job, landing
from airflow_provider_batchkit.model import COST_QUANTUM, ModelTally, RequestStatus

#: states of a batch that goes on without a person's help
OPEN = tuple(state.value for state in BatchState if state not in (BatchState.LANDED, BatchState.REJECTED, BatchState.VOID, BatchState.GONE))
#: A job's state is the first of _JOB_STATES that one of its batches has, and NOTHING when it has no batch.
DOUBT, NOTHING = "doubt", "nothing sent"
_JOB_STATES = (DOUBT, *OPEN, BatchState.GONE.value, BatchState.LANDED.value, BatchState.REJECTED.value, BatchState.VOID.value)
#: the values by which a list of jobs can be filtered: a state, or ``open`` for any of :data:`OPEN`
STATES = ("open", *_JOB_STATES)
#: the usual cost of a task's requests comes from the batches that landed in so many days
_USUAL_DAYS = 30


@dataclass(frozen=True, slots=True)
class Filter:
    """Which jobs to show; None everywhere shows all."""

    #: only jobs of these DAGs
    dag_ids: Collection[str] | None = None
    dag_id: str | None = None
    run_id: str | None = None
    task_id: str | None = None
    map_index: int | None = None
    #: a model that the job has been billed for
    model: str | None = None
    #: one of :data:`STATES`
    state: str | None = None
    #: only jobs that began at ``since`` or later and before ``until``
    since: datetime | None = None
    until: datetime | None = None
    #: only jobs with rows that have no whole answer
    failed: bool = False

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """Conditions on ``batchkit_job``."""
        found = [
            job.c[name] == value for name in ("dag_id", "run_id", "task_id", "map_index") if (value := getattr(self, name)) is not None
        ]
        if self.dag_ids is not None:
            found.append(job.c.dag_id.in_(sorted(self.dag_ids)))
        if self.since is not None:
            found.append(job.c.created_at >= self.since)
        if self.until is not None:
            found.append(job.c.created_at < self.until)
        if self.model is not None:
            found.append(sa.exists().where(bill.c.job_id == job.c.job_id, bill.c.model == self.model))
        if self.failed:
            found.append(sa.exists().where(failed.c.job_id == job.c.job_id))
        if self.state is not None:
            found.append(_in_state(self.state))
        return found


def _in_state(state: str) -> sa.ColumnElement[bool]:
    """Jobs that have a batch in this state."""
    # the alias keeps this subquery apart from the enclosing statement, which may read the table, too
    own = batch.alias("own")
    return sa.exists().where(own.c.job_id == job.c.job_id, _is_in(own, state))


def _is_in(batches: sa.FromClause, state: str) -> sa.ColumnElement[bool]:
    """Batches in one of :data:`STATES`."""
    if state == DOUBT:
        return sa.and_(batches.c.state == BatchState.SENDING.value, batches.c.doubt_at.is_not(None))
    return batches.c.state.in_(OPEN if state == "open" else [state])


@dataclass(frozen=True, slots=True)
class JobView:
    """A job with the figures of its batches. Times are aware and UTC, money is USD and None where it is not known."""

    job_id: str
    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    #: one of :data:`STATES` but ``open``, or ``nothing sent``
    state: str
    #: when its first attempt began
    began_at: datetime
    #: when the API created its oldest open batch
    oldest_at: datetime | None
    #: when the last landing began
    landed_at: datetime | None
    #: batches per state
    batches: dict[str, int]
    #: requests of all rounds in batches that were not rejected or void, and the requests in open batches
    requests: int
    open_requests: int
    rounds: int
    #: rows without a whole answer by their last outcome, and how many of these have an unfinished answer
    failed: int
    unfinished: int
    #: the model names that the API reported; empty before the first landing
    models: tuple[str, ...]
    #: the cost of the landed batches
    batch_cost_usd: Decimal | None
    standard_cost_usd: Decimal | None
    #: the most that the open batches can cost
    open_bound_usd: Decimal | None
    budgets: tuple[str, ...]
    connections: tuple[str, ...]

    @property
    def savings_usd(self) -> Decimal | None:
        """Standard price less batch price of the landed batches."""
        return None if self.batch_cost_usd is None or self.standard_cost_usd is None else self.standard_cost_usd - self.batch_cost_usd


@dataclass(frozen=True, slots=True)
class JobPage:
    """Jobs, the latest first. ``next`` is the ``before`` of the next page, which has older jobs; None on the last page."""

    jobs: list[JobView]
    next: str | None


@dataclass(frozen=True, slots=True)
class BatchView:
    """A batch and the task instance that it belongs to."""

    record: BatchRecord
    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    submitted_at: datetime | None
    batch_cost_usd: Decimal | None
    bound_usd: Decimal | None
    budget: str | None

    @property
    def state(self) -> str:
        """The batch's state; ``doubt`` while it is not known whether the API accepted it."""
        in_doubt = self.record.state is BatchState.SENDING and self.record.doubt_at is not None
        return DOUBT if in_doubt else self.record.state.value


@dataclass(frozen=True, slots=True)
class Usual:
    """The mean cost of a request of a task, and the models that were billed, in the last 30 days."""

    cost_usd: Decimal | None = None
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JobDetail:
    """Everything that is shown of one job."""

    job: JobView
    batches: list[BatchView]
    #: the bill per model, without the savings of the prompt cache, which are not known here
    bills: dict[str, ModelTally]
    #: shard → rows per outcome of the landed batch, as JSON text
    counts: dict[int, str]
    #: seconds of reading and rendering the source, and shard → seconds of the batch's landing
    rendering_s: float | None
    landing_s: dict[int, float]
    #: rows that were not asked because an earlier run had answered them
    unchanged_rows: int
    #: (table, rows written): the sums over the latest landing of each batch
    tables: list[tuple[str, int]]


class Overview(Reasons):
    """The reading side of one ledger."""

    def dag_ids(self) -> list[str]:
        """Every DAG that has a job."""
        with self.engine.connect() as connection:
            return sorted(connection.execute(sa.select(job.c.dag_id).distinct()).scalars())

    def models(self, dag_ids: Collection[str] | None = None) -> list[str]:
        """Every model that has been billed."""
        statement = sa.select(bill.c.model).distinct()
        if dag_ids is not None:
            statement = statement.join(job, job.c.job_id == bill.c.job_id).where(job.c.dag_id.in_(sorted(dag_ids)))
        with self.engine.connect() as connection:
            return sorted(connection.execute(statement).scalars())

    def jobs(self, show: Filter, *, limit: int = 50, before: str | None = None, oldest_first: bool = False) -> JobPage:
        """A page of jobs, the latest first.

        :param before: ``next`` of the page before this one
        :param oldest_first: list the oldest first, on one page only: the oldest jobs in flight are the ones that may be stuck
        """
        statement = sa.select(job).where(*show.conditions(), *_older(before))
        order = (job.c.created_at, job.c.job_id)
        statement = statement.order_by(*(order if oldest_first else (one.desc() for one in order))).limit(limit + 1)
        with self.engine.connect() as connection:
            rows = connection.execute(statement).all()
            views = _views(connection, rows[:limit])
        last = rows[limit - 1] if len(rows) > limit else None
        return JobPage(views, None if last is None else f"{last.created_at.isoformat()} {last.job_id}")

    def dag_of(self, job_id: str) -> str | None:
        """The DAG of a job; None where the ledger does not have it."""
        with self.engine.connect() as connection:
            return connection.execute(sa.select(job.c.dag_id).where(job.c.job_id == job_id)).scalar()

    def job(self, job_id: str) -> JobDetail | None:
        """One job; None where the ledger does not have it."""
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(job).where(job.c.job_id == job_id)).first()
            if row is None:
                return None
            (view,) = _views(connection, [row])
            rows = connection.execute(_batches().where(batch.c.job_id == job_id).order_by(batch.c.shard)).all()
            return JobDetail(
                view,
                [_batch_view(one) for one in rows],
                _bills(connection, job_id),
                {one.shard: one.counts for one in rows if one.counts},
                None if row.rendering_ms is None else row.rendering_ms / 1000,
                {one.shard: one.landing_ms / 1000 for one in rows if one.landing_ms is not None},
                int(row.unchanged_rows or 0),
                _tables(connection, job_id),
            )

    def batches(self, show: Filter, *, only_open: bool = False, limit: int = 200, oldest_first: bool = False) -> list[BatchView]:
        """Batches of the jobs that the filter selects, the latest first by default. A filter by state selects batches in that state."""
        statement = _batches().where(*show.conditions())
        for state in filter(None, ("open" if only_open else None, show.state)):
            statement = statement.where(_is_in(batch, state))
        with self.engine.connect() as connection:
            began = batch.c.intended_at if oldest_first else batch.c.intended_at.desc()
            rows = connection.execute(statement.order_by(began, batch.c.job_id, batch.c.shard).limit(limit))
            return [_batch_view(row) for row in rows]

    def batch(self, batch_id: str) -> BatchView | None:
        """One batch; None where the ledger does not have it."""
        with self.engine.connect() as connection:
            row = connection.execute(_batches().where(batch.c.batch_id == batch_id)).first()
        return None if row is None else _batch_view(row)

    def open_batches(self, job_ids: Iterable[str]) -> list[BatchView]:
        """The open batches of jobs, by job and shard."""
        statement = _batches().where(batch.c.job_id.in_(list(job_ids)), batch.c.state.in_(OPEN))
        with self.engine.connect() as connection:
            return [_batch_view(row) for row in connection.execute(statement.order_by(batch.c.job_id, batch.c.shard))]

    def usual(self, tasks: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Usual]:
        """(DAG, task) → the usual cost and models of its requests. It is an estimate from landed batches, not an upper bound."""
        wanted = sorted(set(tasks))
        if not wanted:
            return {}
        here = sa.tuple_(job.c.dag_id, job.c.task_id).in_(wanted)
        recent = batch.c.landed_at > datetime.now(UTC) - timedelta(days=_USUAL_DAYS)
        known = (batch.c.job_id == job.c.job_id) & batch.c.batch_cost_picousd.is_not(None)
        task = (job.c.dag_id, job.c.task_id)
        costs = sa.select(*task, sa.func.sum(batch.c.batch_cost_picousd), sa.func.sum(batch.c.requests)).join(batch, known)
        billed = (bill.c.job_id == batch.c.job_id) & (bill.c.shard == batch.c.shard)
        models = sa.select(*task, bill.c.model).distinct().join(batch, batch.c.job_id == job.c.job_id).join(bill, billed)
        names = defaultdict[tuple[str, str], list[str]](list)
        with self.engine.connect() as connection:
            spent = connection.execute(costs.where(here, recent).group_by(*task)).all()
            for dag_id, task_id, model in connection.execute(models.where(here, recent)):
                names[dag_id, task_id].append(model)
        each = {(dag_id, task_id): int(pico) * COST_QUANTUM / int(requests) for dag_id, task_id, pico, requests in spent if requests}
        return {task: Usual(each.get(task), tuple(sorted(names[task]))) for task in wanted}

    def connections(self, dag_ids: Collection[str] | None = None) -> list[str]:
        """The ``anthropic`` connections that batches were submitted with."""
        statement = sa.select(batch.c.anthropic_conn_id).distinct()
        if dag_ids is not None:
            statement = statement.join(job, job.c.job_id == batch.c.job_id).where(job.c.dag_id.in_(sorted(dag_ids)))
        with self.engine.connect() as connection:
            return sorted(connection.execute(statement).scalars())

    def in_doubt(self) -> list[BatchView]:
        """Batches in the state ``sending``: it is not known yet whether the API accepted them, and under which id."""
        statement = _batches().where(batch.c.state == BatchState.SENDING.value).order_by(batch.c.intended_at)
        with self.engine.connect() as connection:
            return [_batch_view(row) for row in connection.execute(statement)]


def _older(before: str | None) -> list[sa.ColumnElement[bool]]:
    if before is None:
        return []
    text, _, job_id = before.rpartition(" ")
    at = datetime.fromisoformat(text)
    return [sa.or_(job.c.created_at < at, sa.and_(job.c.created_at == at, job.c.job_id < job_id))]


def _batches() -> sa.Select[Any]:
    return sa.select(batch, job.c.dag_id, job.c.run_id, job.c.task_id, job.c.map_index).join(job, job.c.job_id == batch.c.job_id)


def _batch_view(row: Any) -> BatchView:
    return BatchView(
        record_of(row),
        row.dag_id,
        row.run_id,
        row.task_id,
        row.map_index,
        row.submitted_at,
        usd(row.batch_cost_picousd),
        usd(row.bound_picousd),
        row.budget,
    )


def usd(pico: int | None) -> Decimal | None:
    """Picodollars as USD."""
    return None if pico is None else int(pico) * COST_QUANTUM


def _known_total(rows: Iterable[Any], name: str) -> Decimal | None:
    """The total of a column over rows of :func:`_figures`; None when the value of one of the batches is not known."""
    total = 0
    for row in rows:
        if getattr(row, f"{name}_known") < row.batches:
            return None
        total += int(getattr(row, name) or 0)
    return total * COST_QUANTUM


def _views(connection: Connection, jobs: Sequence[Any]) -> list[JobView]:
    """The jobs of rows of ``batchkit_job``, in their order."""
    ids = [row.job_id for row in jobs]
    if not ids:
        return []
    figures, models, failures = defaultdict[str, list[Any]](list), defaultdict[str, set[str]](set), defaultdict[str, list[Any]](list)
    for row in connection.execute(_figures(ids)):
        figures[row.job_id].append(row)
    for job_id, model in connection.execute(sa.select(bill.c.job_id, bill.c.model).where(bill.c.job_id.in_(ids)).distinct()):
        models[job_id].add(model)
    outcome = (failed.c.job_id, failed.c.status)
    for row in connection.execute(sa.select(*outcome, sa.func.count().label("rows")).where(failed.c.job_id.in_(ids)).group_by(*outcome)):
        failures[row.job_id].append(row)
    return [_view(row, figures[row.job_id], models[row.job_id], failures[row.job_id]) for row in jobs]


def _figures(job_ids: list[str]) -> sa.Select[Any]:
    """Sums over the batches of jobs, per job, state, connection and budget."""
    group = (batch.c.job_id, batch.c.state, batch.c.anthropic_conn_id, batch.c.budget)
    money = ("batch_cost_picousd", "standard_cost_picousd", "bound_picousd")
    return (
        sa.select(
            *group,
            sa.func.count().label("batches"),
            sa.func.sum(batch.c.requests).label("requests"),
            *(sa.func.sum(batch.c[name]).label(name) for name in money),
            *(sa.func.count(batch.c[name]).label(f"{name}_known") for name in money),
            sa.func.min(batch.c.created_at).label("oldest_at"),
            sa.func.max(batch.c.landed_at).label("landed_at"),
            sa.func.count(batch.c.doubt_at).label("doubts"),
            sa.func.max(batch.c.round).label("rounds"),
        )
        .where(batch.c.job_id.in_(job_ids))
        .group_by(*group)
    )


def _view(row: Any, figures: list[Any], models: set[str], failures: list[Any]) -> JobView:
    batches = defaultdict[str, int](int)
    for one in figures:
        batches[one.state] += one.batches
    in_doubt = any(one.state == BatchState.SENDING.value and one.doubts for one in figures)
    state = DOUBT if in_doubt else next((name for name in _JOB_STATES if batches.get(name)), NOTHING)
    live = [one for one in figures if one.state in OPEN]
    landed = [one for one in figures if one.state == BatchState.LANDED.value]
    dead = (BatchState.REJECTED.value, BatchState.VOID.value)
    return JobView(
        row.job_id,
        row.dag_id,
        row.run_id,
        row.task_id,
        row.map_index,
        state,
        row.created_at,
        min((one.oldest_at for one in live if one.oldest_at is not None), default=None),
        max((one.landed_at for one in landed if one.landed_at is not None), default=None),
        dict(batches),
        sum(int(one.requests) for one in figures if one.state not in dead),
        sum(int(one.requests) for one in live),
        max((one.rounds for one in figures), default=0),
        sum(int(one.rows) for one in failures),
        sum(int(one.rows) for one in failures if one.status == RequestStatus.SUCCEEDED.value),
        tuple(sorted(models)),
        _known_total(landed, "batch_cost_picousd"),
        _known_total(landed, "standard_cost_picousd"),
        _known_total(live, "bound_picousd"),
        tuple(sorted({one.budget for one in figures if one.budget is not None})),
        tuple(sorted({one.anthropic_conn_id for one in figures})),
    )


def _bills(connection: Connection, job_id: str) -> dict[str, ModelTally]:
    names = [one.name for one in fields(ModelTally) if one.name != "cache_savings_usd"]
    columns = [bill.c[name.replace("_usd", "_picousd")] for name in names]
    sums = [sa.case((sa.func.count() == sa.func.count(column), sa.func.sum(column))) for column in columns]
    statement = sa.select(bill.c.model, *sums).where(bill.c.job_id == job_id).group_by(bill.c.model).order_by(bill.c.model)
    found = dict[str, ModelTally]()
    for model, *values in connection.execute(statement).all():
        known: dict[str, Any] = {
            name: usd(value) if name.endswith("_usd") else int(value) for name, value in zip(names, values, strict=True)
        }
        found[model] = ModelTally(**known, cache_savings_usd=None)
    return found


def _tables(connection: Connection, job_id: str) -> list[tuple[str, int]]:
    latest = (
        sa.select(landing.c.batch_id, landing.c.table_name, sa.func.max(landing.c.number).label("number"))
        .join(batch, batch.c.batch_id == landing.c.batch_id)
        .where(batch.c.job_id == job_id)
        .group_by(landing.c.batch_id, landing.c.table_name)
        .subquery()
    )
    same = (landing.c.batch_id == latest.c.batch_id) & (landing.c.table_name == latest.c.table_name) & (landing.c.number == latest.c.number)
    statement = sa.select(landing.c.table_name, sa.func.sum(landing.c.rows_written)).join(latest, same).group_by(landing.c.table_name)
    return [(table, int(rows)) for table, rows in connection.execute(statement.order_by(landing.c.table_name))]

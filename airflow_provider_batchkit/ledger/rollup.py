"""The roll-up: SQL views over the ledger that show what was spent and how long it took.

``batchkit_request``   one row per source row that has landed: its key, the request that asked for it last, the outcome and the cost
``batchkit_spend``     tokens, cost and savings per UTC day of the batch's creation, DAG, task and model
``batchkit_summary``   one row per job: rows and requests, cost, and the seconds of each step
``batchkit_latency``   one row per UTC day and DAG: the number of batches, and the median, 95th percentile and maximum of their latency

Views exist on PostgreSQL and SQLite. They give money twice: as whole picodollars (1e-12 USD, ``…_picousd``), and in dollars
(``…_usd``), which is NUMERIC on PostgreSQL and text with twelve decimals on SQLite, whose only fractions are binary floats. A cost is
NULL as soon as one request in it has no known price; ``unpriced_requests`` says how many have none.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction

from airflow_provider_batchkit.ledger.outcomes import Succeeded
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.ledger.tables import batch, bill, failed, job, succeeded
from airflow_provider_batchkit.model import COUNTERS, RequestStatus

DIALECTS = ("postgresql", "sqlite")


def _function(name: str, type_: sa.types.TypeEngine[Any], **forms: str) -> Any:
    """A SQL function, from its form on each dialect: ``{0}`` and ``{1}`` stand for its arguments."""
    function: Any = type(name, (GenericFunction,), {"type": type_, "inherit_cache": True})
    for dialect, form in forms.items():

        def compiled(element: Any, compiler: Any, form: str = form, **kw: Any) -> str:
            return form.format(*(compiler.process(clause, **kw) for clause in element.clauses))

        compiles(function, dialect)(compiled)
    return function


#: the UTC date of a time
utc_day = _function("utc_day", sa.Date(), postgresql="CAST({0} AT TIME ZONE 'UTC' AS DATE)", sqlite="date({0})")
#: seconds from one time to a later one, to the millisecond
seconds_between = _function(
    "seconds_between",
    sa.Float(),
    postgresql="CAST(round(EXTRACT(EPOCH FROM {1} - {0}), 3) AS DOUBLE PRECISION)",
    sqlite="round((julianday({1}) - julianday({0})) * 86400, 3)",
)
#: Picodollars as dollars, exactly. In PostgreSQL a product keeps all twelve decimals, a quotient may not. SQLite's printf would show a NULL
#: as zero.
usd = _function(
    "usd",
    sa.Numeric(),
    postgresql="{0} * 0.000000000001",
    sqlite="CASE WHEN {0} IS NOT NULL THEN CASE WHEN {0} < 0 THEN '-' ELSE '' END || "
    "printf('%d.%012d', abs({0}) / 1000000000000, abs({0}) % 1000000000000) END",
)
#: one row per item of a JSON array that is given as text, with one column, ``value``
json_items = _function("json_items", sa.types.NullType(), postgresql="json_array_elements(CAST({0} AS JSON))", sqlite="json_each({0})")
#: the item at a position (from 0) of a JSON array, as text
json_at = _function("json_at", sa.Text(), postgresql="({0} ->> {1})", sqlite="json_extract({0}, '$[' || {1} || ']')")


def _known_sum(column: sa.ColumnElement[Any], rows: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """The sum of ``column``; NULL when the column is NULL in one of the ``rows``."""
    return sa.case((sa.func.count(rows) == sa.func.count(column), sa.func.sum(column)))


def _seconds(milliseconds: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.cast(milliseconds, sa.Double()) / sa.literal_column("1000.0", sa.Double())


def _with_money(inner: sa.Subquery) -> sa.Select[Any]:
    """All columns of ``inner``, whose costs are picodollars, followed by the savings and the amounts in dollars."""
    batch_cost, standard_cost = inner.c.batch_cost_picousd, inner.c.standard_cost_picousd
    savings = standard_cost - batch_cost
    return sa.select(
        *inner.c,
        savings.label("savings_picousd"),
        usd(batch_cost).label("batch_cost_usd"),
        usd(standard_cost).label("standard_cost_usd"),
        usd(savings.self_group()).label("savings_usd"),
    )


def requests() -> sa.CompoundSelect[Any]:
    """``batchkit_request``: ``batchkit_failed``, and ``batchkit_succeeded`` with a row for each of its entries.

    ``asked`` is false for a row that shares another row's request, which then bears the cost.
    """
    entry = json_items(succeeded.c.entries).table_valued("value", name="entry")
    positions = dict(zip(Succeeded._fields, range(len(Succeeded._fields)), strict=True))

    def packed(field: str, type_: sa.types.TypeEngine[Any]) -> sa.ColumnElement[Any]:
        return sa.cast(json_at(entry.c.value, positions[field]), type_)

    digest = packed("digest", sa.String(40))
    failed_digest = sa.func.substr(failed.c.custom_id, sa.func.length(failed.c.job_id) + 2)
    answered = sa.select(
        succeeded.c.job_id,
        packed("key", sa.Text()).label("key"),
        succeeded.c.shard,
        sa.cast(succeeded.c.job_id + "-" + digest, failed.c.custom_id.type).label("custom_id"),
        digest.label("digest"),
        succeeded.c.asked,
        sa.cast(sa.literal(RequestStatus.SUCCEEDED.value), failed.c.status.type).label("status"),
        sa.cast(sa.null(), failed.c.error_type.type).label("error_type"),
        sa.cast(sa.null(), failed.c.error_message.type).label("error_message"),
        packed("batch_cost", sa.BigInteger()).label("batch_cost_picousd"),
        packed("standard_cost", sa.BigInteger()).label("standard_cost_picousd"),
    ).select_from(succeeded.join(entry, sa.true()))
    others = sa.select(*(failed_digest if c.name == "digest" else failed.c[c.name] for c in answered.selected_columns))
    return sa.union_all(answered, others)


def spend() -> sa.Select[Any]:
    """``batchkit_spend``."""
    group = (utc_day(batch.c.created_at).label("day"), job.c.dag_id, job.c.task_id, bill.c.model)
    unpriced = sa.case((bill.c.batch_cost_picousd.is_(None), bill.c.requests), else_=0)
    inner = (
        sa.select(
            *group,
            sa.func.count().label("batches"),
            sa.func.sum(bill.c.requests).label("requests"),
            *(sa.func.sum(bill.c[name]).label(name) for name in COUNTERS),
            sa.func.sum(unpriced).label("unpriced_requests"),
            *(_known_sum(bill.c[name], bill.c.model).label(name) for name in ("batch_cost_picousd", "standard_cost_picousd")),
        )
        .join(batch, (batch.c.job_id == bill.c.job_id) & (batch.c.shard == bill.c.shard))
        .join(job, job.c.job_id == bill.c.job_id)
        .group_by(*group)
    )
    return _with_money(inner.subquery("spend"))


def summary() -> sa.Select[Any]:
    """``batchkit_summary``. A time of the API's clock and a time of ours are never subtracted from each other.

    ``rendering_s`` is the time of reading and rendering the source. ``submitting_s`` is the time from the journaled intent to the journaled
    batch id, summed over the batches. ``waiting_s`` is the time from the first batch's creation to the last one's end, and ``landing_s``
    is the time of writing the results. ``source_rows`` counts each row once. ``requests``, and ``shared_rows``, which another row's request
    has answered, are counted in every round that asked them; ``dedupe_hit_ratio`` is the share of shared rows in all rows asked, 0 to 1.
    ``unchanged_rows`` were not asked because an earlier run had answered them; ``skip_hit_ratio`` is their share. All columns but
    ``open_batches`` and these last two count landed batches only.
    """
    is_landed = batch.c.state == BatchState.LANDED.value

    def landed(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        return sa.case((is_landed, column))

    dead = [state.value for state in (BatchState.REJECTED, BatchState.VOID, BatchState.GONE)]
    identity = (job.c.job_id, job.c.dag_id, job.c.run_id, job.c.task_id, job.c.map_index, job.c.created_at)
    unchanged = sa.func.coalesce(job.c.unchanged_rows, 0)
    nothing_sent = sa.func.count(batch.c.shard) == 0
    requests, rows = sa.func.sum(landed(batch.c.requests)), sa.func.sum(landed(batch.c.source_rows))
    first_round = sa.case((batch.c.round == 1, batch.c.source_rows), else_=0)
    waited = seconds_between(sa.func.min(landed(batch.c.created_at)), sa.func.max(landed(batch.c.ended_at)))
    inner = (
        sa.select(
            *identity,
            sa.func.count(landed(batch.c.shard)).label("batches"),
            (sa.func.count(batch.c.shard) - sa.func.count(landed(batch.c.shard))).label("open_batches"),
            sa.func.max(landed(batch.c.round)).label("rounds"),
            sa.func.sum(landed(first_round)).label("source_rows"),
            requests.label("requests"),
            (rows - requests).label("shared_rows"),
            (sa.cast(rows - requests, sa.Double()) / sa.func.nullif(rows, 0)).label("dedupe_hit_ratio"),
            unchanged.label("unchanged_rows"),
            (sa.cast(unchanged, sa.Double()) / sa.func.nullif(unchanged + sa.func.coalesce(rows, 0), 0)).label("skip_hit_ratio"),
            _seconds(job.c.rendering_ms).label("rendering_s"),
            sa.func.sum(landed(seconds_between(batch.c.intended_at, batch.c.submitted_at))).label("submitting_s"),
            waited.label("waiting_s"),
            _seconds(sa.func.sum(landed(batch.c.landing_ms))).label("landing_s"),
            *(
                sa.case((nothing_sent, 0), else_=_known_sum(landed(batch.c[name]), landed(batch.c.shard))).label(name)
                for name in ("batch_cost_picousd", "standard_cost_picousd")
            ),
        )
        .outerjoin(batch, (batch.c.job_id == job.c.job_id) & batch.c.state.not_in(dead))
        .where(batch.c.shard.is_not(None) | (unchanged > 0))
        .group_by(*identity, job.c.rendering_ms, job.c.unchanged_rows)
    )
    return _with_money(inner.subquery("summary"))


def latency() -> sa.Select[Any]:
    """``batchkit_latency``. A percentile is the smallest latency that so many per cent of the batches did not exceed (nearest rank)."""
    day, took = utc_day(batch.c.created_at).label("day"), seconds_between(batch.c.created_at, batch.c.ended_at).label("seconds")
    times = (
        sa.select(day, job.c.dag_id, took)
        .join(job, job.c.job_id == batch.c.job_id)
        .where(batch.c.state == BatchState.LANDED.value, batch.c.ended_at.is_not(None))
        .subquery("times")
    )
    group = (times.c.day, times.c.dag_id)
    ranked = sa.select(
        *times.c,
        sa.func.row_number().over(partition_by=group, order_by=times.c.seconds).label("position"),
        sa.func.count().over(partition_by=group).label("batches"),
    ).subquery("ranked")

    def percentile(percent: int) -> sa.ColumnElement[Any]:
        return sa.func.min(sa.case((ranked.c.position * 100 >= ranked.c.batches * percent, ranked.c.seconds)))

    return sa.select(
        ranked.c.day,
        ranked.c.dag_id,
        sa.func.count().label("batches"),
        percentile(50).label("p50_s"),
        percentile(95).label("p95_s"),
        sa.func.max(ranked.c.seconds).label("max_s"),
    ).group_by(ranked.c.day, ranked.c.dag_id)


VIEWS = {"batchkit_request": requests, "batchkit_spend": spend, "batchkit_summary": summary, "batchkit_latency": latency}


def view_statements(dialect: Dialect) -> list[str]:
    """The statements that create the views on a database of ``DIALECTS``; none for another."""
    if dialect.name not in DIALECTS:
        return []
    return [
        f"CREATE VIEW {name} AS\n{view().compile(dialect=dialect, compile_kwargs={'literal_binds': True})}" for name, view in VIEWS.items()
    ]


def create_views(connection: Connection) -> None:
    """Create the views, in the connection's transaction."""
    for name in VIEWS:
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")
    for statement in view_statements(connection.dialect):
        connection.exec_driver_sql(statement)

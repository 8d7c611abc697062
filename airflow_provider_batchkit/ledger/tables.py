"""The ledger's tables. Money is whole picodollars (1e-12 USD) in BIGINT: exact, and sums in SQL are exact too.

``batchkit_job``       one row per task instance of a DAG run
``batchkit_batch``     one row per attempt to create a batch, with its state and, once landed, its bill
``batchkit_request``   one row per source row: its key, the request that asks for it, and the outcome
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

#: of the tables' layout; written to ``batchkit_version``
VERSION = 1


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime; SQLite keeps it as naive UTC text, other databases with their time zone type."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = sa.MetaData()

_KEY = sa.Text().with_variant(sa.String(512), "mysql", "mariadb")

version = sa.Table("batchkit_version", metadata, sa.Column("version", sa.Integer, primary_key=True))

job = sa.Table(
    "batchkit_job",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("dag_id", sa.String(250), nullable=False),
    sa.Column("run_id", sa.String(250), nullable=False),
    sa.Column("task_id", sa.String(250), nullable=False),
    sa.Column("map_index", sa.Integer, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    # counts attempts; only the latest may send
    sa.Column("lease", sa.Integer, nullable=False),
    # [[column, type], ...] of the source's key, for the result table
    sa.Column("key_columns", sa.Text, nullable=False),
)

batch = sa.Table(
    "batchkit_batch",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("batch_id", sa.String(100), unique=True),
    sa.Column("anthropic_conn_id", sa.String(250), nullable=False),
    sa.Column("state", sa.String(10), nullable=False),
    # the id was taken by a settling while the batch ran: a guess, until its results prove it
    sa.Column("adopted", sa.Boolean, nullable=False, default=False),
    sa.Column("requests", sa.Integer, nullable=False),
    sa.Column("body_bytes", sa.BigInteger, nullable=False),
    sa.Column("intended_at", UtcDateTime, nullable=False),
    # the API's clock
    sa.Column("created_at", UtcDateTime),
    sa.Column("ended_at", UtcDateTime),
    # ours
    sa.Column("landed_at", UtcDateTime),
    sa.Column("landed_table", sa.String(250)),
    # requests per outcome, JSON
    sa.Column("counts", sa.Text),
    # CostTally, JSON
    sa.Column("tally", sa.Text),
    sa.Column("batch_cost_picousd", sa.BigInteger),
    sa.Column("standard_cost_picousd", sa.BigInteger),
    # why it was rejected or void
    sa.Column("note", sa.Text),
    # of a void row: the id that it had adopted wrongly, and the shard that has its requests since
    sa.Column("adopted_id", sa.String(100)),
    sa.Column("replaced_by", sa.Integer),
)

request = sa.Table(
    "batchkit_request",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("key", _KEY, primary_key=True),
    sa.Column("shard", sa.Integer, nullable=False),
    sa.Column("custom_id", sa.String(64), nullable=False),
    sa.Column("digest", sa.String(40), nullable=False),
    # true when this row's request is in the batch's body, false when it shares another row's
    sa.Column("asked", sa.Boolean, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("error_type", sa.String(100)),
    sa.Column("error_message", sa.Text),
    # null while pending, and where the model has no known price; zero for a row that shares another row's request
    sa.Column("batch_cost_picousd", sa.BigInteger),
    sa.Column("standard_cost_picousd", sa.BigInteger),
    sa.Index("batchkit_request_shard", "job_id", "shard"),
    # every row is updated once, when its batch lands: with room for the new version on its own page no index is touched (PostgreSQL
    # documentation, "Heap-Only Tuples"), which makes the update of 100,000 rows three times faster
    postgresql_with={"fillfactor": 45},
)

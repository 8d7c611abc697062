"""The ledger's tables. Money is whole picodollars (1e-12 USD) in BIGINT: exact, and sums in SQL are exact too.

``batchkit_job``       one row per task instance of a DAG run
``batchkit_batch``     one row per attempt to create a batch, with its state and, once landed, its bill
``batchkit_journal``   what each batch asks, written before it is sent: some thousand source rows in a row
``batchkit_succeeded`` the source rows that have been answered, some hundred of them in a row
``batchkit_failed``    one row per source row that has landed without an answer that can be used, by the last batch that asked for it
``batchkit_bill``      one row per landed batch and model: its tokens and what they cost
``batchkit_budget``    one row per budget, with the cap that was last given for it; its books are the rows of ``batchkit_batch``
``batchkit_budget_hold``  one row per attempt that is about to send: what it holds of a budget and has not journaled yet
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

#: of the tables' layout; written to ``batchkit_version``
VERSION = 3


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


#: room for a piece of the journal, whose last line may be long
_PART_BYTES = 1 << 22

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
    # the JSON Schema that its answers are to fit, as it was given; null for plain text
    sa.Column("output_schema", sa.Text),
    # reading and rendering the source took so long, in all attempts that sent anything
    sa.Column("rendering_ms", sa.BigInteger),
    # rows of the source that the latest attempt left out, since an earlier run had answered their very request
    sa.Column("unchanged_rows", sa.BigInteger),
    # so many rounds of asking have been sent whole
    sa.Column("rounds_sent", sa.Integer, nullable=False, default=0),
)

batch = sa.Table(
    "batchkit_batch",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("batch_id", sa.String(100), unique=True),
    sa.Column("anthropic_conn_id", sa.String(250), nullable=False),
    sa.Column("state", sa.String(10), nullable=False),
    # 1 for what the job asks first; a later round asks again what failed in the rounds before it
    sa.Column("round", sa.Integer, nullable=False, default=1),
    # the id was taken by a settling while the batch ran: a guess, until its results prove it
    sa.Column("adopted", sa.Boolean, nullable=False, default=False),
    sa.Column("requests", sa.Integer, nullable=False),
    sa.Column("body_bytes", sa.BigInteger, nullable=False),
    sa.Column("intended_at", UtcDateTime, nullable=False),
    # the API's clock
    sa.Column("created_at", UtcDateTime),
    sa.Column("ended_at", UtcDateTime),
    # ours: the batch id was journaled; its landing began, and took so long
    sa.Column("submitted_at", UtcDateTime),
    sa.Column("landed_at", UtcDateTime),
    sa.Column("landing_ms", sa.BigInteger),
    sa.Column("landed_table", sa.String(250)),
    # rows per outcome, JSON, and all of them: rows that share a request count each
    sa.Column("counts", sa.Text),
    sa.Column("source_rows", sa.BigInteger),
    # CostTally, JSON
    sa.Column("tally", sa.Text),
    sa.Column("batch_cost_picousd", sa.BigInteger),
    sa.Column("standard_cost_picousd", sa.BigInteger),
    # the most that it can cost and the most tokens it can use; null where nothing bounds it
    sa.Column("bound_picousd", sa.BigInteger),
    sa.Column("bound_tokens", sa.BigInteger),
    # the budget that it counts in, and the time that decides the window
    sa.Column("budget", sa.String(250)),
    sa.Column("budget_at", UtcDateTime),
    # prompt tokens, cached or not, and output tokens, once landed
    sa.Column("billed_tokens", sa.BigInteger),
    # why it was rejected or void
    sa.Column("note", sa.Text),
    # of a void row: the id that it had adopted wrongly, and the shard that has its requests since
    sa.Column("adopted_id", sa.String(100)),
    sa.Column("replaced_by", sa.Integer),
    sa.Index("batchkit_batch_budget", "budget", "budget_at"),
)

journal = sa.Table(
    "batchkit_journal",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("part", sa.Integer, primary_key=True),
    # JSON lines [key, custom_id, bytes in the body]; 0 bytes for a row that shares another row's request
    sa.Column("entries", sa.LargeBinary(_PART_BYTES), nullable=False),
)

succeeded = sa.Table(
    "batchkit_succeeded",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("part", sa.Integer, primary_key=True),
    # true when these rows' requests are in the batch's body, false when they share others'
    sa.Column("asked", sa.Boolean, nullable=False),
    sa.Column("source_rows", sa.Integer, nullable=False),
    # a JSON array of [key, digest, batch cost, standard cost]; the custom_id is the job's id, a dash and the digest
    sa.Column("entries", sa.Text().with_variant(sa.Text(_PART_BYTES), "mysql", "mariadb"), nullable=False),
)

failed = sa.Table(
    "batchkit_failed",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("key", _KEY, primary_key=True),
    sa.Column("shard", sa.Integer, nullable=False),
    sa.Column("custom_id", sa.String(64), nullable=False),
    # true when this row's request is in the batch's body, false when it shares another row's
    sa.Column("asked", sa.Boolean, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("error_type", sa.String(100)),
    sa.Column("error_message", sa.Text),
    # picodollars; null where the model has no known price; zero for a row that shares another row's request
    sa.Column("batch_cost_picousd", sa.BigInteger),
    sa.Column("standard_cost_picousd", sa.BigInteger),
    sa.Index("batchkit_failed_shard", "job_id", "shard"),
)


def keep_entries_plain(table: sa.Table) -> None:
    """Have PostgreSQL store ``entries`` as they are: compressing them halves them, and takes five times as long as writing them."""
    plain = sa.DDL("ALTER TABLE %(fullname)s ALTER COLUMN entries SET STORAGE EXTERNAL")  # type: ignore[no-untyped-call]
    sa.event.listen(table, "after_create", plain.execute_if(dialect="postgresql"))


keep_entries_plain(journal)
keep_entries_plain(succeeded)

bill = sa.Table(
    "batchkit_bill",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("shard", sa.Integer, primary_key=True),
    # the name that the API reported
    sa.Column("model", sa.String(200), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("input_tokens", sa.BigInteger, nullable=False),
    sa.Column("output_tokens", sa.BigInteger, nullable=False),
    sa.Column("cache_write_5m_tokens", sa.BigInteger, nullable=False),
    sa.Column("cache_write_1h_tokens", sa.BigInteger, nullable=False),
    sa.Column("cache_read_tokens", sa.BigInteger, nullable=False),
    sa.Column("web_searches", sa.BigInteger, nullable=False),
    # null where the model has no known price
    sa.Column("batch_cost_picousd", sa.BigInteger),
    sa.Column("standard_cost_picousd", sa.BigInteger),
)

budget = sa.Table(
    "batchkit_budget",
    metadata,
    sa.Column("name", sa.String(250), primary_key=True),
    sa.Column("window", sa.String(10), nullable=False),
    sa.Column("cap_picousd", sa.BigInteger),
    sa.Column("cap_tokens", sa.BigInteger),
    sa.Column("asked_at", UtcDateTime, nullable=False),
)

budget_hold = sa.Table(
    "batchkit_budget_hold",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("lease", sa.Integer, nullable=False),
    sa.Column("budget", sa.String(250), nullable=False),
    sa.Column("picousd", sa.BigInteger, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("budget_at", UtcDateTime, nullable=False),
    # the attempt's last sign of life
    sa.Column("held_at", UtcDateTime, nullable=False),
    sa.Index("batchkit_budget_hold_budget", "budget"),
)

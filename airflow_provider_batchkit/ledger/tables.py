"""The ledger's tables. Money is whole picodollars (1e-12 USD) in BIGINT, so amounts and their sums in SQL are exact.

``batchkit_job``       one row per task instance of a DAG run
``batchkit_batch``     one row per attempt to create a batch, with its state and, once landed, its bill
``batchkit_journal``   the requests of each batch, written before it is sent; one row holds some thousand source rows
``batchkit_succeeded`` the source rows that have a whole answer; one row holds some hundred of them
``batchkit_failed``    one row per source row that has landed without a whole, usable answer, from the last batch that asked for it
``batchkit_bill``      one row per landed batch and model: its tokens and their cost
``batchkit_budget``    one row per budget, with the cap that was last given for it; its books are the rows of ``batchkit_batch``
``batchkit_budget_hold``  one row per attempt that is about to send: the part of a budget that it holds and has not journaled yet
``batchkit_alert``     one row per alert of a budget that was sent or is being sent: budget, window, threshold and notifier
``batchkit_late``      one row per alert of late batches that was sent or is being sent: task and notifier
``batchkit_landing``   one row per batch, table and landing number: what a fetch wrote to a result table
``batchkit_load``      one row per fetch that lands in a table of another database, with its state
``batchkit_prepared``  what such a fetch will write to the ledger once its rows are in the table
``batchkit_turn``      one row per table of another database: the load that may publish there now
``batchkit_former_id`` one row per batch id under which the tasks of an older version of the ledger know a batch row
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

#: the version of the tables' layout, which is written to ``batchkit_version``
VERSION = 6


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime. SQLite stores it as naive UTC text, other databases in their type with a time zone."""

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


#: size of a part of the journal in bytes, with room for a long last line
_PART_BYTES = 1 << 22

metadata = sa.MetaData()

_KEY = sa.Text().with_variant(sa.String(512), "mysql", "mariadb")

version = sa.Table(
    "batchkit_version",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True),
    # a random id: two deployments that run the same DAG in one workspace must not have equal job ids
    sa.Column("ledger_id", sa.String(32), nullable=False),
    # the last turn that was taken at a table of another database
    sa.Column("turns", sa.BigInteger),
)

job = sa.Table(
    "batchkit_job",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("dag_id", sa.String(250), nullable=False),
    sa.Column("run_id", sa.String(250), nullable=False),
    sa.Column("task_id", sa.String(250), nullable=False),
    sa.Column("map_index", sa.Integer, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    # counts how often an attempt has opened the job; only the latest opening may send
    sa.Column("lease", sa.Integer, nullable=False),
    # the youngest attempt that has opened the job, by its task instance's id: a UUIDv7, so a younger attempt has a greater id
    sa.Column("attempt_id", sa.String(36)),
    # whether its task leaves out rows that an earlier run has answered: the job then asks only part of the source's rows
    sa.Column("skip_unchanged", sa.Boolean),
    # a digest of what a mapped task instance asks and where it lands; null for other tasks and for a row of version 5
    sa.Column("asked", sa.String(64)),
    # JSON: [[column, type], ...] of the source's key, for the result table
    sa.Column("key_columns", sa.Text, nullable=False),
    # the JSON Schema that its answers must fit, as the user gave it; null for plain text
    sa.Column("output_schema", sa.Text),
    # the time of reading and rendering the source, summed over all attempts that sent anything
    sa.Column("rendering_ms", sa.BigInteger),
    # source rows that the latest attempt left out because an earlier run had answered the same request
    sa.Column("unchanged_rows", sa.BigInteger),
    # the number of rounds that have been sent whole
    sa.Column("rounds_sent", sa.Integer, nullable=False, default=0),
    sa.Index("batchkit_job_task", "dag_id", "run_id", "task_id", "map_index", unique=True),
)

batch = sa.Table(
    "batchkit_batch",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("batch_id", sa.String(100), unique=True),
    sa.Column("anthropic_conn_id", sa.String(250), nullable=False),
    # the workspace that it was sent to, by the API's name, or a digest of the connection's address and credentials where the API did not
    # tell; null for a row of version 5
    sa.Column("workspace", sa.String(100)),
    sa.Column("state", sa.String(10), nullable=False),
    # 1 for the first round; a later round asks again what failed in the rounds before it
    sa.Column("round", sa.Integer, nullable=False, default=1),
    sa.Column("requests", sa.Integer, nullable=False),
    sa.Column("body_bytes", sa.BigInteger, nullable=False),
    # when the row was written, and when its sender was found dead or gave the POST up; this and the next two are by the database's clock
    sa.Column("intended_at", UtcDateTime, nullable=False),
    sa.Column("doubt_at", UtcDateTime),
    # the first and the last of an unbroken series of looks that showed no candidate for a row in doubt, or a 404 for a submitted batch
    sa.Column("unseen_since", UtcDateTime),
    sa.Column("unseen_at", UtcDateTime),
    # the batch's creation and end, by the API's clock
    sa.Column("created_at", UtcDateTime),
    sa.Column("ended_at", UtcDateTime),
    # when this package deleted the batch from the API, by our clock
    sa.Column("deleted_at", UtcDateTime),
    # by our clock: when the batch id was journaled, when the landing began, and how long it took
    sa.Column("submitted_at", UtcDateTime),
    sa.Column("landed_at", UtcDateTime),
    sa.Column("landing_ms", sa.BigInteger),
    sa.Column("landed_table", sa.String(250)),
    # JSON: rows per outcome, and the number of all rows; each row that shares a request counts
    sa.Column("counts", sa.Text),
    sa.Column("source_rows", sa.BigInteger),
    # JSON of a CostTally
    sa.Column("tally", sa.Text),
    sa.Column("batch_cost_picousd", sa.BigInteger),
    sa.Column("standard_cost_picousd", sa.BigInteger),
    # the upper bounds of its cost and its tokens; null where nothing bounds it
    sa.Column("bound_picousd", sa.BigInteger),
    sa.Column("bound_tokens", sa.BigInteger),
    # the budget that it counts in, and the time that decides the window
    sa.Column("budget", sa.String(250)),
    sa.Column("budget_at", UtcDateTime),
    # prompt tokens, cached or not, and output tokens, once landed
    sa.Column("billed_tokens", sa.BigInteger),
    # the reason why it was rejected, void or gone
    sa.Column("note", sa.Text),
    sa.Index("batchkit_batch_budget", "budget", "budget_at"),
)

journal = sa.Table(
    "batchkit_journal",
    metadata,
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("part", sa.Integer, primary_key=True),
    # JSON lines [key, custom_id, bytes in the body]; a row that shares another row's request has 0 bytes
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
    # JSON: an array of [key, digest, batch cost, standard cost]; the custom_id is the job's id, a dash and the digest
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
    """Make PostgreSQL store ``entries`` uncompressed: compression halves their size but takes five times as long as writing them."""
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
    # when the attempt last reserved or drew
    sa.Column("held_at", UtcDateTime, nullable=False),
    sa.Index("batchkit_budget_hold_budget", "budget"),
)

alert = sa.Table(
    "batchkit_alert",
    metadata,
    sa.Column("budget", sa.String(250), primary_key=True),
    sa.Column("window", sa.String(10), primary_key=True),
    # the first moment of the window; the beginning of 1970 for one that never ends
    sa.Column("window_start", UtcDateTime, primary_key=True),
    # the share of the cap, in hundredths of a percent
    sa.Column("threshold", sa.Integer, primary_key=True),
    # its position in the budget's list
    sa.Column("notifier", sa.Integer, primary_key=True),
    # when a task claimed the alert, and when its notifier had taken it, by the database's clock
    sa.Column("claimed_at", UtcDateTime, nullable=False),
    sa.Column("told_at", UtcDateTime),
)

late = sa.Table(
    "batchkit_late",
    metadata,
    # the job id of the waiting task; for a sensor the id that it would have as a job
    sa.Column("job_id", sa.String(20), primary_key=True),
    # its position in the task's list
    sa.Column("notifier", sa.Integer, primary_key=True),
    # the same times as in batchkit_alert
    sa.Column("claimed_at", UtcDateTime, nullable=False),
    sa.Column("told_at", UtcDateTime),
)

landing = sa.Table(
    "batchkit_landing",
    metadata,
    sa.Column("batch_id", sa.String(100), primary_key=True),
    # the table's name as the database knows it, with its schema
    sa.Column("table_name", sa.String(250), primary_key=True),
    # from 1; a table that was dropped or emptied is filled anew under the next number
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("landed_at", UtcDateTime, nullable=False),
    # rows written to the result table, and how many of them have an answer
    sa.Column("rows_written", sa.BigInteger, nullable=False),
    sa.Column("rows_answered", sa.BigInteger, nullable=False),
    # whether every request had a readable result line, and no line came for a request that was not asked
    sa.Column("complete", sa.Boolean, nullable=False),
    # the same figures as in batchkit_batch, where a batch that was submitted elsewhere has no row
    sa.Column("counts", sa.Text, nullable=False),
    sa.Column("tally", sa.Text, nullable=False),
    sa.Column("created_at", UtcDateTime),
    sa.Column("ended_at", UtcDateTime),
)

load = sa.Table(
    "batchkit_load",
    metadata,
    sa.Column("load_id", sa.String(32), primary_key=True),
    # identifies batches, table and landing number: the same for every load of the same batches under the same landing number
    sa.Column("fetch_id", sa.String(32), nullable=False),
    sa.Column("table_name", sa.String(250), nullable=False),
    # a LoadState
    sa.Column("state", sa.String(10), nullable=False),
    # the task instance's id of the youngest attempt that has opened it
    sa.Column("attempt_id", sa.String(36), nullable=False),
    # the attempt that prepared it last, and how many rows it will publish; null before
    sa.Column("prepared_by", sa.String(36)),
    sa.Column("rows_staged", sa.BigInteger),
    sa.Column("opened_at", UtcDateTime, nullable=False),
    sa.Index("batchkit_load_table", "table_name", "state"),
    sa.Index("batchkit_load_fetch", "fetch_id"),
)

prepared = sa.Table(
    "batchkit_prepared",
    metadata,
    sa.Column("load_id", sa.String(32), primary_key=True),
    # the attempt that prepared this part: an older attempt may publish after a younger one has prepared
    sa.Column("attempt_id", sa.String(36), primary_key=True),
    sa.Column("batch_id", sa.String(100), primary_key=True),
    sa.Column("part", sa.Integer, primary_key=True),
    # "landing": values of batchkit_landing and more; "succeeded", "failed": source rows; "left_out": keys whose other outcome stands
    sa.Column("kind", sa.String(10), nullable=False),
    # the same meaning as in batchkit_succeeded
    sa.Column("asked", sa.Boolean),
    sa.Column("source_rows", sa.Integer),
    # JSON
    sa.Column("entries", sa.Text().with_variant(sa.Text(_PART_BYTES), "mysql", "mariadb"), nullable=False),
)

turn = sa.Table(
    "batchkit_turn",
    metadata,
    sa.Column("table_name", sa.String(250), primary_key=True),
    sa.Column("turn", sa.BigInteger, nullable=False),
    # the load that has the turn; null when the turn is free
    sa.Column("load_id", sa.String(32)),
    # when the turn ends even if its owner has not given it back, by the database's clock
    sa.Column("until", UtcDateTime),
)

former_id = sa.Table(
    "batchkit_former_id",
    metadata,
    sa.Column("batch_id", sa.String(100), primary_key=True),
    sa.Column("job_id", sa.String(20), primary_key=True),
    sa.Column("shard", sa.Integer, nullable=False),
)

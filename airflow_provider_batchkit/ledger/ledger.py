"""Every statement on the ledger, as a named method. Each method that writes is one transaction unless it takes a connection."""

from __future__ import annotations

import json
import secrets
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError

from airflow_provider_batchkit.exceptions import BatchInputError, LandedMeanwhileError, LedgerError
from airflow_provider_batchkit.ledger import budgets, journal, outcomes, results
from airflow_provider_batchkit.ledger.account import Account, bill_columns, write_bill
from airflow_provider_batchkit.ledger.alerts import Alerts
from airflow_provider_batchkit.ledger.bulk import can_store, storage_codec
from airflow_provider_batchkit.ledger.engine import add_schema, clock, prepare_engine, write_transaction
from airflow_provider_batchkit.ledger.history import History
from airflow_provider_batchkit.ledger.leases import hold_lease, lease_lost, refuse_older
from airflow_provider_batchkit.ledger.loads import Loads
from airflow_provider_batchkit.ledger.migrate import OLDEST, migrate
from airflow_provider_batchkit.ledger.moves import BatchMoves
from airflow_provider_batchkit.ledger.outputs import Outputs
from airflow_provider_batchkit.ledger.overview import Overview
from airflow_provider_batchkit.ledger.prune import Pruning
from airflow_provider_batchkit.ledger.reasons import FailedRequests
from airflow_provider_batchkit.ledger.records import BatchRecord, Intent, JobRecord, make_job_id, record_of
from airflow_provider_batchkit.ledger.results import Results
from airflow_provider_batchkit.ledger.rollup import create_views
from airflow_provider_batchkit.ledger.spending import Spending
from airflow_provider_batchkit.ledger.states import NEVER_ACCEPTED, BatchState
from airflow_provider_batchkit.ledger.tables import VERSION, batch, former_id, job, landing, metadata, version
from airflow_provider_batchkit.model import CostTally
from airflow_provider_batchkit.request.dedupe import Known
from airflow_provider_batchkit.request.shards import IndexEntry, Shard, index_parts

#: finds the schema in which statements find the ledger's tables
_LEDGER_SCHEMA = sa.text(
    "SELECT n.nspname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
    " WHERE c.oid = to_regclass('batchkit_version')"
)


class Ledger(BatchMoves, Loads, Results, FailedRequests, Account, budgets.Budgets, Alerts, History, Outputs, Pruning):
    """The door to the ``batchkit_*`` tables of one database."""

    def __init__(self, engine: Engine, schema: str | None = None) -> None:
        """:param schema: the PostgreSQL schema of a ledger that lies elsewhere than where the connection creates its tables"""
        self.engine = prepare_engine(engine)
        self._schema = schema
        if schema is not None:
            add_schema(self.engine, schema)

    def ensure(self) -> None:
        """Create the tables and the roll-up's views where they are missing, and migrate them from an older version. Several tasks may do so
        at once.

        :raises LedgerError: when the tables are of a version that cannot be migrated, or of a newer one
        """
        for attempt in (1, 2, 3):
            try:
                with write_transaction(self.engine) as connection:
                    if self._schema is not None:
                        _enter(connection, self._schema)
                    found = _version(connection)
                    if found is not None and OLDEST <= found < VERSION:
                        migrate(connection, found)
                    if found is None or OLDEST <= found <= VERSION:
                        metadata.create_all(connection)
                    if found is None:
                        connection.execute(sa.insert(version).values(version=VERSION, ledger_id=secrets.token_hex(16)))
                    if found is None or OLDEST <= found < VERSION:
                        create_views(connection)
                        found = VERSION
                break
            except DBAPIError:
                # another task created or migrated them between our check and our statement
                if attempt == 3:
                    raise
        if found != VERSION:
            raise LedgerError(
                f"The ledger's tables are of version {found}, this provider reads versions {OLDEST} to {VERSION}. Nothing was sent. Use "
                "the provider that made them, or let it land what still runs and then rename the batchkit_ tables and views."
            )

    def exists(self) -> bool:
        """Whether the tables are there."""
        return sa.inspect(self.engine).has_table(job.name)

    def version(self) -> int | None:
        """The version of the tables; None where they are missing."""
        with self.engine.connect() as connection:
            return _version(connection)

    @property
    def overview(self) -> Overview:
        """What people look at: jobs, batches, and why rows failed."""
        return Overview(self.engine)

    @property
    def spending(self) -> Spending:
        """What people look at: costs, budgets and latencies."""
        return Spending(self.engine)

    def knows_task(self, dag_id: str, task_id: str) -> int:
        """How many jobs of a task the ledger has."""
        if not self.exists():
            return 0
        jobs = sa.select(sa.func.count()).select_from(job).where(job.c.dag_id == dag_id, job.c.task_id == task_id)
        with self.engine.connect() as connection:
            return int(connection.execute(jobs).scalar_one())

    def now(self) -> datetime:
        """The time by the database's clock."""
        with self.engine.connect() as connection:
            return clock(connection)

    # --- jobs ---------------------------------------------------------------------------------------------------------------------

    def identify(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> JobRecord:
        """The job of a task instance. A job that is in the ledger keeps its id, even when the ledger was migrated or moved."""
        here = (job.c.dag_id == dag_id) & (job.c.run_id == run_id) & (job.c.task_id == task_id) & (job.c.map_index == map_index)
        known = ledger_id = None
        if self.exists():
            with self.engine.connect() as connection:
                known = connection.execute(sa.select(job.c.job_id).where(here)).scalar()
                ledger_id = connection.execute(sa.select(version.c.ledger_id)).scalar()
        return JobRecord(known or make_job_id(ledger_id or "", dag_id, run_id, task_id, map_index), dag_id, run_id, task_id, map_index)

    def open_job(self, record: JobRecord, attempt_id: str) -> int:
        """Begin an attempt of a job, or continue one: create the job's row or take over its lease. Batch rows that a sender left as
        ``sending`` are in doubt from now on.

        :param attempt_id: a UUIDv7 in its text form: a younger attempt has a greater one
        :returns: the lease, to be shown at every intent
        :raises LeaseLostError: when a younger attempt has opened the job
        """
        try:
            return self._take_lease(record, attempt_id)
        except IntegrityError:
            # another first attempt created the row between our SELECT and our INSERT
            return self._take_lease(record, attempt_id)

    def _take_lease(self, record: JobRecord, attempt_id: str) -> int:
        here = job.c.job_id == record.job_id
        with write_transaction(self.engine) as connection:
            locked = connection.execute(sa.update(job).where(here).values(lease=job.c.lease + 1))
            if locked.rowcount == 0:
                connection.execute(
                    sa.insert(job).values(
                        job_id=record.job_id,
                        dag_id=record.dag_id,
                        run_id=record.run_id,
                        task_id=record.task_id,
                        map_index=record.map_index,
                        created_at=clock(connection),
                        lease=1,
                        key_columns="[]",
                        rounds_sent=0,
                    )
                )
            found = connection.execute(sa.select(job.c.lease, job.c.attempt_id).where(here)).one()
            refuse_older(record.job_id, attempt_id, found.attempt_id)
            if found.attempt_id != attempt_id:
                connection.execute(sa.update(job).where(here).values(attempt_id=attempt_id))
                # a batch may have appeared while no attempt looked, so a younger attempt begins a new series of looks
                unsettled = (batch.c.job_id == record.job_id) & (batch.c.state == BatchState.SENDING.value)
                connection.execute(sa.update(batch).where(unsettled).values(unseen_since=None, unseen_at=None))
            self._doubt(connection, batch.c.job_id == record.job_id)
            return int(found.lease)

    def set_key_columns(self, job_id: str, columns: Sequence[tuple[str, str]], characters: Mapping[str, str] | None = None) -> None:
        """Note (column, type) of the source's key, which fetch needs for the result table.

        :param characters: each character that occurs in the keys → a key that contains it
        :raises BatchInputError: when the database cannot store a character, since the key would land as a different one; or when the job
            has already asked rows by other columns
        """
        with write_transaction(self.engine) as connection:
            self._refuse_another_key(connection, job_id, [name for name, _ in columns])
            codec = storage_codec(connection)
            lacking = next((key for character, key in (characters or {}).items() if codec and not can_store(character, codec)), None)
            if lacking is not None:
                raise BatchInputError(
                    f"The key {lacking!r} has a character that the database of the results cannot store: its encoding is {codec}. "
                    "Use a database in UTF8, or another key. Nothing was sent."
                )
            connection.execute(sa.update(job).where(job.c.job_id == job_id).values(key_columns=json.dumps(columns)))

    @staticmethod
    def _refuse_another_key(connection: Connection, job_id: str, names: Sequence[str]) -> None:
        """Refuse other key columns. The ledger knows a row by its key's values alone, so other columns or another order mean other rows.

        :raises BatchInputError: when the job has asked rows by other columns
        """
        text = connection.execute(sa.select(job.c.key_columns).where(job.c.job_id == job_id)).scalar_one()
        before = [name for name, _ in json.loads(text)]
        asked = sa.select(batch.c.shard).where(batch.c.job_id == job_id, batch.c.state.not_in(NEVER_ACCEPTED))
        if before and before != list(names) and connection.execute(asked.limit(1)).first() is not None:
            raise BatchInputError(
                f"This task has asked rows in this DAG run by the key ({', '.join(before)}), and its key is now ({', '.join(names)}): the "
                "answers would land under the wrong rows. Nothing was sent by this attempt. Set the key back and clear the task; another "
                "key takes a new DAG run. What was asked can be fetched as it is."
            )

    def key_columns(self, job_id: str) -> list[tuple[str, str]]:
        """(column, type) of the source's key."""
        with self.engine.connect() as connection:
            text = connection.execute(sa.select(job.c.key_columns).where(job.c.job_id == job_id)).scalar_one()
        return [(column, type_name) for column, type_name in json.loads(text)]

    def note_skipping(self, job_id: str, *, skips: bool, asked: str | None = None) -> None:
        """Note whether the job's task leaves out rows that an earlier run has answered, and the digest of what a mapped one asks."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.update(job).where(job.c.job_id == job_id).values(skip_unchanged=skips, asked=asked))

    def skips_unchanged(self, job_id: str) -> bool:
        """Whether the job's task leaves out rows that an earlier run has answered: its batches then hold only part of the source's rows."""
        with self.engine.connect() as connection:
            return bool(connection.execute(sa.select(job.c.skip_unchanged).where(job.c.job_id == job_id)).scalar())

    def check_lease(self, job_id: str, lease: int) -> None:
        """:raises LeaseLostError: when another attempt of the job has begun"""
        with self.engine.connect() as connection:
            current = connection.execute(sa.select(job.c.lease).where(job.c.job_id == job_id)).scalar()
        if current != lease:
            raise lease_lost(job_id, lease)

    # --- requests -----------------------------------------------------------------------------------------------------------------

    def known(self, job_id: str, round_number: int = 1) -> Iterator[Known]:
        """Rows that earlier attempts have in flight or landed in this round of the job, or in a later one.

        :raises BatchInputError: when the job was pruned: the ledger no longer knows which of its rows are paid for
        """
        with self.engine.connect() as connection:
            for shard, state in results.shards(connection, job_id, round_number):
                if journal.last_part(connection, job_id, shard) is None:
                    raise BatchInputError(
                        f"What the job {job_id} has asked was pruned from the ledger, so nothing tells which of its rows are paid for. "
                        "Nothing was sent. To ask them again, and to pay for them again, start a new DAG run."
                    )
                for entry in journal.entries(connection, job_id, shard):
                    yield Known(entry.key, entry.custom_id, shard, state in (BatchState.SENDING, BatchState.SUBMITTED))

    def rows_of(self, record: BatchRecord) -> Iterator[list[IndexEntry]]:
        """Every source row that the batch answers, in pieces."""
        with self.engine.connect() as connection:
            yield from journal.pieces(connection, record.job_id, record.shard)

    def keys_of(self, record: BatchRecord) -> Iterator[str]:
        """The keys of every source row whose request was in the batch."""
        return (entry.key for piece in self.rows_of(record) for entry in piece)

    def unasked(self, record: BatchRecord) -> Iterator[str]:
        """The keys of the batch's rows that no later round of its job has asked."""
        later = {known.key for known in self.known(record.job_id, record.round + 1)}
        return (key for key in self.keys_of(record) if key not in later)

    def last_part(self, record: BatchRecord) -> int | None:
        """The number of the last part of the batch's journal."""
        with self.engine.connect() as connection:
            return journal.last_part(connection, record.job_id, record.shard)

    def asks(self, record: BatchRecord, custom_id: str) -> bool:
        """Whether the batch's body has this request."""
        with self.engine.connect() as connection:
            return journal.asks(connection, record.job_id, record.shard, custom_id)

    def add_copies(self, job_id: str, lease: int, copies: Iterable[tuple[int, bytes]]) -> None:
        """Journal rows that share a request which an earlier attempt has sent and which has not landed.

        :param copies: (the shard of that request, index lines)
        :raises LandedMeanwhileError: when the request has landed by now: these rows would have no answer
        """
        with write_transaction(self.engine) as connection:
            hold_lease(connection, job_id, lease)
            for shard, part in copies:
                running = [state.value for state in (BatchState.SENDING, BatchState.SUBMITTED)]
                here = (batch.c.job_id == job_id) & (batch.c.shard == shard) & batch.c.state.in_(running)
                # the UPDATE locks the batch's row: a landing of the batch waits for this transaction, or this one for the landing
                if connection.execute(sa.update(batch).where(here).values(requests=batch.c.requests)).rowcount == 0:
                    raise LandedMeanwhileError(
                        f"Shard {shard} of job {job_id} landed while rows that share its requests were added to it. Nothing was sent by "
                        "this attempt; the next one asks these rows."
                    )
                journal.write(connection, job_id, shard, [part])

    # --- batches ------------------------------------------------------------------------------------------------------------------

    def next_shard(self, job_id: str) -> int:
        """The number for the job's next shard."""
        with self.engine.connect() as connection:
            last = connection.execute(sa.select(sa.func.max(batch.c.shard)).where(batch.c.job_id == job_id)).scalar()
        return 0 if last is None else last + 1

    def intend(self, job_id: str, lease: int, shard: Shard, intent: Intent) -> None:
        """Journal a shard's requests and its batch as ``sending``. The transaction must be committed before the POST.

        :raises LeaseLostError: when another attempt of the job has begun
        """
        with write_transaction(self.engine) as connection:
            hold_lease(connection, job_id, lease)
            connection.execute(
                sa.insert(batch).values(
                    job_id=job_id,
                    shard=shard.number,
                    anthropic_conn_id=intent.anthropic_conn_id,
                    workspace=intent.workspace,
                    state=BatchState.SENDING.value,
                    round=intent.round_number,
                    requests=shard.requests,
                    body_bytes=shard.bytes,
                    intended_at=clock(connection),
                    **budgets.draw(connection, job_id, lease, intent.bound, intent.budget),
                )
            )
            journal.write(connection, job_id, shard.number, index_parts(shard))

    def batches(self, job_id: str) -> list[BatchRecord]:
        """Every batch row of a job, by shard."""
        with self.engine.connect() as connection:
            return [record_of(row) for row in connection.execute(sa.select(batch).where(batch.c.job_id == job_id).order_by(batch.c.shard))]

    def find(self, batch_id: str) -> BatchRecord | None:
        """The row of a batch id; None for a batch that was submitted elsewhere."""
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(batch).where(batch.c.batch_id == batch_id)).first()
        return record_of(row) if row is not None else None

    def row_of(self, batch_id: str, dag_id: str, run_id: str) -> BatchRecord | None:
        """The row of a batch id as the tasks of a DAG run know it; None for a batch that was submitted elsewhere.

        Tasks that submitted with a ledger of version 3 may know a row by an id that was never proved to be its own.
        """
        former = (
            sa.select(batch)
            .join(former_id, (former_id.c.job_id == batch.c.job_id) & (former_id.c.shard == batch.c.shard))
            .join(job, job.c.job_id == batch.c.job_id)
            .where(former_id.c.batch_id == batch_id, job.c.dag_id == dag_id, job.c.run_id == run_id)
        )
        with self.engine.connect() as connection:
            row = connection.execute(former).first()
        return self.find(batch_id) if row is None else record_of(row)

    def unfinished(self, record: BatchRecord | None) -> dict[str, int]:
        """How many rows of a landed batch have an unfinished last answer, per ``error_type``; empty for a batch submitted elsewhere."""
        if record is None:
            return {}
        with self.engine.connect() as connection:
            return outcomes.count_unfinished(connection, record.job_id, record.shard)

    def deleted_after_landing(self, batch_ids: Sequence[str]) -> list[tuple[BatchRecord, dict[str, int]]]:
        """Those of the batches that have landed and that this package has deleted from the API since, each with its rows per outcome."""
        if not self.exists():
            return []
        landed = sa.select(batch).where(batch.c.batch_id.in_(batch_ids), batch.c.state == BatchState.LANDED.value)
        with self.engine.connect() as connection:
            rows = connection.execute(landed.where(batch.c.deleted_at.is_not(None))).all()
        return [(record_of(row), json.loads(row.counts)) for row in rows]

    def written_again(self, records: Iterable[BatchRecord], *, include_failed: bool) -> int:
        """How many rows of these landed batches have the key of another row of theirs. Two tasks may have equal keys."""
        keys = array("q")
        with self.engine.connect() as connection:
            for record in records:
                # eight bytes a key, whatever its length
                keys.extend(map(hash, outcomes.written_keys(connection, record.job_id, record.shard, include_failed=include_failed)))
        return sum(one == other for one, other in pairwise(sorted(keys)))

    def answered_batches(self, job_id: str) -> list[BatchRecord]:
        """The job's batches that have landed with an answer."""
        answers = sa.exists().where(landing.c.batch_id == batch.c.batch_id, landing.c.rows_answered > 0)
        with self.engine.connect() as connection:
            return [record_of(row) for row in connection.execute(sa.select(batch).where(batch.c.job_id == job_id, answers))]

    def claims(self, batch_ids: Sequence[str]) -> dict[str, BatchRecord]:
        """Batch id → row, for each of the ids that the ledger has."""
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(batch).where(batch.c.batch_id.in_(batch_ids)))
            return {row.batch_id: record_of(row) for row in rows}

    def get(self, job_id: str, shard: int) -> BatchRecord:
        """One batch row."""
        with self.engine.connect() as connection:
            return record_of(connection.execute(sa.select(batch).where(batch.c.job_id == job_id, batch.c.shard == shard)).one())

    def landed(self, connection: Connection, record: BatchRecord, tally: CostTally, values: Mapping[str, Any]) -> None:
        """Move a batch to ``landed``, with its bill, inside the landing's own transaction.

        The UPDATE is also a lock: a second landing of the batch waits here.
        """
        more = {**bill_columns(tally), **budgets.settled(connection, record.job_id, record.shard, tally)}
        self._move(connection, record.job_id, record.shard, BatchState.LANDED, unseen_since=None, unseen_at=None, **values, **more)
        write_bill(connection, record.job_id, record.shard, tally)


def _enter(connection: Connection, schema: str) -> None:
    """Make this transaction create its tables and views in a schema.

    :raises LedgerError: when there is no such schema, or another ledger would hide the one in it
    """
    if schema not in sa.inspect(connection).get_schema_names():
        raise LedgerError(f"[batchkit] ledger_schema is {schema!r}, and the database has no such schema. Create it. Nothing was sent.")
    other = connection.execute(_LEDGER_SCHEMA).scalar()
    if other not in (None, schema):
        raise LedgerError(
            f"[batchkit] ledger_schema is {schema!r}, and the schema {other!r} of the same connection has a ledger, too. Move that one "
            f"(ALTER TABLE {other}.batchkit_… SET SCHEMA {schema} for each of its tables and views), or rename its tables. Nothing was "
            "sent."
        )
    quoted = connection.dialect.identifier_preparer.quote_identifier(schema)
    connection.exec_driver_sql(f"SET LOCAL search_path TO {quoted}")


def _version(connection: Connection) -> int | None:
    """The version of the tables; None where they are missing."""
    if not sa.inspect(connection).has_table(version.name):
        return None
    return connection.execute(sa.select(version.c.version)).scalar()

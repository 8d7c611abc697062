"""Every statement on the ledger, each under a name. Each method that writes is one transaction unless it takes a connection."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row
from sqlalchemy.exc import DBAPIError, IntegrityError

from airflow_provider_batchkit.budget import Budget
from airflow_provider_batchkit.exceptions import LedgerError
from airflow_provider_batchkit.ledger import budgets, journal, rounds
from airflow_provider_batchkit.ledger.account import bill_columns, write_bill
from airflow_provider_batchkit.ledger.engine import prepare_engine, write_transaction
from airflow_provider_batchkit.ledger.leases import hold_lease, lease_lost
from airflow_provider_batchkit.ledger.rollup import create_views
from airflow_provider_batchkit.ledger.states import BatchState, check_move, sources_of
from airflow_provider_batchkit.ledger.tables import VERSION, batch, job, metadata, version
from airflow_provider_batchkit.model import BatchSnapshot, Bound, CostTally
from airflow_provider_batchkit.shards import IndexEntry, Shard, index_parts


def make_job_id(dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str:
    """20 hex characters that name a task instance, the same on every attempt: the try number is not part of it."""
    return hashlib.sha256(json.dumps([dag_id, run_id, task_id, map_index]).encode()).hexdigest()[:20]


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job: one task instance of a DAG run."""

    job_id: str
    dag_id: str
    run_id: str
    task_id: str
    map_index: int = -1


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A row of ``batchkit_batch``. Times are aware and UTC."""

    job_id: str
    shard: int
    batch_id: str | None
    anthropic_conn_id: str
    state: BatchState
    #: of asking, from 1
    round: int
    #: its id is a guess
    adopted: bool
    requests: int
    body_bytes: int
    intended_at: datetime
    created_at: datetime | None
    ended_at: datetime | None
    landed_at: datetime | None
    landed_table: str | None
    note: str | None

    def __str__(self) -> str:
        return f"shard {self.shard} of job {self.job_id} ({self.batch_id or 'no batch id yet'})"


@dataclass(frozen=True, slots=True)
class Landed:
    """What the ledger keeps of a landing: rows per outcome, and the tally as JSON."""

    batch_id: str
    counts: dict[str, int]
    tally: dict[str, Any]
    created_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class Known:
    """What the ledger knows of a source row from an earlier attempt of its job."""

    key: str
    custom_id: str
    shard: int


class Ledger:
    """The door to the ``batchkit_*`` tables of one database."""

    def __init__(self, engine: Engine) -> None:
        self.engine = prepare_engine(engine)

    def ensure(self) -> None:
        """Create the tables and the roll-up's views where they are missing. Safe when several tasks do so at once.

        :raises LedgerError: when the tables are of another version
        """
        for attempt in (1, 2, 3):
            try:
                with write_transaction(self.engine) as connection:
                    found = _version(connection)
                    if found in (None, VERSION):
                        metadata.create_all(connection)
                    if found is None:
                        create_views(connection)
                        connection.execute(sa.insert(version).values(version=VERSION))
                        found = VERSION
                break
            except DBAPIError:
                # another task created them between our look and our CREATE
                if attempt == 3:
                    raise
        if found != VERSION:
            raise LedgerError(
                f"The ledger's tables are of version {found}, this provider writes version {VERSION}. Nothing was sent. Let the provider "
                "that made them land what still runs; then rename or drop the batchkit_ tables and views."
            )

    def exists(self) -> bool:
        """Whether the tables are there."""
        return sa.inspect(self.engine).has_table(job.name)

    # --- jobs ---------------------------------------------------------------------------------------------------------------------

    def open_job(self, record: JobRecord) -> int:
        """Begin an attempt of a job: create its row or take over its lease. Returns the lease, to be shown at every intent."""
        try:
            return self._take_lease(record)
        except IntegrityError:
            # another first attempt created the row between our look and our INSERT
            return self._take_lease(record)

    def _take_lease(self, record: JobRecord) -> int:
        with write_transaction(self.engine) as connection:
            taken = connection.execute(sa.update(job).where(job.c.job_id == record.job_id).values(lease=job.c.lease + 1))
            if taken.rowcount == 0:
                connection.execute(
                    sa.insert(job).values(
                        job_id=record.job_id,
                        dag_id=record.dag_id,
                        run_id=record.run_id,
                        task_id=record.task_id,
                        map_index=record.map_index,
                        created_at=_now(),
                        lease=1,
                        key_columns="[]",
                        rounds_sent=0,
                    )
                )
            return int(connection.execute(sa.select(job.c.lease).where(job.c.job_id == record.job_id)).scalar_one())

    def set_key_columns(self, job_id: str, columns: Sequence[tuple[str, str]]) -> None:
        """Note (column, type) of the source's key, which fetch needs for the result table."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.update(job).where(job.c.job_id == job_id).values(key_columns=json.dumps(columns)))

    def key_columns(self, job_id: str) -> list[tuple[str, str]]:
        """(column, type) of the source's key."""
        with self.engine.connect() as connection:
            text = connection.execute(sa.select(job.c.key_columns).where(job.c.job_id == job_id)).scalar_one()
        return [(column, type_name) for column, type_name in json.loads(text)]

    def check_lease(self, job_id: str, lease: int) -> None:
        """:raises LeaseLostError: when another attempt of the job has begun"""
        with self.engine.connect() as connection:
            current = connection.execute(sa.select(job.c.lease).where(job.c.job_id == job_id)).scalar()
        if current != lease:
            raise lease_lost(job_id, lease)

    # --- requests -----------------------------------------------------------------------------------------------------------------

    def known(self, job_id: str, round_number: int = 1) -> Iterator[Known]:
        """Rows that earlier attempts have in flight or landed in this round of the job, or in a later one."""
        with self.engine.connect() as connection:
            for shard in rounds.shards(connection, job_id, round_number):
                for entry in journal.entries(connection, job_id, shard):
                    yield Known(entry.key, entry.custom_id, shard)

    def rows_of(self, record: BatchRecord) -> Iterator[list[IndexEntry]]:
        """Every source row that the batch answers, in pieces."""
        with self.engine.connect() as connection:
            yield from journal.pieces(connection, record.job_id, record.shard)

    def asks(self, record: BatchRecord, custom_id: str) -> bool:
        """Whether the batch's body has this request."""
        with self.engine.connect() as connection:
            return journal.asks(connection, record.job_id, record.shard, custom_id)

    def add_copies(self, job_id: str, lease: int, copies: Iterable[tuple[int, bytes]]) -> None:
        """Journal rows that share a request which an earlier attempt has sent, as (its shard, index lines)."""
        with write_transaction(self.engine) as connection:
            hold_lease(connection, job_id, lease)
            for shard, part in copies:
                journal.write(connection, job_id, shard, [part])

    # --- batches ------------------------------------------------------------------------------------------------------------------

    def next_shard(self, job_id: str) -> int:
        """The number for the job's next shard."""
        with self.engine.connect() as connection:
            last = connection.execute(sa.select(sa.func.max(batch.c.shard)).where(batch.c.job_id == job_id)).scalar()
        return 0 if last is None else last + 1

    def intend(
        self,
        job_id: str,
        lease: int,
        shard: Shard,
        anthropic_conn_id: str,
        bound: Bound = budgets.UNBOUNDED,
        budget: Budget | None = None,
        round_number: int = 1,
    ) -> None:
        """Journal a shard's requests and its batch as ``sending``. Must be committed before the POST.

        :param bound: the most that the shard can cost
        :param budget: where that counts; the attempt holds at least as much of it
        :raises LeaseLostError: when another attempt of the job has begun
        """
        with write_transaction(self.engine) as connection:
            hold_lease(connection, job_id, lease)
            connection.execute(
                sa.insert(batch).values(
                    job_id=job_id,
                    shard=shard.number,
                    anthropic_conn_id=anthropic_conn_id,
                    state=BatchState.SENDING.value,
                    round=round_number,
                    requests=shard.requests,
                    body_bytes=shard.bytes,
                    intended_at=_now(),
                    **budgets.draw(connection, job_id, lease, bound, budget),
                )
            )
            journal.write(connection, job_id, shard.number, index_parts(shard))

    def submitted(self, job_id: str, shard: int, found: BatchSnapshot) -> None:
        """The API accepted the shard under this id: proved, by its answer or by the batch's results.

        Another row that had adopted the batch as a guess gives it up: its requests wait in a new ``sending`` row to be looked for again.
        """
        with write_transaction(self.engine) as connection:
            other = connection.execute(sa.select(batch).where(batch.c.batch_id == found.batch_id, batch.c.adopted)).first()
            if other is not None and (other.job_id, other.shard) != (job_id, shard):
                self._requeue(connection, _record(other), f"adopted {found.batch_id}, which is of shard {shard} of job {job_id}")
            self._move(connection, job_id, shard, BatchState.SUBMITTED, batch_id=found.batch_id, created_at=found.created_at)

    def adopt(self, job_id: str, shard: int, found: BatchSnapshot) -> None:
        """Take a running batch for the shard's own, as a guess.

        :raises IntegrityError: when another row has it
        """
        with write_transaction(self.engine) as connection:
            self._move(connection, job_id, shard, BatchState.SUBMITTED, batch_id=found.batch_id, created_at=found.created_at, adopted=True)

    def rejected(self, job_id: str, shard: int, reason: str) -> None:
        """The API refused the shard: its requests are free to be asked again."""
        self._release(job_id, shard, BatchState.REJECTED, reason)

    def void(self, job_id: str, shard: int, reason: str) -> None:
        """The shard was never accepted: its requests are free to be asked again.

        :raises LedgerError: when it is not ``sending`` any more
        """
        self._release(job_id, shard, BatchState.VOID, reason)

    def batches(self, job_id: str) -> list[BatchRecord]:
        """Every batch row of a job, by shard."""
        with self.engine.connect() as connection:
            return [_record(row) for row in connection.execute(sa.select(batch).where(batch.c.job_id == job_id).order_by(batch.c.shard))]

    def find(self, batch_id: str) -> BatchRecord | None:
        """The row of a batch id; None for a batch that was submitted elsewhere."""
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(batch).where(batch.c.batch_id == batch_id)).first()
        return _record(row) if row is not None else None

    def landed_in(self, batch_id: str, table: str) -> Landed | None:
        """What landed of a batch in ``table``; None when it has not landed there."""
        statement = sa.select(batch.c.counts, batch.c.tally, batch.c.created_at, batch.c.ended_at).where(
            batch.c.batch_id == batch_id, batch.c.state == BatchState.LANDED.value, batch.c.landed_table == table
        )
        with self.engine.connect() as connection:
            row = connection.execute(statement).first()
        return None if row is None else Landed(batch_id, json.loads(row.counts), json.loads(row.tally), row.created_at, row.ended_at)

    def claims(self, batch_ids: Sequence[str]) -> dict[str, BatchRecord]:
        """Those of the ids that some row has, with the row."""
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(batch).where(batch.c.batch_id.in_(batch_ids)))
            return {row.batch_id: _record(row) for row in rows}

    def get(self, job_id: str, shard: int) -> BatchRecord:
        """One batch row."""
        with self.engine.connect() as connection:
            return _record(connection.execute(sa.select(batch).where(batch.c.job_id == job_id, batch.c.shard == shard)).one())

    def replacement(self, batch_id: str, dag_id: str, run_id: str) -> BatchRecord | None:
        """The row that took over when a job of this DAG run had adopted ``batch_id`` wrongly; None when that never happened."""
        statement = (
            sa.select(batch.c.job_id, batch.c.replaced_by)
            .join(job, job.c.job_id == batch.c.job_id)
            .where(batch.c.adopted_id == batch_id, job.c.dag_id == dag_id, job.c.run_id == run_id)
        )
        with self.engine.connect() as connection:
            row = connection.execute(statement).first()
        return None if row is None else self.get(row.job_id, row.replaced_by)

    def witness(self, anthropic_conn_id: str) -> str | None:
        """The id of the youngest batch that this connection submitted and that has not landed: it must be visible with its key."""
        statement = (
            sa.select(batch.c.batch_id)
            .where(batch.c.anthropic_conn_id == anthropic_conn_id, batch.c.state == BatchState.SUBMITTED.value)
            .order_by(batch.c.created_at.desc())
            .limit(1)
        )
        with self.engine.connect() as connection:
            return connection.execute(statement).scalar()

    def disown(self, record: BatchRecord, found: BatchSnapshot, custom_id: str) -> BatchRecord:
        """``record`` had adopted ``found``, whose results (``custom_id``) are another's: give it to its owner.

        The record becomes void, and its requests wait in a new ``sending`` row, which is returned, until they are looked for again. When
        the owner had adopted another batch in its turn, so do the owner's requests, and that other batch is free to be found.
        """
        with write_transaction(self.engine) as connection:
            fresh = self._requeue(connection, record, f"adopted {found.batch_id}, which is not its own")
            job_id = custom_id[:20]
            # a later round asks under the same ids, and only the last one can be looking for its batch
            owner = next((n for n in reversed(journal.shards(connection, job_id)) if journal.asks(connection, job_id, n, custom_id)), None)
            if owner is not None:
                rightful = _record(connection.execute(sa.select(batch).where(batch.c.job_id == job_id, batch.c.shard == owner)).one())
                if rightful.state is BatchState.SUBMITTED and rightful.adopted:
                    rightful = self._requeue(connection, rightful, f"adopted {rightful.batch_id} while {found.batch_id} is its own")
                if rightful.state is BatchState.SENDING:
                    self._move(
                        connection,
                        rightful.job_id,
                        rightful.shard,
                        BatchState.SUBMITTED,
                        batch_id=found.batch_id,
                        created_at=found.created_at,
                    )
        return fresh

    def _requeue(self, connection: Connection, record: BatchRecord, note: str) -> BatchRecord:
        """Void a wrongly adopted row and put its requests into a new ``sending`` row with the old intent."""
        last = connection.execute(sa.select(sa.func.max(batch.c.shard)).where(batch.c.job_id == record.job_id)).scalar_one()
        number = last + 1
        self._move(
            connection,
            record.job_id,
            record.shard,
            BatchState.VOID,
            batch_id=None,
            adopted=False,
            adopted_id=record.batch_id,
            replaced_by=number,
            note=note,
        )
        connection.execute(
            sa.insert(batch).values(
                job_id=record.job_id,
                shard=number,
                anthropic_conn_id=record.anthropic_conn_id,
                state=BatchState.SENDING.value,
                round=record.round,
                adopted=False,
                requests=record.requests,
                body_bytes=record.body_bytes,
                intended_at=record.intended_at,
                **budgets.carried(connection, record.job_id, record.shard),
            )
        )
        journal.move(connection, record.job_id, record.shard, number)
        return _record(connection.execute(sa.select(batch).where(batch.c.job_id == record.job_id, batch.c.shard == number)).one())

    def landed(self, connection: Connection, record: BatchRecord, tally: CostTally, values: Mapping[str, Any]) -> None:
        """Move a batch to ``landed``, with its bill, inside the landing's own transaction.

        Also a lock: a second landing of the batch waits here.
        """
        more = {**bill_columns(tally), **budgets.settled(connection, record.job_id, record.shard, tally)}
        self._move(connection, record.job_id, record.shard, BatchState.LANDED, adopted=False, **values, **more)
        write_bill(connection, record.job_id, record.shard, tally)

    # --- inside -------------------------------------------------------------------------------------------------------------------

    def _move(
        self, connection: Connection, job_id: str, shard: int, target: BatchState, *, source: BatchState | None = None, **values: Any
    ) -> None:
        """Move a row, from ``source`` where that is given, else from any state that the table allows."""
        here = (batch.c.job_id == job_id) & (batch.c.shard == shard)
        allowed = [state.value for state in sources_of(target) if source in (None, state)]
        if target is BatchState.SUBMITTED:
            values["submitted_at"] = _now()
        moved = connection.execute(sa.update(batch).where(here, batch.c.state.in_(allowed)).values(state=target.value, **values))
        if moved.rowcount == 0:
            row = connection.execute(sa.select(batch).where(here)).first()
            if row is None:
                raise LedgerError(f"The ledger has no shard {shard} of job {job_id}.")
            check_move(str(_record(row)), BatchState(row.state), target)
            raise LedgerError(f"{_record(row)} is {row.state} by now and was not moved to {target.value}.")

    def _release(self, job_id: str, shard: int, target: BatchState, reason: str) -> None:
        with write_transaction(self.engine) as connection:
            self._move(connection, job_id, shard, target, source=BatchState.SENDING, note=reason)
            journal.remove(connection, job_id, shard)
            rounds.reopen(connection, job_id, shard)
            budgets.put_back(connection, job_id, shard)


def _version(connection: Connection) -> int | None:
    """Of the tables; None where they are missing."""
    if not sa.inspect(connection).has_table(version.name):
        return None
    return connection.execute(sa.select(version.c.version)).scalar()


def _now() -> datetime:
    return datetime.now(UTC)


def _record(row: Row[Any]) -> BatchRecord:
    return BatchRecord(
        row.job_id,
        row.shard,
        row.batch_id,
        row.anthropic_conn_id,
        BatchState(row.state),
        row.round,
        row.adopted,
        row.requests,
        row.body_bytes,
        row.intended_at,
        row.created_at,
        row.ended_at,
        row.landed_at,
        row.landed_table,
        row.note,
    )

"""Every move of a batch from one state to another, and the times of a doubt. Each method is one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.exceptions import LedgerError
from airflow_provider_batchkit.ledger import budgets, journal, results
from airflow_provider_batchkit.ledger.engine import Part, clock, write_transaction
from airflow_provider_batchkit.ledger.leases import hold_lease
from airflow_provider_batchkit.ledger.records import BatchRecord, record_of
from airflow_provider_batchkit.ledger.states import BatchState, check_move, sources_of
from airflow_provider_batchkit.ledger.tables import batch, job
from airflow_provider_batchkit.model import COST_QUANTUM, BatchSnapshot

#: days after its creation for which a batch is a witness: an older one may have been archived (API documentation: 29 days)
_WITNESS_DAYS = 28
_WITNESSES = 10


class BatchMoves(Part):
    """The part of the ledger that moves batches."""

    def submitted(self, job_id: str, shard: int, found: BatchSnapshot) -> None:
        """Note that the API accepted the shard under this id, as its answer or the batch's results have proved. This needs no lease.

        :raises LedgerError: when the row has another batch, is void or rejected, or another row has this batch
        """
        with write_transaction(self.engine) as connection:
            other = connection.execute(sa.select(batch).where(batch.c.batch_id == found.batch_id)).first()
            if other is not None and (other.job_id, other.shard) == (job_id, shard):
                # another attempt has already noted it
                return
            if other is not None:
                raise LedgerError(f"{found.batch_id} is already {record_of(other)} and cannot be shard {shard} of job {job_id} too.")
            self._move(
                connection,
                job_id,
                shard,
                BatchState.SUBMITTED,
                source=BatchState.SENDING,
                batch_id=found.batch_id,
                created_at=found.created_at,
                unseen_since=None,
                unseen_at=None,
                submitted_at=clock(connection),
            )

    def doubt(self, job_id: str, shard: int) -> None:
        """Note a doubt: the sender has given the POST up, and it may have been accepted. A row that is already in doubt keeps its time."""
        with write_transaction(self.engine) as connection:
            self._doubt(connection, (batch.c.job_id == job_id) & (batch.c.shard == shard))

    def _doubt(self, connection: Connection, where: sa.ColumnElement[bool]) -> None:
        fresh = sa.and_(where, batch.c.state == BatchState.SENDING.value, batch.c.doubt_at.is_(None))
        connection.execute(sa.update(batch).where(fresh).values(doubt_at=clock(connection)))

    def note_unseen(self, record: BatchRecord, since: datetime | None, at: datetime | None = None, *, lease: int | None = None) -> None:
        """Note the first and the last look of a series that showed nothing of the row's batch; None ends the series.

        Nothing is written when the series has changed since ``record`` was read: a later look of another task has precedence.

        :raises LeaseLostError: with ``lease``, when another attempt of the job has begun
        """
        if (record.unseen_since, record.unseen_at) == (since, at):
            return
        same = batch.c.unseen_since.is_not_distinct_from(record.unseen_since)
        here = (batch.c.job_id == record.job_id) & (batch.c.shard == record.shard) & same
        with write_transaction(self.engine) as connection:
            if lease is not None:
                hold_lease(connection, record.job_id, lease)
            connection.execute(sa.update(batch).where(here).values(unseen_since=since, unseen_at=at))

    def rejected(self, job_id: str, shard: int, reason: str) -> None:
        """Note that the API refused the shard. Its requests may be asked again."""
        with write_transaction(self.engine) as connection:
            _lock(connection, job_id)
            self._release(connection, job_id, shard, BatchState.REJECTED, reason)

    def void(self, record: BatchRecord, reason: str, lease: int) -> bool:
        """Note that the shard was never accepted. Its requests may be asked again. False when the row or its series has changed meanwhile.

        :param lease: the lease of the attempt that has proved it
        :raises LeaseLostError: when another attempt of the job has begun
        """
        here = (batch.c.job_id == record.job_id) & (batch.c.shard == record.shard)
        with write_transaction(self.engine) as connection:
            hold_lease(connection, record.job_id, lease)
            now = connection.execute(sa.select(batch.c.state, batch.c.unseen_since).where(here)).one()
            if (now.state, now.unseen_since) != (BatchState.SENDING.value, record.unseen_since):
                return False
            self._release(connection, record.job_id, record.shard, BatchState.VOID, reason)
        return True

    def give_up(self, record: BatchRecord) -> None:
        """Note a person's decision that the shard was never accepted, or that its batch is given up. Its requests may be asked again.

        :raises LedgerError: when the row has changed since ``record`` was read
        """
        with write_transaction(self.engine) as connection:
            _lock(connection, record.job_id)
            _refuse_changed(connection, record)
            reason = f"given up by a person (was {record.state.value}, {record.batch_id or 'without a batch id'})"
            self._release(connection, record.job_id, record.shard, BatchState.VOID, reason, batch_id=None)

    def decide(self, record: BatchRecord, found: BatchSnapshot) -> None:
        """Note a person's decision that this batch is the row's.

        :raises LedgerError: when another row has the batch, or the row has changed since ``record`` was read
        """
        with write_transaction(self.engine) as connection:
            _refuse_changed(connection, record)
            other = connection.execute(sa.select(batch).where(batch.c.batch_id == found.batch_id)).first()
            if other is not None:
                raise LedgerError(f"{found.batch_id} is already {record_of(other)}.")
            values: dict[str, Any] = {"batch_id": found.batch_id, "created_at": found.created_at, "submitted_at": clock(connection)}
            self._move(
                connection, record.job_id, record.shard, BatchState.SUBMITTED, unseen_since=None, note="decided by a person", **values
            )

    def deleted(self, batch_id: str) -> None:
        """Note that this package has deleted a batch from the API, so that its absence there proves nothing."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.update(batch).where(batch.c.batch_id == batch_id).values(deleted_at=clock(connection)))

    def bound_of(self, record: BatchRecord) -> Decimal | None:
        """The most that a shard can cost, in USD; None where nothing bounds it."""
        here = (batch.c.job_id == record.job_id) & (batch.c.shard == record.shard)
        with self.engine.connect() as connection:
            pico = connection.execute(sa.select(batch.c.bound_picousd).where(here)).scalar()
        return None if pico is None else pico * COST_QUANTUM

    def gone(self, record: BatchRecord, reason: str) -> None:
        """Note that a batch was deleted or archived before it landed. It may have been billed, so budgets keep its bound.

        :param record: a submitted batch, or a prepared one whose rows are known not to be in the table
        """
        with write_transaction(self.engine) as connection:
            self._move(connection, record.job_id, record.shard, BatchState.GONE, source=record.state, note=reason)

    def prepared(self, connection: Connection, record: BatchRecord) -> None:
        """Move a batch to ``prepared``, inside the transaction that notes its outcomes and its bill. A batch that has landed elsewhere, or
        is gone, keeps its state until its rows are in the table.
        """
        here = (batch.c.job_id == record.job_id) & (batch.c.shard == record.shard)
        found = [state.value for state in sources_of(BatchState.PREPARED)]
        connection.execute(sa.update(batch).where(here, batch.c.state.in_(found)).values(state=BatchState.PREPARED.value))

    def witnesses(self, record: BatchRecord, reached: Sequence[str]) -> list[str]:
        """Ids of the youngest batches that the row's connection submitted before the row was written, or for the row's job.

        A key of the workspace that the row was sent to sees at least one of them. Batches submitted later may be in another workspace.
        Where the connection does not reach the row's workspace by name, only batches that were sent to it by that name count: the key
        may have been changed, and changed back.

        :param reached: names of the workspace that the connection reaches now
        """
        kept = [BatchState.SUBMITTED.value, BatchState.PREPARED.value, BatchState.LANDED.value]
        before = sa.or_(batch.c.submitted_at < record.intended_at, batch.c.job_id == record.job_id)
        with self.engine.connect() as connection:
            young = clock(connection) - timedelta(days=_WITNESS_DAYS)
            statement = (
                sa.select(batch.c.batch_id)
                .where(batch.c.anthropic_conn_id == record.anthropic_conn_id, batch.c.state.in_(kept), batch.c.deleted_at.is_(None))
                .where(batch.c.created_at > young, before, sa.or_(batch.c.job_id != record.job_id, batch.c.shard != record.shard))
                .where(sa.true() if record.workspace in (None, *reached) else batch.c.workspace == record.workspace)
                .order_by(batch.c.created_at.desc())
                .limit(_WITNESSES)
            )
            return list(connection.execute(statement).scalars())

    def count_void(self, job_id: str, since: datetime) -> int:
        """How many of the job's shards intended since this time are void: proved never to have been accepted."""
        void = (batch.c.job_id == job_id) & (batch.c.state == BatchState.VOID.value) & (batch.c.intended_at >= since)
        with self.engine.connect() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(batch).where(void)).scalar_one())

    # --- inside -------------------------------------------------------------------------------------------------------------------

    def _move(
        self, connection: Connection, job_id: str, shard: int, target: BatchState, *, source: BatchState | None = None, **values: Any
    ) -> None:
        """Move a row to ``target`` from ``source``, or without ``source`` from any state that the table of moves allows."""
        here = (batch.c.job_id == job_id) & (batch.c.shard == shard)
        allowed = [state.value for state in sources_of(target) if source in (None, state)]
        moved = connection.execute(sa.update(batch).where(here, batch.c.state.in_(allowed)).values(state=target.value, **values))
        if moved.rowcount == 0:
            row = connection.execute(sa.select(batch).where(here)).first()
            if row is None:
                raise LedgerError(f"The ledger has no shard {shard} of job {job_id}.")
            check_move(str(record_of(row)), BatchState(row.state), target)
            raise LedgerError(f"{record_of(row)} is {row.state} by now and was not moved to {target.value}.")

    def _release(self, connection: Connection, job_id: str, shard: int, target: BatchState, reason: str, **values: Any) -> None:
        self._move(connection, job_id, shard, target, note=reason, unseen_since=None, **values)
        journal.remove(connection, job_id, shard)
        results.reopen(connection, job_id, shard)
        budgets.put_back(connection, job_id, shard)


def _lock(connection: Connection, job_id: str) -> None:
    """Lock the job's row before any row of its batches, in the order in which opening a job locks them."""
    connection.execute(sa.update(job).where(job.c.job_id == job_id).values(lease=job.c.lease))


def _refuse_changed(connection: Connection, record: BatchRecord) -> None:
    here = (batch.c.job_id == record.job_id) & (batch.c.shard == record.shard)
    now = record_of(connection.execute(sa.select(batch).where(here).with_for_update()).one())
    if (now.state, now.batch_id) != (record.state, record.batch_id):
        raise LedgerError(
            f"{record} was {record.state.value} and is {now.state.value} ({now.batch_id}) by now. Nothing was changed; look again."
        )

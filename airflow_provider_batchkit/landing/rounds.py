"""A key that was asked in several rounds of its job has one outcome and one row: those of the last round, in whatever order they land."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.landing.stage import AskedKeys
from airflow_provider_batchkit.ledger import journal
from airflow_provider_batchkit.ledger.bulk import bulk_loader
from airflow_provider_batchkit.ledger.records import BatchRecord
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.ledger.tables import batch, failed, job


class Overtaken(Exception):
    """What was staged is not what is to be landed any more."""


@dataclass(frozen=True, slots=True)
class Later:
    """What later rounds of its job have asked again of a batch's rows: their outcomes stand."""

    #: the later rounds' batches
    shards: frozenset[int]
    keys: frozenset[str]

    @classmethod
    def of(cls, connection: Connection, record: BatchRecord, together: Iterable[BatchRecord], keys: AskedKeys) -> Later:
        """
        :param together: batches that land in the same transaction, in any order
        :param keys: of the batch
        """
        mates = {r.shard for r in together if r.job_id == record.job_id and r.round > record.round}
        shards = frozenset(mates | _landed_later(connection, record))
        if not shards:
            return NO_LATER
        asked = (entry.key for shard in sorted(shards) for entry in journal.entries(connection, record.job_id, shard))
        return cls(shards, keys.those_of(asked))

    def check(self, connection: Connection, record: BatchRecord) -> None:
        """To be called when the job is locked.

        :raises Overtaken: when another later round has landed meanwhile
        """
        if not _landed_later(connection, record) <= self.shards:
            raise Overtaken(f"A later round of asking landed while the results of {record} were read.")


def lock_jobs(connection: Connection, records: Iterable[BatchRecord]) -> None:
    """Wait until no other landing of the same jobs is under way, until the end of the transaction.

    Two rounds that land at once would not see each other's rows: a row that failed in the one would stay beside its answer in the other.
    """
    for job_id in sorted({record.job_id for record in records}):
        connection.execute(sa.update(job).where(job.c.job_id == job_id).values(lease=job.c.lease))


def _landed_later(connection: Connection, record: BatchRecord) -> set[int]:
    landed = (batch.c.job_id == record.job_id) & (batch.c.state == BatchState.LANDED.value)
    return set(connection.execute(sa.select(batch.c.shard).where(landed, batch.c.round > record.round)).scalars())


NO_LATER = Later(frozenset(), frozenset())


def forget_failures(connection: Connection, record: BatchRecord) -> None:
    """Take what earlier rounds noted of the batch's keys out of the ledger; what later ones noted stands."""
    if record.round == 1:
        return
    asked = sa.Table(
        f"batchkit_asked_{secrets.token_hex(6)}",
        sa.MetaData(),
        sa.Column("key", failed.c.key.type),
        prefixes=["TEMPORARY"],
        postgresql_on_commit="DROP",
    )
    asked.create(connection, checkfirst=False)
    for piece in journal.pieces(connection, record.job_id, record.shard):
        with bulk_loader(connection, asked) as loader:
            loader.write([[entry.key for entry in piece]])
    earlier = sa.select(batch.c.shard).where(batch.c.job_id == record.job_id, batch.c.round < record.round)
    again = failed.c.key.in_(sa.select(asked.c.key))
    connection.execute(sa.delete(failed).where(failed.c.job_id == record.job_id, failed.c.shard.in_(earlier), again))
    asked.drop(connection)


def remove_rows(connection: Connection, target: sa.Table, record: BatchRecord, again: sa.ColumnElement[bool]) -> None:
    """Remove the rows that earlier rounds of the job wrote to a table.

    :param again: which of them, over the columns of ``target``
    """
    if record.round > 1:
        earlier = sa.select(batch.c.batch_id).where(
            batch.c.job_id == record.job_id, batch.c.round < record.round, batch.c.batch_id.is_not(None)
        )
        connection.execute(sa.delete(target).where(target.c.batch_id.in_(earlier), again))

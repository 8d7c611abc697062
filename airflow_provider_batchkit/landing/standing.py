"""A key that was asked in several rounds of its job has one outcome and one row: the best, and the latest among equals.

:func:`~airflow_provider_batchkit.model.outcome_rank` gives the order. The ledger holds the outcome that stands, in the row of the batch
that gave it, so batches that land again give the same result in any order.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.landing.stage import AskedKeys
from airflow_provider_batchkit.ledger import journal
from airflow_provider_batchkit.ledger.bulk import bulk_loader
from airflow_provider_batchkit.ledger.records import BatchRecord
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.ledger.tables import batch, failed, job
from airflow_provider_batchkit.model import outcome_rank


class Overtaken(Exception):
    """The staged rows are no longer what must land."""


#: the rank of an outcome that stands whatever other outcomes there are
_STANDS = -1


@dataclass(frozen=True, slots=True)
class OtherRounds:
    """The outcomes of a batch's rows in other rounds of its job."""

    #: the batches of later rounds that have landed
    later: frozenset[int]
    #: key → rank of the outcome that stands; a worse outcome from this batch is left out
    ranks: Mapping[str, int]

    @classmethod
    def of(cls, connection: Connection, record: BatchRecord, together: Iterable[BatchRecord], keys: AskedKeys) -> OtherRounds:
        """
        :param together: batches that land in the same transaction, in any order
        :param keys: the batch's keys
        """
        mates = {r.shard for r in together if r.job_id == record.job_id and r.round > record.round}
        later = frozenset(mates | _landed_later(connection, record))
        ranks: dict[str, int] = {}
        if record.round > 1:
            earlier = sa.select(failed.c.key, failed.c.status, failed.c.error_type).where(
                failed.c.job_id == record.job_id, failed.c.shard.in_(_earlier(record))
            )
            outcomes = {key: outcome_rank(status, error_type) for key, status, error_type in connection.execute(earlier)}
            ranks = {key: outcomes[key] for key in keys.those_of(outcomes)}
        if later:
            standing = _standing(connection, record)
            ranks |= dict.fromkeys(keys.those_of(_asked_in(connection, record, later)) - standing, _STANDS)
        return cls(later, ranks)

    def check(self, connection: Connection, record: BatchRecord) -> None:
        """Check again after the job is locked.

        :raises Overtaken: another later round has landed meanwhile
        """
        if not _landed_later(connection, record) <= self.later:
            raise Overtaken(f"A later round of asking landed while the results of {record} were read.")


def overtaken_keys(connection: Connection, record: BatchRecord) -> set[str]:
    """Keys of a batch and of its later rounds whose outcome in a later round stands. Call it when the job is locked, before the batch's
    outcomes are written.

    Two rounds of a job may be published at once in two tables, each behind its own fence. The later one may have been written to the ledger
    after the other's results were read.
    """
    later = _landed_later(connection, record)
    return set(_asked_in(connection, record, later)) - _standing(connection, record) if later else set()


def _standing(connection: Connection, record: BatchRecord) -> set[str]:
    """Keys whose outcome in this batch stands, other than a plain success."""
    own = sa.select(failed.c.key).where(failed.c.job_id == record.job_id, failed.c.shard == record.shard)
    return set(connection.execute(own).scalars())


def _asked_in(connection: Connection, record: BatchRecord, shards: Iterable[int]) -> Iterator[str]:
    return (entry.key for shard in sorted(shards) for entry in journal.entries(connection, record.job_id, shard))


def lock_jobs(connection: Connection, records: Iterable[BatchRecord]) -> None:
    """Wait until no other landing of the same jobs is under way. The locks hold until the end of the transaction.

    Two rounds that land at once would not see each other's rows: a row that failed in one would stay beside its answer in the other.
    """
    for job_id in sorted({record.job_id for record in records}):
        connection.execute(sa.update(job).where(job.c.job_id == job_id).values(lease=job.c.lease))


def _landed_later(connection: Connection, record: BatchRecord) -> set[int]:
    landed = (batch.c.job_id == record.job_id) & (batch.c.state == BatchState.LANDED.value)
    return set(connection.execute(sa.select(batch.c.shard).where(landed, batch.c.round > record.round)).scalars())


NO_OTHERS = OtherRounds(frozenset(), {})


def _earlier(record: BatchRecord) -> sa.Select[Any]:
    """The numbers of the job's batches in earlier rounds."""
    return sa.select(batch.c.shard).where(batch.c.job_id == record.job_id, batch.c.round < record.round)


def forget_failures(connection: Connection, record: BatchRecord, left_out: AbstractSet[str]) -> None:
    """Delete from the ledger the failures that earlier rounds noted for the batch's keys and that are overtaken now.

    :param left_out: keys whose outcome in another round stands
    """
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
        overtaken = [entry.key for entry in piece if entry.key not in left_out]
        if not overtaken:
            continue
        with bulk_loader(connection, asked) as loader:
            loader.write([overtaken])
    again = failed.c.key.in_(sa.select(asked.c.key))
    connection.execute(sa.delete(failed).where(failed.c.job_id == record.job_id, failed.c.shard.in_(_earlier(record)), again))
    asked.drop(connection)


def remove_rows(connection: Connection, target: sa.Table, record: BatchRecord, again: sa.ColumnElement[bool]) -> None:
    """Remove the rows that earlier rounds of the job wrote to a table.

    :param again: a condition over the columns of ``target`` that selects them
    """
    if record.round > 1:
        earlier = sa.select(batch.c.batch_id).where(
            batch.c.job_id == record.job_id, batch.c.round < record.round, batch.c.batch_id.is_not(None)
        )
        connection.execute(sa.delete(target).where(target.c.batch_id.in_(earlier), again))

"""The journal: the requests of each batch, written before the POST as the index of its shard, in pieces of whole lines.

A million source rows are journaled as bytes in a hundred statements. A million journal rows would have to be found and changed one by one
when the batch lands. The landing notes the outcome of each source row; see ``outcomes``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.ledger.tables import journal
from airflow_provider_batchkit.request.shards import IndexEntry, decode_entries


def write(connection: Connection, job_id: str, shard: int, parts: Iterable[bytes]) -> None:
    """Append index lines of a shard to its journal."""
    last = last_part(connection, job_id, shard)
    for number, part in enumerate(parts, start=0 if last is None else last + 1):
        connection.execute(sa.insert(journal).values(job_id=job_id, shard=shard, part=number, entries=part))


def entries(connection: Connection, job_id: str, shard: int) -> Iterator[IndexEntry]:
    """Every source row that a shard answers, in the order in which they were written."""
    return chain.from_iterable(pieces(connection, job_id, shard))


def pieces(connection: Connection, job_id: str, shard: int) -> Iterator[list[IndexEntry]]:
    """:func:`entries`, in the pieces in which they were written."""
    statement = sa.select(journal.c.part).where(journal.c.job_id == job_id, journal.c.shard == shard).order_by(journal.c.part)
    # one statement per piece: some drivers would read all pieces into memory
    for number in connection.execute(statement).scalars().all():
        piece = sa.select(journal.c.entries).where(journal.c.job_id == job_id, journal.c.shard == shard, journal.c.part == number)
        yield decode_entries(connection.execute(piece).scalar_one())


def asks(connection: Connection, job_id: str, shard: int, custom_id: str) -> bool:
    """Whether the shard's body has this request."""
    return any(entry.custom_id == custom_id and entry.asked for entry in entries(connection, job_id, shard))


def last_part(connection: Connection, job_id: str, shard: int) -> int | None:
    """The number of the shard's last journaled part. A greater number later means that rows were added."""
    here = (journal.c.job_id == job_id) & (journal.c.shard == shard)
    return connection.execute(sa.select(sa.func.max(journal.c.part)).where(here)).scalar()


def remove(connection: Connection, job_id: str, shard: int) -> None:
    """Delete the journal of a shard, none of whose requests was accepted."""
    connection.execute(sa.delete(journal).where(journal.c.job_id == job_id, journal.c.shard == shard))

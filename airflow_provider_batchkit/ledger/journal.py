"""What each batch asks, as it was written before the POST: the index of its shard, in pieces of whole lines.

A million rows are journaled as bytes in a hundred statements, not as a million rows that the landing would have to find and change one
by one. The landing notes the outcome of each; see ``outcomes``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.ledger.tables import journal
from airflow_provider_batchkit.request.shards import IndexEntry, decode_entries


def write(connection: Connection, job_id: str, shard: int, parts: Iterable[bytes]) -> None:
    """Journal index lines of a shard, behind what is journaled of it already."""
    last = last_part(connection, job_id, shard)
    for number, part in enumerate(parts, start=0 if last is None else last + 1):
        connection.execute(sa.insert(journal).values(job_id=job_id, shard=shard, part=number, entries=part))


def entries(connection: Connection, job_id: str, shard: int) -> Iterator[IndexEntry]:
    """Every source row that a shard answers, in the order in which they were written."""
    return chain.from_iterable(pieces(connection, job_id, shard))


def pieces(connection: Connection, job_id: str, shard: int) -> Iterator[list[IndexEntry]]:
    """:func:`entries`, as many together as were written together."""
    statement = sa.select(journal.c.part).where(journal.c.job_id == job_id, journal.c.shard == shard).order_by(journal.c.part)
    # one piece at a time, on every driver
    for number in connection.execute(statement).scalars().all():
        piece = sa.select(journal.c.entries).where(journal.c.job_id == job_id, journal.c.shard == shard, journal.c.part == number)
        yield decode_entries(connection.execute(piece).scalar_one())


def asks(connection: Connection, job_id: str, shard: int, custom_id: str) -> bool:
    """Whether the shard's body has this request."""
    return any(entry.custom_id == custom_id and entry.asked for entry in entries(connection, job_id, shard))


def last_part(connection: Connection, job_id: str, shard: int) -> int | None:
    """The number of the last part that is journaled of a shard: a greater one later means that rows were added."""
    here = (journal.c.job_id == job_id) & (journal.c.shard == shard)
    return connection.execute(sa.select(sa.func.max(journal.c.part)).where(here)).scalar()


def remove(connection: Connection, job_id: str, shard: int) -> None:
    """Forget what a shard asks: nothing of it was accepted."""
    connection.execute(sa.delete(journal).where(journal.c.job_id == job_id, journal.c.shard == shard))

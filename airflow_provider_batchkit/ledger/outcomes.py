"""What became of each source row, once its batch has landed.

A row that succeeded is final: nobody asks for it again, and nobody changes its outcome. Such rows lie together, some hundred in a row
of ``batchkit_succeeded``: a million of them cost a landing a thousand inserts and no index. The others are what somebody looks for and
what another round of asking changes: each has a row of ``batchkit_failed``. The view ``batchkit_request`` shows all of them alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.ledger.tables import failed, succeeded


class Succeeded(NamedTuple):
    """An entry of ``batchkit_succeeded``; costs in picodollars, None where the model has no known price."""

    key: str
    #: of the request's params, and without dedupe of its key too: equal digests have asked the same
    digest: str
    batch_cost: int | None
    standard_cost: int | None


_ENTRIES = msgspec.json.Decoder(list[Succeeded])


def digests_of(custom_ids: Sequence[str]) -> list[str]:
    """What stands behind the id of the one job that asked them, and a dash."""
    behind = slice(len(custom_ids[0].rpartition("-")[0]) + 1, None)
    return list(map(itemgetter(behind), custom_ids))


def encode_succeeded(rows: Sequence[tuple[str, str, int | None, int | None]]) -> str:
    """Rows that succeeded, each with the fields of :class:`Succeeded`, as ``entries`` of ``batchkit_succeeded``."""
    return msgspec.json.encode(rows).decode()


def forget(connection: Connection, job_id: str, shard: int) -> None:
    """Take out what an earlier landing of the batch noted."""
    for table in (succeeded, failed):
        connection.execute(sa.delete(table).where(table.c.job_id == job_id, table.c.shard == shard))


def succeeded_rows(connection: Connection, job_id: str, shard: int) -> Iterator[Succeeded]:
    """The rows of a landed batch that succeeded."""
    here = (succeeded.c.job_id == job_id) & (succeeded.c.shard == shard)
    # one piece at a time, on every driver
    for part in connection.execute(sa.select(succeeded.c.part).where(here).order_by(succeeded.c.part)).scalars().all():
        yield from _ENTRIES.decode(connection.execute(sa.select(succeeded.c.entries).where(here, succeeded.c.part == part)).scalar_one())


def count_succeeded(connection: Connection, job_id: str) -> int:
    """How many rows of a job succeeded."""
    rows = sa.func.coalesce(sa.func.sum(succeeded.c.source_rows), 0)
    return int(connection.execute(sa.select(rows).where(succeeded.c.job_id == job_id)).scalar_one())

"""The outcome of each source row, once its batch has landed.

The outcome of a row that succeeded with a whole answer is final: no round asks the row again. Such rows are stored together, some hundred
in a row of ``batchkit_succeeded``: a million of them cost a landing a thousand inserts and no index. Every other row has a row of its own
in ``batchkit_failed``, because people look it up and later rounds change it. That includes a row with the status ``succeeded`` whose answer
was truncated. The view ``batchkit_request`` shows one row for each source row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.ledger.tables import failed, succeeded
from airflow_provider_batchkit.model import ANSWERED, UNFINISHED, RequestStatus


class Succeeded(NamedTuple):
    """An entry of ``batchkit_succeeded``; costs in picodollars, None where the model has no known price."""

    key: str
    #: digest of the request's params, and without dedupe of its key, too: equal digests mean equal requests
    digest: str
    batch_cost: int | None
    standard_cost: int | None


_ENTRIES = msgspec.json.Decoder(list[Succeeded])


def digests_of(custom_ids: Sequence[str]) -> list[str]:
    """The digest in each ``custom_id``: the part after the job's id and a dash. All of them are from one job."""
    behind = slice(len(custom_ids[0].rpartition("-")[0]) + 1, None)
    return list(map(itemgetter(behind), custom_ids))


def encode_succeeded(rows: Sequence[tuple[str, str, int | None, int | None]]) -> str:
    """Encode rows that succeeded, each with the fields of :class:`Succeeded`, as ``entries`` of ``batchkit_succeeded``."""
    return msgspec.json.encode(rows).decode()


def forget(connection: Connection, job_id: str, shard: int) -> None:
    """Delete the outcomes that an earlier landing of the batch noted."""
    for table in (succeeded, failed):
        connection.execute(sa.delete(table).where(table.c.job_id == job_id, table.c.shard == shard))


def succeeded_rows(connection: Connection, job_id: str, shard: int) -> Iterator[Succeeded]:
    """The rows of a landed batch that succeeded, those with a truncated answer among them."""
    columns = (failed.c.key, failed.c.custom_id, failed.c.batch_cost_picousd, failed.c.standard_cost_picousd)
    cut = sa.select(*columns).where(failed.c.job_id == job_id, failed.c.shard == shard, failed.c.status == RequestStatus.SUCCEEDED.value)
    for key, custom_id, batch_cost, standard_cost in connection.execute(cut).all():
        yield Succeeded(key, custom_id.rpartition("-")[2], batch_cost, standard_cost)
    here = (succeeded.c.job_id == job_id) & (succeeded.c.shard == shard)
    # one statement per part: some drivers would read all parts into memory
    for part in connection.execute(sa.select(succeeded.c.part).where(here).order_by(succeeded.c.part)).scalars().all():
        yield from _ENTRIES.decode(connection.execute(sa.select(succeeded.c.entries).where(here, succeeded.c.part == part)).scalar_one())


def written_keys(connection: Connection, job_id: str, shard: int, *, include_failed: bool) -> Iterator[str]:
    """The keys of a landed batch's rows that a table has: those with an answer, and with ``include_failed`` the others, too."""
    yield from (row.key for row in succeeded_rows(connection, job_id, shard))
    written = sa.true() if include_failed else failed.c.status.in_([status.value for status in ANSWERED])
    others = sa.select(failed.c.key).where(failed.c.job_id == job_id, failed.c.shard == shard, written)
    yield from connection.execute(others.where(failed.c.status != RequestStatus.SUCCEEDED.value)).scalars()


def count_succeeded(connection: Connection, job_id: str) -> int:
    """How many rows of a job succeeded with a whole answer."""
    rows = sa.func.coalesce(sa.func.sum(succeeded.c.source_rows), 0)
    return int(connection.execute(sa.select(rows).where(succeeded.c.job_id == job_id)).scalar_one())


def count_unfinished(connection: Connection, job_id: str, shard: int | None = None) -> dict[str, int]:
    """How many rows of a job, or of one of its batches, have an answer that is unfinished, per ``error_type``."""
    here = [failed.c.job_id == job_id] if shard is None else [failed.c.job_id == job_id, failed.c.shard == shard]
    answered = failed.c.status.in_([status.value for status in ANSWERED])
    kinds = sa.select(failed.c.error_type, sa.func.count()).where(*here, answered, failed.c.error_type.in_(sorted({*UNFINISHED.values()})))
    return {kind: int(rows) for kind, rows in connection.execute(kinds.group_by(failed.c.error_type))}

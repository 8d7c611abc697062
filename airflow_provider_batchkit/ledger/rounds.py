"""Rounds of asking: which rows of a job are worth asking again, and what became of all of them in the end.

A round asks again what failed in the rounds before it, under the same ids in batches of its own. It begins when every batch of the
round before it has landed, so a key is in flight in one batch at most. ``batchkit_succeeded`` and ``batchkit_failed`` hold a
key's outcome in the last round that asked it; ``batchkit_batch`` holds each round's batches with their own bills.

Asked again is only what the API failed on its own side, which it does not bill. A row that is ``missing`` is not: its answer may be there
and billed, on a line that could not be read, so its results are to be fetched again, which costs nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from airflow_provider_batchkit.ledger import outcomes
from airflow_provider_batchkit.ledger.engine import write_transaction
from airflow_provider_batchkit.ledger.leases import hold_lease
from airflow_provider_batchkit.ledger.states import HELD, BatchState
from airflow_provider_batchkit.ledger.tables import batch, failed, job, landing
from airflow_provider_batchkit.model import CostTally, RequestStatus

#: error types of the Messages API that say nothing about the request (API documentation, "Errors"): 429, 500, 504, 529
SERVER_ERRORS = frozenset({"rate_limit_error", "api_error", "timeout_error", "overloaded_error"})
_HELD = [state.value for state in HELD]
_KEYS_AT_A_TIME = 5_000
_NAMED = 5


def is_worth_asking(status: str, error_type: str | None, *, invalid_output: bool) -> bool:
    """Whether a row with this outcome may be answered when it is asked again."""
    if status == RequestStatus.ERRORED.value:
        return error_type in SERVER_ERRORS
    again = {RequestStatus.EXPIRED.value, RequestStatus.CANCELED.value}
    return status in again or (invalid_output and status == RequestStatus.INVALID_OUTPUT.value)


def _worth_asking(*, invalid_output: bool) -> sa.ColumnElement[bool]:
    """:func:`is_worth_asking` in SQL."""
    again = [RequestStatus.EXPIRED.value, RequestStatus.CANCELED.value]
    if invalid_output:
        again.append(RequestStatus.INVALID_OUTPUT.value)
    errored = sa.and_(failed.c.status == RequestStatus.ERRORED.value, failed.c.error_type.in_(sorted(SERVER_ERRORS)))
    return sa.or_(failed.c.status.in_(again), errored)


# --- the job's place in its rounds ------------------------------------------------------------------------------------------------


def sent(engine: Engine, job_id: str) -> int:
    """How many rounds of a job have been sent whole; 0 also for a job that nobody has begun."""
    with engine.connect() as connection:
        return int(connection.execute(sa.select(job.c.rounds_sent).where(job.c.job_id == job_id)).scalar() or 0)


def note_sent(engine: Engine, job_id: str, lease: int, round_number: int) -> None:
    """Every request of the round is in a batch that the API has.

    :raises LeaseLostError: when another attempt of the job has begun
    """
    with write_transaction(engine) as connection:
        hold_lease(connection, job_id, lease)
        behind = (job.c.job_id == job_id) & (job.c.rounds_sent < round_number)
        connection.execute(sa.update(job).where(behind).values(rounds_sent=round_number))


def reopen(connection: Connection, job_id: str, shard: int) -> None:
    """A shard proved never to have been accepted: its round is not sent whole any more."""
    number = sa.select(batch.c.round).where(batch.c.job_id == job_id, batch.c.shard == shard).scalar_subquery()
    connection.execute(sa.update(job).where(job.c.job_id == job_id, job.c.rounds_sent >= number).values(rounds_sent=number - 1))


def shards(connection: Connection, job_id: str, round_number: int) -> list[tuple[int, BatchState]]:
    """Numbers and states of the shards whose requests are journaled, of this round and later ones."""
    statement = sa.select(batch.c.shard, batch.c.state).where(
        batch.c.job_id == job_id, batch.c.round >= round_number, batch.c.state.in_(_HELD)
    )
    return [(shard, BatchState(state)) for shard, state in connection.execute(statement.order_by(batch.c.shard))]


# --- rows to ask again ------------------------------------------------------------------------------------------------------------


def count_failed(engine: Engine, job_id: str, *, invalid_output: bool = False) -> int:
    """How many rows of a job are worth asking again."""
    statement = sa.select(sa.func.count()).select_from(failed)
    worth = _worth_asking(invalid_output=invalid_output)
    with engine.connect() as connection:
        return int(connection.execute(statement.where(failed.c.job_id == job_id, worth)).scalar_one())


def failed_keys(engine: Engine, job_id: str, shard: int | None = None, *, invalid_output: bool = False) -> Iterator[str]:
    """Keys of a job's rows that are worth asking again, by their last outcome; with ``shard`` only where that is one of this shard."""
    here = [failed.c.job_id == job_id] if shard is None else [failed.c.job_id == job_id, failed.c.shard == shard]
    with engine.connect() as connection:
        connection = connection.execution_options(yield_per=_KEYS_AT_A_TIME)
        yield from connection.execute(sa.select(failed.c.key).where(*here, _worth_asking(invalid_output=invalid_output))).scalars()


def count_with(engine: Engine, job_id: str, ask: Collection[str]) -> int:
    """How many rows of a job have one of these outcomes: error types, or statuses."""
    statement = sa.select(sa.func.count()).select_from(failed).where(failed.c.job_id == job_id, _has_outcome(ask))
    with engine.connect() as connection:
        return int(connection.execute(statement).scalar_one())


def keys_with(engine: Engine, job_id: str, ask: Collection[str]) -> Iterator[str]:
    """Keys of the rows that :func:`count_with` counts."""
    with engine.connect() as connection:
        connection = connection.execution_options(yield_per=_KEYS_AT_A_TIME)
        yield from connection.execute(sa.select(failed.c.key).where(failed.c.job_id == job_id, _has_outcome(ask))).scalars()


def _has_outcome(ask: Collection[str]) -> sa.ColumnElement[bool]:
    return sa.or_(failed.c.error_type.in_(list(ask)), failed.c.status.in_(list(ask)))


# --- the end ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FailedRows:
    """Rows without an answer that have failed in the same way."""

    status: str
    error_type: str | None
    rows: int
    #: the first keys, as JSON arrays
    keys: list[str]
    #: another round may answer them
    worth_asking: bool

    def __str__(self) -> str:
        kind = f"{self.status} ({self.error_type})" if self.error_type else self.status
        verdict = "worth asking again" if self.worth_asking else "asking again would not help"
        return f"{self.rows:,} rows {kind}, {verdict}; first keys: {', '.join(self.keys)}"


@dataclass(slots=True)
class Outcome:
    """What became of a job's rows over all its rounds: each row counts once, by its last outcome; each batch has its own bill."""

    batch_ids: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    tally: CostTally = field(default_factory=CostTally)
    #: per round: its batches, rows and requests asked, rows per outcome
    rounds: list[dict[str, Any]] = field(default_factory=list)
    failed: list[FailedRows] = field(default_factory=list)
    #: the batches that landed whole: nothing more could be had of them from the API
    complete_ids: list[str] = field(default_factory=list)
    #: by the API's clock
    created_at: datetime | None = None
    ended_at: datetime | None = None

    @property
    def latency_s(self) -> float | None:
        """Seconds from the first batch's creation to the last one's end."""
        return None if self.created_at is None or self.ended_at is None else (self.ended_at - self.created_at).total_seconds()


def outcome(engine: Engine, job_id: str, *, invalid_output: bool = False) -> Outcome:
    """What has landed of a job."""
    found = Outcome()
    landed = sa.select(batch).where(batch.c.job_id == job_id, batch.c.state == BatchState.LANDED.value).order_by(batch.c.shard)
    with engine.connect() as connection:
        for row in connection.execute(landed):
            _include(found, row)
        whole = sa.select(landing.c.batch_id).where(landing.c.batch_id.in_(found.batch_ids), landing.c.complete)
        found.complete_ids = list(connection.execute(whole.distinct()).scalars())
        kinds = (failed.c.status, failed.c.error_type)
        grouped = sa.select(*kinds, sa.func.count().label("rows")).where(failed.c.job_id == job_id).group_by(*kinds).order_by(*kinds)
        answered = outcomes.count_succeeded(connection, job_id)
        if answered:
            found.counts[RequestStatus.SUCCEEDED.value] = answered
        for status, error_type, rows in connection.execute(grouped).all():
            found.counts[status] += rows
            same = (failed.c.status == status) & failed.c.error_type.is_not_distinct_from(error_type)
            first = sa.select(failed.c.key).where(failed.c.job_id == job_id, same).order_by(failed.c.key).limit(_NAMED)
            keys = list(connection.execute(first).scalars())
            again = is_worth_asking(status, error_type, invalid_output=invalid_output)
            found.failed.append(FailedRows(status, error_type, rows, keys, again))
    return found


def _include(found: Outcome, row: sa.Row[Any]) -> None:
    counts = json.loads(row.counts)
    if not found.rounds or found.rounds[-1]["round"] != row.round:
        found.rounds.append({"round": row.round, "batch_ids": [], "rows": 0, "requests": 0, "counts": {}})
    round_ = found.rounds[-1]
    round_["batch_ids"].append(row.batch_id)
    round_["rows"] += row.source_rows
    round_["requests"] += row.requests
    round_["counts"] = dict(sorted((Counter(round_["counts"]) + Counter(counts)).items()))
    found.batch_ids.append(row.batch_id)
    found.tally = found.tally + CostTally.from_json(json.loads(row.tally))
    found.created_at = min(filter(None, (found.created_at, row.created_at)), default=None)
    found.ended_at = max(filter(None, (found.ended_at, row.ended_at)), default=None)

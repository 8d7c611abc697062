"""Rounds of asking: which rows of a job are worth asking again, and the last outcome of each row.

A round asks again what failed in the rounds before it, under the same ids in batches of its own. It begins when every batch of the
round before it has landed, so a key is in flight in one batch at most. ``batchkit_succeeded`` and ``batchkit_failed`` hold a
key's outcome in the last round that asked it; ``batchkit_batch`` holds each round's batches with their own bills.

A row is asked again when it failed for a reason that passes, as :mod:`~airflow_provider_batchkit.request.failures` judges it. A row that
is ``missing`` is not asked again: its answer may be there and billed, and reading the results again costs nothing.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from airflow_provider_batchkit.ledger import outcomes
from airflow_provider_batchkit.ledger.engine import write_transaction
from airflow_provider_batchkit.ledger.leases import hold_lease
from airflow_provider_batchkit.ledger.states import HELD, BatchState
from airflow_provider_batchkit.ledger.tables import batch, failed, job, landing
from airflow_provider_batchkit.model import ANSWERED, CostTally, RequestStatus
from airflow_provider_batchkit.request.failed import KEYS_KEPT, FailedRows, merged
from airflow_provider_batchkit.request.failures import KNOWN_FAILURES, WORTH_ASKING, Failure, Failures, Reason

T = TypeVar("T")
_HELD = [state.value for state in HELD]
_KEYS_AT_A_TIME, _IDS_AT_A_TIME = 5_000, 500


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows that a round asks again, by their last outcome."""

    #: the wanted error types or statuses; None wants the rows that failed for one of ``reasons``
    outcomes: Collection[str] | None = None
    reasons: Collection[Reason] = WORTH_ASKING
    #: classifies a failure by its reason
    failures: Failures = KNOWN_FAILURES

    def __contains__(self, failure: Failure) -> bool:
        if self.outcomes is None:
            return self.failures.reason(failure) in self.reasons
        return failure.error_type in self.outcomes or failure.status in self.outcomes


WORTH_A_ROUND = Wanted()


@dataclass(slots=True)
class Outcome:
    """The result of a job over all its rounds: each row counts once, by its last outcome; each batch has its own bill."""

    batch_ids: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    #: ``error_type`` → rows whose answer is unfinished; ``counts`` includes them
    unfinished: dict[str, int] = field(default_factory=dict)
    tally: CostTally = field(default_factory=CostTally)
    #: one mapping per round: its batches, rows and requests, rows per outcome and cost
    rounds: list[dict[str, Any]] = field(default_factory=list)
    #: rows without a whole answer, by kind; a row that succeeded with a truncated answer is one of them
    kinds: list[FailedRows] = field(default_factory=list)
    #: ids of the batches that landed whole: the API has nothing more for them
    complete_ids: list[str] = field(default_factory=list)
    #: the first batch's creation and the last one's end, by the API's clock
    created_at: datetime | None = None
    ended_at: datetime | None = None

    @property
    def failed(self) -> list[FailedRows]:
        """The kinds of rows without an answer."""
        return [kind for kind in self.kinds if kind.status != RequestStatus.SUCCEEDED.value]

    @property
    def answered(self) -> int:
        """Rows that have an answer."""
        return sum(self.counts[status.value] for status in ANSWERED)

    @property
    def latency_s(self) -> float | None:
        """Seconds from the first batch's creation to the last one's end."""
        return None if self.created_at is None or self.ended_at is None else (self.ended_at - self.created_at).total_seconds()


class Rounds:
    """The part of the ledger that knows a job's rounds."""

    engine: Engine

    def rounds_sent(self, job_id: str) -> int:
        """How many rounds of a job have been sent whole; 0 also for a job that has not begun."""
        with self.engine.connect() as connection:
            return int(connection.execute(sa.select(job.c.rounds_sent).where(job.c.job_id == job_id)).scalar() or 0)

    def note_sent(self, job_id: str, lease: int, round_number: int) -> None:
        """Note that the round was sent whole: every request of it is in a batch that the API has accepted.

        :raises LeaseLostError: when another attempt of the job has begun
        """
        with write_transaction(self.engine) as connection:
            hold_lease(connection, job_id, lease)
            behind = (job.c.job_id == job_id) & (job.c.rounds_sent < round_number)
            connection.execute(sa.update(job).where(behind).values(rounds_sent=round_number))

    def count_failed(self, job_id: str, which: Wanted = WORTH_A_ROUND) -> int:
        """How many rows of a job ``which`` selects by their last outcome."""
        with self.engine.connect() as connection:
            return sum(rows for failure, rows in _kinds(connection, failed.c.job_id == job_id) if failure in which)

    def failed_keys(self, job_id: str, which: Wanted = WORTH_A_ROUND, shard: int | None = None) -> Iterator[str]:
        """Keys of the rows that :meth:`count_failed` counts; with ``shard`` only rows whose last outcome is from this shard."""
        here = [failed.c.job_id == job_id] if shard is None else [failed.c.job_id == job_id, failed.c.shard == shard]
        with self.engine.connect() as connection:
            for row in _rows(connection, *here):
                if Failure(row.status, row.error_type, row.words) in which:
                    yield row.key

    def stopped_by_account(self, job_id: str, shards: Collection[int], failures: Failures = KNOWN_FAILURES) -> str | None:
        """How many rows of these shards failed because of the account, and with which error, as a text; None when no row did."""
        with self.engine.connect() as connection:
            kinds = list(_kinds(connection, failed.c.job_id == job_id, failed.c.shard.in_(shards)))
        account = [(failure, rows) for failure, rows in kinds if failures.reason(failure) is Reason.ACCOUNT]
        if not account:
            return None
        failure = max(account, key=lambda kind: kind[1])[0]
        return f"{sum(rows for _, rows in account):,} rows failed with {failure.error_type}: {failure.error_message}"

    def torn(self, job_id: str) -> list[str]:
        """Ids of landed batches of later rounds whose results lack lines. The missing lines may answer rows that failed earlier."""
        whole = sa.exists().where(landing.c.batch_id == batch.c.batch_id, landing.c.complete)
        here = (batch.c.job_id == job_id) & (batch.c.round > 1) & (batch.c.state == BatchState.LANDED.value)
        with self.engine.connect() as connection:
            return list(connection.execute(sa.select(batch.c.batch_id).where(here, ~whole).order_by(batch.c.shard)).scalars())

    def outcome(self, job_id: str, which: Wanted = WORTH_A_ROUND) -> Outcome:
        """The result of the job's landed batches.

        :param which: the rows that a further round would ask, by their reasons
        """
        found = Outcome()
        landed = sa.select(batch).where(batch.c.job_id == job_id, batch.c.state == BatchState.LANDED.value).order_by(batch.c.shard)
        with self.engine.connect() as connection:
            for row in connection.execute(landed):
                _include(found, row)
            whole = sa.select(landing.c.batch_id).where(landing.c.batch_id.in_(found.batch_ids), landing.c.complete)
            found.complete_ids = list(connection.execute(whole.distinct()).scalars())
            answered = outcomes.count_succeeded(connection, job_id)
            found.unfinished = outcomes.count_unfinished(connection, job_id)
            if answered:
                found.counts[RequestStatus.SUCCEEDED.value] = answered
            found.kinds = list(_failed_rows(connection, which, failed.c.job_id == job_id))
            for kind in found.kinds:
                found.counts[kind.status] += kind.rows
        return found

    def failed_in(self, batch_ids: Collection[str], failures: Failures = KNOWN_FAILURES) -> list[FailedRows]:
        """The failed rows of these landed batches, which may be of several jobs. Batches that the ledger does not know add none."""
        shards = defaultdict[str, list[int]](list)
        found: list[FailedRows] = []
        with self.engine.connect() as connection:
            for ids in _pieces(list(batch_ids)):
                for job_id, shard in connection.execute(sa.select(batch.c.job_id, batch.c.shard).where(batch.c.batch_id.in_(ids))):
                    shards[job_id].append(shard)
            for job_id, those in shards.items():
                for some in _pieces(those):
                    found += _failed_rows(connection, Wanted(failures=failures), failed.c.job_id == job_id, failed.c.shard.in_(some))
        return merged(found)


def reopen(connection: Connection, job_id: str, shard: int) -> None:
    """Note that a shard's round is not sent whole any more, because the shard was not accepted."""
    number = sa.select(batch.c.round).where(batch.c.job_id == job_id, batch.c.shard == shard).scalar_subquery()
    connection.execute(sa.update(job).where(job.c.job_id == job_id, job.c.rounds_sent >= number).values(rounds_sent=number - 1))


def shards(connection: Connection, job_id: str, round_number: int) -> list[tuple[int, BatchState]]:
    """Numbers and states of the shards of this round and later ones whose requests are journaled."""
    statement = sa.select(batch.c.shard, batch.c.state).where(
        batch.c.job_id == job_id, batch.c.round >= round_number, batch.c.state.in_(_HELD)
    )
    return [(shard, BatchState(state)) for shard, state in connection.execute(statement.order_by(batch.c.shard))]


#: the error's message, for errors of the API only: the message of an answer that does not fit its schema differs from row to row
_WORDS = sa.case((failed.c.status == RequestStatus.ERRORED.value, failed.c.error_message), else_=sa.null()).label("words")


def _kinds(connection: Connection, *here: sa.ColumnElement[bool]) -> Iterator[tuple[Failure, int]]:
    """The distinct failures, each with its number of rows."""
    found = sa.select(failed.c.status, failed.c.error_type, _WORDS).where(*here).subquery()
    kind = (found.c.status, found.c.error_type, found.c.words)
    statement = sa.select(*kind, sa.func.count()).group_by(*kind).order_by(*kind)
    for *failure, rows in connection.execution_options(yield_per=_KEYS_AT_A_TIME).execute(statement):
        yield Failure(*failure), rows


def _rows(connection: Connection, *here: sa.ColumnElement[bool], limit: int | None = None, ordered: bool = False) -> sa.CursorResult[Any]:
    """The key and the fields of :class:`Failure` of each failed row."""
    statement = sa.select(failed.c.key, failed.c.status, failed.c.error_type, _WORDS).where(*here).limit(limit)
    if ordered:
        statement = statement.order_by(failed.c.key)
    return connection.execution_options(yield_per=_KEYS_AT_A_TIME).execute(statement)


def _pieces(values: Sequence[T]) -> Iterator[Sequence[T]]:
    return (values[start : start + _IDS_AT_A_TIME] for start in range(0, len(values), _IDS_AT_A_TIME))


def _failed_rows(connection: Connection, which: Wanted, *here: sa.ColumnElement[bool]) -> Iterator[FailedRows]:
    """Failed rows by status, type and reason.

    :param which: the rows that a further round would ask, by their reasons
    """
    groups: dict[tuple[str, str | None, Reason], tuple[str | None, int]] = {}
    for failure, rows in _kinds(connection, *here):
        group = (failure.status, failure.error_type, which.failures.reason(failure))
        words, before = groups.get(group, (failure.error_message, 0))
        groups[group] = words, before + rows
    for (status, error_type, reason), (words, rows) in groups.items():
        alike = [failed.c.status == status, failed.c.error_type.is_not_distinct_from(error_type)]
        alone = sum(group[:2] == (status, error_type) for group in groups) == 1
        candidates = _rows(connection, *here, *alike, ordered=True, limit=KEYS_KEPT if alone else None)
        keys = (row.key for row in candidates if which.failures.reason(Failure(row.status, row.error_type, row.words)) is reason)
        yield FailedRows(status, error_type, reason.value, words, rows, list(islice(keys, KEYS_KEPT)), reason in which.reasons)
        candidates.close()


def _include(found: Outcome, row: sa.Row[Any]) -> None:
    counts = json.loads(row.counts)
    if not found.rounds or found.rounds[-1]["round"] != row.round:
        found.rounds.append(
            {"round": row.round, "batch_ids": [], "rows": 0, "requests": 0, "counts": {}, "cost_tally": CostTally().to_json()}
        )
    round_ = found.rounds[-1]
    round_["batch_ids"].append(row.batch_id)
    round_["rows"] += row.source_rows
    round_["requests"] += row.requests
    round_["counts"] = dict(sorted((Counter(round_["counts"]) + Counter(counts)).items()))
    found.batch_ids.append(row.batch_id)
    tally = CostTally.from_json(json.loads(row.tally))
    round_["cost_tally"] = (CostTally.from_json(round_["cost_tally"]) + tally).to_json()
    found.tally = found.tally + tally
    found.created_at = min(filter(None, (found.created_at, row.created_at)), default=None)
    found.ended_at = max(filter(None, (found.ended_at, row.ended_at)), default=None)

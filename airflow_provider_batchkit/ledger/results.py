"""The result of a job over all its rounds of asking, and how many rounds were sent whole.

A round asks again what failed in the rounds before it, under the same ids in batches of its own. It begins when every batch of the
round before it has landed, so a key is in flight in one batch at most. ``batchkit_succeeded`` and ``batchkit_failed`` hold a
key's outcome in the last round that asked it; ``batchkit_batch`` holds each round's batches with their own bills.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.ledger import outcomes
from airflow_provider_batchkit.ledger.engine import Part, write_transaction
from airflow_provider_batchkit.ledger.leases import hold_lease
from airflow_provider_batchkit.ledger.reasons import WORTH_A_ROUND, Wanted, failed_kinds
from airflow_provider_batchkit.ledger.states import HELD, BatchState
from airflow_provider_batchkit.ledger.tables import batch, failed, job, landing
from airflow_provider_batchkit.model import ANSWERED, CostTally, RequestStatus
from airflow_provider_batchkit.request.failed import FailedRows

_HELD = [state.value for state in HELD]


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


class Results(Part):
    """The part of the ledger that knows a job's rounds and its result."""

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
            found.kinds = list(failed_kinds(connection, which, failed.c.job_id == job_id))
            for kind in found.kinds:
                found.counts[kind.status] += kind.rows
        return found


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

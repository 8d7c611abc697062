"""A resumable step of a job in rounds: each round is asked when every batch of the rounds before it has landed.

A step continues from the job's state in the ledger, whichever attempt has written it, until it has to wait or nothing is left to ask. A
cap, an account that answers nothing, or results that lack lines end the rounds; what has landed is still the result.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from airflow_provider_batchkit.api.polling import Ended, GaveUp, PollState
from airflow_provider_batchkit.exceptions import (
    BatchGoneError,
    BatchNotEndedError,
    BatchVanishedError,
    CostLimitError,
    ReplaceRefusedError,
)
from airflow_provider_batchkit.jobs.advance import Asking, Landing, ask, gone_batches
from airflow_provider_batchkit.jobs.fetch import VANISHED
from airflow_provider_batchkit.jobs.submit import Attempt, SubmitReport
from airflow_provider_batchkit.jobs.waiting import Done, WaitFor
from airflow_provider_batchkit.landing import WriteDisposition
from airflow_provider_batchkit.ledger import BatchRecord, BatchState
from airflow_provider_batchkit.ledger.results import Outcome
from airflow_provider_batchkit.progress import counts_text
from airflow_provider_batchkit.request.failed import failed_text
from airflow_provider_batchkit.request.failures import ADVICE, Reason

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of a job."""

    outcome: Outcome
    #: the reason why no further round was asked; None when no round was left to ask
    stopped: str | None
    #: batches that are gone and have rows that no later round has asked
    gone: list[BatchRecord]
    #: the first round's report, when it found nothing to ask
    empty: SubmitReport | None

    def check(self, landing: Landing) -> None:
        """
        :raises BatchGoneError: when rows have no answer because their batch is gone
        :raises ReplaceRefusedError: when no row has an answer that could replace the table's rows
        """
        if self.gone:
            vanished = any((b.note or "").startswith(VANISHED) for b in self.gone)
            raise (BatchVanishedError if vanished else BatchGoneError)(
                f"{len(self.gone)} batches are gone before they landed, with {sum(b.requests for b in self.gone):,} requests: "
                f"{'; '.join(f'{b.batch_id} was {b.note}' for b in self.gone)}. They may have been billed. What landed is in "
                f"{landing.table}. With retry_gone=True and a further round (max_rounds) their rows are asked again, and billed again."
            )
        counts = self.outcome.counts
        if landing.disposition is WriteDisposition.REPLACE and self.outcome.batch_ids and not self.outcome.answered:
            raise ReplaceRefusedError(
                f"None of {counts.total():,} rows has an answer, so the old rows of {landing.table} stay: {dict(counts)}."
            )


_ACCEPTED = (BatchState.SUBMITTED, BatchState.PREPARED, BatchState.LANDED)


@dataclass(slots=True)
class RunStep:
    """One step of a job in rounds."""

    attempt: Attempt
    asking: Asking
    landing: Landing
    #: seconds between looks at running batches
    poke_interval: float
    #: seconds of waiting for a round's batches
    timeout: float
    _stopped: str | None = None
    _empty: SubmitReport | None = None
    #: shards of the batches that had landed before this step
    _landed_before: AbstractSet[int] = frozenset()

    def advance(self, *, land_again: bool) -> Done[RunResult] | WaitFor:
        """Go on until the job waits or is done.

        :param land_again: begin with landed and gone batches: the table may be another one or empty now, and a gone batch may be back
        """
        self._landed_before = {b.shard for b in self._batches(BatchState.LANDED)}
        wait = self._land_again() if land_again else None
        while wait is None:
            round_number = self._next_round()
            wait = None if round_number is None else self._ask(round_number)
            if wait is None:
                running = self._batches(BatchState.SUBMITTED, BatchState.PREPARED)
                if not running:
                    return Done(self._result())
                self.landing.listener.running([str(b.batch_id) for b in self._batches(*_ACCEPTED)])
                ended = self._ended(running)
                wait = ended if isinstance(ended, WaitFor) else self._land(ended)
        return wait

    def _batches(self, *states: BatchState) -> list[BatchRecord]:
        return [b for b in self.attempt.ledger.batches(self.attempt.job_id) if b.state in states]

    def _next_round(self) -> int | None:
        """The number of the round to begin now, or of one that an earlier attempt has not sent whole; None when there is none."""
        if self._stopped is not None:
            return None
        ledger, job_id = self.attempt.ledger, self.attempt.job_id
        batches = ledger.batches(job_id)
        begun = max((b.round for b in batches), default=0)
        if begun == 0 or begun > ledger.rounds_sent(job_id) or any(b.state is BatchState.SENDING for b in batches):
            return max(begun, 1)
        if any(b.state in (BatchState.SUBMITTED, BatchState.PREPARED) for b in batches):
            return None
        left = range(begun + 1, len(self.asking.rounds) + 1)
        self._stopped = self._problem(batches, more=bool(left))
        if self._stopped is not None:
            log.warning("%s", self._stopped)
            return None
        if left and self.asking.retry_gone and gone_batches(ledger, job_id):
            return begun + 1
        number = next((number for number in left if ledger.count_failed(job_id, self.asking.wanted(number))), None)
        if number is None and ledger.count_failed(job_id, self.asking.wanted(len(self.asking.rounds) + 1)):
            # A round that the account has stopped does not count. Its rows are asked in a round beyond the last one, because a remaining
            # round would ask other outcomes in another way.
            return max(begun, len(self.asking.rounds)) + 1
        return number

    def _problem(self, batches: Sequence[BatchRecord], *, more: bool) -> str | None:
        """Why this attempt must not ask another round; None when it may. ``more`` says whether a round is left."""
        # a UUIDv7 begins with its milliseconds
        began = datetime.fromtimestamp((uuid.UUID(self.attempt.attempt_id).int >> 80) / 1000, UTC)
        # a failure from before the attempt began does not count: the cause may have been fixed since
        fresh = [b.shard for b in batches if b.shard not in self._landed_before or (b.ended_at is not None and b.ended_at >= began)]
        words = self.attempt.ledger.stopped_by_account(self.attempt.job_id, fresh, self.asking.which.failures)
        if words is not None:
            return f"{words} Nothing more is asked by this attempt, since {ADVICE[Reason.ACCOUNT]}: it asks these rows again."
        torn = self.attempt.ledger.torn(self.attempt.job_id) if more else []
        if torn:
            return (
                f"The results of {', '.join(torn)} lack lines, and what they lack may be there and billed. Nothing more is asked before "
                "they are whole: clear the task to read them again, which costs nothing."
            )
        return None

    def _ask(self, round_number: int) -> WaitFor | None:
        """Ask a round. When the caps have no room for a later round, no more is asked and the task goes on: what landed is paid for."""
        try:
            asked = ask(self.attempt, self.asking, self.landing.listener, round_number)
        except CostLimitError as e:
            if round_number == 1:
                raise
            self._stopped = str(e)
        else:
            if isinstance(asked, WaitFor):
                return asked
            report = asked.result
            if round_number == 1 and not report.batch_ids:
                self._empty, self._stopped = report, "There was nothing to ask."
            elif not report.asked and not report.known:
                self._stopped = "The source has none of the failed rows any more."
        if self._stopped is not None:
            log.warning("Nothing was asked in round %d: %s", round_number, self._stopped)
        return None

    def _ended(self, running: Sequence[BatchRecord]) -> Sequence[BatchRecord] | WaitFor:
        """All of the batches when they have ended, or those that are not visible, for which the landing waits; else a wait for all."""
        hidden, open_ids = [], []
        for record in running:
            state = PollState([str(record.batch_id)], interval=self.poke_interval)
            self.attempt.kit.look(state)
            if state.seen:
                self.attempt.ledger.note_unseen(record, None)
            decision = state.decide(time.monotonic())
            if isinstance(decision, GaveUp) or state.hidden():
                hidden.append(record)
            elif not isinstance(decision, Ended):
                open_ids.append(str(record.batch_id))
        if hidden or not open_ids:
            return hidden or running
        until = datetime.now(UTC) + timedelta(seconds=self.timeout)
        why = f"The task waits for the end of {', '.join(open_ids)}, until {until:%Y-%m-%d %H:%M:%S} UTC at the latest."
        return WaitFor(tuple(str(b.batch_id) for b in running), until, until, why, about="round")

    def _land_again(self) -> WaitFor | None:
        batches = self.attempt.ledger.batches(self.attempt.job_id)
        wait = None
        for state in (BatchState.LANDED, BatchState.GONE):
            before = [b for b in batches if b.state is state]
            wait = wait or (self._land(before) if before else None)
        return wait

    def _land(self, batches: Sequence[BatchRecord]) -> WaitFor | None:
        ids = [str(b.batch_id) for b in batches]
        disposition = self.landing.disposition
        if disposition is WriteDisposition.REPLACE and any(
            b.batch_id not in ids for b in self.attempt.ledger.answered_batches(self.attempt.job_id)
        ):
            # the job's first answers have replaced the old rows, and later answers are added to them
            disposition = WriteDisposition.MERGE
        try:
            landed = self.landing.land(ids, disposition)
        except ReplaceRefusedError as e:
            if e.torn:
                raise
            # no row was answered: the outcomes are noted, the old rows stay, and a further round may have answers that replace them
            log.warning("%s", e)
            landed = self.landing.land(ids, WriteDisposition.MERGE)
        except BatchGoneError as e:
            if self.landing.disposition is WriteDisposition.REPLACE and not self.asking.retry_gone:
                raise
            # the error is raised at the end, unless a further round asks these rows
            log.warning("%s", e)
            return None
        except BatchNotEndedError:
            # a batch that was not visible a moment ago is running
            return None
        return landed if isinstance(landed, WaitFor) else None

    def _result(self) -> RunResult:
        found = self.attempt.ledger.outcome(self.attempt.job_id, self.asking.which)
        for round_ in found.rounds:
            asked = f"{round_['rows']:,} rows in {round_['requests']:,} requests"
            log.info("Round %d: %s; outcomes: %s", round_["round"], asked, counts_text(round_["counts"]))
        why = failed_text(found.kinds, found.counts.total())
        if why:
            log.warning("%s", why)
        return RunResult(found, self._stopped, gone_batches(self.attempt.ledger, self.attempt.job_id), self._empty)

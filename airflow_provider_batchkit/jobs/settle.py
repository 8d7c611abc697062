"""Settling a shard in doubt, whose POST ended unseen: it is proved to have been accepted, or proved never to have been.

The API has no idempotency key, so the shard's batch is looked for among those of the workspace: of the same size, created when it may
have been, and proved by no row of the ledger to be its own.

- An ended candidate is proved by the first lines of its results, whose ``custom_id`` are in the shard's journal or are not.
- A running one cannot be told apart from somebody else's batch of the same size, so its end is waited for.
- The shard was never accepted when looks that began later than ``settle_s`` after the doubt have shown no candidate over a span that is
  longer than a batch may be missing from the list, and a batch that this connection submitted before is visible to it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from airflow_provider_batchkit.api.polling import ABSENCE_S, ENDED
from airflow_provider_batchkit.api.results import parse_blocks
from airflow_provider_batchkit.api.wire import ApiClock
from airflow_provider_batchkit.exceptions import (
    BatchNotEndedError,
    BatchNotVisibleError,
    BatchUnavailableError,
    ResultStreamError,
    SubmitUncertainError,
)
from airflow_provider_batchkit.jobs.waiting import WaitFor, together
from airflow_provider_batchkit.kit import BatchKit
from airflow_provider_batchkit.ledger import BatchRecord, BatchState, Ledger
from airflow_provider_batchkit.model import BatchSnapshot

log = logging.getLogger(__name__)

#: seconds for which a wait may hold a worker slot; longer waits go on without one
PATIENCE_S = 60.0
#: seconds between the first looks; later looks are further apart
_FIRST_PAUSE_S = 5.0
#: Results are read in pieces of _PROOF_BYTES until _PROOF_LINES lines are whole.
_PROOF_BYTES, _PROOF_LINES = 1 << 10, 5
#: A series of looks proves a shard void only with at least so many looks, no further apart than planned.
_LOOKS_AT_LEAST = 3
#: A look that comes later than planned by more than this begins another series.
_LOOK_OVERDUE = timedelta(minutes=2)
#: the API ends or expires every batch within 24 hours of its creation (API documentation); one more hour allows for its queues
_LIFE = timedelta(hours=25)


@dataclass(frozen=True, slots=True)
class SettleTimes:
    """The times of settling, in seconds.

    ``settle_s`` must exceed the sum of the POST's total time, late acceptance and slow visibility.
    """

    #: seconds from the beginning of a doubt; only a later look can prove that a shard was never accepted. The default is unproved
    settle_s: float = 900.0
    #: the longest time for which a batch that was visible may be missing from the list
    absence_s: float = ABSENCE_S
    #: the greatest difference between the API's clock and the ledger's, in either direction
    skew_s: float = 900.0

    @property
    def post_s(self) -> float:
        """The total time of a POST, from its last check of the lease until its sender gives it up."""
        return self.settle_s / 2

    @property
    def window_s(self) -> float:
        """Seconds after the doubt in which the batch may still be created: the POST's total time plus late acceptance."""
        return self.post_s + self.settle_s / 6


DEFAULT_TIMES = SettleTimes()


class Settler:
    """Settles the ``sending`` rows of a job."""

    def __init__(
        self,
        kit: BatchKit,
        ledger: Ledger,
        times: SettleTimes,
        *,
        lease: int | None,
        since: datetime | None = None,
        waited_for: Iterable[str] = (),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        :param lease: the lease of the settling attempt; without one a row can be proved to have been accepted, but not to be void
        :param since: when the attempt began; results that cannot be read are read again for a limited time from then on
        :param waited_for: candidates that an earlier leg of the task has waited for
        """
        self._kit = kit
        self._ledger = ledger
        self._times = times
        self._lease = lease
        self._since = since
        self._sleep = sleep
        self._waited_for = set(waited_for)
        #: (job, shard, candidate) where the candidate is another row's, perhaps one of this job, or can no longer be read
        self._ruled_out: set[tuple[str, int, str]] = set()

    def settle(self, job_id: str) -> WaitFor | None:
        """Move every ``sending`` row of the job to ``submitted`` or ``void``; returns the wait that is needed before that is possible.

        It sleeps only when all will be decided within a minute and no candidate runs.

        :raises SubmitUncertainError: when a retry, or a person, must decide
        :raises LeaseLostError: when another attempt of the job has begun
        """
        in_doubt, slept = self._in_doubt(job_id), 0.0
        for record in in_doubt:
            log.warning(
                "Nobody saw how the POST of %s ended (%s requests, %s): its batch is looked for before anything is sent again. "
                "There is nothing to do, and nothing is paid twice.",
                record,
                f"{record.requests:,}",
                _at(record.intended_at),
            )
        while in_doubt:
            wait = self.look(in_doubt)
            if wait is not None:
                pause = max((wait.until - self._ledger.now()).total_seconds(), 0.0)
                if wait.batch_ids or slept + pause > PATIENCE_S:
                    return wait
                self._sleep(pause)
                slept += pause
            in_doubt = self._in_doubt(job_id)
        return None

    def _in_doubt(self, job_id: str) -> list[BatchRecord]:
        return [record for record in self._ledger.batches(job_id) if record.state is BatchState.SENDING]

    def look(self, records: Sequence[BatchRecord]) -> WaitFor | None:
        """One look at the workspace's list for all of ``records``, which are in doubt."""
        began, clock = self._ledger.now(), ApiClock(self._ledger.now)
        skew = timedelta(seconds=self._times.skew_s)
        with _uncertain(records):
            listed = list(self._kit.recent(min(record.intended_at for record in records) - skew, clock))
        if max(clock.ahead, clock.behind) > skew:
            log.warning(
                "The API's clock is %s of the ledger's by %s: batches are looked for at the times of both. Set the clock of the ledger's "
                "database, or of this machine where the ledger is a file.",
                *("ahead", clock.ahead) if clock.ahead > clock.behind else ("behind", clock.behind),
            )
        for batch_id in sorted(self._waited_for - {s.batch_id for s in listed}):
            log.warning("%s, which was waited for, is not in the workspace's list any more: it was deleted, or is hidden for now", batch_id)
        self._waited_for.clear()
        waits = [self._decide(record, listed, began, clock) for record in records]
        return together(wait for wait in waits if wait is not None)

    def _decide(self, record: BatchRecord, listed: Sequence[BatchSnapshot], began: datetime, clock: ApiClock) -> WaitFor | None:
        assert record.doubt_at is not None, "a row is settled only after its doubt has begun"
        running, unread, own = [], [], []
        for candidate in self._candidates(record, listed, clock):
            if candidate.processing_status != ENDED:
                running.append(candidate)
                continue
            proved = self._proves(record, candidate)
            if proved:
                own.append(candidate)
            if proved is None:
                unread.append(candidate)
        if own:
            self._ledger.submitted(record.job_id, record.shard, own[0])
            log.warning("Found %s: %s was accepted, as its results prove", own[0].batch_id, record)
            self._name_strays(record, own[1:], [*running, *unread])
            return None
        if not running and not unread:
            return self._nothing_seen(record, listed, began)
        self._ledger.note_unseen(record, None, lease=self._lease)
        waits = [self._until_readable(record, candidate, began) for candidate in unread]
        if running:
            waits.append(_until_ended(record, running, began, clock.behind))
        return together(waits)

    @staticmethod
    def _name_strays(record: BatchRecord, proved: Iterable[BatchSnapshot], possible: Iterable[BatchSnapshot]) -> None:
        """Log further batches that the same POST has made, because something on the way to the API, such as a gateway, has repeated it."""
        for stray in proved:
            log.error(
                "%s answers the same %s requests as %s: the POST was repeated on the way to the API, which makes a batch each time. Both "
                "are billed; this one's answers are not landed, and no figure of this package holds its cost. Find what repeats a POST, "
                "such as a gateway's retries, and switch it off.",
                stray.batch_id, f"{record.requests:,}", record,
            )  # fmt: skip
        for other in possible:
            log.warning(
                "%s has as many requests as %s, and nothing tells yet whose it is. If nobody else has sent it, the POST was repeated on "
                "the way to the API, and it is billed, too.",
                other.batch_id, record,
            )  # fmt: skip

    def _candidates(self, record: BatchRecord, listed: Sequence[BatchSnapshot], clock: ApiClock) -> Iterator[BatchSnapshot]:
        """Batches that may be the record's: they have its size, were created in its time, and belong to no row yet. A batch whose size the
        API does not show is not ruled out.
        """
        assert record.doubt_at is not None
        skew = timedelta(seconds=self._times.skew_s)
        first = record.intended_at - skew - clock.behind
        last = record.doubt_at + timedelta(seconds=self._times.window_s) + skew + clock.ahead
        possible = [s for s in listed if (s.counts.total == record.requests or not s.counted) and first <= s.created_at <= last]
        taken = self._ledger.claims([s.batch_id for s in possible])
        for candidate in possible:
            if candidate.batch_id in taken or _pair(record, candidate) in self._ruled_out:
                continue
            if candidate.archived_at is not None:
                self._ruled_out.add(_pair(record, candidate))
                log.warning("%s is archived, so that nobody can have its answers: it is not taken for %s", candidate.batch_id, record)
                continue
            yield candidate

    def _proves(self, record: BatchRecord, candidate: BatchSnapshot) -> bool | None:
        """Whether the first result lines of an ended batch belong to the record's shard; None when they cannot be read now.

        Several lines are read before a batch is ruled out, since a stray line may come before the lines of the shard.
        """
        import anthropic

        try:
            first = self.first_custom_ids(candidate.batch_id)
            if any(self._ledger.asks(record, custom_id) for custom_id in first):
                return True
        except (BatchUnavailableError, BatchNotEndedError, ResultStreamError, anthropic.APIError) as e:
            log.warning("The results of %s, which may be %s, cannot be read now: %s", candidate.batch_id, record, e)
            return None
        if not first:
            log.warning("The results of %s, which may be %s, have no readable line now", candidate.batch_id, record)
            return None
        self._ruled_out.add(_pair(record, candidate))
        log.info("%s is not %s: its first result is %s", candidate.batch_id, record, first[0])
        return False

    def _nothing_seen(self, record: BatchRecord, listed: Sequence[BatchSnapshot], began: datetime) -> WaitFor | None:
        """Handle a look without a candidate: it begins a series of such looks after the deadline, continues one, or completes the proof."""
        assert record.doubt_at is not None
        deadline, absence = record.doubt_at + timedelta(seconds=self._times.settle_s), timedelta(seconds=self._times.absence_s)
        since = unseen_since(record, began, absence)
        if began <= deadline:
            self._ledger.note_unseen(record, None, lease=self._lease)
            target, latest, longest = deadline, deadline + absence, absence
        else:
            if since is not None and began - since > absence:
                self._conclude(record, listed, began)
                return None
            self._ledger.note_unseen(record, since or began, began, lease=self._lease)
            target = latest = (since or began) + absence
            longest = absence / _LOOKS_AT_LEAST
        # a look that begins exactly at the target is not later than it
        wanted = min(max((began - record.doubt_at).total_seconds(), _FIRST_PAUSE_S), max(longest.total_seconds(), 0.01))
        pause = min(wanted, (target - began).total_seconds() + 0.01)
        return WaitFor(
            (),
            began + timedelta(seconds=pause),
            latest,
            f"No batch of the workspace can be {record}. When none has shown until {_at(latest)}, it was never accepted and is sent again.",
        )

    def _conclude(self, record: BatchRecord, listed: Sequence[BatchSnapshot], began: datetime) -> None:
        """Declare the row void: its batch was looked for long enough, by a key that sees the workspace."""
        self._require_witness(record, listed)
        if self._lease is None:
            raise SubmitUncertainError(
                f"{record} was never accepted, as far as the workspace's list shows. Nothing is billed for it. Clear the submit task: it "
                "settles the shard and sends its rows."
            )
        reason = f"not among the workspace's batches from {_at(record.unseen_since or began)} to {_at(began)}"
        if self._ledger.void(record, reason, self._lease):
            log.warning("No batch of %s exists: it was never accepted and nothing was billed. Its rows are sent anew", record)

    def _require_witness(self, record: BatchRecord, listed: Sequence[BatchSnapshot]) -> None:
        """Require a visible batch of ours. A key of another workspace sees none of our batches, so its "not found" proves nothing.

        :raises SubmitUncertainError: when no batch that this connection submitted before is visible
        """
        reached = self._kit.workspaces
        known = self._ledger.witnesses(record, reached)
        with _uncertain([record]):
            if not {s.batch_id for s in listed}.isdisjoint(known) or any_visible(self._kit, known):
                return
        if record.workspace not in (None, *reached):
            why = f"sent it with a key of the workspace {record.workspace}, and has one of {reached[0]} now"
        elif known:
            why = f"sees none of {', '.join(known[:3])}, which it submitted before, so its key may be of another workspace"
        else:
            why = "has submitted no batch before that could still be seen, so nothing shows that its key is of the same workspace"
        raise SubmitUncertainError(
            f"{record} is not among the workspace's batches, but this does not prove that it was never accepted: the connection "
            f"{record.anthropic_conn_id!r} {why}. Nothing was sent by this attempt. If its key was changed, give it one of the workspace "
            f"that the shard was sent to, and run the task again. Else look in the Claude Console for a batch of {record.requests:,} "
            f"requests of about {_at(record.intended_at)}, and decide: {record.settle_command}."
        )

    def _until_readable(self, record: BatchRecord, candidate: BatchSnapshot, began: datetime) -> WaitFor:
        """The wait for another look at an ended candidate whose results cannot be read now. The intervals grow.

        :raises SubmitUncertainError: when the results could not be read for too long
        """
        assert record.doubt_at is not None
        since = max(record.doubt_at, candidate.ended_at or candidate.created_at, self._since or record.doubt_at)
        latest = since + timedelta(seconds=self._times.settle_s + self._times.absence_s)
        if began > latest:
            raise SubmitUncertainError(
                f"{record} may be {candidate.batch_id}, which has ended and whose results cannot be read since {_at(since)}. Nothing was "
                "sent. Run the task again to look again, or decide it: "
                f"{record.settle_command}."
            )
        pause = max((began - since).total_seconds(), _FIRST_PAUSE_S)
        why = f"{record} may be {candidate.batch_id}, whose results cannot be read now."
        return WaitFor((), began + timedelta(seconds=pause), latest, why)

    def first_custom_ids(self, batch_id: str) -> list[str]:
        """The ``custom_id`` values of the first readable result lines. It reads little more than these lines."""
        chunks = self._kit.stream_results(batch_id, chunk_bytes=_PROOF_BYTES)
        try:
            blocks = (block.custom_ids for block, _ in parse_blocks(chunks, block_bytes=1))
            return list(itertools.islice(itertools.chain.from_iterable(blocks), _PROOF_LINES))
        finally:
            chunks.close()


def unseen_since(record: BatchRecord, now: datetime, absence: timedelta) -> datetime | None:
    """The time of the first look in the row's unbroken series of looks that showed nothing; None when a new series must begin.

    After a longer pause than planned a new series begins, since the batch may have been visible in between.
    """
    last = record.unseen_at
    return record.unseen_since if last is not None and now - last <= absence + _LOOK_OVERDUE else None


def any_visible(kit: BatchKit, batch_ids: Iterable[str]) -> bool:
    """Whether the connection sees one of these batches at least: False when every one answers 404.

    :raises BatchUnavailableError: when none was seen and one could not be looked at: a refused key proves nothing about the workspace
    :raises anthropic.APIError: in the same case, for other errors of the API
    """
    import anthropic

    failure: Exception | None = None
    for batch_id in batch_ids:
        try:
            kit.get(batch_id)
        except BatchNotVisibleError:
            continue
        except (BatchUnavailableError, anthropic.APIError) as e:
            failure = failure or e
            continue
        return True
    if failure is not None:
        raise failure
    return False


def _pair(record: BatchRecord, candidate: BatchSnapshot) -> tuple[str, int, str]:
    return record.job_id, record.shard, candidate.batch_id


def _until_ended(record: BatchRecord, running: Sequence[BatchSnapshot], began: datetime, behind: timedelta) -> WaitFor:
    """
    :param behind: how far the API's clock, by which a batch expires, is behind the ledger's clock
    :raises SubmitUncertainError: when a candidate still runs although the API should have ended it
    """
    names = " or ".join(candidate.batch_id for candidate in running)
    latest = max((candidate.expires_at or candidate.created_at + _LIFE) for candidate in running) + timedelta(hours=1) + behind
    if began > latest:
        raise SubmitUncertainError(
            f"{record} may be {names}, which still runs although the API ends every batch within a day of its creation. Nothing was sent. "
            f"Run the task again to look again, or decide it: {record.settle_command}."
        )
    ids = tuple(candidate.batch_id for candidate in running)
    why = (
        f"{record} ({record.requests:,} requests) may be {names}, which runs and has as many. The task waits for its end, until "
        f"{_at(latest)} at the latest: its results tell whose it is. Nothing is sent or paid twice meanwhile."
    )
    return WaitFor(ids, latest, latest, why)


@contextmanager
def _uncertain(records: Sequence[BatchRecord]) -> Iterator[None]:
    """Turn an API error of a look into one that says that nothing is decided and that a retry looks again.

    :raises SubmitUncertainError: in place of the API's error
    """
    import anthropic

    try:
        yield
    except (BatchUnavailableError, anthropic.APIError) as e:
        what = ", ".join(map(str, records))
        raise SubmitUncertainError(f"Nobody knows whether {what} was accepted, and looking failed: {e} Nothing was sent.") from e


def _at(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M:%S} UTC"

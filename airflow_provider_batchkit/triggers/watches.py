"""The watches of a connection's shared poller: which of them are due, and how a look changes each of them. No clock, no I/O.

Two times are passed in: ``clock`` is the event loop's time, by which looks are scheduled. ``now`` is in seconds since the epoch, as the
deadlines are, since a trigger may move to another process.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from airflow_provider_batchkit.api.polling import ENDED, Decision, PollState, Wait, backoff
from airflow_provider_batchkit.exceptions import PollError
from airflow_provider_batchkit.model import BatchSnapshot

#: up to so many batches are retrieved one by one: three small answers cost less than one page of up to 1000 batches, most of which may
#: belong to others
FEW = 3
#: Retrieves that are worth one page of the list. A page takes about twice the CPU time of a retrieve (4 ms, 2 ms) and also one call, but up
#: to 350 KB of transfer.
_RETRIEVES_PER_PAGE = 10


@dataclass(eq=False, slots=True)
class Watch:
    """The batches that one trigger waits for."""

    state: PollState
    #: when its next look is due, on the loop's clock
    due: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a look failed; the first fields are those of :meth:`PollState.failed`. ``retry_after`` is in seconds."""

    error: str
    fatal: bool = False
    retry_after: float | None = None
    #: whether the API answered 404 for the batch; that is an answer, and the batch is hidden now
    hidden: bool = False


@dataclass(slots=True)
class Look:
    """The result of one look. ``clock`` is when it began."""

    clock: float
    shown: dict[str, BatchSnapshot] = field(default_factory=dict)
    #: batch id → a failure that concerns only this batch
    failed: dict[str, Failure] = field(default_factory=dict)
    #: a failure of the connection; it concerns every wanted batch that was not shown and has no failure of its own
    failure: Failure | None = None

    @property
    def hopeless(self) -> bool:
        """Whether the connection failed in a way that does not pass."""
        return self.failure is not None and self.failure.fatal

    @property
    def refused(self) -> bool:
        """Whether the API refused to show something: a 404, or a refused key."""
        return self.hopeless or any(failure.hidden or failure.fatal for failure in self.failed.values())

    def refuses(self, watch: Watch) -> bool:
        """Whether the API refused to show a batch of the watch."""
        failed = [self.failed[batch_id] for batch_id in watch.state.open_ids() if batch_id in self.failed]
        return self.hopeless or any(failure.hidden or failure.fatal for failure in failed)

    def has(self, batch_id: str) -> bool:
        """Whether the look has an answer or a failure for this batch."""
        return batch_id in self.shown or batch_id in self.failed


class Search:
    """The batches that are still to be found in the list, which is newest first, and whether its next page is worth reading.

    :param wanted: batch id → time of its creation, None while that is not known
    """

    def __init__(self, wanted: Mapping[str, datetime | None]) -> None:
        self.missing = dict(wanted)
        self._worth = len(wanted)
        self._pages = 0

    def read(self, shown: Collection[str], oldest: datetime | None, *, more: bool) -> bool:
        """Note a page that showed ``shown`` and whose last batch was created at ``oldest``; True when the next page is worth reading.

        It is not when few batches are missing, when every missing batch is newer than the page's end (so it should have appeared), or when
        the pages cost as much as retrieving every wanted batch. The batches that are then missing are retrieved.
        """
        self._pages += 1
        for batch_id in shown:
            self.missing.pop(batch_id, None)
        if not more or oldest is None or len(self.missing) <= FEW or self._pages * _RETRIEVES_PER_PAGE >= self._worth:
            return False
        born = [created for created in self.missing.values() if created is not None]
        return len(born) < len(self.missing) or min(born) <= oldest


class Watches:
    """All watches of one connection's poller."""

    def __init__(self) -> None:
        self._all: set[Watch] = set()
        self._by_id: dict[str, list[Watch]] = {}
        self._seen: dict[str, BatchSnapshot] = {}
        self._failures = 0
        #: the end of the pause, on the loop's clock, after the connection failed or the API asked for a wait
        self._paused_until = float("-inf")

    def join(self, state: PollState, *, due: float, now: float, clock: float) -> Watch:
        """Watch the open batches of ``state``, first at ``due`` or as soon as the connection's pause is over."""
        watch = Watch(state, due)
        self._schedule(watch, due, now=now, clock=clock)
        self._all.add(watch)
        for batch_id in state.open_ids():
            self._by_id.setdefault(batch_id, []).append(watch)
        return watch

    def leave(self, watch: Watch) -> None:
        """Stop watching. A watch that has already left is ignored."""
        if watch not in self._all:
            return
        self._all.discard(watch)
        for batch_id in watch.state.batch_ids:
            self._forget(batch_id, watch)

    def next_due(self) -> float:
        """When the next look is due, on the loop's clock."""
        return min((watch.due for watch in self._all), default=float("inf"))

    def due(self, clock: float) -> list[Watch]:
        """The watches that are due."""
        return [watch for watch in self._all if watch.due <= clock]

    def paused(self, clock: float) -> bool:
        """Whether the connection is in a pause."""
        return clock < self._paused_until

    def wanted(self, due: Collection[Watch]) -> dict[str, datetime | None]:
        """The open batches of ``due``, each with the time of its creation where that is known."""
        ids = dict.fromkeys(batch_id for watch in due for batch_id in watch.state.open_ids())
        return {batch_id: seen.created_at if (seen := self._seen.get(batch_id)) else None for batch_id in ids}

    def worth_listing(self, wanted: Mapping[str, datetime | None]) -> bool:
        """Whether to read the list for ``wanted``. A few batches, and a few new ones, are retrieved instead.

        A few known batches among many watched ones are still looked for in the list: its answer counts for the others, too, so that all
        become due together. Retrieved one by one, each would keep its own schedule.
        """
        return len(wanted) > FEW or (len(self._by_id) > FEW and any(wanted.values()))

    def watched(self, batch_id: str) -> bool:
        """Whether any watch has this batch."""
        return batch_id in self._by_id

    def unchanged(self, batch_id: str, status: str) -> BatchSnapshot | None:
        """The last snapshot of a batch if it had this status: until the batch ends, nothing else of it changes."""
        seen = self._seen.get(batch_id)
        return seen if seen is not None and seen.processing_status == status else None

    def concerned(self, due: Collection[Watch], look: Look) -> list[Watch]:
        """The watches that a look changes: the due ones and those whose batches it showed; all when the connection is hopeless."""
        found = dict.fromkeys(self._all if look.hopeless else due)
        for batch_id in look.shown:
            found.update(dict.fromkeys(self._by_id.get(batch_id, ())))
        return list(found)

    def judge_connection(self, due: Collection[Watch], look: Look, clock: float) -> float | None:
        """Begin a pause when the connection failed; returns its length in seconds, else None."""
        if look.failure is None:
            self._failures = 0
            return None
        self._failures += 1
        shortest = min((watch.state.interval for watch in due), default=0.0)
        pause = backoff(shortest, self._failures, look.failure.retry_after or 0.0)
        self._paused_until = clock + pause
        return pause

    def tell(self, watch: Watch, look: Look, *, now: float, clock: float) -> Decision:
        """Update a watch from a look that ended at ``clock``, and return its decision. A watch that goes on waiting is scheduled again.

        A batch that the look shows counts for every watch that has it, due or not. A failure counts only for the watches that were due and
        did not get their answer, or for all when it does not pass.
        """
        state = watch.state
        open_ids = state.open_ids()
        asked = watch.due <= look.clock or look.hopeless
        shown = [look.shown[batch_id] for batch_id in open_ids if batch_id in look.shown]
        failed = {batch_id: look.failed[batch_id] for batch_id in open_ids if batch_id in look.failed}
        hidden = {batch_id: failure.error for batch_id, failure in failed.items() if failure.hidden}
        complete = len(shown) + len(hidden) == len(open_ids)
        try:
            if complete:
                state.saw(shown)
            else:
                state.note(shown)
        except PollError as e:
            state.failed(str(e), fatal=True)
        if asked and hidden:
            state.hid(hidden, now)
        if asked and not complete:
            failure = self._failure([failure for failure in failed.values() if not failure.hidden], look)
            state.failed(failure.error, fatal=failure.fatal, retry_after=failure.retry_after)
        for snapshot in shown:
            self._seen[snapshot.batch_id] = snapshot
            if snapshot.processing_status == ENDED:
                self._forget(snapshot.batch_id, watch)
        decision = state.decide(now)
        if isinstance(decision, Wait) and (asked or complete):
            # counted from the start of the look, so that all watches that it answered are due together again and share the next look
            self._schedule(watch, (look.clock if complete else clock) + decision.seconds, now=now, clock=clock)
        return decision

    def hold(self, watch: Watch, *, now: float, clock: float) -> Decision:
        """The decision of a watch that is due during a pause. Unless its deadline has come, it waits for the end of the pause."""
        decision = watch.state.decide(now)
        self._schedule(watch, clock, now=now, clock=clock)
        return decision

    @staticmethod
    def _failure(own: Collection[Failure], look: Look) -> Failure:
        fatal = next((failure for failure in own if failure.fatal), None)
        failure = fatal or next(iter(own), look.failure)
        assert failure is not None, "a look answers for every batch that it was asked for"
        return failure

    def _schedule(self, watch: Watch, due: float, *, now: float, clock: float) -> None:
        """Schedule the watch's next look at ``due``, but not within a pause of the connection, and not after the watch's deadline."""
        due, deadline = max(due, self._paused_until), watch.state.deadline
        watch.due = due if deadline is None else min(due, clock + max(deadline - now, 0.0))

    def _forget(self, batch_id: str, watch: Watch) -> None:
        watching = self._by_id.get(batch_id)
        if watching is None or watch not in watching:
            return
        watching.remove(watch)
        if not watching:
            del self._by_id[batch_id]
            self._seen.pop(batch_id, None)

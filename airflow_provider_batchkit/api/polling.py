"""When to look at a batch again, and what to make of what was seen. No clock, no I/O: one decision class for trigger, poke and kit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from airflow_provider_batchkit.exceptions import PollError
from airflow_provider_batchkit.model import BatchCounts, BatchSnapshot

IN_PROGRESS = "in_progress"
CANCELING = "canceling"
ENDED = "ended"
_KNOWN = frozenset({IN_PROGRESS, CANCELING, ENDED})

#: failed looks in a row before polling gives up; a look that succeeds starts the count anew
MAX_FAILURES = 20
_MAX_BACKOFF_S = 300.0
#: a batch is looked at every twentieth of its age, in whole intervals, so that all that share an interval stay on one beat
_AGE_SHARE = 0.05
#: and at least every so many intervals
_MAX_INTERVALS = 4


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again in ``seconds``."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Ended:
    """Every batch has ended, or one of them where the wait is for the first."""


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The deadline passed while ``open_ids`` were still running."""

    open_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GaveUp:
    """Looking failed too often in a row, or in a way that will not mend."""

    reason: str


Decision = Wait | Ended | TimedOut | GaveUp


def interval_at_age(interval: float, age: float) -> float:
    """Seconds until the next look at a batch that is ``age`` seconds old: 1 to 4 whole intervals, as many as fit a twentieth of its age.

    ``interval`` is the shortest because that is what the word says to whoever set it. Most batches end within the hour, and those that do
    not may take a day: with 60 s, one of up to 40 minutes is looked at every minute, and one of 80 minutes or more every 4 minutes.
    """
    fitting = int(age * _AGE_SHARE / interval) if interval > 0 else 1
    return interval * min(max(fitting, 1), _MAX_INTERVALS)


def backoff(interval: float, failures: int, retry_after: float = 0.0) -> float:
    """Seconds to wait after ``failures`` failed looks in a row: doubling from ``interval``, at least what the API asked for."""
    return max(min(interval * 2.0 ** (failures - 1), max(_MAX_BACKOFF_S, interval)), retry_after)


@dataclass(slots=True)
class PollState:
    """Watches batches until the last has ended, or the first.

    Tell it what was seen (:meth:`saw`) or that looking failed (:meth:`failed`), then ask :meth:`decide` what to do. Times are seconds on
    any clock that the caller uses throughout; ``deadline`` is on the same clock.
    """

    batch_ids: Sequence[str]
    #: seconds between looks; grows by ``factor`` a look up to ``max_interval``
    interval: float
    max_interval: float | None = None
    factor: float = 1.5
    #: intervals follow the age of the youngest open batch instead (:func:`interval_at_age`); ``now`` is then seconds since the epoch
    by_age: bool = False
    deadline: float | None = None
    #: the wait is over as soon as one of the batches has ended; set when the state is made, and never changed
    first: bool = False
    seen: dict[str, BatchSnapshot] = field(default_factory=dict)
    _failures: int = 0
    _last_error: str = ""
    _retry_after: float = 0.0
    _fatal: str | None = None
    _looks: int = 0

    def open_ids(self) -> list[str]:
        """Batches to look at, in the order given: those not seen ended. None once the wait for the first is over."""
        not_ended = [b for b in self.batch_ids if (s := self.seen.get(b)) is None or s.processing_status != ENDED]
        return [] if self.first and len(not_ended) < len(self.batch_ids) else not_ended

    def saw(self, snapshots: Iterable[BatchSnapshot]) -> None:
        """Note a successful look.

        :raises PollError: as :meth:`note` does
        """
        self.note(snapshots)
        self._failures = 0
        self._retry_after = 0.0
        self._looks += 1

    def note(self, snapshots: Iterable[BatchSnapshot]) -> None:
        """Keep what was shown of some open batches, without counting it as a look: others may have failed to show.

        :raises PollError: for a status that the API does not document; guessing could end a wait early or never
        """
        for snapshot in snapshots:
            if snapshot.processing_status not in _KNOWN:
                raise PollError(
                    f"Batch {snapshot.batch_id} has the unknown status {snapshot.processing_status!r} (known: "
                    f"{', '.join(sorted(_KNOWN))}). The batch is untouched; a newer version of the provider may know it."
                )
            self.seen[snapshot.batch_id] = snapshot

    def failed(self, error: str, *, fatal: bool = False, retry_after: float | None = None) -> None:
        """Note a failed look. ``fatal``: looking again cannot help. ``retry_after``: seconds that the API asked us to wait."""
        self._failures += 1
        self._last_error = error
        self._retry_after = retry_after or 0.0
        if fatal:
            self._fatal = error

    def decide(self, now: float) -> Decision:
        """What to do next at the time ``now``."""
        open_ids = self.open_ids()
        if not open_ids:
            return Ended()
        if self._fatal is not None:
            return GaveUp(self._fatal)
        if self._failures >= MAX_FAILURES:
            return GaveUp(f"{self._failures} looks in a row failed, the last with: {self._last_error}")
        if self.deadline is not None and now >= self.deadline:
            return TimedOut(tuple(open_ids))
        seconds = self._next_interval(now, open_ids)
        if self.deadline is not None:
            seconds = min(seconds, max(self.deadline - now, 0.0))
        return Wait(seconds)

    def counts(self) -> BatchCounts:
        """Requests per status over every batch seen so far."""
        total = BatchCounts()
        for snapshot in self.seen.values():
            total = total + snapshot.counts
        return total

    def _next_interval(self, now: float, open_ids: Sequence[str]) -> float:
        if self._failures:
            return backoff(self.interval, self._failures, self._retry_after)
        if self.by_age:
            births = [self.seen[b].created_at.timestamp() for b in open_ids if b in self.seen]
            return interval_at_age(self.interval, now - max(births)) if births else self.interval
        if self.max_interval is None:
            return self.interval
        return float(min(self.interval * self.factor ** max(self._looks - 1, 0), self.max_interval))


def validate_event(event: Mapping[str, object] | None) -> Mapping[str, object]:
    """A trigger's event crosses processes and versions; anything malformed must fail loudly.

    :raises PollError: when the event is not one that :class:`BatchTrigger` sends
    """
    if not isinstance(event, Mapping) or event.get("status") not in ("ended", "timeout", "error"):
        raise PollError(
            f"The trigger sent an event that this version does not know: {event!r}. The batches are untouched; "
            "clear the task to wait again."
        )
    return event

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


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again in ``seconds``."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Ended:
    """Every batch has ended."""


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The deadline passed while ``open_ids`` were still running."""

    open_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GaveUp:
    """Looking failed too often in a row, or in a way that will not mend."""

    reason: str


Decision = Wait | Ended | TimedOut | GaveUp


@dataclass(slots=True)
class PollState:
    """Watches batches until the last has ended.

    Tell it what was seen (:meth:`saw`) or that looking failed (:meth:`failed`), then ask :meth:`decide` what to do. Times are seconds on
    any clock that the caller uses throughout; ``deadline`` is on the same clock.
    """

    batch_ids: Sequence[str]
    #: seconds between looks; grows by ``factor`` a look up to ``max_interval``
    interval: float
    max_interval: float | None = None
    factor: float = 1.5
    deadline: float | None = None
    seen: dict[str, BatchSnapshot] = field(default_factory=dict)
    _failures: int = 0
    _last_error: str = ""
    _retry_after: float = 0.0
    _fatal: str | None = None
    _looks: int = 0

    def open_ids(self) -> list[str]:
        """Batches that have not been seen ended, in the order given."""
        return [b for b in self.batch_ids if (s := self.seen.get(b)) is None or s.processing_status != ENDED]

    def saw(self, snapshots: Iterable[BatchSnapshot]) -> None:
        """Note a successful look.

        :raises PollError: for a status that the API does not document; guessing could end a wait early or never
        """
        for snapshot in snapshots:
            if snapshot.processing_status not in _KNOWN:
                raise PollError(
                    f"Batch {snapshot.batch_id} has the unknown status {snapshot.processing_status!r} (known: "
                    f"{', '.join(sorted(_KNOWN))}). The batch is untouched; a newer version of the provider may know it."
                )
            self.seen[snapshot.batch_id] = snapshot
        self._failures = 0
        self._retry_after = 0.0
        self._looks += 1

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
        seconds = self._next_interval()
        if self.deadline is not None:
            seconds = min(seconds, max(self.deadline - now, 0.0))
        return Wait(seconds)

    def counts(self) -> BatchCounts:
        """Requests per status over every batch seen so far."""
        total = BatchCounts()
        for snapshot in self.seen.values():
            total = total + snapshot.counts
        return total

    def _next_interval(self) -> float:
        if self._failures:
            backoff = min(self.interval * 2.0 ** (self._failures - 1), max(_MAX_BACKOFF_S, self.interval))
            return max(backoff, self._retry_after)
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

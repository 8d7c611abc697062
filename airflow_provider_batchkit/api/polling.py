"""When to look at a batch again, and what a look means. No clock, no I/O: trigger, poke and kit share one decision class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from airflow_provider_batchkit.exceptions import PollError
from airflow_provider_batchkit.model import BatchCounts, BatchSnapshot
from airflow_provider_batchkit.progress import span_text

IN_PROGRESS = "in_progress"
CANCELING = "canceling"
ENDED = "ended"
_KNOWN = frozenset({IN_PROGRESS, CANCELING, ENDED})

#: failed looks in a row before polling gives up; a look that succeeds starts the count anew
MAX_FAILURES = 20
_MAX_BACKOFF_S = 300.0
#: Seconds for which a batch that answers 404 is looked for again before it is called gone. Live batches answer 404 now and then: seconds
#: after their creation, and once more in the middle (anthropic-sdk-python issue 1432)
ABSENCE_S = 900.0
#: seconds from the first 404 to the next look; the pauses double
_FIRST_PAUSE_S = 2.0
#: a batch is called gone after at least so many looks, however far apart they are
_LOOKS_AT_LEAST = 3
#: The pause between looks is a twentieth of the batch's age, in whole intervals, so that waits with the same interval stay in step.
_AGE_SHARE = 0.05
#: the longest pause between looks, in intervals
_MAX_INTERVALS = 4
#: seconds between two progress lines
_TOLD_EVERY_S = 60.0
#: seconds from a batch's creation to its end at the latest (API documentation)
_LIFE_S = 24 * 3600.0


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
    """Looks failed too often in a row, or in a way that will not mend."""

    reason: str


@dataclass(frozen=True, slots=True)
class Late:
    """A running batch is older than ``late_after`` seconds."""


Decision = Wait | Ended | TimedOut | GaveUp | Late


@dataclass(frozen=True, slots=True)
class Figures:
    """Progress of batches."""

    batches: int
    ended: int
    #: requests of the batches that have been seen, and how many are done. The API may count none as done before a batch has ended
    requests: int
    done: int
    #: id of the oldest running batch, its age in seconds, and the seconds until the first running batch expires
    oldest: str | None = None
    age_s: float = 0.0
    left_s: float = 0.0

    def __str__(self) -> str:
        line = f"{self.ended} of {self.batches} batches ended, {self.done:,} of {self.requests:,} requests done"
        if self.oldest is not None:
            line += f", oldest {span_text(self.age_s)}, expires in {span_text(self.left_s)}"
        return line


@dataclass(slots=True)
class Unseen:
    """An unbroken series of looks that were answered with a 404. Times are seconds on the caller's clock."""

    #: seconds that the series must last before its object is called gone
    absence: float
    #: times of the first look and of the latest
    since: float = 0.0
    last: float = 0.0
    looks: int = 0

    def again(self, now: float) -> None:
        """Note a look that found nothing."""
        self.since, self.last = self.since if self.looks else now, now
        self.looks += 1

    @property
    def is_gone(self) -> bool:
        """Whether the series has lasted long enough, with enough looks."""
        return self.last - self.since > self.absence and self.looks >= _LOOKS_AT_LEAST

    @property
    def pause(self) -> float:
        """Seconds from the latest look to the next. The pauses double, but the last look comes as soon as the series may be long enough."""
        elapsed = self.last - self.since
        pause = min(max(elapsed, _FIRST_PAUSE_S), max(self.absence / _LOOKS_AT_LEAST, 0.01))
        left = self.absence - elapsed
        return min(pause, left + 0.01) if left > 0 else pause


def interval_at_age(interval: float, age: float) -> float:
    """Seconds until the next look at a batch that is ``age`` seconds old: 1 to 4 whole intervals, as many as fit a twentieth of its age.

    ``interval`` is the shortest pause, as its name promises. Most batches end within the hour, and the others may take a day: with 60 s, a
    batch of up to 40 minutes is looked at every minute, and one of 80 minutes or more every 4 minutes.
    """
    fitting = int(age * _AGE_SHARE / interval) if interval > 0 else 1
    return interval * min(max(fitting, 1), _MAX_INTERVALS)


def backoff(interval: float, failures: int, retry_after: float = 0.0) -> float:
    """Seconds to wait after ``failures`` failed looks in a row: doubling from ``interval``, at least what the API asked for."""
    return max(min(interval * 2.0 ** (failures - 1), max(_MAX_BACKOFF_S, interval)), retry_after)


@dataclass(slots=True)
class PollState:
    """Watches batches until the last has ended, or the first.

    Call :meth:`saw` with what was seen, :meth:`hid` with the batches that answered 404, or :meth:`failed` for a failed look. Then
    :meth:`decide` gives the next step, and :meth:`news` the lines for the log. Times are seconds on any clock that the caller uses
    throughout; ``deadline`` is on the same clock.
    """

    batch_ids: Sequence[str]
    #: seconds between looks; grows by ``factor`` a look up to ``max_interval``
    interval: float
    max_interval: float | None = None
    factor: float = 1.5
    #: intervals follow the age of the youngest open batch instead (:func:`interval_at_age`); ``now`` is then seconds since the epoch
    by_age: bool = False
    deadline: float | None = None
    #: whether the wait is over as soon as one of the batches has ended; never changed later
    first: bool = False
    #: seconds that a batch may answer 404 before it is called gone
    absence: float = ABSENCE_S
    #: age in seconds at which a running batch makes the wait :class:`Late`; ``now`` is then seconds since the epoch
    late_after: float | None = None
    seen: dict[str, BatchSnapshot] = field(default_factory=dict)
    #: the figures of the last progress line, and its time
    _told: tuple[int, int, int] | None = None
    _told_at: float = 0.0
    _hidden: dict[str, Unseen] = field(default_factory=dict)
    _hidden_why: dict[str, str] = field(default_factory=dict)
    _news: list[str] = field(default_factory=list)
    _failures: int = 0
    _last_error: str = ""
    _retry_after: float = 0.0
    _fatal: str | None = None
    _looks: int = 0

    def open_ids(self) -> list[str]:
        """Batches to look at, in the order given: those not seen ended. Empty once the wait for the first is over."""
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
        """Keep snapshots of some open batches, without counting a successful look: looks at other batches may have failed.

        :raises PollError: for a status that the API does not document; guessing could end a wait early or never
        """
        for snapshot in snapshots:
            if snapshot.processing_status not in _KNOWN:
                raise PollError(
                    f"Batch {snapshot.batch_id} has the unknown status {snapshot.processing_status!r} (known: "
                    f"{', '.join(sorted(_KNOWN))}). The batch is untouched; a newer version of the provider may know it."
                )
            self.seen[snapshot.batch_id] = snapshot
            series = self._hidden.pop(snapshot.batch_id, None)
            if series is not None:
                self._news.append(f"Batch {snapshot.batch_id} is visible again, after {series.looks} looks that found nothing.")

    def hid(self, errors: Mapping[str, str], now: float) -> None:
        """Note open batches that answered 404 to a look at the time ``now``, with the API's messages. The connection works.

        A batch is gone when every look at it over ``absence`` seconds got a 404. Looks that failed in another way are ignored.
        """
        self._failures = 0
        self._retry_after = 0.0
        self._hidden_why |= errors
        for batch_id in errors:
            series = self._hidden.setdefault(batch_id, Unseen(self.absence))
            series.again(now)
            if series.looks > 1:
                continue
            known = (
                "It was visible before, so it may be hidden for a moment, or was deleted"
                if batch_id in self.seen
                else "This wait has not seen it yet: it may be new, its id may be wrong, or the connection's key of another workspace"
            )
            self._news.append(
                f"The API answers 404 for batch {batch_id}. {known}. It is looked at again for {self.absence:.0f} s at least."
            )

    def hidden(self) -> list[str]:
        """Open batches that answered 404 when they were last looked at."""
        return [batch_id for batch_id in self.open_ids() if batch_id in self._hidden]

    def news(self) -> list[str]:
        """Sentences for the log that are new since the last call."""
        told, self._news = self._news, []
        return told

    def progress(self, now: float) -> str | None:
        """A progress line, at every change and at most once a minute; None when there is nothing to say.

        :param now: seconds since the epoch
        """
        if not self.seen:
            return None
        figures = self.figures(now)
        about = (figures.ended, figures.done, figures.requests)
        early = self._told is not None and now - self._told_at < _TOLD_EVERY_S and figures.ended < figures.batches
        if early or about == self._told:
            return None
        self._told, self._told_at = about, now
        return str(figures)

    def figures(self, now: float) -> Figures:
        """Progress of the batches, as they were last seen.

        :param now: seconds since the epoch
        """
        running = self._running()
        counts = self.counts()
        known = (len(self.batch_ids), len(self.seen) - len(running), counts.total, counts.done)
        if not running:
            return Figures(*known)
        oldest = min(running, key=lambda snapshot: snapshot.created_at)
        born = oldest.created_at.timestamp()
        expires = min(snapshot.expires_at.timestamp() if snapshot.expires_at else born + _LIFE_S for snapshot in running)
        return Figures(*known, oldest.batch_id, now - born, expires - now)

    def _running(self) -> list[BatchSnapshot]:
        return [snapshot for snapshot in self.seen.values() if snapshot.processing_status != ENDED]

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
        for batch_id in self.hidden():
            series = self._hidden[batch_id]
            if series.is_gone:
                why = self._hidden_why[batch_id].removesuffix(".")
                return GaveUp(f"{why}. {series.looks} looks over {series.last - series.since:.0f} s found nothing")
        if self._failures >= MAX_FAILURES:
            return GaveUp(f"{self._failures} looks in a row failed, the last with: {self._last_error}")
        if self.deadline is not None and now >= self.deadline:
            return TimedOut(tuple(open_ids))
        late_at = self._late_at()
        if late_at is not None and now >= late_at:
            return Late()
        until = [moment - now for moment in (self.deadline, late_at) if moment is not None]
        return Wait(min([self._next_interval(now, open_ids), *(max(seconds, 0.0) for seconds in until)]))

    def _late_at(self) -> float | None:
        """The time at which the wait is late, in seconds since the epoch."""
        running = [] if self.late_after is None else self._running()
        return min((snapshot.created_at.timestamp() + (self.late_after or 0.0) for snapshot in running), default=None)

    def counts(self) -> BatchCounts:
        """Requests per status over every batch seen so far."""
        total = BatchCounts()
        for snapshot in self.seen.values():
            total = total + snapshot.counts
        return total

    def outcomes(self) -> dict[str, int]:
        """Requests that have ended, per status."""
        counts = self.counts()
        return {status: getattr(counts, status) for status in ("succeeded", "errored", "canceled", "expired")}

    def _next_interval(self, now: float, open_ids: Sequence[str]) -> float:
        if self._failures:
            return backoff(self.interval, self._failures, self._retry_after)
        return min([self._usual_interval(now, open_ids), *(self._hidden[batch_id].pause for batch_id in self.hidden())])

    def _usual_interval(self, now: float, open_ids: Sequence[str]) -> float:
        if self.by_age:
            births = [self.seen[b].created_at.timestamp() for b in open_ids if b in self.seen]
            return interval_at_age(self.interval, now - max(births)) if births else self.interval
        if self.max_interval is None:
            return self.interval
        return float(min(self.interval * self.factor ** max(self._looks - 1, 0), self.max_interval))


def validate_event(event: Mapping[str, object] | None) -> Mapping[str, object]:
    """Check a trigger's event. Events cross processes and versions, so anything malformed must fail loudly.

    :raises PollError: when the event is not one that :class:`BatchTrigger` sends
    """
    if not isinstance(event, Mapping) or event.get("status") not in ("ended", "timeout", "error", "late"):
        raise PollError(
            f"The trigger sent an event that this version does not know: {event!r}. The batches are untouched; "
            "clear the task to wait again."
        )
    return event

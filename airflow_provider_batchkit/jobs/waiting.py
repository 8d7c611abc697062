"""The two results of a step of a task: it is done, or it must wait because nothing more can be done now. No clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, Literal, TypeVar

Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Done(Generic[Result_co]):
    """The result of a step after which nothing is left to do."""

    result: Result_co


@dataclass(frozen=True, slots=True)
class WaitFor:
    """A wait: the task goes on when one of these batches has ended, or at a time, whichever comes first. Times are aware and UTC.

    A wait about a ``round`` is over when all its batches have ended.
    """

    #: batches whose end is worth another look; empty when the wait is for a time only
    batch_ids: tuple[str, ...]
    #: the time of the next look
    until: datetime
    #: the time when the wait ends at the latest
    latest: datetime
    #: the reason, as one sentence for the log
    why: str
    about: Literal["doubt", "primer", "throttle", "round", "unseen", "turn"] = "doubt"
    #: the things that the API does not show, each with the time of the first such look, where the ledger does not keep it; the waiting
    #: task passes it to its next look
    unseen: Mapping[str, datetime] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """The wait as plain values for XCom."""
        until = self.latest.isoformat(timespec="seconds")
        unseen = {what: since.isoformat() for what, since in self.unseen.items()}
        return {"batch_ids": list(self.batch_ids), "until": until, "why": self.why, "about": self.about, "unseen": unseen}


def together(waits: Iterable[WaitFor]) -> WaitFor | None:
    """All waits as one: its next look is the earliest of theirs, and its latest end is the latest of theirs."""
    found = list(waits)
    if not found:
        return None
    return WaitFor(
        tuple(dict.fromkeys(batch_id for wait in found for batch_id in wait.batch_ids)),
        min(wait.until for wait in found),
        max(wait.latest for wait in found),
        " ".join(wait.why for wait in found),
        found[0].about,
        dict(pair for wait in found for pair in wait.unseen.items()),
    )

"""What a run saw, as it came: the calls' answers by the name of their step. Checks read nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, NamedTuple

from .wire import Answer


class Outcome(str, Enum):
    """What a check found."""

    AS_RECORDED = "as recorded"
    DIFFERS = "DIFFERS"
    NOT_TOLD = "not told"
    NOT_TESTABLE = "not testable"


class Verdict(NamedTuple):
    """An outcome, and what was seen or why it cannot be told."""

    outcome: Outcome
    what: str


class Look(NamedTuple):
    """One look at a batch that is known to live, ``after_s`` seconds after its create call was answered."""

    batch_id: str
    after_s: float
    answer: Answer


@dataclass
class Created:
    """A batch that the run has made."""

    batch_id: str
    #: the step that made it
    step: str
    #: Unix times at which the call went out and its answer came
    sent_at: float
    made_at: float
    requests: int
    #: as far as the run has seen
    ended: bool = False
    deleted: bool = False


@dataclass
class Seen:
    """Everything that a run has seen."""

    began_at: datetime
    answers: dict[str, Answer] = field(default_factory=dict)
    #: steps that had no answer, and why
    silent: dict[str, str] = field(default_factory=dict)
    created: list[Created] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    #: seconds from a create call's answer until the list showed the batch, by step; None: not while it was looked for
    listed_after_s: dict[str, float | None] = field(default_factory=dict)
    #: result lines of the batch that ran to its end, and of the canceled ones
    lines: list[dict[str, Any]] = field(default_factory=list)
    canceled_lines: list[dict[str, Any]] = field(default_factory=list)

    def result(self, custom_id: str) -> dict[str, Any] | None:
        """The ``result`` of one request; None without a line."""
        return next((line["result"] for line in self.lines if line.get("custom_id") == custom_id), None)

    def message(self, custom_id: str) -> dict[str, Any] | None:
        """The answer to one request; None where it did not succeed."""
        return (self.result(custom_id) or {}).get("message")

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All answers that are billed."""
        results = (line.get("result", {}) for line in (*self.lines, *self.canceled_lines))
        return [result["message"] for result in results if result.get("message")]


Check = Callable[[Seen], Verdict]


@dataclass(frozen=True)
class Fact:
    """One thing that the package rests on. The expectation is written here and taken from nowhere else."""

    name: str
    #: what others recorded, or the documentation says
    expected: str
    #: what in the package rests on it
    decides: str
    #: None: not testable, and ``why`` says why
    check: Check | None = None
    why: str = ""

    def judge(self, seen: Seen) -> Verdict:
        """What the run says of this fact."""
        if self.check is None:
            return Verdict(Outcome.NOT_TESTABLE, self.why)
        try:
            return self.check(seen)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            # a shape that the check does not know is a difference, not a fault of the run
            return Verdict(Outcome.DIFFERS, f"a shape that was not recorded: {type(e).__name__}: {e}")


def judged(fits: bool, what: str) -> Verdict:
    """As recorded where it fits, else a difference."""
    return Verdict(Outcome.AS_RECORDED if fits else Outcome.DIFFERS, what)


def not_told(why: str) -> Verdict:
    """The run cannot say."""
    return Verdict(Outcome.NOT_TOLD, why)


def step(name: str, check: Callable[[Answer], Verdict]) -> Check:
    """A check of the answer to one step."""

    def look(seen: Seen) -> Verdict:
        answer = seen.answers.get(name)
        return not_told(seen.silent.get(name, f"the call “{name}” was not made")) if answer is None else check(answer)

    return look


def refused(name: str, status: int, kind: str, words: str = "", *, part: bool = False) -> Check:
    """A check that a step was refused with this status, type and message; ``part``: the message has these words among others."""

    def check(answer: Answer) -> Verdict:
        if answer.is_passing:
            return not_told(f"for a passing reason: {answer}")
        seen_kind, seen_words = answer.error
        fits = words in seen_words if part or not words else words == seen_words
        return judged(answer.status == status and seen_kind == kind and fits, str(answer))

    return step(name, check)

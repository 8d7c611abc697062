"""What a run says: a line for each fact, and what differs once more at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from .seen import Fact, Outcome, Verdict

Verdicts = Mapping[str, Verdict]


def lines(facts: Sequence[Fact], verdicts: Verdicts, simulated: Verdicts | None) -> Iterator[str]:
    """One line for each fact. ``simulated``: what the simulator does, beside a run against the real API."""
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        verdict = verdicts[fact.name]
        yield f"{verdict.outcome.value:<12}  {fact.name:<{width}}  {_one_line(verdict.what)}"
        if verdict.outcome is Outcome.DIFFERS:
            yield from _details(fact, width)
        beside = None if simulated is None else simulated[fact.name]
        if beside is not None and _disagree(verdict, beside):
            yield f"{'':<12}  {'':<{width}}  the simulator: {beside.outcome.value}, {_one_line(beside.what)}"


def summary(facts: Sequence[Fact], verdicts: Verdicts) -> str:
    """How many facts have each outcome, and the names of those that differ."""
    found = Counter(verdicts[fact.name].outcome for fact in facts)
    text = ", ".join(f"{found[outcome]} {outcome.value}" for outcome in Outcome if found[outcome])
    differ = [fact.name for fact in facts if verdicts[fact.name].outcome is Outcome.DIFFERS]
    return f"{len(facts)} facts: {text}." + (f"\nDIFFERS: {', '.join(differ)}" if differ else "")


def _details(fact: Fact, width: int) -> Iterator[str]:
    yield f"{'':<12}  {'':<{width}}  recorded: {fact.expected}"
    yield f"{'':<12}  {'':<{width}}  decides: {fact.decides}"


def _disagree(real: Verdict, simulated: Verdict) -> bool:
    told = (Outcome.AS_RECORDED, Outcome.DIFFERS)
    return real.outcome in told and simulated.outcome in told and (real.outcome is Outcome.DIFFERS or real.outcome is not simulated.outcome)


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:299] + "…"

"""Rounds of asking: the first asks every row, each later one asks again rows with given outcomes, and may change how it asks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from airflow_provider_batchkit.exceptions import BatchInputError

#: Outcomes that ``Round.ask`` accepts beside the API's error types. A row whose result line is missing is not asked again: its answer may
#: exist and be billed, and a cleared task reads it again at no cost.
OUTCOMES = ("truncated", "paused", "refused", "invalid_output", "errored", "expired", "canceled")


@dataclass(frozen=True, slots=True)
class Round:
    """One round of asking a job's rows.

    :param ask: outcomes of the rows that a later round asks again: ``"truncated"``, ``"paused"``, ``"refused"``, ``"invalid_output"``,
        ``"errored"``, ``"expired"``, ``"canceled"``, or an error type of the API such as ``"overloaded_error"``. With None a later round
        asks the rows that failed for a passing reason; the first round asks every row and must have None
    :param model: model id in place of the task's
    :param max_tokens: bound on an answer's length in tokens, in place of the task's
    :param params: further Messages API parameters, which override the task's
    :raises BatchInputError: for an outcome that does not exist, or whose rows another round would pay for a second time
    """

    ask: Collection[str] | None = None
    model: str | None = None
    max_tokens: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ask is None:
            return
        asked = (self.ask,) if isinstance(self.ask, str) else tuple(self.ask)
        if not asked:
            raise BatchInputError("Round: ask is empty, so the round would ask nothing. Leave it out, or name outcomes.")
        for outcome in asked:
            if outcome == "missing":
                raise BatchInputError(
                    'Round: ask cannot have "missing": the answer may be there and billed. Clear the task to read the results again.'
                )
            if outcome not in OUTCOMES and not str(outcome).endswith("_error"):
                raise BatchInputError(f"Round: {outcome!r} is no outcome; ask takes {', '.join(OUTCOMES)}, or an error type of the API.")
        object.__setattr__(self, "ask", asked)

    @property
    def overrides(self) -> dict[str, Any]:
        """The parameters of the Messages API that the round changes."""
        given = {"model": self.model, "max_tokens": self.max_tokens}
        return {**self.params, **{name: value for name, value in given.items() if value is not None}}


def parse_rounds(rounds: Sequence[Round] | None, max_rounds: int, *, retry_invalid_output: bool) -> tuple[Round, ...]:
    """The rounds of a job; ``max_rounds`` is the short form of rounds that ask again what failed for a passing reason.

    :param retry_invalid_output: also ask answers again that do not fit the schema; allowed only without ``rounds``
    :raises BatchInputError: for rounds that are not valid
    """
    if rounds is None:
        if type(max_rounds) is not int or max_rounds < 1:
            raise BatchInputError(f"max_rounds must be a whole number from 1, not {max_rounds!r}.")
        return (Round(),) * max_rounds
    if max_rounds != 1 or retry_invalid_output:
        raise BatchInputError("Give either rounds, or max_rounds and retry_invalid_output: rounds say themselves what they ask again.")
    found = tuple(rounds)
    if not found or not all(isinstance(one, Round) for one in found):
        raise BatchInputError(f"rounds must be a list of Round, at least one, not {rounds!r}.")
    if found[0].ask is not None:
        raise BatchInputError(f"The first round asks every row, so it takes no ask={list(found[0].ask)!r}. Begin the list with Round().")
    return found

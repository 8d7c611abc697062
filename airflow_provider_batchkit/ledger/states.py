"""The states of a batch, as one table.

Every move of a batch is listed here and nowhere else, and a move that is not listed raises. A state without moves is an end.
"""

from __future__ import annotations

from enum import Enum

from airflow_provider_batchkit.exceptions import LedgerError


class BatchState(str, Enum):
    """Where a batch is, from our side."""

    #: its requests are journaled; the POST may or may not have happened
    SENDING = "sending"
    #: the API accepted it and its id is known
    SUBMITTED = "submitted"
    #: its results are in the table
    LANDED = "landed"
    #: the API refused it; nothing was billed
    REJECTED = "rejected"
    #: it was never accepted, or what was adopted proved to be somebody else's
    VOID = "void"


MOVES: dict[BatchState, frozenset[BatchState]] = {
    BatchState.SENDING: frozenset({BatchState.SUBMITTED, BatchState.REJECTED, BatchState.VOID}),
    BatchState.SUBMITTED: frozenset({BatchState.LANDED, BatchState.VOID}),
    # landing again writes the same rows: a fetch may run twice
    BatchState.LANDED: frozenset({BatchState.LANDED}),
    BatchState.REJECTED: frozenset(),
    BatchState.VOID: frozenset(),
}


def sources_of(target: BatchState) -> list[BatchState]:
    """The states from which ``target`` may be reached."""
    return [state for state, targets in MOVES.items() if target in targets]


def check_move(what: str, source: BatchState, target: BatchState) -> None:
    """Raise :class:`LedgerError` unless the table has the move."""
    if target not in MOVES[source]:
        allowed = ", ".join(sorted(s.value for s in MOVES[source])) or "nothing"
        raise LedgerError(f"{what} is {source.value} and cannot become {target.value}; from there it can become {allowed}.")

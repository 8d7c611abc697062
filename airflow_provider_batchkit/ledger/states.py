"""The states of a batch, and its moves as one table.

Every move of a batch is listed here and nowhere else, and a move that is not listed raises. A state without moves is final.
"""

from __future__ import annotations

from enum import Enum

from airflow_provider_batchkit.exceptions import LedgerError


class BatchState(str, Enum):
    """The state of a batch in the ledger."""

    #: its requests are journaled; the POST may or may not have happened
    SENDING = "sending"
    #: the API's answer or the batch's results have proved that the API accepted it, and its id is known
    SUBMITTED = "submitted"
    #: its outcomes and its bill are in the ledger, and its rows are not yet known to be in the table of another database
    PREPARED = "prepared"
    #: its results are in a table
    LANDED = "landed"
    #: the API refused it; nothing was billed
    REJECTED = "rejected"
    #: it was proved, or a person decided, that it was never accepted
    VOID = "void"
    #: it was deleted or archived before it landed; it may have been billed
    GONE = "gone"


#: states of batches that the API never accepted, so their requests were not asked
NEVER_ACCEPTED = (BatchState.REJECTED.value, BatchState.VOID.value)

MOVES: dict[BatchState, frozenset[BatchState]] = {
    BatchState.SENDING: frozenset({BatchState.SUBMITTED, BatchState.REJECTED, BatchState.VOID}),
    # it becomes void, or submitted under another id, only by a person's decision
    BatchState.SUBMITTED: frozenset({BatchState.PREPARED, BatchState.LANDED, BatchState.GONE, BatchState.VOID, BatchState.SUBMITTED}),
    # it becomes gone only when its rows are known not to be in the table
    BatchState.PREPARED: frozenset({BatchState.PREPARED, BatchState.LANDED, BatchState.GONE}),
    # a second table, or one that was emptied, may be filled from the same results
    BatchState.LANDED: frozenset({BatchState.LANDED}),
    BatchState.REJECTED: frozenset(),
    BatchState.VOID: frozenset(),
    # it becomes landed when the API shows it again, and void when a person gives it up
    BatchState.GONE: frozenset({BatchState.LANDED, BatchState.VOID}),
}

#: States in which a batch was, or may have been, accepted and billed: its requests are not asked again automatically.
HELD = (BatchState.SENDING, BatchState.SUBMITTED, BatchState.PREPARED, BatchState.LANDED, BatchState.GONE)


def sources_of(target: BatchState) -> list[BatchState]:
    """The states from which ``target`` may be reached."""
    return [state for state, targets in MOVES.items() if target in targets]


def check_move(what: str, source: BatchState, target: BatchState) -> None:
    """:raises LedgerError: when the table of moves does not have this move"""
    if target not in MOVES[source]:
        allowed = ", ".join(sorted(s.value for s in MOVES[source])) or "nothing"
        raise LedgerError(f"{what} is {source.value} and cannot become {target.value}; from there it can become {allowed}.")

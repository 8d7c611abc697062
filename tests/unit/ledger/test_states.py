"""The states of a batch are one table; what it does not have raises."""

from __future__ import annotations

import itertools

import pytest

from airflow_provider_batchkit.exceptions import LedgerError
from airflow_provider_batchkit.ledger.states import MOVES, BatchState, check_move, sources_of

LEGAL = {
    ("sending", "submitted"),
    ("sending", "rejected"),
    ("sending", "void"),
    ("submitted", "landed"),
    ("submitted", "prepared"),
    ("prepared", "prepared"),
    ("prepared", "landed"),
    ("prepared", "gone"),
    ("submitted", "gone"),
    ("landed", "landed"),
    ("gone", "landed"),
    # a person says so
    ("submitted", "void"),
    ("submitted", "submitted"),
    ("gone", "void"),
}


@pytest.mark.parametrize(("source", "target"), itertools.product(BatchState, BatchState))
def test_only_the_moves_of_the_contract_are_legal(source: BatchState, target: BatchState) -> None:
    """Every pair of states, against the contract written out by hand."""
    if (source.value, target.value) in LEGAL:
        check_move("shard 0", source, target)
        assert source in sources_of(target)
    else:
        with pytest.raises(LedgerError, match=f"shard 0 is {source.value} and cannot become {target.value}"):
            check_move("shard 0", source, target)


def test_every_state_is_in_the_table() -> None:
    """A new state without a line would be forgotten."""
    assert set(MOVES) == set(BatchState)

"""Killed at random moments, a real Airflow pays for nothing twice and loses nothing. The long run is ``python -m tests.crash.chaos``."""

from __future__ import annotations

import pytest

from tests.crash.chaos import ROWS_PER_RUN, TABLES, run_chaos


@pytest.mark.chaos
@pytest.mark.e2e
def test_random_kills_pay_once_and_lose_nothing() -> None:
    """Six processes die while runs go on; then every run succeeds and all books agree."""
    outcome = run_chaos(seed=7, kills=6)
    print(outcome.line)
    assert outcome.violations == []
    assert outcome.kills.total() == 6
    assert outcome.runs > 0
    assert outcome.accepted == outcome.asked == outcome.runs * ROWS_PER_RUN * len(TABLES)
    assert (outcome.duplicates, outcome.lost, outcome.wrong) == (0, 0, 0)

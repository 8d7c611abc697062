"""What a budget is, and when its windows begin and end."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

from airflow_provider_batchkit import Budget
from airflow_provider_batchkit.cost.budget import BudgetStatus, window_of
from airflow_provider_batchkit.exceptions import BatchInputError


def test_a_mapping_is_a_budget_too() -> None:
    """With the same fields and defaults; a float is taken as it prints."""
    assert Budget.parse({"name": "catalog", "usd": 0.1}) == Budget("catalog", usd=Decimal("0.1"), window="month", on_exceeded="fail")
    budget = Budget("catalog", tokens=5)
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"usd": 5}, "a mapping with name"),
        ({"name": "b", "usd": 5, "cap": 3}, "a mapping with name"),
        ("catalog", "a mapping with name"),
        ({"name": "", "usd": 5}, "1 to 250 characters"),
        ({"name": 5, "usd": 5}, "1 to 250 characters"),
        ({"name": "b"}, "caps nothing"),
        ({"name": "b", "usd": -1}, "an amount in USD above 0"),
        ({"name": "b", "usd": "5,000"}, "an amount in USD above 0"),
        ({"name": "b", "usd": 10**7}, "must not be above 4,000,000"),
        ({"name": "b", "tokens": 1.5}, "a whole number"),
        ({"name": "b", "tokens": True}, "a whole number"),
        ({"name": "b", "usd": 5, "window": "year"}, "window"),
        ({"name": "b", "usd": 5, "on_exceeded": "warn"}, "on_exceeded"),
        ({"name": "b", "usd": 5, "alert_at": 0.5, "notifiers": [print]}, "must be a list of shares"),
        ({"name": "b", "usd": 5, "alert_at": "80%", "notifiers": [print]}, "must be a list of shares"),
        ({"name": "b", "usd": 5, "alert_at": [80], "notifiers": [print]}, "above 0 and at most 1"),
        ({"name": "b", "usd": 5, "alert_at": [0], "notifiers": [print]}, "above 0 and at most 1"),
        ({"name": "b", "usd": 5, "alert_at": [True], "notifiers": [print]}, "above 0 and at most 1"),
        ({"name": "b", "usd": 5, "alert_at": ["half"], "notifiers": [print]}, "above 0 and at most 1"),
        ({"name": "b", "usd": 5, "alert_at": [0.33333], "notifiers": [print]}, "four digits"),
        ({"name": "b", "usd": 5, "alert_at": [0.5]}, "both alert_at and notifiers"),
        ({"name": "b", "usd": 5, "notifiers": [print]}, "both alert_at and notifiers"),
        ({"name": "b", "usd": 5, "alert_at": [0.5], "notifiers": print}, "must be a list"),
        ({"name": "b", "usd": 5, "alert_at": [0.5], "notifiers": [object]}, "the class object: give instances"),
        ({"name": "b", "usd": 5, "alert_at": [0.5], "notifiers": ["slack"]}, "a str: give instances"),
    ],
)
def test_what_is_no_budget_is_refused(value: Any, why: str) -> None:
    """When the DAG file is read."""
    with pytest.raises(BatchInputError, match=why):
        Budget.parse(value)


@pytest.mark.parametrize(
    ("window", "start", "end"),
    [
        ("day", datetime(2026, 12, 31, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
        # 2026-12-31 is a Thursday
        ("week", datetime(2026, 12, 28, tzinfo=UTC), datetime(2027, 1, 4, tzinfo=UTC)),
        ("month", datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
    ],
)
def test_windows_are_utc(window: str, start: datetime, end: datetime) -> None:
    """Half past one at night on New Year's Day in Berlin is still the old year. The end belongs to the next window."""
    assert window_of(window, datetime(2027, 1, 1, 0, 30, tzinfo=timezone(timedelta(hours=1)))) == (start, end)
    assert window_of(window, end)[0] == end
    assert window_of(window, end - timedelta(microseconds=1)) == (start, end)


def test_for_ever_has_no_end() -> None:
    """One window."""
    assert window_of("ever", datetime(2026, 11, 23, tzinfo=UTC)) == (None, None)


def test_months_have_their_own_lengths() -> None:
    """February of a leap year too."""
    assert window_of("month", datetime(2028, 2, 29, tzinfo=UTC)) == (datetime(2028, 2, 1, tzinfo=UTC), datetime(2028, 3, 1, tzinfo=UTC))


def test_alerts_are_ascending_shares_of_the_cap() -> None:
    """However they are written; what a notifier holds is neither in the budget's text, which Airflow serializes, nor compared."""
    budget = Budget("b", usd=5, alert_at=["1.0", 0.8, Decimal("0.5"), 0.80], notifiers=[print])  # type: ignore[arg-type]
    assert (budget.alert_at, budget.thresholds) == ((Decimal("0.5"), Decimal("0.8"), Decimal(1)), [5000, 8000, 10000])
    assert "print" not in repr(budget)
    assert copy.deepcopy(budget) == budget == Budget.parse({"name": "b", "usd": "5", "alert_at": [0.5, 0.8, 1], "notifiers": [len]})


@pytest.mark.parametrize(
    ("caps", "share"),
    [((Decimal(10), None), "0.5"), ((None, 1000), "0.9"), ((Decimal(10), 1000), "0.9"), ((Decimal(5), 1000), "1")],
)
def test_a_share_is_that_of_the_cap_which_is_nearer_to_its_limit(caps: tuple[Decimal | None, int | None], share: str) -> None:
    """What is spent and what is reserved count."""
    status = BudgetStatus("b", "day", *caps, Decimal(2), 400, Decimal(3), 500, None)
    assert status.share == Decimal(share)

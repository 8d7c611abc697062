"""What a round may ask, and which rounds a job has."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_batchkit import Round
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.jobs.rounds import parse_rounds


def test_max_rounds_is_the_short_form_of_rounds_that_change_nothing() -> None:
    """Each later round asks again what failed for a passing reason."""
    assert parse_rounds(None, 3, retry_invalid_output=True) == (Round(), Round(), Round())


def test_a_round_says_what_it_changes_in_a_request() -> None:
    """``model`` and ``max_tokens`` are parameters like any other."""
    asking = Round(ask=["truncated"], model="claude-opus-5", max_tokens=800, params={"temperature": 0.5})
    assert asking.overrides == {"model": "claude-opus-5", "max_tokens": 800, "temperature": 0.5}
    assert Round().overrides == {}


def test_one_outcome_may_be_given_as_a_string() -> None:
    """A string is not taken for its letters."""
    assert Round(ask="refused").ask == ("refused",)


@pytest.mark.parametrize(
    ("ask", "why"), [(["cut"], "no outcome"), (["succeeded"], "no outcome"), (["missing"], "read the results again"), ([], "ask nothing")]
)
def test_a_round_that_asks_for_what_is_no_outcome_is_refused(ask: list[str], why: str) -> None:
    """A misspelt outcome would ask nothing, and a missing one would pay twice."""
    with pytest.raises(BatchInputError, match=why):
        Round(ask=ask)


def test_an_error_type_of_the_api_may_be_asked_again() -> None:
    """The API may have types that this package has never heard of."""
    assert Round(ask=["a_new_error"]).ask == ("a_new_error",)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"rounds": [], "max_rounds": 1}, "at least one"),
        ({"rounds": [Round(ask=["errored"])], "max_rounds": 1}, "first round asks every row"),
        ({"rounds": [Round()], "max_rounds": 2}, "either rounds, or max_rounds"),
        ({"rounds": ["truncated"], "max_rounds": 1}, "list of Round"),
        ({"rounds": None, "max_rounds": 0}, "whole number from 1"),
        ({"rounds": None, "max_rounds": True}, "whole number from 1"),
    ],
)
def test_rounds_that_cannot_be_are_refused(given: dict[str, Any], why: str) -> None:
    """When the DAG is parsed, in words."""
    with pytest.raises(BatchInputError, match=why):
        parse_rounds(**given, retry_invalid_output=False)

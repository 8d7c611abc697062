"""Failures by type and text: what passes is asked again, and where the account is the reason the job stops asking and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.ledger import Ledger
from airflow_provider_batchkit.ledger.reasons import Wanted
from airflow_provider_batchkit.request.failures import Failure, Failures, Reason
from airflow_provider_batchkit.simulator import SimulatorProcess
from tests.databases import Database, rows
from tests.integration.test_run_operator import Legs, api, fill

__all__ = ["api"]  # a fixture

CREDIT = "Your credit balance is too low to access the Anthropic API"


@pytest.mark.parametrize("max_rounds", [1, 3])
def test_a_job_that_the_account_stops_asks_no_more_until_it_is_cleared(
    home: Path, database: Database, api: SimulatorProcess, max_rounds: int
) -> None:
    """No round is burnt; the summary says why; a cleared task asks the stopped rows alone, also when it has no round left."""
    fill(database, {1: "one", 2: "two [[sim:credit-once]]", 3: "three [[sim:credit-once]]", 4: "four [[sim:errored]]"})
    legs = Legs(max_rounds=max_rounds)
    first = legs.run()
    assert first["counts"] == {"errored": 3, "succeeded": 1}
    assert len(first["rounds"]) == 1
    assert first["stopped"].startswith("2 rows failed with invalid_request_error: Your credit balance is too low")
    assert "then clear the task: it asks these rows again" in first["stopped"]
    assert {(kind["reason"], kind["rows"], kind["worth_asking"]) for kind in first["failed"]} == {
        ("account", 2, True),
        ("permanent", 1, False),
    }
    json.dumps(first)
    asked = api.stats()["requests_accepted"]
    second = legs.run()
    assert second["counts"] == {"errored": 1, "succeeded": 3} and second["stopped"] is None
    assert api.stats()["requests_accepted"] == asked + 2
    assert rows(database, "SELECT id FROM answers ORDER BY id") == [(1,), (2,), (3,)]
    assert legs.run()["counts"] == second["counts"]
    assert api.stats()["requests_accepted"] == asked + 2


def test_an_account_that_is_not_mended_stops_each_attempt_after_one_round(home: Path, database: Database, api: SimulatorProcess) -> None:
    """In the leg that lands a round which another leg has sent, too."""
    api.set(clock="manual")
    fill(database, {1: "one [[sim:credit]]", 2: "two [[sim:overloaded]]"})
    legs = Legs(max_rounds=5)
    for attempt in (1, 2):
        (batch_id,) = legs.run().trigger.batch_ids
        api.end(batch_id)
        summary = legs.resume()
        assert CREDIT in summary["stopped"] and len(summary["rounds"]) == attempt


def test_rounds_that_ask_other_outcomes_do_not_lose_what_the_account_has_stopped(
    home: Path, database: Database, api: SimulatorProcess
) -> None:
    """A cleared task asks the stopped rows as the first round did, also where a round is left that asks something else."""
    from airflow_provider_batchkit import Round

    fill(database, {1: "one", 2: "two [[sim:credit-once]]", 3: "three [[sim:credit-once]]"})
    legs = Legs(rounds=[Round(), Round(ask=["truncated"], max_tokens=50, model="claude-opus-5")])
    first = legs.run()
    assert first["counts"] == {"errored": 2, "succeeded": 1} and CREDIT in first["stopped"]
    asked = api.stats()["requests_accepted"]
    second = legs.run()
    assert second["counts"] == {"succeeded": 3} and second["stopped"] is None
    assert api.stats()["requests_accepted"] == asked + 2
    assert {model for (model,) in rows(database, "SELECT DISTINCT model FROM answers")} == {"claude-opus-4-8"}
    assert legs.run()["counts"] == second["counts"]
    assert api.stats()["requests_accepted"] == asked + 2


def test_what_passes_by_type_and_text_is_asked_again_and_the_rest_is_not(
    home: Path, database: Database, api: SimulatorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the patterns of the configuration, which hold for what has landed before they were given."""
    fill(database, {1: "one [[sim:errored-once]]", 2: "two [[sim:overloaded-once]]"})
    legs = Legs(max_rounds=2)
    first = legs.run()
    assert first["counts"] == {"errored": 1, "succeeded": 1}
    legs.parameters["max_rounds"] = 3
    assert legs.run()["counts"] == first["counts"]
    monkeypatch.setenv("AIRFLOW__BATCHKIT__PASSING_ERRORS", '["invalid_request_error: .*told to FAIL"]')
    assert legs.run()["counts"] == {"succeeded": 2}


def test_many_failed_rows_are_judged_by_their_kinds(home: Path, database: Database, api: SimulatorProcess) -> None:
    """Counts, keys and the end of a job agree, and each kind names its first keys."""
    names = ["credit", "errored", "overloaded", "expired", "api-error"]
    fill(database, {i: f"n{i}" + (f" [[sim:{names[i % 6]}]]" if i % 6 < 5 else "") for i in range(300)})
    Legs(max_rounds=1).run()
    ledger = Ledger(database.engine())
    ((job_id,),) = rows(database, "SELECT job_id FROM batchkit_job")
    for reason, many in ((Reason.ACCOUNT, 50), (Reason.PASSING, 150), (Reason.PERMANENT, 50)):
        which = Wanted(reasons={reason})
        assert ledger.count_failed(job_id, which) == many == len(set(ledger.failed_keys(job_id, which)))
    found = ledger.outcome(job_id)
    assert sum(kind.rows for kind in found.failed) == 250 and all(len(kind.keys) == 5 for kind in found.failed)
    (account,) = [kind for kind in found.failed if kind.reason == "account"]
    assert all(json.loads(key)[0] % 6 == 0 for key in account.keys)
    assert "the account is the reason" in str(account) and CREDIT in str(account)


@pytest.mark.parametrize(
    ("error_type", "message", "reason"),
    [
        ("invalid_request_error", f"{CREDIT}. Please go to Plans & Billing to upgrade or purchase credits.", Reason.ACCOUNT),
        (
            "invalid_request_error",
            "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC.",
            Reason.ACCOUNT,
        ),
        ("invalid_request_error", "You have reached your specified workspace API usage limits.", Reason.ACCOUNT),
        ("invalid_request_error", "This organization has been disabled.", Reason.ACCOUNT),
        ("permission_error", "This organization has been disabled.", Reason.ACCOUNT),
        ("billing_error", None, Reason.ACCOUNT),
        ("authentication_error", "API key is invalid.", Reason.ACCOUNT),
        ("permission_error", "Your API key may not use claude-opus-5.", Reason.PERMANENT),
        ("invalid_request_error", "Unable to download the file. Please verify the URL and try again.", Reason.PASSING),
        ("invalid_request_error", "The request timed out while trying to download the file. Please try again later.", Reason.PASSING),
        ("invalid_request_error", "Could not process image", Reason.PERMANENT),
        ("invalid_request_error", "max_tokens: 100000 > 64000, which is the maximum allowed", Reason.PERMANENT),
        ("not_found_error", "model: claude-does-not-exist-9", Reason.PERMANENT),
        ("overloaded_error", "Overloaded", Reason.PASSING),
        ("rate_limit_error", "", Reason.PASSING),
        ("api_error", "Internal server error", Reason.PASSING),
        ("timeout_error", None, Reason.PASSING),
        (None, None, Reason.PERMANENT),
    ],
)
def test_an_error_is_judged_by_type_and_text(error_type: str | None, message: str | None, reason: Reason) -> None:
    """The API gives passing reasons the type of a bad request."""
    assert Failures().reason(Failure("errored", error_type, message)) is reason


def test_patterns_are_a_list_or_lines() -> None:
    """What is no regular expression, or no list of them, is refused by name."""
    for text in ('["quota of the day", "x"]', "quota of the day\n\n x ", "[q]uota OF"):
        assert Failures.parse(text).reason(Failure("errored", "invalid_request_error", "The quota of the day is used")) is Reason.PASSING
    assert Failures.parse(None).reason(Failure("expired", None, None)) is Reason.PASSING
    for text in ("(", "[1]"):
        with pytest.raises(BatchInputError, match="passing_errors"):
            Failures.parse(text)

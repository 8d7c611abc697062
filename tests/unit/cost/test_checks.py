"""The free checks: what the API says of a sample and of the models stops a job before anything is sent, and a check that fails does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_provider_batchkit import BatchKit
from airflow_provider_batchkit.exceptions import RequestError
from airflow_provider_batchkit.simulator import Simulator
from airflow_provider_batchkit.simulator.models import MODELS
from tests.warehouse import kit_for

HAIKU = "claude-haiku-5-5"


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


@pytest.fixture
def kit(sim: Simulator) -> BatchKit:
    return kit_for(sim.base_url)


def sent(simulator: Simulator) -> int:
    return int(simulator.stats()["calls"].get("create", 0))


def refused(kit: BatchKit, message: str, requests: Any = ("hello",), *, model: str = HAIKU, max_tokens: int = 10, **more: Any) -> str:
    """Both a submit and an estimate refuse the requests; gives the words."""
    for call in (kit.submit, kit.estimate):
        with pytest.raises(RequestError, match=message) as error:
            call(list(requests), model=model, max_tokens=max_tokens, **more)
    return str(error.value)


def test_a_model_that_the_count_does_not_find_stops_the_job_with_the_apis_words(sim: Simulator, kit: BatchKit) -> None:
    """``model: …`` of a 404 is definite; and so is a row's name in the message."""
    sim.faults.add("status", endpoint="count_tokens", status=404, message="model: claude-does-not-exist-9", times=None)
    words = refused(
        kit, r'key \["0"\]: the API refuses it: model: claude-does-not-exist-9\. Nothing was sent', model="claude-does-not-exist-9"
    )
    assert words.count("Nothing was sent") == 1
    assert sent(sim) == 0


def test_a_request_of_the_sample_that_the_count_refuses_stops_the_job(sim: Simulator, kit: BatchKit) -> None:
    """The count reads the same checks as a message does; the fourth request is the bad one."""
    good = {"messages": [{"role": "user", "content": "x"}]}
    bad = {"messages": [{"role": "user", "content": [{"type": "pictogram"}]}]}
    requests = [{"custom_id": f"row-{i}", "params": bad if i == 3 else good} for i in range(8)]
    refused(kit, r'key \["row-3"\]: the API refuses it: messages\.0\.content\.0\.type: .*pictogram', requests)
    assert sent(sim) == 0


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 429},
        {"status": 500},
        {"status": 529},
        {"status": 401},
        {"status": 403},
        {"status": 404, "message": "Not found"},
        {"status": 400, "message": "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing."},
        {"status": 400, "message": "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC."},
        {"status": 400, "message": "Unable to download the file. Please verify the URL and try again."},
        {"status": 400, "message": "messages.0: this block is not supported by token counting"},
        {"status": 400, "error_type": "gateway_error"},
    ],
)
def test_a_count_that_fails_for_another_reason_changes_nothing(
    sim: Simulator, kit: BatchKit, caplog: pytest.LogCaptureFixture, fault: dict[str, Any]
) -> None:
    """Neither weather nor the account, a gateway without that call or a block that only the count refuses: one line in the log."""
    sim.faults.add("status", endpoint="count_tokens", times=None, **fault)
    with caplog.at_level(logging.WARNING):
        assert len(kit.submit(["a", "b"], model=HAIKU, max_tokens=10)) == 1
    assert len([r for r in caplog.records if r.name.startswith("airflow_provider_batchkit")]) == 1
    assert "could not be counted" in caplog.text


def test_a_count_without_a_network_changes_nothing(sim: Simulator, kit: BatchKit) -> None:
    """The connection is cut at every count and look-up."""
    for endpoint in ("count_tokens", "model"):
        sim.faults.add("cut_before_accept", endpoint=endpoint, times=None)
    assert len(kit.submit(["a"], model=HAIKU, max_tokens=10)) == 1


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_a_model_that_cannot_be_looked_up_changes_nothing(
    sim: Simulator, kit: BatchKit, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """Also a 404: the count decides whether there is such a model."""
    sim.faults.add("status", endpoint="model", status=status, times=None)
    with caplog.at_level(logging.INFO, logger="airflow_provider_batchkit"):
        assert len(kit.submit(["a"], model=HAIKU, max_tokens=1_000_000)) == 1
    assert caplog.text.count("could not be looked up") == 1


def test_a_model_that_no_request_of_the_sample_names_is_checked_too(sim: Simulator, kit: BatchKit) -> None:
    """One request of forty names a model that does not exist, and the sample passes it by: its row is named all the same."""
    requests = [
        {
            "custom_id": f"row-{i}",
            "params": {"messages": [{"role": "user", "content": "x"}], **({"model": "claude-nobody-1"} if i == 39 else {})},
        }
        for i in range(40)
    ]
    refused(kit, r'key \["row-39"\]: the API refuses it: model: claude-nobody-1\. Nothing was sent', requests)
    assert sent(sim) == 0
    sim.faults.add("status", endpoint="count_tokens", status=500, times=None)
    assert kit.submit(requests, model=HAIKU, max_tokens=10)


def test_a_kind_of_thinking_that_the_model_does_not_take_is_refused(sim: Simulator, caplog: pytest.LogCaptureFixture) -> None:
    """The API tells it of each model; the batch would fail row by row. A beta header may allow it."""
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1_024}}
    how: dict[str, Any] = {"model": "claude-opus-5", "max_tokens": 2_000, "params": thinking}
    refused(kit_for(sim.base_url), r'key \["0"\]: claude-opus-5 does not take thinking of type .enabled.; it takes adaptive', **how)
    assert sent(sim) == 0
    assert kit_for(sim.base_url, default_headers={"anthropic-beta": "x"}).submit(["x"], **how)
    assert "unless the anthropic-beta header of the connection allows it" in caplog.text
    assert kit_for(sim.base_url).submit(["x"], **{**how, "model": HAIKU})


def test_max_tokens_above_the_models_limit_is_refused(sim: Simulator, kit: BatchKit) -> None:
    """Of any request, with both numbers and the row that has it; the limit itself is fine."""
    limit = MODELS[HAIKU]["max_tokens"]
    requests = [
        {"custom_id": f"row-{i}", "params": {"messages": [{"role": "user", "content": "x"}], "max_tokens": limit + (i == 7)}}
        for i in range(300)
    ]
    refused(kit, rf'key \["row-7"\]: max_tokens is {limit + 1:,}, and {HAIKU} writes {limit:,} at most\. Nothing was sent', requests)
    assert sent(sim) == 0
    assert kit.submit(["x"], model=HAIKU, max_tokens=limit)


def test_a_beta_header_may_lift_the_limit(sim: Simulator, caplog: pytest.LogCaptureFixture) -> None:
    """What the API tells of a model is without it: a warning, and no more."""
    kit = kit_for(sim.base_url, default_headers={"anthropic-beta": "output-300k-2026-03-24"})
    assert kit.submit(["x"], model=HAIKU, max_tokens=300_000)
    assert "max_tokens is 300,000" in caplog.text and "unless the anthropic-beta header" in caplog.text


def test_a_retired_model_is_refused_and_a_deprecated_one_is_a_warning(
    sim: Simulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the day on which it goes, where the API tells one."""
    monkeypatch.setitem(MODELS, HAIKU, {**MODELS[HAIKU], "lifecycle": "retired"})
    refused(kit_for(sim.base_url), f"the model {HAIKU} is retired and answers no more")
    assert sent(sim) == 0
    monkeypatch.setitem(MODELS, HAIKU, {**MODELS[HAIKU], "lifecycle": "deprecated", "retires_at": "2026-12-24T00:00:00Z"})
    assert kit_for(sim.base_url).submit(["x"], model=HAIKU, max_tokens=5)
    assert f"The model {HAIKU} is deprecated and will be retired on 2026-12-24." in caplog.text


def test_a_model_that_takes_no_batches_is_refused(sim: Simulator, kit: BatchKit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its capabilities say so."""
    monkeypatch.setitem(MODELS, HAIKU, {**MODELS[HAIKU], "capabilities": {"batch": {"supported": False}}})
    refused(kit, "does not take message batches")
    assert sent(sim) == 0


@pytest.mark.parametrize(
    "told",
    [
        {"max_tokens": None, "lifecycle": None, "capabilities": None},
        {"max_tokens": "64000", "lifecycle": ["retired"], "capabilities": {"batch": True}},
        {"max_tokens": 0, "capabilities": {"batch": {"supported": None}}},
        {"lifecycle": "sunset"},
    ],
)
def test_what_a_model_does_not_tell_is_not_checked(
    sim: Simulator, kit: BatchKit, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any]
) -> None:
    """An older API, a gateway's own list, or values of another form."""
    monkeypatch.setitem(MODELS, HAIKU, {"id": HAIKU, **told})
    assert kit.submit(["x"], model=HAIKU, max_tokens=1000)


def test_the_checks_of_a_submit_are_twelve_calls_at_most(sim: Simulator, kit: BatchKit) -> None:
    """For any number of requests and models; each model once."""
    many = [
        {"custom_id": f"r{i}", "params": {"model": model, "max_tokens": 5, "messages": [{"role": "user", "content": f"{i}"}]}}
        for i, model in enumerate(list(MODELS) * 30)
    ]
    kit.submit(many)
    calls = sim.stats()["calls"]
    assert calls["count_tokens"] + calls["model"] <= 12
    assert calls["count_tokens"] >= 6 and calls["model"] == 6
    one = kit_for(sim.base_url)
    one.submit([f"{i}" for i in range(100)], model=HAIKU, max_tokens=5)
    after = sim.stats()["calls"]
    assert (after["count_tokens"] - calls["count_tokens"], after["model"] - calls["model"]) == (10, 1)

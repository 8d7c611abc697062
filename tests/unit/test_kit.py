"""BatchKit without Airflow: submit, wait, retrieve and run, over HTTP against the simulator."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from airflow_provider_batchkit import BatchKit, RequestStatus
from airflow_provider_batchkit.exceptions import (
    BatchInputError,
    BatchNotEndedError,
    BatchNotVisibleError,
    BatchUnavailableError,
    BatchWaitTimeout,
    PollError,
    RequestError,
    SubmitRefusedError,
    SubmitThrottledError,
    SubmitUncertainError,
)
from airflow_provider_batchkit.simulator import Simulator, answer_for
from tests.warehouse import kit_for

MODEL: dict[str, Any] = {"model": "claude-haiku-5-5", "max_tokens": 50}


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


@pytest.fixture
def kit(sim: Simulator) -> BatchKit:
    return kit_for(sim.base_url)


def native(custom_id: str, text: str = "hello") -> dict[str, Any]:
    return {"custom_id": custom_id, "params": {**MODEL, "messages": [{"role": "user", "content": text}]}}


def test_run_gives_every_answer_and_what_it_cost(kit: BatchKit) -> None:
    """Submit, wait and retrieve in one call."""
    result = kit.run(["Name a river.", "Name a lake."], **MODEL)
    texts = {item.custom_id: item.text for item in result.items}
    assert texts == {"item-0": answer_for("Name a river."), "item-1": answer_for("Name a lake.")}
    assert {item.stop_reason for item in result.items} == {"end_turn"}
    usage = [item.usage for item in result.items if item.usage]
    # haiku 5.5 in a batch: $0.05 and $0.25 a million tokens
    expected = sum(Decimal(u.input_tokens) * Decimal("0.05e-6") + Decimal(u.output_tokens) * Decimal("0.25e-6") for u in usage)
    assert result.tally.batch_cost_usd == expected > 0
    assert result.tally.standard_cost_usd == 2 * expected
    assert result.counts.succeeded == 2


def test_the_words_of_the_first_library_run_as_they_are(kit: BatchKit) -> None:
    """What submit returns goes into wait and retrieve unseen, and items have an id and a content."""
    batch_id = kit.submit(prompts=["Name a river.", "Name a lake."], **MODEL)
    kit.wait(batch_id)
    result = kit.retrieve(batch_id)
    assert [(item.custom_id, item.content) for item in result.items] == [
        ("item-0", answer_for("Name a river.")),
        ("item-1", answer_for("Name a lake.")),
    ]
    assert [item.content for item in kit.run(prompts=["Name a river."], **MODEL).items] == [answer_for("Name a river.")]
    assert kit.estimate(prompts=["Name a river."], **MODEL).requests == 1


def test_one_id_serves_as_well_as_the_list(kit: BatchKit) -> None:
    """Wait and retrieve take the list that submit returns, and one id out of it."""
    (batch_id,) = ids = kit.submit(prompts=["Name a river."], **MODEL)
    assert kit.wait(batch_id) == kit.wait(ids)
    assert kit.retrieve(batch_id) == kit.retrieve(ids)


def test_answers_to_prompts_come_in_their_order_over_all_batches(kit: BatchKit) -> None:
    """The API answers in any order, and as text item-10 comes before item-2."""
    prompts = [f"Name river {i}." for i in range(25)]
    ids = kit.submit(prompts=prompts, max_requests_per_batch=12, **MODEL)
    assert len(ids) == 3
    asked = [(f"item-{i}", answer_for(prompt)) for i, prompt in enumerate(prompts)]
    for given in (ids, ids[::-1]):
        assert [(item.custom_id, item.content) for item in kit.retrieve(given).items] == asked


def test_results_of_two_submits_stay_apart(kit: BatchKit) -> None:
    """Positions that come twice tell the order within each batch alone."""
    first, second = (kit.submit(prompts=[f"Name {what} {i}." for i in range(12)], **MODEL) for what in ("river", "lake"))
    items = kit.retrieve(second + first).items
    assert [item.content for item in items] == [answer_for(f"Name {what} {i}.") for what in ("lake", "river") for i in range(12)]


def test_among_native_ids_those_of_prompts_are_in_order(kit: BatchKit) -> None:
    """An id of the user's own tells no position: not one that looks like it, either."""
    requests = [native("item-x"), *(f"Name river {i}." for i in range(20)), native("item-007"), native("my-item-3")]
    ids = [item.custom_id for item in kit.retrieve(kit.submit(requests, **MODEL)).items]
    assert [custom_id for custom_id in ids if custom_id not in ("item-x", "item-007", "my-item-3")] == [f"item-{i}" for i in range(1, 21)]
    assert len(ids) == 23


def test_run_gives_an_item_for_each_request_in_their_order(kit: BatchKit) -> None:
    """Also where the ids are the user's own, and where some have failed: the items can be zipped with the requests."""
    names = ["zebra", "ant", "item-9", "bee", "item-0"]
    requests = [native(name, "[[sim:errored]]" if name == "bee" else name) for name in names]
    items = kit.run([*requests, "Name a lake."], **MODEL).items
    assert [item.custom_id for item in items] == [*names, "item-5"]
    answers = [None if name == "bee" else answer_for(name) for name in names]
    assert [item.content for item in items] == [*answers, answer_for("Name a lake.")]


def test_a_line_that_run_misses_does_not_shift_the_others(kit: BatchKit, sim: Simulator) -> None:
    """A request without a line is missing and has no content; a line that nobody asked for is counted, and is no item."""
    sim.faults.add("missing_line", line=2, times=None)
    sim.faults.add("foreign_line", line=3, times=None)
    prompts = [f"Name river {i}." for i in range(6)]
    result = kit.run(prompts=prompts, **MODEL)
    missing = [item for item in result.items if item.status is RequestStatus.MISSING]
    assert [item.custom_id for item in result.items] == [f"item-{i}" for i in range(6)]
    assert [item.content for item in missing] == [None]
    assert all(item.content == answer_for(prompt) for prompt, item in zip(prompts, result.items, strict=True) if item not in missing)
    assert result.faults.foreign == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "Give requests or prompts, not neither"),
        ({"requests": ["a"], "prompts": ["b"]}, "Give requests or prompts, not both"),
        ({"requests": [], "prompts": []}, "Give requests or prompts, not both"),
        ({"prompts": "Name a river."}, "prompts must be a list .* of strings, not a str. For one prompt give a list of one"),
        ({"prompts": b"Name a river."}, "prompts must be a list .* not a bytes"),
        ({"prompts": {"a": "Name a river."}}, "prompts must be a list .* not a dict"),
        ({"prompts": 7}, "prompts must be a list .* not a int"),
        ({"prompts": ["Name a river.", None]}, "prompt 1: a prompt is a string, not NoneType"),
        ({"prompts": [native("a")]}, "prompt 0: .* native requests go into requests"),
        ({"prompts": ["Name a river.", " "]}, "request 1: .*no content"),
    ],
)
@pytest.mark.parametrize("method", ["submit", "run", "estimate"])
def test_prompts_that_cannot_be_meant_are_refused_in_words(
    kit: BatchKit, sim: Simulator, method: str, given: dict[str, Any], words: str
) -> None:
    """Every way in refuses them alike, and nothing is sent."""
    with pytest.raises((BatchInputError, RequestError), match=f"{words}.*Nothing was sent"):
        getattr(kit, method)(**given, **MODEL)
    assert sim.stats()["posts"] == 0


def test_a_long_list_becomes_several_batches(kit: BatchKit, sim: Simulator) -> None:
    """Ids come back as a list, and retrieve takes the list."""
    ids = kit.submit((native(f"r-{i}") for i in range(10)), max_requests_per_batch=4)
    assert len(ids) == len(set(ids)) == 3
    kit.wait(ids)
    assert {item.custom_id for item in kit.retrieve(ids).items} == {f"r-{i}" for i in range(10)}
    assert kit.retrieve(ids[0]).counts.total == 4


def test_failed_items_keep_the_apis_error(kit: BatchKit) -> None:
    """An errored item has type and message; expired and canceled ones have a status; none is billed."""
    outcomes = ["errored", "expired", "canceled"]
    result = kit.run([native(o, f"[[sim:{o}]]") for o in outcomes])
    items = {item.custom_id: item for item in result.items}
    assert {name: item.status for name, item in items.items()} == {o: RequestStatus(o) for o in outcomes}
    assert items["errored"].error_type
    assert items["errored"].error_message
    assert result.tally.requests == 0
    assert result.tally.batch_cost_usd == Decimal(0)


def test_a_repeated_custom_id_sends_nothing(kit: BatchKit, sim: Simulator) -> None:
    """Bad input anywhere in the list stops the whole before the first POST."""
    with pytest.raises(RequestError, match="custom_id 'a' came before"):
        kit.submit([native("a"), native("b"), native("a")], max_requests_per_batch=1)
    assert sim.stats()["posts"] == 0


def test_wait_grows_its_interval_and_reports_progress(kit: BatchKit, sim: Simulator) -> None:
    """The callback sees each look; the batch ends after the third."""
    sim.set(clock="polls:2")
    (batch_id,) = kit.submit(["hello"], **MODEL)
    seen: list[str] = []
    kit.wait(batch_id, interval_s=0.01, on_progress=lambda all_: seen.append(all_[batch_id].processing_status))
    assert seen == ["in_progress", "in_progress", "ended"]


def test_wait_ends_at_its_bound_and_says_that_the_batch_goes_on(kit: BatchKit, sim: Simulator) -> None:
    """A time-out names the batch and costs nothing more."""
    sim.set(clock="manual")
    (batch_id,) = kit.submit(["hello"], **MODEL)
    with pytest.raises(BatchWaitTimeout, match=f"{batch_id}.*keep running"):
        kit.wait(batch_id, interval_s=0.05, timeout_s=0.2)
    with pytest.raises(BatchNotEndedError, match="is in_progress"):
        kit.retrieve(batch_id)


def test_waiting_survives_a_fault_of_the_api(kit: BatchKit, sim: Simulator) -> None:
    """A 500 and a cut connection while polling are looked past."""
    (batch_id,) = kit.submit(["hello"], **MODEL)
    sim.faults.add("status", endpoint="retrieve", status=500, times=2)
    assert kit.wait(batch_id, interval_s=0.01)[batch_id].processing_status == "ended"


def test_a_batch_that_is_not_there_ends_the_wait_when_it_was_looked_for_long_enough(
    kit: BatchKit, caplog: pytest.LogCaptureFixture
) -> None:
    """Deleted, or of another workspace; the log says at once that nothing shows the id to be right."""
    kit.absence_s = 0.3
    with pytest.raises(PollError, match=r"deleted, or belongs to another workspace.*looks over .* s found nothing"):
        kit.wait("msgbatch_unknown", interval_s=60)
    assert "its id may be wrong" in caplog.text
    with pytest.raises(BatchNotVisibleError, match="msgbatch_unknown"):
        kit.retrieve("msgbatch_unknown")


@pytest.mark.parametrize("endpoint", ["retrieve", "results"])
def test_a_live_batch_that_answers_404_is_looked_for_again(
    kit: BatchKit, sim: Simulator, endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The API was seen to do so a second after create, in the middle, and for results after the end."""
    kit.absence_s = 3.0
    sim.set(clock="polls:3")
    sim.faults.add("vanish", endpoint=endpoint)
    sim.faults.add("vanish", endpoint=endpoint, after=1)
    assert len(kit.run(["hello"], **MODEL, interval_s=0.01).items) == 1
    assert sum(fault["struck"] for fault in sim.stats()["faults"]) == 2
    assert "404" in caplog.text or "does not show its results" in caplog.text


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
def test_a_refusal_is_final_and_says_that_nothing_was_billed(kit: BatchKit, sim: Simulator, status: int) -> None:
    """A definite 4xx is not retried."""
    sim.faults.add("status", endpoint="create", status=status)
    with pytest.raises(SubmitRefusedError, match=f"with {status} .*Nothing was accepted or billed") as error:
        kit.submit(["hello"], **MODEL)
    assert error.value.status == status
    assert sim.stats()["posts"] == 1


def test_a_refusal_after_others_were_accepted_names_those(kit: BatchKit, sim: Simulator) -> None:
    """Batches that run must not be forgotten because a later one was refused."""
    sim.faults.add("status", endpoint="create", status=400, after=2)
    with pytest.raises(SubmitRefusedError) as error:
        kit.submit(["a", "b", "c"], max_requests_per_batch=1, **MODEL)
    assert set(error.value.submitted) == {batch["id"] for batch in sim.stats()["batches"]}
    assert len(error.value.submitted) == 2
    assert "They run and are billed" in error.value.__notes__[0]


@pytest.mark.parametrize("status", [429, 529])
def test_throttling_is_waited_out_as_the_api_asks(kit: BatchKit, sim: Simulator, status: int) -> None:
    """429 and 529 prove that nothing was accepted: the same body goes out again after retry-after."""
    sim.faults.add("status", endpoint="create", status=status, retry_after=1, times=1)
    assert len(kit.submit(["hello"], **MODEL)) == 1
    stats = sim.stats()
    assert (stats["posts"], stats["batches_accepted"]) == (2, 1)


def test_throttling_beyond_the_bound_fails_with_nothing_billed(kit: BatchKit, sim: Simulator) -> None:
    """Nobody waits for an hour inside a worker slot."""
    sim.faults.add("status", endpoint="create", status=429, retry_after=3600)
    with pytest.raises(SubmitThrottledError, match="Nothing of this shard was accepted or billed"):
        kit.submit(["hello"], **MODEL)
    assert sim.stats()["posts"] == 1


@pytest.mark.parametrize("fault", ["cut_after_accept", "cut_before_accept", "status_after_accept"])
def test_an_answer_that_never_came_is_never_sent_again(kit: BatchKit, sim: Simulator, fault: str) -> None:
    """The SDK alone would POST three times; here one POST goes out and the doubt is told."""
    sim.faults.add(fault, times=5)
    with pytest.raises(SubmitUncertainError, match="not sent again before its batch has been looked for"):
        kit.submit(["hello"], **MODEL)
    assert sim.stats()["posts"] == 1


def test_no_connection_at_all_proves_that_nothing_was_sent() -> None:
    """A refused connection is worth a retry and needs no reconciliation."""
    with Simulator() as gone:
        url = gone.base_url
    kit = kit_for(url)
    kit.throttle_wait_s = 0.0
    with pytest.raises(SubmitThrottledError, match="no connection"):
        kit.submit(["hello"], **MODEL)


def test_results_that_are_cut_are_read_again(kit: BatchKit, sim: Simulator) -> None:
    """Every item once, however often the stream breaks."""
    ids = kit.submit([native(f"r-{i}") for i in range(20)])
    sim.faults.add("cut_results", line=7)
    sim.faults.add("cut_results", line=13)
    items = kit.retrieve(ids).items
    assert sorted(item.custom_id for item in items) == sorted(f"r-{i}" for i in range(20))


@pytest.mark.parametrize(("times", "items", "short"), [(1, 5, 0), (None, 2, 3)])
def test_results_that_end_too_early_are_read_once_more_and_then_told(
    kit: BatchKit, sim: Simulator, times: int | None, items: int, short: int
) -> None:
    """A stream that ends cleanly before the API's count is not the whole; when it stays so, the number is there."""
    ids = kit.submit([native(f"r-{i}") for i in range(5)])
    sim.faults.add("cut_results", line=3, clean=True, times=times)
    result = kit.retrieve(ids)
    assert (len(result.items), result.faults.short) == (items, short)


def test_lines_that_do_not_belong_are_counted(kit: BatchKit, sim: Simulator) -> None:
    """Broken and repeated lines do not become items, and are not hidden."""
    ids = kit.submit([native(f"r-{i}") for i in range(5)])
    sim.faults.add("broken_line", line=2)
    sim.faults.add("duplicate_line", line=3)
    result = kit.retrieve(ids)
    assert len(result.items) == 5
    assert (result.faults.broken, result.faults.duplicate) == (1, 1)


def test_a_canceled_batch_keeps_what_was_answered(kit: BatchKit, sim: Simulator) -> None:
    """Cancel asks; finished requests stay."""
    sim.set(clock="manual", done_share=0.5)
    (batch_id,) = kit.submit([native(f"r-{i}") for i in range(20)])
    assert kit.cancel(batch_id).processing_status == "canceling"
    sim.end(batch_id)
    counts = kit.wait(batch_id, interval_s=0.01)[batch_id].counts
    assert counts.succeeded + counts.canceled == 20
    assert kit.retrieve(batch_id).tally.requests == counts.succeeded > 0


def test_archived_results_say_so(kit: BatchKit, sim: Simulator) -> None:
    """After 29 days the results are gone; the error says what is left."""
    ids = kit.submit(["hello"], **MODEL)
    kit.wait(ids)
    sim.archive(ids[0])
    with pytest.raises(BatchUnavailableError, match=r"archived at .* 29 days"):
        kit.retrieve(ids)


def test_a_deleted_batch_is_gone(kit: BatchKit) -> None:
    """Delete removes it from the API."""
    ids = kit.submit(["hello"], **MODEL)
    kit.wait(ids)
    kit.delete(ids[0])
    with pytest.raises(BatchUnavailableError):
        kit.get(ids[0])

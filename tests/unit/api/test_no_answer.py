"""A 200 that is no answer of the API: a proxy's page, an empty body, JSON of another shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import anthropic
import httpx2
import pytest

from airflow_provider_batchkit import BatchKit
from airflow_provider_batchkit.api.cancel import Fate
from airflow_provider_batchkit.api.polling import PollState
from airflow_provider_batchkit.exceptions import PollError, ResultStreamError, SubmitUncertainError
from airflow_provider_batchkit.simulator import Simulator
from airflow_provider_batchkit.triggers.looking import Looker
from airflow_provider_batchkit.triggers.watches import Look, Watches
from tests.gateway import Gateway
from tests.warehouse import kit_for

MODEL: dict[str, Any] = {"model": "claude-haiku-5-5", "max_tokens": 50}
PAGE = "<html>\n<title>Sign\x07 in</title>" + 200 * "x"
#: what a body that is no batch may be
BODIES = {
    "a page": PAGE,
    "nothing": "",
    "an empty object": "{}",
    "a list": "[]",
    "null": "null",
    "a text": '"ended"',
    "cut off": '{"id": "msgbatch_1", "processing_status": "end',
    "null members": '{"id": null, "processing_status": null, "created_at": null, "request_counts": null}',
    "another batch": '{"id": "msgbatch_other", "processing_status": "ended", "created_at": "2026-01-01T00:00:00Z"}',
    "an error": '{"type": "error", "error": {"type": "api_error", "message": "no"}}',
    "no text": "\ufffd\x00",
}
EPOCH = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


@pytest.fixture
def kit(sim: Simulator) -> BatchKit:
    return kit_for(sim.base_url)


@pytest.fixture
def ended(kit: BatchKit) -> str:
    """The id of an ended batch."""
    (batch_id,) = kit.submit(["hello"], **MODEL)
    kit.wait(batch_id, interval_s=0.01)
    return batch_id


def page(sim: Simulator, endpoint: str, body: str, *, times: int | None = None) -> None:
    kind = "text/html; charset=utf-8" if body.startswith("<") else "application/json"
    sim.faults.add("html", endpoint=endpoint, body=body, content_type=kind, times=times)


def async_look(base_url: str, *batch_ids: str) -> Look:
    async def look() -> Look:
        found, watches = Look(0.0), Watches()
        watches.join(PollState(batch_ids, interval=1.0), due=0.0, now=0.0, clock=0.0)
        async with anthropic.AsyncAnthropic(api_key="k", base_url=base_url, max_retries=0) as client:
            await Looker(client, "anthropic_default").look(found, dict.fromkeys(batch_ids), watches)
        return found

    return asyncio.run(look())


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_look_without_an_answer_is_a_passing_fault(
    kit: BatchKit, sim: Simulator, ended: str, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait goes on, and one that never gets an answer says what came."""
    monkeypatch.setattr("airflow_provider_batchkit.api.polling.MAX_FAILURES", 3)
    page(sim, "retrieve", body, times=2)
    assert kit.wait(ended, interval_s=0.001)[ended].processing_status == "ended"
    page(sim, "retrieve", body)
    with pytest.raises(PollError, match="no answer of the API"):
        kit.wait(ended, interval_s=0.001)
    failure = async_look(sim.base_url, ended).failed[ended]
    assert not failure.fatal and "no answer of the API" in failure.error


def test_the_message_quotes_the_beginning_and_no_more(kit: BatchKit, sim: Simulator, ended: str) -> None:
    """One line, without control characters, of a hundred characters at most."""
    page(sim, "retrieve", PAGE)
    with pytest.raises(anthropic.APIResponseValidationError, match="answered 200 with text/html") as error:
        kit.get(ended)
    assert "<html> <title>Sign in</title>xxx" in str(error.value)
    assert "x" * 75 not in str(error.value)


def test_a_client_that_retries_asks_again_by_itself(sim: Simulator, ended: str) -> None:
    """One page in between is not worth a failed task, where the client may retry what fails."""
    page(sim, "*", PAGE, times=2)
    assert kit_for(sim.base_url).client.max_retries == 0
    kit = BatchKit(anthropic.Anthropic(api_key="k", base_url=sim.base_url, max_retries=2))
    assert kit.get(ended).batch_id == ended


@pytest.mark.parametrize("body", [body for name, body in BODIES.items() if name != "another batch"])
def test_a_create_without_an_answer_is_a_doubt(kit: BatchKit, sim: Simulator, body: str) -> None:
    """It may have been accepted: it is not sent again, and the message says what came."""
    sim.faults.add("html_after_accept", body=body, content_type="text/html" if body.startswith("<") else "application/json")
    with pytest.raises(SubmitUncertainError, match=r"no answer of the API.*It may have been accepted"):
        kit.submit(["hello"], **MODEL)
    assert sim.stats()["posts"] == 1


@pytest.mark.parametrize("body", [body for name, body in BODIES.items() if name != "another batch"])
def test_a_list_without_an_answer_shows_nothing_and_proves_nothing(kit: BatchKit, sim: Simulator, ended: str, body: str) -> None:
    """An empty list would prove that a batch was never accepted; a page does not."""
    page(sim, "list", body)
    with pytest.raises(anthropic.APIResponseValidationError, match="no answer of the API"):
        list(kit.recent(EPOCH))
    look = async_look(sim.base_url, ended, "b", "c", "d")
    assert look.failure is not None and not look.failure.fatal and "no answer of the API" in look.failure.error


def test_an_odd_member_of_the_list_hides_no_other(sim: Simulator, kit: BatchKit, ended: str) -> None:
    """The trigger sees the rest; settling, for which a batch that is left out is a proof, does not go on."""

    def change(method: str, path: str, status: int, body: bytes) -> bytes:
        if not path.startswith("/v1/messages/batches?"):
            return body
        listed = json.loads(body)
        return json.dumps({**listed, "data": [None, *listed["data"], {"id": "odd"}]}).encode()

    with Gateway(sim.base_url, change=change) as gateway:
        assert async_look(gateway.base_url, ended, "b", "c", "d").shown[ended].processing_status == "ended"
        with pytest.raises(anthropic.APIResponseValidationError, match="2 of its members are no batches"):
            list(kit_for(gateway.base_url).recent(EPOCH))


def pages_of(kit: BatchKit, *pages: dict[str, Any]) -> Callable[[str, str, int, bytes], bytes]:
    """A gateway's change of the list: page after page, and the last one for ever. Their members are numbers of batches, oldest first."""
    made = [kit.submit([f"hello {i}"], **MODEL)[0] for i in range(3)]
    listed = [json.loads(kit.client.get(f"/v1/messages/batches/{batch_id}", cast_to=httpx2.Response).content) for batch_id in made]
    bodies = [json.dumps({**page, "data": [listed[i] for i in page["data"]]}).encode() for page in pages]

    def change(method: str, path: str, status: int, body: bytes) -> bytes:
        if not path.startswith("/v1/messages/batches?"):
            return body
        return bodies.pop(0) if len(bodies) > 1 else bodies[0]

    return change


@pytest.mark.parametrize(
    "pages",
    [
        [{"data": [2, 1], "has_more": True}, {"data": [2, 1], "has_more": True}],
        [{"data": [2], "has_more": True}, {"data": [1], "has_more": True}, {"data": [2], "has_more": True}],
        [{"data": [2, 1], "has_more": True}, {"data": [], "has_more": True}],
        [{"data": [2, 1]}],
        [{"data": []}],
        [{"data": [2, 1], "has_more": None}],
    ],
    ids=["the same page again", "a ring", "more and none", "no has_more", "nothing at all", "has_more null"],
)
def test_a_list_whose_end_is_not_shown_proves_nothing(sim: Simulator, kit: BatchKit, pages: list[dict[str, Any]]) -> None:
    """A batch that such a list leaves out would count as never accepted, and be paid for again; nor is it read for ever."""
    with (
        Gateway(sim.base_url, change=pages_of(kit, *pages)) as gateway,
        pytest.raises(anthropic.APIResponseValidationError, match="no answer of the API"),
    ):
        list(kit_for(gateway.base_url).recent(EPOCH))


def test_a_batch_that_comes_twice_in_the_list_is_shown_once(sim: Simulator, kit: BatchKit) -> None:
    """Twice, it would look like a POST that was repeated on the way."""
    change = pages_of(kit, {"data": [2, 1, 2], "has_more": True}, {"data": [1, 0], "has_more": False})
    with Gateway(sim.base_url, change=change) as gateway:
        assert [s.batch_id for s in kit_for(gateway.base_url).recent(EPOCH)] == made_in(sim)[::-1]


def test_an_old_batch_before_younger_ones_of_its_page_hides_none(sim: Simulator, kit: BatchKit) -> None:
    """The list is read on until a page ends with what is too old."""
    change = pages_of(kit, {"data": [0, 1, 2], "has_more": False})
    made = made_in(sim)
    with Gateway(sim.base_url, change=change) as gateway:
        assert [s.batch_id for s in kit_for(gateway.base_url).recent(kit.get(made[1]).created_at)] == made[1:]


def made_in(sim: Simulator) -> list[str]:
    """Ids of the simulator's batches, oldest first."""
    return [batch["id"] for batch in sorted(sim.stats()["batches"], key=lambda batch: batch["created_at"])]


@pytest.mark.parametrize("member", ["processing", "succeeded"])
def test_a_count_that_is_missing_is_said_to_be(sim: Simulator, kit: BatchKit, ended: str, member: str) -> None:
    """An ended batch is read all the same; its size is not known, so it rules nothing out."""

    def change(method: str, path: str, status: int, body: bytes) -> bytes:
        if not path.endswith(ended):
            return body
        batch = json.loads(body)
        batch["request_counts"][member] = None
        return json.dumps(batch).encode()

    with Gateway(sim.base_url, change=change) as gateway:
        through = kit_for(gateway.base_url)
        assert (through.get(ended).counted, kit.get(ended).counted) == (False, True)
        assert len(through.retrieve(ended).items) == 1


@pytest.mark.parametrize("body", [PAGE, "", "\n", "[]", "null", BODIES["an error"]])
def test_results_without_an_answer_are_read_again(
    kit: BatchKit, sim: Simulator, ended: str, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row is called missing because a proxy answered in place of the API."""
    monkeypatch.setattr("airflow_provider_batchkit.kit._STREAM_ATTEMPTS", 2)
    page(sim, "results", body, times=1)
    assert len(kit.retrieve(ended).items) == 1
    page(sim, "results", body)
    with pytest.raises(ResultStreamError, match=r"no answer of the API.*Nothing is lost"):
        kit.retrieve(ended)


@pytest.mark.parametrize("endpoint", ["cancel", "delete"])
def test_a_change_without_an_answer_is_not_taken_for_done(kit: BatchKit, sim: Simulator, ended: str, endpoint: str) -> None:
    """A page is not the end of a batch, nor of its results."""
    page(sim, endpoint, PAGE)
    with pytest.raises(anthropic.APIResponseValidationError, match="no answer of the API"):
        getattr(kit, endpoint)(ended)
    assert kit.get(ended).batch_id == ended


def test_a_204_is_no_answer_to_any_call(kit: BatchKit, sim: Simulator, ended: str) -> None:
    """A gateway that carries the call out, or does not, and says that there is nothing to say."""
    calls: dict[str, Callable[[], Any]] = {
        "create": lambda: kit.submit(["hello"], **MODEL),
        "retrieve": lambda: kit.get(ended),
        "list": lambda: list(kit.recent(EPOCH)),
        "results": lambda: list(kit.stream_results(ended)),
        "count_tokens": lambda: kit.count_tokens({"model": MODEL["model"], "messages": [{"role": "user", "content": "hello"}]}),
        "model": lambda: kit.model_info("claude-sonnet-5"),
        "cancel": lambda: kit.cancel(ended),
        "delete": lambda: kit.delete(ended),
    }
    for endpoint, call in calls.items():
        sim.faults.add("html", endpoint=endpoint, status=204, body="", content_type="text/plain")
        with pytest.raises((anthropic.APIResponseValidationError, SubmitUncertainError, ResultStreamError), match="answered 204"):
            call()
    assert kit.get(ended).processing_status == "ended"


def test_a_cancel_whose_answer_is_a_page_is_looked_into(kit: BatchKit, sim: Simulator) -> None:
    """The batch says what became of it; where looks get pages, too, the report says so."""
    sim.set(clock="manual")
    first, second = kit.submit(["a"], **MODEL) + kit.submit(["b"], **MODEL)
    sim.faults.add("html_after_accept", endpoint="cancel", times=None)
    assert kit.cancel_all(first)[0].fate is Fate.CANCELED
    page(sim, "retrieve", PAGE)
    (failed,) = kit.cancel_all(second)
    assert failed.fate is Fate.FAILED and "no answer of the API" in failed.reason

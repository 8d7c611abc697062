"""The key goes to the connection's own address and to no other, whatever an answer names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import anthropic
import pytest

from airflow_provider_batchkit import BatchKit
from airflow_provider_batchkit.api.cancel import cancel_batches_async
from airflow_provider_batchkit.api.polling import PollState
from airflow_provider_batchkit.api.wire import batch_path
from airflow_provider_batchkit.exceptions import BatchInputError, BatchKitError, SubmitRefusedError, SubmitUncertainError
from airflow_provider_batchkit.simulator import Simulator
from airflow_provider_batchkit.triggers.looking import Looker
from airflow_provider_batchkit.triggers.watches import Look, Watches
from tests.gateway import Gateway
from tests.warehouse import kit_for

MODEL: dict[str, Any] = {"model": "claude-haiku-5-5", "max_tokens": 50}
KEY = "test-key"


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


@pytest.fixture
def elsewhere() -> Iterator[Gateway]:
    """A host that the connection does not name."""
    with Gateway() as other:
        yield other


def async_client(base_url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(api_key=KEY, base_url=base_url, max_retries=0)


def async_look(base_url: str, *batch_ids: str) -> Look:
    """One look of the trigger's poller."""

    async def look() -> Look:
        found, watches = Look(0.0), Watches()
        watches.join(PollState(batch_ids, interval=1.0), due=0.0, now=0.0, clock=0.0)
        async with async_client(base_url) as client:
            await Looker(client, "anthropic_default").look(found, dict.fromkeys(batch_ids), watches)
        return found

    return asyncio.run(look())


def async_cancel(base_url: str, batch_id: str) -> object:
    async def cancel() -> object:
        async with async_client(base_url) as client:
            return await cancel_batches_async(client, [batch_id])

    return asyncio.run(cancel())


class Ended(NamedTuple):
    """An ended batch."""

    kit: BatchKit
    url: str
    batch_id: str


#: every call that the package makes on a batch, as (endpoint, call)
CALLS: dict[str, tuple[str, Callable[[Ended], object]]] = {
    "create": ("create", lambda it: it.kit.submit(["hello"], **MODEL)),
    "look": ("retrieve", lambda it: it.kit.get(it.batch_id)),
    "list": ("list", lambda it: list(it.kit.recent(it.kit.get(it.batch_id).created_at))),
    "results": ("results", lambda it: it.kit.retrieve(it.batch_id)),
    "cancel": ("cancel", lambda it: it.kit.cancel(it.batch_id)),
    "cancel all": ("cancel", lambda it: it.kit.cancel_all(it.batch_id)),
    "delete": ("delete", lambda it: it.kit.delete(it.batch_id)),
    "count tokens": ("count_tokens", lambda it: it.kit.count_tokens({**MODEL, "messages": []})),
    "a trigger's look": ("retrieve", lambda it: async_look(it.url, it.batch_id)),
    "a trigger's list": ("list", lambda it: async_look(it.url, it.batch_id, "b", "c", "d")),
    "a trigger's cancel": ("cancel", lambda it: async_cancel(it.url, it.batch_id)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_takes_the_key_elsewhere(sim: Simulator, elsewhere: Gateway, call: str, status: int, monkeypatch: Any) -> None:
    """The client follows redirects, and drops only ``Authorization`` on the way to another host: no call of ours follows one."""
    monkeypatch.setattr("airflow_provider_batchkit.kit._STREAM_ATTEMPTS", 1)
    kit = kit_for(sim.base_url)
    (batch_id,) = kit.submit(["hello"], **MODEL)
    kit.wait(batch_id, interval_s=0.01)
    endpoint, make = CALLS[call]
    target = f"{elsewhere.base_url}/v1/messages/batches/{batch_id}?stolen=1"
    sim.faults.add("html", endpoint=endpoint, status=status, headers={"location": target}, times=None)
    try:
        found = make(Ended(kit, sim.base_url, batch_id))
    except (BatchKitError, anthropic.APIError) as e:
        found = e
    assert elsewhere.calls == []
    if not isinstance(found, Look) or endpoint == "retrieve":
        assert elsewhere.base_url.removeprefix("http://") in repr(found) or call in ("cancel all", "a trigger's cancel")
        assert KEY not in repr(found)


@pytest.mark.parametrize(("status", "error"), [(301, SubmitRefusedError), (302, SubmitUncertainError), (303, SubmitUncertainError),
                                               (307, SubmitRefusedError), (308, SubmitRefusedError)])  # fmt: skip
def test_a_redirected_create_is_sent_once(sim: Simulator, elsewhere: Gateway, status: int, error: type[Exception]) -> None:
    """The answer "make the call elsewhere" proves that nothing was accepted; "look elsewhere" may follow a success, so it is settled."""
    sim.faults.add("html", status=status, headers={"location": f"{elsewhere.base_url}/v1/messages/batches"})
    with pytest.raises(error, match="a redirect to http://"):
        kit_for(sim.base_url).submit(["hello"], **MODEL)
    assert (sim.stats()["posts"], elsewhere.calls) == (1, [])


def test_a_gateway_with_a_path_of_its_own_gets_every_call(sim: Simulator) -> None:
    """The API names its own host in ``results_url``; results are read through the gateway all the same."""
    with Gateway(sim.base_url, prefix="/llm/anthropic") as gateway:
        kit = kit_for(gateway.base_url)
        result = kit.run(["Name a river.", "Name a lake."], **MODEL, interval_s=0.01)
        batch_id = sim.stats()["batches"][0]["id"]
        assert [snapshot.batch_id for snapshot in kit.recent(kit.get(batch_id).created_at)] == [batch_id]
        kit.cancel_all(batch_id)
        assert batch_id in async_look(gateway.base_url, batch_id).shown
        assert batch_id in async_look(gateway.base_url, batch_id, "b", "c", "d").shown
        kit.delete(batch_id)
        assert len(result.items) == 2
        assert ("GET", f"/v1/messages/batches/{batch_id}/results") in gateway.calls
        assert len(gateway.calls) == sum(sim.stats()["calls"].values()), "a call went past the gateway"
        # SDK 1.x sends the key as x-api-key, 2.x as a bearer token
        assert all(KEY in headers.get("x-api-key", "") + headers.get("authorization", "") for headers in gateway.headers)


@pytest.mark.parametrize("results_url", [None, "http://127.0.0.1:9/elsewhere", "https://api.anthropic.com/v1/messages/batches/x", 7])
def test_results_url_is_not_read(sim: Simulator, results_url: object) -> None:
    """An ended batch has results, whatever the answer says of their address."""

    def change(method: str, path: str, status: int, body: bytes) -> bytes:
        if not path.startswith("/v1/messages/batches/") or path.endswith("/results"):
            return body
        return json.dumps({**json.loads(body), "results_url": results_url}).encode()

    with Gateway(sim.base_url, change=change) as gateway:
        kit = kit_for(gateway.base_url)
        assert len(kit.run(["hello"], **MODEL, interval_s=0.01).items) == 1


@pytest.mark.parametrize("batch_id", ["", ".", "..", ["msgbatch_1"], None])
def test_an_id_that_would_be_another_path_is_refused(batch_id: Any) -> None:
    """A DELETE of ``..`` would be one of another thing."""
    with pytest.raises(BatchInputError, match="no batch id"):
        batch_path(batch_id)


def test_an_id_stays_one_part_of_the_path() -> None:
    """A slash or a question mark in it asks nothing else of the API."""
    assert batch_path("a/../b?c#d", "results") == "/v1/messages/batches/a%2F..%2Fb%3Fc%23d/results"

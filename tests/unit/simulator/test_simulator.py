"""The simulator's endpoints over real HTTP, through the official SDK with strict validation and without retries."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types.messages import MessageBatch, MessageBatchIndividualResponse

from airflow_provider_batchkit.simulator import Simulator, SimulatorProcess, answer_for
from airflow_provider_batchkit.simulator.settings import SimulatorSettings
from airflow_provider_batchkit.simulator.store import Store

MODEL = "claude-haiku-5-5"
#: One for all clients: making one takes 60 ms.
HTTP = anthropic.DefaultHttpxClient()
HEADERS = {"x-api-key": "k", "anthropic-version": "2023-06-01"}


def client_of(simulator: Simulator | SimulatorProcess, key: str = "k") -> anthropic.Anthropic:
    """The SDK as strict as it gets: every answer is validated, nothing is retried."""
    return anthropic.Anthropic(base_url=simulator.base_url, api_key=key, max_retries=0, http_client=HTTP, _strict_response_validation=True)


def request(custom_id: str, prompt: object = "hello", **params: Any) -> Any:
    """One request; ``params`` add to or replace its parameters, None removes one."""
    body = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": prompt}], **params}
    return {"custom_id": custom_id, "params": {name: value for name, value in body.items() if value is not None}}


def create(client: anthropic.Anthropic, *prompts: str) -> MessageBatch:
    """A batch of one request per prompt, with custom_ids r0, r1 and so on."""
    return client.messages.batches.create(requests=[request(f"r{number}", prompt) for number, prompt in enumerate(prompts)])


def results(client: anthropic.Anthropic, batch_id: str) -> list[MessageBatchIndividualResponse]:
    """The result lines, each checked against the SDK's type, which the SDK itself does not do."""
    answer = client.get(f"/v1/messages/batches/{batch_id}/results", cast_to=httpx2.Response)
    return [MessageBatchIndividualResponse.model_validate_json(line) for line in answer.content.split(b"\n") if line]


def error_of(caught: pytest.ExceptionInfo[anthropic.APIStatusError]) -> tuple[int, str, str]:
    """Status, type and message of a refusal, after a look at the shape that the API gives them."""
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["request_id"] == caught.value.response.headers["request-id"]
    return caught.value.status_code, body["error"]["type"], body["error"]["message"]


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    """A simulator with default settings."""
    with Simulator() as running:
        yield running


@pytest.fixture
def client(simulator: Simulator) -> anthropic.Anthropic:
    """A client of it."""
    return client_of(simulator)


def test_a_new_batch_is_in_progress_with_all_requests_processing(client: anthropic.Anthropic) -> None:
    """Create answers in_progress even when the clock ends batches at once, and counts nothing but processing."""
    batch = create(client, "a", "b", "c")
    assert batch.id.startswith("msgbatch_")
    assert (batch.processing_status, batch.request_counts.processing, batch.request_counts.succeeded) == ("in_progress", 3, 0)
    assert (batch.results_url, batch.ended_at, batch.archived_at, batch.cancel_initiated_at) == (None, None, None, None)
    assert batch.expires_at - batch.created_at == timedelta(hours=24)


def test_an_ended_batch_gives_every_answer_in_another_order(client: anthropic.Anthropic) -> None:
    """Each answer belongs to its row, each row has one, and the order is not the one asked."""
    prompts = [f"row number {number} " + "x" * 80 for number in range(7)]
    batch = client.messages.batches.retrieve(create(client, *prompts).id)
    assert (batch.processing_status, batch.request_counts.processing, batch.request_counts.succeeded) == ("ended", 0, 7)
    lines = results(client, batch.id)
    answers: dict[str, Any] = {line.custom_id: line.result for line in lines}
    assert [line.custom_id for line in lines] != [f"r{number}" for number in range(7)]
    assert {key: result.message.content[0].text for key, result in answers.items()} == {
        f"r{number}": answer_for(prompt) for number, prompt in enumerate(prompts)
    }
    assert {result.message.usage.service_tier for result in answers.values()} == {"batch"}


@pytest.mark.parametrize("size", [2, 3, 4, 10])
def test_the_order_of_results_is_the_same_for_the_same_seed(size: int) -> None:
    """Two simulators of one seed agree, also when the results are read twice; no order is that of the requests."""
    orders = []
    for seed in (0, 0, 1):
        with Simulator(seed=seed) as simulator:
            client = client_of(simulator)
            batch = create(client, *(f"row {number}" for number in range(size)))
            first, second = ([line.custom_id for line in results(client, batch.id)] for _ in range(2))
            assert first == second
            assert sorted(first) != first
            assert sorted(first) == sorted(f"r{number}" for number in range(size))
            orders.append(first)
    assert orders[0] == orders[1]
    steps = {int(after[1:]) - int(before[1:]) for before, after in zip(orders[0], orders[0][1:], strict=False)}
    assert size < 4 or 1 not in steps  # mixed, not only begun elsewhere
    assert size == 2 or orders[0] != orders[2]  # of two requests there is one other order only


def test_separators_of_unicode_stay_inside_their_line(client: anthropic.Anthropic) -> None:
    """U+2028 and U+0085 of a prompt come back inside the answer, not as line ends."""
    batch = create(client, "one\u2028two\u0085three", "other")
    found: dict[str, Any] = {line.custom_id: line.result for line in results(client, batch.id)}
    assert found["r0"].message.content[0].text.endswith("one\u2028two\u0085three")


def test_list_pages_newest_first_in_both_directions(client: anthropic.Anthropic) -> None:
    """limit, after_id and before_id give neighbouring pages; has_more looks in the direction of the cursor."""
    ids = [create(client, "x").id for _ in range(5)][::-1]
    batches = client.messages.batches
    first = batches.list(limit=2)
    assert ([batch.id for batch in first.data], first.has_more, first.first_id, first.last_id) == (ids[:2], True, ids[0], ids[1])
    last = batches.list(limit=3, after_id=ids[1])
    assert ([batch.id for batch in last.data], last.has_more) == (ids[2:], False)
    before = batches.list(limit=2, before_id=ids[3])
    assert ([batch.id for batch in before.data], before.has_more) == (ids[1:3], True)
    newest = batches.list(limit=2, before_id=ids[2])
    assert ([batch.id for batch in newest.data], newest.has_more) == (ids[:2], False)
    assert [batch.id for batch in batches.list(limit=2)] == ids
    batches.delete(ids[2])
    assert [batch.id for batch in batches.list(after_id=ids[2])] == ids[3:]


def test_an_empty_list_is_a_page_without_ids(client: anthropic.Anthropic) -> None:
    """Nothing there is no error."""
    page = client.messages.batches.list()
    assert (page.data, page.has_more, page.first_id, page.last_id) == ([], False, None, None)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"limit": 0}, "limit: Input should be greater than or equal to 1"),
        ({"limit": 1001}, "limit: Input should be less than or equal to 1000"),
        ({"limit": "many"}, "limit: Input should be a valid integer, unable to parse string as an integer"),
        ({"after_id": "msgbatch_none"}, "after_id: msgbatch_none is not a known batch"),
        ({"after_id": "a", "before_id": "b"}, "after_id and before_id cannot be used together"),
    ],
)
def test_list_refuses_bad_pages(client: anthropic.Anthropic, query: Any, message: str) -> None:
    """A page that cannot be is a 400 that says why."""
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.batches.list(**query)
    assert error_of(caught) == (400, "invalid_request_error", message)


def test_only_an_ended_batch_is_deleted_and_then_gone(simulator: Simulator, client: anthropic.Anthropic) -> None:
    """Delete refuses a running batch; a deleted one is unknown to retrieve, results and list."""
    simulator.set(clock="manual")
    batch = create(client, "x")
    with pytest.raises(anthropic.BadRequestError, match=r"In progress batches cannot be deleted\. Consider canceling the batch instead\."):
        client.messages.batches.delete(batch.id)
    simulator.end(batch.id)
    assert client.messages.batches.delete(batch.id).id == batch.id
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.batches.retrieve(batch.id)
    assert error_of(caught) == (404, "not_found_error", f"Message Batch {batch.id} not found.")
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.delete(batch.id)
    assert client.messages.batches.list().data == []


def test_results_need_an_ended_batch_that_is_not_archived(simulator: Simulator, client: anthropic.Anthropic) -> None:
    """Too early and too late are a 404; an archived batch is still shown, without a results_url."""
    simulator.set(clock="manual")
    batch = create(client, "x")
    path = f"{simulator.base_url}/v1/messages/batches/{batch.id}/results"
    early = HTTP.get(path, headers=HEADERS)
    assert (early.status_code, early.json()["error"]["message"]) == (404, f"Message Batch {batch.id} has no available results.")
    simulator.end(batch.id)
    assert HTTP.get(path, headers=HEADERS).text.count("\n") == 1
    simulator.advance(29 * 24 * 3600)
    late = HTTP.get(path, headers=HEADERS)
    assert (late.status_code, "no longer available" in late.text) == (404, True)
    shown = client.messages.batches.retrieve(batch.id)
    assert (shown.processing_status, shown.results_url, shown.request_counts.succeeded) == ("ended", None, 1)
    assert shown.archived_at == shown.created_at + timedelta(days=29)


def test_clock_polls_counts_retrieves_and_lists(simulator: Simulator, client: anthropic.Anthropic) -> None:
    """polls:3 answers in_progress to three looks of either kind and then ended."""
    simulator.set(clock="polls:3")
    batch = create(client, "x")
    seen = [client.messages.batches.retrieve(batch.id).processing_status, client.messages.batches.list().data[0].processing_status]
    seen += [client.messages.batches.retrieve(batch.id).processing_status for _ in range(2)]
    assert seen == ["in_progress", "in_progress", "in_progress", "ended"]


def test_clock_seconds_ends_a_batch_after_its_time(simulator: Simulator, client: anthropic.Anthropic) -> None:
    """seconds:S looks at the clock, which a control call can move, and ended_at is exact."""
    simulator.set(clock="seconds:1000")
    batch = create(client, "x")
    simulator.advance(990)
    assert client.messages.batches.retrieve(batch.id).processing_status == "in_progress"
    simulator.advance(11)
    ended = client.messages.batches.retrieve(batch.id)
    assert ended.processing_status == "ended"
    assert ended.ended_at == batch.created_at + timedelta(seconds=1000)


def test_a_batch_expires_after_24_hours(simulator: Simulator, client: anthropic.Anthropic) -> None:
    """What was not done by then is expired, and not billed."""
    simulator.set(clock="manual")
    batch = create(client, "x", "y")
    simulator.advance(24 * 3600 + 1)
    assert client.messages.batches.retrieve(batch.id).request_counts.expired == 2
    assert {line.result.type for line in results(client, batch.id)} == {"expired"}
    assert simulator.stats()["bill"] == {}


def test_clock_seconds_can_be_a_span() -> None:
    """seconds:S-T ends each batch after a time of its own between the two; the seed decides it."""
    lives = []
    for _ in range(2):
        with Simulator(clock="seconds:100-200", seed=3) as simulator:
            ids = [create(client_of(simulator), "x").id for _ in range(12)]
            simulator.advance(201)
            batches = [client_of(simulator).messages.batches.retrieve(batch_id) for batch_id in ids]
            lives.append([(batch.ended_at - batch.created_at).total_seconds() for batch in batches if batch.ended_at is not None])
    assert [round(s, 3) for s in lives[0]] == [round(s, 3) for s in lives[1]]
    assert len(set(lives[0])) == 12 and all(100 <= life <= 200 for life in lives[0])


def test_the_clock_can_be_skewed() -> None:
    """skew_seconds moves created_at and the date header, as a server whose clock is off would."""
    with Simulator(skew_seconds=-600) as simulator:
        raw = client_of(simulator).messages.batches.with_raw_response.create(requests=[request("a")])
        behind = time.time() - raw.parse().created_at.timestamp()
        assert 599 < behind < 610
        assert "GMT" in raw.headers["date"]


def test_cancel_goes_through_canceling_to_ended(simulator: Simulator, client: anthropic.Anthropic) -> None:
    """A canceled batch is canceling for a look, then ended with its requests canceled; an ended one cannot be canceled."""
    simulator.set(clock="polls:5")
    batch = create(client, "x", "y")
    canceling = client.messages.batches.cancel(batch.id)
    assert (canceling.processing_status, canceling.request_counts.processing) == ("canceling", 2)
    assert canceling.cancel_initiated_at is not None
    assert client.messages.batches.cancel(batch.id).cancel_initiated_at == canceling.cancel_initiated_at
    assert client.messages.batches.retrieve(batch.id).processing_status == "canceling"
    ended = client.messages.batches.retrieve(batch.id)
    assert (ended.processing_status, ended.request_counts.canceled) == ("ended", 2)
    with pytest.raises(anthropic.BadRequestError, match="already ended"):
        client.messages.batches.cancel(batch.id)


def test_a_share_of_a_canceled_batch_was_done_already(simulator: Simulator, client: anthropic.Anthropic) -> None:
    """done_share of the requests keep their answers and are billed; the others are canceled."""
    simulator.set(clock="polls:9", cancel_looks=0, done_share=0.5)
    batch = create(client, *(f"row {number}" for number in range(100)))
    client.messages.batches.cancel(batch.id)
    counts = client.messages.batches.retrieve(batch.id).request_counts
    assert counts.succeeded + counts.canceled == 100
    assert 30 < counts.succeeded < 70
    assert simulator.stats()["bill"][MODEL]["requests"] == counts.succeeded


def test_models_are_listed_and_retrieved(client: anthropic.Anthropic) -> None:
    """Every model has all that the SDK's strict ModelInfo needs; an unknown one is a 404."""
    ids = [model.id for model in client.models.list(limit=5).data]
    assert MODEL in ids
    assert len(ids) == len(set(ids)) == 5
    assert client.models.retrieve(MODEL).line == "haiku"
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.models.retrieve("claude-none")
    assert error_of(caught) == (404, "not_found_error", "model: claude-none")


def test_count_tokens_agrees_with_the_token_model(client: anthropic.Anthropic) -> None:
    """ceil(bytes / 4) + 8, in bytes of UTF-8, over system and messages."""
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "ä" * 5}]}]
    assert client.messages.count_tokens(model=MODEL, system="abc", messages=messages).input_tokens == 4 + 8


def test_batches_of_another_workspace_do_not_exist() -> None:
    """Keys map to workspaces: two keys of one share batches, another's are a 404 and not listed, an unknown key is a 401."""
    with Simulator(keys={"a1": "a", "a2": "a", "b1": "b"}) as simulator:
        batch = create(client_of(simulator, "a1"), "x")
        assert client_of(simulator, "a2").messages.batches.retrieve(batch.id).id == batch.id
        stranger = client_of(simulator, "b1").messages.batches
        for call in (stranger.retrieve, stranger.cancel, stranger.delete):
            with pytest.raises(anthropic.NotFoundError):
                call(batch.id)
        assert stranger.list().data == []
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client_of(simulator, "nobody").messages.batches.list()
        assert error_of(caught) == (401, "authentication_error", "API key is invalid.")
        bearer = anthropic.Anthropic(base_url=simulator.base_url, auth_token="a2", max_retries=0, http_client=HTTP)
        assert [found.id for found in bearer.messages.batches.list()] == [batch.id]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "message"),
    [
        ("GET", "/v1/messages/batches", {"anthropic-version": "2023-06-01"}, 401, "x-api-key header is required"),
        ("GET", "/v1/messages/batches", {**HEADERS, "x-api-key": ""}, 401, "x-api-key header is required"),
        ("GET", "/v1/messages/batches", {"x-api-key": "k"}, 400, "anthropic-version: header is required"),
        ("GET", "/v1/messages/batches", {**HEADERS, "anthropic-version": "new"}, 400, "anthropic-version: 'new' is not a valid version"),
        ("GET", "/v1/nothing", HEADERS, 404, "Not found: /v1/nothing"),
        ("PUT", "/v1/messages/batches", HEADERS, 405, "Method Not Allowed"),
        ("POST", "/v1/messages/batches", HEADERS, 400, "The request body is not valid JSON: Input data was truncated"),
        ("GET", "/_sim/nothing", {}, 404, "no control GET /_sim/nothing"),
    ],
)
def test_calls_that_are_no_calls_are_refused(
    simulator: Simulator, method: str, path: str, headers: dict[str, str], status: int, message: str
) -> None:
    """Credentials, version, path, method and JSON are checked, and every refusal says what it is about."""
    answer = HTTP.request(method, simulator.base_url + path, headers=headers)
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, message)


def test_a_body_may_come_chunked_and_a_connection_serves_many_calls(simulator: Simulator) -> None:
    """An iterable body without a length is taken, and the same connection goes on to serve, also after a refusal."""
    connection = http.client.HTTPConnection("127.0.0.1", simulator.port)
    body = json.dumps({"requests": [request("a")]}).encode()
    for sent, expected in ((body, 200), (b"{}", 400), (body, 200)):
        parts = iter([sent[:1], sent[1:]])
        connection.request("POST", "/v1/messages/batches", parts, HEADERS, encode_chunked=True)
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.will_close) == (expected, False)
    assert simulator.stats()["calls"] == {"create": 3}
    connection.close()


def test_an_answer_shows_one_moment_of_a_batch_whatever_happens_to_it_while_it_is_written() -> None:
    """A batch that ends between a call and its answer: the answer is wholly of before, in counts, status and results_url."""
    body = json.dumps({"requests": [request(f"row-{number}") for number in range(3)]}).encode()
    store = Store(SimulatorSettings(clock="manual"))
    created = store.create(bytearray(body), "default", beta=False)
    seen = [created, store.look(created.id, "default"), store.page("default", 20, None, None)[0][0], store.cancel(created.id, "default")]
    store.finish(created.id, "end")
    answers = [batch.as_json("http://127.0.0.1") for batch in seen]
    assert [answer["processing_status"] for answer in answers] == ["in_progress"] * 3 + ["canceling"]
    for answer in answers:
        assert answer["results_url"] is None
        assert answer["request_counts"] == {"processing": 3, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    ended = store.look(created.id, "default").as_json("http://127.0.0.1")
    assert ended["request_counts"] == {"processing": 0, "succeeded": 0, "errored": 0, "canceled": 3, "expired": 0}

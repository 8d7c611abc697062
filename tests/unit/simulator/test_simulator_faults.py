"""What goes wrong on purpose, the simulator as a process, and how much it can take."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import anthropic
import httpx2
import pytest

from airflow_provider_batchkit.simulator import Simulator, SimulatorProcess
from tests.unit.simulator.test_simulator import HEADERS, HTTP, MODEL, client_of, create, error_of, request

COMMAND = [sys.executable, "-m", "airflow_provider_batchkit.simulator"]
CREATING_CUTS = [("cut_before_accept", 0), ("cut_after_accept", 1)]


def lines_of(simulator: Simulator, batch_id: str) -> list[Any]:
    """The raw result lines of a batch, decoded; a line that is no JSON is ``None``."""
    text = HTTP.get(f"{simulator.base_url}/v1/messages/batches/{batch_id}/results", headers=HEADERS).text
    assert text.endswith("\n")
    decoded: list[Any] = []
    for line in text.splitlines():
        try:
            decoded.append(json.loads(line)["custom_id"])
        except json.JSONDecodeError:
            decoded.append(None)
    return decoded


def ask_until_refused(url: str) -> None:
    """Asks ten times a second for ten seconds, and passes on the error that a call fails with."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        HTTP.get(url)
        time.sleep(0.1)


@pytest.mark.parametrize(("kind", "accepted"), CREATING_CUTS)
@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_create_leaves_the_client_without_an_answer(kind: str, accepted: int, reset: bool) -> None:
    """Cut before acceptance nothing was taken, cut after it one batch was; to the client both look the same. The next call works."""
    with Simulator() as simulator:
        client = client_of(simulator)
        simulator.faults.add(kind, reset=reset)
        with pytest.raises(anthropic.APIConnectionError):
            create(client, "x")
        stats = simulator.stats()
        assert (stats["posts"], stats["batches_accepted"], stats["statuses"]) == (1, accepted, {"cut": 1})
        create(client, "x")
        assert simulator.stats()["batches_accepted"] == accepted + 1


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_closes_or_resets_the_connection(reset: bool) -> None:
    """On the wire a close is the end of the stream, and a reset is an error of its own."""
    with Simulator() as simulator, socket.create_connection(("127.0.0.1", simulator.port), timeout=10) as connection:
        simulator.faults.add("cut_before_accept", reset=reset)
        connection.sendall(b"POST /v1/messages/batches HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        try:
            seen: object = connection.recv(1)
        except ConnectionResetError:
            seen = "reset"
        assert seen == ("reset" if reset else b"")


def test_the_sdk_with_its_retries_buys_three_batches() -> None:
    """The reason for all of this: every attempt of the SDK is cut after acceptance, and each one bought a batch."""
    with Simulator() as simulator:
        simulator.faults.add("cut_after_accept", times=3)
        with pytest.raises(anthropic.APIConnectionError):
            create(anthropic.Anthropic(base_url=simulator.base_url, api_key="k"), "x")
        assert simulator.stats()["batches_accepted"] == 3


@pytest.mark.parametrize(("kind", "accepted"), [("status", 0), ("status_after_accept", 1)])
def test_a_status_fault_answers_with_an_error_of_the_api(kind: str, accepted: int) -> None:
    """Status, type of the status, message, and retry-after; after acceptance the batch exists all the same."""
    with Simulator() as simulator:
        simulator.faults.add(kind, status=429, retry_after=7, message="slow down", headers={"x-should-retry": "true"})
        with pytest.raises(anthropic.RateLimitError) as caught:
            create(client_of(simulator), "x")
        assert error_of(caught) == (429, "rate_limit_error", "slow down")
        assert caught.value.response.headers["retry-after"] == "7"
        assert caught.value.response.headers["x-should-retry"] == "true"
        assert simulator.stats()["batches_accepted"] == accepted


@pytest.mark.parametrize("endpoint", ["retrieve", "list", "results", "cancel", "delete"])
def test_a_status_fault_strikes_its_endpoint_only(endpoint: str) -> None:
    """Each endpoint fails by itself, once, and the others go on."""
    with Simulator(clock="polls:50") as simulator:
        client = client_of(simulator)
        batch = create(client, "x")
        simulator.faults.add("status", endpoint=endpoint, status=529)
        path = f"{simulator.base_url}/v1/messages/batches"
        calls = {
            "list": ("GET", path), "retrieve": ("GET", f"{path}/{batch.id}"), "results": ("GET", f"{path}/{batch.id}/results"),
            "cancel": ("POST", f"{path}/{batch.id}/cancel"), "delete": ("DELETE", f"{path}/{batch.id}"),
        }  # fmt: skip
        answers = {name: HTTP.request(method, url, headers=HEADERS) for name, (method, url) in calls.items()}
        assert {name for name, answer in answers.items() if answer.status_code == 529} == {endpoint}
        assert answers[endpoint].json()["error"]["type"] == "overloaded_error"
        assert HTTP.request(*calls[endpoint], headers=HEADERS).status_code != 529


def test_a_fault_waits_for_its_call_and_strikes_as_often_as_told() -> None:
    """Fields: after lets calls pass, times counts strikes, faults queue up in order, and a batch can be singled out."""
    with Simulator(clock="manual") as simulator:
        client = client_of(simulator)
        simulator.faults.add("status", after=1, times=2, status=500)
        simulator.faults.add("status", status=429)
        seen = []
        for _ in range(5):
            try:
                create(client, "x")
                seen.append(200)
            except anthropic.APIStatusError as error:
                seen.append(error.status_code)
        assert seen == [429, 500, 500, 200, 200]
        assert [fault["struck"] for fault in simulator.stats()["faults"]] == [2, 1]
        first, second = client.messages.batches.list()
        simulator.faults.add("status", endpoint="retrieve", batch=second.id, times=None)
        assert client.messages.batches.retrieve(first.id).id == first.id
        for _ in range(3):
            with pytest.raises(anthropic.InternalServerError):
                client.messages.batches.retrieve(second.id)
        simulator.faults.clear()
        assert client.messages.batches.retrieve(second.id).id == second.id


def test_a_late_answer_outlasts_the_client_but_the_batch_is_there() -> None:
    """The batch is created at once, the answer comes after the client has given up."""
    with Simulator() as simulator:
        simulator.faults.add("late", seconds=1.5)
        started = time.monotonic()
        with pytest.raises(anthropic.APITimeoutError):
            client_of(simulator).with_options(timeout=0.3).messages.batches.create(requests=[request("a")])
        assert simulator.stats()["batches_accepted"] == 1
        assert time.monotonic() - started < 1.4


def test_a_late_list_shows_what_was_there_when_the_call_began() -> None:
    """A batch that is created while the answer is under way is not in it, and one that ends meanwhile is still running in it."""
    with Simulator(clock="manual") as simulator:
        client = client_of(simulator)
        early = create(client, "x")
        simulator.faults.add("late", endpoint="list", seconds=0.6)
        answers: list[Any] = []
        looker = threading.Thread(target=lambda: answers.append(client_of(simulator).messages.batches.list().data))
        looker.start()
        time.sleep(0.2)
        late = create(client, "y")
        simulator.end(early.id)
        assert answers == []
        looker.join(10)
        assert [(batch.id, batch.processing_status) for batch in answers[0]] == [(early.id, "in_progress")]
        assert {batch.id for batch in client.messages.batches.list()} == {early.id, late.id}


def test_a_late_acceptance_outlives_a_client_that_has_gone_away() -> None:
    """There is no batch when the client gives up, and a moment later there is one."""
    with Simulator() as simulator:
        simulator.faults.add("late_accept", seconds=0.8)
        with pytest.raises(anthropic.APITimeoutError):
            client_of(simulator).with_options(timeout=0.2).messages.batches.create(requests=[request("a")])
        assert simulator.stats()["batches_accepted"] == 0
        deadline = time.monotonic() + 10
        while not simulator.stats()["batches_accepted"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert simulator.stats()["batches_accepted"] == 1


def seen(simulator: Simulator | SimulatorProcess, batch_id: str) -> tuple[bool, int, int]:
    """Whether the list has a batch, and the statuses of its retrieve and of its results."""
    path = f"{simulator.base_url}/v1/messages/batches"
    listed = batch_id in {batch["id"] for batch in HTTP.get(path, headers=HEADERS).json()["data"]}
    retrieved = HTTP.get(f"{path}/{batch_id}", headers=HEADERS)
    if retrieved.status_code == 404:
        assert retrieved.json()["error"]["message"] == f"Message Batch {batch_id} not found."
    return listed, retrieved.status_code, HTTP.get(f"{path}/{batch_id}/results", headers=HEADERS).status_code


def test_a_hidden_batch_is_accepted_and_not_found_for_a_while() -> None:
    """From its creation on it is missing from the list and answers 404; the answer of its create call has its id, and it ends in time."""
    with Simulator() as simulator:
        client = client_of(simulator)
        visible = create(client, "x").id
        simulator.faults.add("hide", seconds=30)
        hidden = create(client, "y").id
        assert (seen(simulator, hidden), seen(simulator, visible)) == ((False, 404, 404), (True, 200, 200))
        assert simulator.stats()["batches_accepted"] == 2
        simulator.advance(31)
        assert seen(simulator, hidden) == (True, 200, 200)
        assert seen(simulator, create(client, "z").id) == (True, 200, 200)


def test_a_batch_can_be_hidden_for_a_number_of_calls() -> None:
    """List, retrieve and results each count once; the fourth call finds it."""
    with Simulator() as simulator:
        simulator.faults.add("hide", calls=4)
        batch = create(client_of(simulator), "x").id
        assert seen(simulator, batch) == (False, 404, 404)
        assert seen(simulator, batch) == (False, 200, 200)


def test_a_batch_can_be_hidden_at_any_later_moment() -> None:
    """By the object and by the control endpoint of a process; an unknown id and an unknown field are refused."""
    with Simulator() as simulator, SimulatorProcess() as process:
        for target in (simulator, process):
            batch = create(client_of(target), "x").id
            assert seen(target, batch) == (True, 200, 200)
            target.hide(batch, seconds=30)
            assert seen(target, batch) == (False, 404, 404)
            target.advance(31)
            assert seen(target, batch) == (True, 200, 200)
            target.hide(batch, calls=1)
            assert seen(target, batch) == (False, 200, 200)
        assert HTTP.post(f"{simulator.base_url}/_sim/batches/none/hide", json={"seconds": 1}).status_code == 404
        assert HTTP.post(f"{simulator.base_url}/_sim/batches/{batch}/hide", json={"days": 1}).status_code == 400


@pytest.mark.parametrize("endpoint", ["retrieve", "list", "results", "cancel", "delete"])
def test_a_live_batch_vanishes_from_one_kind_of_call(endpoint: str) -> None:
    """As often as told it is not found there, and everywhere else it is; the other batch stays, and a look at nothing is no look."""
    with Simulator(clock="polls:1") as simulator:
        client = client_of(simulator)
        gone, there = create(client, "x").id, create(client, "y").id
        simulator.faults.add("vanish", endpoint=endpoint, batch=gone, times=2)
        path = f"{simulator.base_url}/v1/messages/batches"

        def found(batch_id: str) -> bool:
            match endpoint:
                case "list":
                    return batch_id in {batch["id"] for batch in HTTP.get(path, headers=HEADERS).json()["data"]}
                case "retrieve":
                    answer = HTTP.get(f"{path}/{batch_id}", headers=HEADERS)
                case "delete":
                    answer = HTTP.delete(f"{path}/{batch_id}", headers=HEADERS)
                case _:
                    answer = HTTP.request("POST" if endpoint == "cancel" else "GET", f"{path}/{batch_id}/{endpoint}", headers=HEADERS)
            missing: bool = f"Message Batch {batch_id} not found." in answer.text
            assert missing == (answer.status_code == 404 and "no available" not in answer.text)
            return not missing

        assert [found(gone) for _ in range(2)] == [False, False]
        assert found(gone)
        assert found(there)
        assert simulator.stats()["batches_accepted"] == 2


def test_every_batch_can_vanish_from_every_call_that_asks_for_one() -> None:
    """Without a batch and with every endpoint nothing is found, and create still works."""
    with Simulator() as simulator:
        simulator.faults.add("vanish", endpoint="*", times=None)
        batch = create(client_of(simulator), "x").id
        assert seen(simulator, batch) == (False, 404, 404)
        simulator.faults.clear()
        assert seen(simulator, batch) == (True, 200, 200)


@pytest.mark.parametrize("endpoint", ["create", "retrieve", "list", "results"])
def test_a_gateway_answers_with_its_own_page(endpoint: str) -> None:
    """Status 200, HTML, no request id; for create before or after the batch was accepted, and the next call is answered."""
    with Simulator() as simulator:
        batch = create(client_of(simulator), "x")
        path = f"{simulator.base_url}/v1/messages/batches"
        body = json.dumps({"requests": [request("a")]})
        calls = {
            "create": ("POST", path), "list": ("GET", path), "retrieve": ("GET", f"{path}/{batch.id}"),
            "results": ("GET", f"{path}/{batch.id}/results"),
        }  # fmt: skip
        for kind, accepted in (("html", 1), ("html_after_accept", 2 if endpoint == "create" else 1)):
            simulator.faults.add(kind, endpoint=endpoint)
            answer = HTTP.request(*calls[endpoint], headers=HEADERS, content=body)
            assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
            assert answer.text.startswith("<!DOCTYPE html>") and "request-id" not in answer.headers
            assert simulator.stats()["batches_accepted"] == accepted
        assert HTTP.request(*calls[endpoint], headers=HEADERS, content=body).headers["content-type"].startswith("application/")
        simulator.faults.add("html", endpoint=endpoint, status=502, body='{"ok": true}', content_type="application/json")
        answer = HTTP.request(*calls[endpoint], headers=HEADERS, content=body)
        assert (answer.status_code, answer.json()) == (502, {"ok": True})


def test_a_line_can_differ_from_the_documented_shape() -> None:
    """Each change strikes the line of its request, on one reading, and leaves the others and the order alone."""
    with Simulator() as simulator:
        batch = create(client_of(simulator), "first", "second", "third")
        url = f"{simulator.base_url}/v1/messages/batches/{batch.id}/results"
        plain = HTTP.get(url, headers=HEADERS).content.splitlines()

        def change(kind: str, **fields: Any) -> tuple[bytes, Any]:
            """The line of r1, raw and decoded."""
            simulator.faults.add(kind, custom_id="r1", **fields)
            lines = HTTP.get(url, headers=HEADERS).content.splitlines()
            (position,) = [number for number, line in enumerate(plain) if line != lines[number]]
            assert (len(lines), json.loads(lines[position])["custom_id"]) == (3, "r1")
            return lines[position], json.loads(lines[position])["result"]

        usage = change("null_counters")[1]["message"]["usage"]
        assert (usage["cache_read_input_tokens"], usage["cache_creation"], usage["output_tokens"] > 0) == (None, None, True)
        message = change("unknown_members")[1]["message"]
        assert {"novelty", "usage"} < set(message) and "novelty" in message["content"][0] and message["usage"]["novel_tokens"] == 7
        assert rb'second\ud800"' in change("lone_surrogate")[0]
        assert change("new_type")[1]["type"] == "postponed"
        assert change("flat_error")[1] == {"type": "errored", "error": {"type": "api_error", "message": "Internal server error"}}
        assert "usage" not in change("no_usage")[1]["message"]
        block, text = change("odd_block")[1]["message"]["content"]
        assert (isinstance(block["text"], dict), text["type"]) == (True, "text")
        assert change("set_member", member="result.message.usage.output_tokens", value=None)[1]["message"]["usage"]["output_tokens"] is None
        assert "id" not in change("set_member", member="result.message.id")[1]["message"]
        assert change("set_member", member="result.message.content.0.text", value=["x"])[1]["message"]["content"][0]["text"] == ["x"]
        assert HTTP.get(url, headers=HEADERS).content.splitlines() == plain
        for kind in ("lone_surrogate", "unknown_members", "no_usage"):
            simulator.faults.add(kind, line=0)
        for line in HTTP.get(url, headers=HEADERS).content.splitlines():
            message = json.loads(line)["result"]["message"]
            assert rb"\ud800" in line and "usage" not in message and "novelty" in message


def test_a_fault_with_a_chance_strikes_that_share_of_its_calls() -> None:
    """The seed decides which; calls that it lets through do not use up its times."""
    struck = []
    for seed in (1, 1, 2):
        with Simulator(seed=seed, clock="manual") as simulator:
            simulator.faults.add("hide", chance=0.5, times=None, seconds=30)
            ids = [create(client_of(simulator), "x").id for _ in range(40)]
            listed = {
                batch["id"] for batch in HTTP.get(f"{simulator.base_url}/v1/messages/batches?limit=40", headers=HEADERS).json()["data"]
            }
            struck.append([batch not in listed for batch in ids])
            assert simulator.stats()["faults"][0]["struck"] == sum(struck[-1])
    assert struck[0] == struck[1] != struck[2]
    assert 8 <= sum(struck[0]) <= 32


def test_faults_in_a_results_stream_change_the_lines_that_they_name() -> None:
    """Garbage and a stranger come before their line, a duplicate is sent twice, a missing line is not sent; the rest is as it was."""
    with Simulator() as simulator:
        batch = create(client_of(simulator), *(f"row {number}" for number in range(6)))
        plain = lines_of(simulator, batch.id)
        assert sorted(plain) == [f"r{number}" for number in range(6)]
        simulator.faults.add("broken_line", line=2)
        simulator.faults.add("duplicate_line", line=3)
        simulator.faults.add("missing_line", line=4)
        simulator.faults.add("foreign_line", line=99)
        assert lines_of(simulator, batch.id) == [plain[0], None, plain[1], plain[2], plain[2], plain[4], plain[5], "never-asked"]
        assert lines_of(simulator, batch.id) == plain


@pytest.mark.parametrize(("line", "whole"), [(1, 0), (3, 2), (700, 699), (9999, 1000)])
def test_a_cut_results_stream_breaks_inside_its_line(line: int, whole: int) -> None:
    """All lines before it arrive whole, half of it arrives, and the client is told that the stream is incomplete. A second read works."""
    with Simulator() as simulator:
        batch = create(client_of(simulator), *("x" * 60 for _ in range(1000)))
        simulator.faults.add("cut_results", line=line)
        path = f"{simulator.base_url}/v1/messages/batches/{batch.id}/results"
        got: list[bytes] = []
        with HTTP.stream("GET", path, headers=HEADERS) as answer, pytest.raises(httpx2.RemoteProtocolError):
            got.extend(answer.iter_raw())
        received = b"".join(got)
        assert received.count(b"\n") == whole
        assert received.endswith(b"\n") == (line == 9999)
        assert len(lines_of(simulator, batch.id)) == 1000


def test_a_clean_cut_looks_like_the_end() -> None:
    """A stream that ends early without a protocol error: only counting shows that answers are missing."""
    with Simulator() as simulator:
        batch = create(client_of(simulator), *("x" for _ in range(10)))
        simulator.faults.add("cut_results", line=4, clean=True)
        assert len(lines_of(simulator, batch.id)) == 3


def test_a_trickle_takes_its_time_per_line_and_ends_with_the_simulator() -> None:
    """Ten lines with 30 ms between them take 0.3 s; one with an hour does not hold the simulator's stop."""
    with Simulator() as simulator:
        batch = create(client_of(simulator), *("x" for _ in range(10)))
        simulator.faults.add("trickle", seconds=0.03)
        started = time.monotonic()
        assert len(lines_of(simulator, batch.id)) == 10
        assert time.monotonic() - started >= 0.27
        simulator.faults.add("trickle", seconds=3600)
        path = f"{simulator.base_url}/v1/messages/batches/{batch.id}/results"
        failed: list[bool] = []

        def read() -> None:
            with pytest.raises(httpx2.HTTPError):
                HTTP.get(path, headers=HEADERS, timeout=60)
            failed.append(True)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.2)
    reader.join(10)
    assert failed == [True]


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "boom"},
        {"kind": "late", "second": 1},
        {"kind": "status", "status": 200},
        {"kind": "late", "times": 0},
        {"kind": "hide", "calls": 0},
        {"kind": "set_member"},
        {"kind": "no_usage", "member": "result"},
        {"kind": "cut_results", "line": 0},
        {"kind": "missing_line", "custom_id": "a"},
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    """By the object and by the control endpoint."""
    with Simulator() as simulator:
        with pytest.raises(ValueError, match=r".+"):
            simulator.faults.add(**fields)
        answer = HTTP.post(f"{simulator.base_url}/_sim/faults", json=fields)
        assert (answer.status_code, simulator.stats()["faults"]) == (400, [])


def test_the_process_has_the_same_controls() -> None:
    """Settings and faults go in at the start or later; batches end, expire and are archived; stats and custom_ids come back."""
    with SimulatorProcess(clock="manual", output_tokens=50) as process:
        process.faults.add("status", status=503)
        client = anthropic.Anthropic(base_url=process.base_url, api_key="k", max_retries=0, _strict_response_validation=True)
        with pytest.raises(anthropic.InternalServerError):
            create(client, "x")
        process.faults.add("cut_after_accept")
        with pytest.raises(anthropic.APIConnectionError):
            create(client, "x", "y")
        process.faults.add("status", times=None)
        process.faults.clear()
        third, second, first = create(client, "z").id, create(client, "y").id, process.stats()["batches"][0]["id"]
        assert process.custom_ids(first) == ["r0", "r1"]
        process.end(first)
        process.expire(second)
        process.archive(third)
        found = {batch.id: batch for batch in client.messages.batches.list()}
        assert (found[first].request_counts.succeeded, found[second].request_counts.expired) == (2, 1)
        assert (found[third].processing_status, found[third].results_url) == ("ended", None)
        assert process.stats()["bill"][MODEL]["output_tokens"] == 3 * 50
        process.set(clock="seconds:60")
        late = create(client, "x")
        process.advance(61)
        assert client.messages.batches.retrieve(late.id).processing_status == "ended"
        with pytest.raises(ValueError, match="clock 'never'"):
            process.set(clock="never")
        pid = process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_prints_its_url_and_ends_with_zero(number: signal.Signals) -> None:
    """One line on stdout, all flags understood, exit code 0 after SIGTERM or SIGINT."""
    flags = ["--settings", '{"clock": "polls:1", "keys": {"secret": "ws"}, "input_tokens": 7}']
    with subprocess.Popen([*COMMAND, *flags], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        path = f"{url}/v1/messages/batches"
        assert HTTP.get(path, headers=HEADERS).status_code == 401
        assert HTTP.get(path, headers={**HEADERS, "x-api-key": "secret"}).status_code == 200
        settings = HTTP.get(f"{url}/_sim/settings").json()
        assert (settings["clock"], settings["input_tokens"], settings["keys"]) == ("polls:1", 7, {"secret": "ws"})
        process.send_signal(number)
        assert (process.wait(10), process.stdout.read()) == (0, "")


def test_bad_flags_end_with_two_and_a_reason() -> None:
    """A setting out of range is named on stderr before anything listens."""
    ended = subprocess.run([*COMMAND, "--settings", '{"errored": 2}'], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "errored" in ended.stderr


def test_a_simulator_does_not_outlive_a_killed_parent() -> None:
    """With --exit-with-parent it ends itself after its parent was killed with SIGKILL."""
    code = (
        "import sys, time\nfrom airflow_provider_batchkit.simulator import SimulatorProcess\n"
        "with SimulatorProcess() as p:\n    print(p.base_url, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        assert HTTP.get(f"{url}/_sim/stats").status_code == 200
        parent.kill()
        parent.wait()
        with pytest.raises(httpx2.TransportError):
            ask_until_refused(f"{url}/_sim/stats")


def test_100_000_requests_are_taken_and_answered_while_others_are_served() -> None:
    """A batch of 100,000 requests of 1 KB is accepted and read back whole; calls made meanwhile are not held up for long."""
    count = 100_000
    params = b'{"model":"claude-haiku-5-5","max_tokens":200,"messages":[{"role":"user","content":"row %06d %b"}]}'
    row = b'{"custom_id":"job-%06d","params":' + params + b"}"
    with SimulatorProcess() as process:
        body = b'{"requests":[' + b",".join(row % (number, number, b"x" * 870) for number in range(count)) + b"]}"
        waits: list[float] = []
        done = threading.Event()

        def look() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", process.port)
            while not done.wait(0.02):
                started = time.monotonic()
                connection.request("GET", "/v1/messages/batches", headers=HEADERS)
                connection.getresponse().read()
                waits.append(time.monotonic() - started)

        looker = threading.Thread(target=look)
        looker.start()
        connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=60)
        sent = time.monotonic()
        connection.request("POST", "/v1/messages/batches", body, HEADERS)
        batch = json.loads(connection.getresponse().read())
        taken = time.monotonic() - sent
        done.set()
        looker.join()
        assert batch["request_counts"]["processing"] == count
        assert max(waits) < taken / 2, f"{max(waits):.2f} s of {taken:.2f} s"  # alone on the machine it is a twentieth
        connection.request("GET", f"/v1/messages/batches/{batch['id']}/results", headers=HEADERS)
        ids = {line[14:24] for line in connection.getresponse().read().splitlines()}
        assert len(ids) == count
        assert process.stats()["bill"][MODEL]["requests"] == count

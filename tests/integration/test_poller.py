"""The shared poller against the simulator over HTTP: who asks how often, and who hears of what."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import anthropic
import pytest
from airflow.triggers.base import TriggerEvent

from airflow_provider_batchkit.api.polling import PollState
from airflow_provider_batchkit.exceptions import PollError
from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
from airflow_provider_batchkit.simulator import Simulator
from airflow_provider_batchkit.triggers import looking, poller
from airflow_provider_batchkit.triggers.batch import BatchTrigger
from tests.connections import anthropic_connection

T = TypeVar("T")
#: One for all clients: making one takes 30 ms.
HTTP = anthropic.DefaultHttpxClient()
POKE_S = 0.3


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    with Simulator(clock="manual") as simulator:
        connect(monkeypatch, "ANTHROPIC_DEFAULT", simulator)
        yield simulator
    assert poller._pollers == {}, "a poller is left behind"


def connect(monkeypatch: pytest.MonkeyPatch, name: str, simulator: Simulator, key: str = "k") -> None:
    monkeypatch.setenv(f"AIRFLOW_CONN_{name}", anthropic_connection(simulator.base_url, key=key))


def create(sim: Simulator, count: int, key: str = "k") -> list[str]:
    """So many batches of one request each."""
    client = anthropic.Anthropic(api_key=key, base_url=sim.base_url, http_client=HTTP)
    params: Any = {"model": "claude-haiku-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
    return [client.messages.batches.create(requests=[{"custom_id": "r", "params": params}]).id for _ in range(count)]


async def wait_for(
    *batch_ids: str,
    conn_id: str = "anthropic_default",
    poke_s: float = POKE_S,
    deadline_s: float | None = None,
    first: bool = False,
) -> dict[str, Any]:
    """The event of a trigger, as Airflow gets it."""
    trigger = BatchTrigger(
        batch_ids=list(batch_ids),
        anthropic_conn_id=conn_id,
        poke_interval=poke_s,
        deadline=None if deadline_s is None else time.time() + deadline_s,
        first=first,
    )
    async with contextlib.aclosing(cast("AsyncGenerator[TriggerEvent, None]", trigger.run())) as events:
        payload: dict[str, Any] = (await anext(events)).payload
    return payload


def start(ids: Sequence[str], **how: Any) -> dict[str, asyncio.Task[dict[str, Any]]]:
    return {batch_id: asyncio.create_task(wait_for(batch_id, **how)) for batch_id in ids}


async def until(condition: Callable[[], object], seconds: float = 15) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the simulator, on its thread, sets no asyncio.Event
            await asyncio.sleep(0.01)


async def stop(tasks: dict[str, asyncio.Task[Any]]) -> None:
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)


def run(work: Callable[[], Awaitable[T]]) -> T:
    async def all_of_it() -> T:
        result = await work()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, f"left running: {others}"
        return result

    return asyncio.run(all_of_it())


def calls(sim: Simulator, what: str) -> int:
    return int(sim.stats()["calls"].get(what, 0))


def resting() -> bool:
    """Whether the pollers have told what they saw, and wait for their next look."""
    return all(shared._resting_until > 0 for shared in poller._pollers.values())


def all_rest(ids: Sequence[str]) -> bool:
    """Whether all triggers have joined and heard of the look before their next; the first looks may be for some of them alone."""
    return resting() and sum(len(shared._waiting) for shared in poller._pollers.values()) == len(ids)


def test_one_list_call_an_interval_answers_for_all(sim: Simulator) -> None:
    """1,050 triggers, two pages a look, no retrieve; each hears of its own batch, and nothing is left behind."""
    ids = create(sim, 1050)

    async def work() -> None:
        tasks = start(ids, poke_s=2.0)
        await until(lambda: all_rest(ids))
        lists, retrieves = calls(sim, "list"), calls(sim, "retrieve")
        for batch_id in ids[::3]:
            sim.end(batch_id)
        ended = await asyncio.gather(*(tasks.pop(batch_id) for batch_id in ids[::3]))
        assert {event["batch_ids"][0] for event in ended} == set(ids[::3])
        assert all(event["counts"]["succeeded"] == 1 for event in ended)
        assert not any(task.done() for task in tasks.values())
        assert (calls(sim, "list"), calls(sim, "retrieve")) == (lists + 2, retrieves)
        await stop(tasks)

    run(work)


def test_how_far_its_batches_are_is_told_to_whoever_waits_for_them(sim: Simulator) -> None:
    """At the first look, and when a batch ends; nobody hears of others' batches."""
    first, second = create(sim, 2)
    lines: dict[str, list[str]] = {first: [], second: []}

    async def work() -> None:
        waits = [
            asyncio.create_task(poller.ended("anthropic_default", PollState([one], interval=POKE_S), inform=lines[one].append))
            for one in (first, second)
        ]
        await until(lambda: all(lines.values()))
        sim.end(first)
        await waits[0]
        waits[1].cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    run(work)
    assert lines[first][0].startswith("0 of 1 batches ended, 0 of 1 requests done, oldest ")
    assert lines[first][1:] == ["1 of 1 batches ended, 1 of 1 requests done"]
    assert len(lines[second]) == 1


def test_a_few_are_simply_retrieved(sim: Simulator) -> None:
    """Three batches are no reason to list a workspace of thousands."""
    ids = create(sim, 3)

    async def work() -> None:
        tasks = start(ids)
        await until(lambda: calls(sim, "retrieve") >= 6)
        for batch_id in ids:
            sim.end(batch_id)
        assert {(await task)["status"] for task in tasks.values()} == {"ended"}

    run(work)
    assert calls(sim, "list") == 0


def test_what_the_list_does_not_show_is_retrieved(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old batches beyond the pages that are worth reading are looked at one by one."""
    old = create(sim, 5)
    create(sim, 40)
    monkeypatch.setattr(looking, "_PAGE", 20)  # a workspace of a thousand batches in small

    async def work() -> None:
        tasks = start(old)
        await until(lambda: calls(sim, "retrieve") >= 5)
        for batch_id in old:
            sim.end(batch_id)
        assert {(await task)["status"] for task in tasks.values()} == {"ended"}

    run(work)
    assert calls(sim, "list") > 0


def test_pages_are_read_as_far_as_the_oldest_watched_batch(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older pages are other people's."""
    create(sim, 100)
    ids = create(sim, 30)
    monkeypatch.setattr(looking, "_PAGE", 20)

    async def work() -> None:
        tasks = start(ids, poke_s=2.0)
        await until(lambda: all_rest(ids))
        lists, retrieves = calls(sim, "list"), calls(sim, "retrieve")
        await until(lambda: calls(sim, "list") >= lists + 2)
        await asyncio.sleep(0.3)
        assert (calls(sim, "list"), calls(sim, "retrieve")) == (lists + 2, retrieves)
        await stop(tasks)

    run(work)


def test_a_newcomer_does_not_wait_for_the_others_interval(sim: Simulator) -> None:
    """Its first look is its own, and it does not make the others be looked at sooner."""
    ids = create(sim, 8)

    async def work() -> None:
        tasks = start(ids[:7], poke_s=60.0)
        await until(lambda: calls(sim, "list") == 1 and resting())  # a look that is under way would speak for the newcomer, too
        sim.end(ids[7])
        began = time.monotonic()
        assert (await wait_for(ids[7], poke_s=60.0))["status"] == "ended"
        assert time.monotonic() - began < 5
        assert (calls(sim, "list"), calls(sim, "retrieve")) == (1, 1)
        await stop(tasks)

    run(work)


def test_no_batch_is_asked_for_more_often_than_its_poke_interval(sim: Simulator) -> None:
    """Ten triggers that came at ten moments share one beat after the first look of each."""
    ids = create(sim, 10)

    async def work() -> None:
        tasks: dict[str, asyncio.Task[dict[str, Any]]] = {}
        for batch_id in ids:
            tasks |= start([batch_id], poke_s=1.5)
            await asyncio.sleep(0.12)
        await asyncio.sleep(0.3)
        first = calls(sim, "list") + calls(sim, "retrieve")
        began = time.monotonic()
        await asyncio.sleep(3.5)
        looks = calls(sim, "list") + calls(sim, "retrieve") - first
        assert looks <= (time.monotonic() - began) / 1.5 + 1
        await stop(tasks)

    run(work)


def test_the_poller_ends_with_its_last_trigger_and_the_next_starts_another(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Canceled triggers leave; the client is closed with the last; whoever comes in that moment gets a new one at once."""
    ids, clients = create(sim, 6), []
    real = BatchKitHook.get_async_conn

    async def kept(hook: BatchKitHook) -> Any:
        clients.append(await real(hook))
        return clients[-1]

    monkeypatch.setattr(BatchKitHook, "get_async_conn", kept)

    async def work() -> None:
        tasks = start(ids, poke_s=60.0)
        await until(lambda: calls(sim, "list") >= 1)
        tasks[ids[0]].cancel()
        await until(tasks.pop(ids[0]).cancelled)
        assert len(clients) == 1 and not clients[0].is_closed()
        for task in tasks.values():
            task.cancel()
        next_one = start(ids[:1])  # before the canceled ones have left
        await asyncio.sleep(0)
        after = start(ids[1:2])  # while the first poller closes
        began = time.monotonic()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert time.monotonic() - began < 3, "the last to leave did not end the poller, which rests for a minute"
        sim.end(ids[0])
        sim.end(ids[1])
        assert (await next_one[ids[0]])["status"] == (await after[ids[1]])["status"] == "ended"
        assert all(client.is_closed() for client in clients)
        assert poller._pollers == {}
        again = start(ids[2:3])
        sim.end(ids[2])
        assert (await again[ids[2]])["status"] == "ended"
        assert clients[-1].is_closed() and len(set(map(id, clients))) >= 2

    run(work)


def test_a_trigger_that_is_canceled_before_its_first_look_leaves_nothing(sim: Simulator) -> None:
    """CancelledError goes through, at once, also while the client is still made."""
    (batch_id,) = create(sim, 1)

    async def work() -> None:
        task = asyncio.create_task(wait_for(batch_id))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert poller._pollers == {}

    run(work)
    assert calls(sim, "retrieve") == 0


@pytest.mark.parametrize("count", [2, 12], ids=["retrieved", "listed"])
def test_a_storm_of_429_is_waited_out_by_all_together(sim: Simulator, count: int) -> None:
    """Retry-after holds for the connection, newcomers included; nobody is woken, and all hear of the end."""
    ids = create(sim, count + 1)
    sim.faults.add("status", endpoint="*", status=429, retry_after=1.0, times=2)

    async def work() -> None:
        began = time.monotonic()
        tasks = start(ids[:-1])
        await until(lambda: sim.stats()["statuses"].get("429"))
        tasks |= start(ids[-1:])
        await asyncio.sleep(0.7)
        asked = calls(sim, "list") + calls(sim, "retrieve")
        assert asked <= 2, f"{asked} calls within the pause"
        assert not any(task.done() for task in tasks.values())
        for batch_id in ids:
            sim.end(batch_id)
        assert {(await task)["status"] for task in tasks.values()} == {"ended"}
        assert time.monotonic() - began >= 1.0

    run(work)


def test_failures_of_the_connection_end_in_one_clear_error_after_many_looks(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """An API that stays down is given up, and the message says that nothing is lost."""
    monkeypatch.setattr("airflow_provider_batchkit.api.polling.MAX_FAILURES", 3)
    ids = create(sim, 6)
    sim.faults.add("status", endpoint="list", status=503, times=None)

    async def work() -> None:
        for event in await asyncio.gather(*start(ids, poke_s=0.05).values()):
            assert event["status"] == "error"
            assert "503" in event["message"] and "waiting again costs nothing" in event["message"]

    run(work)
    assert calls(sim, "list") == 3


def test_one_id_that_does_not_exist_fails_its_own_trigger_alone(sim: Simulator) -> None:
    """The others never notice."""
    ids = create(sim, 6)

    async def work() -> None:
        tasks = start(ids)
        event = await wait_for("msgbatch_nobody")
        assert event["status"] == "error" and "msgbatch_nobody" in event["message"] and "another workspace" in event["message"]
        event = await wait_for(ids[0], "")
        assert event["status"] == "error" and "''" in event["message"]
        for batch_id in ids:
            sim.end(batch_id)
        assert {(await task)["status"] for task in tasks.values()} == {"ended"}

    run(work)


def test_an_error_of_one_retrieve_is_retried_for_that_batch(sim: Simulator) -> None:
    """A 500 on one batch holds up neither the connection nor the others."""
    ids = create(sim, 2)
    sim.faults.add("status", endpoint="retrieve", batch=ids[0], status=500, times=2)
    for batch_id in ids:
        sim.end(batch_id)

    async def work() -> None:
        tasks = start(ids, poke_s=0.5)
        assert (await tasks[ids[1]])["status"] == "ended"
        assert not tasks[ids[0]].done()
        assert (await tasks[ids[0]])["status"] == "ended"

    run(work)


def test_a_revoked_key_fails_all_triggers_of_its_connection_and_no_other(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two connections, two pollers: 401 on the one says what to do, and the other one's triggers wait on."""
    sim.set(keys={"good": "w", "bad": "w"})
    ids = create(sim, 6, "good")
    connect(monkeypatch, "GOOD", sim, "good")
    connect(monkeypatch, "BAD", sim, "bad")

    async def work() -> None:
        good, bad = start(ids, conn_id="good"), start(ids, conn_id="bad")
        await until(lambda: calls(sim, "list") >= 2)
        sim.set(keys={"good": "w"})
        for event in await asyncio.gather(*bad.values()):
            assert event["status"] == "error"
            assert "401" in event["message"] and "'bad'" in event["message"] and "another key" in event["message"]
        assert not any(task.done() for task in good.values())
        for batch_id in ids:
            sim.end(batch_id)
        assert {(await task)["status"] for task in good.values()} == {"ended"}

    run(work)


@pytest.mark.parametrize("count", [1, 6])
def test_a_key_that_is_renewed_before_it_is_revoked_fails_nobody(sim: Simulator, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The connection has the new key while the triggers wait with the old one; then the old one is revoked."""
    sim.set(keys={"old": "w", "new": "w"})
    connect(monkeypatch, "ANTHROPIC_DEFAULT", sim, "old")
    ids = create(sim, count, "old")

    async def work() -> None:
        waiting = start(ids)
        await until(lambda: all_rest(ids))
        connect(monkeypatch, "ANTHROPIC_DEFAULT", sim, "new")
        sim.set(keys={"new": "w"})
        await until(lambda: calls(sim, "list" if count > 3 else "retrieve") >= 4)
        for batch_id in ids:
            sim.end(batch_id)
        assert {(await task)["status"] for task in waiting.values()} == {"ended"}

    run(work)


def test_a_connection_that_moves_to_another_workspace_shows_old_and_new_batches(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who wait already go on with the key that they began with; whoever comes later looks with the new one."""
    sim.set(keys={"a": "workspace-a", "b": "workspace-b"})
    connect(monkeypatch, "ANTHROPIC_DEFAULT", sim, "a")
    old, new = create(sim, 4, "a"), create(sim, 4, "b")

    async def work() -> None:
        before = start(old)
        await until(lambda: all_rest(old))
        connect(monkeypatch, "ANTHROPIC_DEFAULT", sim, "b")
        after = start(new)
        await asyncio.sleep(3 * POKE_S)
        for batch_id in old + new:
            sim.end(batch_id)
        assert {(await task)["status"] for task in [*before.values(), *after.values()]} == {"ended"}

    run(work)


def test_a_connection_that_does_not_exist_fails_its_own_triggers(sim: Simulator) -> None:
    """The message names it; the default connection is untouched."""
    (batch_id,) = create(sim, 1)

    async def work() -> None:
        good = start([batch_id])
        for event in await asyncio.gather(wait_for("b1", conn_id="nowhere"), wait_for("b2", conn_id="nowhere")):
            assert event["status"] == "error" and "'nowhere' cannot be used" in event["message"]
        sim.end(batch_id)
        assert (await good[batch_id])["status"] == "ended"

    run(work)


@pytest.mark.parametrize("how", ["error", "cancel"])
def test_waiters_hear_of_a_poller_that_dies(sim: Simulator, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A bug in the poller, or somebody who cancels its task: no trigger hangs, and the next one gets a new poller."""
    ids = create(sim, 5)

    async def work() -> None:
        tasks = start(ids)
        await until(lambda: calls(sim, "list") >= 1)
        with monkeypatch.context() as patch:
            if how == "error":
                patch.setattr(looking.Looker, "look", lambda *_: 1 / 0)
            else:
                (shared,) = poller._pollers.values()
                shared._task.cancel()
            for event in await asyncio.gather(*tasks.values()):
                assert event["status"] == "error"
                assert ("ZeroDivisionError" if how == "error" else "canceled") in event["message"]
        sim.end(ids[0])
        assert (await wait_for(ids[0]))["status"] == "ended"

    run(work)


def test_the_cause_of_a_dead_poller_is_chained(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trigger's log shows the traceback of what broke it."""
    monkeypatch.setattr(looking.Looker, "look", lambda *_: 1 / 0)
    with pytest.raises(PollError) as caught:
        asyncio.run(poller.ended("anthropic_default", PollState(["b"], interval=1)))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_each_trigger_keeps_its_own_deadline(sim: Simulator) -> None:
    """One of many times out, on time, long before the next look of the others."""
    ids = create(sim, 6)

    async def work() -> None:
        tasks = start(ids[1:], poke_s=60.0)
        began = time.monotonic()
        event = await wait_for(ids[0], poke_s=60.0, deadline_s=0.6)
        assert event["status"] == "timeout" and ids[0] in event["message"]
        assert 0.5 < time.monotonic() - began < 5
        assert not any(task.done() for task in tasks.values())
        await stop(tasks)

    run(work)


def test_a_list_that_is_refused_or_unreadable_ends_no_wait(sim: Simulator) -> None:
    """A gateway without the list endpoint: the batches are retrieved."""
    ids = create(sim, 12)
    sim.faults.add("status", endpoint="list", status=404, times=None)

    async def work() -> None:
        tasks = start(ids)
        await until(lambda: calls(sim, "retrieve") >= 12)
        for batch_id in ids:
            sim.end(batch_id)
        assert {(await task)["status"] for task in tasks.values()} == {"ended"}

    run(work)


def test_many_batches_of_one_trigger_end_together(sim: Simulator) -> None:
    """A submit of many shards: one event, with the counts of all."""
    ids = create(sim, 7)

    async def work() -> None:
        task = asyncio.create_task(wait_for(*ids))
        for batch_id in ids[:-1]:
            sim.end(batch_id)
        await until(lambda: calls(sim, "list") >= 1)
        await until(lambda: calls(sim, "retrieve") >= 1)  # the last one is looked at alone
        assert not task.done()
        sim.end(ids[-1])
        assert (await task)["counts"] == {"succeeded": 7, "errored": 0, "canceled": 0, "expired": 0}

    run(work)


@pytest.mark.parametrize("count", [2, 7], ids=["retrieved", "listed"])
def test_a_trigger_that_waits_for_the_first_fires_while_the_others_run(sim: Simulator, count: int) -> None:
    """One event, which names all batches; a trigger that waits for all of the same batches waits on."""
    ids = create(sim, count)

    async def work() -> None:
        one, both = asyncio.create_task(wait_for(*ids, first=True)), asyncio.create_task(wait_for(*ids))
        await until(lambda: calls(sim, "list") + calls(sim, "retrieve") >= 1)
        assert not one.done()
        sim.end(ids[1])
        async with asyncio.timeout(15):
            event = await one
        assert (event["status"], event["batch_ids"]) == ("ended", ids)
        assert event["counts"] == {"succeeded": 1, "errored": 0, "canceled": 0, "expired": 0}
        assert not both.done()
        assert (await wait_for(*ids, first=True))["status"] == "ended", "one that has ended before counts at the first look"
        for batch_id in ids:
            sim.end(batch_id)
        assert (await both)["counts"]["succeeded"] == count

    run(work)


def test_a_trigger_that_waits_for_the_first_times_out_with_all_that_run(sim: Simulator) -> None:
    """None has ended by the deadline."""
    ids = create(sim, 2)
    event = run(lambda: wait_for(*ids, first=True, deadline_s=0.5))
    assert event["status"] == "timeout" and all(batch_id in event["message"] for batch_id in ids)


def test_a_trigger_without_batches_waits_until_its_deadline(sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs neither a poller nor a client, nor a connection that works."""
    monkeypatch.delenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT")

    async def work() -> None:
        began = time.monotonic()
        task = asyncio.create_task(wait_for(deadline_s=0.6))
        await asyncio.sleep(0.3)
        assert not task.done() and poller._pollers == {}
        event = await task
        assert (event["status"], event["batch_ids"]) == ("timeout", []) and event["message"]
        assert 0.5 < time.monotonic() - began < 5
        assert (await wait_for(deadline_s=-5))["status"] == "timeout", "a trigger that is resumed late"
        assert (await wait_for())["status"] == "ended", "without a deadline there is nothing to wait for"

    run(work)
    assert sim.stats()["calls"] == {}


def test_a_trigger_without_batches_can_be_canceled(sim: Simulator) -> None:
    """Its wait is a sleep, which ends at once."""

    async def work() -> None:
        task = asyncio.create_task(wait_for(deadline_s=3600))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work)


def test_a_trigger_is_what_its_serialized_form_says_also_an_old_one() -> None:
    """A triggerer makes triggers of what is in the database, also of what an older version wrote."""
    trigger = BatchTrigger(batch_ids=["b"], anthropic_conn_id="a", poke_interval=1, deadline=2.0, cancel_on_kill=True, first=True)
    path, kwargs = trigger.serialize()
    assert path == "airflow_provider_batchkit.triggers.batch.BatchTrigger"
    again = BatchTrigger(**kwargs)
    assert again.first and again.serialize() == (path, kwargs)
    del kwargs["first"]
    assert BatchTrigger(**kwargs).first is False


def test_event_loops_do_not_share_a_poller_and_closed_ones_are_forgotten(sim: Simulator) -> None:
    """A loop that was closed over unfinished triggers leaves nothing once another poller starts."""
    (batch_id,) = create(sim, 1)
    loop = asyncio.new_event_loop()
    waiting = poller.ended("anthropic_default", PollState([batch_id], interval=1))
    task = loop.create_task(waiting)
    loop.run_until_complete(asyncio.sleep(0.5))  # its client is made, its first look is over
    loop.close()
    assert len(poller._pollers) == 1
    sim.end(batch_id)
    assert run(lambda: wait_for(batch_id))["status"] == "ended"
    assert poller._pollers == {}
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it was left pending on purpose
    del task, waiting, loop
    gc.collect()

"""Deferred batches that do not end: what waiting for them costs a triggerer.

The process of a side runs nothing but its triggers, on one event loop, started one by one as Airflow's triggerer does. A poll is an
observation of one batch; ``polls due`` is how many the interval asks for in the time. The longest gap is the longest time that a batch
went unobserved, from its trigger's start on. The lag is how late the event loop got to a timer, and the own lag how much of that its
thread was at work: the rest is the machine's other processes, and the process' other threads. Lag and memory come from a run of their
own, since probing for them takes more CPU time than our side's waiting does.

common.ai's operator asks for an interval of 30 seconds at least; its trigger does not, and is given the same one as the others here.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from airflow_provider_batchkit.simulator import SimulatorProcess
from tests.bench.sides import connect
from tests.bench.turns import turns

SIDES = ("batchkit", "official", "common.ai")
SECONDS = 20.0
INTERVAL_S = 5.0
PROBE_S = 0.01


def compare(rounds: int, few: int = 500, many: int = 5000) -> list[dict[str, Any]]:
    """``few`` batches on all sides, medians of ``rounds``, then ``many`` on ours alone."""
    with SimulatorProcess(clock="manual") as simulator, tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.json"
        ids.write_text(json.dumps(_created(simulator.base_url, few)))
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for side in turns(SIDES, rounds):
            runs[side].append(_measured(side, simulator, ids))
        lines = [
            _line(side, few, {name: statistics.median(run[name] for run in figures) for name in figures[0]}, simulator, ids)
            for side, figures in runs.items()
        ]
        ours = lines[0]["cpu seconds"]
        lines = [line | {"cpu / batchkit": round(line["cpu seconds"] / ours, 1)} for line in lines]
        ids.write_text(json.dumps(json.loads(ids.read_text()) + _created(simulator.base_url, many - few)))
        return [*lines, _line(SIDES[0], many, _measured(SIDES[0], simulator, ids), simulator, ids) | {"cpu / batchkit": "-"}]


def _line(side: str, batches: int, figures: dict[str, float], simulator: SimulatorProcess, ids: Path) -> dict[str, Any]:
    what = {"what": f"wait {SECONDS:.0f} s, look every {INTERVAL_S:.0f} s", "side": side, "batches": batches}
    return what | {name: round(value, 2) for name, value in (figures | _measured(side, simulator, ids, probed=True)).items()}


def _created(base_url: str, count: int) -> list[str]:
    import anthropic

    params: Any = {"model": "claude-haiku-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
    with anthropic.Anthropic(api_key="k", base_url=base_url) as client:
        return [client.messages.batches.create(requests=[{"custom_id": "r", "params": params}]).id for _ in range(count)]


def _measured(side: str, simulator: SimulatorProcess, ids: Path, *, probed: bool = False) -> dict[str, float]:
    """Lag and memory of one run where ``probed``, everything else otherwise."""
    before = sum(simulator.stats()["calls"].values())
    command = [sys.executable, "-m", "tests.bench.polling", side, "--simulator", simulator.base_url, "--ids", str(ids)]
    command += ["--probe"] if probed else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} polling failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures if probed else figures | {"http calls": sum(simulator.stats()["calls"].values()) - before}


# in the process of one side


def _counting(cls: Any, observed: Callable[[str], None]) -> None:
    """``observed`` is called with the batch id after every ``get_batch`` of ``cls``."""
    get_batch = cls.get_batch

    def counted(self: Any, batch_id: str) -> Any:
        batch = get_batch(self, batch_id)
        observed(batch_id)
        return batch

    cls.get_batch = counted


def _triggers(side: str, ids: list[str], observed: Callable[[str], None]) -> Iterable[Any]:
    """The side's triggers; ``observed`` is called with a batch id at each observation."""
    end = time.time() + 3600
    if side == "official":
        from airflow.providers.anthropic.hooks.anthropic import AnthropicHook
        from airflow.providers.anthropic.triggers.batch import AnthropicBatchTrigger

        _counting(AnthropicHook, observed)
        return [AnthropicBatchTrigger("anthropic_default", batch_id, INTERVAL_S, end) for batch_id in ids]
    if side == "common.ai":
        from airflow.providers.common.ai.batch.anthropic import AnthropicBatchAdapter
        from airflow.providers.common.ai.triggers.llm_batch import LLMBatchTrigger

        _counting(AnthropicBatchAdapter, observed)
        asked: dict[str, Any] = {"adapter": "anthropic", "poll_interval": INTERVAL_S, "end_time": end}
        asked |= {"cancel_on_kill": False, "cancel_on_timeout": False}
        return [LLMBatchTrigger(llm_conn_id="pydanticai_default", batch_id=batch_id, **asked) for batch_id in ids]

    from airflow_provider_batchkit.api.polling import PollState
    from airflow_provider_batchkit.triggers.batch import BatchTrigger

    saw = PollState.saw

    def noted(state: PollState, snapshots: Any) -> None:
        saw(state, snapshots)
        for batch_id in state.batch_ids:
            observed(batch_id)

    PollState.saw = noted  # type: ignore[method-assign, assignment]  # the bench counts
    return [
        BatchTrigger(batch_ids=[batch_id], anthropic_conn_id="anthropic_default", poke_interval=INTERVAL_S, deadline=end)
        for batch_id in ids
    ]


async def _loaded() -> None:
    """What a triggerer has long loaded, here before measuring: its event loop's backend, its way to connections, the SDK's HTTP stack."""
    import anthropic
    import anyio
    from airflow.providers.common.compat.connection import get_async_connection

    with anyio.move_on_after(0.01):
        await anyio.sleep(1)
    await get_async_connection("anthropic_default")
    await anthropic.AsyncAnthropic(api_key="k").close()
    gc.collect()
    gc.freeze()  # else the next full collection goes through all that was imported, 150 ms at a stroke


async def _watched(side: str, ids: list[str], *, probed: bool) -> dict[str, float]:
    times = defaultdict[str, list[float]](list)
    triggers = _triggers(side, ids, lambda batch_id: times[batch_id].append(time.monotonic()))
    await _loaded()
    process = psutil.Process()
    base = peak = process.memory_info().rss
    lag, own, stop = 0.0, 0.0, time.monotonic() + SECONDS

    async def probe() -> None:
        nonlocal lag, own, peak
        while True:
            due, busy = time.monotonic() + PROBE_S, time.thread_time()
            await asyncio.sleep(PROBE_S)
            late = time.monotonic() - due
            lag, own = max(lag, late), max(own, min(late, time.thread_time() - busy))
            peak = max(peak, process.memory_info().rss)

    tasks: list[asyncio.Future[Any]] = [asyncio.create_task(probe())] if probed else []
    cpu, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    for trigger in triggers:
        tasks.append(asyncio.ensure_future(anext(trigger.run())))
        await asyncio.sleep(0)
    await asyncio.sleep(stop - time.monotonic())
    after = resource.getrusage(resource.RUSAGE_SELF)
    seen = {batch_id: list(times[batch_id]) for batch_id in ids}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if probed:
        return {"lag ms": lag * 1000, "own lag ms": own * 1000, "peak MB over base": (peak - base) / 1e6}
    return {
        "cpu seconds": after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime,
        "polls": sum(map(len, seen.values())),
        "polls due": len(ids) * int(SECONDS / INTERVAL_S),
        "longest gap s": max(b - a for at in seen.values() for a, b in itertools.pairwise([started, *at, stop])),
    }


def main() -> None:
    """Wait, and print the figures as a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--simulator", required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--probe", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    connect(args.simulator)
    print(json.dumps(asyncio.run(_watched(args.side, json.loads(args.ids.read_text()), probed=args.probe))), flush=True)
    os._exit(0)  # the peers' threads would finish their polls first


if __name__ == "__main__":
    main()

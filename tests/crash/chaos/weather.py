"""The API's side of a storm: slow, cut and refused calls, hidden batches, and somebody else's batches in the same workspace."""

from __future__ import annotations

import contextlib
import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import httpx

from airflow_provider_batchkit.simulator import SimulatorProcess
from tests.crash.chaos.dag import ABSENCE_SECONDS, RETRY_SECONDS, ROWS_PER_BATCH, SETTLE_SECONDS
from tests.crash.chaos.report import Outcome

#: how long a batch runs: some end at once, and some outlive several kills
CLOCK = "seconds:2-20"
#: how long the API takes to answer a POST that it has accepted, and to send a line of results: room for a kill in between
POST_SECONDS, LINE_SECONDS = 0.8, 0.02
#: share of POSTs that are accepted late, and how late: siblings' batches then come in another order than their intents
LATE_ACCEPTANCE, LATE_ACCEPTANCE_SECONDS = 0.35, 1.4
#: share of new batches that do not show at once, and how long
HIDDEN_AT_FIRST, HIDDEN_AT_FIRST_SECONDS = 0.15, 1.5
#: share of list calls that are answered late, and how late: the answer is longer under way than half of the settling
SLOW_LIST, SLOW_LIST_SECONDS = 0.08, 3.5
#: seconds between two batches that are hidden in the middle of their life, and how long each is missing
HIDING_PAUSE_SECONDS, HIDDEN_SECONDS = (4.0, 12.0), (0.5, 2.5)
#: seconds between two foreign batches. A running one makes doubts wait, so there must be times without any
FOREIGN_PAUSE_SECONDS = (8.0, 30.0)
#: what becomes of a foreign batch once it has ended, and how often in proportion
FOREIGN_FATES = {"stays": 50, "deleted": 25, "archived": 25}
FOREIGN_MODEL = "claude-haiku-4-5"
FOREIGN_PREFIX = "foreign-"

# the engine's bounds, see SETTLE_SECONDS: a POST whose sender is alive, and one whose sender has been killed, so that a retry begins a
# second later
assert LATE_ACCEPTANCE_SECONDS + POST_SECONDS < SETTLE_SECONDS / 2
assert LATE_ACCEPTANCE_SECONDS - RETRY_SECONDS < SETTLE_SECONDS / 6
assert HIDDEN_AT_FIRST_SECONDS < SETTLE_SECONDS - SETTLE_SECONDS / 2 - SETTLE_SECONDS / 6
assert HIDDEN_SECONDS[1] < ABSENCE_SECONDS

#: faults that strike once, one of them after every fourth kill
FAULTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("cut_before_accept", {}),
    ("cut_after_accept", {}),
    ("cut_after_accept", {"reset": True}),
    ("status", {"status": 429, "retry_after": 1.0}),
    ("status", {"status": 529}),
    ("status", {"status": 500}),
    ("status_after_accept", {"status": 500}),
    ("cut_results", {"line": 4}),
    ("cut_results", {"line": 7, "clean": True}),
    ("status", {"endpoint": "results", "status": 500}),
    ("status", {"endpoint": "retrieve", "status": 529}),
    ("status", {"endpoint": "list", "status": 500}),
)
FAULT_AFTER_A_KILL = 0.25


@dataclass(slots=True)
class _Foreign:
    batch_id: str
    fate: str
    due: float


class Weather:
    """Trouble for the API's callers, until the block ends."""

    def __init__(self, sim: SimulatorProcess, outcome: Outcome, chance: random.Random) -> None:
        self._sim = sim
        self._outcome = outcome
        self._random = chance
        headers = {"x-api-key": "foreign", "anthropic-version": "2023-06-01"}
        self._client = httpx.Client(base_url=sim.base_url, headers=headers, timeout=30, trust_env=False)
        self._pool = ThreadPoolExecutor(1, "foreign")  # a POST takes a while, and the storm looks ten times a second
        self._begun: list[tuple[Future[str | None], str]] = []
        self._foreign: list[_Foreign] = []
        self._hidden: set[str] = set()
        self._next_foreign = self._next_hiding = 0.0

    def __enter__(self) -> Self:
        now = time.monotonic()
        self._next_foreign = now + self._random.uniform(*FOREIGN_PAUSE_SECONDS) / 4
        self._next_hiding = now + self._random.uniform(*HIDING_PAUSE_SECONDS)
        add = self._sim.faults.add
        add("hide", chance=HIDDEN_AT_FIRST, seconds=HIDDEN_AT_FIRST_SECONDS, times=None)
        add("late_accept", chance=LATE_ACCEPTANCE, seconds=LATE_ACCEPTANCE_SECONDS, times=None)
        add("late", endpoint="list", chance=SLOW_LIST, seconds=SLOW_LIST_SECONDS, times=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._sim.faults.clear()
        self._pool.shutdown()
        self._client.close()

    def after_a_kill(self) -> None:
        """Sometimes one more fault."""
        if self._random.random() < FAULT_AFTER_A_KILL:
            kind, fields = self._random.choice(FAULTS)
            self._sim.faults.add(kind, **fields)
            self._outcome.faults += 1

    def goes_on(self) -> None:
        """Whatever is due now."""
        now = time.monotonic()
        if now >= self._next_foreign:
            self._next_foreign = now + self._random.uniform(*FOREIGN_PAUSE_SECONDS)
            fate = self._random.choices(list(FOREIGN_FATES), list(FOREIGN_FATES.values()))[0]
            size = ROWS_PER_BATCH if self._random.random() < 0.8 else self._random.randint(1, 2 * ROWS_PER_BATCH)
            self._begun.append((self._pool.submit(self._create, size), fate))
        if now >= self._next_hiding:
            self._next_hiding = now + self._random.uniform(*HIDING_PAUSE_SECONDS)
            self._hide_one()
        self._follow(now)

    def _create(self, size: int) -> str | None:
        """The id of a batch that belongs to none of our tasks; None where a fault has struck the call."""
        params = {"model": FOREIGN_MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": "not ours"}]}
        requests = [{"custom_id": f"{FOREIGN_PREFIX}{number}", "params": params} for number in range(size)]
        with contextlib.suppress(httpx.HTTPError, KeyError):
            return str(self._client.post("/v1/messages/batches", json={"requests": requests}).json()["id"])
        return None

    def _hide_one(self) -> None:
        """A batch that has not been hidden before: two spells of one batch in a row would be longer than the API's longest."""
        young = [batch["id"] for batch in self._sim.stats()["batches"][-12:] if batch["id"] not in self._hidden]
        if young:
            batch_id = self._random.choice(young)
            self._hidden.add(batch_id)
            with contextlib.suppress(ValueError):  # deleted a moment ago
                self._sim.hide(batch_id, seconds=self._random.uniform(*HIDDEN_SECONDS))
                self._outcome.hidden += 1

    def _follow(self, now: float) -> None:
        """Foreign batches are deleted or archived some time after they have ended."""
        for call, fate in [begun for begun in self._begun if begun[0].done()]:
            self._begun.remove((call, fate))
            batch_id = call.result()
            if batch_id is not None and fate != "stays":
                self._foreign.append(_Foreign(batch_id, fate, now + self._random.uniform(2, 30)))
        for foreign in [f for f in self._foreign if now >= f.due]:
            if foreign.fate == "archived":
                self._foreign.remove(foreign)
                self._sim.archive(foreign.batch_id)  # which ends it, too
            else:
                foreign.due = now + 1
                with contextlib.suppress(httpx.HTTPError):
                    if self._client.delete(f"/v1/messages/batches/{foreign.batch_id}").is_success:
                        self._foreign.remove(foreign)

"""What is to become of each process of a task: it is let through, killed or stopped, and when."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil
import sqlalchemy as sa

from tests.crash.chaos.dag import SENDERS
from tests.crash.chaos.workers import Worker

#: what is hit of a worker, and how often in proportion; ``frozen`` stops both and thaws them later
WORKER_KILLS = {"task": 66, "supervisor": 9, "both": 13, "frozen": 12}
#: What becomes of a process: it is let through, hit while it imports and renders, or hit once it talks to the API. A task that sends is in
#: greater danger: only there can a kill leave a doubt.
SENDERS_FATES = {"spared": 40, "early": 8, "talking": 52}
FATES = {"spared": 62, "early": 10, "talking": 28}
EARLY_SECONDS, TALKING_SECONDS = (0.2, 3.0), (0.0, 2.5)
#: how often a sibling that talks to the API dies together with a task that sends
TOGETHER = 0.6
#: A stopped worker is thawed so long after its retry has begun, but not before the first and not after the second of FROZEN_SECONDS. The
#: first is longer than Airflow's heartbeat timeout and its detection.
BESIDE_RETRY_SECONDS = (0.0, 2.0)
FROZEN_SECONDS = (13.0, 45.0)
#: how often its supervisor dies while it is stopped, so that nobody ends the thawed task; else the supervisor wakes up so much later
ORPHANED = 0.5
SUPERVISOR_SECONDS = (0.0, 3.0)


@dataclass(slots=True)
class Fate:
    """What is to become of one process: ``when`` is a key of FATES, ``what`` of WORKER_KILLS."""

    when: str
    what: str
    #: seconds from its start, or from its first word to the API
    after_s: float
    #: on the monotonic clock; 0 until it is known
    due: float = 0.0
    done: bool = False

    def is_due(self, worker: Worker, port: int) -> bool:
        """Whether the worker's time has come. ``port`` is the API's."""
        if self.when == "spared" or self.done:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.when == "early":
                self.due = self.due or time.monotonic() + self.after_s - worker.age_s
            elif not self.due and worker.talks_to(port):
                self.due = time.monotonic() + self.after_s
        return 0 < self.due <= time.monotonic()


class Tries:
    """Which task a try belongs to, and where that task is now, out of Airflow's database."""

    def __init__(self, metadata: sa.Engine) -> None:
        self._metadata = metadata
        self._tasks: dict[str, tuple[str, str]] = {}

    def task_of(self, try_id: str) -> tuple[str, str]:
        """Run id and task id; ``("?", "?")`` for a try that Airflow does not know."""
        key = _plain(try_id)
        if key not in self._tasks:
            statement = (
                "SELECT CAST(id AS TEXT), run_id, task_id FROM task_instance "
                "UNION SELECT CAST(task_instance_id AS TEXT), run_id, task_id FROM task_instance_history"
            )
            with self._metadata.connect() as connection:
                self._tasks |= {_plain(found): (run, task) for found, run, task in connection.exec_driver_sql(statement)}
        return self._tasks.get(key, ("?", "?"))

    def has_a_younger_one_at_work(self, try_id: str) -> bool:
        """Whether another try of the same task is running, waits in the triggerer, or has done the work."""
        run_id, task_id = self.task_of(try_id)
        statement = sa.text("SELECT CAST(id AS TEXT), state FROM task_instance WHERE run_id = :run AND task_id = :task")
        with self._metadata.connect() as connection:
            latest = connection.execute(statement, {"run": run_id, "task": task_id}).all()
        return any(_plain(found) != _plain(try_id) and state in ("running", "deferred", "success") for found, state in latest)


class Fates:
    """The fate of every process, drawn when it is first seen."""

    def __init__(self, tries: Tries, chance: random.Random) -> None:
        self._tries = tries
        self._random = chance
        self._drawn: dict[tuple[str, int], Fate] = {}

    def of(self, worker: Worker) -> Fate:
        """A try that was deferred goes on in another process, which has a fate of its own."""
        key = (worker.try_id, worker.task.pid)
        if key not in self._drawn:
            _, task_id = self._tries.task_of(worker.try_id)
            self._drawn[key] = self._draw(SENDERS_FATES if task_id in SENDERS else FATES)
        return self._drawn[key]

    def _draw(self, fates: Mapping[str, int]) -> Fate:
        when = self._random.choices(list(fates), list(fates.values()))[0]
        what = self._random.choices(list(WORKER_KILLS), list(WORKER_KILLS.values()))[0]
        return Fate(when, what, self._random.uniform(*(EARLY_SECONDS if when == "early" else TALKING_SECONDS)))


def _plain(try_id: str) -> str:
    return try_id.replace("-", "")


@dataclass(slots=True)
class _Frozen:
    worker: Worker
    since: float
    as_orphan: bool
    #: on the monotonic clock; 0 until it is known
    thaw_at: float = 0.0
    supervisor_at: float = 0.0


@dataclass
class Icebox:
    """Stopped workers, each of which is thawed beside its own retry."""

    tries: Tries
    chance: random.Random
    #: how many were thawed beside a retry
    beside_retry: int = 0
    _frozen: list[_Frozen] = field(default_factory=list)
    _supervisors: list[_Frozen] = field(default_factory=list)
    _looked: float = 0.0

    def put(self, worker: Worker) -> None:
        """Stop a worker. Raises NoSuchProcess when its task has ended before that."""
        worker.freeze()
        self._frozen.append(_Frozen(worker, time.monotonic(), self.chance.random() < ORPHANED))

    def holds(self, worker: Worker) -> bool:
        return any(frozen.worker.task == worker.task for frozen in self._frozen)

    @property
    def is_empty(self) -> bool:
        return not (self._frozen or self._supervisors)

    def thaw_what_is_due(self) -> None:
        """Looks once a second at most."""
        now = time.monotonic()
        if now < self._looked + 1:
            return
        self._looked = now
        for frozen in list(self._frozen):
            if not frozen.thaw_at and now >= frozen.since + FROZEN_SECONDS[0]:
                if self.tries.has_a_younger_one_at_work(frozen.worker.try_id):
                    frozen.thaw_at = now + self.chance.uniform(*BESIDE_RETRY_SECONDS)
                    self.beside_retry += 1
                elif now >= frozen.since + FROZEN_SECONDS[1]:
                    frozen.thaw_at = now
            if frozen.thaw_at and now >= frozen.thaw_at:
                self._thaw(frozen)
        for frozen in list(self._supervisors):
            if now >= frozen.supervisor_at:
                frozen.worker.thaw_supervisor()
                self._supervisors.remove(frozen)

    def thaw_all(self) -> None:
        """At the end of a storm: nothing may stay stopped."""
        for frozen in list(self._frozen):
            self._thaw(frozen)
        for frozen in self._supervisors:
            frozen.worker.thaw_supervisor()
        self._supervisors.clear()

    def _thaw(self, frozen: _Frozen) -> None:
        self._frozen.remove(frozen)
        frozen.worker.thaw(as_orphan=frozen.as_orphan)
        if not frozen.as_orphan:
            frozen.supervisor_at = time.monotonic() + self.chance.uniform(*SUPERVISOR_SECONDS)
            self._supervisors.append(frozen)

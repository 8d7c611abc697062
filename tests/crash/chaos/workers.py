"""The processes that are killed and stopped: tasks with their supervisors, and the triggerer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil


@dataclass(frozen=True, slots=True)
class Worker:
    """A process of the LocalExecutor that supervises a task right now, and the task's own process."""

    supervisor: psutil.Process
    task: psutil.Process
    #: the id of the task instance, which is new for each try; a try that was deferred goes on in a further process
    try_id: str

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - float(self.task.create_time()))

    def talks_to(self, port: int) -> bool:
        """Whether the task has a connection to a server on that port, or has just had one."""
        return any(c.raddr and c.raddr.port == port for c in self.task.net_connections("tcp"))

    def kill(self, what: str) -> None:
        """SIGKILL the ``"task"``, the ``"supervisor"`` or ``"both"``. Raises NoSuchProcess when the task has ended before that."""
        with self._supervising():
            if what != "supervisor":
                self.task.kill()
            if what != "task":
                self.supervisor.kill()

    def freeze(self) -> None:
        """SIGSTOP both: neither the task goes on nor a heartbeat is sent. Raises NoSuchProcess when the task has ended before that."""
        with self._supervising(goes_on=False):
            self.task.suspend()

    def thaw(self, *, as_orphan: bool) -> None:
        """SIGCONT the task. Its supervisor is killed, or stays stopped until ``thaw_supervisor``."""
        # The task comes first: the kernel hangs up on stopped processes whose group has become an orphan.
        with contextlib.suppress(psutil.NoSuchProcess):
            self.task.resume()
        with contextlib.suppress(psutil.NoSuchProcess):
            if as_orphan:
                self.supervisor.kill()

    def thaw_supervisor(self) -> None:
        """SIGCONT the supervisor, which learns from its next heartbeat that the try is over, and ends the task."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.supervisor.resume()

    @contextlib.contextmanager
    def _supervising(self, *, goes_on: bool = True) -> Iterator[None]:
        """The supervisor is stopped inside the block, and after it unless it ``goes_on``. Raises NoSuchProcess when its task has ended.

        A supervisor without a task may hold a lock on the executor's queues, which would die with it and stop the whole executor.
        """
        self.supervisor.suspend()
        done = False
        try:
            self._check_that_it_lives()
            yield
            done = True
        finally:
            if goes_on or not done:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.supervisor.resume()

    def _check_that_it_lives(self) -> None:
        if self.task.status() == psutil.STATUS_ZOMBIE:
            raise psutil.NoSuchProcess(self.task.pid)


class Workers:
    """The task processes below a scheduler."""

    def __init__(self, scheduler: Component) -> None:
        self._scheduler = scheduler

    def busy(self) -> list[Worker]:
        """Those whose task has begun."""
        found = {process.pid: process for process in self._scheduler.family()}
        return [worker for process in found.values() for worker in self._workers(process, found)]

    @staticmethod
    def _workers(process: psutil.Process, found: Mapping[int, psutil.Process]) -> Iterator[Worker]:
        """The worker whose task this process is, if it is one."""
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            # a task takes its own title when Airflow counts it as running; its supervisor's says LocalExecutor
            title = " ".join(process.cmdline()).strip()
            if title.startswith("airflow worker -- ") and "LocalExecutor" not in title and (above := found.get(process.ppid())):
                yield Worker(above, process, title.rpartition(" ")[2])


class Component:
    """``airflow scheduler`` or ``airflow triggerer`` of our own in place of the standalone's, which nobody would start again."""

    def __init__(self, name: str, standalones: psutil.Process) -> None:
        """:param name: ``scheduler`` or ``triggerer``"""
        self._name = name
        self._environment = standalones.environ()
        kill_family(standalones)
        self._log = (Path(self._environment["AIRFLOW_HOME"]) / f"{name}.log").open("ab")
        self._process = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._log.close()

    def restart(self) -> None:
        """SIGKILL it and all below it, and start another."""
        self._end()
        self._process = self._start()

    def restart_if_ended(self) -> bool:
        """Start another where it has ended by itself, as whoever runs an Airflow does. Gives whether it had."""
        if self._process.poll() is None:
            return False
        self._process = self._start()
        return True

    def family(self) -> list[psutil.Process]:
        """The processes below it."""
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self._process.pid).children(recursive=True)
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "airflow", self._name],
            env=self._environment,
            cwd=self._environment["AIRFLOW_HOME"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _end(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            kill_family(psutil.Process(self._process.pid))
        self._process.wait()


def kill_family(process: psutil.Process) -> None:
    """SIGKILL a process and all below it, which it cannot replace in between because it is stopped first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        os.kill(process.pid, signal.SIGSTOP)
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()

"""The storm: keeps runs going and brings their processes to their fates, until so many are killed and every run has ended."""

from __future__ import annotations

import contextlib
import random
import time

import httpx
import psutil
import sqlalchemy as sa

from airflow_provider_batchkit.simulator import SimulatorProcess
from tests.crash.chaos.clears import Clears, run_states
from tests.crash.chaos.dag import DAG_ID, RUNS_AT_ONCE, SENDERS
from tests.crash.chaos.fates import TOGETHER, Fates, Icebox, Tries
from tests.crash.chaos.report import Outcome
from tests.crash.chaos.weather import Weather
from tests.crash.chaos.workers import Component, Worker, Workers
from tests.e2e.harness import AirflowStandalone

#: kills of workers between two of the triggerer: it takes about 8 seconds to start and must also get to do something
WORKERS_A_TRIGGERER = (5, 14)
LOOK_SECONDS = 0.1
#: for all runs to end after the last kill
RUN_SECONDS = 300
#: without anything to kill for so long, Airflow itself is stuck
IDLE_SECONDS = 120


def lots_for(kills: int) -> int:
    """More runs than so many kills can need."""
    return 2 * kills + 2 * RUNS_AT_ONCE


class Storm:
    """One randomised run against an Airflow and a simulator that are there already."""

    def __init__(self, airflow: AirflowStandalone, sim: SimulatorProcess, metadata: sa.Engine, outcome: Outcome, *, faults: bool) -> None:
        self.run_ids: list[str] = []
        self._airflow = airflow
        self._sim = sim
        self._outcome = outcome
        self._faults = faults
        self._random = random.Random(outcome.seed)
        self._tries = Tries(metadata)
        self._fates = Fates(self._tries, self._random)
        self._icebox = Icebox(self._tries, self._random)
        self._clears = Clears(airflow, outcome, self._random)
        self._scheduler: Component
        #: kills of the triggerer do not count
        self._workers_killed = 0
        self._started = time.monotonic()

    def rage(self, kills: int) -> None:
        """Keep runs going until so many processes are killed, then let all runs end."""
        self._airflow.wait_for_dag(DAG_ID)
        with self._own("scheduler") as scheduler, self._own("triggerer") as triggerer:
            self._scheduler = scheduler
            self._land_one_run()
            workers = Workers(scheduler)
            try:
                with Weather(self._sim, self._outcome, self._random) if self._faults else contextlib.nullcontext() as weather:
                    self._kill(kills, workers, triggerer, weather)
            finally:
                self._icebox.thaw_all()
                self._outcome.thawed_beside_retry = self._icebox.beside_retry
            self._let_all_runs_end()

    def _kill(self, kills: int, workers: Workers, triggerer: Component, weather: Weather | None) -> None:
        idle_since = time.monotonic()
        runs_checked = 0.0
        triggerer_dies = self._random.randint(*WORKERS_A_TRIGGERER)
        while (left := kills - self._outcome.kills.total()) > 0:
            now = time.monotonic()
            if now > runs_checked + 2:
                self._keep_runs_going(most=kills)
                runs_checked = now
            self._pass_a_moment(weather)
            if self._workers_killed >= triggerer_dies:
                triggerer_dies += self._random.randint(*WORKERS_A_TRIGGERER)
                triggerer.restart()
                self._note("triggerer")
                continue
            busy = [worker for worker in workers.busy() if not self._icebox.holds(worker)]
            idle_since = now if busy else idle_since
            for _ in range(self._strike_all_due(busy, most=left)):
                if weather is not None:
                    weather.after_a_kill()
                self._clears.after_a_kill()
            if now - idle_since > IDLE_SECONDS:
                raise TimeoutError(f"no task has run for {IDLE_SECONDS} seconds: {run_states(self._airflow)}")
        while not self._icebox.is_empty:
            self._pass_a_moment(weather)

    def _pass_a_moment(self, weather: Weather | None) -> None:
        if weather is not None:
            weather.goes_on()
        self._icebox.thaw_what_is_due()
        self._restart_scheduler_if_ended()
        time.sleep(LOOK_SECONDS)

    def _restart_scheduler_if_ended(self) -> None:
        """Airflow's scheduler ends when its database reports a deadlock, which clears of running runs bring about now and then."""
        if self._scheduler.restart_if_ended():
            self._outcome.scheduler_ends += 1
            self._say("the scheduler had ended by itself and was started again")

    def _strike_all_due(self, busy: list[Worker], *, most: int) -> int:
        """Bring the workers whose time has come to their fates. Gives how many."""
        struck = 0
        for worker in busy:
            if struck < most and self._fates.of(worker).is_due(worker, self._sim.port):
                struck += self._strike(worker, busy, most=most - struck)
        return struck

    def _strike(self, worker: Worker, busy: list[Worker], *, most: int) -> int:
        """Kill or stop a worker, and sometimes the siblings that are sending at the same moment. Gives how many."""
        fate = self._fates.of(worker)
        fate.done = True
        struck = [(worker, fate.what)]
        run_id, task_id = self._tries.task_of(worker.try_id)
        if fate.when == "talking" and task_id in SENDERS:
            for other in busy:
                if other != worker and not self._fates.of(other).done and self._random.random() < TOGETHER:
                    its_run, its_task = self._tries.task_of(other.try_id)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if its_run == run_id and its_task in SENDERS and other.talks_to(self._sim.port):
                            struck.append((other, "task"))
        done = 0
        for victim, what in struck[:most]:
            self._fates.of(victim).done = True
            with contextlib.suppress(psutil.NoSuchProcess):
                if what == "frozen":
                    self._icebox.put(victim)
                else:
                    victim.kill(what)
                self._note(what, victim.try_id)
                done += 1
        return done

    def _note(self, what: str, try_id: str = "") -> None:
        self._outcome.kills[what] += 1
        whose = ""
        if try_id:
            run_id, task_id = self._tries.task_of(try_id)
            self._outcome.victims[task_id] += 1
            self._workers_killed += 1
            whose = f"{task_id} of {run_id} ({try_id})"
        self._say(f"killed {what} {whose}")

    def _say(self, what: str) -> None:
        print(f"{time.monotonic() - self._started:6.1f} s  {what}", flush=True)

    def _own(self, name: str) -> Component:
        """A component of our own in place of the standalone's of that name."""
        assert self._airflow._process is not None
        for child in psutil.Process(self._airflow._process.pid).children():
            words = child.cmdline()
            if name in words or f"airflow {name}" in " ".join(words):
                return Component(name, child)
        raise RuntimeError(f"airflow standalone has no {name}")

    def _keep_runs_going(self, *, most: int, open_at_once: int = RUNS_AT_ONCE + 1) -> None:
        states = run_states(self._airflow)
        open_runs = sum(state not in ("success", "failed") for state in states.values())
        # by default one more than may be active, so that no slot waits for us
        for _ in range(open_at_once - open_runs):
            lot = len(self.run_ids)
            if lot >= lots_for(most):
                return
            self.run_ids.append(self._airflow.trigger_dag(DAG_ID, {"lot": lot}))

    def _land_one_run(self) -> None:
        """The first batches of a connection: while none of its batches was ever seen, a doubt waits for a person, as the README says."""
        self._keep_runs_going(most=1, open_at_once=1)
        self._wait_for_run(self.run_ids[0], time.monotonic() + RUN_SECONDS)

    def _let_all_runs_end(self) -> None:
        """Without kills and faults from here on, every run has to succeed."""
        self._say(f"the storm is over; {len(self.run_ids)} runs come to their end")
        deadline = time.monotonic() + RUN_SECONDS
        for run_id in self.run_ids:
            try:
                state = self._wait_for_run(run_id, deadline)
            except (TimeoutError, httpx.HTTPError) as error:
                state = f"not at its end: {error}"
            if state != "success":
                self._outcome.violations.append(f"run {run_id} is {state}:\n{self._last_words(run_id)}")
        self._say("all runs have ended")

    def _wait_for_run(self, run_id: str, deadline: float) -> str:
        """:raises TimeoutError: the run has not ended by then"""
        while True:
            self._restart_scheduler_if_ended()
            left = max(0.0, deadline - time.monotonic())
            try:
                return self._airflow.wait_for_run(DAG_ID, run_id, timeout=min(left, 10.0))
            except TimeoutError:
                if left <= 10.0:
                    raise

    def _last_words(self, run_id: str) -> str:
        """The end of the log of each task's last try that did not succeed."""
        words = []
        for task in self._airflow.task_instances(DAG_ID, run_id):
            if task["state"] != "success":
                log = f"  {task['task_id']} try {task['try_number']} is {task['state']}"
                if task["try_number"]:
                    with contextlib.suppress(httpx.HTTPError):
                        lines = self._airflow.task_log(DAG_ID, run_id, task["task_id"], task["try_number"]).splitlines()
                        log += ":\n" + "\n".join(f"    {line}" for line in lines if "HTTP Request" not in line)[-3000:]
                words.append(log)
        return "\n".join(words)

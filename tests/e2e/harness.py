"""A real Airflow for tests: scheduler, DAG processor, API server and triggerer, in a home of their own, driven through the REST API."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

import httpx
import psutil
import sqlalchemy as sa

from tests.databases import Database

USER = "admin"
COMPONENTS = ("metadatabase", "scheduler", "triggerer", "dag_processor")
FINAL_RUN_STATES = frozenset({"success", "failed"})

_T = TypeVar("_T")


class AirflowStandalone:
    """``airflow standalone`` with LocalExecutor, as a context manager.

    ``dags_folder`` holds the DAG files. ``metadata`` is an empty database for Airflow itself: PostgreSQL, because on SQLite a busy Airflow
    sometimes finds its database locked and refuses a worker's report. ``env`` is added to the environment of every component:
    ``AIRFLOW_CONN_WAREHOUSE`` and the like, and ``AIRFLOW__…`` settings, which win over the ones made here. What the caller's own
    environment says of Airflow and Anthropic is left out. ``base_path`` is a path below which the UI and the API lie, as
    behind a proxy (``/team/a``). Listens on free loopback ports and has one user with a password. Entering waits
    until every component is healthy, at most ``startup_seconds``; leaving interrupts it as Ctrl-C would, kills what is left of it after
    ``shutdown_seconds``, and removes the home unless ``keep_home``. Everything that the components print is in ``log``; its end is printed
    when the block fails.
    """

    def __init__(
        self,
        dags_folder: Path,
        metadata: Database,
        env: Mapping[str, str] | None = None,
        *,
        startup_seconds: float = 180,
        shutdown_seconds: float = 30,
        keep_home: bool = False,
        base_path: str = "",
    ) -> None:
        self.dags_folder = dags_folder
        self.metadata = metadata
        self.env = dict(env or {})
        self.startup_seconds = startup_seconds
        self.shutdown_seconds = shutdown_seconds
        self.keep_home = keep_home
        self.base_path = base_path
        self.user = USER
        self.password = secrets.token_urlsafe(12)
        #: set while it runs: the address of the UI, without a slash at its end
        self.url = ""
        self.home = Path()
        self.log = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._client = httpx.Client(timeout=30)

    # starting and ending

    def __enter__(self) -> Self:
        self.home = Path(tempfile.mkdtemp(prefix="batchkit-airflow-"))
        self.log = self.home / "standalone.log"
        # the file that SimpleAuthManager would fill with a password of its own
        (self.home / "simple_auth_manager_passwords.json.generated").write_text(json.dumps({USER: self.password}) + "\n")
        api, worker_logs, trigger_logs = free_ports(3)
        self.url = f"http://127.0.0.1:{api}{self.base_path}"
        self._output = self.log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "airflow", "standalone"],
            env=self._environment(api, worker_logs, trigger_logs),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group that can be interrupted without the tests
        )
        try:
            self._wait_until_healthy()
            self._log_in()
        except BaseException as error:  # also Ctrl-C: nothing may be left running
            error.add_note(f"Airflow did not start; its log ends with:\n{self.log_tail()}")
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            print(f"--- the end of Airflow's log ({self.log}) ---\n{self.log_tail()}")  # noqa: T201 pytest shows it with the failure
        self._end()

    def _environment(self, api: int, worker_logs: int, trigger_logs: int) -> dict[str, str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW_", "ANTHROPIC_", "OPENLINEAGE_", "PYTEST_"))
        }
        settings = {
            "CORE__DAGS_FOLDER": self.dags_folder,
            "CORE__PLUGINS_FOLDER": self.home / "plugins",
            "CORE__LOAD_EXAMPLES": False,
            "CORE__DAGS_ARE_PAUSED_AT_CREATION": False,
            "CORE__DEFAULT_TASK_RETRY_DELAY": 5,  # Airflow's own is five minutes
            "CORE__EXECUTOR": "LocalExecutor",
            "CORE__PARALLELISM": 4,  # two cores
            "CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
            "CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "DATABASE__SQL_ALCHEMY_CONN": with_airflows_driver(self.metadata.url),
            "API__HOST": "127.0.0.1",
            "API__PORT": api,
            "API__BASE_URL": self.url,
            "API__SECRET_KEY": secrets.token_hex(16),
            "API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "LOGGING__WORKER_LOG_SERVER_PORT": worker_logs,
            "LOGGING__TRIGGER_LOG_SERVER_PORT": trigger_logs,
            # a person can wait 5 seconds for the next step, a suite cannot
            "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": 0.2,
            "SCHEDULER__SCHEDULER_HEARTBEAT_SEC": 1,
            "SCHEDULER__JOB_HEARTBEAT_SEC": 2,
            "SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": 2,
            "TRIGGERER__JOB_HEARTBEAT_SEC": 1,
            "DAG_PROCESSOR__PARSING_PROCESSES": 1,
            "DAG_PROCESSOR__REFRESH_INTERVAL": 10,
            "DAG_PROCESSOR__BUNDLE_REFRESH_CHECK_INTERVAL": 1,
        }
        return {
            **inherited,
            # standalone starts its parts by the name `airflow`
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]),
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
            "AIRFLOW_HOME": str(self.home),
            **{f"AIRFLOW__{name}": str(value) for name, value in settings.items()},
            **self.env,
        }

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.startup_seconds
        health: Any = "no answer yet"
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"it exited with code {self._process.returncode if self._process else None}")
            with contextlib.suppress(httpx.TransportError):
                answer = self._client.get(f"{self.url}/api/v2/monitor/health")
                health = answer.json() if answer.is_success else answer.text
                if isinstance(health, dict) and all(
                    (health.get(name) or {}).get("status") == "healthy"
                    for name in ("metadatabase", "scheduler", "triggerer", "dag_processor")
                ):
                    return
            time.sleep(0.25)
        raise TimeoutError(f"it was not healthy after {self.startup_seconds} seconds: {health}")

    def _log_in(self) -> None:
        answer = self._client.post(f"{self.url}/auth/token", json={"username": self.user, "password": self.password})
        answer.raise_for_status()
        self._client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"

    def _end(self) -> None:
        process = self._process
        if process is not None:
            family = _family(process.pid)
            # to the parent alone: it ends its parts in 10 seconds; interrupted all at once they took longer than 30
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.shutdown_seconds)
            # whatever of our own is still there, also a part that put itself into a group of its own
            for member in psutil.wait_procs(family, timeout=2)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._process = None
        self._client.close()
        if self._output is not None:
            self._output.close()
        if not self.keep_home:
            shutil.rmtree(self.home, ignore_errors=True)

    def log_tail(self, lines: int = 60) -> str:
        """The last lines of what the components printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else "(no log)"

    @property
    def token(self) -> str:
        """The JWT of the logged-in user: a bearer token for the API, and the value of the UI's ``_token`` cookie."""
        return self._client.headers["Authorization"].removeprefix("Bearer ")

    # the REST API

    def request(self, method: str, path: str, **options: Any) -> Any:
        """Call ``/api/v2`` + ``path`` as the logged-in user; gives the JSON, or None for an empty answer.

        Raises HTTPStatusError with the API's words, and with the end of Airflow's log where the fault is the server's.
        """
        answer = self._client.request(method, f"{self.url}/api/v2{path}", **options)
        if not answer.is_success:
            words = f"{method} {path}: {answer.status_code} {answer.text[:2000]}"
            if answer.is_server_error:
                time.sleep(1)  # it answers first and logs the exception afterwards
                words += f"\nAirflow's log ends with:\n{self.log_tail()}"
            raise httpx.HTTPStatusError(words, request=answer.request, response=answer)
        return answer.json() if answer.content else None

    def get(self, path: str, **params: Any) -> Any:
        """``request`` with GET and query parameters."""
        return self.request("GET", path, params=params)

    def wait_for_dag(self, dag_id: str, timeout: float = 60) -> None:
        """Wait until the DAG is parsed. Raises at once when its file does not import."""

        def parsed() -> bool | None:
            try:
                self.get(f"/dags/{dag_id}")
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.NOT_FOUND:
                    raise
                if errors := self.import_errors():
                    raise AssertionError(f"the DAG {dag_id} is not there, and files do not import: {errors}") from None
                return None
            return True

        _wait(parsed, timeout, lambda: f"the DAG {dag_id} to be parsed")

    def trigger_dag(self, dag_id: str, conf: Mapping[str, Any] | None = None) -> str:
        """Start a run of a DAG, waiting until it is parsed; gives the run's id."""
        self.wait_for_dag(dag_id)
        run = self.request("POST", f"/dags/{dag_id}/dagRuns", json={"logical_date": None, "conf": dict(conf or {})})
        return str(run["dag_run_id"])

    def wait_for_scheduled_run(self, dag_id: str, timeout: float = 60) -> str:
        """The id of the first run that the scheduler made by the DAG's own schedule; DAGs start unpaused here."""
        return self.wait_for_run_of_type(dag_id, "scheduled", timeout)

    def wait_for_run_of_type(self, dag_id: str, run_type: str, timeout: float = 60) -> str:
        """The id of the first run that the scheduler made: ``scheduled``, or ``asset_triggered`` after an asset's event."""

        def made() -> str | None:
            with contextlib.suppress(httpx.HTTPStatusError):  # 404 until the DAG is parsed
                for run in self.get(f"/dags/{dag_id}/dagRuns", run_type=run_type)["dag_runs"]:
                    return str(run["dag_run_id"])
            return None

        return _wait(made, timeout, lambda: f"a run of {dag_id} of type {run_type}; import errors: {self.import_errors()}")

    def run_state(self, dag_id: str, run_id: str) -> str:
        """``queued``, ``running``, ``success`` or ``failed``."""
        return str(self.get(f"/dags/{dag_id}/dagRuns/{run_id}")["state"])

    def wait_for_run(self, dag_id: str, run_id: str, timeout: float = 180) -> str:
        """Wait until a run has ended; gives ``success`` or ``failed``. Raises TimeoutError with the tasks' states."""

        def ended() -> str | None:
            state = self.run_state(dag_id, run_id)
            return state if state in FINAL_RUN_STATES else None

        return _wait(ended, timeout, lambda: f"the run {run_id} of {dag_id} to end; {self._troubles(dag_id, run_id)}")

    def wait_for_task(self, dag_id: str, run_id: str, task_id: str, *states: str, timeout: float = 120) -> str:
        """Wait until a task is in one of ``states`` (``deferred``, ``success`` …); gives that state."""

        def reached() -> str | None:
            state = self.task_states(dag_id, run_id).get(task_id)
            return state if state in states else None

        return _wait(reached, timeout, lambda: f"{task_id} of {run_id} to be in {states}; {self._troubles(dag_id, run_id)}", poll=0.1)

    def _troubles(self, dag_id: str, run_id: str) -> str:
        """The tasks' states, and the end of the logs of those that failed."""
        states = self.task_states(dag_id, run_id)
        logs = [
            f"\n{task} attempt 1:\n" + "\n".join(self.task_log(dag_id, run_id, task, 1).splitlines()[-25:])
            for task, state in states.items()
            if state in ("failed", "up_for_retry")
        ]
        return f"its tasks: {states}{''.join(logs)}"

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """The task instances of a run as the API gives them: ``task_id``, ``map_index``, ``state``, ``try_number``, times and more."""
        return list(self.get(f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances", limit=100)["task_instances"])

    def task_states(self, dag_id: str, run_id: str) -> dict[str, str | None]:
        """State per task id; a mapped task's are under ``task_id[map_index]``."""
        return {
            task["task_id"] + (f"[{task['map_index']}]" if task["map_index"] >= 0 else ""): task["state"]
            for task in self.task_instances(dag_id, run_id)
        }

    def xcom(self, dag_id: str, run_id: str, task_id: str, key: str = "return_value", map_index: int = -1) -> Any:
        """The value of one XCom entry. Raises HTTPStatusError (404) where there is none."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}"
        return self.get(path, map_index=map_index, deserialize=False, stringify=False)["value"]

    def task_state_store(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> dict[str, Any]:
        """What a task keeps in its state store (the page's Storage tab), value per key. Airflow 3.3 and later."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/state-store"
        return {entry["key"]: entry["value"] for entry in self.get(path, map_index=map_index)["task_state_store"]}

    def console_link(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str:
        """Where the task instance's button ``Claude Console`` leads to."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/links"
        return str(self.get(path, map_index=map_index)["extra_links"]["Claude Console"] or "")

    def task_log(self, dag_id: str, run_id: str, task_id: str, try_number: int = 1, map_index: int = -1) -> str:
        """The log of one try, one line per event, without its structured fields."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
        content = self.get(path, map_index=map_index, full_content=True)["content"]
        return "\n".join(event["event"] if isinstance(event, dict) else str(event) for event in content)

    def clear_tasks(self, dag_id: str, run_id: str, task_ids: Sequence[str], *, downstream: bool = False) -> list[str]:
        """Clear tasks of a run, so that they run again; gives the task ids that were cleared."""
        cleared = self.request(
            "POST",
            f"/dags/{dag_id}/clearTaskInstances",
            json={
                "dry_run": False,
                "dag_run_id": run_id,
                "task_ids": list(task_ids),
                "only_failed": False,
                "include_downstream": downstream,
                "reset_dag_runs": True,
            },
        )
        return [task["task_id"] for task in cleared["task_instances"]]

    def pool(self, name: str = "default_pool") -> dict[str, Any]:
        """A pool's slots: ``slots``, ``open_slots``, ``occupied_slots``, ``running_slots``, ``deferred_slots`` and more."""
        return dict(self.get(f"/pools/{name}"))

    def import_errors(self) -> dict[str, str]:
        """Stack trace per DAG file that does not import."""
        return {error["filename"]: error["stack_trace"] for error in self.get("/importErrors")["import_errors"]}

    def asset_events(self, **filters: Any) -> list[dict[str, Any]]:
        """Asset events, newest last: ``name``, ``extra``, ``source_dag_id`` and more. Filters are the API's, such as ``source_run_id``.

        Airflow 3.3.2 answers 500 as long as a run that one of them triggered is queued, because that has no start date yet
        (https://github.com/apache/airflow/issues/71360). So a 500 is asked again, for at most 30 seconds.
        """
        deadline = time.monotonic() + 30
        while True:
            try:
                return list(self.get("/assets/events", order_by="timestamp", limit=100, **filters)["asset_events"])
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.INTERNAL_SERVER_ERROR or time.monotonic() > deadline:
                    raise
            time.sleep(0.25)

    def task_page(self, dag_id: str, run_id: str, task_id: str, tab: str = "") -> str:
        """The UI address of a task instance, or of one of its tabs: ``xcom``, ``details``, ``task-state-store`` (Storage) and so on."""
        return f"{self.url}/dags/{dag_id}/runs/{run_id}/tasks/{task_id}" + (f"/{tab}" if tab else "")


def with_airflows_driver(url: str) -> str:
    """The SQLAlchemy URL of a metadata database, with the driver that comes with Airflow's PostgreSQL provider."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg2")
    return parsed.render_as_string(hide_password=False)


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on now, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _family(pid: int) -> list[psutil.Process]:
    """A process and all below it, as they are now."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _wait(condition: Callable[[], _T | None], timeout: float, what: Callable[[], str], poll: float = 0.25) -> _T:
    """Call ``condition`` until it gives something; after ``timeout`` seconds, raise with what was waited for."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value is not None:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} seconds for {what()}")
        time.sleep(poll)

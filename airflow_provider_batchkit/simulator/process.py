"""The simulator as a process of its own, for tests that kill clients and for demos."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import msgspec

from .settings import SimulatorSettings

STOP_SECONDS = 10.0
CALL_SECONDS = 60.0


class RemoteFaults:
    """The fault list of a simulator in another process."""

    def __init__(self, control: RemoteControl) -> None:
        self._control = control

    def add(self, kind: str, **fields: Any) -> None:
        """Adds a fault; the fields are those of ``Fault``. Raises ValueError for an unknown name or a value out of range."""
        self._control.call("POST", "faults", {"kind": kind, **fields})

    def clear(self) -> None:
        self._control.call("DELETE", "faults")


class RemoteControl:
    """The controls of a simulator at ``base_url``, which is also the URL for ``anthropic.Anthropic(base_url=…)``."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.faults = RemoteFaults(self)
        self._opener = build_opener(ProxyHandler({}))  # a proxy from the environment must not be used for loopback

    @property
    def port(self) -> int:
        return int(self.base_url.rpartition(":")[2])

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One control call; raises ValueError with the simulator's message when it refuses, OSError when it does not answer."""
        data = None if body is None else msgspec.json.encode(body)
        request = Request(f"{self.base_url}/_sim/{path}", data, method=method)  # noqa: S310 - base_url is our own loopback server
        try:
            with self._opener.open(request, timeout=CALL_SECONDS) as answer:
                return msgspec.json.decode(answer.read())
        except HTTPError as error:
            raise ValueError(error.read().decode()) from error

    def stats(self) -> dict[str, Any]:
        """Calls, accepted batches and the bill; see the package's docstring."""
        return self.call("GET", "stats")  # type: ignore[no-any-return]

    def custom_ids(self, batch_id: str) -> list[str]:
        """The custom_ids of a batch in the order asked."""
        return self.call("GET", f"requests?batch={batch_id}")["custom_ids"]  # type: ignore[no-any-return]

    def set(self, **changes: Any) -> None:
        """Changes settings by name. Raises ValueError."""
        self.call("POST", "settings", changes)

    def end(self, batch_id: str) -> None:
        """Ends a batch as scripted. A batch that is being canceled ends with its requests canceled."""
        self.call("POST", f"batches/{batch_id}/end")

    def expire(self, batch_id: str) -> None:
        """Ends a batch; all requests that were not done expire."""
        self.call("POST", f"batches/{batch_id}/expire")

    def archive(self, batch_id: str) -> None:
        """Ends a batch if it still runs, and drops its results."""
        self.call("POST", f"batches/{batch_id}/archive")

    def hide(self, batch_id: str, *, seconds: float = 0.0, calls: int = 0) -> None:
        """Hides a batch: the list leaves it out and its id answers 404, for ``calls`` where that is above 0, else for ``seconds``."""
        self.call("POST", f"batches/{batch_id}/hide", {"seconds": seconds, "calls": calls})

    def advance(self, seconds: float) -> None:
        """Moves the simulator's clock forward."""
        self.call("POST", "advance", {"seconds": seconds})


class SimulatorProcess(RemoteControl):
    """A simulator in a process of its own, for a ``with`` block: it is started, waited for, and ended by its pid.

    It takes the parameters of ``Simulator``, and ends itself when this process dies. Raises RuntimeError when it does not start.
    """

    def __init__(self, settings: SimulatorSettings | None = None, *, port: int = 0, **changes: Any) -> None:
        super().__init__("")
        self._settings = (settings or SimulatorSettings()).changed(changes)
        self._port = port
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process and returns when it accepts connections."""
        command = [sys.executable, "-m", __package__, "--port", str(self._port), "--exit-with-parent", str(os.getpid())]
        command += ["--settings", msgspec.json.encode(self._settings).decode()]
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        environment = {**os.environ, "PYTHONPATH": path}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603 - our own module
        self.base_url = self._process.stdout.readline().strip() if self._process.stdout else ""
        if not self.base_url:
            raise RuntimeError(f"the simulator ended with exit code {self._process.wait()} before it listened; its reason is on stderr")

    def stop(self) -> None:
        """Ends the process: SIGTERM, then SIGKILL after 10 seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    @property
    def pid(self) -> int:
        """Process id; raises RuntimeError when it is not running."""
        if self._process is None:
            raise RuntimeError("the simulator is not running")
        return self._process.pid

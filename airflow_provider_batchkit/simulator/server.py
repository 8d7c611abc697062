"""The simulator as an object of this process: a server on a thread, its stats, its faults, its controls."""

from __future__ import annotations

import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from http.server import ThreadingHTTPServer
from typing import Any, Self

import msgspec

from .errors import ApiError
from .faults import Fault, FaultList
from .handler import Handler
from .settings import SimulatorSettings
from .store import Spell, Store

#: How soon a stop is noticed.
POLL_SECONDS = 0.02


class Core:
    """State and controls of one simulator, shared by all its connections."""

    def __init__(self, settings: SimulatorSettings, faults: Iterable[Fault]) -> None:
        self.store = Store(settings)
        self.faults = FaultList(faults, settings.seed)
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()

    def count(self, endpoint: str) -> None:
        with self._lock:
            self._calls[endpoint] += 1

    def count_status(self, status: int) -> None:
        """Counts an answer; 0 stands for a connection that was cut."""
        with self._lock:
            self._statuses[str(status) if status else "cut"] += 1

    def stats(self) -> dict[str, Any]:
        """What ``GET /_sim/stats`` answers; see the package's docstring."""
        with self._lock:
            calls, statuses = dict(self._calls), dict(self._statuses)
        counts = {"calls": calls, "statuses": statuses, "posts": calls.get("create", 0)}
        return {**counts, **self.store.stats(), "faults": self.faults.as_json()}

    def set(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Changes settings and gives all of them. Raises ValueError."""
        self.store.settings = self.store.settings.changed(changes)
        return msgspec.structs.asdict(self.store.settings)

    def control(self, method: str, path: str, query: dict[str, str], body: bytes) -> dict[str, Any]:
        """Carries out one control call. Raises ApiError (404) and ValueError."""
        match method, path.split("/"):
            case "GET", ["stats"]:
                return self.stats()
            case "GET", ["requests"]:
                return {"custom_ids": self.store.custom_ids(query.get("batch", ""))}
            case "POST", ["faults"]:
                fields = msgspec.json.decode(body, type=dict[str, Any])
                self.faults.add(str(fields.pop("kind", "")), **fields)
                return {"faults": self.faults.as_json()}
            case "DELETE", ["faults"]:
                self.faults.clear()
                return {"faults": []}
            case "GET", ["settings"]:
                return self.set({})
            case "POST", ["settings"]:
                return self.set(msgspec.json.decode(body, type=dict[str, Any]))
            case "POST", ["advance"]:
                return {"now": self.store.advance(msgspec.json.decode(body, type=dict[str, float])["seconds"])}
            case "POST", ["batches", batch_id, ("end" | "expire" | "archive" | "hide") as how]:
                hides = how == "hide"
                batch = self.store.hide(batch_id, msgspec.json.decode(body, type=Spell)) if hides else self.store.finish(batch_id, how)
                return batch.as_json("")
        raise ApiError(404, f"no control {method} /_sim/{path}")


class Server(ThreadingHTTPServer):
    """One thread per connection, on 127.0.0.1 only; knows its open connections, to end them when it stops."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512
    allow_reuse_address = True

    def __init__(self, core: Core, port: int) -> None:
        self.core = core
        self.open: set[Any] = set()
        #: connections that are to be closed with a reset
        self.resets: set[Any] = set()
        super().__init__(("127.0.0.1", port), Handler)
        self.netloc = f"127.0.0.1:{self.server_port}"

    def server_bind(self) -> None:
        """Binds without the reverse look-up of the host name that the base class does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        if request in self.resets:
            self.resets.discard(request)
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error here; anything else is printed by the base class."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Simulator:
    """A Message Batches API on 127.0.0.1, on a thread of this process, for a ``with`` block.

    ``settings``, then ``changes`` to single fields of it by name: ``Simulator(clock="manual", output_tokens=100)``. ``port`` 0 takes a
    free one. Raises ValueError for bad settings and OSError for a taken port.
    """

    def __init__(self, settings: SimulatorSettings | None = None, *, port: int = 0, faults: Iterable[Fault] = (), **changes: Any) -> None:
        self._core = Core((settings or SimulatorSettings()).changed(changes), faults)
        self._server = Server(self._core, port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_SECONDS,), name="simulator", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts serving; the port is bound already."""
        self._thread.start()

    def stop(self) -> None:
        """Stops serving and closes all connections, also those in the middle of an answer."""
        self._core.stopping.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        for connection in list(self._server.open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def base_url(self) -> str:
        """For ``anthropic.Anthropic(base_url=…)``."""
        return f"http://{self._server.netloc}"

    @property
    def settings(self) -> SimulatorSettings:
        return self._core.store.settings

    @property
    def faults(self) -> FaultList:
        """``add(kind, **fields)``, ``clear()``."""
        return self._core.faults

    def stats(self) -> dict[str, Any]:
        """Calls, accepted batches and the bill, as ``GET /_sim/stats`` answers them."""
        return self._core.stats()

    def custom_ids(self, batch_id: str) -> list[str]:
        """The custom_ids of a batch in the order asked."""
        return self._core.store.custom_ids(batch_id)

    def set(self, **changes: Any) -> None:
        """Changes settings by name. Raises ValueError."""
        self._core.set(changes)

    def end(self, batch_id: str) -> None:
        """Ends a batch as scripted; a canceling one with its requests canceled."""
        self._core.store.finish(batch_id, "end")

    def expire(self, batch_id: str) -> None:
        """Ends a batch with all requests expired that were not done."""
        self._core.store.finish(batch_id, "expire")

    def archive(self, batch_id: str) -> None:
        """Ends a batch if need be and takes its results away."""
        self._core.store.finish(batch_id, "archive")

    def hide(self, batch_id: str, *, seconds: float = 0.0, calls: int = 0) -> None:
        """Hides a batch from the list and behind a 404, for ``calls`` where that is above 0, else for ``seconds``."""
        self._core.store.hide(batch_id, Spell(seconds, calls))

    def advance(self, seconds: float) -> None:
        """Moves the simulator's clock forward."""
        self._core.store.advance(seconds)

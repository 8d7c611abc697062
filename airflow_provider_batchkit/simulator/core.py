"""State and controls of one simulator, and the server socket that accepts its connections."""

from __future__ import annotations

import socket
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from .errors import ApiError
from .faults import FaultList
from .settings import SimulatorSettings
from .store import Spell, Store


class Core:
    """State and controls of one simulator, shared by all its connections."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self.store = Store(settings)
        self.faults = FaultList(settings.seed)
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
    """Runs one thread per connection, on 127.0.0.1 only. It keeps its open connections, to end them when it stops."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512
    allow_reuse_address = True

    def __init__(self, core: Core, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.core = core
        self.open: set[Any] = set()
        #: connections that are to be closed with a reset
        self.resets: set[Any] = set()
        super().__init__(("127.0.0.1", port), handler)
        self.netloc = f"127.0.0.1:{self.server_port}"

    def server_bind(self) -> None:
        """Binds without the reverse lookup of the host name that the base class does."""
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
        """Ignores a client that has gone away; the base class prints any other error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

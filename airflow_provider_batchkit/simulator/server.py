"""The simulator as an object in this process: a server on a thread, with its stats, faults and controls."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable
from typing import Any, Self

from .core import Core, Server
from .faults import Fault, FaultList
from .handler import Handler
from .settings import SimulatorSettings
from .store import Spell

#: Seconds within which a stop is noticed.
POLL_SECONDS = 0.02


class Simulator:
    """A Message Batches API on 127.0.0.1, on a thread of this process, for a ``with`` block.

    It takes ``settings``, and ``changes`` to single fields by name: ``Simulator(clock="manual", output_tokens=100)``. ``port`` 0 takes a
    free port. Raises ValueError for bad settings and OSError for a taken port.
    """

    def __init__(self, settings: SimulatorSettings | None = None, *, port: int = 0, faults: Iterable[Fault] = (), **changes: Any) -> None:
        self._core = Core((settings or SimulatorSettings()).changed(changes), faults)
        self._server = Server(self._core, port, Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_SECONDS,), name="simulator", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts serving on the port, which is bound already."""
        self._thread.start()

    def stop(self) -> None:
        """Stops serving and closes all connections, even those in the middle of an answer."""
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
        """The URL for ``anthropic.Anthropic(base_url=…)``."""
        return f"http://{self._server.netloc}"

    @property
    def settings(self) -> SimulatorSettings:
        return self._core.store.settings

    @property
    def faults(self) -> FaultList:
        """The list of faults, with ``add(kind, **fields)`` and ``clear()``."""
        return self._core.faults

    def stats(self) -> dict[str, Any]:
        """Calls, accepted batches and the bill, as ``GET /_sim/stats`` gives them."""
        return self._core.stats()

    def custom_ids(self, batch_id: str) -> list[str]:
        """The custom_ids of a batch in the order asked."""
        return self._core.store.custom_ids(batch_id)

    def set(self, **changes: Any) -> None:
        """Changes settings by name. Raises ValueError."""
        self._core.set(changes)

    def end(self, batch_id: str) -> None:
        """Ends a batch as scripted. A batch that is being canceled ends with its requests canceled."""
        self._core.store.finish(batch_id, "end")

    def expire(self, batch_id: str) -> None:
        """Ends a batch; all requests that were not done expire."""
        self._core.store.finish(batch_id, "expire")

    def archive(self, batch_id: str) -> None:
        """Ends a batch if it still runs, and drops its results."""
        self._core.store.finish(batch_id, "archive")

    def hide(self, batch_id: str, *, seconds: float = 0.0, calls: int = 0) -> None:
        """Hides a batch: the list leaves it out and its id answers 404, for ``calls`` where that is above 0, else for ``seconds``."""
        self._core.store.hide(batch_id, Spell(seconds, calls))

    def advance(self, seconds: float) -> None:
        """Moves the simulator's clock forward."""
        self._core.store.advance(seconds)

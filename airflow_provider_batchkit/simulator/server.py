"""The simulator as an object in this process: a server on a thread."""

from __future__ import annotations

import socket
import threading
from typing import Any, Self

from .core import Core, Server
from .handler import Handler
from .process import RemoteControl
from .settings import SimulatorSettings

#: Seconds within which a stop is noticed.
POLL_SECONDS = 0.02


class Simulator(RemoteControl):
    """A Message Batches API on 127.0.0.1, on a thread of this process, for a ``with`` block.

    It takes ``settings``, and ``changes`` to single fields by name: ``Simulator(clock="manual", output_tokens=100)``. ``port`` 0 takes a
    free port. Raises ValueError for bad settings and OSError for a taken port.
    """

    def __init__(self, settings: SimulatorSettings | None = None, *, port: int = 0, **changes: Any) -> None:
        self._core = Core((settings or SimulatorSettings()).changed(changes))
        self._server = Server(self._core, port, Handler)
        super().__init__(f"http://{self._server.netloc}")
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

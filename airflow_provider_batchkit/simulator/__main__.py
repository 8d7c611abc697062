"""``python -m airflow_provider_batchkit.simulator``: prints its base URL, serves until SIGTERM or SIGINT, exits 0."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from .server import Simulator
from .settings import SimulatorSettings

PARENT_POLL_SECONDS = 0.5


def parser() -> argparse.ArgumentParser:
    """All flags."""
    root = argparse.ArgumentParser(prog="airflow_provider_batchkit.simulator", description=__doc__)
    root.add_argument("--port", type=int, default=0, help="TCP port on 127.0.0.1; 0 takes a free one")
    root.add_argument("--exit-with-parent", type=int, metavar="PID", help="end when the parent process, PID, is gone")
    root.add_argument("--settings", default="{}", metavar="JSON", help="settings by name, see SimulatorSettings")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the simulator and returns the exit code: 0 after a signal, 2 for flags that are not valid."""
    root = parser()
    given = root.parse_args(argv)
    try:
        settings = SimulatorSettings().changed(msgspec.json.decode(given.settings, type=dict[str, Any]))
    except (ValueError, msgspec.MsgspecError) as error:
        root.error(str(error))
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with Simulator(settings, port=given.port) as simulator:
        print(simulator.base_url, flush=True)
        while not ended.wait(PARENT_POLL_SECONDS) and given.exit_with_parent in (None, os.getppid()):
            pass
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m airflow_provider_batchkit.simulator``: prints its base URL, serves until SIGTERM or SIGINT, exits 0."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from .faults import Fault
from .server import Simulator
from .settings import SimulatorSettings

PARENT_POLL_SECONDS = 0.5


def parser() -> argparse.ArgumentParser:
    """All flags. The flags of settings have no defaults here: a flag that is not given keeps the default of ``SimulatorSettings``."""
    root = argparse.ArgumentParser(prog="airflow_provider_batchkit.simulator", description=__doc__, argument_default=argparse.SUPPRESS)
    process = root.add_argument_group("process")
    process.add_argument("--port", type=int, default=0, help="TCP port on 127.0.0.1; 0 takes a free one")
    process.add_argument("--port-file", type=Path, default=None, metavar="F", help="file that gets the port number once it listens")
    process.add_argument(
        "--exit-with-parent", type=int, nargs="?", const=0, default=None, metavar="PID", help="end when the parent process (PID) is gone"
    )
    process.add_argument("--fault", action="append", default=[], metavar="JSON", help='repeatable: {"kind": "cut_after_accept", …}')
    process.add_argument("--settings", default="{}", metavar="JSON", help="settings by name; the flags below win over it")
    flags = root.add_argument_group("settings")
    flags.add_argument("--clock", help="instant, polls:N, seconds:S, seconds:S-T or manual")
    flags.add_argument("--key", action="append", metavar="KEY=WORKSPACE", help="repeatable: a valid API key and its workspace")
    flags.add_argument("--strict-params", action="store_true", help="refuse a whole batch for one request's bad params")
    flags.add_argument("--once", action="store_true", help="the rates strike a prompt text only the first time")
    for name in ("skew-seconds", "errored", "expired", "canceled", "done-share"):
        flags.add_argument(f"--{name}", type=float)
    for name in (
        "seed",
        "input-tokens",
        "output-tokens",
        "answer-tokens",
        "web-searches",
        "cache-min-tokens",
        "cache-concurrency",
        "cancel-looks",
        "max-body-bytes",
        "max-requests",
    ):
        flags.add_argument(f"--{name}", type=int)
    return root


def settings_from(options: dict[str, Any]) -> SimulatorSettings:
    """Settings from the parsed flags. Raises ValueError."""
    given = msgspec.json.decode(options["settings"], type=dict[str, Any])
    given |= {name: value for name, value in options.items() if name in SimulatorSettings.__struct_fields__}
    if "key" in options:
        pairs = [text.partition("=") for text in options["key"]]
        given["keys"] = {key: workspace or "default" for key, _, workspace in pairs}
    return SimulatorSettings().changed(given)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the simulator and returns the exit code: 0 after a signal, 2 for flags that are not valid."""
    root = parser()
    options = vars(root.parse_args(argv))
    try:
        settings = settings_from(options)
        faults = [msgspec.json.decode(text, type=Fault) for text in options["fault"]]
    except (ValueError, msgspec.MsgspecError) as error:
        root.error(str(error))
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    parent = os.getppid() if options["exit_with_parent"] == 0 else options["exit_with_parent"]
    with Simulator(settings, port=options["port"], faults=faults) as simulator:
        if options["port_file"] is not None:
            _write_whole(options["port_file"], f"{simulator.port}\n")
        print(simulator.base_url, flush=True)
        while not ended.wait(PARENT_POLL_SECONDS):
            if parent is not None and os.getppid() != parent:
                break
    return 0


def _write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees either nothing or the whole text."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())

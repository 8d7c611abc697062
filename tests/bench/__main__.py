"""``make bench``: each figure beside the official provider's, in one run, on one simulator process.

Every measurement is a process of its own, so that imports and peaks do not mix; the sides take turns, and the table shows medians.
The figures go to the terminal and to ``.bench.json``, which is not committed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from tests.bench import polling


def measure(side: str, what: str, simulator: str, folder: Path, rows: int) -> dict[str, Any]:
    """One measurement in a fresh process; see ``tests.bench.sides``."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.sides",
        side,
        what,
        "--simulator",
        simulator,
        "--folder",
        str(folder),
        "--rows",
        str(rows),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} {what} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def pair(what: str, rows: int, rounds: int) -> dict[str, Any]:
    """Medians of both sides for one piece of work, and the official provider's share of CPU time over ours."""
    runs: dict[str, list[dict[str, Any]]] = {"batchkit": [], "official": []}
    with SimulatorProcess(SimulatorSettings(input_tokens=2700, output_tokens=100)) as simulator:
        for _ in range(rounds):
            for side, results in runs.items():
                with tempfile.TemporaryDirectory() as folder:
                    results.append(measure(side, what, simulator.base_url, Path(folder), rows))
    line: dict[str, Any] = {"what": what, "rows": rows}
    for side, results in runs.items():
        for figure in ("seconds", "cpu_seconds", "peak_mb_over_base"):
            line[f"{side} {figure}"] = round(statistics.median(r[figure] for r in results), 2)
    line["cpu ratio"] = round(line["official cpu_seconds"] / line["batchkit cpu_seconds"], 2)
    return line


def cuts(times: int) -> dict[str, Any]:
    """Batches that exist after the connection was cut ``times`` times after acceptance, for one batch that was wanted."""
    line: dict[str, Any] = {"what": "cut after acceptance", "cuts": times}
    for side in ("batchkit", "official"):
        with SimulatorProcess() as simulator, tempfile.TemporaryDirectory() as folder:
            simulator.faults.add("cut_after_accept", times=times)
            measure(side, "cut", simulator.base_url, Path(folder), 3)
            line[f"{side} batches"] = simulator.stats()["batches_accepted"]
    return line


def show(lines: list[dict[str, Any]]) -> None:
    """A table of lines that have the same columns."""
    columns = list(lines[0])
    cells = [columns, *([f"{line[c]:,}" if isinstance(line[c], int | float) else str(line[c]) for c in columns] for line in lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print("\n" + "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells), flush=True)


def main() -> int:
    """Measure, print, write ``.bench.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="sizes (1000000 takes minutes a round)")
    parser.add_argument("--rounds", type=int, default=3, help="runs per side, of which the median counts")
    args = parser.parse_args()
    doubt = [cuts(times) for times in (1, 2, 5)]
    show(doubt)
    work = [pair(what, rows, args.rounds) for rows in args.rows for what in ("submit", "fetch")]
    show(work)
    waits = polling.compare(args.rounds)
    show(waits)
    Path(".bench.json").write_text(json.dumps(doubt + work + waits, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

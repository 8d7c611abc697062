"""``make bench``: each figure beside the official provider's, in one run, on one simulator process.

Every measurement is a process of its own, so that imports and peaks do not mix; the sides take turns, and the table shows medians.
The figures go to the terminal and to ``.bench.json``, which is not committed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings
from tests.bench import polling
from tests.databases import Database, postgres_database, running_postgres, sqlite_database

#: above this the official provider's side is left out: it takes minutes a run, and gigabytes for its list
OFFICIAL_ROWS = 100_000
WORK = ("cut", "submit", "fetch", "typed", "wait")


def measure(side: str, what: str, simulator: str, database: Database, rows: int) -> dict[str, Any]:
    """One measurement in a fresh process; see ``tests.bench.sides``."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.sides",
        side,
        what,
        "--simulator",
        simulator,
        "--url",
        database.url,
        "--airflow-uri",
        database.airflow_uri,
        "--rows",
        str(rows),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} {what} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextlib.contextmanager
def fresh(postgres: str | None) -> Iterator[Database]:
    """An empty database: a SQLite file, or a new one on the server ``postgres``."""
    if postgres is not None:
        with postgres_database(postgres) as database:
            yield database
        return
    with tempfile.TemporaryDirectory() as folder:
        yield sqlite_database(Path(folder) / "warehouse.db")


def pair(what: str, rows: int, rounds: int, postgres: str | None = None) -> dict[str, Any]:
    """Medians of both sides for one piece of work, and the official provider's seconds and CPU time as multiples of ours."""
    runs: dict[str, list[dict[str, Any]]] = {"batchkit": [], "official": []}
    with SimulatorProcess(SimulatorSettings(input_tokens=2700, output_tokens=100)) as simulator:
        for _ in range(rounds):
            for side, results in runs.items():
                if side == "official" and rows > OFFICIAL_ROWS:
                    continue
                with fresh(postgres) as database:
                    results.append(measure(side, what, simulator.base_url, database, rows))
    line: dict[str, Any] = {"what": what, "database": "sqlite" if postgres is None else "postgres", "rows": rows}
    for side, results in runs.items():
        for figure in ("seconds", "cpu_seconds", "peak_mb_over_base"):
            line[f"{side} {figure}"] = round(statistics.median(r[figure] for r in results), 2) if results else "not run"
    for ratio, figure in (("times faster", "seconds"), ("cpu ratio", "cpu_seconds")):
        line[ratio] = round(line[f"official {figure}"] / line[f"batchkit {figure}"], 2) if runs["official"] else "not run"
    return line


def typed(rows: int, rounds: int, postgres: str | None = None) -> dict[str, Any]:
    """Medians of a fetch of plain text and of one into six typed columns, and the speed of the second in parts of the first's."""
    runs: dict[str, list[dict[str, Any]]] = {"batchkit": [], "typed": []}
    with SimulatorProcess(SimulatorSettings(input_tokens=2700, output_tokens=100)) as simulator:
        for _ in range(rounds):
            for side, results in runs.items():
                with fresh(postgres) as database:
                    results.append(measure(side, "fetch", simulator.base_url, database, rows))
    line: dict[str, Any] = {"what": "typed fetch", "database": "sqlite" if postgres is None else "postgres", "rows": rows}
    for name, side in (("plain", "batchkit"), ("typed", "typed")):
        for figure in ("seconds", "cpu_seconds", "peak_mb_over_base"):
            line[f"{name} {figure}"] = round(statistics.median(r[figure] for r in runs[side]), 2)
    for ratio, figure in (("speed", "seconds"), ("cpu speed", "cpu_seconds")):
        line[ratio] = round(line[f"plain {figure}"] / line[f"typed {figure}"], 2)
    return line


def cuts(times: int) -> dict[str, Any]:
    """Batches that exist after the connection was cut ``times`` times after acceptance, for one batch that was wanted."""
    line: dict[str, Any] = {"what": "cut after acceptance", "cuts": times}
    for side in ("batchkit", "official"):
        with SimulatorProcess() as simulator, fresh(None) as database:
            simulator.faults.add("cut_after_accept", times=times)
            measure(side, "cut", simulator.base_url, database, 3)
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
    parser.add_argument("--what", nargs="+", default=WORK, choices=WORK)
    parser.add_argument("--database", nargs="+", default=["sqlite", "postgres"], choices=("sqlite", "postgres"), help="of fetch and typed")
    args = parser.parse_args()
    tables = []
    if "cut" in args.what:
        tables.append([cuts(times) for times in (1, 2, 5)])
        show(tables[-1])
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_postgres()) if "postgres" in args.database and {"fetch", "typed"} & set(args.what) else None
        places = {"sqlite": None, "postgres": server}
        work = []
        for rows in args.rows:
            if "submit" in args.what:
                work.append(pair("submit", rows, args.rounds))
            if "fetch" in args.what:
                work += [pair("fetch", rows, args.rounds, places[database]) for database in args.database]
        if "typed" in args.what:
            tables.append([typed(rows, args.rounds, places[database]) for rows in args.rows for database in args.database])
            show(tables[-1])
    if work:
        tables.append(work)
        show(work)
    if "wait" in args.what:
        tables.append(polling.compare(args.rounds))
        show(tables[-1])
    Path(".bench.json").write_text(json.dumps([line for table in tables for line in table], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

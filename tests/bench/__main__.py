"""``make bench``: each figure beside the official provider's and common.ai's, in one run, on one simulator process.

Every measurement is a process of its own, so that imports and peaks do not mix; the sides take turns, and the tables show medians.
The figures go to the terminal and to ``.bench.json``, which is not committed.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from airflow_provider_batchkit.simulator import SimulatorProcess
from tests.bench import polling
from tests.bench.sides import SIDES
from tests.bench.turns import turns
from tests.databases import Database, postgres_database, running_postgres, sqlite_database

OURS, *PEERS = polling.SIDES
#: above this the peers are not run: each sends one batch, and the API takes no more requests in one
PEER_ROWS = 100_000
#: what else is measured of a fetch, beside the plain one of the same rows
VARIANTS = ("typed", "duckdb")
WORK = ("cut", "submit", "fetch", *VARIANTS, "wait")


def measure(side: str, step: str, simulator: str, database: Database, folder: Path, rows: int, submitted: Any = None) -> dict[str, Any]:
    """One measurement in a fresh process; see ``tests.bench.sides``."""
    command = [sys.executable, "-m", "tests.bench.sides", side, step, "--simulator", simulator, "--folder", str(folder)]
    command += ["--url", database.url, "--airflow-uri", database.airflow_uri, "--rows", str(rows), "--submitted", json.dumps(submitted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} {step} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextlib.contextmanager
def fresh(postgres: str | None) -> Iterator[tuple[Database, Path]]:
    """An empty database, a SQLite file or a new one on the server ``postgres``, and an empty folder."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = home / "files"
        folder.mkdir()
        if postgres is not None:
            yield stack.enter_context(postgres_database(postgres)), folder
        else:
            yield sqlite_database(home / "warehouse.db"), folder


def compare(sides: Sequence[str], steps: Sequence[str], rows: int, rounds: int, postgres: str | None = None) -> list[dict[str, Any]]:
    """A line for each of ``steps`` and each figure: the sides' medians, and the later sides' as multiples of the first one's."""
    runs = defaultdict[tuple[str, str], list[dict[str, float]]](list)
    # the peers read results from results_url, which the API gives on its own host
    with SimulatorProcess(results_host="") as simulator:
        for side in turns([side for side in sides if side not in PEERS or rows <= PEER_ROWS], rounds):
            with fresh(postgres) as (database, folder):
                done = measure(side, "submit", simulator.base_url, database, folder, rows)
                runs[side, "submit"].append(done["figures"])
                if "fetch" in steps:
                    simulator.stats()  # looks at every batch, as a sensor has when a fetch begins; the first look takes it a while
                    done = measure(side, "fetch", simulator.base_url, database, folder, rows, done["submitted"])
                    runs[side, "fetch"].append(done["figures"])
    lines = []
    for step in steps:
        for figure in runs[sides[0], step][0]:
            line: dict[str, Any] = {"what": step, "database": "sqlite" if postgres is None else "postgres", "rows": rows, "figure": figure}
            medians = {side: statistics.median(run[figure] for run in runs[side, step]) for side in sides if runs[side, step]}
            line |= {side: round(medians[side], 2) if side in medians else "not run" for side in sides}
            line |= {
                f"{side} / {sides[0]}": round(medians[side] / medians[sides[0]], 2) if side in medians and medians[sides[0]] else "-"
                for side in sides[1:]
            }
            lines.append(line)
    return lines


def cuts(times: int) -> dict[str, Any]:
    """Batches that exist after the connection was cut ``times`` times after acceptance, for one batch that was wanted."""
    line: dict[str, Any] = {"what": "batches for one that was wanted", "cuts after acceptance": times}
    for side in (OURS, *PEERS):
        with SimulatorProcess() as simulator, fresh(None) as (database, folder):
            simulator.faults.add("cut_after_accept", times=times)
            measure(side, "cut", simulator.base_url, database, folder, 3)
            line[side] = simulator.stats()["batches_accepted"]
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
    parser.add_argument(
        "--database", nargs="+", default=["sqlite", "postgres"], choices=("sqlite", "postgres"), help="of submit, fetch, typed and duckdb"
    )
    args = parser.parse_args()
    saved = []

    def save(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        saved.extend(lines)
        Path(".bench.json").write_text(json.dumps(saved, indent=1))  # now, since a run that is broken off has measured this all the same
        return lines

    for side in (OURS, *PEERS):
        print(f"{side}: {inspect.getdoc(SIDES[side])}")
    if "cut" in args.what:
        show(save([cuts(times) for times in (1, 2, 5)]))
    steps = [step for step in ("submit", "fetch") if step in args.what]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_postgres()) if "postgres" in args.database and {*steps, *VARIANTS} & {*args.what} else None
        places = [{"sqlite": None, "postgres": server}[database] for database in args.database]
        if steps:
            show(
                [line for rows in args.rows for place in places for line in save(compare((OURS, *PEERS), steps, rows, args.rounds, place))]
            )
        for variant in [variant for variant in VARIANTS if variant in args.what]:
            sides = (OURS, variant)
            show([line for rows in args.rows for place in places for line in save(compare(sides, ["fetch"], rows, args.rounds, place))])
    if "wait" in args.what:
        show(save(polling.compare(args.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line of the randomised crash run."""

from __future__ import annotations

import argparse
import signal
import sys

from tests.crash.chaos.run import run_chaos


def main() -> int:
    """Exit code 1 where the books disagree."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash.chaos", description="A real Airflow whose processes are killed at random moments, and its books."
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite", help="of the rows and the ledger")
    parser.add_argument("--metadata", choices=("sqlite", "postgres"), default="postgres", help="of Airflow itself")
    parser.add_argument("--no-faults", action="store_true", help="kills and clears only; the simulator answers every call")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an end in which everything that was started is ended
    outcome = run_chaos(seed=given.seed, kills=given.kills, database=given.database, metadata=given.metadata, faults=not given.no_faults)
    for violation in outcome.violations:
        print(f"VIOLATION {violation}")
    print(outcome.line)
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())

"""The demo: 50,000 products, a real DAG run, and the bill. ``make demo`` and ``make airflow`` call it.

Everything it makes lies in ``.demo`` below the current folder: the catalog (SQLite) and an Airflow home. Against the simulator it costs
nothing; ``--real`` asks the real API about a handful of products, after showing what that may cost and asking.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings

from . import ANSWER_TOKENS, DAG_ID, DAGS_FOLDER
from .catalog import fill_catalog, write_reviews
from .services import serve

PRODUCTS = 50_000
REAL_PRODUCTS = 5
FOLDER = Path(".demo").resolve()


def main(argv: list[str] | None = None) -> int:
    """Run ``demo`` or ``airflow``; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m example_dags.demo", description=__doc__)
    parser.add_argument(
        "what", choices=("demo", "airflow"), help="demo: one DAG run in this terminal; airflow: the Airflow UI on the same catalog"
    )
    parser.add_argument(
        "--rows", type=int, default=None, help=f"products in the catalog (default {PRODUCTS:,}, with --real {REAL_PRODUCTS})"
    )
    parser.add_argument(
        "--real", action="store_true", help="ask the real API, with the key in ANTHROPIC_API_KEY, after an estimate and a question"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    rows = args.rows or (REAL_PRODUCTS if args.real else PRODUCTS)
    catalog = FOLDER / ("catalog_real.db" if args.real else "catalog.db")
    if args.what == "demo" and not args.real:
        # the DAG asks for nothing that an earlier run has answered: a demo begins without one
        catalog.unlink(missing_ok=True)
        shutil.rmtree(FOLDER / "airflow", ignore_errors=True)
    fill_catalog(catalog, rows)
    write_reviews(FOLDER / "reviews.csv", catalog)
    set_environment(catalog)
    if args.real:
        return run_real(catalog)
    print("Starting the API simulator: no key, no network, no bill.")
    clock = "seconds:12" if args.what == "demo" else "seconds:60"
    with SimulatorProcess(SimulatorSettings(clock=clock, moving_counts=True, answer_tokens=ANSWER_TOKENS)) as simulator:
        os.environ["AIRFLOW_CONN_ANTHROPIC_DEFAULT"] = f"anthropic://:demo-key@/?__extra__={quote(_extra(simulator.base_url))}"
        return run_demo(catalog) if args.what == "demo" else run_airflow(catalog)


def set_environment(catalog: Path) -> None:
    """An Airflow home of the demo's own, and its connections, for this process and its children."""
    os.environ.update(
        {
            "AIRFLOW_HOME": str(FOLDER / "airflow"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS_FOLDER),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO",
            "AIRFLOW__BATCHKIT__PAGE_LEDGER_CONN_IDS": "warehouse",
            "AIRFLOW_CONN_WAREHOUSE": f"sqlite://{quote(str(catalog), safe='')}",
            "AIRFLOW_VAR_REVIEWS_CSV": str(FOLDER / "reviews.csv"),
        }
    )


def write_commands_file(path: Path) -> None:
    """The settings with which commands in another terminal find the demo's ledger and its API, as a file for the shell's ``source``."""
    names = ("AIRFLOW_HOME", "AIRFLOW_CONN_WAREHOUSE", "AIRFLOW_CONN_ANTHROPIC_DEFAULT", "AIRFLOW__BATCHKIT__PAGE_LEDGER_CONN_IDS")
    values = {**{name: os.environ[name] for name in names}, "AIRFLOW__BATCHKIT__LEDGER_CONN_ID": "warehouse"}
    path.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items()))


def run_demo(catalog: Path) -> int:
    """One run of the example DAG in this process's terminal, then the table's first rows and the bill."""
    print("Preparing Airflow's own database ...")
    _airflow("db", "migrate")
    print(f"Running the DAG {DAG_ID} (submit, wait, fetch), as Airflow does:\n")
    started = time.monotonic()
    with _progress(catalog):
        code = subprocess.run([sys.executable, "-m", "example_dags.demo.run"], check=False).returncode
    if code:
        print(f"The DAG run failed. Its logs: {_relative(FOLDER / 'airflow')}/demo.log and …/logs.", file=sys.stderr)
        return code
    print(f"\nThe run took {time.monotonic() - started:.0f} s. The first rows of product_copy:\n")
    show_rows(catalog)
    print("\nThe bill, added up from the usage of every row, and the most that it could be, as the ledger has it since before the POST:\n")
    show_bill(catalog)
    print(f"\nThe table is product_copy in {_relative(catalog)}, the ledger batchkit_* beside it.")
    print("Open the same in the Airflow UI: make airflow")
    return 0


def show_rows(catalog: Path, count: int = 5) -> None:
    """The first rows of the result table."""
    with contextlib.closing(sqlite3.connect(catalog)) as connection:
        for sku, response, cost in connection.execute(f"SELECT sku, response, cost_usd FROM product_copy ORDER BY sku LIMIT {count}"):
            text = " ".join(response.split())
            print(f"  {sku}  ${cost}  {text[:90]}{'…' if len(text) > 90 else ''}")


def show_bill(catalog: Path) -> None:
    """The tally and the bound of the latest run's batches, from the ledger."""
    import json

    from airflow_provider_batchkit.cost.tally import format_tally
    from airflow_provider_batchkit.model import COST_QUANTUM, CostTally

    latest = "SELECT job_id FROM batchkit_job ORDER BY created_at DESC LIMIT 1"
    with contextlib.closing(sqlite3.connect(catalog)) as connection:
        batches = connection.execute(
            f"SELECT tally, bound_picousd FROM batchkit_batch WHERE state = 'landed' AND job_id = ({latest})"
        ).fetchall()
    print(format_tally(CostTally.sum(CostTally.from_json(json.loads(tally)) for tally, _ in batches)))
    print(f"at most ${sum(bound for _, bound in batches) * COST_QUANTUM:.2f}")


def run_airflow(catalog: Path) -> int:
    """A real Airflow with UI, scheduler, DAG processor and triggerer until Ctrl-C."""
    print("Preparing Airflow's own database ...")
    _airflow("db", "migrate")
    commands = FOLDER / "commands.env"
    write_commands_file(commands)
    print("Starting Airflow, which takes half a minute ...", flush=True)
    python = _relative(Path(sys.executable))
    return serve(FOLDER / "airflow", catalog, f"source {_relative(commands)}; {python} -m airflow_provider_batchkit batches --open")


def run_real(catalog: Path) -> int:
    """The same DAG against the real API: shows the most it can cost, asks, runs."""
    from airflow_provider_batchkit import BatchKit
    from airflow_provider_batchkit.request.template import RowTemplate
    from example_dags.catalog_enrichment import submit

    key = os.environ.get("ANTHROPIC_API_KEY")
    if not key:
        print("--real needs ANTHROPIC_API_KEY.", file=sys.stderr)
        return 2
    with contextlib.closing(sqlite3.connect(catalog)) as connection:
        connection.row_factory = sqlite3.Row
        products = [dict(row) for row in connection.execute("SELECT name, attributes FROM products")]
    prompts = RowTemplate(str(submit.prompt), name="prompt").render_all(products)
    print(BatchKit(api_key=key).estimate(prompts=prompts, model=submit.model, max_tokens=submit.max_tokens))
    if input("Send them to the real API? [y/N] ").strip().lower() != "y":
        print("Nothing was sent.")
        return 0
    os.environ["AIRFLOW_CONN_ANTHROPIC_DEFAULT"] = f"anthropic://:{quote(key)}@/"
    print("Most batches end within an hour, all within a day.")
    return run_demo(catalog)


@contextlib.contextmanager
def _progress(catalog: Path) -> Iterator[None]:
    """A line whenever the ledger's picture changes, read from the ledger as anybody could."""
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(catalog, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(catalog: Path, stop: threading.Event) -> None:
    started, last = time.monotonic(), ""
    while not stop.wait(0.5):
        line = _ledger_line(catalog)
        if line and line != last:
            print(f"  {time.monotonic() - started:5.1f} s  {line}", flush=True)
            last = line


def _ledger_line(catalog: Path) -> str:
    latest = "SELECT job_id FROM batchkit_job ORDER BY created_at DESC LIMIT 1"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{catalog}?mode=ro", uri=True, timeout=1)) as connection:
            states = connection.execute(
                f"SELECT state, COUNT(*), SUM(requests) FROM batchkit_batch WHERE job_id = ({latest}) GROUP BY state"
            ).fetchall()
    except sqlite3.OperationalError:
        return ""
    return ", ".join(
        f"{requests:,} requests in {count} {'batch' if count == 1 else 'batches'} {state}" for state, count, requests in states
    )


def _airflow(*arguments: str) -> None:
    command = [sys.executable, "-m", "airflow", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the arguments are ours
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(done.returncode)


def _extra(base_url: str) -> str:
    import json

    return json.dumps({"anthropic_client_kwargs": {"base_url": base_url}})


def _relative(path: Path) -> str:
    return os.path.relpath(path)


if __name__ == "__main__":
    sys.exit(main())

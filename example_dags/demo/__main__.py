"""The demo: 50,000 products, a real DAG run, and the bill. ``make demo`` and ``make airflow`` call it.

Everything it makes lies in ``.demo`` below the current folder: the catalog (SQLite) and an Airflow home. Against the simulator it costs
nothing; ``--real`` asks the real API about a handful of products, after showing what that may cost and asking.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings

from . import DAG_ID, DAGS_FOLDER, INPUT_TOKENS, OUTPUT_TOKENS
from .catalog import fill_catalog, write_reviews

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
    fill_catalog(catalog, rows)
    write_reviews(FOLDER / "reviews.csv", catalog)
    set_environment(catalog)
    if args.real:
        return run_real(catalog)
    print("Starting the API simulator: no key, no network, no bill.")
    with SimulatorProcess(SimulatorSettings(clock="seconds:12", input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS)) as simulator:
        os.environ["AIRFLOW_CONN_ANTHROPIC_DEFAULT"] = f"anthropic://:demo-key@/?__extra__={quote(_extra(simulator.base_url))}"
        return run_demo(catalog) if args.what == "demo" else run_airflow()


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
            "AIRFLOW_CONN_WAREHOUSE": f"sqlite://{quote(str(catalog), safe='')}",
            "AIRFLOW_VAR_REVIEWS_CSV": str(FOLDER / "reviews.csv"),
        }
    )


def run_demo(catalog: Path) -> int:
    """One run of the example DAG in this process's terminal, then the table's first rows and the bill."""
    print("Preparing Airflow's own database ...")
    _airflow("db", "migrate")
    print(f"Running the DAG {DAG_ID} (submit, wait, fetch), as Airflow does:\n")
    started = time.monotonic()
    with _progress(catalog):
        code = subprocess.run([sys.executable, "-m", "example_dags.demo.run"], check=False).returncode
    if code:
        print(f"The DAG run failed. Airflow's own log of it is in {_relative(FOLDER / 'airflow' / 'demo.log')}.", file=sys.stderr)
        return code
    print(f"\nThe run took {time.monotonic() - started:.0f} s. The first rows of product_copy:\n")
    show_rows(catalog)
    print("\nThe bill, added up from the usage of every row:\n")
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
    """The tally of the latest run's batches, from the ledger."""
    import json

    from airflow_provider_batchkit.cost.tally import format_tally
    from airflow_provider_batchkit.model import CostTally

    latest = "SELECT job_id FROM batchkit_job ORDER BY created_at DESC LIMIT 1"
    with contextlib.closing(sqlite3.connect(catalog)) as connection:
        tallies = connection.execute(f"SELECT tally FROM batchkit_batch WHERE state = 'landed' AND job_id = ({latest})").fetchall()
    print(format_tally(CostTally.sum(CostTally.from_json(json.loads(tally)) for (tally,) in tallies)))


def run_airflow() -> int:
    """A real Airflow with UI, scheduler, DAG processor and triggerer until Ctrl-C."""
    ports = _free_ports(4)
    url = f"http://localhost:{ports[0]}"
    os.environ.update(
        {
            "AIRFLOW__API__PORT": str(ports[0]),
            "AIRFLOW__API__BASE_URL": url,
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(ports[1]),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(ports[2]),
        }
    )
    print(f"Starting Airflow. In half a minute: {url}/dags/{DAG_ID}\nTrigger the DAG there; Ctrl-C ends everything.\n", flush=True)
    log = FOLDER / "airflow" / "standalone.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "airflow", "standalone"], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _wait_healthy(url, process)
            print(f"Airflow is up: {url}/dags/{DAG_ID}  (log: {_relative(log)})", flush=True)
            code = process.wait()
        except KeyboardInterrupt:
            print("\nEnding Airflow ...", flush=True)
            code = 0
        finally:
            _end(process)
    print("Ended.")
    return code


def _wait_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    from urllib.request import urlopen

    while process.poll() is None:
        with contextlib.suppress(OSError), urlopen(f"{url}/api/v2/monitor/health", timeout=5):  # noqa: S310 - our own loopback server
            return
        time.sleep(1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt Airflow as Ctrl-C does, and end what is left of its own process group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_real(catalog: Path) -> int:
    """The same DAG against the real API: shows the most it can cost, asks, runs."""
    import anthropic

    from airflow_provider_batchkit.cost.prices import PriceBook
    from airflow_provider_batchkit.model import Usage

    key = os.environ.get("ANTHROPIC_API_KEY")
    if not key:
        print("--real needs ANTHROPIC_API_KEY.", file=sys.stderr)
        return 2
    client = anthropic.Anthropic()
    model, max_tokens = "claude-opus-4-8", 200
    with contextlib.closing(sqlite3.connect(catalog)) as connection:
        products = connection.execute("SELECT name, attributes FROM products").fetchall()
    tokens = 0
    for name, attributes in products:
        prompt = f"Write a two-sentence description of {name}: {attributes}"
        tokens += client.messages.count_tokens(model=model, messages=[{"role": "user", "content": prompt}]).input_tokens
    from datetime import UTC, datetime

    cost = PriceBook().cost(model, Usage(tokens, max_tokens * len(products)), datetime.now(UTC))
    known = f"at most ${cost.batch_usd:.4f} in a batch (${cost.standard_usd:.4f} otherwise)" if cost else "an unknown price"
    print(f"{len(products)} products, {model}: {tokens} input tokens, up to {max_tokens} output tokens each: {known}.")
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


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _relative(path: Path) -> str:
    return os.path.relpath(path)


if __name__ == "__main__":
    sys.exit(main())

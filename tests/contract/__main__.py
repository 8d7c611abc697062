"""``python -m tests.contract``: checks what the package rests on. Exit code 0 when nothing differs, 1 when a fact does, 2 when nothing was
sent, 3 when the batch that tells most did not end in time, 130 after Ctrl-C.

With ANTHROPIC_API_KEY it runs against the real API (or ANTHROPIC_BASE_URL) and costs money; without, against the package's simulator.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation

from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.model import usd_text
from airflow_provider_batchkit.simulator import Simulator

from . import plan, report
from .facts import FACTS
from .observe import Run
from .seen import Outcome
from .wire import BATCHES, Api, NoAnswerError

CAP_USD = Decimal(1)
WAIT_S = 1_800.0
#: seconds between two looks at the real API, which asks for 10
PAUSE_S = 10.0
REAL_ADDRESS = "https://api.anthropic.com"
#: looks after which a batch of the simulator ends: more than the calls before the wait take
LOOKS = "polls:12"
SIMULATED_KEY = "the-simulator-s"


def parser() -> argparse.ArgumentParser:
    """All options."""
    root = argparse.ArgumentParser(prog="python -m tests.contract", description=__doc__)
    root.add_argument("--yes", action="store_true", help="spend up to the bound without asking")
    root.add_argument("--max-usd", type=_usd, default=CAP_USD, metavar="USD", help="refuse a run that can cost more (default: %(default)s)")
    root.add_argument("--wait", type=float, default=WAIT_S, metavar="S", help="seconds that batches are waited for (default: %(default)g)")
    root.add_argument("--pause", type=float, default=PAUSE_S, metavar="S", help="seconds between two looks (default: %(default)g)")
    root.add_argument("--simulator", action="store_true", help="the simulator, also where a key is set")
    return root


def _usd(text: str) -> Decimal:
    try:
        amount = Decimal(text)
    except InvalidOperation as e:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount in USD") from e
    if not amount.is_finite() or amount <= 0:
        raise argparse.ArgumentTypeError("it must be above 0")
    return amount


def main(argv: Sequence[str] | None = None) -> int:
    """One run; gives the exit code."""
    options = parser().parse_args(argv)
    key = os.environ.get("ANTHROPIC_API_KEY", "")
    if options.simulator or not key:
        print("Against the package's simulator" + ("." if options.simulator else ": ANTHROPIC_API_KEY is not set."))
        code, run = _simulated()
        return code or _tell(run, None)
    address = os.environ.get("ANTHROPIC_BASE_URL") or REAL_ADDRESS
    api = Api(address, key)
    book, now = PriceBook(), datetime.now(UTC)
    bound = plan.bound_usd(book, now)
    print(f"Against {address} with the key of ANTHROPIC_API_KEY. The most that it can cost: {usd_text(bound)} ({book.version}).")
    if bound > options.max_usd:
        print(f"That is above the cap of {usd_text(options.max_usd)}. Nothing was sent.")
        return 2
    if not (options.yes or _agreed()):
        print("Nothing was sent.")
        return 2
    refusal = _refusal(api)
    if refusal:
        print(f"{refusal}\nNo batch was sent.")
        return 2
    simulator_code, simulated = _simulated()
    run = Run(api, wait_s=options.wait, pause_s=options.pause, say=print)
    code = _carry_out(run)
    cost = plan.billed_usd(book, now, run.seen.messages)
    print(f"Billed by the answers' own usage: {usd_text(cost)}; the most that it could be: {usd_text(bound)}.")
    return code or simulator_code or _tell(run, simulated)


def _refusal(api: Api) -> str:
    """Why nothing can be run at this address with this key; empty when it can."""
    try:
        answer = api.call("GET", f"{BATCHES}?limit=1")
    except NoAnswerError as e:
        return str(e)
    return "" if answer.status == 200 else f"The list of batches answers {answer}."


def _agreed() -> bool:
    print("Spend up to that? [y/N] ", end="", flush=True)
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        print("no answer; --yes spends without asking.")
        return False


def _simulated() -> tuple[int, Run]:
    """A run against the simulator, whose batches end after some looks."""
    with Simulator(clock=LOOKS, keys={SIMULATED_KEY: "default"}) as simulator:
        # the look that comes after the one at an unknown id
        simulator.faults.add("vanish", after=1)
        run = Run(Api(simulator.base_url, SIMULATED_KEY), wait_s=60.0, pause_s=0.02, say=lambda _: None)
        return _carry_out(run), run


def _carry_out(run: Run) -> int:
    """All calls, and the clearing up behind them; 130 when somebody has stopped it."""
    # a shell's background job begins with SIGINT ignored
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    code = 0
    try:
        try:
            run.observe()
        except KeyboardInterrupt:
            code = 130
            print("Stopped. Canceling and deleting what was made; Ctrl-C again leaves it.")
        finally:
            for line in run.clear():
                print(line)
    except KeyboardInterrupt:
        code = 130
        left = [created.batch_id for created in run.seen.created if not created.deleted]
        print(f"Left behind: {', '.join(left) or 'nothing'}. Cancel and delete it in the Claude Console.")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def _tell(run: Run, simulated: Run | None) -> int:
    verdicts = {fact.name: fact.judge(run.seen) for fact in FACTS}
    beside = None if simulated is None else {fact.name: fact.judge(simulated.seen) for fact in FACTS}
    for line in report.lines(FACTS, verdicts, beside):
        print(line)
    print(report.summary(FACTS, verdicts))
    if any(verdict.outcome is Outcome.DIFFERS for verdict in verdicts.values()):
        return 1
    if not run.seen.lines:
        print("Not finished: the results were not had, so most facts are not told. Run it again, with a longer --wait.")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())

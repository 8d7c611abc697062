"""``make contract``: as long as it passes here, whoever has a key can run it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.model import Usage
from airflow_provider_batchkit.simulator import Simulator
from tests.contract import plan, report
from tests.contract.facts import FACTS
from tests.contract.seen import Fact, Outcome, Seen, Verdict

ROOT = Path(__file__).resolve().parents[2]
KEY = "key-of-the-test"
COMMAND = [sys.executable, "-m", "tests.contract"]


def environment(simulator: Simulator | None) -> dict[str, str]:
    """Without a simulator, that of somebody who has no key."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if simulator is not None:
        given |= {"ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": simulator.base_url}
    return given


def contract(simulator: Simulator | None, *options: str) -> tuple[int, str]:
    """Exit code and output."""
    done = subprocess.run(
        [*COMMAND, *options], env=environment(simulator), cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def outcomes(output: str) -> dict[str, str]:
    """Outcome by the name of the fact."""
    kinds = "|".join(outcome.value for outcome in Outcome)
    return {name: outcome for outcome, name in re.findall(rf"^({kinds}) +([\w-]+) ", output, re.MULTILINE)}


def paid_to(simulator: Simulator) -> Decimal:
    """What the simulator has billed, at the package's prices."""
    book, total = PriceBook(), Decimal(0)
    for model, line in simulator.stats()["bill"].items():
        counts = {name: line[name] for name in ("input_tokens", "output_tokens", "cache_write_5m_tokens", "cache_read_tokens")}
        cost = book.cost(model, Usage(**counts), datetime.now(UTC))
        assert cost is not None
        total += cost.batch_usd
    return total


def test_without_a_key_the_simulator_does_all_that_was_recorded() -> None:
    """Each fact is either as recorded, or says why it is not told."""
    code, output = contract(None)
    assert code == 0, output
    found = outcomes(output)
    assert list(found) == [fact.name for fact in FACTS]
    told = {name for name, outcome in found.items() if outcome == "as recorded"}
    assert {fact.name for fact in FACTS if fact.check is not None} - told == {"thinks-unasked"}, output


def test_with_a_key_it_leaves_nothing_behind_and_stays_below_its_bound() -> None:
    """All its batches are deleted, and the bill that it shows is the simulator's."""
    with Simulator(clock="polls:12", keys={KEY: "w"}) as simulator:
        code, output = contract(simulator, "--yes", "--pause", "0.02")
        stats, paid = simulator.stats(), paid_to(simulator)
    assert code == 0, output
    assert (stats["batches_accepted"], stats["batches"]) == (3, [])
    assert Decimal(0) < paid < plan.bound_usd(PriceBook(), datetime.now(UTC)) < 1
    billed = re.search(r"Billed by the answers' own usage: \$([\d.]+)", output)
    assert billed is not None and paid <= Decimal(billed[1]) < paid * Decimal("1.01")


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"strict_params": True}, {"late-params", *(f"late-{name}" for name in plan.LATE)}),
        ({"results_host": "http://elsewhere.example"}, {"results-host"}),
        ({"cache_concurrency": None}, {"cache-in-a-batch"}),
        ({"models": {plan.HAIKU: {"max_tokens": 32_000}}}, {"model-limits", "late-over-limit"}),
    ],
)
def test_what_differs_is_named_beside_the_simulator(settings: dict[str, Any], names: set[str]) -> None:
    """The exit code is 1; the recorded expectation, what rests on it and what the simulator does stand beside what was seen."""
    with Simulator(clock="polls:12", keys={KEY: "w"}, **settings) as simulator:
        code, output = contract(simulator, "--yes", "--pause", "0.02")
        assert simulator.stats()["batches"] == []
    assert code == 1
    assert {name for name, outcome in outcomes(output).items() if outcome == "DIFFERS"} == names
    assert output.splitlines()[-1] == f"DIFFERS: {', '.join(fact.name for fact in FACTS if fact.name in names)}"
    assert output.count("recorded: ") == output.count("decides: ") == output.count("the simulator: as recorded") == len(names)


def test_a_throttled_run_tells_nothing_and_says_why() -> None:
    """A 429 is no difference."""
    with Simulator(clock="polls:12", keys={KEY: "w"}) as simulator:
        simulator.faults.add("status", endpoint="create", status=429, times=None)
        code, output = contract(simulator, "--yes", "--pause", "0.02")
    assert code == 3, output
    found = outcomes(output)
    assert {found[name] for name in ("late-params", "late-stream", "refused-empty-list", "no-idempotency", "dated-model")} == {"not told"}
    assert found["wrong-key"] == "as recorded"


def test_a_throttled_create_call_is_sent_again() -> None:
    """Nothing was accepted, so nothing is paid twice."""
    with Simulator(clock="polls:12", keys={KEY: "w"}) as simulator:
        simulator.faults.add("status", endpoint="create", status=429, times=2, after=len(plan.REFUSED))
        code, output = contract(simulator, "--yes", "--pause", "0.02")
        assert simulator.stats()["batches_accepted"] == 3
    assert code == 0, output


@pytest.mark.parametrize(
    ("options", "words"),
    [([], "--yes spends without asking"), (["--yes", "--max-usd", "0.01"], "above the cap of $0.01. Nothing was sent.")],
)
def test_nothing_is_sent_without_a_yes_or_above_the_cap(options: list[str], words: str) -> None:
    """The bound is said before the question."""
    with Simulator(keys={KEY: "w"}) as simulator:
        code, output = contract(simulator, *options)
        assert simulator.stats()["calls"] == {}
    assert code == 2
    assert words in output and "The most that it can cost: $0." in output


def test_a_key_that_is_refused_ends_it_before_a_batch_is_sent() -> None:
    """The API's words are in the message."""
    with Simulator(keys={"another": "w"}) as simulator:
        code, output = contract(simulator, "--yes")
        assert simulator.stats()["posts"] == 0
    assert code == 2 and "API key is invalid." in output


def test_what_does_not_end_in_time_is_canceled_and_named() -> None:
    """With the simulator's clock stopped, a canceled batch goes on canceling: it is left, and the exit code is 3."""
    with Simulator(clock="manual", keys={KEY: "w"}) as simulator:
        code, output = contract(simulator, "--yes", "--pause", "0.02", "--wait", "0.1")
        left = simulator.stats()["batches"]
    assert code == 3, output
    assert [batch["status"] for batch in left] == ["canceling"] * 3
    assert all(f"{batch['id']} (" in output for batch in left)
    assert outcomes(output)["dated-model"] == "not told"


def test_ctrl_c_cancels_what_was_made() -> None:
    """In the middle of the wait."""
    with Simulator(clock="seconds:600", keys={KEY: "w"}) as simulator:
        process = subprocess.Popen(
            [*COMMAND, "--yes", "--pause", "0.05"], env=environment(simulator), cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        try:
            while "Waiting for" not in process.stdout.readline():
                assert process.poll() is None
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                process.kill()
        assert process.returncode == 130, output
        assert simulator.stats()["batches_accepted"] == 3 and simulator.stats()["batches"] == []


def test_a_create_call_without_an_answer_is_named() -> None:
    """Whether the API took it is for a person to see: batches of others are not touched."""
    with Simulator(clock="polls:12", keys={KEY: "w"}) as simulator:
        simulator.faults.add("cut_after_accept", times=1, after=len(plan.REFUSED))
        code, output = contract(simulator, "--yes", "--pause", "0.02")
        assert len(simulator.stats()["batches"]) == 1
    assert code == 0, output
    assert "The create call “held 1” had no answer" in output


def test_every_fact_stands_in_the_documents_with_its_name() -> None:
    """And no other."""
    text = (ROOT / "docs" / "contract.md").read_text().partition("\n## The facts\n")[2]
    assert re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE) == [fact.name for fact in FACTS]


def test_a_shape_that_no_check_knows_is_a_difference() -> None:
    """The run goes on with the other facts."""

    def check(seen: Seen) -> Verdict:
        raise KeyError("processing_status")

    fact = Fact("a-fact", "something", "something", check)
    verdict = fact.judge(Seen(datetime.now(UTC)))
    assert verdict.outcome is Outcome.DIFFERS and "processing_status" in verdict.what
    assert report.summary([fact], {"a-fact": verdict}).endswith("DIFFERS: a-fact")

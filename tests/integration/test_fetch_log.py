"""Why rows failed, in the log of the tasks that land them: type, count, keys, the API's words, and what would help."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_batchkit.request.failed import KINDS_SAID, FailedKinds, FailedRows, failed_text
from airflow_provider_batchkit.request.failures import KNOWN_FAILURES
from airflow_provider_batchkit.simulator import SimulatorProcess
from tests.databases import Database
from tests.integration.test_fetch_operator import Task, fetch, submit

SECRET = "what the prompt says"


def fill(database: Database, markers: dict[int, str]) -> None:
    """The table ``things``: a prompt for each id, with a marker for the simulator where there is one."""
    notes = {id_: f"{SECRET} {id_}" + (f" [[sim:{marker}]]" if marker else "") for id_, marker in markers.items()}
    with database.engine().begin() as connection:
        connection.exec_driver_sql("CREATE TABLE things (id INTEGER PRIMARY KEY, note TEXT)")
        for id_, note in notes.items():
            connection.exec_driver_sql(f"INSERT INTO things VALUES ({id_}, '{note}')")


def why(task: Task, caplog: pytest.LogCaptureFixture) -> str:
    """Run a task; gives the block that says why rows failed, empty where there is none."""
    caplog.clear()
    # a task's own log goes to Airflow's, which pytest does not see
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(task.make()), "log", logging.getLogger("a_task"))
        task.run()
    blocks = [record.getMessage() for record in caplog.records if re.match(r"[\d,]+ of [\d,]+ rows have", record.getMessage())]
    assert len(blocks) <= 1
    assert not blocks or SECRET not in blocks[0]
    return "".join(blocks)


def run(**parameters: Any) -> Task:
    from airflow_provider_batchkit.operators.batch import RunBatchOperator

    return Task(RunBatchOperator, "run", **_source(table="answers", **parameters))


def line_with(block: str, words: str) -> str:
    (line,) = [line for line in block.splitlines() if words in line]
    return line


def test_a_fetch_without_failures_says_nothing_of_them(
    home: Path, database: Database, api: SimulatorProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """No block, and no empty head of one."""
    fill(database, {1: "", 2: ""})
    assert why(fetch(submit().run()), caplog) == ""


def test_each_kind_says_how_many_which_why_and_what_helps(
    home: Path, database: Database, api: SimulatorProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """One block, the largest kind first; a cleared fetch, which asks the API nothing, says the same."""
    markers = {1: "", **dict.fromkeys(range(2, 7), "overloaded"), **dict.fromkeys((7, 8), "credit"), 9: "image", 10: "expired"}
    fill(database, markers | {11: "max_tokens", 12: "refusal-cyber", 13: "pause-turn"})
    ids = submit(max_requests_per_batch=4).run()
    assert len(ids) > 1
    block = why(fetch(ids), caplog)
    head, first, *_ = block.splitlines()
    assert head == "11 of 13 rows have no answer; 1 of 13 have one that is cut:"
    assert first == (
        "  5 rows errored (overloaded_error): Overloaded; worth asking again: by a further round (max_rounds of RunBatchOperator), or by a "
        "submit with only_failed_of; first keys: [2], [3], [4]"
    )
    assert "Your credit balance is too low" in (account := line_with(block, "2 rows errored")) and "then clear the task" in account
    assert "1 rows errored (invalid_request_error): Could not process image; asking again would not help" in block
    assert "only_failed_of" in line_with(block, "1 rows expired")
    assert "a larger max_tokens" in line_with(block, "1 rows succeeded (truncated)")
    assert "Round(ask=['refused'], model=…)" in line_with(block, "1 rows invalid_output (refused)")
    assert "Round(ask=['paused'])" in line_with(block, "1 rows invalid_output (paused)")
    assert len(block.splitlines()) == 8
    assert why(fetch(ids), caplog) == block


def test_missing_rows_are_to_be_read_again_and_not_to_be_asked_again(
    home: Path, database: Database, api: SimulatorProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Doing what the line says lands them."""
    fill(database, {1: "", 2: "", 3: ""})
    ids = submit().run()
    api.faults.add("missing_line", line=1, times=None)
    block = why(fetch(ids), caplog)
    api.faults.clear()
    assert "1 of 3 rows have no answer" in block
    line = line_with(block, "1 rows missing")
    assert "may be there and billed: clear the task that landed the others to read the results again" in line and "asking again" not in line
    assert why(fetch(ids), caplog) == ""


def test_batches_of_several_jobs_are_one_block(
    home: Path, database: Database, api: SimulatorProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """A kind that both have is one line; what other batches of the jobs failed with is not in it."""
    fill(database, {id_: "overloaded" if id_ % 2 else "" for id_ in range(1, 9)})
    first = Task(type(submit().make()), "one", **_source(max_requests_per_batch=2)).run()
    second = Task(type(submit().make()), "two", **_source(max_requests_per_batch=2)).run()
    assert len(first) == len(second) == 4
    fetch(first[2:]).run()
    block = why(fetch([*first[:2], second[0]]), caplog)
    assert block.splitlines()[0] == "3 of 6 rows have no answer:"
    assert "3 rows errored (overloaded_error)" in block and len(block.splitlines()) == 2
    assert block.endswith("first keys: [1], [3]")


def _source(**parameters: Any) -> dict[str, Any]:
    source = {"sql": "SELECT id, note FROM things ORDER BY id", "key": "id", "prompt": "{{ row.note }}", "max_tokens": 100}
    return {**source, "sql_conn_id": "warehouse", **parameters}


def test_a_batch_that_was_submitted_elsewhere_says_why_too(
    home: Path, database: Database, api: SimulatorProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """By its custom_ids; once it has landed its reasons are kept nowhere, and the log says how to have them again."""
    from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

    prompts = ["a [[sim:overloaded]]", "b", "c [[sim:overloaded]]", "d [[sim:image]]", "e [[sim:max_tokens]]"]
    (foreign,) = BatchKitHook().kit.submit(prompts, model="claude-haiku-5-5", max_tokens=50)
    block = why(fetch([foreign]), caplog)
    assert block.splitlines()[0] == "3 of 5 rows have no answer; 1 of 5 have one that is cut:"
    named = line_with(block, "2 rows errored (overloaded_error)")
    assert '["item-0"]' in named and '["item-2"]' in named and "item-3" not in named
    assert "Could not process image" in block and "1 rows succeeded (truncated)" in block
    again = why(fetch([foreign]), caplog)
    assert "3 of 5 rows have no answer" in again and "rewrite=True" in again
    assert why(fetch([foreign], rewrite=True), caplog) == block


def test_a_pattern_of_the_configuration_changes_the_advice(
    home: Path, database: Database, api: SimulatorProcess, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for what has landed before."""
    fill(database, {1: "image"})
    ids = submit().run()
    assert "asking again would not help" in why(fetch(ids), caplog)
    monkeypatch.setenv("AIRFLOW__BATCHKIT__PASSING_ERRORS", '["could not process image"]')
    assert "worth asking again" in why(fetch(ids), caplog)


def test_run_says_it_in_the_same_words(home: Path, database: Database, api: SimulatorProcess, caplog: pytest.LogCaptureFixture) -> None:
    """The block at the end of a run is the one of a fetch of its batches."""
    fill(database, {1: "", 2: "overloaded", 3: "image", 4: "max_tokens"})
    task = run()
    block = why(task, caplog)
    assert block.splitlines()[0] == "2 of 4 rows have no answer; 1 of 4 have one that is cut:"
    assert block == why(fetch(task.pushed["batch_ids"]), caplog)


def test_the_block_is_bounded() -> None:
    """Kinds, keys and words: a million rows with words of their own each are a few lines."""
    kinds = FailedKinds()
    many = range(50_000)
    kinds.add([f"item-{n}" for n in many], ["errored"] * len(many), ["api_error"] * len(many), [f"fault {n}\n" + "x" * 1_000 for n in many])
    found = kinds.rows(KNOWN_FAILURES)
    assert sum(kind.rows for kind in found) == len(many)
    others = [FailedRows("errored", f"type_{n}", "permanent", "m", 1, [json.dumps(["k" * 500])], False) for n in range(30)]
    block = failed_text([*found, *others], 60_000)
    assert len(block.splitlines()) == KINDS_SAID + 2
    assert max(map(len, block.splitlines())) < 1_000
    assert block.splitlines()[-1].strip() == "23 rows of 23 further kinds"

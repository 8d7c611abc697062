"""Rounds that say what they ask again and how: a row keeps its best outcome, and is not bought again by the next run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_batchkit import Round
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.simulator import SimulatorProcess, SimulatorSettings, answer_for
from tests.connections import anthropic_connection
from tests.databases import Database, rows
from tests.integration.test_run_operator import Legs, fill

#: the larger model of an escalation
LARGER = "claude-opus-4-8"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatorProcess]:
    """A simulator of the test's own: it remembers which prompts it has failed once."""
    with SimulatorProcess(SimulatorSettings(input_tokens=1000, output_tokens=100)) as process:
        monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", anthropic_connection(process.base_url, "claude-haiku-4-5"))
        yield process


def answers(database: Database) -> list[tuple[Any, ...]]:
    """id, response, status, error_type and round of each row."""
    return rows(database, "SELECT id, response, status, error_type, round FROM answers ORDER BY id")


def test_truncated_rows_get_more_room_and_refused_ones_a_larger_model(home: Path, database: Database, api: SimulatorProcess) -> None:
    """Each round asks its outcomes alone; the bill shows each round and model, and each row says from which round it is."""
    cut, refused = "cut [[sim:max_tokens-once]]", "refused [[sim:refusal-once]]"
    fill(database, {1: "whole", 2: cut, 3: refused})
    rounds = [Round(), Round(ask=["truncated"], max_tokens=800), Round(ask=["refused"], model=LARGER)]
    summary = Legs("r", rounds=rounds).run()
    assert [round_["requests"] for round_ in summary["rounds"]] == [3, 1, 1]
    assert [(id_, response, status, error_type, number) for id_, response, status, error_type, number in answers(database)] == [
        (1, answer_for("whole"), "succeeded", None, 1),
        (2, answer_for(cut), "succeeded", None, 2),
        (3, answer_for(refused), "succeeded", None, 3),
    ]
    assert summary["counts"] == {"succeeded": 3}
    third = summary["rounds"][2]["cost_tally"]["models"]
    assert [name.startswith(LARGER) for name in third] == [True]
    assert sum(round_["cost_tally"]["requests"] for round_ in summary["rounds"]) == summary["cost_tally"]["requests"]


def test_a_row_keeps_its_best_outcome(home: Path, database: Database, api: SimulatorProcess) -> None:
    """An answer that was cut stays where the next asking fails; the table and the ledger agree, also when the table is filled anew."""
    fill(database, {1: "cut [[sim:max_tokens]]", 2: "whole"})
    api.set(clock="manual")
    legs = Legs("r", rounds=[Round(), Round(ask=["truncated"], max_tokens=800)], include_failed=True)
    (batch_id,) = legs.run().trigger.batch_ids
    fill(database, {1: "cut [[sim:errored]]", 2: "whole"})
    api.end(batch_id)
    api.set(clock="instant")
    summary = legs.resume()
    first = answers(database)
    assert [(row[0], row[2], row[3], row[4]) for row in first] == [(1, "succeeded", "truncated", 1), (2, "succeeded", None, 1)]
    assert first[0][1]
    assert summary["counts"] == {"succeeded": 2}
    assert [round_["counts"] for round_ in summary["rounds"]] == [{"succeeded": 2}, {"errored": 1}]
    with database.engine().begin() as connection:
        connection.exec_driver_sql("DELETE FROM answers")
    asked = api.stats()["requests_accepted"]
    legs.run()
    assert answers(database) == first
    assert api.stats()["requests_accepted"] == asked


def test_a_row_whose_second_answer_is_missing_is_not_bought_a_third_time(home: Path, database: Database, api: SimulatorProcess) -> None:
    """Its answer may be there and billed: the task stops asking and says so, and a clear reads the results again and goes on."""
    fill(database, {1: "cut [[sim:max_tokens]]", 2: "cut, too [[sim:max_tokens]]"})
    api.set(clock="manual")
    legs = Legs("r", rounds=[Round(), Round(ask=["truncated"], max_tokens=800), Round(ask=["truncated"], max_tokens=900)])
    (first,) = legs.run().trigger.batch_ids
    api.end(first)
    (second,) = legs.resume().trigger.batch_ids
    api.faults.add("missing_line", batch=second, line=1, times=None)
    api.end(second)
    api.set(clock="instant")
    summary = legs.resume()
    assert api.stats()["requests_accepted"] == 4
    assert second in summary["stopped"]
    assert sorted(row[4] for row in answers(database)) == [1, 2]
    api.faults.clear()
    again = legs.run()
    assert api.stats()["requests_accepted"] == 6
    assert (again["stopped"], [row[2:] for row in answers(database)]) == (None, [("succeeded", "truncated", 3)] * 2)


def test_a_row_that_was_escalated_is_not_bought_again_by_the_next_run(home: Path, database: Database, api: SimulatorProcess) -> None:
    """skip_unchanged compares what a row was asked first."""
    fill(database, {1: "whole", 2: "cut [[sim:max_tokens-once]]"})
    rounds = [Round(), Round(ask=["truncated"], model=LARGER, max_tokens=800)]
    Legs("monday", rounds=rounds, skip_unchanged=True).run()
    asked = api.stats()["requests_accepted"]
    assert asked == 3
    Legs("tuesday", rounds=rounds, skip_unchanged=True, on_empty="succeed").run()
    assert api.stats()["requests_accepted"] == asked


def test_a_round_that_has_nothing_to_ask_is_passed_over(home: Path, database: Database, api: SimulatorProcess) -> None:
    """The one behind it is asked all the same."""
    fill(database, {1: "refused [[sim:refusal-once]]"})
    summary = Legs("r", rounds=[Round(), Round(ask=["truncated"]), Round(ask=["refused"], model=LARGER)]).run()
    assert [round_["round"] for round_ in summary["rounds"]] == [1, 3]
    assert summary["counts"] == {"succeeded": 1}


def test_rounds_that_cannot_be_are_refused_when_the_dag_is_parsed() -> None:
    """The message names the task."""
    from airflow_provider_batchkit.operators.batch import RunBatchOperator

    with pytest.raises(BatchInputError, match="Task run: The first round"):
        RunBatchOperator(
            task_id="run", requests=["a"], table="t", sql_conn_id="w", model="m", max_tokens=1, rounds=[Round(ask=["truncated"])]
        )


@pytest.mark.parametrize("name", ["round", "content", "stop_details", "message_id", "request_id"])
@pytest.mark.parametrize("own", ["key", "answer"])
def test_a_column_of_the_users_own_keeps_its_values(home: Path, database: Database, api: SimulatorProcess, own: str, name: str) -> None:
    """A key, or a property of the schema, may have the name of a column that came later: nothing is written over it."""
    with database.engine().begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS games")
        connection.exec_driver_sql(f"CREATE TABLE games ({name} INTEGER PRIMARY KEY, note TEXT)")
        connection.exec_driver_sql("INSERT INTO games VALUES (7, 'seven'), (8, 'eight')")
    if own == "key":
        Legs("r", sql=f"SELECT {name}, note FROM games", key=name, write_disposition="append").run()
        found = rows(database, f"SELECT {name}, response FROM answers ORDER BY {name}")
        assert found == [(7, answer_for("seven")), (8, answer_for("eight"))]
    else:
        schema = {"type": "object", "properties": {name: {"type": "string"}}, "required": [name], "additionalProperties": False}
        Legs("r", sql=f"SELECT {name} AS id, note FROM games", output_schema=schema).run()
        found = rows(database, f"SELECT response, {name} FROM answers")
        assert len(found) == 2
        assert all(json.loads(response) == {name: value} for response, value in found)

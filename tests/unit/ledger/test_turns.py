"""Turns at a result table: who waits for one, and what the error says when it stays taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import TurnTakenError
from airflow_provider_batchkit.ledger import Ledger
from airflow_provider_batchkit.ledger.loads import Load
from tests.databases import sqlite_database

ATTEMPT = "0190a000-0000-7000-8000-000000000000"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(sqlite_database(tmp_path / "ledger.db").engine())
    made.ensure()
    return made


@pytest.fixture
def loads(ledger: Ledger) -> tuple[Load, Load]:
    """Two loads of one table."""
    first, second = (ledger.open_load(name * 32, "answers", ATTEMPT) for name in "ab")
    return first, second


def test_a_turn_that_stays_taken_is_an_error_that_names_its_load(ledger: Ledger, loads: tuple[Load, Load]) -> None:
    """After the patience of the one that waits."""
    first, second = loads
    assert ledger.take_turn(first, 90) is not None
    with pytest.raises(TurnTakenError, match=rf"Load {first.load_id} has the turn at answers, until "):
        ledger.wait_for_turn(second, 90, 0)


def test_a_turn_that_is_given_back_after_the_last_look_is_taken(ledger: Ledger, loads: tuple[Load, Load]) -> None:
    """Between the last try and the error's words the turn may become free; nobody has it then, and no error can name a load."""
    first, second = loads
    number = ledger.take_turn(first, 90)
    assert number is not None
    given_back = list[int]()

    def give_back(_: Any, __: Any, statement: str, *rest: Any) -> None:
        if not given_back and statement.startswith("SELECT batchkit_turn.load_id"):
            given_back.append(number)
            ledger.give_turn_back("answers", number)

    sa.event.listen(ledger.engine, "before_cursor_execute", give_back)
    assert ledger.wait_for_turn(second, 90, 0) > number
    assert given_back == [number]

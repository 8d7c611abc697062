"""The ledger's times are UTC by the database's clock, or nothing is sent."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.dialects import mssql, mysql, oracle

from airflow_provider_batchkit.exceptions import LedgerError
from airflow_provider_batchkit.ledger.engine import clock


class _Server:
    """A connection to a server whose session is two hours ahead of UTC; SQL goes no further than its text."""

    def __init__(self, dialect: Any) -> None:
        self.dialect = dialect

    def execute(self, statement: Any) -> _Server:
        text = str(statement.compile(dialect=self.dialect)).upper()
        self.offset = timedelta(hours=0 if "UTC" in text else 2)
        return self

    def scalar_one(self) -> datetime:
        return datetime.now(UTC).replace(tzinfo=None) + self.offset


@pytest.mark.parametrize("dialect", [mysql.dialect(), mssql.dialect()], ids=["mysql", "mssql"])  # type: ignore[no-untyped-call]
def test_a_session_in_another_time_zone_does_not_move_the_ledgers_times(dialect: Any) -> None:
    """A row that seems to be of the future would have its batch looked for there, not found, and be sent again."""
    assert abs(clock(_Server(dialect)) - datetime.now(UTC)) < timedelta(minutes=1)  # type: ignore[arg-type]


def test_a_clock_that_is_hours_off_stops_everything() -> None:
    """A database that tells its local time and not that it is local."""
    with pytest.raises(LedgerError, match="Nothing was sent or changed"):
        clock(_Server(oracle.dialect()))  # type: ignore[arg-type, no-untyped-call]

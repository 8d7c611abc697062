"""The bulk loaders write what they are given, on every database and driver alike."""

from __future__ import annotations

import datetime as dt
import time
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.ledger.bulk import bulk_loader

ROWS = 1_234


def table() -> sa.Table:
    return sa.Table(
        "loaded",
        sa.MetaData(),
        sa.Column("n", sa.BigInteger),
        sa.Column("odd % name", sa.Text),
        sa.Column("maybe", sa.Text),
        sa.Column("flag", sa.Boolean),
        sa.Column("left_out", sa.Text),
        sa.Column("day", sa.Date),
        sa.Column("always", sa.Text),
        sa.Column("seven", sa.BigInteger),
        sa.Column("quarter", sa.Float),
    )


def row(n: int) -> tuple[Any, ...]:
    text = f"{n}\ta\\b\nc\r\u2028\\N '%s' \N{TEACUP WITHOUT HANDLE}"
    return (
        n * 10**12,
        text,
        None if n % 3 else text,
        n % 2 == 0,
        None,
        dt.date(2026, 1, 1 + n % 28),
        "a\\\t%s\n",
        7,
        -0.0 if n % 2 else 0.0,
    )


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("kind", ["sqlite", "psycopg", "psycopg2"])
def test_rows_arrive_as_they_were_given(request: pytest.FixtureRequest, kind: str, portable: bool) -> None:
    """Separators, NULLs, booleans, dates, columns of one value; more rows than a statement takes, a rest, and equal rows."""
    database = request.getfixturevalue("sqlite" if kind == "sqlite" else "postgres")
    loaded = table()
    rows = [row(n) for n in range(ROWS)]
    with sa.create_engine(database.url.replace("+psycopg", f"+{kind}"), poolclass=sa.pool.NullPool).begin() as connection:
        loaded.create(connection)
        with bulk_loader(connection, loaded, portable=portable) as loader:
            for part in (rows[:1_000], rows[1_000:], rows[:1], rows[:1] * 3):
                loader.write(list(zip(*part, strict=True)))
        found = connection.execute(sa.select(loaded).order_by(loaded.c.n)).fetchall()
    assert [tuple(r) for r in found] == [*rows[:1] * 4, *rows]


@pytest.mark.parametrize("kind", ["psycopg", "psycopg2"])
def test_a_nul_in_a_text_lands_as_a_replacement_character(request: pytest.FixtureRequest, kind: str) -> None:
    """PostgreSQL has no NUL in text; one odd answer must not keep a hundred thousand others from landing."""
    database = request.getfixturevalue("postgres")
    loaded = sa.Table("loaded", sa.MetaData(), sa.Column("a", sa.Text), sa.Column("b", sa.Text))
    with sa.create_engine(database.url.replace("+psycopg", f"+{kind}"), poolclass=sa.pool.NullPool).begin() as connection:
        loaded.create(connection)
        with bulk_loader(connection, loaded) as loader:
            loader.write([["x\0y", "z"], ["\0", "\t"]])
        assert [tuple(r) for r in connection.execute(sa.select(loaded).order_by(loaded.c.a))] == [("x\ufffdy", "\ufffd"), ("z", "\t")]


@pytest.mark.parametrize("kind", ["sqlite", "psycopg", "psycopg2"])
def test_an_error_between_two_writes_is_raised_as_it_is_and_nothing_is_loaded(request: pytest.FixtureRequest, kind: str) -> None:
    """A download that breaks off: its own error is told, the transaction is undone, and the connection is as good as before."""
    database = request.getfixturevalue("sqlite" if kind == "sqlite" else "postgres")
    loaded = table()
    engine = sa.create_engine(database.url.replace("+psycopg", f"+{kind}"))
    loaded.create(engine)
    columns = list(zip(*[row(n) for n in range(ROWS)], strict=True))

    def download() -> None:
        with engine.begin() as connection, bulk_loader(connection, loaded) as loader:
            loader.write(columns)
            raise ConnectionResetError("cut")

    with pytest.raises(ConnectionResetError, match="cut"):
        download()
    with engine.begin() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(loaded)).scalar_one() == 0
        with bulk_loader(connection, loaded) as loader:
            loader.write(columns)
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(loaded)).scalar_one() == ROWS
    engine.dispose()


def test_a_download_that_stalls_is_not_a_statement_that_takes_too_long(request: pytest.FixtureRequest) -> None:
    """A server that cancels statements after a second waits two for the next row, and cancels others as before."""
    database = request.getfixturevalue("postgres")
    loaded = sa.Table("loaded", sa.MetaData(), sa.Column("n", sa.BigInteger))
    with database.engine().begin() as connection:
        loaded.create(connection)
        connection.exec_driver_sql("SET LOCAL statement_timeout = '1s'")
        with bulk_loader(connection, loaded) as loader:
            loader.write([[1]])
            time.sleep(2)
            loader.write([[2]])
        assert connection.execute(sa.select(sa.func.count()).select_from(loaded)).scalar_one() == 2
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar_one() == "1s"


def test_what_the_server_refuses_shows_before_a_long_download_ends(request: pytest.FixtureRequest) -> None:
    """A COPY is ended after some bytes: a bad row does not wait for gigabytes behind it."""
    database = request.getfixturevalue("postgres")
    loaded = sa.Table("loaded", sa.MetaData(), sa.Column("a", sa.String(5)))
    engine = database.engine()
    loaded.create(engine)
    calls = iter(range(100))

    def download() -> None:
        with engine.begin() as connection, bulk_loader(connection, loaded) as loader:
            loader.write([["too long"]])
            for _ in calls:
                loader.write([["x" * 5] * 100_000])

    with pytest.raises(psycopg.errors.StringDataRightTruncation):
        download()
    assert len(list(calls)) > 50

"""The bulk loaders write what they are given, on every database and driver alike."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.ledger.bulk import loader_for

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
    )


def row(n: int) -> tuple[Any, ...]:
    text = f"{n}\ta\\b\nc\r\u2028\\N '%s' \N{TEACUP WITHOUT HANDLE}"
    return (n * 10**12, text, None if n % 3 else text, n % 2 == 0, None, dt.date(2026, 1, 1 + n % 28))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("kind", ["sqlite", "psycopg", "psycopg2"])
def test_rows_arrive_as_they_were_given(request: pytest.FixtureRequest, kind: str, portable: bool) -> None:
    """Separators, NULLs, booleans and dates, more rows than a statement takes, and a rest."""
    database = request.getfixturevalue("sqlite" if kind == "sqlite" else "postgres")
    loaded = table()
    rows = [row(n) for n in range(ROWS)]
    with sa.create_engine(database.url.replace("+psycopg", f"+{kind}"), poolclass=sa.pool.NullPool).begin() as connection:
        loaded.create(connection)
        loader_for(connection, portable=portable)(connection, loaded, list(zip(*rows, strict=True)))
        found = connection.execute(sa.select(loaded).order_by(loaded.c.n)).fetchall()
    assert [tuple(r) for r in found] == rows


@pytest.mark.parametrize("kind", ["psycopg", "psycopg2"])
def test_a_nul_in_a_text_lands_as_a_replacement_character(request: pytest.FixtureRequest, kind: str) -> None:
    """PostgreSQL has no NUL in text; one odd answer must not keep a hundred thousand others from landing."""
    database = request.getfixturevalue("postgres")
    loaded = sa.Table("loaded", sa.MetaData(), sa.Column("a", sa.Text), sa.Column("b", sa.Text))
    with sa.create_engine(database.url.replace("+psycopg", f"+{kind}"), poolclass=sa.pool.NullPool).begin() as connection:
        loaded.create(connection)
        loader_for(connection)(connection, loaded, [["x\0y", "z"], ["\0", "\t"]])
        assert [tuple(r) for r in connection.execute(sa.select(loaded).order_by(loaded.c.a))] == [("x\ufffdy", "\ufffd"), ("z", "\t")]

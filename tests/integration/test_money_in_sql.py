"""Amounts that go into the database are exact."""

from __future__ import annotations

from decimal import Decimal

import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from airflow_provider_batchkit.cost.prices import format_pico_exact
from airflow_provider_batchkit.landing.key_types import ExactDecimal
from airflow_provider_batchkit.model import format_usd_exact
from tests.databases import Database


@example([0, 1, 10, 8_000_000_000, 10**12 - 1, 10**12, 12_340_000_000_000, 9_223_372_036_854_775_807])
@given(st.lists(st.none() | st.integers(0, 10**18) | st.integers(0, 10**6).map(lambda cents: cents * 10**10), min_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_picodollars_become_dollars_to_the_last_digit(database: Database, picos: list[int | None]) -> None:
    """NUMERIC in PostgreSQL; in SQLite, which has no decimals, the text that this package writes everywhere. Unknown stays NULL."""
    costs = sa.Table("costs", sa.MetaData(), sa.Column("n", sa.Integer), sa.Column("usd", sa.Text), prefixes=["TEMPORARY"])
    with database.engine().begin() as connection:
        costs.create(connection)
        connection.execute(sa.insert(costs), [{"n": n, "usd": format_pico_exact(pico)} for n, pico in enumerate(picos)])
        as_landed = sa.type_coerce(sa.cast(costs.c.usd, ExactDecimal(12)), sa.Text if database.kind == "sqlite" else sa.Numeric)
        found = connection.execute(sa.select(as_landed).order_by(costs.c.n)).scalars().all()
        costs.drop(connection)
    wanted = [None if pico is None else Decimal(pico).scaleb(-12) for pico in picos]
    assert found == ([format_usd_exact(usd) for usd in wanted] if database.kind == "sqlite" else wanted)

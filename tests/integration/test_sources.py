"""Rows of a query stream, however large they are."""

from __future__ import annotations

import tracemalloc

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import RequestError
from airflow_provider_batchkit.request.template import RowTemplate
from airflow_provider_batchkit.source.rows import Rows
from airflow_provider_batchkit.source.sql import read_sql
from tests.databases import Database, opener


def test_a_table_of_large_rows_is_read_in_little_memory(database: Database) -> None:
    """Two hundred rows of a megabyte among small ones; a driver would hand over hundreds at a time."""
    engine = database.engine()
    documents = sa.Table("documents", sa.MetaData(), sa.Column("id", sa.Integer), sa.Column("text", sa.Text))
    documents.create(engine)
    with engine.begin() as connection:
        for i in range(200):
            connection.execute(sa.insert(documents), {"id": i, "text": f"{i} " + "x" * (1_000_000 if i % 3 else 10)})
    tracemalloc.start()
    try:
        ids = [
            row["id"]
            for rows in read_sql(opener(engine), "SELECT id, text FROM documents ORDER BY id")
            for row in rows
            if row["text"].startswith(f"{row['id']} ")
        ]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ids == list(range(200))
    assert peak < 40_000_000


#: an expression of PostgreSQL, and its text in a prompt
POSTGRES_TEXTS = {
    """'{"new": true, "名": "<b> & ''"}'::jsonb""": """{"new": true, "名": "<b> & '"}""",
    """'{"z":1.50, "a":[null]}'::json""": '{"z": 1.5, "a": [null]}',
    "ARRAY['a', NULL, 'é']": '["a", null, "é"]',
    "ARRAY[[1, 2], [3, 4]]": "[[1, 2], [3, 4]]",
    "ARRAY[1.50, 100]::numeric[]": "[1.50, 100]",
    "DATE '2026-01-02'": "2026-01-02",
    "TIMESTAMP '2026-01-02 03:04:05.5'": "2026-01-02T03:04:05.500000",
    "TIMESTAMPTZ '2026-01-02 03:04:05+00'": "2026-01-02T03:04:05+00:00",
    "ARRAY[DATE '2026-01-02']": '["2026-01-02"]',
    "INTERVAL '1 day 2 hours'": "P1DT2H",
    "1e2::numeric": "100",
    "0.00001::float8": "0.00001",
    "int4range(1, 5)": "[1,5)",
    "true": "True",
    "NULL::jsonb": "",
    "'0f0e0d0c-0b0a-0908-0706-050403020100'::uuid": "0f0e0d0c-0b0a-0908-0706-050403020100",
}


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_prompt_shows_a_column_of_postgresql_as_people_write_it(postgres: Database, driver: str) -> None:
    """The same text from both drivers, by the fast way and by Jinja; BYTEA is refused by row and column."""
    engine = sa.create_engine(postgres.url.replace("+psycopg", f"+{driver}"), poolclass=sa.pool.NullPool)
    columns = ", ".join(f"{expression} AS c{number}" for number, expression in enumerate(POSTGRES_TEXTS))
    (rows,) = read_sql(opener(engine), f"SELECT {columns}, '\\x00ff'::bytea AS photo")
    assert isinstance(rows, Rows)
    for template in ("{{ row.c%d }}", "{{ row.c%d ~ '' }}"):
        found = {
            expression: RowTemplate(template % number, name="prompt").render_all(rows)[0]
            for number, expression in enumerate(POSTGRES_TEXTS)
        }
        assert found == POSTGRES_TEXTS
    with pytest.raises(RequestError, match=r"cannot write the column photo: it is binary .*convert_from\(photo, 'UTF8'\)"):
        RowTemplate("{{ row.photo }}", name="prompt").render_all(rows)

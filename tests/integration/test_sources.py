"""Rows of a query stream, however large they are."""

from __future__ import annotations

import tracemalloc

import sqlalchemy as sa

from airflow_provider_batchkit.source.sql import read_sql
from tests.databases import Database


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
            for rows in read_sql(engine, "SELECT id, text FROM documents ORDER BY id")
            for row in rows
            if row["text"].startswith(f"{row['id']} ")
        ]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ids == list(range(200))
    assert peak < 40_000_000

"""SQLite as a database of results."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from typing import Any, ClassVar

from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.landing.warehouse.alchemy import AlchemyWarehouse
from airflow_provider_batchkit.landing.warehouse.base import Columns

#: milliseconds that a writer waits for the file's lock
_BUSY_MS = 600_000


class SQLite(AlchemyWarehouse):
    """A SQLite file: one writer at a time, whose transaction takes the lock when it begins."""

    name: ClassVar[str] = "SQLite"
    url = "sqlite://"

    def prepare(self, connection: Any) -> None:
        connection.isolation_level = None
        self.run(connection, f"PRAGMA busy_timeout = {_BUSY_MS}")

    def begin(self, connection: Any) -> None:
        self.run(connection, "BEGIN IMMEDIATE")

    def stage(self, connection: Any, table: ResultTable, name: str, blocks: Iterable[Columns]) -> int:
        stage = self.stage_table(table, name)
        convert = [column.type.dialect_impl(self.dialect).bind_processor(self.dialect) for column in stage.columns]
        places = ", ".join("?" for _ in convert)
        with self.transaction(connection), closing(connection.cursor()) as cursor:
            self.create_stage(connection, stage)
            for block in blocks:
                values = [list(map(how, column)) if how else column for how, column in zip(convert, block, strict=True)]
                cursor.executemany(f"INSERT INTO {self.beside(table, name)} VALUES ({places})", zip(*values, strict=True))
        return self.count(connection, table, name)

"""PostgreSQL as a database of results, with psycopg 2 or 3."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import closing
from functools import cached_property
from typing import Any, ClassVar

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.landing.warehouse.alchemy import AlchemyWarehouse
from airflow_provider_batchkit.landing.warehouse.base import Columns
from airflow_provider_batchkit.ledger.bulk import copy_data

#: PostgreSQL documentation, "Error Codes": serialization_failure, deadlock_detected, lock_not_available
_CONFLICTS = ("40001", "40P01", "55P03")


class PostgreSQL(AlchemyWarehouse):
    """A PostgreSQL database: rows are locked, and a raised fence waits for the publish that holds it."""

    name: ClassVar[str] = "PostgreSQL"

    @cached_property
    def _is_psycopg2(self) -> bool:
        with closing(self._connect()) as connection:
            return type(connection).__module__.startswith("psycopg2")

    def _url(self) -> str:
        return "postgresql+psycopg2://" if self._is_psycopg2 else "postgresql+psycopg://"

    def prepare(self, connection: Any) -> None:
        encoding = self.rows(connection, "SHOW server_encoding")[0][0]
        if encoding != "UTF8":
            raise BatchInputError(
                f"The database behind {self.conn_id!r} has the encoding {encoding}, which lacks characters that answers have. Results land "
                "in a database in UTF8, or beside the ledger. Nothing was sent or written."
            )
        self.run(connection, "SET client_encoding TO 'UTF8'")
        # there are no statistics of a table that was filled a moment ago, and a nested loop over 100,000 rows takes hours
        self.run(connection, "SET enable_nestloop = off")
        connection.commit()

    def is_conflict(self, error: Exception) -> bool:
        return getattr(error, "sqlstate", None) in _CONFLICTS or getattr(error, "pgcode", None) in _CONFLICTS

    def stage(self, connection: Any, table: ResultTable, name: str, blocks: Iterable[Columns]) -> int:
        copy = f"COPY {self.beside(table, name)} FROM STDIN (ENCODING 'UTF8')"
        with self.transaction(connection), closing(connection.cursor()) as cursor:
            self.create_stage(connection, self.stage_table(table, name))
            for block in blocks:
                data = copy_data(block).encode()
                if self._is_psycopg2:
                    cursor.copy_expert(copy, io.BytesIO(data))
                else:
                    with cursor.copy(copy) as sink:
                        sink.write(data)
        found = self.count(connection, table, name)
        connection.commit()
        return found

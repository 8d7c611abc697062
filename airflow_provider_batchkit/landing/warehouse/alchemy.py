"""SQLite and PostgreSQL as databases of results: their tables are checked and created as those beside the ledger are."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.engine import Dialect, Engine

from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.landing.warehouse.base import Warehouse
from airflow_provider_batchkit.ledger.engine import prepare_engine
from airflow_provider_batchkit.ledger.names import table_identity


class AlchemyWarehouse(Warehouse):
    """A database whose dialect SQLAlchemy brings along, over the hook's own connections."""

    #: SQLAlchemy's URL, which says the dialect and nothing else
    url: ClassVar[str]

    @cached_property
    def engine(self) -> Engine:
        """An engine over the hook's connections, none of which is kept."""
        return prepare_engine(sa.create_engine(self._url(), creator=self._connect, poolclass=sa.pool.NullPool))

    def _url(self) -> str:
        return self.url

    @property
    def dialect(self) -> Dialect:
        return self.engine.dialect

    def identity(self, connection: Any, name: str) -> str:
        with self.engine.connect() as found:
            return table_identity(found, name)

    def check(self, connection: Any, table: ResultTable) -> bool:
        exists = table.check(self.engine)
        if exists:
            table.extend(self.engine)
        return exists

    def create(self, connection: Any, table: ResultTable, *, unique_key: bool) -> None:
        table.create(self.engine, unique_key=unique_key)

    def stage_table(self, table: ResultTable, name: str) -> sa.Table:
        """A staging table: its columns are typed as those of a new result table, its keys as those that the table compares with."""
        keys = dict(table.staged_keys(self.dialect))
        columns = [sa.Column(c, keys.get(c, table.table.c[c].type), nullable=True, autoincrement=False) for c in table.column_names]
        return sa.Table(name, sa.MetaData(), *columns, schema=table.table.schema)

    def create_stage(self, connection: Any, stage: sa.Table) -> None:
        """Create a staging table, in place of one that an earlier leg of the same attempt has left."""
        self.run(connection, f"DROP TABLE IF EXISTS {self.dialect.identifier_preparer.format_table(stage)}")
        self.run(connection, str(sa.schema.CreateTable(stage).compile(dialect=self.dialect)))

    def stages(self, connection: Any, table: ResultTable, prefix: str) -> list[str]:
        with self.engine.connect() as found:
            return [name for name in sa.inspect(found).get_table_names(schema=table.table.schema) if name.startswith(prefix)]

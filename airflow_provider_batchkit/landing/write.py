"""From the stage into the table and the ledger: a few statements, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.landing.refusal import not_kept
from airflow_provider_batchkit.landing.stage import StageTables
from airflow_provider_batchkit.landing.standing import forget_failures, remove_rows
from airflow_provider_batchkit.landing.table import ResultTable, WriteDisposition
from airflow_provider_batchkit.ledger import outcomes
from airflow_provider_batchkit.ledger.names import spelled
from airflow_provider_batchkit.ledger.records import BatchRecord
from airflow_provider_batchkit.ledger.tables import failed, succeeded
from airflow_provider_batchkit.model import ANSWERED, RequestStatus

_SUCCEEDED = RequestStatus.SUCCEEDED.value


def prepare_connection(connection: Connection) -> None:
    """Apply settings for a transaction that moves many rows.

    PostgreSQL's planner is kept from nested loops: it has no statistics of tables that were filled a moment ago, and takes 100,000 rows
    for one; a hash join is right for any number. SQLite's page caches, of the file and of the stage, hold 8 MB in place of 2. SQLite's
    connection is closed for good afterwards, which removes the stage: dropping it would take a tenth of a landing.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL enable_nestloop = off")
    elif connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA main.cache_size = -8000")
        connection.exec_driver_sql("PRAGMA temp.cache_size = -8000")
        connection.detach()


def queue_for_table(connection: Connection, table: ResultTable) -> None:
    """Wait until no other landing in the table is under way, and hold the queue until the transaction ends. Nobody else is held up.

    Two runs may answer the same keys: on PostgreSQL both would insert them, or lock each other's rows. SQLite has only one writer anyway.
    A table has one queue, however it is spelled.
    """
    if connection.dialect.name == "postgresql":
        name = f"batchkit {table.identity(connection)}"
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(name, 0))))


def has_triggers(connection: Connection, table: ResultTable) -> bool:
    """Whether the table has triggers or rules: they can keep a row out without an error."""
    name, schema = table.table.name, table.table.schema
    if connection.dialect.name == "postgresql":
        found = sa.text("SELECT relhastriggers OR relhasrules FROM pg_class WHERE oid = to_regclass(:name)")
        return bool(connection.execute(found, {"name": spelled(schema, name)}).scalar())
    catalog = sa.table("sqlite_master", sa.column("type"), sa.column("tbl_name"), schema=schema)
    triggers = sa.exists().where(catalog.c.type == "trigger", sa.func.lower(catalog.c.tbl_name) == name.lower())
    return bool(connection.execute(sa.select(triggers)).scalar())


def settle_outcomes(
    connection: Connection, stage: StageTables, record: BatchRecord, left_out: AbstractSet[str], *, any_failed: bool
) -> None:
    """Write each source row's outcome and cost to the ledger, again if the batch has landed before.

    :param left_out: keys that are not staged, because their outcome in another round stands
    :param any_failed: whether a staged row has no whole answer
    """
    outcomes.forget(connection, record.job_id, record.shard)
    forget_failures(connection, record, left_out)
    batch: dict[str, Any] = {"job_id": sa.literal(record.job_id), "shard": sa.literal(record.shard)}
    packed: dict[str, Any] = {column.name: column for column in stage.succeeded.columns}
    connection.execute(sa.insert(succeeded).from_select([*batch, *packed], sa.select(*batch.values(), *packed.values())))
    if not any_failed:
        return
    rows = stage.rows.c
    noted: dict[str, Any] = {
        "key": rows.batchkit_key,
        "custom_id": rows.custom_id,
        "asked": rows.batchkit_asked,
        "status": rows.status,
        "error_type": rows.error_type,
        "error_message": rows.error_message,
        "batch_cost_picousd": rows.batchkit_batch_cost,
        "standard_cost_picousd": rows.batchkit_standard_cost,
    }
    those = sa.select(*batch.values(), *noted.values()).where(rows.batchkit_key.is_not(None))
    if connection.dialect.name == "postgresql":
        # this order is near the primary key's, whatever the column's collation: it saves a third of the time, and pages of a large ledger
        those = those.order_by(rows.batchkit_key.collate("C"))
    connection.execute(sa.insert(failed).from_select([*batch, *noted], those))


class TableWriter:
    """Moves staged rows into the result table."""

    def __init__(
        self, connection: Connection, table: ResultTable, disposition: WriteDisposition, *, include_failed: bool, landed_at: datetime
    ) -> None:
        self._connection = connection
        self._table = table
        self._disposition = disposition
        self._include_failed = include_failed
        self._landed_at = landed_at

    def empty(self) -> None:
        """Delete every row of the table."""
        self._connection.execute(sa.delete(self._table.table))

    def write(self, rows: sa.Table, batch_id: str, record: BatchRecord | None, *, older: sa.Select[Any] | None = None) -> None:
        """Write one batch's staged rows by the disposition.

        :param older: ids of the batches whose answers it may overwrite; None for all. Given where the batch has landed before
        :raises TableError: the table would store a key as another one, or a trigger or a rule of it keeps a row out
        """
        self._table.check_keys(self._connection, rows, batch_id)
        target, names, keys = self._table.table, self._table.column_names, self._table.key_names
        staged: dict[str, sa.ColumnElement[Any]] = {
            **{column.name: column for column in rows.columns},
            "batch_id": sa.literal(batch_id, target.c.batch_id.type),
            "landed_at": sa.literal(self._landed_at, target.c.landed_at.type),
        }
        if "round" in self._table.written_results:
            staged["round"] = sa.literal(1 if record is None else record.round, target.c.round.type)
        staged.update({name: sa.cast(rows.c[name], target.c[name].type) for name in self._table.cast_names})
        wanted = sa.true() if self._include_failed else rows.c.status.in_([status.value for status in ANSWERED])
        same_key = sa.and_(*(target.c[name] == rows.c[name] for name in keys))
        select = sa.select(*(staged[name].label(name) for name in names)).select_from(rows).where(wanted)
        if self._disposition is not WriteDisposition.APPEND:
            # with replace, the table holds only rows of the same fetch, and another job's may have the same keys
            better = sa.or_(target.c.status != _SUCCEEDED, target.c.status.is_(None))
            over = sa.true() if older is None or self._disposition is WriteDisposition.REPLACE else target.c.batch_id.in_(older)
            better = sa.or_(sa.and_(rows.c.status == _SUCCEEDED, over), better)
            changed = {name: staged[name] for name in names if name not in keys}
            if not self._table.is_empty(self._connection) and self._connection.execute(sa.select(sa.exists().where(same_key))).scalar():
                self._connection.execute(sa.update(target).values(changed).where(same_key, wanted, better))
                self._refuse_lost(rows, batch_id, rows.join(target, same_key), sa.and_(wanted, better, target.c.batch_id != batch_id))
                self._connection.execute(sa.delete(rows).where(sa.exists().where(same_key)))
        else:
            own = target.c.batch_id == batch_id
            if older is not None:
                # a row without an answer is replaced; an answered row stays as it is
                self._connection.execute(sa.delete(target).where(own, target.c.status.not_in([status.value for status in ANSWERED])))
                self._connection.execute(sa.delete(rows).where(sa.exists().where(same_key, own)))
            else:
                self._connection.execute(sa.delete(target).where(own))
            if record is not None:
                remove_rows(self._connection, target, record, sa.exists().where(same_key, wanted))
        self._connection.execute(sa.insert(target).from_select(list(names), select))
        # SQLite makes itself an index for a join, and none for EXISTS
        there = rows.outerjoin(target, sa.and_(same_key, target.c.batch_id == batch_id))
        self._refuse_lost(rows, batch_id, there, sa.and_(wanted, target.c[keys[0]].is_(None)))

    def _refuse_lost(self, rows: sa.Table, batch_id: str, there: sa.FromClause, lost: sa.ColumnElement[bool]) -> None:
        """:raises TableError: a trigger or a rule has kept a staged row out: one of the join ``there`` is ``lost``"""
        if has_triggers(self._connection, self._table):
            key = rows.c[self._table.key_names[0]]
            found = self._connection.execute(sa.select(key).select_from(there).where(lost).limit(1)).first()
            if found is not None:
                raise not_kept(found[0], self._table.name, batch_id)

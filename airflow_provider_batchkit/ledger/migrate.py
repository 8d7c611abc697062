"""Migration of an older ledger to the present version, in place and in one transaction. It drops only columns that nothing reads any more.

Version 3 gave a row in doubt a running batch of the right size ("adopted") without proof, and exchanged the batch when its results proved
otherwise. Such rows go back to ``sending``, and are settled by proof. Their tasks may have passed the unproved id on, so the ledger keeps
it, and fetch finds the row by it.
"""

from __future__ import annotations

import json
import logging
import secrets

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateIndex

from airflow_provider_batchkit.exceptions import LedgerError
from airflow_provider_batchkit.ledger.engine import clock
from airflow_provider_batchkit.ledger.names import table_identity
from airflow_provider_batchkit.ledger.tables import UtcDateTime, batch, former_id, job, landing, load, metadata, prepared, turn, version

log = logging.getLogger(__name__)

#: the oldest version that can be migrated
OLDEST = 3


def migrate(connection: Connection, found: int) -> None:
    """Bring a ledger of version ``found``, from :data:`OLDEST` on, to the present version."""
    if connection.dialect.name == "postgresql":
        # no other connection may read or write the ledger between the old layout and the new one
        connection.exec_driver_sql("LOCK TABLE batchkit_version, batchkit_job, batchkit_batch IN ACCESS EXCLUSIVE MODE")
        found = connection.execute(sa.select(version.c.version)).scalar_one()
    for number, step in ((3, _from_3), (4, _from_4), (5, _from_5)):
        if found <= number:
            step(connection)
            log.info("The ledger was migrated from version %d to %d", number, number + 1)


def _add(connection: Connection, table: sa.Table, *names: str) -> None:
    quote = connection.dialect.identifier_preparer
    for name in names:
        column_type = table.c[name].type.compile(dialect=connection.dialect)
        connection.exec_driver_sql(f"ALTER TABLE {quote.format_table(table)} ADD COLUMN {quote.quote(name)} {column_type}")


#: columns of version 3 that version 4 does not have
_OLD = sa.Table(
    "batchkit_batch",
    sa.MetaData(),
    *(sa.Column(name, sa.Integer) for name in ("shard", "replaced_by")),
    *(sa.Column(name, sa.String) for name in ("job_id", "batch_id", "state", "adopted_id", "landed_table", "counts", "tally", "note")),
    *(sa.Column(name, UtcDateTime) for name in ("intended_at", "submitted_at", "created_at", "ended_at", "landed_at", "doubt_at")),
    sa.Column("adopted", sa.Boolean),
)


def _from_3(connection: Connection) -> None:
    _add(connection, version, "ledger_id")
    connection.execute(sa.update(version).values(version=4, ledger_id=secrets.token_hex(16)))
    _add(connection, job, "attempt_id", "skip_unchanged")
    _add(connection, batch, "doubt_at", "unseen_since", "unseen_at", "deleted_at")
    connection.execute(sa.update(job).values(skip_unchanged=sa.func.coalesce(job.c.unchanged_rows, 0) > 0))
    metadata.create_all(connection, tables=[landing, former_id])
    connection.execute(CreateIndex(next(index for index in job.indexes if index.name == "batchkit_job_task")))
    _note_landings(connection)
    _keep_former_ids(connection)
    _unsettle(connection)
    for name in ("adopted", "adopted_id", "replaced_by"):
        _drop_column(connection, name)


def _from_4(connection: Connection) -> None:
    _add(connection, version, "turns")
    metadata.create_all(connection, tables=[load, prepared, turn])
    connection.execute(sa.update(version).values(version=5))


def _from_5(connection: Connection) -> None:
    _add(connection, job, "asked")
    _add(connection, batch, "workspace")
    connection.execute(sa.update(version).values(version=6))


def _drop_column(connection: Connection, name: str) -> None:
    """Drop a column of ``batchkit_batch`` that the ledger no longer reads. On PostgreSQL a column that a user's view reads stays, nullable.

    :raises LedgerError: on another database, when a view or an index of the user's reads the column
    """
    try:
        with connection.begin_nested():
            connection.exec_driver_sql(f"ALTER TABLE batchkit_batch DROP COLUMN {name}")
    except DBAPIError as e:
        if connection.dialect.name != "postgresql":
            raise LedgerError(
                f"The ledger cannot be migrated: the column batchkit_batch.{name} is read by a view or an index of your own ({e.orig}). "
                "Nothing was changed or sent. Drop that view, run the task again, and make the view anew."
            ) from e
        log.warning("The column batchkit_batch.%s stays, since something of your own reads it: %s", name, e.orig)
        connection.exec_driver_sql(f"ALTER TABLE batchkit_batch ALTER COLUMN {name} DROP NOT NULL")


def _note_landings(connection: Connection) -> None:
    names: dict[str, str] = {}
    landed = sa.select(_OLD).where(_OLD.c.state == "landed", _OLD.c.landed_table.is_not(None))
    for row in connection.execute(landed).all():
        if row.landed_table not in names:
            names[row.landed_table] = table_identity(connection, row.landed_table)
        counts = json.loads(row.counts)
        connection.execute(
            sa.insert(landing).values(
                batch_id=row.batch_id,
                table_name=names[row.landed_table],
                number=1,
                landed_at=row.landed_at,
                rows_written=counts.get("succeeded", 0) + counts.get("invalid_output", 0),
                rows_answered=counts.get("succeeded", 0) + counts.get("invalid_output", 0),
                complete=not counts.get("missing"),
                counts=row.counts,
                tally=row.tally,
                created_at=row.created_at,
                ended_at=row.ended_at,
            )
        )


def _keep_former_ids(connection: Connection) -> None:
    """Note the unproved batch ids that rows had, since tasks may know the rows by them."""
    rows = {(row.job_id, row.shard): row for row in connection.execute(sa.select(_OLD)).all()}
    for (job_id, _), row in rows.items():
        known_as = row.batch_id if row.adopted else row.adopted_id
        if known_as is None:
            continue
        last = row
        while last.replaced_by is not None:
            last = rows[job_id, last.replaced_by]
        connection.execute(sa.delete(former_id).where(former_id.c.batch_id == known_as, former_id.c.job_id == job_id))
        connection.execute(sa.insert(former_id).values(batch_id=known_as, job_id=job_id, shard=last.shard))


def _unsettle(connection: Connection) -> None:
    """Put rows whose batch was never proved back in doubt, as of the moment at which their sender was known to be dead."""
    connection.execute(
        sa.update(_OLD)
        .where(_OLD.c.adopted, _OLD.c.state == "submitted")
        .values(
            state="sending",
            batch_id=None,
            created_at=None,
            submitted_at=None,
            doubt_at=sa.func.coalesce(_OLD.c.submitted_at, _OLD.c.intended_at),
            note=None,
        )
    )
    # these rows lost an unproved batch that was another row's; their tasks may fetch them before a submit opens the job
    known = sa.exists().where(former_id.c.job_id == _OLD.c.job_id, former_id.c.shard == _OLD.c.shard)
    waiting = sa.and_(_OLD.c.state == "sending", _OLD.c.doubt_at.is_(None), known)
    connection.execute(sa.update(_OLD).where(waiting).values(doubt_at=clock(connection)))

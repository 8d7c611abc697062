"""The flip: one transaction writes a prepared load to the ledger, once its rows are known to be in the table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.landing.report import BatchFigures
from airflow_provider_batchkit.landing.standing import forget_failures, lock_jobs, overtaken_keys
from airflow_provider_batchkit.ledger import Ledger, outcomes
from airflow_provider_batchkit.ledger.account import note_duration
from airflow_provider_batchkit.ledger.bulk import bulk_loader
from airflow_provider_batchkit.ledger.engine import write_transaction
from airflow_provider_batchkit.ledger.landings import note_landing
from airflow_provider_batchkit.ledger.loads import PreparedPart, drop_parts, lock_prepared, parts_of
from airflow_provider_batchkit.ledger.records import BatchRecord, record_of
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.ledger.tables import batch, failed, prepared, succeeded
from airflow_provider_batchkit.model import CostTally

#: keys of a landing's values that hold times
_TIMES = ("landed_at", "created_at", "ended_at")


def landing_part(batch_id: str, table: str, number: int, spelled: str, values: Mapping[str, Any], seconds: float) -> PreparedPart:
    """What the ledger must note about a batch's landing.

    :param table: the name by which the ledger knows the table
    :param spelled: the table as the task names it
    :param values: the result of :func:`~airflow_provider_batchkit.landing.reading.landing_values`
    :param seconds: duration of the landing so far
    """
    plain = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}
    noted = {"table": table, "number": number, "spelled": spelled, "values": plain, "seconds": seconds}
    return PreparedPart(batch_id, "landing", json.dumps(noted))


def flip(ledger: Ledger, load_id: str, published_by: str, attempt_id: str | None = None) -> list[BatchFigures] | None:
    """Write what a prepared load noted, and mark its batches as landed. None when that was done before.

    :param published_by: the attempt whose rows are in the table
    :param attempt_id: the attempt whose lease is compared; None for a caller that has read the marker behind the table's fence
    :returns: figures of the batches that had not landed before
    :raises LeaseLostError: when another attempt has the lease
    """
    with write_transaction(ledger.engine) as connection:
        noted = list(parts_of(connection, load_id, published_by, "landing"))
        records = {batch_id: _record(connection, batch_id) for batch_id, _ in noted}
        lock_jobs(connection, [record for record in records.values() if record is not None])
        if not lock_prepared(connection, load_id, attempt_id):
            return None
        left_out = dict(parts_of(connection, load_id, published_by, "left_out"))
        first = []
        for batch_id, landing in noted:
            values: dict[str, Any] = dict(landing["values"])
            values |= {name: None if values[name] is None else datetime.fromisoformat(values[name]) for name in _TIMES}
            note_landing(connection, batch_id, landing["table"], landing["number"], values)
            record, tally = records[batch_id], CostTally.from_json(json.loads(values["tally"]))
            counts = json.loads(values["counts"])
            if record is None or record.state is not BatchState.LANDED:
                first.append(BatchFigures(batch_id, Counter(counts), tally, _latency(values)))
            if record is None:
                continue
            columns = {column: values[column] for column in ("ended_at", "landed_at", "counts")}
            columns |= {"landed_table": landing["spelled"], "source_rows": sum(counts.values())}
            ledger.landed(connection, record, tally, columns)
            _settle(connection, load_id, published_by, record, batch_id, set(left_out.get(batch_id, ())))
            note_duration(connection, record.job_id, record.shard, landing["seconds"])
        drop_parts(connection, load_id)
        return first


def _record(connection: Connection, batch_id: str) -> BatchRecord | None:
    row = connection.execute(sa.select(batch).where(batch.c.batch_id == batch_id)).first()
    return None if row is None else record_of(row)


def _settle(connection: Connection, load_id: str, published_by: str, record: BatchRecord, batch_id: str, left_out: set[str]) -> None:
    """Write each source row's outcome and cost, in the same way as a landing in the ledger's database."""
    overtaken = overtaken_keys(connection, record)
    outcomes.forget(connection, record.job_id, record.shard)
    forget_failures(connection, record, left_out)
    owner = (sa.literal(record.job_id), sa.literal(record.shard))
    part = (prepared.c.part, prepared.c.asked, prepared.c.source_rows, prepared.c.entries)
    mine = sa.and_(prepared.c.load_id == load_id, prepared.c.attempt_id == published_by)
    here = sa.and_(mine, prepared.c.batch_id == batch_id, prepared.c.kind == "succeeded")
    names = ["job_id", "shard", "part", "asked", "source_rows", "entries"]
    connection.execute(sa.insert(succeeded).from_select(names, sa.select(*owner, *part).where(here)))
    for owner_id, rows in parts_of(connection, load_id, published_by, "failed"):
        rows = [row for row in rows if row[0] not in overtaken]
        if owner_id != batch_id or not rows:
            continue
        key, custom_id, asked, status, error_type, error_message, batch_cost, standard_cost = zip(*rows, strict=True)
        with bulk_loader(connection, failed) as loader:
            jobs, shards = [record.job_id] * len(rows), [record.shard] * len(rows)
            loader.write([jobs, key, shards, custom_id, asked, status, error_type, error_message, batch_cost, standard_cost])


def _latency(values: Mapping[str, Any]) -> float | None:
    created, ended = values["created_at"], values["ended_at"]
    return None if created is None or ended is None else (ended - created).total_seconds()

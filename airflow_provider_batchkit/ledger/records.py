"""Jobs and batches of the ledger as plain values."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Row

from airflow_provider_batchkit.cost.budget import Budget
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.model import Bound

#: a ``custom_id`` that this package gave: the job's id, a dash and a digest of the request
OUR_CUSTOM_ID = re.compile(r"(?P<job_id>[0-9a-f]{20})-[0-9a-f]{40}")


def make_job_id(ledger_id: str, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str:
    """20 hex characters that identify a task instance in a ledger. They are the same on every attempt, without the try number."""
    return hashlib.sha256(json.dumps([ledger_id, dag_id, run_id, task_id, map_index]).encode()).hexdigest()[:20]


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job: one task instance of a DAG run."""

    job_id: str
    dag_id: str
    run_id: str
    task_id: str
    map_index: int = -1


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A row of ``batchkit_batch``. Times are aware and UTC."""

    job_id: str
    shard: int
    batch_id: str | None
    anthropic_conn_id: str
    #: the workspace that it was sent to; None where an older version of the ledger did not note it
    workspace: str | None
    state: BatchState
    #: the number of the round that asked it, from 1
    round: int
    requests: int
    body_bytes: int
    intended_at: datetime
    #: when its sender was found dead or gave the POST up; None when the row is not in doubt
    doubt_at: datetime | None
    #: the first and the last of an unbroken series of looks that showed nothing
    unseen_since: datetime | None
    unseen_at: datetime | None
    created_at: datetime | None
    ended_at: datetime | None
    landed_at: datetime | None
    landed_table: str | None
    note: str | None

    def __str__(self) -> str:
        return f"shard {self.shard} of job {self.job_id} ({self.batch_id or 'no batch id yet'})"

    @property
    def settle_command(self) -> str:
        """The commands with which a person decides a doubt that cannot be proved either way."""
        command = f"python -m airflow_provider_batchkit settle {self.job_id} {self.shard} --sql-conn-id CONN"
        return f"`{command} --void` (its rows are asked again) or `{command} --is BATCH` (CONN is the connection of the task's ledger)"


@dataclass(frozen=True, slots=True)
class Intent:
    """The facts that are noted with a shard before it is sent."""

    anthropic_conn_id: str
    #: the workspace that it goes to
    workspace: str
    #: the most that the shard can cost
    bound: Bound
    #: the budget in which the bound counts; the attempt's hold on it is at least as large
    budget: Budget | None = None
    round_number: int = 1


def record_of(row: Row[Any]) -> BatchRecord:
    """A row of ``batchkit_batch``."""
    values = {one.name: getattr(row, one.name) for one in fields(BatchRecord)}
    return BatchRecord(**{**values, "state": BatchState(row.state)})

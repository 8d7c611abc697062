"""The lease of a job: only the latest attempt may write what leads to a POST."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.exceptions import LeaseLostError
from airflow_provider_batchkit.ledger.tables import job


def hold_lease(connection: Connection, job_id: str, lease: int) -> None:
    """Lock the job's row for the rest of the transaction.

    :raises LeaseLostError: when another attempt of the job has begun
    """
    held = connection.execute(sa.update(job).where(job.c.job_id == job_id, job.c.lease == lease).values(lease=lease))
    if held.rowcount == 0:
        raise lease_lost(job_id, lease)


def lease_lost(job_id: str, lease: int) -> LeaseLostError:
    """The error of an attempt that another one has taken over."""
    return LeaseLostError(
        f"Another attempt of job {job_id} has begun (this one holds lease {lease}). This attempt stops before it sends anything more; "
        "what it sent is in the ledger and belongs to the new attempt."
    )

"""The lease of a job: only the youngest attempt that has opened it, in its latest opening, may write what leads to a POST.

Attempts are ordered by the ids of their task instances. Airflow makes a new UUIDv7 for every try, so a later try has a greater id. The try
number does not order attempts, because it starts again when a DAG run is deleted and created anew.
"""

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
    """The error for an attempt whose lease another attempt has taken."""
    return LeaseLostError(
        f"Another attempt of job {job_id} has begun (this one holds lease {lease}). This attempt stops before it sends anything more; "
        "what it sent is in the ledger and belongs to the new attempt."
    )


def refuse_older(job_id: str, attempt_id: str, youngest: str | None) -> None:
    """:raises LeaseLostError: when a younger attempt of the job has opened it"""
    if youngest is not None and attempt_id < youngest:
        raise LeaseLostError(
            f"The attempt {attempt_id} of job {job_id} is older than {youngest}, which has opened the job. This attempt stops before it "
            "reads or sends anything; the younger one goes on."
        )

"""The schema of a job's answers: it is written before anything is sent, and read when the answers land."""

from __future__ import annotations

import logging

import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.ledger.engine import Part, write_transaction
from airflow_provider_batchkit.ledger.leases import hold_lease
from airflow_provider_batchkit.ledger.states import HELD
from airflow_provider_batchkit.ledger.tables import batch, job

log = logging.getLogger(__name__)

_ASKED = [state.value for state in HELD]


class Outputs(Part):
    """The part of the ledger that keeps the schemas of answers."""

    def note_output_schema(self, job_id: str, lease: int, schema: str | None, *, sends: bool) -> None:
        """Note the schema that the job's requests ask for. Answers are read by the schema with which they were asked.

        :param schema: the schema as JSON; None for plain text
        :param sends: whether this attempt has anything to send
        :raises BatchInputError: when it sends, and an earlier attempt has asked with another schema: the answers would not fit one table
        :raises LeaseLostError: when another attempt of the job has begun
        """
        with write_transaction(self.engine) as connection:
            hold_lease(connection, job_id, lease)
            noted = connection.execute(sa.select(job.c.output_schema).where(job.c.job_id == job_id)).scalar_one()
            if noted == schema:
                return
            asked = connection.execute(sa.select(sa.func.count()).where(batch.c.job_id == job_id, batch.c.state.in_(_ASKED))).scalar_one()
            if not asked:
                connection.execute(sa.update(job).where(job.c.job_id == job_id).values(output_schema=schema))
                return
        if sends:
            raise BatchInputError(
                f"An earlier attempt of this run has asked {asked} batches with another output_schema, and rows are left to ask. Put that "
                "schema back to ask them, or start a new DAG run with the new one. Nothing was sent by this attempt."
            )
        log.warning("output_schema has changed since this run asked its rows; their answers land by the schema that they were asked with")

    def output_schema_of(self, job_id: str) -> str | None:
        """The schema that the job's requests asked for, as JSON."""
        with self.engine.connect() as connection:
            text: str | None = connection.execute(sa.select(job.c.output_schema).where(job.c.job_id == job_id)).scalar_one()
        return text

"""The SQL ledger: the only door to the ``batchkit_*`` tables."""

from __future__ import annotations

from airflow_provider_batchkit.ledger.alerts import AlertClaim, Claim
from airflow_provider_batchkit.ledger.engine import prepare_connection, prepare_engine
from airflow_provider_batchkit.ledger.landings import Landed
from airflow_provider_batchkit.ledger.ledger import Ledger
from airflow_provider_batchkit.ledger.records import BatchRecord, Intent, JobRecord, make_job_id
from airflow_provider_batchkit.ledger.states import BatchState

__all__ = [
    "AlertClaim",
    "BatchRecord",
    "BatchState",
    "Claim",
    "Intent",
    "JobRecord",
    "Landed",
    "Ledger",
    "make_job_id",
    "prepare_connection",
    "prepare_engine",
]

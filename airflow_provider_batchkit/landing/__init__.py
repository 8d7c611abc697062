"""Results → the table and the ledger, in one transaction."""

from __future__ import annotations

from airflow_provider_batchkit.landing.land import check_table, land_batches
from airflow_provider_batchkit.landing.plan import Batch
from airflow_provider_batchkit.landing.report import BatchFigures, LandingReport
from airflow_provider_batchkit.landing.table import ResultTable, WriteDisposition

__all__ = ["Batch", "BatchFigures", "LandingReport", "ResultTable", "WriteDisposition", "check_table", "land_batches"]

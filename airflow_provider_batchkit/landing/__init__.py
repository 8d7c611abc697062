"""Results → the table and the ledger: in one transaction, or exactly once over two databases."""

from __future__ import annotations

from airflow_provider_batchkit.landing.elsewhere import land_elsewhere
from airflow_provider_batchkit.landing.files import OutputFiles, land_files
from airflow_provider_batchkit.landing.land import check_table, land_batches
from airflow_provider_batchkit.landing.plan import Batch
from airflow_provider_batchkit.landing.reading import Results
from airflow_provider_batchkit.landing.report import BatchFigures, LandingReport
from airflow_provider_batchkit.landing.table import ResultTable, WriteDisposition
from airflow_provider_batchkit.landing.target import LandingOptions
from airflow_provider_batchkit.landing.warehouse import Warehouse

__all__ = [
    "Batch",
    "BatchFigures",
    "LandingOptions",
    "LandingReport",
    "OutputFiles",
    "ResultTable",
    "Results",
    "Warehouse",
    "WriteDisposition",
    "check_table",
    "land_batches",
    "land_elsewhere",
    "land_files",
]

"""The operators' public names."""

from __future__ import annotations

from airflow_provider_batchkit.operators.fetch import FetchBatchOperator
from airflow_provider_batchkit.operators.run import RunBatchOperator
from airflow_provider_batchkit.operators.submit import SubmitBatchOperator

__all__ = ["FetchBatchOperator", "RunBatchOperator", "SubmitBatchOperator"]

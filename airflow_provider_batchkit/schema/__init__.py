"""Structured output: a JSON Schema as the API takes it, as SQL-neutral columns, and as the check of every answer."""

from __future__ import annotations

from airflow_provider_batchkit.schema.output import OutputSchema
from airflow_provider_batchkit.schema.types import Column

__all__ = ["Column", "OutputSchema"]

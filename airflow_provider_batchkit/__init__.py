"""Claude's answer for every row of a table, at half price: an Apache Airflow provider over Anthropic's Message Batches API.

``BatchKit`` is the same engine without Airflow. Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_provider_batchkit.cost.budget import Budget
    from airflow_provider_batchkit.cost.prices import PriceBook
    from airflow_provider_batchkit.jobs.rounds import Round
    from airflow_provider_batchkit.kit import BatchKit, Retrieval
    from airflow_provider_batchkit.model import BatchItem, BatchSnapshot, CostTally, RequestStatus, Usage

__version__ = "0.1.0"

__all__ = ["BatchItem", "BatchKit", "BatchSnapshot", "Budget", "CostTally", "PriceBook", "RequestStatus", "Retrieval", "Round", "Usage"]

_HOMES = {"BatchKit": "kit", "Budget": "cost.budget", "Retrieval": "kit", "PriceBook": "cost.prices", "Round": "jobs.rounds"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'model')}"), name)

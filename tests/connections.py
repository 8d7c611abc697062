"""Airflow connections of the tests, as URIs for ``AIRFLOW_CONN_…``."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote


def anthropic_connection(base_url: str, model: str | None = None, *, key: str = "test-key") -> str:
    """An ``anthropic`` connection to a simulator; ``model`` is the model for tasks that name none."""
    extra: dict[str, Any] = {"anthropic_client_kwargs": {"base_url": base_url}}
    if model is not None:
        extra["model"] = model
    return f"anthropic://:{key}@/?__extra__={quote(json.dumps(extra))}"

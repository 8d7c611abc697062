"""What Airflow's providers manager reads of this package."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Provider metadata. The ``anthropic`` connection type is the official provider's; this package adds none."""
    package = "airflow_provider_batchkit"
    integration = "Anthropic Message Batches"
    return {
        "package-name": "airflow-provider-batchkit",
        "name": "BatchKit",
        "description": "Claude's answer for every row of a table, through Anthropic's Message Batches API: never paid twice, never lost.",
        "integrations": [
            {
                "integration-name": integration,
                "external-doc-url": "https://platform.claude.com/docs/en/build-with-claude/batch-processing",
                "tags": ["ai"],
            }
        ],
        "hooks": [{"integration-name": integration, "python-modules": [f"{package}.hooks.batchkit"]}],
        "operators": [{"integration-name": integration, "python-modules": [f"{package}.operators.batch"]}],
        "sensors": [{"integration-name": integration, "python-modules": [f"{package}.sensors.batch"]}],
        "triggers": [{"integration-name": integration, "python-modules": [f"{package}.triggers.batch"]}],
    }

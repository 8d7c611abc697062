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
        "task-decorators": [{"name": "claude_batch", "class-name": f"{package}.decorators.claude_batch.claude_batch_task"}],
        "extra-links": [f"{package}.links.ConsoleLink"],
        # Airflow 3.1 does not read it
        "cli": [f"{package}.commands.registry.airflow_commands"],
        "config": {
            "batchkit": {
                "description": "Message batches: prices, checks, failures that pass, the ledger's place, times to look for batches, the "
                "Console's address.",
                "options": _OPTIONS,
            }
        },
    }


def _option(description: str, default: str | None = None, *, type_: str = "string", example: str | None = None) -> dict[str, Any]:
    return {"description": description, "version_added": "0.1.0", "type": type_, "example": example, "default": default}


_OPTIONS = {
    "price_overrides": _option(
        "Absolute path of a .json or .toml file with negotiated prices: a table per model, in USD per million tokens.",
        example="/opt/airflow/prices.toml",
    ),
    "live_prices": _option(
        "Fetch the newest prices (HTTPS) where a task needs some. The bundled ones are used when that fails.", "False", type_="boolean"
    ),
    "live_prices_url": _option("Where the newest prices are; genai-prices' own address when it is not set."),
    "allow_unknown_params": _option(
        "Names of Messages API parameters that are newer than the installed SDK, with commas between; a nested one with its "
        "path. Others that the SDK does not know are refused as misspelt before anything is sent. True lets every name through.",
        "False",
        example="verbosity, output_config.verbosity",
    ),
    "passing_errors": _option(
        "Failures of single requests that another round of asking may answer, beside those that BatchKit knows: regular "
        "expressions, one in each line or as a JSON list, that are searched in '<type>: <message>' of an error, whatever its case.",
        example="invalid_request_error: .*try again later",
    ),
    "absence_seconds": _option(
        "Seconds for which a batch may be missing from the API's list, or answer 404, although it is there. Before a shard "
        "counts as never accepted, or a batch as deleted, it is looked for over a longer span.",
        "900",
        type_="float",
    ),
    "ledger_conn_id": _option(
        "SQLite or PostgreSQL connection of the ledger, for tasks that name none. Without it the ledger lies beside each "
        "task's results, in its sql_conn_id.",
        example="batchkit_ledger",
    ),
    "ledger_schema": _option(
        "Schema of the ledger's tables in PostgreSQL, which must exist; that in which the connection creates tables when it is not set.",
        example="batchkit",
    ),
    "page_ledger_conn_ids": _option(
        "Connections of the ledgers that the Batches page shows, with commas between; that of ledger_conn_id when it is not "
        "set. Without ledger_conn_id, a task's ledger lies in its sql_conn_id.",
        example="warehouse, marketing",
    ),
    "show_content": _option(
        "Show words that may quote a prompt or an answer, such as why an answer did not fit its schema. Keys of rows, and "
        "the API's own error messages, are shown anyway.",
        "False",
        type_="boolean",
    ),
    "notify_after": _option(
        "Age of a running batch at which tasks that have notifiers tell them, once: 20h or 1d. A task's own notify_after counts before it.",
        example="20h",
    ),
    "console_url": _option(
        "The Claude Console's page of batches that tasks link to. Put your workspace's id in the place of default.",
        "https://platform.claude.com/settings/workspaces/default/batches",
    ),
}

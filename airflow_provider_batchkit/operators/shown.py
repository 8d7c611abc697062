"""Two further fields on Airflow's page of rendered templates: what a task asks of each row, and its caps.

The page shows only template fields, and Airflow renders those with its own context, which has no row. So these are separate values, wrapped
so that Airflow does not render them. They are JSON and the same at every parse, because Airflow makes a new version of the DAG when they
differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import literal

if TYPE_CHECKING:
    from airflow_provider_batchkit.cost.budget import Budget
    from airflow_provider_batchkit.jobs.rounds import Round

#: the names of the two fields; SHOWN_AS is how the page shows them
SHOWN = ("asks", "caps")
SHOWN_AS = dict.fromkeys(SHOWN, "json")


def shown_of(task: Any) -> tuple[Any, Any]:
    """The values of the two fields: the row's templates and parameters as the user gave them, and the caps."""
    asks = {"prompt": task.prompt, "system": task.system, "params": task.request_params}
    caps = {
        "max_tokens": task.max_tokens,
        "max_cost_usd": task.max_cost_usd,
        "budget": None if task.budget is None else _budget(task.budget),
        "rounds": [_round(one) for one in task.rounds] if len(task.rounds) > 1 else None,
        "dry_run": task.is_dry_run,
    }
    return tuple(literal(json.loads(json.dumps(_given(part), default=_text))) for part in (asks, caps))  # type: ignore[return-value]


def _budget(budget: Budget) -> dict[str, Any]:
    names = ("name", "usd", "tokens", "window", "on_exceeded", "alert_at")
    return _given({name: getattr(budget, name) for name in names})


def _round(one: Round) -> dict[str, Any]:
    return _given({name: getattr(one, name) for name in ("ask", "model", "max_tokens", "params")})


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, (), {})}


def _text(value: Any) -> Any:
    """A JSON form of a value that JSON does not have. It never contains an address in memory, which would differ at every parse."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    return str(value) if isinstance(value, Decimal) else f"<{type(value).__name__}>"

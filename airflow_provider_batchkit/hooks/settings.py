"""The settings of a deployment: the section ``batchkit`` of Airflow's configuration, as values for the stages.

Operators import this module when a DAG file is parsed, so each function imports what it needs itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from airflow.providers.common.compat.sdk import conf

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.progress import span_of

if TYPE_CHECKING:
    from airflow_provider_batchkit.cost.prices import PriceBook
    from airflow_provider_batchkit.jobs.settle import SettleTimes
    from airflow_provider_batchkit.request.failures import Failures

#: The connection of a task that names none. It equals the official hook's default, whose module would load the API's client.
DEFAULT_CONN_ID = "anthropic_default"


def configured_prices() -> PriceBook:
    """The price book of Airflow's configuration, section ``batchkit``.

    :raises BatchInputError: for an override file that cannot be used
    """
    from airflow_provider_batchkit.cost.prices import PriceBook, load_price_overrides

    path = conf.get("batchkit", "price_overrides", fallback=None)
    if path and not Path(path).is_absolute():
        raise BatchInputError(f"[batchkit] price_overrides must be an absolute path, not {path!r}. Nothing was sent or written.")
    return PriceBook(
        load_price_overrides(path) if path else None,
        live=conf.getboolean("batchkit", "live_prices", fallback=False),
        live_url=conf.get("batchkit", "live_prices_url", fallback=None) or None,
    )


def allowed_params() -> bool | list[str]:
    """Parameters of a request that are sent although the installed SDK does not know them; True for all of them."""
    from airflow_provider_batchkit.request.params import parse_allowed

    return parse_allowed(conf.get("batchkit", "allow_unknown_params", fallback=None))


def configured_failures() -> Failures:
    """The rules for which failures pass, with the patterns of Airflow's configuration.

    :raises BatchInputError: for a pattern that is not valid
    """
    from airflow_provider_batchkit.request.failures import Failures

    return Failures.parse(conf.get("batchkit", "passing_errors", fallback=None))


def absence_seconds() -> float:
    """Seconds for which a batch that answers 404 is looked at again before it counts as gone, in this deployment."""
    from airflow_provider_batchkit.api.polling import ABSENCE_S

    found: float = conf.getfloat("batchkit", "absence_seconds", fallback=ABSENCE_S)
    return found


def ledger_conn_ids() -> list[str]:
    """The connections of all ledgers that the configuration names, in order."""
    text = conf.get("batchkit", "page_ledger_conn_ids", fallback=None) or conf.get("batchkit", "ledger_conn_id", fallback=None) or ""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def notify_after() -> float | None:
    """The age of a batch, in seconds, at which tasks tell their notifiers; None where the deployment does not set it.

    :raises BatchInputError: when the setting is not a span of time
    """
    text = conf.get("batchkit", "notify_after", fallback=None)
    if not text:
        return None
    try:
        return span_of(text.strip()).total_seconds()
    except ValueError as e:
        raise BatchInputError(f"[batchkit] notify_after: {e}.") from None


def show_content() -> bool:
    """Whether the package may show people prompts and answers, or messages that quote them."""
    found: bool = conf.getboolean("batchkit", "show_content", fallback=False)
    return found


def settle_times(settle_seconds: float | None = None) -> SettleTimes:
    """The times of looking for a batch that a killed attempt may have sent, in this deployment.

    :param settle_seconds: the task's own seconds; None for the default
    """
    from airflow_provider_batchkit.jobs.settle import DEFAULT_TIMES, SettleTimes

    settle_s = DEFAULT_TIMES.settle_s if settle_seconds is None else float(settle_seconds)
    return SettleTimes(settle_s, absence_seconds())

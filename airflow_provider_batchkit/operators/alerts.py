"""Alerts of budgets, through Airflow's notifiers. An error of an alert is logged and fails no task."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import ROUND_DOWN, Decimal
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.cost.budget import SHARE_UNIT, Budget, BudgetStatus, window_of
from airflow_provider_batchkit.links import console_page
from airflow_provider_batchkit.model import usd_text
from airflow_provider_batchkit.operators.notifiers import tell

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_batchkit.exceptions import BudgetExceededError
    from airflow_provider_batchkit.ledger import AlertClaim, Ledger

log = logging.getLogger(__name__)


def tell_of_budget(context: Context, ledger: Ledger, budget: Budget, began: datetime, refused: BudgetExceededError | None) -> None:
    """Tell the budget's notifiers which shares of its cap were reached, and mark in the ledger the alerts that they took.

    :param began: when the submit began: it may have reserved in the window before the present one
    :param refused: the error when the budget had no room for what the submit asks; else None
    """
    moments = [began, datetime.now(UTC)]
    if len({window_of(budget.window, at) for at in moments}) == 1:
        moments.pop()
    for at in moments:
        try:
            logged = ""
            for claim in ledger.claim_alerts(budget, at=at, refused=refused is not None and at is moments[-1]):
                facts = facts_of(context, claim, str(refused) if refused is not None and claim.thresholds[-1] == SHARE_UNIT else None)
                if facts["message"] != logged:
                    logged = facts["message"]
                    log.warning("%s", logged)
                again = f"the next submit that counts in the budget {budget.name!r}"
                tell(ledger, claim, budget.notifiers[claim.notifier], context, facts, again=again)
        except Exception:  # the requests are sent and journaled, or were refused, and a failed alert must not change that
            log.warning("The alerts of the budget %r could not be told; the next submit tries again", budget.name, exc_info=True)


def facts_of(context: Context, claim: AlertClaim, refused: str | None) -> dict[str, Any]:
    """The value of ``batchkit`` in a notifier's context. Amounts are texts; those under ``usd`` and ``tokens`` are numbers."""
    status = claim.status
    usd = _figures(status.cap_usd, status.spent_usd, status.reserved_usd, status.remaining_usd)
    tokens = _figures(status.cap_tokens, status.spent_tokens, status.reserved_tokens, status.remaining_tokens)
    text: Callable[[Any], str]
    if usd is not None and (tokens is None or status.share == (status.spent_usd + status.reserved_usd) / usd["limit"]):
        nearer, text = usd, usd_text
    else:
        assert tokens is not None, "a budget caps something"
        nearer, text = tokens, lambda tokens: f"{tokens:,} tokens"
    reached = Decimal(claim.thresholds[-1]) / SHARE_UNIT
    facts = {
        "budget": status.name,
        "window": status.window,
        "window_start": claim.starts_at,
        "window_end": status.ends_at,
        "threshold": reached,
        "thresholds": [Decimal(threshold) / SHARE_UNIT for threshold in claim.thresholds],
        "share": status.share,
        "percent": _percent(status.share),
        **{name: text(amount) for name, amount in nearer.items()},
        "usd": usd,
        "tokens": tokens,
        "refused": refused,
        "link": task_link(context),
        "console": console_page(),
    }
    return {**facts, "message": _message(status, facts)}


def _message(status: BudgetStatus, facts: dict[str, Any]) -> str:
    what = "refused a task for which it has no room" if facts["refused"] else f"has reached {_percent(facts['threshold'])} of its cap"
    last = None if status.ends_at is None else status.ends_at - timedelta(days=1)
    window = "for ever" if last is None else f"the {status.window} until {last:%Y-%m-%d} (UTC)"
    return (
        f"The budget {status.name!r} {what}, {window}: {facts['spent']} spent and {facts['reserved']} reserved of {facts['limit']} "
        f"({facts['percent']}), {facts['left']} left. {facts['link']}"
    )


def _figures(limit: Any, spent: Any, reserved: Any, left: Any) -> dict[str, Any] | None:
    return None if limit is None else {"limit": limit, "spent": spent, "reserved": reserved, "left": left}


def _percent(share: Decimal) -> str:
    """The share in percent, rounded down, so that a threshold does not look reached before it is."""
    return f"{(share * 100).quantize(Decimal('0.1'), ROUND_DOWN).normalize():f}%"


def task_link(context: Context) -> str:
    """The task's address in Airflow, or the Console's page of batches where the task instance has none, as in a user's own tests."""
    return str(getattr(context.get("ti"), "log_url", None) or console_page())

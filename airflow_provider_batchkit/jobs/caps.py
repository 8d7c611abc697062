"""The estimate, and the caps that stop a job before its first POST. Both need the spooled shards.

``max_cost_usd`` caps a job, over all its attempts; a budget caps all jobs that name it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from airflow_provider_batchkit.cost.budget import Budget
from airflow_provider_batchkit.cost.checks import Counted
from airflow_provider_batchkit.cost.estimate import Estimate, bound_of, estimate_shards
from airflow_provider_batchkit.exceptions import CostLimitError
from airflow_provider_batchkit.kit import BatchKit
from airflow_provider_batchkit.ledger import JobRecord, Ledger
from airflow_provider_batchkit.model import Bound, usd_text
from airflow_provider_batchkit.request.shards import Shard

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a job may cost."""

    #: the cap on all of the job's batches together
    max_cost_usd: Decimal | None = None
    #: the cap on this job and all others that name the budget
    budget: Budget | None = None


NO_LIMITS = Limits()


class Spending:
    """The estimate of one attempt of a job, and the caps on it."""

    def __init__(self, kit: BatchKit, ledger: Ledger, job: JobRecord, lease: int, limits: Limits) -> None:
        self._kit = kit
        self._ledger = ledger
        self._job = job
        self._lease = lease
        self._limits = limits
        #: the moment whose prices count for the whole attempt, even when it runs past midnight
        self._at = datetime.now(UTC)

    def estimate(self, shards: Sequence[Shard], counted: Counted) -> Estimate:
        """The estimated cost of the shards; ``counted`` are the tokens of a sample."""
        return estimate_shards(
            shards,
            counted,
            self._kit.price_book,
            self._at,
            output_per_request=self._ledger.output_per_request(self._job.dag_id, self._job.task_id),
        )

    def bound(self, shard: Shard) -> Bound:
        """The most that a shard can cost. The bounds of the two halves of a shard add up to at most the shard's own bound."""
        return bound_of(shard.exposure, self._kit.price_book, self._at)

    @contextmanager
    def allowed(self, found: Estimate) -> Iterator[None]:
        """Send inside this block. Before it, the caps are checked and the budget holds the upper bound; after it, the rest is freed.

        :raises CostLimitError: when the job may cost too much, or its cost has no bound; nothing is held
        """
        if self._limits.max_cost_usd is not None:
            self._refuse_above(self._limits.max_cost_usd, found)
        budget = self._limits.budget
        if budget is None:
            yield
            return
        _refuse_unbounded(f"The budget {budget.name!r}", found)
        self._ledger.reserve(self._job.job_id, self._lease, budget, Bound(found.upper_usd, found.upper_tokens, found.why_unbounded))
        try:
            yield
        finally:
            self._ledger.give_up_hold(self._job.job_id, self._lease)

    def _refuse_above(self, limit: Decimal, found: Estimate) -> None:
        """Compare ``max_cost_usd`` with the upper bound plus what the batches of earlier attempts cost or may cost."""
        _refuse_unbounded(f"max_cost_usd={usd_text(limit)}", found)
        assert found.upper_usd is not None
        committed, unknown = self._ledger.committed_usd(self._job.job_id)
        if unknown:
            raise CostLimitError(
                f"max_cost_usd={usd_text(limit)} cannot be kept: nobody knows what {', '.join(unknown[:5])} of an earlier attempt may "
                "cost. Nothing was sent by this attempt."
            )
        if committed + found.upper_usd > limit:
            before = f" and earlier attempts of this task have spent or bound {usd_text(committed)}" if committed else ""
            raise CostLimitError(
                f"{found.requests:,} requests are expected to cost {usd_text(found.expected_usd)} and at most "
                f"{usd_text(found.upper_usd)}{before}: above max_cost_usd={usd_text(limit)}. Nothing was sent by this attempt. "
                "Lower max_tokens or the number of rows, or raise max_cost_usd."
            )


def _refuse_unbounded(cap: str, found: Estimate) -> None:
    if found.upper_usd is None:
        raise CostLimitError(
            f"{cap} cannot be kept: {found.why_unbounded}. Nothing was sent by this attempt. Send requests that nothing bounds from a task "
            "without a cap; give a model without a price a price override."
        )

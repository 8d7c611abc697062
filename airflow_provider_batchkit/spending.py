"""Between the spooled shards and the first POST: the estimate, and the caps that stop a job before it is sent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from airflow_provider_batchkit.estimate import Estimate, bound_of, estimate_shards, scan, usd_text
from airflow_provider_batchkit.exceptions import CostLimitError
from airflow_provider_batchkit.kit import BatchKit
from airflow_provider_batchkit.ledger import JobRecord, Ledger
from airflow_provider_batchkit.ledger.history import committed_usd, output_per_request
from airflow_provider_batchkit.model import Bound, Shard
from airflow_provider_batchkit.shards import read_bodies

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a job may cost."""

    #: for all of the job's batches together
    max_cost_usd: Decimal | None = None


NO_LIMITS = Limits()


class Spending:
    """What one attempt of a job will cost, and whether it may."""

    def __init__(self, kit: BatchKit, ledger: Ledger, job: JobRecord, limits: Limits) -> None:
        self._kit = kit
        self._ledger = ledger
        self._job = job
        self._limits = limits
        #: prices are those of one moment, also when an attempt goes over midnight
        self._at = datetime.now(UTC)
        self._bounds: dict[str, Bound] = {}

    def estimate(self, shards: Sequence[Shard]) -> Estimate:
        """Look at every request, and let the API count some."""
        found, bounds = estimate_shards(
            shards,
            self._kit.price_book,
            self._at,
            count_tokens=self._kit.count_tokens,
            output_per_request=output_per_request(self._ledger.engine, self._job.dag_id, self._job.task_id),
        )
        self._bounds = {shard.body_path: most for shard, most in zip(shards, bounds, strict=True)}
        return found

    def bound(self, shard: Shard) -> Bound:
        """The most that a shard can cost. A half of a shard is looked at anew; the halves' bounds add up to no more than the whole's."""
        known = self._bounds.get(shard.body_path)
        return known if known is not None else bound_of(scan(read_bodies(shard)), self._kit.price_book, self._at)

    def refuse_above_limit(self, found: Estimate) -> None:
        """Hold the upper bound, and what the job's batches of earlier attempts cost or may cost, against ``max_cost_usd``.

        :raises CostLimitError: with all the figures
        """
        limit = self._limits.max_cost_usd
        if limit is None:
            return
        if found.upper_usd is None:
            raise CostLimitError(
                f"max_cost_usd={usd_text(limit)} cannot be kept: {found.why_unbounded}. Nothing was sent by this attempt. Send such "
                "requests from a task without max_cost_usd, or give the model a price override."
            )
        committed, unknown = committed_usd(self._ledger.engine, self._job.job_id)
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

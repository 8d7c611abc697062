"""Priming the prompt cache: the first request of a job is sent alone, and the rest once it has ended and its system prompt is cached.

The requests of a batch run at the same time, so a batch whose prompt is not cached yet mostly writes the cache for each request, at more
than the plain price, and reads nothing. A single request before it writes the cache once for all of them.

The ledger is the only state: while the only batch of a job has one request, the job's primer is under way, on any attempt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from airflow_provider_batchkit.api.polling import ENDED, PollState
from airflow_provider_batchkit.jobs.waiting import WaitFor
from airflow_provider_batchkit.kit import BatchKit
from airflow_provider_batchkit.ledger import BatchRecord, BatchState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Priming:
    """How a job is primed. Priming never stops a job: however the primer ends, the rest is sent afterwards."""

    #: seconds for which the API caches the primer's prompt
    ttl_s: float
    #: seconds, from the primer's submit, that the rest waits for it
    timeout_s: float
    #: whether the wait is over: then the primer's result is logged and the rest is sent
    over: bool = False

    def wait(self, kit: BatchKit, batches: Sequence[BatchRecord]) -> WaitFor | None:
        """The wait before the job's next shard; None when it may be sent. A warning is logged when the cache then saves less.

        :param batches: the job's batches, by shard
        """
        live = [b for b in batches if b.state in (BatchState.SUBMITTED, BatchState.PREPARED, BatchState.LANDED)]
        if len(live) != 1 or live[0].requests != 1:
            return None
        (primer,) = live
        assert primer.batch_id is not None
        state = PollState([primer.batch_id], interval=0.0)
        kit.look(state)
        # ``found`` is None when looking failed
        found, now = state.seen.get(primer.batch_id), datetime.now(UTC)
        if found is None or found.processing_status != ENDED:
            until = primer.intended_at + timedelta(seconds=self.timeout_s)
            if not self.over and now < until:
                why = f"The first row is asked in {primer.batch_id}; the rest waits for it, until {until:%Y-%m-%d %H:%M:%S} UTC at most."
                return WaitFor((primer.batch_id,), until, until, why, about="primer")
            log.warning(
                "The primer %s has not been seen to end since %s. The rest is sent now, and may not find its system prompt in the cache.",
                primer.batch_id,
                primer.intended_at.isoformat(timespec="seconds"),
            )
        elif not found.counts.succeeded:
            log.warning("The primer %s has no answer, so it cached nothing. The rest is sent as it is.", primer.batch_id)
        elif found.ended_at is not None and now - found.ended_at > timedelta(seconds=self.ttl_s):
            log.warning(
                "The primer %s ended %d s ago, and the cache keeps a system prompt for %d s: the rest will not find it there.",
                primer.batch_id,
                (now - found.ended_at).total_seconds(),
                self.ttl_s,
            )
        else:
            log.info("The primer %s has ended; the rest follows while its system prompt is cached", primer.batch_id)
        return None

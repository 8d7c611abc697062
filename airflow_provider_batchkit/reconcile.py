"""What became of a shard whose POST nobody saw end: found and adopted, or proved never accepted. Only then is anything sent again.

The API has no idempotency key, so the batch is looked for among those of the workspace: created since the intent, of the same size, and
claimed by no row of the ledger. An ended candidate is proved by the first line of its results, whose ``custom_id`` is the shard's or is
not. A running one is adopted unproved, and proved when it lands.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from sqlalchemy.exc import IntegrityError

from airflow_provider_batchkit.exceptions import BatchUnavailableError, LedgerError, SubmitUncertainError
from airflow_provider_batchkit.kit import BatchKit
from airflow_provider_batchkit.ledger import BatchRecord, BatchState, Ledger
from airflow_provider_batchkit.model import BatchItem, BatchSnapshot
from airflow_provider_batchkit.polling import ENDED
from airflow_provider_batchkit.results import parse_stream

log = logging.getLogger(__name__)

#: how long an accepted batch may take to show in the list
SETTLE_S = 120.0
#: how far the API's clock may be behind ours
CLOCK_SKEW_S = 900.0
_LOOK_EVERY_S = 5.0
#: results are read in pieces of this size until the first line is whole
_PROOF_BYTES = 1 << 10


class Settler:
    """Settles the ``sending`` rows of a job before anything of it is sent."""

    def __init__(
        self,
        kit: BatchKit,
        ledger: Ledger,
        *,
        settle_seconds: float = SETTLE_S,
        clock_skew_seconds: float = CLOCK_SKEW_S,
        sleep: Callable[[float], None] = time.sleep,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        """
        :param settle_seconds: how long a shard is looked for, from now, before it counts as never accepted
        :param clock_skew_seconds: how far the API's clock may be behind ours
        :param fence: raises :class:`LeaseLostError` when another attempt of the job has begun; called before each move
        """
        self._kit = kit
        self._ledger = ledger
        self._settle_s = settle_seconds
        self._skew = timedelta(seconds=clock_skew_seconds)
        self._sleep = sleep
        self._fence = fence
        #: candidates that proved to be somebody else's
        self._disproved: set[str] = set()

    @property
    def answer_timeout_s(self) -> float:
        """How long a POST may wait for its answer: less than another attempt looks for its batch."""
        return 0.75 * self._settle_s

    def settle(self, job_id: str) -> None:
        """Move every ``sending`` row of the job to ``submitted`` or ``void``."""
        for record in self._ledger.batches(job_id):
            if record.state is BatchState.SENDING:
                self.settle_shard(record)

    def settle_shard(self, record: BatchRecord) -> None:
        """Move one ``sending`` row to ``submitted`` or ``void``.

        :raises SubmitUncertainError: when a batch that may be it still runs and another job has taken it, or the connection sees none
            of ours
        """
        log.warning("An earlier attempt may have sent %s (%s requests); looking for it", record, f"{record.requests:,}")
        deadline = time.monotonic() + self._settle_s
        while True:
            self._fence()
            if self._ledger.get(record.job_id, record.shard).state is not BatchState.SENDING:
                # its sender is alive after all, and has noted the API's answer
                return
            candidates = self._candidates(record)
            for candidate in candidates:
                if candidate.processing_status == ENDED and self._proves(record, candidate):
                    self._ledger.submitted(record.job_id, record.shard, candidate)
                    log.warning("Found %s: %s was accepted, as its results prove", candidate.batch_id, record)
                    return
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._sleep(min(_LOOK_EVERY_S, left))
        self._conclude(record, [c for c in candidates if c.processing_status != ENDED])

    def _conclude(self, record: BatchRecord, running: list[BatchSnapshot]) -> None:
        """The time is over. Only now is a running batch adopted: a sender that is alive has noted its own by now."""
        claims = self._ledger.claims([c.batch_id for c in running])
        for candidate in running:
            if candidate.batch_id in claims:
                continue
            self._fence()
            try:
                self._ledger.adopt(record.job_id, record.shard, candidate)
            except IntegrityError:
                # another job's settling took it a moment ago
                claims[candidate.batch_id] = record
                continue
            log.warning("Took %s for %s: it is still running, and proved when it lands", candidate.batch_id, record)
            return
        if claims:
            raise SubmitUncertainError(
                f"{record} may be {' or '.join(sorted(claims))}, which another job has taken for its own and which still runs. Its results "
                "will tell: run the task again when it has ended. Nothing was sent."
            )
        self._refuse_to_conclude_blindly(record)
        self._fence()
        try:
            self._ledger.void(
                record.job_id, record.shard, f"not among the workspace's batches at {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
            )
        except LedgerError:
            if self._ledger.get(record.job_id, record.shard).state is BatchState.SUBMITTED:
                return
            raise
        log.warning("No batch of %s exists: it was never accepted and nothing was billed. Its rows are sent anew", record)

    def _candidates(self, record: BatchRecord) -> list[BatchSnapshot]:
        """Batches of the record's size since its intent that nobody has proved to be his, the nearest to the intent first."""
        same_size = [
            s
            for s in self._kit.recent(record.intended_at - self._skew)
            if s.counts.total == record.requests and s.batch_id not in self._disproved
        ]
        claims = self._ledger.claims([s.batch_id for s in same_size])
        open_ = (s for s in same_size if s.batch_id not in claims or claims[s.batch_id].adopted)
        return sorted(open_, key=lambda s: abs((s.created_at - record.intended_at).total_seconds()))

    def _proves(self, record: BatchRecord, candidate: BatchSnapshot) -> bool:
        """Whether the first line of an ended batch's results is of the record's shard. Reads no more than that line."""
        custom_id = self.first_custom_id(candidate.batch_id)
        if custom_id is not None and self._ledger.asks(record, custom_id):
            return True
        self._disproved.add(candidate.batch_id)
        log.info("%s is not %s: its first result is %s", candidate.batch_id, record, custom_id)
        return False

    def _refuse_to_conclude_blindly(self, record: BatchRecord) -> None:
        """A key of another workspace sees none of our batches: with it, "not found" proves nothing.

        :raises SubmitUncertainError: when a batch that this connection submitted before is not visible either
        """
        witness = self._ledger.witness(record.anthropic_conn_id)
        if witness is None:
            return
        try:
            self._kit.get(witness)
        except BatchUnavailableError as e:
            raise SubmitUncertainError(
                f"{record} may have been accepted, and this connection cannot tell: it does not see {witness} either, which the connection "
                f"{record.anthropic_conn_id!r} submitted before. Point it at the workspace of that batch and run the task again. "
                "Nothing was sent."
            ) from e

    def first_custom_id(self, batch_id: str) -> str | None:
        """The ``custom_id`` of the first readable result line."""
        chunks = self._kit.stream_results(batch_id, chunk_bytes=_PROOF_BYTES)
        try:
            for item in parse_stream(chunks, keep_message=False):
                if isinstance(item, BatchItem):
                    return item.custom_id
        finally:
            chunks.close()
        return None

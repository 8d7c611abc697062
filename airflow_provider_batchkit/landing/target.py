"""Where batches land: a table beside the ledger, a table of another database, or files. This module has what these share."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.engine import Connection

from airflow_provider_batchkit.exceptions import BatchKitError
from airflow_provider_batchkit.landing.plan import Batch, Plan
from airflow_provider_batchkit.landing.reading import Reading
from airflow_provider_batchkit.landing.report import LandingReport
from airflow_provider_batchkit.landing.standing import Overtaken
from airflow_provider_batchkit.landing.table import ResultTable, WriteDisposition
from airflow_provider_batchkit.ledger import Ledger
from airflow_provider_batchkit.ledger.records import BatchRecord
from airflow_provider_batchkit.model import BatchSnapshot

log = logging.getLogger(__name__)

#: ended batches as the API shows them now, with their rows in the ledger
Seen = Sequence[tuple[BatchSnapshot, BatchRecord | None]]


@dataclass(frozen=True, slots=True)
class LandingOptions:
    """How batches land."""

    disposition: WriteDisposition = WriteDisposition.MERGE
    #: whether a row without a response is also written for each request that was not answered
    include_failed: bool = False
    #: whether batches are written again that have landed in the same place before
    rewrite: bool = False
    #: whether the database's own bulk path is avoided
    portable: bool = False

    @property
    def replaces(self) -> bool:
        """Whether the batches replace everything that was there."""
        return self.disposition is WriteDisposition.REPLACE


@dataclass(slots=True)
class Target(ABC):
    """A place where batches land."""

    ledger: Ledger
    table: ResultTable
    #: the place's name, as the task spells it
    name: str
    #: the place's name in the ledger
    known_as: str
    reading: Reading
    options: LandingOptions

    @abstractmethod
    def is_empty(self, books: Connection) -> bool:
        """Whether the place is empty, so that batches that have landed there must land anew.

        :param books: a connection to the ledger
        """

    @abstractmethod
    def land(self, plan: Plan, batches: Sequence[Batch], late: Seen | None, report: LandingReport) -> Plan:
        """Land batches together; returns the plan for the next ones.

        :param late: the batches, where they have already been looked at
        :raises Overtaken: what was read is no longer what must land; nothing was written
        """

    def land_all(self, batches: Sequence[Batch], report: LandingReport) -> None:
        """Land batches one after the other, or all at once for a ``replace``. Where one cannot land, the others still do."""
        plan = self.plan(batches)
        failures: list[BatchKitError] = []
        for ones in [batches] if self.options.replaces else [[batch] for batch in batches]:
            try:
                plan = self._land_together(plan, ones, report)
            except BatchKitError as e:
                failures.append(e)
        if failures:
            # the error that waiting or a retry may mend is raised: the other failures come up again after it
            first = min(failures, key=lambda e: (e.wait is None, not e.retryable))
            for other in failures:
                if other is not first:
                    log.warning("%s", other)
            first.landed = report.first
            raise first

    def plan(self, batches: Sequence[Batch]) -> Plan:
        """What must be written for the batches now."""
        with self.ledger.engine.connect() as books:
            return Plan.make(books, self.known_as, lambda: self.is_empty(books), batches, rewrite=self.options.rewrite)

    def has_landed(self, plan: Plan, batches: Sequence[Batch]) -> bool:
        """Whether nothing must be written for the batches, unless they lack answers."""
        if all(map(plan.has_landed, batches)):
            return True
        with self.ledger.engine.connect() as books:
            return self.would_replace_younger(books, plan, batches)

    def would_replace_younger(self, books: Connection, plan: Plan, batches: Sequence[Batch]) -> bool:
        """See :meth:`Plan.would_replace_younger`; always False where nothing is replaced."""
        return self.options.replaces and plan.would_replace_younger(books, batches)

    def look_at(self, batches: Sequence[Batch]) -> Seen:
        """The batches as the API shows them."""
        return [(self.reading.results.look(batch), batch.record) for batch in batches]

    def recall(self, plan: Plan, batches: Sequence[Batch], report: LandingReport) -> None:
        """Report batches that have landed before."""
        for batch in batches:
            log.info("%s has landed in %s before; nothing is written for it again", batch.batch_id, self.name)
            unfinished = self.ledger.unfinished(batch.record)
            report.recall(plan.landed[batch.batch_id], unfinished, is_foreign=batch.record is None)

    def _land_together(self, plan: Plan, batches: Sequence[Batch], report: LandingReport) -> Plan:
        while True:
            late = None
            if self.has_landed(plan, batches):
                late = self._look_for_the_rest(plan, batches)
                if late is None:
                    self.recall(plan, batches, report)
                    return plan
            try:
                return self.land(plan, batches, late, report)
            except Overtaken as e:
                log.info("%s Nothing was written: they are read again.", e)
                plan = self.plan(plan.batches)

    def _look_for_the_rest(self, plan: Plan, batches: Sequence[Batch]) -> Seen | None:
        """A batch that landed without some of its answers, when it can be read again; None when the API has nothing more to give."""
        (batch, *others) = batches
        if others or not plan.is_torn(batch) or self.options.replaces:
            return None
        try:
            return self.look_at(batches)
        except BatchKitError as e:
            log.warning("%s landed in %s without all of its answers, and cannot be read again: %s", batch.batch_id, self.name, e)
            return None

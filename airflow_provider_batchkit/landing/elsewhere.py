"""Landing in a database that is not the ledger's. Every answer lands once, wherever a process is killed or stopped.

The order of all steps matters; it is that of the protocol in DESIGN.md, "Exactly once into another database":

1. prepare (ledger): results are spooled to disk; outcomes and bill are noted, and the batches are ``prepared``;
2. stage (warehouse): a permanent staging table is filled, and its rows are counted;
3. take the turn (ledger), raise the fence (warehouse), and note in the ledger whatever is published and not noted yet;
4. publish (warehouse): one transaction with the fence, the rows and the load's marker;
5. flip (ledger): ``landed``; then the staging tables of this attempt and of older ones are dropped.

A load is what is published together: one batch, or for ``replace`` all batches of a fetch. If an attempt dies after step 4, the next one
finds the marker and only flips. Nothing is given up before the fence is raised and the marker has been read behind it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.exceptions import BatchGoneError, BatchUnavailableError, LeaseLostError, TableError
from airflow_provider_batchkit.landing.flip import flip, landing_part
from airflow_provider_batchkit.landing.land import look_again, older_than
from airflow_provider_batchkit.landing.plan import Batch, Plan, common_key, common_schema
from airflow_provider_batchkit.landing.reading import ReadBatch, Reading, Results, landing_values, refuse_to_lose
from airflow_provider_batchkit.landing.report import LandingReport
from airflow_provider_batchkit.landing.spool import Spool
from airflow_provider_batchkit.landing.standing import Overtaken
from airflow_provider_batchkit.landing.table import ResultTable, WriteDisposition
from airflow_provider_batchkit.landing.target import LandingOptions, Seen, Target
from airflow_provider_batchkit.landing.warehouse.base import Publish, Warehouse
from airflow_provider_batchkit.ledger import BatchRecord, BatchState, Ledger
from airflow_provider_batchkit.ledger.landings import landed_in
from airflow_provider_batchkit.ledger.loads import Load, LoadState
from airflow_provider_batchkit.ledger.tables import batch as batch_table
from airflow_provider_batchkit.model import BatchSnapshot

log = logging.getLogger(__name__)

#: Seconds after which a turn that was not given back may be taken. Its owner is dead, stopped, or still publishing, and the fence waits
#: for a publication.
TURN_S = 300.0
#: seconds that a landing waits for its turns in its worker slot
PATIENCE_S = 20.0
#: prefix of the names of staging tables, and the number of characters of a load's id that follow it
_STAGE, _ID = "batchkit_stage", 20


def land_elsewhere(
    ledger: Ledger,
    warehouse: Warehouse,
    batches: Sequence[Batch],
    table_name: str,
    results: Results,
    options: LandingOptions,
    *,
    attempt_id: str,
) -> LandingReport:
    """The same as :func:`~airflow_provider_batchkit.landing.land.land_batches`, into another database.

    :param attempt_id: id of the task instance's attempt; a younger attempt has a greater one, and takes over
    :raises LeaseLostError: a younger attempt lands the same batches
    :raises WarehouseBusyError: another process has the database to itself
    :raises TurnTakenError: another landing has the turn at the table; what is prepared is in the ledger, and the same call goes on
    """
    ledger.ensure()
    report = LandingReport(table=table_name)
    if not batches:
        return report
    table = ResultTable(table_name, common_key(ledger, batches), common_schema(ledger, batches), disposition=options.disposition)
    with warehouse.open() as connection:
        if not warehouse.check(connection, table):
            warehouse.create(connection, table, unique_key=options.disposition is not WriteDisposition.APPEND)
            warehouse.check(connection, table)
        warehouse.create_books(connection, table)
        known_as = warehouse.known_as(connection, table_name)
        warehouse.rollback(connection)
    fence = hashlib.sha256(f"{ledger.ledger_id()} {known_as.partition(':')[2]}".encode()).hexdigest()[:32]
    reading = Reading(ledger, table, results, options.include_failed)
    _Elsewhere(ledger, table, table_name, known_as, reading, options, warehouse, fence, attempt_id, PATIENCE_S).land_all(batches, report)
    return report


@dataclass(slots=True)
class _Elsewhere(Target):
    """A table in another database."""

    warehouse: Warehouse
    #: the table's fence in the warehouse
    fence: str
    attempt_id: str
    #: seconds that are left of :data:`PATIENCE_S`
    patience_s: float

    def is_empty(self, books: Connection) -> bool:
        with self.warehouse.open() as connection:
            return self.warehouse.is_empty(connection, self.table)

    def land(self, plan: Plan, batches: Sequence[Batch], late: Seen | None, report: LandingReport) -> Plan:
        """Land batches as one load."""
        load = self.ledger.open_load(self._fetch_id(plan, batches), self.known_as, self.attempt_id)
        published_by = self._published_by(load) if load.state is LoadState.PREPARED else None
        if published_by is not None:
            return self._flip(load, published_by, plan, batches, report)
        try:
            seen = late or self.look_at(batches)
        except BatchUnavailableError as e:
            if load.state is LoadState.PREPARED and e.wait is None:
                if self._was_published(load):
                    return self._recall_anew(plan, batches, report)
                if isinstance(e, BatchGoneError):
                    self._give_up(load, batches, e)
            raise
        return self._land(load, seen, plan, batches, report)

    # --- what is there ------------------------------------------------------------------------------------------------------------

    def _fetch_id(self, plan: Plan, batches: Sequence[Batch]) -> str:
        """The id of what lands where. It covers what has landed, so a load that completes or rewrites another one is a new load."""
        what = [self.ledger.ledger_id(), self.known_as, plan.number, sorted(batch.batch_id for batch in batches)]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]

    def _recall_anew(self, plan: Plan, batches: Sequence[Batch], report: LandingReport) -> Plan:
        """Report batches that have just been marked as landed without being read."""
        with self.ledger.engine.connect() as books:
            landed = landed_in(books, [batch.batch_id for batch in batches], self.known_as)
        plan = replace(plan, landed={**plan.landed, **landed})
        self.recall(plan, batches, report)
        return plan

    # --- an earlier attempt's load --------------------------------------------------------------------------------------------------

    def _published_by(self, load: Load) -> str | None:
        """The attempt whose rows are in the table, read without the fence. Where there were no rows, it is the last attempt to prepare."""
        if load.rows == 0:
            return load.prepared_by
        with self.warehouse.open() as connection:
            return self.warehouse.marked(connection, self.table, [load.load_id]).get(load.load_id)

    def _flip(self, load: Load, published_by: str, plan: Plan, batches: Sequence[Batch], report: LandingReport) -> Plan:
        first = flip(self.ledger, load.load_id, published_by, self.attempt_id)
        report.first += first or []
        log.info("Load %s was published by an earlier attempt, and is landed now", load.load_id)
        with self.warehouse.open() as connection:
            self._drop_stages(connection, load)
        return self._recall_anew(plan, batches, report)

    def _was_published(self, load: Load) -> bool:
        """Whether a load whose results can no longer be read was published. The marker is read behind the fence."""
        while True:
            with self._turn(load) as (connection, turn):
                if turn is not None:
                    return load.load_id in self._settle(connection, turn)

    def _give_up(self, load: Load, batches: Sequence[Batch], error: BatchGoneError) -> None:
        self.ledger.check_load(load)
        for batch in batches:
            if batch.record is not None and batch.record.batch_id == error.batch_id and batch.record.state is BatchState.PREPARED:
                self.ledger.gone(batch.record, error.reason)

    # --- a load -------------------------------------------------------------------------------------------------------------------

    def _land(
        self,
        load: Load,
        seen: Sequence[tuple[BatchSnapshot, BatchRecord | None]],
        plan: Plan,
        batches: Sequence[Batch],
        report: LandingReport,
    ) -> Plan:
        together = [record for _, record in seen if record is not None]
        with tempfile.TemporaryDirectory(prefix="batchkit-spool-") as folder:
            read = [self._read(Path(folder) / str(place), one, together) for place, one in enumerate(seen)]
            if self.options.replaces:
                refuse_to_lose(self.table, [one.landed for one in read])
            now = datetime.now(UTC)
            if not self._prepare(load, read, plan, now):
                raise Overtaken(f"Load {load.load_id} landed while its results were read.")
            rows = sum(one.stage.rows for one in read)
            if not rows:
                flip(self.ledger, load.load_id, self.attempt_id, self.attempt_id)
            elif not self._publish(load, self._fill_stage(load, read, now, rows), read, plan):
                return self._recall_anew(plan, batches, report)
        for one in read:
            report.include(one.landed)
        return plan

    def _read(self, path: Path, one: tuple[BatchSnapshot, BatchRecord | None], together: Sequence[BatchRecord]) -> ReadBatch[Spool]:
        snapshot, record = one
        return self.reading.read(
            lambda keys, ranks: Spool(path, self.table, keys, ranks, include_failed=self.options.include_failed), snapshot, record, together
        )

    def _prepare(self, load: Load, read: Sequence[ReadBatch[Spool]], plan: Plan, now: datetime) -> bool:
        parts = []
        for one in read:
            before = plan.before(one.batch_id)
            # a batch that fills a table anew keeps the time of its earlier landing
            values = landing_values(one.landed, now if before is None else before.landed_at)
            parts.append(landing_part(one.batch_id, self.known_as, plan.number, self.table.name, values, one.landed.read_s))
            parts += one.stage.parts(one.batch_id)

        def move(connection: Connection) -> None:
            for one in read:
                if one.record is not None:
                    self.ledger.prepared(connection, one.record)

        return self.ledger.prepare_load(load, sum(one.stage.rows for one in read), parts, move)

    def _fill_stage(self, load: Load, read: Sequence[ReadBatch[Spool]], now: datetime, rows: int) -> str:
        name = self._stage_name(load)
        blocks = chain.from_iterable(one.stage.blocks(one.batch_id, 1 if one.record is None else one.record.round, now) for one in read)
        with self.warehouse.open() as connection:
            found = self.warehouse.stage(connection, self.table, name, blocks)
        if found != rows:
            raise TableError(
                f"{rows:,} rows were to be staged for {self.table.name}, and {found:,} are in {name}. Nothing was written to the table; "
                "results stay with the API for 29 days."
            )
        return name

    def _publish(self, load: Load, stage: str, read: Sequence[ReadBatch[Spool]], plan: Plan) -> bool:
        """Steps 3 to 5, after which the load has landed. False when an older attempt has published it.

        :raises Overtaken: the staged rows are no longer what must land
        """
        while True:
            with self._turn(load) as (connection, turn):
                if turn is None:
                    continue
                try:
                    published_by = self._publish_now(connection, load, stage, turn, read, plan)
                except (Overtaken, LeaseLostError, TableError):
                    self._drop_stages(connection, load)
                    raise
                if published_by is not None:
                    self._drop_stages(connection, load)
                    return published_by == self.attempt_id
            log.info("Another landing in %s had a later turn; this one takes its next", self.table.name)

    def _publish_now(self, connection: Any, load: Load, stage: str, turn: int, read: Sequence[ReadBatch[Spool]], plan: Plan) -> str | None:
        """Publish and flip in a turn. Returns the attempt that has published, None when the fence is higher than the turn."""
        found = self._settle(connection, turn)
        if load.load_id in found:
            return found[load.load_id]
        self.ledger.check_load(load)
        try:
            how = self._how(load, stage, turn, read, plan, connection)
        except Overtaken:
            self.ledger.abandon_load(load)
            raise
        if not self.warehouse.publish(connection, self.table, self.fence, how):
            published_by = self.warehouse.marked(connection, self.table, [load.load_id]).get(load.load_id)
            if published_by is None:
                self.ledger.check_load(load)
                return None
        else:
            published_by = self.attempt_id
        flip(self.ledger, load.load_id, published_by, self.attempt_id)
        return published_by

    def _how(self, load: Load, stage: str, turn: int, read: Sequence[ReadBatch[Spool]], plan: Plan, connection: Any) -> Publish:
        """:raises Overtaken: another landing, a later round or a further row came after the results were read"""
        batch_id, record = read[0].batch_id, read[0].record
        with self.ledger.engine.connect() as books:
            look_again(books, read, plan, lambda: self.warehouse.is_empty(connection, self.table))
            self.warehouse.rollback(connection)
            if self.options.replaces:
                if plan.would_replace_younger(books, [Batch(one.batch_id, one.record) for one in read]):
                    raise Overtaken(f"{self.table.name} was filled while the results were read.")
                return Publish(load.load_id, self.attempt_id, stage, turn, self.options.disposition, batch_id, order=_order(read))
            found = older_than(books, batch_id, plan)
            older = None if found is None else list(books.execute(found).scalars())
            earlier: list[str] = []
            if record is not None and record.round > 1:
                b = batch_table.c
                before = sa.select(b.batch_id).where(b.job_id == record.job_id, b.round < record.round, b.batch_id.is_not(None))
                earlier = list(books.execute(before).scalars())
        return Publish(load.load_id, self.attempt_id, stage, turn, self.options.disposition, batch_id, older, earlier)

    # --- turns --------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self, load: Load) -> Iterator[tuple[Any, int | None]]:
        """A fresh turn at the table, with a connection and the fence raised to it. The turn is None where the fence is higher already."""
        began = time.monotonic()
        try:
            turn = self.ledger.wait_for_turn(load, TURN_S, self.patience_s)
        finally:
            self.patience_s = max(self.patience_s - (time.monotonic() - began), 0.0)
        try:
            with self.warehouse.open() as connection:
                raised = self.warehouse.raise_fence(connection, self.table, self.fence, turn)
                yield connection, turn if raised else None
        finally:
            self.ledger.give_turn_back(self.known_as, turn)

    def _settle(self, connection: Any, turn: int) -> dict[str, str]:
        """Mark as landed what other or earlier attempts have published; returns these loads. Call it behind the fence."""
        found = self.warehouse.marked(connection, self.table, self.ledger.prepared_loads(self.known_as))
        for load_id, published_by in found.items():
            if flip(self.ledger, load_id, published_by) is not None:
                log.info("Load %s was published and is landed now (turn %d)", load_id, turn)
        return found

    def _drop_stages(self, connection: Any, load: Load) -> None:
        """Drop the staging tables of this attempt, of older attempts of the same load, and of killed attempts of other loads."""
        mine = self._stage_name(load)
        found = [name for name in self.warehouse.stages(connection, self.table, f"{_STAGE}_") if name != mine]
        done = self.ledger.done_loads(load)
        self.warehouse.drop(connection, self.table, [mine, *(name for name in found if name[len(_STAGE) + 1 :][:_ID] in done)])

    def _stage_name(self, load: Load) -> str:
        return f"{_STAGE}_{load.load_id[:_ID]}_{hashlib.sha256(self.attempt_id.encode()).hexdigest()[:8]}"


def _order(read: Sequence[ReadBatch[Spool]]) -> list[str]:
    """The batches of a replace whose rows may have equal keys, the one whose rows stay last: of several jobs as they were given, of one job
    by its rounds. Empty where no key comes twice.
    """
    jobs = {one.batch_id if one.record is None else one.record.job_id for one in read}
    rounds = [1 if one.record is None else one.record.round for one in read]
    if len(jobs) > 1:
        return [one.batch_id for one in read]
    return [one.batch_id for _, one in sorted(zip(rounds, read, strict=True), key=lambda pair: pair[0])] if len(set(rounds)) > 1 else []

"""One pass over a batch's results: rows into a stage, and the outcomes and the bill."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.api.results import Reconciler
from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.cost.tally import TallyBuilder
from airflow_provider_batchkit.exceptions import ReplaceRefusedError, WrongBatchError
from airflow_provider_batchkit.landing.answers import AnswerReader
from airflow_provider_batchkit.landing.plan import Look
from airflow_provider_batchkit.landing.report import NAMED, LandedBatch, log_faults, log_unfinished
from airflow_provider_batchkit.landing.stage import AskedKeys, Stage
from airflow_provider_batchkit.landing.standing import NO_OTHERS, OtherRounds
from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.ledger import Ledger
from airflow_provider_batchkit.ledger.records import OUR_CUSTOM_ID, BatchRecord
from airflow_provider_batchkit.ledger.states import BatchState
from airflow_provider_batchkit.model import ANSWERED, BatchItem, BatchSnapshot, RequestStatus
from airflow_provider_batchkit.progress import Progress
from airflow_provider_batchkit.request.failed import FailedKinds

log = logging.getLogger(__name__)

#: number of requests without a result line that are staged together
_AT_A_TIME = 1_000
#: Reads a batch's first answers, each once, through a reconciler. It gets the API's count of results, and reports the bytes that came.
ReadBlocks = Callable[[str, Reconciler, int, Callable[[int], None]], Iterator[ResultBlock]]
AnyStage = TypeVar("AnyStage", bound=Stage)


@dataclass(frozen=True, slots=True)
class ReadBatch(Generic[AnyStage]):
    """A batch that has been read to its end."""

    landed: LandedBatch
    stage: AnyStage
    record: BatchRecord | None
    others: OtherRounds
    #: keys whose outcome in another round stands
    left_out: AbstractSet[str]
    #: number of the journal's last part when the journal was read
    last_part: int | None

    @property
    def batch_id(self) -> str:
        return self.landed.snapshot.batch_id


@dataclass(frozen=True, slots=True)
class Results:
    """Access to ended batches at the API, and to the prices of their results."""

    #: raises an error when a batch cannot be read
    look: Look
    read_blocks: ReadBlocks
    price_book: PriceBook


@dataclass(frozen=True, slots=True)
class Reading:
    """How a landing reads its batches."""

    ledger: Ledger
    table: ResultTable
    results: Results
    include_failed: bool

    def read(
        self,
        make_stage: Callable[[AskedKeys | None, Mapping[str, int]], AnyStage],
        snapshot: BatchSnapshot,
        record: BatchRecord | None,
        together: Sequence[BatchRecord],
    ) -> ReadBatch[AnyStage]:
        """Stream the results into a stage. Ids without a line become ``missing`` rows. The map of keys is freed at the end."""
        started = time.monotonic()
        last_part = None if record is None else self.ledger.last_part(record)
        keys = None if record is None else AskedKeys(self.ledger.rows_of(record))
        others = NO_OTHERS
        if record is not None and keys is not None:
            with self.ledger.engine.connect() as reading:
                others = OtherRounds.of(reading, record, together, keys)
        stage = make_stage(keys, others.ranks)
        answers = None if self.table.schema is None else AnswerReader(self.table.schema)
        tally = TallyBuilder(self.results.price_book, snapshot.created_at)
        foreign = FailedKinds() if record is None else None
        reconciler = Reconciler(None if keys is None else keys.billed)
        total = snapshot.counts.total
        progress = Progress(log, f"landing {snapshot.batch_id}", total)
        with stage.filling():
            for results in self.results.read_blocks(snapshot.batch_id, reconciler, total, lambda size: progress.add(0, size)):
                if foreign is not None:
                    refuse_our_own(snapshot, results)
                    foreign.add(results.custom_ids, results.statuses, results.error_types, results.error_messages)
                costs = tally.add_all(results)
                if answers is None:
                    stage.put(results, costs)
                else:
                    checked, values = answers.read_all(results)
                    stage.put(checked, costs, values)
                progress.rows += len(results)
            missing = list(reconciler.unanswered.items())
            if record is not None and reconciler.faults.foreign and missing:
                raise _wrong(snapshot, record, reconciler, len(missing))
            for start in range(0, len(missing), _AT_A_TIME):
                part = missing[start : start + _AT_A_TIME]
                absent = ResultBlock.of([BatchItem(custom_id, RequestStatus.MISSING) for custom_id, _ in part])
                absent.keys = [key for _, key in part]
                stage.put(absent, tally.add_all(absent))
        progress.done()
        names = [] if keys is None else [key for custom_id, billed in missing[:NAMED] for key in (billed, *keys.copies(custom_id))]
        log_unfinished(snapshot.batch_id, stage.unfinished)
        log_faults(snapshot, reconciler.faults, len(missing), names)
        rows = stage.counts.total() if self.include_failed else sum(stage.counts[status.value] for status in ANSWERED)
        first = record is None or record.state is not BatchState.LANDED
        read_s = time.monotonic() - started
        landed = LandedBatch(
            snapshot, stage.counts, stage.unfinished, tally.tally(), reconciler.faults, names, rows, first, read_s, foreign
        )
        stage.forget_keys()
        return ReadBatch(landed, stage, record, others, stage.left_out, last_part)


def landing_values(landed: LandedBatch, now: datetime) -> dict[str, object]:
    """Column values of a landing."""
    return {
        "landed_at": now,
        "rows_written": landed.rows,
        "rows_answered": sum(landed.counts[status.value] for status in ANSWERED),
        "complete": landed.complete and not landed.faults.foreign,
        "counts": json.dumps(dict(sorted(landed.counts.items()))),
        "tally": json.dumps(landed.tally.to_json(with_lines=True)),
        "created_at": landed.snapshot.created_at,
        "ended_at": landed.snapshot.ended_at,
    }


def refuse_to_lose(table: ResultTable, landed: Sequence[LandedBatch]) -> None:
    """Refuse a ``replace`` unless every request has a readable result and at least one has an answer: only then the old rows may go."""
    torn = [one for one in landed if not one.complete]
    answered = sum(one.counts[status.value] for one in landed for status in ANSWERED)
    if not torn and answered:
        return
    faults = [
        f"{one.snapshot.batch_id}: {one.counts[RequestStatus.MISSING.value]:,} requests without a result line, {one.faults.broken:,} "
        f"unreadable lines, {one.faults.short:,} lines fewer than the API counts"
        for one in torn
    ]
    why = "; ".join(faults) or f"none of {sum(one.counts.total() for one in landed):,} rows has an answer"
    raise ReplaceRefusedError(
        f"The rows of {table.name} were to be replaced, and {why}. Nothing was written or deleted: the old rows stay. What was answered is "
        "billed and can be read for 29 days. Run the task again to read the results again, or land what there is with "
        'write_disposition="merge".',
        torn=bool(torn),
    )


def refuse_our_own(snapshot: BatchSnapshot, results: ResultBlock) -> None:
    """Refuse a batch that this package sent but the ledger does not have: its results would not get its rows' keys."""
    ours = next((custom_id for custom_id in results.custom_ids if OUR_CUSTOM_ID.fullmatch(custom_id)), None)
    if ours is not None:
        raise WrongBatchError(
            f"{snapshot.batch_id} was sent by this provider for job {ours.partition('-')[0]} ({ours} is one of its results), and no row of "
            "this ledger has it. Nothing was written. Fetch it with the ledger_conn_id, or else the sql_conn_id, that submitted it; when "
            "that is this one, clear the submit task, which settles what is in doubt and gives the ids of its own batches. Its answers, "
            f"without their rows' keys, can be read with BatchKit().retrieve({snapshot.batch_id!r})."
        )


def _wrong(snapshot: BatchSnapshot, record: BatchRecord, reconciler: Reconciler, missing: int) -> WrongBatchError:
    faults = reconciler.faults
    return WrongBatchError(
        f"{snapshot.batch_id} has {faults.foreign:,} results that {record} did not ask, the first is {faults.foreign_sample}, and lacks "
        f"{missing:,} that it did ask: it is another job's. Nothing of it was written. Decide what becomes of the row: "
        f"{record.settle_command}."
    )

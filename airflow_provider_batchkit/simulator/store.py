"""The batches of one simulator: their life from ``in_progress`` to ``ended``, who may see them, and what they cost in tokens."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec

from . import answers, lines, validate
from .errors import ApiError
from .intake import Intake
from .outcomes import Outcome, SlipError, chance
from .records import Record
from .settings import ARCHIVED_AFTER_SECONDS, EXPIRES_AFTER_SECONDS, Count, SimulatorSettings, clock_mode

_TTL_SECONDS = {"5m": 300, "1h": 3600}
_BILL_LINE = (
    "requests",
    "input_tokens",
    "output_tokens",
    "cache_write_5m_tokens",
    "cache_write_1h_tokens",
    "cache_read_tokens",
    "web_search_requests",
)


class Spell(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long a batch is hidden: for ``calls`` where that is above 0, else for ``seconds``. By default it is not hidden."""

    seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    calls: Count = 0


@dataclass
class Batch:
    """A batch. Times are seconds since the epoch on the simulator's clock."""

    id: str
    workspace: str
    number: int
    records: list[Record]
    created_at: float
    size: int
    first_custom_id: str
    looks: int = 0
    cancel_looks: int = 0
    cancel_initiated_at: float | None = None
    ended_at: float | None = None
    archived_at: float | None = None
    #: the time until which lists leave the batch out and its id is unknown
    hidden_until: float = 0.0
    hidden_calls: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * len(Outcome))

    @property
    def status(self) -> str:
        if self.ended_at is not None:
            return "ended"
        return "in_progress" if self.cancel_initiated_at is None else "canceling"

    def as_json(self, base_url: str) -> dict[str, Any]:
        """The MessageBatch object. Until the batch has ended all its requests count as processing, unless its counters move."""
        ended = self.ended_at is not None
        return {
            "id": self.id,
            "type": "message_batch",
            "processing_status": self.status,
            "request_counts": {
                "processing": self.size - sum(self.counts),
                **{outcome.name.lower(): self.counts[outcome] for outcome in Outcome},
            },
            "ended_at": rfc3339(self.ended_at),
            "created_at": rfc3339(self.created_at),
            "expires_at": rfc3339(self.created_at + EXPIRES_AFTER_SECONDS),
            "archived_at": rfc3339(self.archived_at),
            "cancel_initiated_at": rfc3339(self.cancel_initiated_at),
            "results_url": f"{base_url}/v1/messages/batches/{self.id}/results" if ended and self.archived_at is None else None,
        }


def rfc3339(seconds: float | None) -> str | None:
    """Seconds since the epoch as the API writes times: UTC with microseconds and ``+00:00``."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")


class Store:
    """All batches, under one lock. Bodies are read outside the lock, so a large batch delays no other call.

    A caller gets a copy of a batch, which does not change when another thread changes the batch while the answer is written.
    """

    def __init__(self, settings: SimulatorSettings) -> None:
        self.settings = settings
        self._lock = threading.RLock()
        self._advanced = 0.0
        self._batches: dict[str, Batch] = {}
        #: id → creation number; it is kept after a delete, so that a deleted batch still serves as a cursor
        self._numbers: dict[str, int] = {}
        self._struck: set[tuple[str, str]] = set()
        self._cached_until: dict[tuple[str, str], float] = {}
        self._bill: dict[tuple[str, str], dict[str, int]] = {}
        self._accepted_requests = 0

    def now(self) -> float:
        """Seconds since the epoch on the simulator's clock."""
        return time.time() + self.settings.skew_seconds + self._advanced

    # --- calls of clients ---

    def create(self, body: bytearray, workspace: str, *, beta: bool, hidden: Spell = Spell()) -> Batch:  # noqa: B008 - immutable
        """Creates a batch from a create call's body, which begins ``hidden``. Raises ApiError (400), and then nothing was accepted."""
        settings = self.settings
        raws = validate.batch_body(body, settings)
        self._refresh_all()
        now = self.now()
        intake = Intake(
            settings,
            seen=lambda digest: (workspace, digest) in self._struck,
            cached=lambda prefix: self._cached_until.get((workspace, prefix), 0.0) > now,
        )
        ids: set[str] = set()
        records: list[Record] = []
        for position, raw in enumerate(raws):
            custom_id, params = validate.batch_request(raw, position, strict=settings.strict_params)
            if custom_id in ids:
                raise ApiError(400, f"requests: custom_id's must be unique within a batch. Duplicate custom_id found: {custom_id}")
            ids.add(custom_id)
            records.append(self._record(intake, custom_id, params, position, beta=beta))
        with self._lock:
            self._check_queue(workspace, len(records))
            now = self.now()
            id_ = "msgbatch_" + secrets.token_hex(12)
            batch = Batch(id_, workspace, len(self._numbers), records, now, len(records), records[0].custom_id)
            self._hide(batch, hidden)
            self._batches[batch.id] = batch
            self._numbers[batch.id] = batch.number
            self._accepted_requests += batch.size
            self._struck.update((workspace, digest) for digest in intake.struck)
            return replace(batch)

    def _record(self, intake: Intake, custom_id: str, params: msgspec.Raw | ApiError, position: int, *, beta: bool) -> Record:
        """The record of one request; a request with bad params is errored from the start."""
        try:
            if isinstance(params, ApiError):
                raise params
            return intake.record(custom_id, params, beta=beta)
        except SlipError:
            raise
        except ApiError as error:
            if self.settings.strict_params:
                raise ApiError(400, f"requests.{position}.params.{error.message}") from error
            return Record(custom_id, outcome=Outcome.ERRORED, error_type=error.type, error=error.message)

    def _check_queue(self, workspace: str, size: int) -> None:
        """Raises ApiError (429) when more requests of the workspace would be processing than the queue takes."""
        limit = self.settings.queue_requests
        if limit is None:
            return
        self._refresh_all()
        waiting = sum(batch.size for batch in self._batches.values() if batch.workspace == workspace and batch.ended_at is None)
        if waiting + size > limit:
            raise ApiError(
                429,
                f"{size} requests and {waiting} that are processing are more than the {limit} that the batch queue takes. Try again later.",
            )

    def look(self, batch_id: str, workspace: str) -> Batch:
        """A retrieve. Raises ApiError (404) for an unknown id and for another workspace's batch."""
        with self._lock:
            batch = self._find(batch_id, workspace)
            self._refresh(batch, look=True)
            return replace(batch)

    def page(self, workspace: str, limit: int, after_id: str | None, before_id: str | None) -> tuple[list[Batch], bool]:
        """One page, newest first, and whether more lie beyond it in the direction of the cursor. Raises ApiError (400)."""
        if after_id and before_id:
            raise ApiError(400, "after_id and before_id cannot be used together")
        with self._lock:
            for name, cursor in (("after_id", after_id), ("before_id", before_id)):
                if cursor and cursor not in self._numbers:
                    raise ApiError(400, f"{name}: {cursor} is not a known batch")
            of_caller = (batch for batch in reversed(self._batches.values()) if batch.workspace == workspace)
            newest_first = [batch for batch in of_caller if not self._is_hidden(batch)]
            if before_id:
                found = [batch for batch in newest_first if batch.number > self._numbers[before_id]]
                page = found[-limit:]
            else:
                found = [batch for batch in newest_first if not after_id or batch.number < self._numbers[after_id]]
                page = found[:limit]
            for batch in page:
                self._refresh(batch, look=True)
            return [replace(batch) for batch in page], len(found) > len(page)

    def cancel(self, batch_id: str, workspace: str) -> Batch:
        """Starts canceling. Raises ApiError: 404, or 400 when the batch has ended."""
        with self._lock:
            batch = self._find(batch_id, workspace)
            if batch.ended_at is not None:
                raise ApiError(400, f"Batch {batch_id} cannot be canceled because it has already ended")
            if batch.cancel_initiated_at is None:
                batch.cancel_initiated_at = self.now()
            return replace(batch)

    def delete(self, batch_id: str, workspace: str) -> None:
        """Forgets an ended batch. Raises ApiError: 404, or 400 when it has not ended."""
        with self._lock:
            if self._find(batch_id, workspace).ended_at is None:
                raise ApiError(400, "In progress batches cannot be deleted. Consider canceling the batch instead.")
            del self._batches[batch_id]

    def results(self, batch_id: str, workspace: str) -> Iterator[bytes]:
        """The result lines. Raises ApiError (404): for an unknown, foreign or archived batch, and when it has not ended."""
        with self._lock:
            batch = self._find(batch_id, workspace)
            if batch.archived_at is not None:
                at = rfc3339(batch.archived_at)
                raise ApiError(404, f"The results of batch {batch_id} are no longer available: it was archived at {at}")
            if batch.ended_at is None:
                raise ApiError(404, f"Message Batch {batch_id} has no available results.")
            return lines.result_lines(batch.records, batch.id, self.settings.seed)

    # --- control calls ---

    def _known(self, batch_id: str) -> Batch:
        if batch_id not in self._batches:
            raise ApiError(404, f"no batch {batch_id}")
        return self._batches[batch_id]

    def finish(self, batch_id: str, how: str) -> Batch:
        """Ends a batch. ``how`` is ``end`` (as scripted, or canceled if it is canceling), ``expire`` or ``archive`` (drops results)."""
        with self._lock:
            batch = self._known(batch_id)
            if how == "end":
                self._end(batch, self.now(), Outcome.CANCELED if batch.cancel_initiated_at is not None else None)
            elif how == "expire":
                self._end(batch, self.now(), Outcome.EXPIRED)
            else:
                self._end(batch, self.now(), None)
                self._archive(batch, self.now())
            return replace(batch)

    def hide(self, batch_id: str, spell: Spell) -> Batch:
        """Makes a batch invisible from now on. Raises ApiError (404) for an unknown id."""
        with self._lock:
            batch = self._known(batch_id)
            self._hide(batch, spell)
            return replace(batch)

    def _hide(self, batch: Batch, spell: Spell) -> None:
        batch.hidden_calls = spell.calls
        batch.hidden_until = 0.0 if spell.calls else self.now() + spell.seconds

    def _is_hidden(self, batch: Batch) -> bool:
        """Whether the batch is hidden from a call that asks for it now. The call is counted."""
        if batch.hidden_calls:
            batch.hidden_calls -= 1
            return True
        return self.now() < batch.hidden_until

    def advance(self, seconds: float) -> float:
        """Moves the simulator's clock forward and returns its new time."""
        with self._lock:
            self._advanced += seconds
            self._refresh_all()
            return self.now()

    def custom_ids(self, batch_id: str) -> list[str]:
        """The custom_ids of a batch in the order asked; empty for an archived batch. Raises ApiError (404)."""
        with self._lock:
            return [record.custom_id for record in self._known(batch_id).records]

    def stats(self) -> dict[str, Any]:
        """Accepted batches and requests, the bill, and an entry for every batch that was not deleted, oldest first."""
        with self._lock:
            self._refresh_all()
            return {
                "batches_accepted": len(self._numbers),
                "requests_accepted": self._accepted_requests,
                "bill": _per_model(self._bill),
                "bill_lines": [{"model": m, "inference_geo": g, **line} for (m, g), line in self._bill.items()],
                "batches": [
                    {
                        "id": batch.id,
                        "workspace": batch.workspace,
                        "size": batch.size,
                        "status": batch.status,
                        "created_at": rfc3339(batch.created_at),
                        "first_custom_id": batch.first_custom_id,
                    }
                    for batch in self._batches.values()
                ],
            }

    # --- the life of a batch ---

    def _find(self, batch_id: str, workspace: str) -> Batch:
        batch = self._batches.get(batch_id)
        if batch is None or batch.workspace != workspace or self._is_hidden(batch):
            raise ApiError(404, f"Message Batch {batch_id} not found.")
        self._refresh(batch, look=False)
        return batch

    def _refresh_all(self) -> None:
        with self._lock:
            for batch in self._batches.values():
                self._refresh(batch, look=False)

    def _refresh(self, batch: Batch, *, look: bool) -> None:
        """Brings a batch up to date with the clock. A look counts only when its answer shows a batch that has not ended."""
        now = self.now()
        if batch.ended_at is None:
            mode, least, most = clock_mode(self.settings.clock)
            amount = least if most == least else least + (most - least) * chance(self.settings.seed, "life", str(batch.number))
            if now >= batch.created_at + EXPIRES_AFTER_SECONDS:
                self._end(batch, batch.created_at + EXPIRES_AFTER_SECONDS, Outcome.EXPIRED)
            elif batch.cancel_initiated_at is not None:
                if mode != "manual" and batch.cancel_looks >= self.settings.cancel_looks:
                    self._end(batch, now, Outcome.CANCELED)
                batch.cancel_looks += look
            elif mode == "seconds" and now >= batch.created_at + amount:
                self._end(batch, batch.created_at + amount, None)
            elif mode == "polls" and batch.looks >= amount:
                self._end(batch, now, None)
            else:
                if self.settings.moving_counts:
                    done = (now - batch.created_at) / amount if mode == "seconds" else batch.looks / (amount + 1)
                    batch.counts = _counts(batch.records[: int(batch.size * done)])
                batch.looks += look
        if batch.archived_at is None and now >= batch.created_at + ARCHIVED_AFTER_SECONDS:
            self._archive(batch, batch.created_at + ARCHIVED_AFTER_SECONDS)

    def _end(self, batch: Batch, at: float, undone: Outcome | None) -> None:
        """Ends a batch that has not ended; requests that were not done become ``undone``."""
        if batch.ended_at is not None:
            return
        seed, done_share = self.settings.seed, self.settings.done_share
        if undone is not None:
            for record in batch.records:
                if not done_share or chance(seed, "done", record.custom_id) >= done_share:
                    record.outcome = undone
        batch.counts, batch.ended_at = _counts(batch.records), at
        self._charge(batch.records, batch.workspace, at)

    def _archive(self, batch: Batch, at: float) -> None:
        if batch.archived_at is None:
            batch.archived_at = at
            batch.records = []

    def _charge(self, records: Sequence[Record], workspace: str, at: float) -> None:
        """Adds the billed requests to the bill, and notes the prefixes that they leave in the cache."""
        bill = self._bill
        for record in records:
            if not record.is_billed:
                continue
            line = _line(bill, record.model, record.inference_geo)
            line["requests"] += 1
            line["input_tokens"] += record.input_tokens
            line["output_tokens"] += record.output_tokens
            if record.prefixes or record.searches:
                line["cache_write_5m_tokens"] += record.cache_write_5m
                line["cache_write_1h_tokens"] += record.cache_write_1h
                line["cache_read_tokens"] += record.cache_read
                line["web_search_requests"] += record.searches
            for prefix in record.prefixes:
                self._cached_until[workspace, prefix] = at + _TTL_SECONDS[prefix[:2]]
            if record.marker in answers.ITERATIONS:
                model, read, written = answers.ITERATIONS[record.marker]
                line = _line(bill, model or record.model, record.inference_geo)
                line["input_tokens"] += read
                line["output_tokens"] += written


def _counts(records: Sequence[Record]) -> list[int]:
    """How many records have each outcome."""
    counts = [0] * len(Outcome)
    for record in records:
        counts[record.outcome] += 1
    return counts


def _line(bill: dict[tuple[str, str], dict[str, int]], model: str, geo: str) -> dict[str, int]:
    line = bill.get((model, geo))
    if line is None:
        line = bill[model, geo] = dict.fromkeys(_BILL_LINE, 0)
    return line


def _per_model(lines: dict[tuple[str, str], dict[str, int]]) -> dict[str, dict[str, int]]:
    totals: dict[str, dict[str, int]] = {}
    for (model, _), line in lines.items():
        total = totals.setdefault(model, dict.fromkeys(line, 0))
        for name, amount in line.items():
            total[name] += amount
    return totals

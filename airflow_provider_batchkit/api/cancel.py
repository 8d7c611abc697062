"""Cancel many batches within the seconds that a killed task has. Each batch is canceled by itself: a failure of one stops no other.

What an answer of the API means for a batch is decided in one place, :func:`_course`. It does no I/O: :func:`cancel_batches` and
:func:`cancel_batches_async` make the calls that it yields, over a synchronous and an asynchronous client.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.api.calls import poll_failure
from airflow_provider_batchkit.api.polling import CANCELING, ENDED
from airflow_provider_batchkit.api.wire import batch_of, batch_path, own_address

if TYPE_CHECKING:
    import anthropic

log = logging.getLogger(__name__)

#: seconds for one call
CALL_S = 10.0
#: seconds in all. Airflow gives a trigger's handler 30 by default (``[triggerer] on_kill_timeout``), and the summary must fit in
TOTAL_S = 25.0
#: batches that are canceled at the same time
_PARALLEL = 8
#: seconds before the one retry: the API's ``retry-after`` within these bounds
_SHORTEST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 5.0
#: refusals that say nothing about the batch itself, so that a look at the batch would add nothing
_NO_LOOK = frozenset({401, 403, 404, 429, 529})
#: refusals below 500 that may pass. The API was seen to answer 404 for a batch that is a second old (anthropic-sdk-python issue 1432)
_PASSING_4XX = frozenset({404, 429})


class Fate(Enum):
    """What became of a batch that was to be canceled."""

    #: it is being canceled; its answered requests stay answered and billed
    CANCELED = "canceled"
    #: it had ended before: there was nothing to cancel
    ENDED = "ended"
    #: it could not be canceled: if it still runs, it runs on and is billed
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Cancellation:
    """What became of one batch; ``reason`` says why it failed."""

    batch_id: str
    fate: Fate
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Call:
    """A call to be made after ``pause_s`` seconds: a cancel, or else a retrieve."""

    cancel: bool
    pause_s: float = 0.0

    def over(self, client: Any, batch_id: str) -> Any:
        """The call's response, or an awaitable of it."""
        import httpx2

        method, path = (client.post, batch_path(batch_id, "cancel")) if self.cancel else (client.get, batch_path(batch_id))
        return method(path, cast_to=httpx2.Response, options=own_address())


#: A course yields calls. For each it receives the batch's ``processing_status`` or the error; it returns what became of the batch.
_Course = Generator[_Call, str | Exception, Cancellation]


def _course(batch_id: str) -> _Course:
    """Cancel one batch. Where a refusal or a lost answer leaves its state open, the batch object decides, never the error's text.

    The API documents no answer for the cancel of a batch that has ended, so every refusal that is not about the key, the id or the rate
    is followed by a look. The look also finds a cancel that was accepted although its answer was lost.
    """
    answer = yield from _asked(cancel=True)
    if isinstance(answer, Exception) and _leaves_open(answer):
        shown = yield from _asked(cancel=False)
        if shown in (CANCELING, ENDED):
            answer = shown
    if isinstance(answer, Exception):
        return Cancellation(batch_id, Fate.FAILED, _reason(answer))
    return Cancellation(batch_id, Fate.ENDED if answer == ENDED else Fate.CANCELED)


def _asked(*, cancel: bool) -> Generator[_Call, str | Exception, str | Exception]:
    """The answer to a call. After a passing refusal the call is made once more; canceling twice is harmless."""
    answer = yield _Call(cancel)
    pause_s = _pause_before_retry(answer)
    if pause_s is not None:
        answer = yield _Call(cancel, pause_s)
    return answer


def _pause_before_retry(answer: str | Exception) -> float | None:
    """Seconds until the call may be repeated once; None where that cannot help."""
    import anthropic

    if isinstance(answer, anthropic.APIResponseValidationError):
        return _SHORTEST_PAUSE_S
    if not isinstance(answer, anthropic.APIStatusError) or not (answer.status_code >= 500 or answer.status_code in _PASSING_4XX):
        return None
    retry_after: float = poll_failure(answer)["retry_after"] or 0.0
    return min(max(retry_after, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S)


def _leaves_open(error: Exception) -> bool:
    """Whether the batch may have ended or been canceled in spite of the error."""
    import anthropic

    if isinstance(error, anthropic.APIStatusError):
        return error.status_code not in _NO_LOOK
    return isinstance(error, anthropic.APIError)


def _reason(error: Exception) -> str:
    import anthropic

    if isinstance(error, anthropic.APIError):
        return str(poll_failure(error)["error"]).removesuffix(".")
    return repr(error)


def cancel_batches(client: anthropic.Anthropic, batch_ids: Iterable[str]) -> list[Cancellation]:
    """Cancel batches over a synchronous client, in at most :data:`TOTAL_S` seconds; see :meth:`.BatchKit.cancel_all`."""
    report = _Report(batch_ids)
    if not report.batch_ids:
        return []
    client = client.with_options(max_retries=0, timeout=CALL_S)
    deadline = time.monotonic() + TOTAL_S
    # SimpleQueue is reentrant, and the caller may be a signal handler
    left: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[Cancellation] = queue.SimpleQueue()
    for batch_id in report.batch_ids:
        left.put(batch_id)

    def work() -> None:
        with suppress(queue.Empty):
            while time.monotonic() < deadline:
                done.put(_follow(client, left.get_nowait(), deadline))

    # the threads are daemons: a call that hangs delays neither the handler nor the end of the process
    for number in range(min(_PARALLEL, len(report.batch_ids))):
        threading.Thread(target=work, name=f"batchkit-cancel-{number}", daemon=True).start()
    with suppress(queue.Empty):
        while report.missing():
            report.note(done.get(timeout=max(deadline - time.monotonic(), 0.0)))
    return report.close()


def _follow(client: anthropic.Anthropic, batch_id: str, deadline: float) -> Cancellation:
    """Make the calls of one batch's course. No call begins after ``deadline``, when the report is closed."""
    course = _course(batch_id)
    try:
        call = next(course)
        while True:
            time.sleep(call.pause_s)
            if time.monotonic() >= deadline:
                return Cancellation(batch_id, Fate.FAILED, _late())
            answer: str | Exception
            try:
                answer = batch_of(call.over(client, batch_id), batch_id).processing_status
            except Exception as e:  # noqa: BLE001 - any error concerns this batch alone, and the course decides what it means
                answer = e
            call = course.send(answer)
    except StopIteration as end:
        found: Cancellation = end.value
        return found


async def cancel_batches_async(client: anthropic.AsyncAnthropic, batch_ids: Iterable[str]) -> list[Cancellation]:
    """Cancel batches over an asynchronous client, in at most :data:`TOTAL_S` seconds; see :meth:`.BatchKit.cancel_all`."""
    report = _Report(batch_ids)
    if not report.batch_ids:
        return []
    client = client.with_options(max_retries=0, timeout=CALL_S)
    left = iter(report.batch_ids)

    async def work() -> None:
        for batch_id in left:
            report.note(await _follow_async(client, batch_id))

    workers = [asyncio.create_task(work()) for _ in range(min(_PARALLEL, len(report.batch_ids)))]
    try:
        await asyncio.wait(workers, timeout=TOTAL_S)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return report.close()


async def _follow_async(client: anthropic.AsyncAnthropic, batch_id: str) -> Cancellation:
    """The asynchronous form of :func:`_follow`. The tasks that run it are canceled at the deadline."""
    course = _course(batch_id)
    try:
        call = next(course)
        while True:
            await asyncio.sleep(call.pause_s)
            answer: str | Exception
            try:
                answer = batch_of(await call.over(client, batch_id), batch_id).processing_status
            except Exception as e:  # noqa: BLE001 - as in the synchronous form
                answer = e
            call = course.send(answer)
    except StopIteration as end:
        found: Cancellation = end.value
        return found


def _late() -> str:
    return f"there was no answer within the {TOTAL_S:g} s that a killed task has for all its batches"


class _Report:
    """What became of the batches. The log gets a line for each batch as soon as its fate is known, and one for all at the end."""

    def __init__(self, batch_ids: Iterable[str]) -> None:
        self.batch_ids = list(dict.fromkeys(batch_ids))
        self._found: dict[str, Cancellation] = {}
        if self.batch_ids:
            log.info("Canceling %d batches: %s", len(self.batch_ids), ", ".join(self.batch_ids))

    def missing(self) -> list[str]:
        """Batches whose fate is not known yet."""
        return [batch_id for batch_id in self.batch_ids if batch_id not in self._found]

    def note(self, one: Cancellation) -> None:
        self._found[one.batch_id] = one
        match one.fate:
            case Fate.CANCELED:
                log.info("Batch %s is being canceled", one.batch_id)
            case Fate.ENDED:
                log.info("Batch %s had ended already: there is nothing to cancel", one.batch_id)
            case Fate.FAILED:
                log.warning("Batch %s could not be canceled: %s", one.batch_id, one.reason)

    def close(self) -> list[Cancellation]:
        """The whole report, in the order of the batches."""
        for batch_id in self.missing():
            self.note(Cancellation(batch_id, Fate.FAILED, _late()))
        found = [self._found[batch_id] for batch_id in self.batch_ids]
        failed = [one.batch_id for one in found if one.fate is Fate.FAILED]
        log.log(
            logging.WARNING if failed else logging.INFO,
            "Of %d batches, %d were canceled, %d had ended already and %d could not be canceled%s",
            len(found),
            sum(one.fate is Fate.CANCELED for one in found),
            sum(one.fate is Fate.ENDED for one in found),
            len(failed),
            f": {', '.join(failed)}. Those of them that the API still has run on and are billed; cancel them in the Claude Console."
            if failed
            else ". What a canceled batch has answered before stays answered and is billed.",
        )
        return found

"""Calls of the Message Batches API over an ``anthropic`` client, with errors that say what was accepted and billed.

The create call goes out with the SDK's own retries off: the API has no idempotency key, and a POST retried after the connection was
cut makes another batch that is billed. Refusals that prove that nothing was accepted (429, 529) are retried here.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.api.polling import ENDED
from airflow_provider_batchkit.exceptions import (
    BatchNotEndedError,
    BatchNotVisibleError,
    BatchUnavailableError,
    LeaseLostError,
    ResultStreamError,
    SubmitRefusedError,
    SubmitThrottledError,
    SubmitUncertainError,
)
from airflow_provider_batchkit.model import BatchCounts, BatchSnapshot
from airflow_provider_batchkit.request.shards import Shard

if TYPE_CHECKING:
    import anthropic
    from anthropic._types import RequestOptions
    from anthropic.types.messages import MessageBatch

log = logging.getLogger(__name__)

_PAGE = 1000
_UPLOAD_CHUNK = 1 << 18
#: The closing brackets of a body go out only after a fresh look at clock and lease.
_LAST_BYTES = 2

_THROTTLED = frozenset({429, 529})
#: a 4xx that does not prove a refusal: the request may have been taken
_AMBIGUOUS_4XX = frozenset({408, 409})


#: A pause is made longer by chance, by this share of it at most: workers that were refused together do not come back together.
_JITTER = 0.25
#: Shares of a POST's total time: for handing the body over, for its last bytes, and for the answer.
_BODY_SHARE, _LAST_SHARE, _ANSWER_SHARE = 0.5, 0.1, 0.4


class BatchApi:
    """The Message Batches API over a synchronous first-party client."""

    #: seconds that :meth:`send` waits in all while the API says "not now"
    throttle_wait_s = 900.0
    #: seconds that a POST takes at most, from its beginning until its sender gives it up
    post_s = 1200.0

    def __init__(self, client: anthropic.Anthropic) -> None:
        self.client = client

    def send(
        self,
        shard: Shard,
        *,
        fence: Callable[[], None] = lambda: None,
        post_s: float | None = None,
        throttle_wait_s: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> BatchSnapshot:
        """POST one shard, at most once accepted. 429 and 529 are retried, honouring ``retry-after``, with a pause that chance makes longer.

        :param fence: called just before the last bytes of the body go out; raising :class:`LeaseLostError` there aborts the upload,
            and a body that is not complete is never accepted
        :param post_s: the total time of a POST, in seconds. The last bytes do not go out when more than half of it is over, or when the
            fence itself took too long
        :param throttle_wait_s: seconds to wait in all while the API says "not now"
        :raises SubmitRefusedError: a definite 4xx
        :raises SubmitThrottledError: not taken within the bound; says how long to wait before the next try
        :raises SubmitUncertainError: anything that does not prove whether the batch was accepted
        """
        post_s = self.post_s if post_s is None else post_s
        bound = self.throttle_wait_s if throttle_wait_s is None else throttle_wait_s
        waited, delay = 0.0, 1.0
        while True:
            try:
                return self._post(shard, fence, post_s)
            except _NotTaken as e:
                pause = max(e.retry_after or 0.0, delay) * (1 + _JITTER * random.random())  # noqa: S311 - no secret depends on it
                if waited + pause > bound:
                    raise SubmitThrottledError(
                        f"Shard {shard.number} ({shard.requests:,} requests) was not taken after {waited:.0f} s of waiting: {e}. The next "
                        f"try is due in {pause:.0f} s, beyond the bound of {bound:.0f} s. Nothing of this shard was accepted or billed.",
                        pause_s=pause,
                    ) from e.__cause__
                log.warning("Shard %d was not taken: %s. Nothing was accepted. Sending it again in %.0f s.", shard.number, e, pause)
                sleep(pause)
                waited += pause
                delay = min(delay * 2, 60.0)

    def _post(self, shard: Shard, fence: Callable[[], None], post_s: float) -> BatchSnapshot:
        import anthropic
        import httpx2
        from anthropic.types.messages import MessageBatch

        options: RequestOptions = {
            "max_retries": 0,
            "headers": {"Content-Type": "application/json", "Content-Length": str(shard.bytes)},
            "timeout": _bounded(self.client.timeout, write_s=_LAST_SHARE * post_s, read_s=_ANSWER_SHARE * post_s),
        }
        try:
            batch = self.client.post(
                "/v1/messages/batches", content=_fenced_body(shard, fence, _BODY_SHARE * post_s), cast_to=MessageBatch, options=options
            )
        except anthropic.APIStatusError as e:
            status = e.status_code
            if status in _THROTTLED:
                raise _NotTaken(f"the API answered {status} {e.type or ''}".strip(), _retry_after(e)) from e
            if 400 <= status < 500 and status not in _AMBIGUOUS_4XX:
                raise SubmitRefusedError(
                    f"The API refused shard {shard.number} ({shard.requests:,} requests, {shard.bytes:,} bytes) with {status} "
                    f"{e.type or 'error'}: {api_message(e)}. Nothing was accepted or billed. "
                    f"{_ADVICE.get(status, '')}".rstrip(),
                    status=status,
                    error_type=e.type,
                ) from e
            raise self._uncertain(shard, f"the API answered {status}: {api_message(e)}") from e
        except anthropic.APIConnectionError as e:
            if isinstance(e.__cause__, LeaseLostError | SubmitThrottledError):
                raise e.__cause__ from None
            if isinstance(e.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout):
                raise _NotTaken(f"no connection ({e.__cause__})", None) from e
            raise self._uncertain(shard, f"the connection broke: {e.__cause__ or e}") from e
        except anthropic.APIResponseValidationError as e:
            raise self._uncertain(shard, f"the answer was unreadable: {e}") from e
        return snapshot(batch)

    @staticmethod
    def _uncertain(shard: Shard, what: str) -> SubmitUncertainError:
        return SubmitUncertainError(
            f"Shard {shard.number} ({shard.requests:,} requests) was sent, and {what.removesuffix('.')}. It may have been accepted, then "
            "it runs and is billed once. It is not sent again before its batch has been looked for."
        )

    def count_tokens(self, params: Mapping[str, Any]) -> int:
        """Prompt tokens of a message with these params, counted by the API. Free; at most two tries of 30 seconds."""
        from anthropic.types import MessageTokensCount

        options: RequestOptions = {"max_retries": 1, "timeout": 30.0}
        return self.client.post("/v1/messages/count_tokens", body=params, cast_to=MessageTokensCount, options=options).input_tokens

    def get(self, batch_id: str) -> BatchSnapshot:
        """One batch as the API shows it now.

        :raises BatchUnavailableError: when this connection cannot see it
        """
        with seeing(f"Batch {batch_id}"):
            return snapshot(self.client.messages.batches.retrieve(batch_id))

    def recent(self, since: datetime) -> Iterator[BatchSnapshot]:
        """Batches of the workspace created at or after ``since`` (aware), newest first; as many pages as that takes."""
        with seeing("The list of batches"):
            for batch in self.client.messages.batches.list(limit=_PAGE):
                if batch.created_at < since:
                    return
                yield snapshot(batch)

    def cancel(self, batch_id: str) -> BatchSnapshot:
        """Ask the API to cancel a batch. Requests already answered stay answered and billed."""
        return snapshot(self.client.messages.batches.cancel(batch_id))

    def delete(self, batch_id: str) -> None:
        """Delete an ended batch with its results; one that is gone already is fine."""
        import anthropic

        with suppress(anthropic.NotFoundError):
            self.client.messages.batches.delete(batch_id)

    def stream_results(self, batch_id: str, *, chunk_bytes: int | None = None) -> Generator[bytes, None, None]:
        """Raw chunks of an ended batch's JSONL results, once; closing the generator ends the download.

        :param chunk_bytes: of each chunk; as they arrive by default
        :raises BatchNotEndedError: while the batch runs
        :raises BatchUnavailableError: deleted, archived, or not of this workspace
        :raises ResultStreamError: when the stream is cut
        """
        import anthropic
        import httpx2

        found = self.get(batch_id)
        if found.processing_status != ENDED:
            raise BatchNotEndedError(
                f"Batch {batch_id} is {found.processing_status}: its results come when it has ended. Nothing is lost; wait for it."
            )
        if found.archived_at is not None:
            raise BatchUnavailableError(
                f"Batch {batch_id} was archived at {found.archived_at:%Y-%m-%d %H:%M} UTC: results can be read for 29 days after creation. "
                "Its answers can no longer be had; what landed before is in your table and the ledger."
            )
        try:
            with (
                seeing(f"Batch {batch_id}"),
                self.client.messages.batches.with_streaming_response.results(batch_id) as response,
            ):
                yield from response.iter_bytes(chunk_bytes)
        except (anthropic.APIConnectionError, httpx2.TransportError, httpx2.StreamError) as e:
            raise ResultStreamError(f"The results of batch {batch_id} were cut off: {e!r}. Nothing is lost: they can be read again.") from e


class _NotTaken(Exception):
    """A create call proved that nothing was accepted, and invites another try: a refusal for now, or no connection."""

    def __init__(self, what: str, retry_after: float | None) -> None:
        super().__init__(what)
        self.retry_after = retry_after


_ADVICE = {
    400: "Change the request that the message names.",
    401: "Check the API key of the connection.",
    403: "The key may not use this model or workspace; check its permissions.",
    404: "Check the model's name and the connection's base URL.",
    413: "Lower max_bytes_per_batch.",
}


def _bounded(timeout: Any, *, write_s: float, read_s: float) -> Any:
    """The client's own timeout, with the time of a write and that of a read bounded."""
    import httpx2

    own = httpx2.Timeout(timeout)

    def least(value: float | None, bound: float) -> float:
        return bound if value is None else min(value, bound)

    return httpx2.Timeout(connect=own.connect, pool=own.pool, write=least(own.write, write_s), read=least(own.read, read_s))


def _fenced_body(shard: Shard, fence: Callable[[], None], seconds: float) -> Iterator[bytes]:
    """The body in chunks. ``fence`` is called when only the last two bytes are left, which go out right after it.

    :param seconds: for all of it: a timeout of the client bounds each write, not their sum
    :raises SubmitThrottledError: when the time is over before the last bytes; the body is then not complete
    """
    started = time.monotonic()
    left = shard.bytes - _LAST_BYTES
    with Path(shard.body_path).open("rb") as body:
        while left:
            chunk = body.read(min(_UPLOAD_CHUNK, left))
            left -= len(chunk)
            yield chunk
            _refuse_late(started, seconds)
        fence()
        _refuse_late(started, seconds)
        yield body.read()


def _refuse_late(started: float, seconds: float) -> None:
    took = time.monotonic() - started
    if took > seconds:
        raise SubmitThrottledError(
            f"An upload had taken {took:.0f} s and was not complete, and {seconds:.0f} s are allowed, so it was broken off. Nothing of its "
            "shard was accepted or billed. A slow connection needs a larger settle_seconds or a smaller max_bytes_per_batch."
        )


def _retry_after(error: anthropic.APIStatusError) -> float | None:
    try:
        return max(float(error.response.headers.get("retry-after", "")), 0.0)
    except ValueError:
        return None


def api_message(error: anthropic.APIStatusError) -> str:
    """The API's own words for an error, or the SDK's where it gave none.

    The SDK's own ``api_message`` came in the course of its 2.x releases, so they are read from the body.
    """
    match error.body:
        case {"error": {"message": str(words)}} if words:
            return words
    return error.message


def poll_failure(error: anthropic.APIError) -> dict[str, Any]:
    """How a failed look counts, as keywords of :meth:`PollState.failed`: 401, 403 and other 4xx will not mend, the rest may."""
    import anthropic

    if isinstance(error, anthropic.APIStatusError):
        status = error.status_code
        fatal = 400 <= status < 500 and status not in _THROTTLED | _AMBIGUOUS_4XX
        return {"error": f"{status} {api_message(error)}", "fatal": fatal, "retry_after": _retry_after(error)}
    return {"error": f"{type(error).__name__}: {error.__cause__ or error}"}


@contextmanager
def seeing(what: str) -> Iterator[None]:
    """Turn the API's refusal to show something into :class:`BatchUnavailableError`, which says what can still be had."""
    import anthropic

    try:
        yield
    except (anthropic.NotFoundError, anthropic.AuthenticationError, anthropic.PermissionDeniedError) as e:
        raise unavailable(what, e) from e


def unavailable(what: str, error: anthropic.APIStatusError) -> BatchUnavailableError:
    """The error for something that the API does not show, by the status of its refusal."""
    message = api_message(error)
    if error.status_code == 404:
        return BatchNotVisibleError(
            f"{what} cannot be seen with this connection ({message}). It was deleted, or belongs to another workspace: check that "
            "the connection's key is of the workspace that submitted it. What landed before is in your table and the ledger."
        )
    return BatchUnavailableError(
        f"{what} cannot be seen: the API refuses the connection's key with {error.status_code} ({message}). It was revoked, or lacks the "
        "permission. Batches go on without it, and their results stay for 29 days: give the connection another key of the same workspace "
        "and run the task again."
    )


def snapshot(batch: MessageBatch) -> BatchSnapshot:
    """The SDK's batch object as plain values."""
    c = batch.request_counts
    return BatchSnapshot(
        batch.id,
        batch.processing_status,
        BatchCounts(c.processing, c.succeeded, c.errored, c.canceled, c.expired),
        _utc(batch.created_at),
        _utc(batch.expires_at),
        _utc(batch.ended_at) if batch.ended_at else None,
        _utc(batch.archived_at) if batch.archived_at else None,
    )


def _utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

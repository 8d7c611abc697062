"""Calls of the Message Batches API over an ``anthropic`` client, with errors that say what was accepted and billed.

The create call goes out with the SDK's own retries off: the API has no idempotency key, and a POST retried after the connection was
cut makes another batch that is billed. Refusals that prove that nothing was accepted (429, 529) are retried here.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_provider_batchkit.api.polling import ABSENCE_S, ENDED
from airflow_provider_batchkit.api.refusals import advice, api_message, refuses_the_message
from airflow_provider_batchkit.api.upload import NotTaken, Upload
from airflow_provider_batchkit.api.wire import (
    BATCHES,
    COUNT_TOKENS,
    ApiClock,
    Listing,
    batch_of,
    batch_path,
    deleted_of,
    digest_of_credentials,
    model_of,
    model_path,
    no_answer,
    own_address,
    redirect_of,
    refuse_page,
    token_count_of,
)
from airflow_provider_batchkit.exceptions import (
    BatchNotEndedError,
    BatchNotVisibleError,
    BatchUnavailableError,
    LeaseLostError,
    RequestError,
    ResultStreamError,
    SubmitRefusedError,
    SubmitThrottledError,
)
from airflow_provider_batchkit.model import BatchSnapshot
from airflow_provider_batchkit.request.shards import Shard

if TYPE_CHECKING:
    import anthropic
    import httpx2

log = logging.getLogger(__name__)

_PAGE = 1000

_THROTTLED = frozenset({429, 529})
#: These 4xx do not prove a refusal: the API may have taken the request.
_AMBIGUOUS_4XX = frozenset({408, 409})
#: Statuses that say, whoever sends them, that the call was not carried out (RFC 9110). Any other 4xx, such as a proxy's 499, proves a
#: refusal only where it comes with an error of the API's own.
_REFUSED = frozenset({400, 401, 402, 403, 404, 405, 407, 411, 413, 414, 415, 417, 421, 422, 426, 428, 431})
#: Redirects that say that the call was not carried out and belongs elsewhere (RFC 9110). A 302 or 303 may follow a success.
_MOVED = frozenset({301, 307, 308})

#: A pause is lengthened by a random share, this one at most, so that workers that were refused together do not return together.
_JITTER = 0.25
#: Shares of a POST's total time: for handing the body over, for its last bytes, and for the answer.
_BODY_SHARE, _LAST_SHARE, _ANSWER_SHARE = 0.5, 0.1, 0.4
#: seconds of the longest pause that a header can ask for
_LONGEST_PAUSE_S = 86_400.0
#: seconds before a call without a valid answer is repeated; the pause doubles each time
_AGAIN_S = 0.5

_T = TypeVar("_T")


class BatchApi:
    """The Message Batches API over a synchronous first-party client."""

    #: seconds that :meth:`send` waits in all while the API says "not now"
    throttle_wait_s = 900.0
    #: seconds that a POST takes at most, from its beginning until its sender gives it up
    post_s = 1200.0
    #: seconds for which a batch that answers 404 is looked for again before it is called gone
    absence_s = ABSENCE_S

    def __init__(self, client: anthropic.Anthropic) -> None:
        self.client = client
        self._models: dict[str, Mapping[str, Any]] = {}
        self._workspace: str | None = None

    @property
    def workspaces(self) -> tuple[str, ...]:
        """Names of the workspace that the client reaches, the surest first: the API's own, once an answer has told it, and a short digest
        of the client's address and credentials.
        """
        return (*filter(None, [self._workspace]), digest_of_credentials(self.client))

    def note_workspace(self, response: httpx2.Response) -> None:
        """Learn the workspace from an answer. A gateway may have left it out."""
        self._workspace = response.headers.get("anthropic-workspace-id") or self._workspace

    def send(
        self,
        shard: Shard,
        *,
        fence: Callable[[], None] = lambda: None,
        post_s: float | None = None,
        throttle_wait_s: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> BatchSnapshot:
        """POST one shard; at most one POST is accepted. 429 and 529 are retried after ``retry-after`` seconds and a random addition.

        :param fence: called just before the last bytes of the body go out; raising :class:`LeaseLostError` there aborts the upload,
            and a body that is not complete is never accepted
        :param post_s: the total time of a POST, in seconds. The last bytes do not go out when more than half of it is over, or when the
            fence itself took too long
        :param throttle_wait_s: seconds to wait in all while the API says "not now"
        :raises SubmitRefusedError: a definite 4xx
        :raises SubmitThrottledError: the API did not take the batch within the bound; the error says how long to wait before the next try
        :raises SubmitUncertainError: nothing proves whether the batch was accepted
        """
        post_s = self.post_s if post_s is None else post_s
        bound = self.throttle_wait_s if throttle_wait_s is None else throttle_wait_s
        waited, delay = 0.0, 1.0
        while True:
            try:
                return self._post(shard, fence, post_s)
            except NotTaken as e:
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

        options = own_address(
            max_retries=0,
            headers={"Content-Type": "application/json", "Content-Length": str(shard.bytes)},
            timeout=_bounded(self.client.timeout, write_s=_LAST_SHARE * post_s, read_s=_ANSWER_SHARE * post_s),
        )
        body = Upload(shard, fence, _BODY_SHARE * post_s)
        try:
            return batch_of(self.client.post(BATCHES, content=body, cast_to=httpx2.Response, options=options))
        except anthropic.APIStatusError as e:
            status = e.status_code
            if status == 429 or (status in _THROTTLED and e.type):
                raise NotTaken(f"the API answered {status} {e.type or ''}".strip(), _retry_after(e)) from e
            own = 400 <= status < 500 and status not in _AMBIGUOUS_4XX and e.type
            if status in _MOVED | _REFUSED or own:
                raise SubmitRefusedError(
                    f"The API refused shard {shard.number} ({shard.requests:,} requests, {shard.bytes:,} bytes) with {status} "
                    f"{e.type or 'error'}: {api_message(e)}. Nothing was accepted or billed. "
                    f"{advice(e)}".rstrip(),
                    status=status,
                    error_type=e.type,
                ) from e
            raise body.unseen_end(f"the API answered {status}: {api_message(e)}") from e
        except anthropic.APIConnectionError as e:
            if isinstance(e.__cause__, LeaseLostError | SubmitThrottledError):
                raise e.__cause__ from None
            raise body.broken(e.__cause__ or e) from e
        except anthropic.APIResponseValidationError as e:
            raise body.unseen_end(e.message) from e
        except Exception as e:
            # the client could not make the request, for example because it has no credentials
            if body.is_whole:
                raise
            raise body.not_made(e) from e

    @property
    def sends_betas(self) -> bool:
        """Whether every call of the client carries an ``anthropic-beta`` header. With it, the API takes more than without."""
        return any(name.lower() == "anthropic-beta" for name in self.client.default_headers)

    def count_tokens(self, params: Mapping[str, Any]) -> int:
        """Prompt tokens of a message with these params, counted by the API. The call is free, and is tried twice at most, 30 seconds each.

        :raises RequestError: the API would refuse the message itself, now and later; the error quotes the API
        """
        import anthropic

        try:
            return self._ask(partial(self.client.post, body=params), COUNT_TOKENS, token_count_of, max_retries=1, timeout=30.0)
        except (anthropic.BadRequestError, anthropic.NotFoundError) as e:
            if refuses_the_message(e):
                raise RequestError(f"the API refuses it: {api_message(e)}") from e
            raise

    def model_info(self, model: str) -> Mapping[str, Any]:
        """The API's object for a model, as it was sent: ``max_tokens``, ``capabilities``, ``lifecycle`` … Older SDKs know fewer members.

        The call is free, is tried twice at most (30 seconds each), and is made once for each model.
        """
        if model not in self._models:
            self._models[model] = self._ask(self.client.get, model_path(model), model_of, max_retries=1, timeout=30.0)
        return self._models[model]

    def get(self, batch_id: str) -> BatchSnapshot:
        """One batch as the API shows it now.

        :raises BatchUnavailableError: when this connection cannot see it
        """
        with seeing(f"Batch {batch_id}"):
            return self._ask(self.client.get, batch_path(batch_id), lambda response: batch_of(response, batch_id))

    def recent(self, since: datetime, clock: ApiClock | None = None) -> Iterator[BatchSnapshot]:
        """Batches of the workspace created at or after ``since`` (aware), each once, newest first; as many pages as that takes.

        :param clock: learns the API's time. Where that is behind, the list goes back further by the lag: ``since`` is on the other clock
        :raises anthropic.APIResponseValidationError: a page, or a member of one, cannot be read, or the pages do not come to an end, so
            that any batch may be missing
        """
        listing = Listing(since, clock)
        query: dict[str, Any] = {"limit": _PAGE}
        while True:
            with seeing("The list of batches"):
                page = self._ask(self.client.get, BATCHES, listing.read, params=query)
            yield from listing.unseen(page)
            if listing.ends_with(page):
                return
            query["after_id"] = page.batches[-1].id

    def cancel(self, batch_id: str) -> BatchSnapshot:
        """Ask the API to cancel a batch. Requests already answered stay answered and billed."""
        return self._ask(self.client.post, batch_path(batch_id, "cancel"), lambda response: batch_of(response, batch_id))

    def delete(self, batch_id: str) -> bool:
        """Delete an ended batch with its results. False when the API does not show it: it was deleted, or is of another workspace."""
        import anthropic

        try:
            self._ask(self.client.delete, batch_path(batch_id), deleted_of)
        except anthropic.NotFoundError:
            return False
        return True

    def _ask(self, call: Callable[..., httpx2.Response], path: str, read: Callable[[httpx2.Response], _T], **options: Any) -> _T:
        """The answer to a call that may be repeated. An answer that is not the API's is asked for again, as often as the client retries.

        :param call: the client's method for ``path``
        :param options: its keyword arguments
        :raises anthropic.APIResponseValidationError: when no answer of the API came
        """
        import anthropic
        import httpx2

        pause = _AGAIN_S
        for left in reversed(range(self.client.max_retries + 1)):
            try:
                response = call(path, cast_to=httpx2.Response, options=own_address(**options))
                self.note_workspace(response)
                return read(response)
            except anthropic.APIStatusError as e:
                self.note_workspace(e.response)
                if redirect_of(e.response) is None:
                    raise
                raise no_answer(e.response, "it is a redirect") from e
            except anthropic.APIResponseValidationError as e:
                if not left:
                    raise
                log.warning("%s. Asking again in %.1f s.", e.message, pause)
            time.sleep(pause)
            pause *= 2
        raise AssertionError("the last try returns or raises")

    def stream_results(self, batch_id: str, *, chunk_bytes: int | None = None) -> Generator[bytes, None, None]:
        """Raw chunks of an ended batch's JSONL results, read once. Closing the generator ends the download.

        The results are read from the connection's own address, by the batch's path. The ``results_url`` that the API gives always names the
        API's own host, even where the connection reaches it through another one.

        :param chunk_bytes: size of each chunk; by default, chunks come as they arrive
        :raises BatchNotEndedError: while the batch runs
        :raises BatchNotVisibleError: the API answers 404 for the batch or for its results
        :raises BatchUnavailableError: the batch is deleted, archived, or not of this workspace
        :raises ResultStreamError: the stream is cut, or holds something else
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
        options = own_address(headers={"Accept": "application/binary"})
        try:
            path = batch_path(batch_id, "results")
            response = self.client.get(path, cast_to=httpx2.Response, options=options, stream=True)
            with closing(response):
                yield from _lines_of(response, chunk_bytes, expected=found.counts.total)
        except anthropic.NotFoundError as e:
            raise BatchNotVisibleError(
                f"Batch {batch_id} has ended, and the API does not show its results ({api_message(e)}). Live batches answer so now and "
                "then. What landed before is in your table and the ledger."
            ) from e
        except (anthropic.AuthenticationError, anthropic.PermissionDeniedError) as e:
            raise unavailable(f"Batch {batch_id}", e) from e
        except anthropic.APIStatusError as e:
            if (why := redirect_of(e.response)) is None:
                raise
            raise _not_read(batch_id, why) from e
        except anthropic.APIResponseValidationError as e:
            raise _not_read(batch_id, e.message) from e
        except (anthropic.APIConnectionError, httpx2.RequestError, httpx2.StreamError) as e:
            raise ResultStreamError(f"The results of batch {batch_id} were cut off: {e!r}. Nothing is lost: they can be read again.") from e


def _lines_of(response: httpx2.Response, chunk_bytes: int | None, *, expected: int) -> Iterator[bytes]:
    """The chunks of a result stream.

    :param expected: number of result lines, as the API counts them
    :raises anthropic.APIResponseValidationError: a page came in place of the lines, or nothing came where lines are expected
    """
    begun = False
    for chunk in response.iter_bytes(chunk_bytes):
        if not begun:
            refuse_page(response, chunk)
            begun = bool(chunk.strip())
        yield chunk
    if expected and not begun:
        raise no_answer(response, f"the API counts {expected:,} results", b"")


def _not_read(batch_id: str, why: str) -> ResultStreamError:
    return ResultStreamError(f"The results of batch {batch_id} could not be read: {why}. Nothing is lost: they can be read again.")


def _bounded(timeout: Any, *, write_s: float, read_s: float) -> Any:
    """The client's own timeout, with the time of a write and that of a read bounded."""
    import httpx2

    own = httpx2.Timeout(timeout)

    def least(value: float | None, bound: float) -> float:
        return bound if value is None else min(value, bound)

    return httpx2.Timeout(connect=own.connect, pool=own.pool, write=least(own.write, write_s), read=least(own.read, read_s))


def _retry_after(error: anthropic.APIStatusError) -> float | None:
    """Seconds that the API asks to wait, at most a day; None where it gives no number."""
    try:
        seconds = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), _LONGEST_PAUSE_S)


def poll_failure(error: anthropic.APIError) -> dict[str, Any]:
    """Keywords of :meth:`PollState.failed` for a failed look. 401, 403 and other 4xx will not mend; other failures may."""
    import anthropic

    if isinstance(error, anthropic.APIStatusError):
        status = error.status_code
        fatal = 400 <= status < 500 and status not in _THROTTLED | _AMBIGUOUS_4XX
        return {"error": f"{status} {api_message(error)}", "fatal": fatal, "retry_after": _retry_after(error)}
    if isinstance(error, anthropic.APIResponseValidationError):
        return {"error": error.message}
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
    """The error for something that the API does not show, chosen by the status of its refusal."""
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

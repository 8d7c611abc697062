"""The Message Batches API on the wire: where its calls go, and what counts as an answer to one.

Every call goes to the connection's own address, by the batch's path. A redirect is not followed, and an address that an answer names is
not used: the client would send the key along.

A proxy may answer 200 with a page of its own. Anything but the answer that the API documents raises an
``anthropic.APIResponseValidationError``, a passing fault, whose message quotes the first bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import msgspec

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.model import BatchCounts, BatchSnapshot

if TYPE_CHECKING:
    import anthropic
    import httpx2
    from anthropic import RequestOptions

BATCHES = "/v1/messages/batches"
COUNT_TOKENS = "/v1/messages/count_tokens"
_MODELS = "/v1/models"

#: headers that decide which workspace's batches a client sees
_CREDENTIALS = ("x-api-key", "authorization", "anthropic-workspace-id")
_DIGEST_CHARS = 10
#: characters of an answer that a message quotes
_SAMPLE_CHARS = 100
_REDIRECTS = range(300, 400)

_T = TypeVar("_T")


def own_address(**options: Any) -> RequestOptions:
    """Options of a call to the connection's own address and no other.

    A client that follows a redirect to another host drops only the ``Authorization`` header. It sends ``x-api-key`` and a gateway's own
    headers along.
    """
    found: RequestOptions = {"follow_redirects": False, **options}  # type: ignore[typeddict-item] # the names are the callers'
    return found


def digest_of_credentials(client: anthropic.Anthropic | anthropic.AsyncAnthropic) -> str:
    """A digest of a client's address and credentials that tells two clients apart. It is too short to guess a key from."""
    told = {name.lower(): value for name, value in client.default_headers.items() if isinstance(value, str)}
    return hashlib.sha256(json.dumps([str(client.base_url), *map(told.get, _CREDENTIALS)]).encode()).hexdigest()[:_DIGEST_CHARS]


def batch_path(batch_id: object, *more: str) -> str:
    """The path of a batch, or of something below it.

    :raises BatchInputError: for a list of ids, and for an id that would lead to another path
    """
    if not isinstance(batch_id, str) or not batch_id.strip("."):
        raise BatchInputError(f"{batch_id!r} is no batch id.")
    return "/".join([BATCHES, quote(batch_id, safe=""), *more])


def model_path(model: str) -> str:
    """The path of the API's information on a model.

    :raises BatchInputError: for a name that would lead to another path
    """
    if not model.strip("."):
        raise BatchInputError(f"{model!r} is no model.")
    return f"{_MODELS}/{quote(model, safe='')}"


class ApiClock:
    """How far the API's clock is from another one, by the ``date`` of its answers. Times of batches are on the API's clock."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        """:param now: the other clock; aware"""
        self._now = now
        #: the greatest times by which the API's clock was ahead, and behind; one of them is zero unless the clocks drift apart
        self.ahead = self.behind = timedelta(0)

    def note(self, response: httpx2.Response) -> None:
        """Learn from an answer's ``date``. An answer without a readable one is ignored."""
        try:
            told = utc(parsedate_to_datetime(response.headers["date"]))
        except (KeyError, ValueError, OverflowError):
            return
        difference = told - self._now()
        # a date is cut off to whole seconds
        self.ahead, self.behind = max(self.ahead, difference), max(self.behind, -difference - timedelta(seconds=1))


class _Counts(msgspec.Struct, gc=False):
    processing: int | None = None
    succeeded: int | None = None
    errored: int | None = None
    canceled: int | None = None
    expired: int | None = None


class WireBatch(msgspec.Struct, gc=False):
    """The members of a listed batch that are read. The SDK's models take 137 ms for a page of 1000, this takes 1 ms.

    ``gc=False``: a thousand objects a page would set off the garbage collector again and again, and none of them can be in a cycle.
    """

    id: str
    processing_status: str
    created_at: datetime
    request_counts: _Counts | None = None
    expires_at: datetime | None = None
    ended_at: datetime | None = None
    archived_at: datetime | None = None

    def snapshot(self) -> BatchSnapshot:
        c = self.request_counts or _Counts()
        numbers = (c.processing, c.succeeded, c.errored, c.canceled, c.expired)
        return BatchSnapshot(
            self.id,
            self.processing_status,
            BatchCounts(*(number or 0 for number in numbers)),
            utc(self.created_at),
            utc(self.expires_at) if self.expires_at else None,
            utc(self.ended_at) if self.ended_at else None,
            utc(self.archived_at) if self.archived_at else None,
            counted=None not in numbers,
        )


class _Page(msgspec.Struct):
    data: list[WireBatch]
    has_more: bool | None = None


class _RawPage(msgspec.Struct):
    data: list[msgspec.Raw]
    has_more: bool | None = None


class _Deleted(msgspec.Struct):
    id: str


class _TokenCount(msgspec.Struct):
    input_tokens: int


@dataclass(frozen=True, slots=True)
class Page:
    """A page of the list, newest batch first."""

    batches: Sequence[WireBatch]
    #: whether older batches follow, as far as the page says so
    more: bool
    #: the reason why some of the page's members are left out; None when all could be read
    odd: str | None = None
    #: the reason why batches may be missing from a list that the page ends; None when it proves that older ones follow, or that none do
    open_end: str | None = None


_batch = msgspec.json.Decoder(WireBatch)
_page = msgspec.json.Decoder(_Page)
_raw_page = msgspec.json.Decoder(_RawPage)
_deleted = msgspec.json.Decoder(_Deleted)
_object = msgspec.json.Decoder(dict[str, Any])
_token_count = msgspec.json.Decoder(_TokenCount)


def batch_of(response: httpx2.Response, batch_id: str | None = None) -> BatchSnapshot:
    """The batch that an answer shows.

    :param batch_id: the batch that was asked for; None for a new one
    :raises anthropic.APIResponseValidationError: the answer shows no batch, or another one
    """
    found = _decoded(response, _batch)
    if not found.id or batch_id not in (None, found.id):
        raise no_answer(response, f"it shows the batch {found.id!r}")
    return found.snapshot()


def page_of(response: httpx2.Response) -> Page:
    """The page of the list that an answer holds. A member that is no batch is left out; ``odd`` says so.

    :raises anthropic.APIResponseValidationError: for an answer that is no page
    """
    try:
        page = _page.decode(response.content)
    except msgspec.ValidationError:
        return _odd_page(response)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise no_answer(response, str(e)) from e
    return Page(page.data, bool(page.has_more), None, _open_end(page.has_more, page.data))


def _odd_page(response: httpx2.Response) -> Page:
    page, batches, odd = _decoded(response, _raw_page), list[WireBatch](), list[str]()
    for raw in page.data:
        try:
            batches.append(_batch.decode(raw))
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            odd.append(f"{e}: {_sample(bytes(raw))!r}")
    if not batches and odd:
        raise no_answer(response, odd[0])
    why = f"{len(odd)} of its members are no batches ({odd[0]})" if odd else None
    return Page(batches, bool(page.has_more), why, _open_end(page.has_more, batches))


def _open_end(has_more: bool | None, batches: Sequence[WireBatch]) -> str | None:
    if has_more is None:
        return "it does not say whether more batches follow"
    return "it says that more batches follow, and shows none" if has_more and not batches else None


class Listing:
    """The list of batches from the newest back to a time, page after page, where a batch that is left out counts as a proof."""

    def __init__(self, since: datetime, clock: ApiClock | None) -> None:
        self._since = since
        self._clock = clock
        self._seen: set[str] = set()

    def read(self, response: httpx2.Response) -> Page:
        """The next page.

        :raises anthropic.APIResponseValidationError: for a page that may hide batches, or after which the list would not come to an end
        """
        page = page_of(response)
        if self._clock is not None:
            self._clock.note(response)
        why = page.odd
        # a cursor that is forgotten on the way, or pages that go round in a ring
        if page.batches and self._seen.issuperset(batch.id for batch in page.batches):
            why = "it shows only batches of the pages before it"
        elif page.open_end is not None and not self._goes_back_enough(page):
            why = why or page.open_end
        if why is not None:
            raise no_answer(response, why)
        return page

    def unseen(self, page: Page) -> list[BatchSnapshot]:
        """The page's batches that are young enough and were on no page before. An old one may stand before younger ones."""
        found = {batch.id: batch for batch in page.batches if batch.id not in self._seen and utc(batch.created_at) >= self._first}
        self._seen.update(batch.id for batch in page.batches)
        return [batch.snapshot() for batch in found.values()]

    def ends_with(self, page: Page) -> bool:
        """Whether no page need be read after this one."""
        return not page.more or self._goes_back_enough(page)

    def _goes_back_enough(self, page: Page) -> bool:
        return bool(page.batches) and utc(page.batches[-1].created_at) < self._first

    @property
    def _first(self) -> datetime:
        return self._since if self._clock is None else self._since - self._clock.behind


def deleted_of(response: httpx2.Response) -> None:
    """Check the answer to a delete.

    :raises anthropic.APIResponseValidationError: for an answer that names no batch
    """
    _decoded(response, _deleted)


def token_count_of(response: httpx2.Response) -> int:
    """Tokens that the API counted.

    :raises anthropic.APIResponseValidationError: for an answer without a number
    """
    return _decoded(response, _token_count).input_tokens


def model_of(response: httpx2.Response) -> dict[str, Any]:
    """The API's information on a model.

    :raises anthropic.APIResponseValidationError: for an answer that is no object
    """
    return _decoded(response, _object)


def _decoded(response: httpx2.Response, decoder: msgspec.json.Decoder[_T]) -> _T:
    try:
        return decoder.decode(response.content)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise no_answer(response, str(e)) from e


def refuse_page(response: httpx2.Response, start: bytes) -> None:
    """Check the first bytes of a result stream: JSON lines begin with an object.

    :raises anthropic.APIResponseValidationError: for anything else, and for an error in place of the lines
    """
    begin = start.lstrip()
    if begin and (not begin.startswith(b"{") or _ERROR.match(begin)):
        raise no_answer(response, "it holds no result lines", begin)


_ERROR = re.compile(rb'\{\s*"type"\s*:\s*"error"')


def redirect_of(response: httpx2.Response) -> str | None:
    """A redirect's description for messages; None for any other answer."""
    if response.status_code not in _REDIRECTS:
        return None
    target = _sample(response.headers.get("location", "").encode()) or "nowhere"
    return (
        f"{response.request.url.host} answered {response.status_code}, a redirect to {target}. It is not followed, since the key is for "
        "the connection's own address alone. If the API is to be called there, make it the connection's host"
    )


def no_answer(response: httpx2.Response, why: str, start: bytes | None = None) -> anthropic.APIResponseValidationError:
    """The error for an answer with a good status that is not what the API sends.

    :param start: the first bytes of its body, where that is not read
    """
    import anthropic

    kind = response.headers.get("content-type", "no content type").partition(";")[0]
    sample = _sample(response.content if start is None else start)
    shown = f"which begins with {sample!r}" if sample else "which is empty"
    message = redirect_of(response) or (
        f"{response.request.url.host} answered {response.status_code} with {_sample(kind.encode())}, {shown}, and that is no answer of the "
        f"API ({why}). Something between this connection and the API may have answered in its place"
    )
    return anthropic.APIResponseValidationError(response, None, message=message)


def _sample(body: bytes) -> str:
    """The beginning of a text in one line, without control characters."""
    text = body[: 4 * _SAMPLE_CHARS].decode("utf-8", "replace")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_SAMPLE_CHARS]


def utc(value: datetime) -> datetime:
    """A time with its zone; the API's times are UTC."""
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

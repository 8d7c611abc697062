"""One look at a connection's batches: pages of the list first, retrieves for what they do not show."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime

import anthropic
import msgspec
from anthropic.resources.messages import AsyncBatches  # the SDK loads it at the first call otherwise, which blocks the event loop for 0.1 s

from airflow_provider_batchkit.api.calls import poll_failure, snapshot, unavailable
from airflow_provider_batchkit.model import BatchCounts, BatchSnapshot
from airflow_provider_batchkit.triggers.watches import Failure, Look, Search, Watches

log = logging.getLogger(__name__)

#: batches on a page of the list: the API's limit
_PAGE = 1000
#: retrieves under way at a time
_PARALLEL = 8
#: seconds for an answer. The SDK's own ten minutes would keep every trigger of the connection waiting for one lost packet
_ANSWER_S = 30.0


class _Counts(msgspec.Struct, gc=False):
    processing: int = 0
    succeeded: int = 0
    errored: int = 0
    canceled: int = 0
    expired: int = 0


class _Listed(msgspec.Struct, gc=False):
    """What is read of a batch in the list. The SDK's models take 137 ms for a page of 1000, this takes 1 ms.

    ``gc=False``: a thousand objects a page would set off the garbage collector again and again, and none of them can be in a cycle.
    """

    id: str
    processing_status: str
    created_at: datetime
    request_counts: _Counts
    expires_at: datetime | None = None
    ended_at: datetime | None = None
    archived_at: datetime | None = None

    def snapshot(self) -> BatchSnapshot:
        c = self.request_counts
        return BatchSnapshot(
            self.id,
            self.processing_status,
            BatchCounts(c.processing, c.succeeded, c.errored, c.canceled, c.expired),
            _utc(self.created_at),
            _utc(self.expires_at) if self.expires_at else None,
            _utc(self.ended_at) if self.ended_at else None,
            _utc(self.archived_at) if self.archived_at else None,
        )


class _Page(msgspec.Struct):
    data: list[_Listed]
    has_more: bool = False


_decode_page = msgspec.json.Decoder(_Page).decode


class Looker:
    """Looks at batches over an async first-party client; it closes nothing.

    :param conn_id: named in messages
    """

    def __init__(self, client: anthropic.AsyncAnthropic, conn_id: str) -> None:
        # the poller has a pause of its own for what fails, in which nobody else of the connection asks either
        self._batches: AsyncBatches = client.with_options(max_retries=0, timeout=_ANSWER_S).messages.batches
        self._conn_id = conn_id

    async def look(self, look: Look, wanted: dict[str, datetime | None], watches: Watches) -> None:
        """Fill ``look`` with what the API shows of ``wanted``, and of other watched batches that come up by the way."""
        if watches.worth_listing(wanted):
            await self._read_list(look, Search(wanted), watches)
        await self._retrieve(look, [batch_id for batch_id in wanted if not look.has(batch_id)])

    async def _read_list(self, look: Look, search: Search, watches: Watches) -> None:
        after: str | anthropic.Omit = anthropic.omit
        while True:
            try:
                response = await self._batches.with_raw_response.list(limit=_PAGE, after_id=after)
                page = _decode_page(await response.read())
            except (anthropic.AuthenticationError, anthropic.PermissionDeniedError) as e:
                look.failure = Failure(str(unavailable(f"The list of batches of connection {self._conn_id!r}", e)), fatal=True)
                return
            except anthropic.APIError as e:
                failure = Failure(**poll_failure(e))
                if not failure.fatal:
                    look.failure = failure
                    return
                # a gateway that serves no list, or a cursor that was deleted between two pages
                log.warning("The list of batches of connection %r is refused (%s): retrieving instead.", self._conn_id, failure.error)
                return
            except (msgspec.DecodeError, UnicodeDecodeError) as e:
                look.failure = Failure(f"the list of batches is unreadable: {e}")
                return
            shown = []
            for listed in page.data:
                if watches.watched(listed.id):
                    shown.append(listed.id)
                    look.shown[listed.id] = watches.unchanged(listed.id, listed.processing_status) or listed.snapshot()
            oldest = _utc(page.data[-1].created_at) if page.data else None
            if not search.read(shown, oldest, more=page.has_more):
                return
            after = page.data[-1].id

    async def _retrieve(self, look: Look, batch_ids: list[str]) -> None:
        """Retrieve each, several at a time; none more once the connection has failed."""
        left = iter(batch_ids)

        async def work() -> None:
            for batch_id in left:
                if look.failure is not None:
                    return
                await self._retrieve_one(look, batch_id)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(_PARALLEL, len(batch_ids))):
                group.create_task(work())

    async def _retrieve_one(self, look: Look, batch_id: str) -> None:
        try:
            look.shown[batch_id] = snapshot(await self._batches.retrieve(batch_id))
        except (anthropic.NotFoundError, anthropic.AuthenticationError, anthropic.PermissionDeniedError) as e:
            look.failed[batch_id] = Failure(str(unavailable(f"Batch {batch_id}", e)), fatal=True)
        except anthropic.APIStatusError as e:
            failure = Failure(**poll_failure(e))
            if e.status_code in (429, 529):
                look.failure = failure
            else:
                look.failed[batch_id] = failure
        except anthropic.APIError as e:
            look.failure = Failure(**poll_failure(e))
        except Exception as e:  # noqa: BLE001 - an id or an answer that nobody can read is this batch's matter, not the connection's
            look.failed[batch_id] = Failure(f"Batch {batch_id!r} cannot be looked at: {e!r}", fatal=True)


def _utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

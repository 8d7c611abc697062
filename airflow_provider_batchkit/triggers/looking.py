"""One look at a connection's batches: it reads pages of the list, and retrieves the batches that they do not show."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime

import anthropic
import httpx2

from airflow_provider_batchkit.api.calls import poll_failure, unavailable
from airflow_provider_batchkit.api.wire import BATCHES, Page, batch_of, batch_path, digest_of_credentials, own_address, page_of, utc
from airflow_provider_batchkit.triggers.watches import Failure, Look, Search, Watches

log = logging.getLogger(__name__)

#: batches on a page of the list, at the API's limit
_PAGE = 1000
#: most retrieves under way at the same time
_PARALLEL = 8
#: seconds to wait for an answer. With the SDK's ten minutes every trigger of the connection would wait for one lost packet
_ANSWER_S = 30.0


class Looker:
    """Looks at batches over an async first-party client, which its owner closes.

    :param conn_id: the connection's id, for messages
    """

    def __init__(self, client: anthropic.AsyncAnthropic, conn_id: str) -> None:
        # no retries here: after a failure the poller pauses for all triggers of the connection
        self._client = client.with_options(max_retries=0, timeout=_ANSWER_S)
        self._conn_id = conn_id

    def is_as(self, client: anthropic.AsyncAnthropic) -> bool:
        """Whether another client has the same address and credentials."""
        return digest_of_credentials(client) == digest_of_credentials(self._client)

    async def look(self, look: Look, wanted: dict[str, datetime | None], watches: Watches) -> None:
        """Fill ``look`` with what the API shows of ``wanted``, and of other watched batches that the list shows."""
        if watches.worth_listing(wanted):
            await self._read_list(look, Search(wanted), watches)
        await self._retrieve(look, [batch_id for batch_id in wanted if not look.has(batch_id)])

    async def _read_list(self, look: Look, search: Search, watches: Watches) -> None:
        query: dict[str, object] = {"limit": _PAGE}
        while True:
            try:
                page = await self._page(query)
            except (anthropic.AuthenticationError, anthropic.PermissionDeniedError) as e:
                look.failure = Failure(str(unavailable(f"The list of batches of connection {self._conn_id!r}", e)), fatal=True)
                return
            except anthropic.APIError as e:
                failure = Failure(**poll_failure(e))
                if not failure.fatal:
                    look.failure = failure
                    return
                # a gateway may serve no list, or the cursor was deleted between two pages
                log.warning("The list of batches of connection %r is refused (%s): retrieving instead.", self._conn_id, failure.error)
                return
            shown = []
            for listed in page.batches:
                if watches.watched(listed.id):
                    shown.append(listed.id)
                    look.shown[listed.id] = watches.unchanged(listed.id, listed.processing_status) or listed.snapshot()
            oldest = utc(page.batches[-1].created_at) if page.batches else None
            if not search.read(shown, oldest, more=page.more):
                return
            query["after_id"] = page.batches[-1].id

    async def _page(self, query: dict[str, object]) -> Page:
        page = page_of(await self._client.get(BATCHES, cast_to=httpx2.Response, options=own_address(params=query)))
        if page.odd is not None:
            # batches that the page leaves out are retrieved
            log.warning("The list of batches of connection %r: %s", self._conn_id, page.odd)
        return page

    async def _retrieve(self, look: Look, batch_ids: list[str]) -> None:
        """Retrieve each of the batches, several at a time, until the connection fails."""
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
            response = await self._client.get(batch_path(batch_id), cast_to=httpx2.Response, options=own_address())
            look.shown[batch_id] = batch_of(response, batch_id)
        except (anthropic.NotFoundError, anthropic.AuthenticationError, anthropic.PermissionDeniedError) as e:
            hidden = e.status_code == 404
            look.failed[batch_id] = Failure(str(unavailable(f"Batch {batch_id}", e)), fatal=not hidden, hidden=hidden)
        except (anthropic.APIStatusError, anthropic.APIResponseValidationError) as e:
            failure = Failure(**poll_failure(e))
            if e.status_code in (429, 529):
                look.failure = failure
            else:
                look.failed[batch_id] = failure
        except anthropic.APIError as e:
            look.failure = Failure(**poll_failure(e))
        except Exception as e:  # noqa: BLE001 - an unreadable id or answer is a failure of this batch, not of the connection
            look.failed[batch_id] = Failure(f"Batch {batch_id!r} cannot be looked at: {e!r}", fatal=True)

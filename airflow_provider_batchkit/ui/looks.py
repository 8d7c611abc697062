"""What the API shows of running batches: one list call per connection, whose result is kept for ten seconds for all users of the page."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from airflow.providers.common.compat.sdk import AirflowException

from airflow_provider_batchkit.api.calls import BatchApi
from airflow_provider_batchkit.api.cancel import Cancellation
from airflow_provider_batchkit.api.looking import listed
from airflow_provider_batchkit.exceptions import BatchKitError
from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
from airflow_provider_batchkit.model import BatchSnapshot

if TYPE_CHECKING:
    from airflow_provider_batchkit.kit import BatchKit

log = logging.getLogger(__name__)

_KEPT_S = 10.0
#: seconds for a call to the API, short because a person waits for it
_CALL_S = 8.0
#: seconds for which a client is kept; then its connection, which may have changed, is read again
_CLIENT_S = 300.0


@dataclass(frozen=True, slots=True)
class Seen:
    """The result of a look at a connection's list; ``trouble`` is the reason when there is none."""

    batches: Mapping[str, BatchSnapshot] = field(default_factory=dict)
    trouble: str | None = None


class Looks:
    """The latest look of each connection, shared by all requests of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}
        self._seen: dict[str, tuple[float, frozenset[str], Seen]] = {}
        self._kits: dict[str, tuple[float, BatchKit]] = {}

    def at(self, conn_id: str, wanted: Mapping[str, datetime | None]) -> Seen:
        """What the list of the connection shows of all its open batches. Requests that come during a look wait for its result."""
        with self._lock:
            turn = self._turns.setdefault(conn_id, threading.Lock())
        with turn:
            until, asked, seen = self._seen.get(conn_id, (0.0, frozenset[str](), Seen()))
            if time.monotonic() < until and asked >= wanted.keys():
                return seen
            seen = self._look(conn_id, wanted)
            self._seen[conn_id] = (time.monotonic() + _KEPT_S, frozenset(wanted), seen)
            return seen

    def _look(self, conn_id: str, wanted: Mapping[str, datetime | None]) -> Seen:
        import anthropic

        try:
            client = self.kit(conn_id).client.with_options(max_retries=0, timeout=_CALL_S)
            return Seen(listed(BatchApi(client), wanted))
        except (anthropic.AnthropicError, AirflowException, BatchKitError) as e:
            log.warning("The Batches page cannot list the batches of connection %r: %s", conn_id, e)
            return Seen(trouble=str(e).splitlines()[0][:300])

    def cancel(self, conn_id: str, batch_id: str) -> Cancellation:
        """Cancel a batch, and forget the last look.

        :raises AirflowException: when the connection cannot be used
        """
        (end,) = self.kit(conn_id).cancel_all(batch_id)
        self.forget([conn_id])
        return end

    def forget(self, conn_ids: Iterable[str]) -> None:
        """Drop the results of these connections, so that the next request makes a new look."""
        for conn_id in conn_ids:
            self._seen.pop(conn_id, None)

    def kit(self, conn_id: str) -> BatchKit:
        """The batch engine on a connection, which is made anew every few minutes."""
        with self._lock:
            until, kit = self._kits.get(conn_id, (0.0, None))
        if kit is None or time.monotonic() > until:
            kit = BatchKitHook(conn_id).kit
            with self._lock:
                self._kits[conn_id] = (time.monotonic() + _CLIENT_S, kit)
        return kit

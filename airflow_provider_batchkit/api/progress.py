"""How far running batches are, by one look at the workspace's list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING

from airflow_provider_batchkit.model import BatchSnapshot

if TYPE_CHECKING:
    from airflow_provider_batchkit.api.calls import BatchApi

#: batches on one page of the list. A batch beyond it is older than a thousand others, and its progress stays unknown
_PAGE = 1000
#: a batch's time in the list and in the answer to its creation may differ by a fraction of a second
_EARLIER = timedelta(seconds=1)


def listed(api: BatchApi, wanted: Mapping[str, datetime | None]) -> dict[str, BatchSnapshot]:
    """The wanted batches that the first page of the list shows.

    :param wanted: batch id → its creation, where that is known
    :raises anthropic.APIError: when the list cannot be had
    """
    born = [created for created in wanted.values() if created is not None]
    if not born:
        return {}
    missing, found = set(wanted), dict[str, BatchSnapshot]()
    for snapshot in islice(api.recent(min(born) - _EARLIER), _PAGE):
        if snapshot.batch_id in missing:
            found[snapshot.batch_id] = snapshot
            missing.discard(snapshot.batch_id)
            if not missing:
                break
    return found


def done(snapshots: Iterable[BatchSnapshot]) -> int:
    """Requests that are done in all of them. The API may count none before a batch has ended."""
    return sum(snapshot.counts.total - snapshot.counts.processing for snapshot in snapshots)

"""Looks at batches on a real clock, one by one or in the workspace's list. :mod:`.polling` decides without a clock."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING

from airflow_provider_batchkit.api.calls import poll_failure
from airflow_provider_batchkit.api.polling import PollState, Unseen
from airflow_provider_batchkit.exceptions import BatchNotVisibleError, BatchUnavailableError
from airflow_provider_batchkit.model import BatchSnapshot

if TYPE_CHECKING:
    from airflow_provider_batchkit.api.calls import BatchApi

log = logging.getLogger(__name__)

#: batches on one page of the list. A batch beyond it is older than a thousand others, and its progress stays unknown
_PAGE = 1000
#: a batch's time in the list and in the answer to its creation may differ by a fraction of a second
_EARLIER = timedelta(seconds=1)


def look(get: Callable[[str], BatchSnapshot], state: PollState) -> None:
    """Look once at every open batch of ``state``, and note in it what was seen or why the look failed. Its news goes to the log.

    :param get: retrieves a batch; the state's times are on the monotonic clock
    """
    import anthropic

    shown, hidden = list[BatchSnapshot](), dict[str, str]()
    try:
        for batch_id in state.open_ids():
            try:
                shown.append(get(batch_id))
            except BatchNotVisibleError as e:
                hidden[batch_id] = str(e)
    except BatchUnavailableError as e:
        state.failed(str(e), fatal=True)
    except anthropic.APIError as e:
        state.note(shown)
        state.failed(**poll_failure(e))
    else:
        state.saw(shown)
        state.hid(hidden, time.monotonic())
    for line in state.news():
        log.warning("%s", line)


def pause_after(error: BatchNotVisibleError, unseen: Unseen) -> float:
    """Seconds until the next look, after one that was answered with a 404.

    :raises BatchNotVisibleError: ``error`` itself, when its object was looked for long enough
    """
    unseen.again(time.monotonic())
    if unseen.is_gone:
        raise error
    log.warning("%s Looking again in %.0f s.", error, unseen.pause)
    return unseen.pause


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

"""Looks at batches on a real clock. :mod:`.polling` decides without a clock."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from airflow_provider_batchkit.api.calls import poll_failure
from airflow_provider_batchkit.api.polling import PollState, Unseen
from airflow_provider_batchkit.exceptions import BatchNotVisibleError, BatchUnavailableError
from airflow_provider_batchkit.model import BatchSnapshot

log = logging.getLogger(__name__)


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

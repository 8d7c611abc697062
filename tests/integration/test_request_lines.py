"""``HTTP Request: POST …``: at DEBUG for the calls of our tasks, and as before for everybody else's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest

from airflow_provider_batchkit.hooks import request_lines
from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
from airflow_provider_batchkit.simulator import SimulatorProcess


@pytest.fixture(autouse=True)
def nothing_lowered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loggers of a process that has made no client yet, and afterwards again."""
    fresh = request_lines._RequestLines()
    before = request_lines._FILTER
    monkeypatch.setattr(request_lines, "_FILTER", fresh)
    loggers = [logging.getLogger(name) for name in request_lines._LOGGERS]
    had = [logger for logger in loggers if before in logger.filters]
    for logger in loggers:
        logger.removeFilter(before)
        # other tests of this process may have set up logging their way
        for name, value in (("level", logging.NOTSET), ("disabled", False), ("propagate", True)):
            monkeypatch.setattr(logger, name, value)
        logger.manager._clear_cache()  # type: ignore[attr-defined] # of whether a level is enabled
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    yield
    for logger in loggers:
        logger.removeFilter(fresh)
    for logger in had:
        logger.addFilter(before)


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[tuple[str, bool]]:
    """Level and whether it is of the simulator's own address, of each line of a look by our hook and one by a client of somebody else."""
    import anthropic

    hook = BatchKitHook()
    address = str(hook.kit.client.base_url)
    other = anthropic.Anthropic(api_key="test-key", base_url=address.replace("127.0.0.1", "localhost"))

    async def look() -> None:
        async with await hook.get_async_conn() as client:
            await client.messages.batches.list(limit=1)

    caplog.clear()
    with caplog.at_level(level):
        hook.kit.client.messages.batches.list(limit=1)
        asyncio.run(look())
        other.messages.batches.list(limit=1)
    found = [record for record in caplog.records if record.getMessage().startswith("HTTP Request: GET")]
    return [(record.levelname, address in record.getMessage()) for record in found]


def test_our_calls_are_said_at_debug_and_those_of_others_at_info(api: SimulatorProcess, caplog: pytest.LogCaptureFixture) -> None:
    """For both clients of the hook."""
    assert lines(caplog, logging.INFO) == [("INFO", False)]
    assert lines(caplog, logging.DEBUG) == [("DEBUG", True), ("DEBUG", True), ("INFO", False)]


def test_who_has_asked_for_the_lines_keeps_them(
    api: SimulatorProcess, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the SDK's own variable, or by a level for the library's logger."""
    with monkeypatch.context() as patch:
        patch.setenv("ANTHROPIC_LOG", "info")
        assert lines(caplog, logging.INFO) == [("INFO", True), ("INFO", True), ("INFO", False)]
    logger = logging.getLogger("httpx2")
    logger.setLevel(logging.INFO)
    try:
        assert lines(caplog, logging.INFO) == [("INFO", True), ("INFO", True), ("INFO", False)]
    finally:
        logger.setLevel(logging.NOTSET)

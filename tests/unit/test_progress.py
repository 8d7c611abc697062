"""Long work says how far it is, every few seconds at most."""

from __future__ import annotations

import logging

import pytest

from airflow_provider_batchkit.progress import Progress, counts_text


def test_a_line_gives_rows_rate_bytes_and_the_time_left(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and bytes of ten seconds of work, of which a quarter is done; the last line gives the whole."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    progress = Progress(logging.getLogger("test"), "landing b1", 100_000)
    progress.add(20_000)
    assert caplog.messages == []
    now = 110.0
    progress.add(5_000, 15_250_000)
    progress.add(0, 1)
    assert caplog.messages == ["landing b1: 25,000 rows, 2,500 rows/s, 15.2 MB, 25 %, 30 s left"]
    progress.done()
    assert caplog.messages[-1] == "landing b1: 25,000 rows in 10.0 s, 15.3 MB"


def test_work_that_only_reads_bytes_yet_has_no_time_left(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first row nobody can say how long it takes."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    progress = Progress(logging.getLogger("test"), "landing b1", 10)
    now = 110.0
    progress.add(0, 2_000_000)
    assert caplog.messages == ["landing b1: 0 rows, 0 rows/s, 2.0 MB"]


def test_counts_are_words_without_those_that_are_zero() -> None:
    """As the logs of a sensor, a fetch and a run say them; no Python."""
    assert (
        counts_text({"succeeded": 1980, "errored": 20, "invalid_output": 1, "expired": 0})
        == "1,980 succeeded, 20 errored, 1 invalid output"
    )
    assert counts_text({"succeeded": 0}) == "none"

"""Progress of long work for people: a log line every few seconds at most; spans of time and counts in words."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta

_EVERY_S = 5.0


class Progress:
    """Counts rows and bytes, and logs ``<what>: 120,000 rows, 41,000 rows/s, 73.2 MB, 40 %, 4 s left`` at most every five seconds."""

    def __init__(self, log: logging.Logger, what: str, total: int | None = None) -> None:
        """:param total: expected rows; with it the line shows a percentage and the time left"""
        self.rows = 0
        self.bytes = 0
        self._log = log
        self._what = what
        self._total = total
        self._start = self._last = time.monotonic()

    def add(self, rows: int = 1, byte_count: int = 0) -> None:
        """Count rows that are done, and the bytes that were read or written for them."""
        self.rows += rows
        self.bytes += byte_count
        # the clock is read only for every thousandth row, and for bytes, which come in large pieces
        if self.rows % 1_000 < rows or byte_count:
            now = time.monotonic()
            if now - self._last >= _EVERY_S:
                self._last = now
                self._log.info("%s", self._line(now))

    def _line(self, now: float) -> str:
        rate = self.rows / max(now - self._start, 1e-9)
        line = f"{self._what}: {self.rows:,} rows, {rate:,.0f} rows/s{self._megabytes()}"
        if self._total and rate:
            left = max(self._total - self.rows, 0) / rate
            line += f", {100 * self.rows / self._total:.0f} %, {left:.0f} s left"
        return line

    def _megabytes(self) -> str:
        return f", {self.bytes / 1e6:,.1f} MB" if self.bytes else ""

    def done(self) -> None:
        """Log the totals once at the end."""
        now = time.monotonic()
        self._log.info("%s: %s rows in %.1f s%s", self._what, f"{self.rows:,}", now - self._start, self._megabytes())


def span_text(seconds: float) -> str:
    """A span of time in its one or two largest units: ``45 s``, ``12 min``, ``1 h 12 min``, ``3 d 4 h``."""
    minutes = int(max(seconds, 0) // 60)
    if minutes == 0:
        return f"{max(seconds, 0):.0f} s" if seconds < 59.5 else "1 min"
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def counts_text(counts: Mapping[str, int]) -> str:
    """Counts without those that are zero: ``1,980 succeeded, 20 errored``."""
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count) or "none"


def span_of(text: str) -> timedelta:
    """A span of time as people write it: ``90d`` or ``12h``.

    :raises ValueError: for anything else
    """
    unit = {"d": "days", "h": "hours"}.get(text[-1:])
    if unit is None or not text[:-1].isdigit():
        raise ValueError(f"{text!r} is no span of time: write 90d for days, 12h for hours")
    return timedelta(**{unit: int(text[:-1])})

"""A log line every few seconds at most, for work that takes long."""

from __future__ import annotations

import logging
import time

_EVERY_S = 5.0


class Progress:
    """Counts rows and logs ``<what>: 120,000 rows, 41,000 rows/s`` at most every five seconds."""

    def __init__(self, log: logging.Logger, what: str, total: int | None = None) -> None:
        """:param total: rows expected, for a percentage and the time left"""
        self.rows = 0
        self._log = log
        self._what = what
        self._total = total
        self._start = self._last = time.monotonic()

    def add(self, rows: int = 1) -> None:
        self.rows += rows
        if self.rows % 1_000 < rows:
            now = time.monotonic()
            if now - self._last >= _EVERY_S:
                self._last = now
                self._log.info("%s", self._line(now))

    def _line(self, now: float) -> str:
        rate = self.rows / max(now - self._start, 1e-9)
        line = f"{self._what}: {self.rows:,} rows, {rate:,.0f} rows/s"
        if self._total:
            left = max(self._total - self.rows, 0) / rate
            line += f", {100 * self.rows / self._total:.0f} %, {left:.0f} s left"
        return line

    def done(self) -> None:
        """Log the whole once."""
        now = time.monotonic()
        self._log.info("%s: %s rows in %.1f s", self._what, f"{self.rows:,}", now - self._start)

"""Lowers the line that the SDK's HTTP library logs for each call, ``HTTP Request: POST …``, to DEBUG: at INFO it buries other lines."""

from __future__ import annotations

import logging
import os

#: loggers of the HTTP library of SDK 2.12, and of that of earlier SDKs
_LOGGERS = ("httpx2", "httpx")


class _RequestLines(logging.Filter):
    """Lowers the lines of calls to some addresses to DEBUG. All other lines of the same loggers stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        if record.levelno != logging.INFO or not isinstance(args, tuple) or len(args) < 2:
            return True
        # the arguments of a request line begin with the method and the address
        if not str(args[1]).startswith(tuple(self.addresses)):
            return True
        record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


_FILTER = _RequestLines()


def lower_request_lines(base_url: object) -> None:
    """Log calls to this address at the level DEBUG from now on, in this process.

    The lines stay as they are when the user has set a level for the library's logger, or ``ANTHROPIC_LOG``.

    :param base_url: a client's base URL, which ends with a slash
    """
    if os.environ.get("ANTHROPIC_LOG"):
        return
    _FILTER.addresses.add(str(base_url))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.addFilter(_FILTER)

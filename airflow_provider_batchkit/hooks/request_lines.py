"""The lines that the SDK's HTTP library logs for each call, ``HTTP Request: POST …``, at DEBUG: at INFO they bury what a task says."""

from __future__ import annotations

import logging
import os

#: the library of SDK 2.12, and the one of earlier SDKs
_LOGGERS = ("httpx2", "httpx")


class _RequestLines(logging.Filter):
    """Lowers the lines of calls to some addresses. Everything else of the same loggers stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        if record.levelno != logging.INFO or not isinstance(args, tuple) or len(args) < 2:
            return True
        # of a request line: the method, the address
        if not str(args[1]).startswith(tuple(self.addresses)):
            return True
        record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


_FILTER = _RequestLines()


def lower_request_lines(base_url: object) -> None:
    """From now on, lines of calls to this address are of the level DEBUG in this process.

    Who has set a level for the library's logger, or ``ANTHROPIC_LOG``, wants these lines, and keeps them.

    :param base_url: of a client; it ends with a slash
    """
    if os.environ.get("ANTHROPIC_LOG"):
        return
    _FILTER.addresses.add(str(base_url))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.addFilter(_FILTER)

"""Result lines: the result of each request of a batch, in another order than the requests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import gcd
from typing import Any

import msgspec

from . import answers, odd_lines
from .outcomes import MARKERS, Outcome, Script
from .records import Record

_BAD_PARAMS = Script(Outcome.ERRORED, details=True)


def script_of(record: Record) -> Script:
    """The script of an errored request, with type and message of its error."""
    if record.error:
        return _BAD_PARAMS._replace(type=record.error_type, message=record.error)
    script = MARKERS[record.marker or "errored"]
    return script if script.message else MARKERS["api-error"]


def result_line(record: Record, batch_id: str) -> bytes:
    """One line of a batch's results, with its newline."""
    result: dict[str, Any]
    if record.outcome == Outcome.SUCCEEDED:
        result = {"type": "succeeded", "message": answers.message(record, batch_id)}
    elif record.outcome == Outcome.ERRORED:
        result = {"type": "errored", "error": _error(record, batch_id)}
    else:
        result = {"type": Outcome(record.outcome).name.lower()}
    line = msgspec.json.encode({"custom_id": record.custom_id, "result": result}) + b"\n"
    if record.marker and record.marker.replace("-", "_") in odd_lines.CHANGES:
        return odd_lines.changed(line, record.marker.replace("-", "_"))
    return line


def _error(record: Record, batch_id: str) -> dict[str, Any]:
    """The error of an errored line: ``request_id`` is null where the request never ran, and missing where a script says so."""
    script = script_of(record)
    details = {"error_visibility": "user_facing"} if script.details else None
    error: dict[str, Any] = {"type": "error", "error": {"details": details, "type": script.type, "message": script.message}}
    if script.named:
        ident = hashlib.blake2b(f"{batch_id}/{record.custom_id}/error".encode(), digest_size=12).hexdigest()
        error["request_id"] = None if record.error else f"workerreq_{ident}"
    return error


def result_lines(records: list[Record], batch_id: str, seed: int) -> Iterator[bytes]:
    """All result lines. The same seed gives the same order, which differs from that of the requests when there are two or more."""
    for position in order(len(records), seed):
        yield result_line(records[position], batch_id)


def order(size: int, seed: int) -> Iterator[int]:
    """The positions 0 to size-1, each once, permuted by an affine step that needs no memory."""
    step = max(2, int(size * 0.618))
    while gcd(step, size) != 1:
        step += 1
    start = 1 + seed
    if step % size == 1 and start % size == 0:  # the order would stay as it is, as it can for two requests
        start = 1
    return ((start + step * number) % size for number in range(size))

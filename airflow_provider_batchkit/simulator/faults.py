"""Faults: deliberate failures, each on given calls and a given number of times.

Among the faults that answer or cut a whole call (``cut_…``, ``status…``, ``html…``), only the first armed one in the list strikes, and the
others wait for a later call. ``late``, ``late_accept``, ``hide``, ``vanish`` and the faults inside a results stream, such as
``cut_results``, all strike in addition.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from . import odd_lines
from .errors import ApiError

ANSWERING = ("cut_before_accept", "cut_after_accept", "status", "status_after_accept", "html", "html_after_accept")
IN_RESULTS = ("cut_results", "broken_line", "duplicate_line", "foreign_line", "missing_line", "trickle", "set_member", *odd_lines.CHANGES)
#: the calls on which ``vanish`` strikes: those that ask for a batch by its id, and the list
LOOKS = ("retrieve", "list", "results", "cancel", "delete")
Kind = Literal[
    "cut_before_accept", "cut_after_accept", "late", "late_accept", "status", "status_after_accept", "html", "html_after_accept",
    "hide", "vanish", "cut_results", "broken_line", "duplicate_line", "foreign_line", "missing_line", "trickle",
    "set_member", "null_counters", "unknown_members", "lone_surrogate", "new_type", "flat_error", "no_usage", "odd_block",
]  # fmt: skip
#: The page that a ``html`` fault sends by default, like the login page of a company's gateway.
PAGE = "<!DOCTYPE html>\n<html>\n<head><title>Sign in</title></head>\n<body>Your session has expired.</body>\n</html>\n"
Endpoint = Literal["create", "retrieve", "list", "cancel", "delete", "results", "count_tokens", "models", "model", "*"]


class Fault(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One fault.

    ``cut_before_accept``: the body is read, nothing is done, and the connection is closed without an answer. ``cut_after_accept``: the call
    is carried out, then the connection is closed without an answer. ``status``: nothing is done, and the answer is ``status``.
    ``status_after_accept``: the call is carried out, and the answer is ``status``. ``late``: the call is carried out at once and answered
    after ``seconds``, so a late list shows the batches that existed when the call began. ``late_accept``: the call is carried out after
    ``seconds``, even when the client has gone away by then. ``html``: nothing is done, and the answer is a gateway's page: ``body`` of
    ``content_type``, by default with status 200. ``html_after_accept``: the call is carried out, and the answer is that page.
    ``hide``: the batch that the call creates is missing from the list and answers 404 for ``seconds``, or for ``calls``.
    ``vanish``: the call does not find a live batch; a retrieve, results, cancel or delete answers 404, a list leaves ``batch`` out
    (without ``batch``: all of them). It does not count as a look.

    In a results stream, ``line`` counts result lines from 1: ``cut_results`` ends the stream in the middle of that line (``clean``: before
    it, as if it were the regular end), ``broken_line`` and ``foreign_line`` put a line before it, ``duplicate_line`` sends it twice,
    ``missing_line`` drops it; ``trickle`` waits ``seconds`` before each line. ``set_member`` gives the member at the path ``member``
    (``result.message.usage.output_tokens``, ``result.message.content.0.text``) the ``value``, or removes it when there is no value. The
    other kinds of ``odd_lines.CHANGES`` each change a line in another way. These take ``line`` 0 for every line, or a ``custom_id``.
    """

    kind: Kind
    #: the endpoint whose calls it matches: by default ``create``; for ``vanish`` ``retrieve``, and for faults in a results stream
    #: ``results``. ``*`` matches all calls, for ``vanish`` all that ask for a batch
    endpoint: Endpoint | None = None
    #: the batch whose calls it matches; null: any batch
    batch: str | None = None
    #: matching calls that pass before it strikes
    after: Annotated[int, msgspec.Meta(ge=0)] = 0
    #: the number of calls that it strikes; null: all of them
    times: Annotated[int, msgspec.Meta(ge=1)] | None = 1
    #: share of the matching calls that it strikes, 0 to 1; the simulator's seed decides which. The other calls do not use up ``times``
    chance: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    #: HTTP status of the answer; by default 500, for a page 200
    status: Annotated[int, msgspec.Meta(ge=200, le=599)] | None = None
    #: type and message of the error; by default those of the status
    error_type: str | None = None
    message: str = "The simulator was told to answer with this error."
    #: seconds in the ``retry-after`` header
    retry_after: float | None = None
    headers: dict[str, str] = {}
    body: str = PAGE
    content_type: str = "text/html; charset=utf-8"
    seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    #: for ``hide``, in place of ``seconds``: how many calls for this batch, and list calls of its workspace, do not find it
    calls: Annotated[int, msgspec.Meta(ge=1)] | None = None
    line: Annotated[int, msgspec.Meta(ge=0)] = 1
    #: in place of ``line``: changes the lines of this request
    custom_id: str | None = None
    #: path of the member that ``set_member`` sets: names, and positions in a list, with dots between them
    member: str = ""
    value: Any | msgspec.UnsetType = msgspec.UNSET
    clean: bool = False
    #: whether to cut with a TCP reset in place of a regular close
    reset: bool = False
    #: the number of calls that it has struck
    struck: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a status that is not an error's, ``set_member`` without ``member`` (or the reverse), and a fault of one
        line without that line's number.
        """
        if self.kind.startswith("status") and (self.status or 500) < 300:
            raise ValueError(f"status {self.status} is no error")
        if (self.kind == "set_member") != bool(self.member):
            raise ValueError("set_member, and nothing else, has a member")
        if (self.line == 0 or self.custom_id is not None) and not self.is_change:
            raise ValueError(f"{self.kind} strikes one line, by its number")

    @property
    def is_change(self) -> bool:
        """Whether it changes a result line, as opposed to adding, dropping or cutting one."""
        return self.kind == "set_member" or self.kind in odd_lines.CHANGES

    def matches(self, endpoint: str, batch_id: str | None) -> bool:
        """Whether it can strike this call."""
        if self.kind == "vanish":
            own_batch = self.batch in (None, batch_id) or endpoint == "list"
            return own_batch and endpoint in LOOKS and (self.endpoint or "retrieve") in ("*", endpoint)
        usual = "results" if self.kind in IN_RESULTS else "create"
        return (self.endpoint or usual) in ("*", endpoint) and self.batch in (None, batch_id)

    def concerns(self, line: bytes, number: int) -> bool:
        """Whether it changes this line of a results stream."""
        if self.custom_id is not None:
            return odd_lines.custom_id_of(line) == self.custom_id
        return self.line in (0, number)


@dataclass
class Plan:
    """The faults of one call."""

    answering: Fault | None = None
    late: Fault | None = None
    late_accept: Fault | None = None
    hide: Fault | None = None
    vanish: list[Fault] = field(default_factory=list)
    in_results: list[Fault] = field(default_factory=list)

    def add(self, fault: Fault) -> None:
        """Adds a fault. If several answer the call, delay it or hide its batch, the last one counts."""
        if fault.kind in ANSWERING:
            self.answering = fault
        elif fault.kind in IN_RESULTS:
            self.in_results.append(fault)
        elif fault.kind == "late":
            self.late = fault
        elif fault.kind == "late_accept":
            self.late_accept = fault
        elif fault.kind == "vanish":
            self.vanish.append(fault)
        else:
            self.hide = fault

    def strike(self, *kinds: str) -> None:
        """Raises CutError, PageError or ApiError when the fault that answers the call has one of these kinds."""
        fault = self.answering
        if fault is None or fault.kind not in kinds:
            return
        if fault.kind.startswith("cut"):
            raise CutError(b"", fault)
        if fault.kind.startswith("html"):
            raise PageError(fault)
        retry = {} if fault.retry_after is None else {"retry-after": f"{fault.retry_after:g}"}
        raise ApiError(fault.status or 500, fault.message, fault.error_type, {**fault.headers, **retry})

    def is_gone(self, batch_id: str) -> bool:
        """Whether the call does not find this batch."""
        return any(fault.batch in (None, batch_id) for fault in self.vanish)


class FaultList:
    """The faults of one simulator, for use from any thread."""

    def __init__(self, seed: int) -> None:
        self._lock = threading.Lock()
        self._random = random.Random(seed)  # noqa: S311 - chance, not secrecy
        self._faults: list[Fault] = []

    def add(self, kind: str, **fields: Any) -> None:
        """Adds a fault; the fields are those of :class:`Fault`. Raises ValueError for an unknown name or a value out of range."""
        try:
            fault = msgspec.convert({"kind": kind, **fields}, Fault)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from error
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Drops all faults, including those that have not struck yet."""
        with self._lock:
            self._faults.clear()

    def as_json(self) -> list[dict[str, Any]]:
        """All faults with how often each has struck."""
        with self._lock:
            return [msgspec.to_builtins(fault) for fault in self._faults]

    def take(self, endpoint: str, batch_id: str | None) -> Plan:
        """The faults that strike this call. The call counts for every fault that it matches."""
        plan = Plan()
        with self._lock:
            for fault in self._faults:
                if not fault.matches(endpoint, batch_id):
                    continue
                if fault.after:
                    fault.after -= 1
                    continue
                if fault.times == 0 or (fault.kind in ANSWERING and plan.answering is not None):
                    continue
                if fault.chance < 1 and self._random.random() >= fault.chance:
                    continue
                if fault.times is not None:
                    fault.times -= 1
                fault.struck += 1
                plan.add(fault)
        return plan


class CutError(Exception):
    """Ends the stream here: ``last`` is still sent, and ``fault`` decides how the connection is closed."""

    def __init__(self, last: bytes, fault: Fault) -> None:
        super().__init__(fault.kind)
        self.last = last
        self.fault = fault


class PageError(Exception):
    """Makes ``fault.body`` the answer: a page that is not an answer of the API."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.kind)
        self.fault = fault


def faulty(lines: Iterable[bytes], faults: list[Fault]) -> Iterator[bytes]:
    """The lines with the faults applied. Raises CutError where the stream is cut; a ``line`` past the last one means the end."""
    if not faults:
        yield from lines
        return
    number = 0
    for number, line in enumerate(lines, start=1):
        yield from _around(line, [fault for fault in faults if fault.concerns(line, number)])
    for fault in faults:
        if fault.line > number and fault.kind in ("cut_results", "broken_line", "foreign_line"):
            yield from _around(b"", [fault])


def _around(line: bytes, faults: list[Fault]) -> Iterator[bytes]:
    """The lines that one line becomes through its faults."""
    sent = [line]
    for fault in faults:
        match fault.kind:
            case "cut_results":
                raise CutError(b"" if fault.clean else line[: len(line) // 2], fault)
            case "missing_line":
                sent = []
            case "duplicate_line":
                sent = [line, line]
            case "broken_line" | "foreign_line":
                yield _extra_line(fault)
            case "set_member":
                sent = [odd_lines.with_member(text, fault.member, fault.value) for text in sent]
            case kind if kind in odd_lines.CHANGES:
                sent = [odd_lines.changed(text, kind) for text in sent]
    yield from sent


def _extra_line(fault: Fault) -> bytes:
    if fault.kind == "broken_line":
        return b'{"custom_id":"broken","result":{"type":"succee\n'
    return b'{"custom_id":"never-asked","result":{"type":"expired"}}\n'

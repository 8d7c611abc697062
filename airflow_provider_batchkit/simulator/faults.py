"""Faults: what goes wrong on purpose, on which call, and how often.

Of the faults that answer or cut a whole call (``cut_…``, ``status…``) the first armed one in the list strikes, the others wait for
their turn; ``late``, ``late_accept``, ``hide`` and the faults inside a results stream come on top of them, all together.
``cut_results`` belongs to the latter.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from .errors import ApiError

ANSWERING = ("cut_before_accept", "cut_after_accept", "status", "status_after_accept")
IN_RESULTS = ("cut_results", "broken_line", "duplicate_line", "foreign_line", "missing_line", "trickle")
Kind = Literal[
    "cut_before_accept", "cut_after_accept", "late", "late_accept", "status", "status_after_accept", "hide",
    "cut_results", "broken_line", "duplicate_line", "foreign_line", "missing_line", "trickle",
]  # fmt: skip
Endpoint = Literal["create", "retrieve", "list", "cancel", "delete", "results", "count_tokens", "models", "model", "messages", "*"]


class Fault(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One fault.

    ``cut_before_accept``: the body is read, nothing is done, the connection is closed without an answer. ``cut_after_accept``: the call
    is carried out, then the same. ``status``: nothing is done, the answer is ``status``. ``status_after_accept``: the call is carried
    out, the answer is ``status``. ``late``: the call is carried out at once and answered after ``seconds``, so a late list shows what was
    there when the call began. ``late_accept``: the call is carried out after ``seconds``, also when the client has gone away by then.
    ``hide``: the batch that the call creates is missing from the list and answers 404 for ``seconds``, or for ``calls``.

    In a results stream, ``line`` counts result lines from 1: ``cut_results`` ends the stream in the middle of it (``clean``: before it,
    as if it were the regular end), ``broken_line`` and ``foreign_line`` put a line before it, ``duplicate_line`` sends it twice,
    ``missing_line`` drops it; ``trickle`` waits ``seconds`` before each line.
    """

    kind: Kind
    #: which calls it matches; by default ``create``, or ``results`` for the faults in a results stream
    endpoint: Endpoint | None = None
    #: only calls on this batch
    batch: str | None = None
    #: matching calls that pass before it strikes
    after: Annotated[int, msgspec.Meta(ge=0)] = 0
    #: how many calls it strikes; null: all
    times: Annotated[int, msgspec.Meta(ge=1)] | None = 1
    #: share of the matching calls that it strikes, 0 to 1; the simulator's seed decides which. The others do not count as ``times``
    chance: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    status: Annotated[int, msgspec.Meta(ge=300, le=599)] = 500
    #: type and message of the error; by default those of the status
    error_type: str | None = None
    message: str = "The simulator was told to answer with this error."
    #: seconds in the ``retry-after`` header
    retry_after: float | None = None
    headers: dict[str, str] = {}
    seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    #: of ``hide``, in place of ``seconds``: calls for this batch, and list calls of its workspace, that do not find it
    calls: Annotated[int, msgspec.Meta(ge=1)] | None = None
    line: Annotated[int, msgspec.Meta(ge=1)] = 1
    clean: bool = False
    #: cut with a TCP reset in place of a regular close
    reset: bool = False
    #: how often it has struck
    struck: int = 0

    @property
    def matches(self) -> str:
        return self.endpoint or ("results" if self.kind in IN_RESULTS else "create")


@dataclass
class Plan:
    """The faults of one call."""

    answering: Fault | None = None
    late: Fault | None = None
    late_accept: Fault | None = None
    hide: Fault | None = None
    in_results: list[Fault] = field(default_factory=list)

    def add(self, fault: Fault) -> None:
        """Of several that answer the call, hold it up or hide its batch, the last one counts."""
        if fault.kind in ANSWERING:
            self.answering = fault
        elif fault.kind in IN_RESULTS:
            self.in_results.append(fault)
        elif fault.kind == "late":
            self.late = fault
        elif fault.kind == "late_accept":
            self.late_accept = fault
        else:
            self.hide = fault

    def strike(self, *kinds: str) -> None:
        """Raises CutError or ApiError when the call's answering fault is of one of these kinds."""
        fault = self.answering
        if fault is None or fault.kind not in kinds:
            return
        if fault.kind.startswith("cut"):
            raise CutError(b"", fault)
        retry = {} if fault.retry_after is None else {"retry-after": f"{fault.retry_after:g}"}
        raise ApiError(fault.status, fault.message, fault.error_type, {**fault.headers, **retry})


class FaultList:
    """The faults of one simulator, for use from any thread."""

    def __init__(self, faults: Iterable[Fault] = (), seed: int = 0) -> None:
        self._lock = threading.Lock()
        self._random = random.Random(seed)  # noqa: S311 - chance, not secrecy
        self._faults = list(faults)

    def add(self, kind: str, **fields: Any) -> None:
        """Adds a fault; the fields are those of :class:`Fault`. Raises ValueError for an unknown name or a value out of range."""
        try:
            fault = msgspec.convert({"kind": kind, **fields}, Fault)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from error
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Drops all faults, also those that have not struck yet."""
        with self._lock:
            self._faults.clear()

    def as_json(self) -> list[dict[str, Any]]:
        """All faults with how often each has struck."""
        with self._lock:
            return [msgspec.structs.asdict(fault) for fault in self._faults]

    def take(self, endpoint: str, batch_id: str | None) -> Plan:
        """The faults that strike this call. Counts the call for all that it matches."""
        plan = Plan()
        with self._lock:
            for fault in self._faults:
                if fault.matches not in ("*", endpoint) or (fault.batch is not None and fault.batch != batch_id):
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
    """The stream is to end here: ``last`` is what is still sent, ``fault`` says how to close."""

    def __init__(self, last: bytes, fault: Fault) -> None:
        super().__init__(fault.kind)
        self.last = last
        self.fault = fault


def faulty(lines: Iterable[bytes], faults: list[Fault]) -> Iterator[bytes]:
    """The lines with the faults among them. Raises CutError where the stream is to be cut; a line past the last one stands for the end."""
    if not faults:
        yield from lines
        return
    number = 0
    for number, line in enumerate(lines, start=1):
        yield from _around(line, [fault for fault in faults if fault.line == number])
    for fault in faults:
        if fault.line > number and fault.kind in ("cut_results", "broken_line", "foreign_line"):
            yield from _around(b"", [fault])


def _around(line: bytes, faults: list[Fault]) -> Iterator[bytes]:
    """One line with what its faults make of it."""
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
    yield from sent


def _extra_line(fault: Fault) -> bytes:
    if fault.kind == "broken_line":
        return b'{"custom_id":"broken","result":{"type":"succee\n'
    return b'{"custom_id":"never-asked","result":{"type":"expired"}}\n'

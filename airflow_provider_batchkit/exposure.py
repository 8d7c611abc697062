"""What requests may cost under any prices: sums over each of them, taken as they are written.

The tokens of a prompt are bounded by what was sent. The source for each part, DOCS being https://platform.claude.com/docs/en, checked
2026-11-23:

* A token is at least one byte of UTF-8 text, so a request has no more prompt tokens than its JSON has bytes: the tokens that the API puts
  around messages are fewer than the bytes of the JSON around them.
* Tools bring a prompt of their own, at most 530 tokens (DOCS/agents-and-tools/tool-use, pricing table); a JSON schema for the answer and
  citations bring one too, whose length is not published. ``PROMPT_ALLOWANCE`` is added for each.
* An image is scaled down to at most 4,784 tokens, whatever its source (DOCS/build-with-claude/vision).
* An answer, thinking included, has at most ``max_tokens``.
* A prompt with cache markers may be written to the cache, whole.
* PDFs, files, server tools (web search and the like), MCP servers and parameters that are not known here have no bound: the API
  decides how much they read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

#: tokens of the prompt that the API adds for tools, for an answer's schema, or for citations
PROMPT_ALLOWANCE = 1_000
IMAGE_TOKENS = 5_000

_EMPTY = msgspec.Raw(b"null")


class _Params(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """Params whose cost is known. One that is not listed makes the request unbounded."""

    model: str
    max_tokens: int
    messages: msgspec.Raw
    system: msgspec.Raw = _EMPTY
    tools: msgspec.Raw = _EMPTY
    tool_choice: msgspec.Raw = _EMPTY
    output_config: msgspec.Raw = _EMPTY
    cache_control: msgspec.Raw = _EMPTY
    thinking: msgspec.Raw = _EMPTY
    inference_geo: str | None = None
    temperature: msgspec.Raw = _EMPTY
    top_p: msgspec.Raw = _EMPTY
    top_k: msgspec.Raw = _EMPTY
    stop_sequences: msgspec.Raw = _EMPTY
    metadata: msgspec.Raw = _EMPTY
    service_tier: msgspec.Raw = _EMPTY
    user_profile_id: msgspec.Raw = _EMPTY
    speed: msgspec.Raw = _EMPTY
    stream: msgspec.Raw = _EMPTY


class _Request(msgspec.Struct, gc=False):
    custom_id: str
    params: _Params


class _Named(msgspec.Struct, gc=False):
    """A request of any kind."""

    custom_id: str
    params: dict[str, Any]


_PARAMS = b'","params":'
_BEFORE_TEXT = b'[{"content":"'
_AFTER_TEXT = b'","role":"user"}]'
#: in every content block and every cache marker
_MARKED = b'"type":'

_REQUEST = msgspec.json.Decoder(_Request)
_NAMED = msgspec.json.Decoder(_Named)


class _Unbounded(Exception):
    """Something in a request whose tokens the API decides."""


@dataclass(slots=True)
class _Group:
    """Requests of about the same size that are priced alike."""

    requests: int = 0
    bytes: int = 0
    max_tokens: int = 0
    #: prompt tokens at most: of all, and of the largest
    prompt_bound: int = 0
    largest: int = 0


@dataclass(frozen=True, slots=True)
class _Frame:
    """What stands around the text in a request of one user message: requests of a job mostly differ in nothing else."""

    head: bytes
    tail: bytes
    model: str
    inference_geo: str | None
    max_tokens: int

    @classmethod
    def of(cls, body: bytes, params: _Params) -> _Frame | None:
        """The frame of a request without blocks; None when its messages are not one text."""
        messages = bytes(params.messages)
        if not (messages.startswith(_BEFORE_TEXT) and messages.endswith(_AFTER_TEXT)):
            return None
        start = body.index(messages)
        head = body[body.index(_PARAMS) : start + len(_BEFORE_TEXT)]
        return cls(head, body[start + len(messages) - len(_AFTER_TEXT) :], params.model, params.inference_geo, params.max_tokens)

    def covers(self, bodies: Sequence[bytes]) -> bool:
        """Whether requests have the same frame, and text alone in it: a quote inside a text is escaped, and a block names its type."""
        head, tail = self.head, self.tail
        for body in bodies:
            start = body.find(_PARAMS)
            if not (body.startswith(head, start) and body.endswith(tail)):
                return False
            # most texts have no quote at all, which takes a tenth of the time to see
            if body.find(b'"', start + len(head)) != len(body) - len(tail) and _MARKED in body:
                return False
        return True


#: model, ``inference_geo``, the dearest cache write (``""``, ``"5m"`` or ``"1h"``), class of size
_Kind = tuple[str, str | None, str, int]


@dataclass(slots=True)
class Exposure:
    """Sums over requests that tell what they may cost under any prices. Memory grows with models and magnitudes, not with requests."""

    groups: dict[_Kind, _Group] = field(default_factory=dict)
    #: why no bound exists, of the first request that has none, and how many have none
    unbounded: str = ""
    unbounded_requests: int = 0
    _frame: _Frame | None = None

    @property
    def requests(self) -> int:
        return sum(group.requests for group in self.groups.values())

    @property
    def body_bytes(self) -> int:
        return sum(group.bytes for group in self.groups.values())

    def add(self, bodies: Sequence[bytes]) -> None:
        """Count requests, each ``{"custom_id": …, "params": {…}}`` as it is uploaded."""
        if self._frame is not None and self._frame.covers(bodies):
            frame = self._frame
            for size, count in Counter(map(len, bodies)).items():
                self._count(count, size, frame.model, frame.inference_geo, frame.max_tokens, "", 0)
        else:
            for body in bodies:
                self._count(1, len(body), *self._facts(body))

    def _count(self, count: int, size: int, model: str, geo: str | None, max_tokens: int, cached: str, extra: int) -> None:
        """Count requests of one size that are alike."""
        kind = (model, geo, cached, _size_class(size + extra))
        group = self.groups.get(kind)
        if group is None:
            group = self.groups[kind] = _Group()
        group.requests += count
        group.bytes += count * size
        group.max_tokens += count * max_tokens
        group.prompt_bound += count * (size + extra)
        group.largest = max(group.largest, size + extra)

    def _facts(self, body: bytes) -> tuple[str, str | None, int, str, int]:
        """Model, ``inference_geo``, ``max_tokens``, dearest cache write, and prompt tokens that the bytes do not bound."""
        frame = self._frame
        if frame is not None and frame.covers((body,)):
            return frame.model, frame.inference_geo, frame.max_tokens, "", 0
        try:
            params = _REQUEST.decode(body).params
            if _MARKED not in body:
                # nothing but text has no block and no cache marker, and needs no further look
                self._frame = _Frame.of(body, params)
                return params.model, params.inference_geo, params.max_tokens, "", 0
            extra = _beyond_text(params)
        except (_Unbounded, msgspec.ValidationError, AttributeError, KeyError, TypeError) as e:
            request = _NAMED.decode(body)
            if not self.unbounded_requests:
                self.unbounded = f"{request.custom_id} {_why_unbounded(e)}"
            self.unbounded_requests += 1
            return request.params["model"], None, request.params["max_tokens"], "", 0
        cached = ("1h" if b'"ttl":"1h"' in body else "5m") if b'"cache_control":' in body else ""
        return params.model, params.inference_geo, params.max_tokens, cached, extra

    def include(self, other: Exposure) -> None:
        """Add another one's requests."""
        for kind, group in other.groups.items():
            mine = self.groups.setdefault(kind, _Group())
            mine.requests += group.requests
            mine.bytes += group.bytes
            mine.max_tokens += group.max_tokens
            mine.prompt_bound += group.prompt_bound
            mine.largest = max(mine.largest, group.largest)
        self.unbounded = self.unbounded or other.unbounded
        self.unbounded_requests += other.unbounded_requests


def _size_class(size: int) -> int:
    """Sizes of one class differ by an eighth at most, so that requests on both sides of a price tier are seldom priced together."""
    shift = max(size.bit_length() - 4, 0)
    return (shift << 4) | (size >> shift)


def _beyond_text(params: _Params) -> int:
    """Prompt tokens that the bytes do not bound.

    :raises _Unbounded: when nothing does
    """
    extra = 0
    tools = msgspec.json.decode(params.tools) or ()
    for tool in tools:
        if tool.get("type", "custom") != "custom":
            raise _Unbounded(f"the tool {tool['type']}")
    extra += PROMPT_ALLOWANCE if tools else 0
    extra += PROMPT_ALLOWANCE if params.output_config is not _EMPTY else 0
    extra += _of_blocks(msgspec.json.decode(params.system))
    for message in msgspec.json.decode(params.messages):
        extra += _of_blocks(message["content"])
    return extra


def _of_blocks(content: Any) -> int:
    if content is None or isinstance(content, str):
        return 0
    extra = 0
    for block in content:
        kind = block.get("type")
        if kind == "image":
            extra += IMAGE_TOKENS
        elif kind in ("tool_result", "search_result"):
            extra += PROMPT_ALLOWANCE + _of_blocks(block.get("content"))
        elif kind == "document" and block["source"].get("type") in ("text", "content"):
            extra += PROMPT_ALLOWANCE + _of_blocks(block["source"].get("content"))
        elif kind not in ("text", "tool_use"):
            source = block.get("source", {}).get("type")
            raise _Unbounded(f"a block of type {kind}" + (f" with a source of type {source}" if source else ""))
    return extra


def _why_unbounded(error: Exception) -> str:
    if isinstance(error, _Unbounded):
        return f"has {error}"
    if isinstance(error, msgspec.ValidationError):
        return f"is not understood: {error}"
    return "has blocks or tools of an unknown form"  # whether they are good is for the API to say


def params_of(body: bytes) -> dict[str, Any]:
    """The params of a request as it is uploaded."""
    return _NAMED.decode(body).params

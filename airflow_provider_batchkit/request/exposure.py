"""What requests may cost under any prices: sums over all requests, taken while they are written.

The tokens of a prompt are bounded by what was sent. The source for each part, DOCS being https://platform.claude.com/docs/en, checked
2026-11-23:

* A token is at least one byte of UTF-8 text, so a request has no more prompt tokens than its JSON has bytes: the tokens that the API puts
  around messages are fewer than the bytes of the JSON around them.
* Tools bring a prompt of their own, at most 530 tokens (DOCS/agents-and-tools/tool-use, pricing table); a JSON schema for the answer and
  citations bring one too, whose length is not published. ``PROMPT_ALLOWANCE`` is added for each.
* An image is scaled down to at most 4,784 tokens, whatever its source (DOCS/build-with-claude/vision).
* An answer, thinking included, has at most ``max_tokens``.
* A prompt with cache markers may be written to the cache as a whole.
* PDFs, files, server tools (web search and the like), MCP servers and parameters that are not known here have no bound: the API
  decides how much they read.
* Compaction, the advisor tool and a fallback model have no bound either: each is an inference that is billed beside the answer
  (``usage.iterations``), at its own model and with its own ``max_tokens``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

import msgspec

from airflow_provider_batchkit.request.block import PreparedRequest, RequestBlock, RequestForm

#: prompt tokens that the API adds for tools, for an answer's schema, or for citations
PROMPT_ALLOWANCE = 1_000
IMAGE_TOKENS = 5_000

#: parameters that make the API run more inferences than the one that answers
_FURTHER_INFERENCES = frozenset({"context_management", "compaction", "fallbacks"})

_T = TypeVar("_T")
_NO_OUTPUT = (0, "")
_EMPTY = msgspec.Raw(b"null")


class _Params(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """Params whose cost is known. A member that is not listed makes the request unbounded."""

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
    params: _Params


class _AnyRequest(msgspec.Struct, gc=False):
    params: dict[str, Any]


#: these bytes are in every content block and every cache marker; a quote inside a text is escaped
_MARKED = b'"type":'

_REQUEST = msgspec.json.Decoder(_Request)
_ANY_REQUEST = msgspec.json.Decoder(_AnyRequest)


class _Unbounded(Exception):
    """The API decides how many tokens something in the request takes."""


@dataclass(slots=True)
class _Group:
    """Requests of about the same size that are priced alike."""

    requests: int = 0
    bytes: int = 0
    max_tokens: int = 0
    #: the most prompt tokens: of all requests together, and of the largest one
    prompt_bound: int = 0
    largest: int = 0


class _Facts(msgspec.Struct, frozen=True, gc=False):
    """What a request costs depends on these facts and its size. All requests of one form have the same facts."""

    model: str
    inference_geo: str | None
    max_tokens: int
    #: the dearest cache write
    cached: str = ""
    #: prompt tokens that the bytes do not bound
    extra: int = 0
    #: the reason why nothing bounds the cost; empty where it is bounded
    unbounded: str = ""

    @classmethod
    def of(cls, body: bytes) -> _Facts:
        """The facts of a request, from the body that is uploaded."""
        try:
            params = _REQUEST.decode(body).params
            # a request of texts alone has no block and no cache marker, and needs no further look
            extra = _beyond_text(params) if _MARKED in body else 0
        except (_Unbounded, msgspec.ValidationError, AttributeError, KeyError, TypeError) as e:
            given = params_of(body)
            return cls(given["model"], None, given["max_tokens"], unbounded=_why_unbounded(e, given))
        cached = ("1h" if b'"ttl":"1h"' in body else "5m") if b'"cache_control":' in body else ""
        return cls(params.model, params.inference_geo, params.max_tokens, cached, extra)


#: model, ``inference_geo``, the dearest cache write (``""``, ``"5m"`` or ``"1h"``), class of size
_Kind = tuple[str, str | None, str, int]


@dataclass(slots=True)
class Exposure:
    """Sums over requests that tell what they may cost under any prices. Memory grows with models and magnitudes, not with requests."""

    groups: dict[_Kind, _Group] = field(default_factory=dict)
    #: the reason why the first request without a bound has none, and the number of such requests
    unbounded: str = ""
    unbounded_requests: int = 0
    #: model → the largest ``max_tokens`` of a request, and the key of a row that has it
    most_output: dict[str, tuple[int, str]] = field(default_factory=dict)
    #: form and facts of the last requests that had a form
    _form: tuple[RequestForm, _Facts] | None = None

    @property
    def requests(self) -> int:
        return sum(group.requests for group in self.groups.values())

    @property
    def body_bytes(self) -> int:
        return sum(group.bytes for group in self.groups.values())

    def add(self, requests: Sequence[PreparedRequest]) -> None:
        """Count requests. Those of one form are counted together: their differences can hold no block and no marker."""
        block = RequestBlock.of(requests)
        for form, where in _runs(block.forms):
            alike = block[where]
            if form is None:
                for facts, places in _runs(_Facts.of(request.body) for request in alike):
                    self._count(alike[places], facts)
            else:
                if self._form is None or self._form[0] is not form:
                    self._form = form, _Facts.of(alike[0].body)
                self._count(alike, self._form[1])

    def _count(self, block: RequestBlock, facts: _Facts) -> None:
        if facts.unbounded:
            if not self.unbounded_requests:
                self.unbounded = f"{block.custom_ids[0]} {facts.unbounded}"
            self.unbounded_requests += len(block)
        if facts.max_tokens > self.most_output.get(facts.model, _NO_OUTPUT)[0]:
            self.most_output[facts.model] = facts.max_tokens, block.keys[0]
        sizes = sorted(block.sizes)
        start = 0
        while start < len(sizes):
            size_class, next_class = _size_class(sizes[start] + facts.extra)
            stop = bisect_left(sizes, next_class - facts.extra, start)
            count, size = stop - start, sum(sizes[start:stop])
            kind = (facts.model, facts.inference_geo, facts.cached, size_class)
            group = self.groups.get(kind)
            if group is None:
                group = self.groups[kind] = _Group()
            group.requests += count
            group.bytes += size
            group.max_tokens += count * facts.max_tokens
            group.prompt_bound += size + count * facts.extra
            group.largest = max(group.largest, sizes[stop - 1] + facts.extra)
            start = stop

    def include(self, other: Exposure) -> None:
        """Add the requests of another exposure."""
        for kind, group in other.groups.items():
            mine = self.groups.setdefault(kind, _Group())
            mine.requests += group.requests
            mine.bytes += group.bytes
            mine.max_tokens += group.max_tokens
            mine.prompt_bound += group.prompt_bound
            mine.largest = max(mine.largest, group.largest)
        for model, most in other.most_output.items():
            self.most_output[model] = max(self.most_output.get(model, _NO_OUTPUT), most, key=itemgetter(0))
        self.unbounded = self.unbounded or other.unbounded
        self.unbounded_requests += other.unbounded_requests


def _runs(values: Iterable[_T]) -> Iterator[tuple[_T, slice]]:
    """Runs of equal values, each with its slice."""
    start = 0
    for value, alike in groupby(values):
        stop = start + len(list(alike))
        yield value, slice(start, stop)
        start = stop


def _size_class(size: int) -> tuple[int, int]:
    """The class of a size, and the first size of the next class.

    Sizes of one class differ by an eighth at most, so that requests on both sides of a price tier are seldom priced together.
    """
    shift = max(size.bit_length() - 4, 0)
    step = size >> shift
    return (shift << 4) | step, (step + 1) << shift


def _beyond_text(params: _Params) -> int:
    """Prompt tokens that the bytes do not bound.

    :raises _Unbounded: nothing bounds them
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


def _why_unbounded(error: Exception, params: Mapping[str, Any]) -> str:
    if isinstance(error, _Unbounded):
        return f"has {error}"
    unknown = next((name for name in params if name not in _Params.__struct_fields__), None)
    if unknown in _FURTHER_INFERENCES:
        return f"has {unknown}, which may add inferences that are billed beside the answer"
    if unknown is not None:
        return f"has the parameter {unknown}, whose cost is not known here"
    if isinstance(error, msgspec.ValidationError):
        return f"is not understood: {error}"
    return "has blocks or tools of an unknown form"  # the API decides whether they are valid


def params_of(body: bytes) -> dict[str, Any]:
    """The params of a request, from the body that is uploaded."""
    return _ANY_REQUEST.decode(body).params

"""What spooled requests will cost, before any is sent: a figure to expect, and one that the bill cannot exceed.

The bound looks at every request. Its source for each part, DOCS being https://platform.claude.com/docs/en, checked 2026-11-23:

* A token is at least one byte of UTF-8 text, so a request has no more prompt tokens than its JSON has bytes: the tokens that the API puts
  around messages are fewer than the bytes of the JSON around them.
* Tools bring a prompt of their own, at most 530 tokens (DOCS/agents-and-tools/tool-use, pricing table); a JSON schema for the answer and
  citations bring one too, whose length is not published. ``PROMPT_ALLOWANCE`` is added for each.
* An image is scaled down to at most 4,784 tokens, whatever its source (DOCS/build-with-claude/vision).
* An answer, thinking included, has at most ``max_tokens``.
* A prompt with cache markers may be written to the cache, whole; one without ``inference_geo`` may be US-only by its workspace's default.
* PDFs, files, server tools (web search and the like), MCP servers and parameters that are not known here have no bound: the API
  decides how much they read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from typing import Any

import msgspec

from airflow_provider_batchkit.model import COST_QUANTUM, PICO_PER_USD, Bound, Shard, format_usd_exact, usd_text
from airflow_provider_batchkit.pricing import ModelRates, PriceBook, PriceTier
from airflow_provider_batchkit.shards import read_bodies

log = logging.getLogger(__name__)

#: requests of a job whose tokens the API counts
SAMPLES = 10
#: tokens of the prompt that the API adds for tools, for an answer's schema, or for citations
PROMPT_ALLOWANCE = 1_000
IMAGE_TOKENS = 5_000
#: prompt tokens of a text when nobody counted: one for this many bytes
BYTES_PER_TOKEN = 4

_EXACT = Context(prec=60)
_EMPTY = msgspec.Raw(b"null")
#: what the token count takes of a request's params
_COUNTED = ("model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "cache_control")


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

    def covers(self, body: bytes) -> bool:
        """Whether a request has the same frame, and text alone in it: a quote inside a text is escaped, and a block names its type."""
        return body.startswith(self.head, body.find(_PARAMS)) and body.endswith(self.tail) and _MARKED not in body


#: model, ``inference_geo``, the dearest cache write (``""``, ``"5m"`` or ``"1h"``), class of size
_Kind = tuple[str, str | None, str, int]


@dataclass(slots=True)
class Exposure:
    """Sums over requests that tell what they may cost under any prices. Memory grows with models and magnitudes, not with requests."""

    groups: dict[_Kind, _Group] = field(default_factory=dict)
    #: why no bound exists, of the first request that has none, and how many have none
    unbounded: str = ""
    unbounded_requests: int = 0
    #: bodies of requests whose tokens are worth counting
    samples: list[bytes] = field(default_factory=list)
    _frame: _Frame | None = None

    @property
    def requests(self) -> int:
        return sum(group.requests for group in self.groups.values())

    @property
    def body_bytes(self) -> int:
        return sum(group.bytes for group in self.groups.values())

    def add(self, body: bytes) -> None:
        """Count one request, ``{"custom_id": …, "params": {…}}`` as it is uploaded."""
        frame = self._frame
        if frame is not None and frame.covers(body):
            model, geo, max_tokens, cached, extra = frame.model, frame.inference_geo, frame.max_tokens, "", 0
        else:
            model, geo, max_tokens, cached, extra = self._facts(body)
        size = len(body)
        kind = (model, geo, cached, _size_class(size + extra))
        group = self.groups.get(kind)
        if group is None:
            group = self.groups[kind] = _Group()
        group.requests += 1
        group.bytes += size
        group.max_tokens += max_tokens
        group.prompt_bound += size + extra
        group.largest = max(group.largest, size + extra)

    def _facts(self, body: bytes) -> tuple[str, str | None, int, str, int]:
        """Model, ``inference_geo``, ``max_tokens``, dearest cache write, and prompt tokens that the bytes do not bound."""
        try:
            params = _REQUEST.decode(body).params
            if _MARKED not in body:
                # nothing but text has no block and no cache marker, and needs no further look
                self._frame = _Frame.of(body, params)
                return params.model, params.inference_geo, params.max_tokens, "", 0
            extra = _beyond_text(params)
        except (_Unbounded, msgspec.ValidationError) as e:
            request = _NAMED.decode(body)
            if not self.unbounded_requests:
                self.unbounded = f"{request.custom_id} has {e}" if isinstance(e, _Unbounded) else f"{request.custom_id}: {e}"
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
        self.samples.extend(other.samples)


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


def scan(bodies: Iterable[bytes], *, samples: Iterable[int] = ()) -> Exposure:
    """The exposure of requests as they are uploaded. ``samples`` are positions of requests to keep for counting."""
    exposure = Exposure()
    wanted = set(samples)
    for position, body in enumerate(bodies):
        exposure.add(body)
        if position in wanted:
            exposure.samples.append(body)
    return exposure


def sample_positions(requests: int) -> list[int]:
    """Positions of ``SAMPLES`` requests, spread evenly over that many."""
    samples = min(SAMPLES, requests)
    return [(2 * i + 1) * requests // (2 * samples) for i in range(samples)]


def bound_of(exposure: Exposure, book: PriceBook, at: datetime) -> Bound:
    """The most that ``exposure`` can cost at the prices of ``at``. Never below the bill; bounds of parts never sum to more."""
    if exposure.unbounded:
        return Bound(None, None, f"{exposure.unbounded}, which nothing bounds ({exposure.unbounded_requests:,} such requests)")
    tokens = sum(group.prompt_bound + group.max_tokens for group in exposure.groups.values())
    pico = 0
    for (model, geo, cached, _), group in exposure.groups.items():
        rates = book.rates(model, at)
        if rates is None:
            return Bound(None, tokens, f"no price is known for {model}")
        factor = Decimal(1) if geo == "global" else rates.us_multiplier
        # one more each: a bill rounds every request to the quantum
        pico += group.requests + max(
            group.prompt_bound * prompt + group.max_tokens * answer
            for prompt, answer in (_dearest_pico(tier, cached, factor) for tier in rates.tiers if tier.min_prompt_tokens <= group.largest)
        )
    return Bound(pico * COST_QUANTUM, tokens)


def _dearest_pico(tier: PriceTier, cached: str, factor: Decimal) -> tuple[int, int]:
    """Whole picodollars a token of prompt and of answer, rounded up, so that sums of any parts agree."""
    rates = tier.batch
    prompt = max(rates.input, rates.cache_write_5m, rates.cache_read) if cached else rates.input
    if cached == "1h":
        prompt = max(prompt, rates.cache_write_1h)
    return math.ceil(prompt * factor * PICO_PER_USD), math.ceil(rates.output * factor * PICO_PER_USD)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What requests will cost as a batch: expected, and at most. USD; ``None`` where it is not known, and ``why_unbounded`` says why."""

    requests: int
    bytes: int
    input_tokens: int
    output_tokens: int
    expected_usd: Decimal | None
    upper_usd: Decimal | None
    upper_tokens: int | None
    #: where the two token figures come from
    input_source: str
    output_source: str
    why_unbounded: str = ""

    def __str__(self) -> str:
        upper = f"at most {usd_text(self.upper_usd)}" if self.upper_usd is not None else f"without an upper bound: {self.why_unbounded}"
        return (
            f"{self.requests:,} requests: expected {usd_text(self.expected_usd)}, {upper} "
            f"(input {self.input_tokens:,} tokens, {self.input_source}; output {self.output_tokens:,} tokens, {self.output_source})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, money as decimal strings."""
        return {
            "requests": self.requests,
            "bytes": self.bytes,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "expected_usd": format_usd_exact(self.expected_usd),
            "upper_usd": format_usd_exact(self.upper_usd),
            "upper_tokens": self.upper_tokens,
            "input_source": self.input_source,
            "output_source": self.output_source,
            "why_unbounded": self.why_unbounded,
        }


#: counts the prompt tokens of a message's params, as the API does
CountTokens = Callable[[Mapping[str, Any]], int]


def estimate_shards(
    shards: Sequence[Shard], book: PriceBook, at: datetime, *, count_tokens: CountTokens, output_per_request: Decimal | None = None
) -> tuple[Estimate, list[Bound]]:
    """The estimate of shards on disk, all together, and the bound of each. See :func:`estimate`."""
    positions = sample_positions(sum(shard.requests for shard in shards))
    total, bounds, first = Exposure(), [], 0
    for shard in shards:
        exposure = scan(read_bodies(shard), samples=[p - first for p in positions if first <= p < first + shard.requests])
        bounds.append(bound_of(exposure, book, at))
        total.include(exposure)
        first += shard.requests
    return estimate(total, book, at, count_tokens=count_tokens, output_per_request=output_per_request), bounds


def estimate(
    exposure: Exposure, book: PriceBook, at: datetime, *, count_tokens: CountTokens, output_per_request: Decimal | None = None
) -> Estimate:
    """Price an exposure at the prices of ``at``.

    :param count_tokens: counts the prompt tokens of a request's params, as the API does; when it fails, a quarter of the bytes is taken
    :param output_per_request: what earlier requests of this kind answered, in tokens; else ``max_tokens`` is expected
    """
    counts, input_source = _count(exposure.samples, count_tokens)
    inputs = outputs = 0
    usd: Decimal | None = Decimal(0)
    with localcontext(_EXACT):
        for (model, geo, _, _), group in exposure.groups.items():
            tokens, size = counts.get(model) or counts[""]
            prompt = min(-(-group.bytes * tokens // size), group.prompt_bound)
            answer = group.max_tokens
            if output_per_request is not None:
                answer = min(int((group.requests * output_per_request).to_integral_value(ROUND_HALF_EVEN)), answer)
            inputs, outputs = inputs + prompt, outputs + answer
            rates = book.rates(model, at)
            usd = None if usd is None or rates is None else usd + _expected_usd(rates, prompt, answer, group.requests, geo)
    most = bound_of(exposure, book, at)
    return Estimate(
        exposure.requests,
        exposure.body_bytes,
        inputs,
        outputs,
        None if usd is None else usd.quantize(COST_QUANTUM, context=_EXACT),
        most.usd,
        most.tokens,
        input_source,
        "max_tokens of every request"
        if output_per_request is None
        else f"{output_per_request:,.0f} a request as in this task's earlier runs",
        most.why,
    )


def _expected_usd(rates: ModelRates, prompt: int, answer: int, requests: int, geo: str | None) -> Decimal:
    tier = [tier for tier in rates.tiers if tier.min_prompt_tokens * requests <= prompt][-1]
    usd = prompt * tier.batch.input + answer * tier.batch.output
    return usd * rates.us_multiplier if geo == "us" else usd


def _count(samples: list[bytes], count_tokens: CountTokens) -> tuple[dict[str, tuple[int, int]], str]:
    """Per model, and under ``""`` for all: tokens of how many bytes; and what to say of it."""
    counts: dict[str, tuple[int, int]] = {}
    try:
        for model, tokens, size in _counted(samples, count_tokens):
            for name in (model, ""):
                known_tokens, known_size = counts.get(name, (0, 0))
                counts[name] = (known_tokens + tokens, known_size + size)
    except Exception as e:  # noqa: BLE001 - an estimate is worth a warning, never a failed task
        log.warning(
            "The tokens of a sample could not be counted (%s: %s); taking a token for %d bytes.", type(e).__name__, e, BYTES_PER_TOKEN
        )
        return {"": (1, BYTES_PER_TOKEN)}, f"a token for {BYTES_PER_TOKEN} bytes"
    return counts or {"": (1, BYTES_PER_TOKEN)}, f"counted on {len(samples)} of them"


def _counted(samples: list[bytes], count_tokens: CountTokens) -> Iterator[tuple[str, int, int]]:
    for body in samples:
        params = _NAMED.decode(body).params
        yield params["model"], count_tokens({name: params[name] for name in _COUNTED if name in params}), len(body)

"""From a checked request to the little that is kept of it, and from that to its result line.

A record is about 0.4 KB whatever the prompt's size: the prompt itself is dropped, its digest and first 60 characters stay.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from . import outcomes, tokens
from . import schema as json_schema
from .errors import error_body
from .outcomes import Outcome
from .settings import SimulatorSettings
from .validate import BetaParams, Params, SystemBlock, Turn


class Record(msgspec.Struct, gc=False):
    """One request of a batch. Token counts are what it is billed if it succeeds."""

    custom_id: str
    model: str = ""
    digest: str = ""
    excerpt: str = ""
    max_tokens: int = 0
    marker: str = ""
    outcome: int = Outcome.SUCCEEDED
    input_tokens: int = 0
    output_tokens: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    cache_read: int = 0
    searches: int = 0
    inference_geo: str = "global"
    #: JSON Schema of the answer, shared by all records that ask for the same one
    schema: bytes = b""
    #: what the request's cached prefix is known by; empty without a marker
    prefix: str = ""
    #: message of the error when bad params were to show in the results
    bad_params: str = ""


class Intake:
    """Makes the records of one call. ``seen`` and ``cached`` are questions to the store; ``struck`` is what it should learn."""

    def __init__(self, settings: SimulatorSettings, seen: Callable[[str], bool], cached: Callable[[str], bool]) -> None:
        self._settings = settings
        self._seen = seen
        self._cached = cached
        self._shared: dict[bytes, bytes] = {}
        #: prefixes that this call's requests name: warm already, and by how many of them
        self._warm: dict[str, bool] = {}
        self._uses: dict[str, int] = {}
        #: digests of prompts that a once-only outcome has struck in this call
        self.struck: set[str] = set()

    def record(self, custom_id: str, params: Params) -> Record:
        """Raises ApiError (400) for an unknown marker in the prompt."""
        settings = self._settings
        prompt = prompt_of(params.messages)
        size = system_bytes(params.system)
        for turn in params.messages:
            size += text_bytes(turn.content)
        record = Record(custom_id, params.model, tokens.digest_of(prompt), prompt[: tokens.EXCERPT_CHARS], params.max_tokens)
        record.marker = self._marker(custom_id, prompt, record.digest)
        if record.marker:
            record.outcome = outcomes.MARKERS[record.marker][0]
        record.inference_geo = params.inference_geo or "global"
        fmt = params.output_config.format if params.output_config else None
        if fmt is None and isinstance(params, BetaParams):
            fmt = params.output_format
        if fmt is not None:
            schema = bytes(fmt.schema)
            json_schema.check(schema)
            record.schema = self._shared.setdefault(schema, schema)
        if params.tools and any(str(tool.get("type", "")).startswith("web_search_") for tool in params.tools):
            record.searches = settings.web_searches
        total = tokens.tokens_of_bytes(size) + tokens.OVERHEAD_TOKENS if settings.input_tokens is None else settings.input_tokens
        record.input_tokens = total
        if not isinstance(params.system, str):
            self._cache(record, params.system)
        self._count_output(record)
        return record

    def _marker(self, custom_id: str, prompt: str, digest: str) -> str:
        marker = outcomes.marker_in(prompt) if "[[sim:" in prompt else None
        name, once = marker or (outcomes.by_rate(self._settings, custom_id), self._settings.once)
        if not (name and once):
            return name
        if digest in self.struck or self._seen(digest):
            return ""
        self.struck.add(digest)
        return name

    def _cache(self, record: Record, system: list[SystemBlock]) -> None:
        marked = [number for number, block in enumerate(system) if block.cache_control is not None]
        if not marked:
            return
        blocks = system[: marked[-1] + 1]
        control = blocks[-1].cache_control
        ttl = control.ttl if control is not None else "5m"
        size = min(record.input_tokens, tokens.tokens_of_bytes(sum(text_bytes(block.text) for block in blocks)))
        minimum = self._settings.cache_min_tokens
        if size < (tokens.cache_minimum(record.model) if minimum is None else minimum):
            return
        text = "\0".join(block.text for block in blocks)
        record.prefix = prefix = f"{ttl}/{record.model}/{tokens.digest_of(text)}"
        record.input_tokens -= size
        before = self._uses.get(prefix, 0)
        self._uses[prefix] = before + 1
        if prefix not in self._warm:
            self._warm[prefix] = self._cached(prefix)
        if self._warm[prefix] or before >= (self._settings.cache_concurrency or sys.maxsize):
            record.cache_read = size
        elif ttl == "1h":
            record.cache_write_1h = size
        else:
            record.cache_write_5m = size

    def _count_output(self, record: Record) -> None:
        fixed = self._settings.output_tokens
        if fixed is not None and fixed > record.max_tokens and not record.marker:
            record.marker = "max_tokens"
        if record.marker == "max_tokens":
            record.output_tokens = record.max_tokens
        elif fixed is not None:
            record.output_tokens = min(fixed, record.max_tokens)
        else:
            record.output_tokens = max(1, tokens.tokens_of_bytes(text_bytes(answer(record)[0])))


def text_bytes(content: object) -> int:
    """UTF-8 bytes of all text in a message's content, tool results included."""
    if isinstance(content, str):
        return len(content) if content.isascii() else len(content.encode())
    if isinstance(content, list):
        return sum(text_bytes(block.get("text")) + text_bytes(block.get("content")) for block in content if isinstance(block, dict))
    return 0


def system_bytes(system: str | list[SystemBlock]) -> int:
    """UTF-8 bytes of a system prompt."""
    return text_bytes(system) if isinstance(system, str) else sum(text_bytes(block.text) for block in system)


def prompt_of(turns: list[Turn]) -> str:
    """Text of the last user message; its text blocks are joined as they are."""
    content = next(turn.content for turn in turns[::-1] if turn.role == "user")
    if isinstance(content, str):
        return content
    return "".join(block["text"] for block in content if block.get("type") == "text")


def answer(record: Record) -> tuple[str, str]:
    """Text and stop reason of a request that succeeds."""
    if record.marker == "refusal":
        return "", "refusal"
    if record.schema and record.marker != "invalid-output":
        text = json_schema.answer_in_schema(json_schema.decoded(record.schema), record.digest)
    else:
        text = tokens.answer_from(record.digest, record.excerpt)
    if record.marker == "max_tokens":
        return tokens.cut(text[: len(text) // 2], record.max_tokens), "max_tokens"
    if len(text) > record.max_tokens and tokens.tokens_of_bytes(text_bytes(text)) > record.max_tokens:
        return tokens.cut(text, record.max_tokens), "max_tokens"
    return text, "end_turn"


def message(record: Record, salt: str, service_tier: str) -> dict[str, Any]:
    """The message of a request that succeeds. Its id depends on ``salt`` and custom_id only, so reading again gives the same."""
    text, stop = answer(record)
    return {
        "id": "msg_" + hashlib.blake2b(f"{salt}/{record.custom_id}".encode(), digest_size=12).hexdigest(),
        "type": "message",
        "role": "assistant",
        "model": record.model,
        "content": [{"type": "text", "text": text}] if text else [],
        "stop_reason": stop,
        "stop_sequence": None,
        "stop_details": {"type": "refusal", "category": None, "explanation": None} if stop == "refusal" else None,
        "usage": {
            "input_tokens": record.input_tokens,
            "cache_creation_input_tokens": record.cache_write_5m + record.cache_write_1h,
            "cache_read_input_tokens": record.cache_read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": record.cache_write_5m,
                "ephemeral_1h_input_tokens": record.cache_write_1h,
            },
            "output_tokens": record.output_tokens,
            "server_tool_use": {"web_search_requests": record.searches, "web_fetch_requests": 0} if record.searches else None,
            "service_tier": service_tier,
            "inference_geo": record.inference_geo,
        },
    }


def error_of(record: Record) -> tuple[str, str]:
    """Type and message of an errored request's error."""
    if record.bad_params:
        return "invalid_request_error", record.bad_params
    return outcomes.MARKERS[record.marker or "errored"][1:]


def result_line(record: Record, batch_id: str) -> bytes:
    """One line of a batch's results, with its newline."""
    result: dict[str, Any]
    if record.outcome == Outcome.SUCCEEDED:
        result = {"type": "succeeded", "message": message(record, batch_id, "batch")}
    elif record.outcome == Outcome.ERRORED:
        digest = hashlib.blake2b(f"{batch_id}/{record.custom_id}/error".encode(), digest_size=12).hexdigest()
        result = {"type": "errored", "error": error_body(*error_of(record), "req_" + digest)}
    else:
        result = {"type": Outcome(record.outcome).name.lower()}
    return msgspec.json.encode({"custom_id": record.custom_id, "result": result}) + b"\n"


def result_lines(records: list[Record], batch_id: str, seed: int) -> Iterator[bytes]:
    """All result lines in another order than asked: the same for the same seed, and different from the requests' from two on."""
    for position in order(len(records), seed):
        yield result_line(records[position], batch_id)


def order(size: int, seed: int) -> Iterator[int]:
    """The positions 0 to size-1, each once, mixed by an affine step without any memory."""
    step = max(2, int(size * 0.618))
    while _common_divisor(step, size) != 1:
        step += 1
    start = 1 + seed
    if step % size == 1 and start % size == 0:  # two requests: their one other order
        start = 1
    return ((start + step * number) % size for number in range(size))


def _common_divisor(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a

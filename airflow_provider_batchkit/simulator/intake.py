"""Makes the record that is kept of a request from its checked params."""

from __future__ import annotations

import sys
from collections.abc import Callable

import msgspec

from . import answers, outcomes, tokens
from . import schema as json_schema
from .errors import ApiError
from .models import catalogue, dated, knows_geography
from .outcomes import SlipError
from .records import Record
from .settings import SimulatorSettings
from .validate import BetaParams, Params, SystemBlock, Turn, message_params


class Intake:
    """Makes the records of one call. ``seen`` and ``cached`` query the store, which reads ``struck`` after the call."""

    def __init__(self, settings: SimulatorSettings, seen: Callable[[str], bool], cached: Callable[[str], bool]) -> None:
        self._settings = settings
        self._models = catalogue(settings.models)
        self._shares = [(name, rate) for name, rate in settings.shares.items() if rate]
        self._seen = seen
        self._cached = cached
        self._shared: dict[bytes, bytes] = {}
        #: prefix → whether it is warm already; ``_uses`` counts the requests of this call that have it
        self._warm: dict[str, bool] = {}
        self._uses: dict[str, int] = {}
        #: digests of prompts that a once-only outcome has struck in this call
        self.struck: set[str] = set()

    def record(self, custom_id: str, raw: msgspec.Raw, *, beta: bool) -> Record:
        """The record of a request. Raises ApiError for bad params, and SlipError for an unknown marker in the prompt."""
        params = message_params(raw, self._models, beta=beta)
        prompt = prompt_of(params.messages)
        size = system_bytes(params.system)
        for turn in params.messages:
            size += text_bytes(turn.content)
        record = Record(custom_id, dated(params.model), tokens.digest_of(prompt), prompt[: tokens.EXCERPT_CHARS], params.max_tokens)
        record.marker = self._marker(custom_id, prompt, record.digest)
        if record.marker:
            record.outcome = outcomes.MARKERS[record.marker].outcome
        if record.marker == "fallback":
            record.declined, record.model = params.model, answers.FALLBACK
        record.inference_geo = (params.inference_geo or "global") if knows_geography(record.model) else "not_available"
        record.thinks = params.thinking is not None and params.thinking.get("type") in ("enabled", "adaptive")
        self._ask_for_a_form(record, params)
        if record.marker == "search":
            record.searches = max(1, self._settings.web_searches)
        elif (
            params.tools and record.marker != "search-error" and any(str(t.get("type", "")).startswith("web_search_") for t in params.tools)
        ):
            record.searches = self._settings.web_searches
        total = tokens.tokens_of_bytes(size) + tokens.OVERHEAD_TOKENS
        record.input_tokens = total if self._settings.input_tokens is None else self._settings.input_tokens
        if not isinstance(params.system, str):
            self._cache(record, params.system)
        record.filled_to = min(self._settings.answer_tokens, record.max_tokens)
        self._count_output(record)
        return record

    def _marker(self, custom_id: str, prompt: str, digest: str) -> str:
        marker = outcomes.marker_in(prompt) if "[[sim:" in prompt else None
        name, once = marker or (self._drawn(custom_id), self._settings.once)
        if not (name and once):
            return name
        if digest in self.struck or self._seen(digest):
            return ""
        self.struck.add(digest)
        return name

    def _drawn(self, custom_id: str) -> str:
        """The marker that the rates pick for a request; ``""`` for none."""
        if not self._shares:
            return ""
        drawn = outcomes.chance(self._settings.seed, "outcome", custom_id)
        for name, rate in self._shares:
            if drawn < rate:
                return name
            drawn -= rate
        return ""

    def _ask_for_a_form(self, record: Record, params: Params) -> None:
        """Sets the schema of the answer, or the tool that the answer must call and the schema of the tool's input."""
        fmt = params.output_config.format if params.output_config else None
        if fmt is None and isinstance(params, BetaParams):
            fmt = params.output_format
        if fmt is not None:
            schema = bytes(fmt.schema)
            json_schema.check(schema)
            record.schema = self._shared.setdefault(schema, schema)
        forced = params.tool_choice or {}
        if not (forced.get("type") in ("tool", "any") or record.marker in ("tool", "tool-twice")):
            return
        tools = {tool["name"]: tool["input_schema"] for tool in params.tools if "input_schema" in tool and "name" in tool}
        if forced.get("type") == "tool":
            name = str(forced.get("name"))
            if name not in {str(tool.get("name")) for tool in params.tools}:
                raise ApiError(400, f"tool_choice: Tool '{name}' not found in provided tools")
        else:
            name = next(iter(tools), "")
        if name in tools:
            schema = json_schema.encoded(tools[name])
            problem = json_schema.misfit_of(schema)
            if problem:
                raise ApiError(400, f"tools.{list(tools).index(name)}.input_schema: {problem}")
            record.tool, record.schema = sys.intern(name), self._shared.setdefault(schema, schema)
        elif record.marker in ("tool", "tool-twice"):
            raise SlipError(400, f"messages: the marker {record.marker} needs a tool with an input_schema, and {record.custom_id} has none")

    def _cache(self, record: Record, system: list[SystemBlock]) -> None:
        minimum = self._settings.cache_min_tokens
        if minimum is None:
            minimum = tokens.cache_minimum(record.model)
        prefixes = []
        read, text, text_size = 0, "", 0
        written = {"5m": 0, "1h": 0}
        for number, block in enumerate(system):
            text = f"{text}\0{block.text}" if number else block.text
            text_size += text_bytes(block.text)
            size = min(record.input_tokens, tokens.tokens_of_bytes(text_size))
            if block.cache_control is None or size < minimum:
                continue
            ttl = block.cache_control.ttl
            prefixes.append(prefix := f"{ttl}/{record.model}/{tokens.digest_of(text)}")
            if self._finds(prefix):
                # the prefix contains everything before it, so reading it covers the shorter ones
                read, written = size, {"5m": 0, "1h": 0}
            else:
                written[ttl] = size - read - written["1h" if ttl == "5m" else "5m"]
        record.prefixes = tuple(prefixes)
        record.cache_read, record.cache_write_5m, record.cache_write_1h = read, written["5m"], written["1h"]
        record.input_tokens -= read + written["5m"] + written["1h"]

    def _finds(self, prefix: str) -> bool:
        """Whether the next request of this call finds a prefix in the cache."""
        before = self._uses.get(prefix, 0)
        self._uses[prefix] = before + 1
        if prefix not in self._warm:
            self._warm[prefix] = self._cached(prefix)
        return self._warm[prefix] or before >= (self._settings.cache_concurrency or sys.maxsize)

    def _count_output(self, record: Record) -> None:
        fixed = self._settings.output_tokens
        if fixed is not None and fixed > record.max_tokens and not record.marker:
            record.marker = "max_tokens"
        answer = answers.answer(record)
        if answer.stop_reason == "max_tokens":
            record.output_tokens = record.max_tokens
        elif fixed is not None:
            record.output_tokens = min(fixed, record.max_tokens)
        else:
            record.output_tokens = min(max(1, answer.output_tokens), record.max_tokens)


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

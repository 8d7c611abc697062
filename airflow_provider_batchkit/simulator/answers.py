"""The message of a request that succeeds: content blocks, stop reason, usage. Its shape follows recordings or the SDK's types."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import schema as json_schema
from . import tokens
from .outcomes import CATEGORIES
from .records import Record

Block = dict[str, Any]

#: The model of the advisor and of the fallback. ITERATIONS holds the inferences that the top level of ``usage`` leaves out: model (empty
#: for the request's own), input tokens and output tokens.
ADVISOR = FALLBACK = "claude-opus-5-5"
ITERATIONS = {"compaction": ("", 180_000, 3_500), "advisor": (ADVISOR, 1_200, 300)}
_HALVED = {"max_tokens": "max_tokens", "context-window": "model_context_window_exceeded", "pause-turn": "pause_turn"}
_PLAIN = frozenset(("", "max_tokens", "context-window", "invalid-output"))


class Answer(NamedTuple):
    """The answer to a request."""

    content: list[Block]
    stop_reason: str
    #: tokens of the answer with its thinking, at most ``max_tokens``
    output_tokens: int
    thinking_tokens: int = 0


def answer(record: Record, ident: str = "") -> Answer:
    """The answer to a request that succeeds; ids inside it end with ``ident``."""
    thinking = _thinking_tokens(record)
    room = record.max_tokens - thinking
    if thinking and room <= 0:
        return Answer([_thinking_block(record)], "max_tokens", record.max_tokens, record.max_tokens)
    if record.tool and not record.marker.startswith("refusal"):
        content, stop, size = _tool_calls(record, ident, room)
    else:
        text, stop = _text(record, room)
        size = len(text) if text.isascii() else len(text.encode())
        plain = record.marker in _PLAIN and not record.searches
        content = ([{"type": "text", "text": text}] if text else []) if plain else list(_blocks(record, text, ident))
    if thinking:
        content.insert(0, _thinking_block(record))
    return Answer(content, stop, thinking + tokens.tokens_of_bytes(size), thinking)


def _thinking_tokens(record: Record) -> int:
    if record.marker == "thinking-only":
        return record.max_tokens
    return min(record.max_tokens, tokens.tokens_of_bytes(len(_thought(record)))) if record.thinks or record.marker == "thinking" else 0


def _thought(record: Record) -> str:
    return f"The user asks for {record.digest}."


def _thinking_block(record: Record) -> Block:
    return {"type": "thinking", "thinking": _thought(record), "signature": f"signature-{record.digest}"}


def _text(record: Record, room: int) -> tuple[str, str]:
    """The answer's text, of at most ``room`` tokens, and its stop reason."""
    if record.marker.startswith("refusal") and record.marker != "refusal-partial":
        return "", "refusal"
    if record.schema and record.marker != "invalid-output":
        text = json_schema.answer_in_schema(json_schema.decoded(record.schema), record.digest)
    else:
        text = tokens.filled(tokens.answer_from(record.digest, record.excerpt), min(record.filled_to, room))
    if record.marker == "refusal-partial":
        return tokens.cut(text[: len(text) // 2], room), "refusal"
    if record.marker in _HALVED:
        return tokens.cut(text[: len(text) // 2], room), _HALVED[record.marker]
    if len(text) > room and tokens.tokens_of_bytes(len(text.encode())) > room:
        return tokens.cut(text, room), "max_tokens"
    return text, "end_turn"


def _tool_calls(record: Record, ident: str, room: int) -> tuple[list[Block], str, int]:
    """Calls of the record's tool, stop reason, and bytes of the input. A call that does not fit has no input."""
    text = json_schema.answer_in_schema(json_schema.decoded(record.schema), record.digest)
    count = 2 if record.marker == "tool-twice" else 1
    fits = record.marker != "max_tokens" and tokens.tokens_of_bytes(len(text.encode()) * count) <= room
    given = json_schema.decoded(text.encode()) if fits else {}
    calls = [{"type": "tool_use", "id": f"toolu_{number}{ident}", "name": record.tool, "input": given} for number in range(count)]
    return calls, "tool_use" if fits else "max_tokens", len(text.encode()) * count


def _blocks(record: Record, text: str, ident: str) -> Iterator[Block]:
    """The content blocks of an answer with text."""
    match record.marker:
        case "pause-turn":
            yield {"type": "text", "text": text}
            yield _server_call("web_search", {"query": record.excerpt}, ident)
            return
        case "compaction":
            yield {"type": "compaction", "content": f"Summary of what came before {record.digest}."}
        case "advisor":
            yield _server_call("advisor", {}, ident)
            yield {
                "type": "advisor_tool_result",
                "tool_use_id": f"srvtoolu_{ident}",
                "content": {"type": "advisor_result", "text": "Go on."},
            }
        case "fallback":
            trigger = {"type": "refusal", "category": "cyber"}
            yield {"type": "fallback", "from": {"model": record.declined}, "to": {"model": record.model}, "trigger": trigger}
    yield from _searches(record, ident)
    cited: Block | None = None
    if record.marker == "citations":
        cited = {"type": "char_location", "document_index": 0, "document_title": None, "start_char_index": 0, "end_char_index": 6}
        cited |= {"cited_text": "Answer", "file_id": None}
    elif record.searches:
        cited = {"type": "web_search_result_location", "url": _page(record), "title": "A page", "encrypted_index": f"index-{record.digest}"}
        cited |= {"cited_text": "A page says so."}
    first = text[: len(text) // 2] if cited else text
    if first:
        yield {"type": "text", "text": first}
    if cited and text:
        yield {"type": "text", "text": text[len(first) :], "citations": [cited]}


def _searches(record: Record, ident: str) -> Iterator[Block]:
    """The blocks of the web searches before an answer, each with its result."""
    found: object = [
        {
            "type": "web_search_result",
            "url": _page(record),
            "title": "A page",
            "encrypted_content": f"content-{record.digest}",
            "page_age": None,
        }
    ]
    if record.marker == "search-error":
        found = {"type": "web_search_tool_result_error", "error_code": "unavailable"}
    for number in range(1 if record.marker == "search-error" else record.searches):
        call = _server_call("web_search", {"query": record.excerpt}, f"{number}{ident}")
        yield call
        yield {"type": "web_search_tool_result", "tool_use_id": call["id"], "content": found}


def _page(record: Record) -> str:
    return f"https://example.com/{record.digest}"


def _server_call(name: str, given: Block, ident: str) -> Block:
    return {"type": "server_tool_use", "id": f"srvtoolu_{ident}", "name": name, "input": given}


def message(record: Record, batch_id: str) -> Block:
    """The message of a request that succeeds. Its id depends on batch and custom_id only, so reading again gives the same."""
    ident = hashlib.blake2b(f"{batch_id}/{record.custom_id}".encode(), digest_size=12).hexdigest()
    content, stop, _, thinking = answer(record, ident)
    usage: Block = {
        "input_tokens": record.input_tokens,
        "cache_creation_input_tokens": record.cache_write_5m + record.cache_write_1h,
        "cache_read_input_tokens": record.cache_read,
        "cache_creation": {
            "ephemeral_5m_input_tokens": record.cache_write_5m,
            "ephemeral_1h_input_tokens": record.cache_write_1h,
        },
        "output_tokens": record.output_tokens,
        "service_tier": "batch",
        "inference_geo": record.inference_geo,
    }
    if record.searches or record.marker == "search-error":
        usage["server_tool_use"] = {"web_search_requests": record.searches, "web_fetch_requests": 0}
    if thinking:
        usage["output_tokens_details"] = {"thinking_tokens": min(thinking, record.output_tokens)}
    if record.marker in ("compaction", "advisor", "fallback"):
        usage["iterations"] = list(_iterations(record, usage))
    return {
        "model": record.model,
        "id": f"msg_{ident}",
        "type": "message",
        "role": "assistant",
        "content": content,
        "stop_reason": stop,
        "stop_sequence": None,
        "stop_details": _stop_details(record) if stop == "refusal" else None,
        "usage": usage,
    }


def _stop_details(record: Record) -> Block:
    category = record.marker.partition("-")[2]
    known = category in CATEGORIES
    explanation = f"The request was declined under the policy on {category}." if known else None
    return {"type": "refusal", "category": category if known else None, "explanation": explanation}


def _iterations(record: Record, usage: Block) -> Iterator[Block]:
    """One entry per inference of the message; the entry of the request's own inference equals the top level of ``usage``."""
    own = {name: value for name, value in usage.items() if "tokens" in name and name != "output_tokens_details"}
    own["cache_creation"] = usage["cache_creation"]
    nothing = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "cache_creation": None}
    if record.marker == "fallback":
        yield {"type": "message", "model": record.declined, **nothing, "input_tokens": record.input_tokens, "output_tokens": 12}
        yield {"type": "fallback_message", "model": record.model, **own}
        return
    model, read, written = ITERATIONS[record.marker]
    other = {**nothing, "input_tokens": read, "output_tokens": written}
    # the types of anthropic 1.3 require the model of a message; later versions do not
    own = {"type": "message", "model": record.model, **own}
    if record.marker == "compaction":
        yield {"type": "compaction", **other}
        yield own
    else:
        yield own
        yield {"type": "advisor_message", "model": model, **other}

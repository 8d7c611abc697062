"""Checks of calls from clients. Field lists follow the parameter types of SDK 2.12; messages were recorded, or follow the API's style.

Bodies are decoded in two steps, first the list and then each request by itself, so that no single step blocks the interpreter for long.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec

from .errors import ApiError
from .models import Catalogue, dated, find
from .settings import SimulatorSettings

CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MAX_ID_CHARS = 64
_MAX_MARKERS = 4
_Unit = Annotated[float, msgspec.Meta(ge=0, le=1)]
_BLOCK_TYPES = frozenset(
    (
        "text", "image", "document", "search_result", "thinking", "redacted_thinking", "tool_use", "tool_result", "server_tool_use",
        "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result", "bash_code_execution_tool_result",
        "text_editor_code_execution_tool_result", "tool_search_tool_result", "container_upload",
    )
)  # fmt: skip


class _Strict(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    pass


class CacheControl(_Strict, gc=False):
    """A mark at the end of a prefix that is to be cached."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"


class SystemBlock(_Strict, gc=False):
    """One block of a system prompt."""

    type: Literal["text"]
    text: Annotated[str, msgspec.Meta(min_length=1)]
    cache_control: CacheControl | None = None
    citations: list[dict[str, Any]] | None = None


class Turn(_Strict, gc=False):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class OutputFormat(_Strict, gc=False):
    """The JSON Schema that the answer must fit, as bytes."""

    type: Literal["json_schema"]
    schema: msgspec.Raw


class OutputConfig(_Strict, gc=False):
    """``output_config``."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(_Strict, gc=False):
    """``metadata``."""

    user_id: str | None = None


class CountParams(_Strict, gc=False):
    """Parameters of a token count."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    messages: Annotated[list[Turn], msgspec.Meta(min_length=1)]
    system: str | list[SystemBlock] = ""
    tools: list[dict[str, Any]] = []
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    user_profile_id: str | None = None
    speed: Literal["standard", "fast"] | None = None


class Params(CountParams, kw_only=True, gc=False):
    """Parameters of one message: those of the Messages API, and ``temperature``, ``top_p``, ``top_k``, which older models take."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1)]
    temperature: _Unit | None = None
    top_p: _Unit | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    stop_sequences: list[str] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: str | dict[str, Any] | None = None
    inference_geo: Literal["us", "global"] | None = None
    diagnostics: dict[str, Any] | None = None
    stream: bool = False


class BetaParams(Params, gc=False):
    """Parameters of one message with those of the beta API, for calls with an ``anthropic-beta`` header."""

    output_format: OutputFormat | None = None
    billing_policy: Any = None
    compaction: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    fallback_credit_token: Any = None
    fallbacks: Any = None
    mcp_servers: list[dict[str, Any]] | None = None
    thread: dict[str, Any] | None = None


class BatchRequest(_Strict, gc=False):
    """One request of a batch, its params still raw."""

    custom_id: str
    params: msgspec.Raw


class Owner(msgspec.Struct):
    """The least that a request needs to be accepted: the id under which it can fail."""

    custom_id: str


class CreateBody(_Strict):
    """A create call's body, its requests still raw."""

    requests: list[msgspec.Raw]


_create_body = msgspec.json.Decoder(CreateBody)
_batch_request = msgspec.json.Decoder(BatchRequest)
_owner = msgspec.json.Decoder(Owner)
_params = msgspec.json.Decoder(Params)
_beta_params = msgspec.json.Decoder(BetaParams)
_count_params = msgspec.json.Decoder(CountParams)
_REASONS = (
    (re.compile(r"Object missing required field `(\w+)`"), r"\1", "Field required"),
    (re.compile(r"Object contains unknown field `([^`]*)`"), r"\1", "Extra inputs are not permitted"),
)


def api_message(error: msgspec.MsgspecError, path: str) -> str:
    """The message of a msgspec error in the API's wording: ``requests.3.params.max_tokens: Field required``."""
    text, _, where = str(error).partition(" - at `$")
    where = re.sub(r"\[(\d+)\]", r".\1", where.rstrip("`")).strip(".")
    for pattern, name, reason in _REASONS:
        found = pattern.match(text)
        if found:
            where, text = ".".join(part for part in (where, found.expand(name)) if part), reason
    full = ".".join(part for part in (path, where) if part)
    return f"{full}: {text}" if full else text


def batch_body(body: bytearray, settings: SimulatorSettings) -> list[msgspec.Raw]:
    """The raw requests of a create call. Raises ApiError (400) when the body is not JSON, or has no or too many requests."""
    try:
        requests = _create_body.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        if isinstance(error, msgspec.ValidationError):
            raise ApiError(400, api_message(error, "")) from error
        raise ApiError(400, f"The request body is not valid JSON: {error}") from error
    count = len(requests.requests)
    if count == 0:
        raise ApiError(400, "requests: List should have at least 1 item after validation, not 0")
    if count > settings.max_requests:
        raise ApiError(400, f"requests: List should have at most {settings.max_requests} items after validation, not {count}")
    return requests.requests


def batch_request(raw: msgspec.Raw, position: int, *, strict: bool) -> tuple[str, msgspec.Raw | ApiError]:
    """``custom_id`` and unread params of one request of the list, or the error of the params in their place.

    Raises ApiError (400) for a bad ``custom_id``; with ``strict`` also for any other error.
    """
    given: msgspec.Raw | ApiError
    try:
        request = _batch_request.decode(raw)
        custom_id, given = request.custom_id, request.params
    except msgspec.MsgspecError as error:
        given = ApiError(400, api_message(error, ""))
        try:
            custom_id = _owner.decode(raw).custom_id
        except msgspec.MsgspecError as unowned:
            raise ApiError(400, api_message(unowned, f"requests.{position}")) from unowned
        if strict:
            raise ApiError(400, api_message(error, f"requests.{position}")) from error
    if len(custom_id) > MAX_ID_CHARS:
        raise ApiError(400, f"requests.{position}.custom_id: String should have at most {MAX_ID_CHARS} characters")
    if CUSTOM_ID.fullmatch(custom_id) is None:
        raise ApiError(400, f"requests.{position}.custom_id: String should match pattern '^[a-zA-Z0-9_-]{{1,64}}$'")
    return custom_id, given


def message_params(raw: msgspec.Raw, models: Catalogue, *, beta: bool) -> Params:
    """The checked parameters of one message. Raises ApiError, 404 for an unknown model, else 400; its paths begin inside the params."""
    try:
        params = (_beta_params if beta else _params).decode(raw)
    except msgspec.MsgspecError as error:
        raise ApiError(400, api_message(error, "")) from error
    if params.stream:
        raise ApiError(400, "stream: streaming is not supported here")
    if params.speed == "fast":
        raise ApiError(400, "speed: fast mode is not supported here")
    check_turns(params.messages)
    check_system(params.system, params.tools)
    model = known_model(params.model, models)
    limit = model.get("max_tokens")
    if isinstance(limit, int) and 0 < limit < params.max_tokens:
        name = dated(params.model)
        raise ApiError(400, f"max_tokens: {params.max_tokens} > {limit}, which is the maximum allowed number of output tokens for {name}")
    thinking = (params.thinking or {}).get("type")
    takes = ((model.get("capabilities") or {}).get("thinking") or {}).get("types") or {}
    if not takes.get(thinking, {"supported": True})["supported"]:
        raise ApiError(400, f"thinking.type: '{thinking}' is not supported for this model")
    return params


def known_model(name: str, models: Catalogue) -> dict[str, Any]:
    """The model of this name. Raises ApiError (404) for one that is unknown or retired."""
    model = find(models, name)
    if model is None or model.get("lifecycle") == "retired":
        raise ApiError(404, f"model: {name}")
    return model


def count_params(body: bytearray, models: Catalogue) -> CountParams:
    """The checked parameters of a token count. Raises ApiError, 404 for an unknown model, else 400."""
    try:
        params = _count_params.decode(body)
    except msgspec.MsgspecError as error:
        raise ApiError(400, api_message(error, "")) from error
    check_turns(params.messages)
    check_system(params.system, params.tools)
    known_model(params.model, models)
    return params


def check_system(system: str | list[SystemBlock], tools: list[dict[str, Any]]) -> None:
    """Raises ApiError (400) for a blank block, and for too many or wrongly ordered cache markers; markers on messages are not checked.

    The error texts are those that users of the API quote in public issues.
    """
    if isinstance(system, str):
        return
    if any(block.text.isspace() for block in system):
        raise ApiError(400, "system: text content blocks must contain non-whitespace text")
    marked = [(f"tools.{n}", (tool["cache_control"] or {}).get("ttl", "5m")) for n, tool in enumerate(tools) if tool.get("cache_control")]
    marked += [(f"system.{n}", block.cache_control.ttl) for n, block in enumerate(system) if block.cache_control is not None]
    if len(marked) > _MAX_MARKERS:
        raise ApiError(400, f"A maximum of {_MAX_MARKERS} blocks with cache_control may be provided. Found {len(marked)}.")
    ttls = [ttl for _, ttl in marked]
    late = next((where for n, (where, ttl) in enumerate(marked) if ttl == "1h" and "5m" in ttls[:n]), None)
    if late is not None:
        raise ApiError(
            400,
            f"{late}.cache_control.ttl: a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block. "
            "Note that blocks are processed in the following order: `tools`, `system`, `messages`.",
        )


def check_turns(turns: list[Turn]) -> None:
    """Raises ApiError (400) when the first turn is not the user's, a content is empty, or a block is unknown."""
    if turns[0].role != "user":
        raise ApiError(400, "messages.0.role: first message must use the user role")
    for number, turn in enumerate(turns):
        content = turn.content
        if not content:
            raise ApiError(400, f"messages.{number}.content: messages must have non-empty content")
        if isinstance(content, str):
            continue
        where = f"messages.{number}.content"
        for index, block in enumerate(content):
            kind = block.get("type")
            if kind not in _BLOCK_TYPES:
                raise ApiError(400, f"{where}.{index}.type: {kind!r} is not a known content block")
            if kind == "text" and not (isinstance(block.get("text"), str) and block["text"]):
                raise ApiError(400, f"{where}.{index}.text: text content blocks must be non-empty")

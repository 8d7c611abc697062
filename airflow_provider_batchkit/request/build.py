"""Row + template → request: params, digest and ``custom_id``, checked for everything that the API would refuse.

Identity: the digest is taken over the canonical JSON of the params, so the same row asks the same thing under the same
``custom_id`` on every attempt. A ``custom_id`` of a journaled job is ``<job_id>-<digest>``: each result line names its owner.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import repeat
from typing import Any

import msgspec

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError
from airflow_provider_batchkit.model import CUSTOM_ID_PATTERN
from airflow_provider_batchkit.request.block import PreparedRequest, RequestBlock, RequestForm
from airflow_provider_batchkit.request.params import SDK_NAMES, ParamNames, check_params
from airflow_provider_batchkit.request.system import SystemBlocks, Template, marked, system_problem
from airflow_provider_batchkit.source.keys import encode_key, encode_keys
from airflow_provider_batchkit.source.rows import Items, column_of

log = logging.getLogger(__name__)

_CUSTOM_ID = re.compile(CUSTOM_ID_PATTERN)
#: the ``custom_id`` of a request without a job and without an id of its own; the pattern finds the position in it
_POSITION_ID = "item-{}"
_POSITION = re.compile(_POSITION_ID.format("(0|[1-9][0-9]{0,17})"))
_ENCODE = msgspec.json.Encoder(order="deterministic")
_DIGEST_CHARS = 40
#: number of items that are built at a time: at first, and at most where bodies are small
_FIRST_ROWS = 8
_PIECE_ROWS = 512
_PIECE_BYTES = 2 << 20
#: a prefix of fewer bytes has fewer tokens than any model caches
_CACHED_BYTES = 512


def check_custom_id(custom_id: Any) -> str:
    """Return the ``custom_id`` when the API takes it, else raise :class:`RequestError`."""
    if not isinstance(custom_id, str) or not _CUSTOM_ID.match(custom_id) or custom_id.endswith("\n"):
        raise RequestError(
            f"custom_id {custom_id!r} is not valid: 1 to 64 letters, digits, '_' or '-' ({CUSTOM_ID_PATTERN}). Nothing was sent."
        )
    return custom_id


def position_of(custom_id: str) -> int | None:
    """The position, from 0, of a request among those that were submitted with it; None where its ``custom_id`` does not hold one."""
    found = _POSITION.fullmatch(custom_id)
    return None if found is None else int(found[1])


def encode_params(params: Any) -> bytes:
    """Canonical JSON: keys sorted, so equal params give equal bytes and digests."""
    try:
        return _ENCODE.encode(params)
    except (TypeError, ValueError, msgspec.MsgspecError) as e:
        raise RequestError(f"params cannot be written as JSON: {e}. Nothing was sent.") from e


def params_digest(params_json: bytes) -> str:
    """Hex digest of canonical params JSON, 160 bits."""
    return hashlib.sha256(params_json).hexdigest()[:_DIGEST_CHARS]


class RequestDefaults(msgspec.Struct, frozen=True):
    """What every request of a job shares. A native request's own params win over these."""

    model: str | None = None
    max_tokens: int | None = None
    #: a system prompt that is the same for all rows, text or content blocks
    system: Any = None
    #: any further Messages API parameters
    params: dict[str, Any] = {}
    #: The time for which the API caches the job's system prompt, ``"5m"`` or ``"1h"``, unless its blocks have markers. A
    #: request's own system prompt is sent as it is.
    cache_system: str | None = None
    #: ``output_config.format`` of a schema that all answers must fit; with it, no params may name another format
    output_format: dict[str, Any] | None = None
    #: the names that params may have
    names: ParamNames = SDK_NAMES

    def merged(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Params of a request: the defaults, overridden by its own."""
        merged: dict[str, Any] = dict(self.params)
        for name in ("model", "max_tokens", "system"):
            value = getattr(self, name)
            if value is not None:
                merged[name] = value
        if "system" in merged:
            merged["system"] = self.system_param(merged["system"])
        merged.update(own)
        if self.output_format is not None:
            config = merged.get("output_config") or {}
            if not isinstance(config, Mapping) or config.get("format") is not None or merged.get("output_format") is not None:
                raise RequestError("params name an output format, and so does output_schema: leave one of them out. Nothing was sent.")
            merged["output_config"] = {**config, "format": self.output_format}
        return merged

    def system_param(self, system: Any) -> Any:
        """The job's system prompt as the API takes it. A prompt to be cached becomes content blocks whose last one is marked."""
        if self.cache_system is None or system_problem(system):
            return system
        return marked(system, self.cache_system)


#: the texts of a rendered system prompt: one text, or a text for each content block
_SystemTexts = str | tuple[str, ...]


class _Frame:
    """The canonical JSON of params that differ between rows only in their texts. It is checked and encoded once, around the texts."""

    def __init__(self, defaults: RequestDefaults, *, system: Template | SystemBlocks | None) -> None:
        """:raises RequestError: the API would refuse these params with any text"""
        content_mark = secrets.token_hex(16)
        marks = [secrets.token_hex(16) for _ in range(len(system) if isinstance(system, SystemBlocks) else system is not None)]
        own: dict[str, Any] = {"messages": [{"role": "user", "content": content_mark}]}
        if system is not None:
            own["system"] = defaults.system_param(system.with_texts(marks) if isinstance(system, SystemBlocks) else marks[0])
        params = defaults.merged(own)
        check_params(params, defaults.names)
        encoded = encode_params(params)
        self._head, rest = encoded.split(f'"{content_mark}"'.encode())
        #: bytes before each text of the system prompt; keys are sorted, so the messages come before it
        self._gaps: list[bytes] = []
        for mark in marks:
            gap, rest = rest.split(f'"{mark}"'.encode())
            self._gaps.append(gap)
        self._tail = rest
        #: number of these texts up to the last cache marker
        self._marked = 0
        for position, block in enumerate(own.get("system", ())):
            if isinstance(block, Mapping) and block.get("cache_control") is not None:
                self._marked = position + 1
        self._has_tools = bool(params.get("tools"))
        self.form = RequestForm()
        #: the system prompt of the last row, which is most often that of the next one, too
        self._system: _SystemTexts | None = None
        self._after = self._tail
        self._cached: tuple[str, ...] | None = None
        self._prefixes = 0

    def fill(self, content: str, system: _SystemTexts | None = None) -> bytes:
        """Params with these texts, as :func:`encode_params` would write them."""
        if not content or content.isspace():
            raise RequestError("messages[0] has no content. Nothing was sent.")
        if system is not None and system != self._system:
            self._turn_to(system)
        return b"".join((self._head, encode_params(content), self._after))

    def fill_all(self, contents: Sequence[str], systems: Sequence[_SystemTexts] | None = None) -> list[bytes]:
        """The same as :meth:`fill`, for many rows."""
        if all(contents) and not any(map(str.isspace, contents)) and (systems is None or len(set(systems)) == 1):
            if systems is not None and systems[0] != self._system:
                self._turn_to(systems[0])
            head, after, encode = self._head, self._after, _ENCODE.encode
            try:
                return [head + encode(content) + after for content in contents]
            except (TypeError, ValueError, msgspec.MsgspecError):
                pass  # a content cannot be encoded: filling one at a time finds it
        return [self.fill(content, system) for content, system in zip(contents, systems or repeat(None), strict=False)]

    def _turn_to(self, system: _SystemTexts) -> None:
        texts = (system,) if isinstance(system, str) else system
        if not isinstance(system, str):
            for position, text in enumerate(texts):
                if not text or text.isspace():
                    raise RequestError(f"system[{position}] has no text. Nothing was sent.")
        after = b"".join(gap + encode_params(text) for gap, text in zip(self._gaps, texts, strict=True)) + self._tail
        # encoding has succeeded: a text that cannot be encoded leaves the frame as it was
        self._system, self._after = system, after
        if self._marked and texts[: self._marked] != self._cached:
            self._see_prefix(texts[: self._marked])

    def _see_prefix(self, cached: tuple[str, ...]) -> None:
        """Warn of a prefix whose cache marker is of no use."""
        self._cached = cached
        self._prefixes += 1
        if self._prefixes == 1 and not self._has_tools and sum(len(text.encode()) for text in cached) < _CACHED_BYTES:
            log.warning(
                "The %d characters of the system prompt that are marked for the cache are too short to be cached by any model.",
                sum(map(len, cached)),
            )
        elif self._prefixes == 2:
            log.warning(
                "What is marked of the system prompt for the cache differs between rows. A row can read from the cache only what a row "
                "with the same one wrote."
            )


class RequestBuilder:
    """Turns any number of source items into :class:`PreparedRequest`; keeps none of them."""

    def __init__(
        self,
        defaults: RequestDefaults,
        *,
        job_id: str | None = None,
        key: Sequence[str] = (),
        prompt: Template | None = None,
        system: Template | SystemBlocks | None = None,
        dedupe: bool = True,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        """
        :param job_id: id of the journaled job; without one, a request is sent under its own ``custom_id`` or position
        :param key: key columns of row mappings; without key columns, a row's position is its key
        :param prompt: template of the user message of row mappings
        :param system: template of the system prompt of row mappings, or its content blocks with their templates
        :param dedupe: whether equal requests of several rows share one ``custom_id``; otherwise the key is part of it
        :param overrides: parameters that override a native request's own
        """
        self._defaults = defaults
        self._job_id = job_id
        self._key = tuple(key)
        self._prompt = prompt
        self._system = system
        self._dedupe = dedupe
        self._overrides = dict(overrides or {})

    @cached_property
    def _text_frame(self) -> _Frame:
        return _Frame(self._defaults, system=None)

    @cached_property
    def _row_frame(self) -> _Frame:
        return _Frame(self._defaults, system=self._system)

    def build(self, item: Any, position: int) -> PreparedRequest:
        """One request.

        :param item: a native ``{"custom_id", "params"}`` mapping, a prompt string, or a row mapping
        :param position: the item's position in its source, from 0. It names the item in errors, and is the key of an item without one
        :raises RequestError: naming the item, when the API would refuse it
        """
        try:
            if isinstance(item, str):
                return self._text(item, position)
            return self._native(item, position) if self._prompt is None else self._row(item, position)
        except RequestError as e:
            raise RequestError(f"{self._place(item, position)}: {e}", position=position) from e.__cause__

    def pieces(self, items: Iterable[Any] | Items, see: Callable[[Sequence[Any]], None] = lambda _: None) -> Iterator[RequestBlock]:
        """The same as :meth:`build_all` for any number of items, some hundred at a time, and fewer when they are large.

        :param see: called with the items of each piece after they have passed the checks
        :raises RequestError: naming the item, when the API would refuse it
        """
        source = items if isinstance(items, Items) else Items(items)
        position, rows = 0, _FIRST_ROWS
        while chunk := source.take(rows):
            block = self.build_all(chunk, position)
            see(chunk)
            yield block
            position += len(chunk)
            rows = max(1, min(_PIECE_BYTES // max(block.sizes), 2 * rows, _PIECE_ROWS))

    def build_all(self, items: Sequence[Any], position: int) -> RequestBlock:
        """The same as :meth:`build` for consecutive items, the first of them at ``position``; faster for rows of a job."""
        if self._prompt is not None and self._key and self._job_id is not None and self._dedupe:
            try:
                return self._rows(items, self._prompt, f"{self._job_id}-")
            except (RequestError, KeyError, TypeError, ValueError):
                pass  # one of the rows is bad: building them one at a time names it
        return RequestBlock.of([self.build(item, number) for number, item in enumerate(items, start=position)])

    def _rows(self, rows: Sequence[Mapping[str, Any]], prompt: Template, job: str) -> RequestBlock:
        """The same as :meth:`_row`, step by step for all rows together: per-row calls dominate at a million rows."""
        contents = prompt.render_all(rows)
        params = self._row_frame.fill_all(contents, None if self._system is None else self._system.render_all(rows))
        keys = encode_keys([column_of(rows, name) for name in self._key])
        sha256 = hashlib.sha256
        custom_ids = [job + sha256(json).hexdigest()[:_DIGEST_CHARS] for json in params]
        return RequestBlock(custom_ids, keys, params, [self._row_frame.form] * len(params))

    def _place(self, item: Any, position: int) -> str:
        if self._prompt is not None and isinstance(item, Mapping):
            known = ", ".join(f"{column}={item[column]!r}" for column in self._key if column in item)
            return f"row {position} ({known})" if known else f"row {position}"
        custom_id = item.get("custom_id") if isinstance(item, Mapping) else None
        return f"request {position}" if custom_id is None else f"request {position} ({custom_id!r})"

    def _text(self, prompt: str, position: int) -> PreparedRequest:
        if self._key:
            raise RequestError(f"a prompt string has no columns, and key asks for {', '.join(self._key)}. Nothing was sent.")
        return self._finish(encode_key([str(position)]), None, self._text_frame.fill(prompt, None), position, self._text_frame.form)

    def _native(self, item: Any, position: int) -> PreparedRequest:
        _check_mapping(item)
        if "params" not in item:
            raise RequestError("a row mapping needs the parameter prompt; a native request needs 'params'. Nothing was sent.")
        extra = set(item) - {"custom_id", "params"}
        if extra:
            raise RequestError(f"unknown fields {sorted(map(str, extra))}; a request has custom_id and params. Nothing was sent.")
        custom_id = item.get("custom_id")
        if custom_id is not None:
            check_custom_id(custom_id)
        params = item["params"]
        if isinstance(params, Mapping):
            params = {**self._defaults.merged(params), **self._overrides}
        check_params(params, self._defaults.names)
        return self._finish(encode_key([str(position) if custom_id is None else custom_id]), custom_id, encode_params(params), position)

    def _row(self, row: Any, position: int) -> PreparedRequest:
        assert self._prompt is not None
        _check_mapping(row)
        if self._key:
            try:
                key = encode_key([row[column] for column in self._key])
            except KeyError:
                missing = ", ".join(column for column in self._key if column not in row)
                raise RequestError(
                    f"key column {missing} is not in the source. Columns: {', '.join(map(str, row))}. Nothing was sent."
                ) from None
        else:
            key = encode_key([str(position)])
        system = None if self._system is None else self._system.render(row)
        return self._finish(key, None, self._row_frame.fill(self._prompt.render(row), system), position, self._row_frame.form)

    def _finish(self, key: str, own_id: str | None, params: bytes, position: int, form: RequestForm | None = None) -> PreparedRequest:
        if self._job_id is not None:
            digest = params_digest(params)
            if not self._dedupe:
                digest = params_digest(f"{digest} {key}".encode())
            custom_id = f"{self._job_id}-{digest}"
        else:
            custom_id = own_id if own_id is not None else _POSITION_ID.format(position)
        return PreparedRequest(custom_id, key, params, form)


def _check_mapping(item: Any) -> None:
    if not isinstance(item, Mapping):
        raise RequestError(f"a request is a mapping or a string, not {type(item).__name__}. Nothing was sent.")


def refuse_repeated_ids(blocks: Iterable[RequestBlock]) -> Iterator[RequestBlock]:
    """Pass blocks through, and raise :class:`RequestError` at the first ``custom_id`` that comes a second time."""
    seen: set[str] = set()
    for block in blocks:
        for custom_id in block.custom_ids:
            if custom_id in seen:
                raise RequestError(f"request {len(seen)}: custom_id {custom_id!r} came before; it must be unique. Nothing was sent.")
            seen.add(custom_id)
        yield block


def prompts_of(prompts: Any) -> Iterator[str]:
    """``prompts`` as given by a user.

    :raises BatchInputError: for a string, bytes, a mapping, or something that is not iterable
    :raises RequestError: while iterating, at the first prompt that is not a string
    """
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise BatchInputError(
            f"prompts must be a list (or another iterable) of strings, not a {type(prompts).__name__}. For one prompt give a list of one. "
            "Nothing was sent."
        )
    return (_prompt(prompt, position) for position, prompt in enumerate(prompts))


def _prompt(prompt: Any, position: int) -> str:
    if isinstance(prompt, str):
        return prompt
    raise RequestError(
        f"prompt {position}: a prompt is a string, not {type(prompt).__name__}; native requests go into requests. Nothing was sent.",
        position=position,
    )


def items_of(requests: Any) -> Iterable[Any]:
    """``requests`` as given by a user. A string or a mapping is refused: iterating it would send its letters or its keys.

    :raises BatchInputError: for a string, bytes, a mapping, or something that is not iterable
    """
    if isinstance(requests, str | bytes | Mapping) or not isinstance(requests, Iterable):
        raise BatchInputError(
            f"requests must be a list (or another iterable) of requests, not a {type(requests).__name__}. For one request "
            "give a list of one; for another task's output give task.output, not a template string. Nothing was sent."
        )
    return requests

"""Answers → values of columns. What does not fit is told apart: cut, refused, or not what the schema asks for."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from airflow_provider_batchkit.model import BatchItem, RequestStatus
from airflow_provider_batchkit.schema.output import OutputSchema

#: values in the order of the schema's columns
Values = tuple[Any, ...]

#: ``error_type`` of an ``invalid_output``
INVALID, TRUNCATED, REFUSED = "invalid_output", "truncated", "refused"

_CUT = ("max_tokens", "model_context_window_exceeded")
#: an escaped NUL, behind an even number of backslashes: no text of PostgreSQL holds one
_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")
_encode = msgspec.json.Encoder(order="deterministic").encode


class AnswerReader:
    """Reads the answers to requests that asked for a schema."""

    def __init__(self, schema: OutputSchema) -> None:
        self._decode: Callable[[str], Any] = msgspec.json.Decoder(schema.types.answer).decode
        self._converters = [(i, _CONVERT[c.kind]) for i, c in enumerate(schema.columns) if c.kind in _CONVERT]
        #: of a row without a fitting answer
        self.nothing: Values = (None,) * len(schema.columns)

    def read(self, item: BatchItem) -> tuple[BatchItem, Values]:
        """The values of an answer; one that does not fit comes back as ``invalid_output``, with its text and why."""
        if item.status is not RequestStatus.SUCCEEDED:
            return item, self.nothing
        if item.stop_reason == "refusal":
            return self._invalid(item, REFUSED, "The model refused to answer; stop_reason is refusal.")
        try:
            return item, self._values(item.text or "")
        except (msgspec.MsgspecError, UnicodeError, OverflowError, RecursionError) as e:
            if item.stop_reason in _CUT:
                return self._invalid(item, TRUNCATED, f"The answer was cut before its end; stop_reason is {item.stop_reason}.")
            return self._invalid(item, INVALID, f"The answer does not fit output_schema: {e}")

    def _values(self, text: str) -> Values:
        if "\\u0000" in text:
            text = _NUL.sub(r"\1\\ufffd", text)
        values: Values = msgspec.structs.astuple(self._decode(text))
        if not self._converters:
            return values
        converted = list(values)
        for i, convert in self._converters:
            if converted[i] is not None:
                converted[i] = convert(converted[i])
        return tuple(converted)

    def _invalid(self, item: BatchItem, error_type: str, message: str) -> tuple[BatchItem, Values]:
        failed = msgspec.structs.replace(item, status=RequestStatus.INVALID_OUTPUT, error_type=error_type, error_message=message)
        return failed, self.nothing


def _json_text(value: Any) -> str:
    return _encode(value).decode()


def _in_utc(value: datetime) -> datetime:
    """:raises OverflowError: for a time whose UTC lies outside the years 1 to 9999"""
    return value.astimezone(UTC)


_CONVERT: dict[str, Callable[[Any], Any]] = {"json": _json_text, "date-time": _in_utc}

"""Answers → values of columns. What does not fit is told apart: cut, refused, or not what the schema asks for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.model import RequestStatus
from airflow_provider_batchkit.schema.output import OutputSchema

#: values in the order of the schema's columns
Values = tuple[Any, ...]

#: ``error_type`` of an ``invalid_output``
INVALID, TRUNCATED, REFUSED = "invalid_output", "truncated", "refused"

_CUT = ("max_tokens", "model_context_window_exceeded")
#: an escaped NUL, behind an even number of backslashes: no text of PostgreSQL holds one
_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")
_encode = msgspec.json.Encoder(order="deterministic").encode


@dataclass(frozen=True, slots=True)
class _Unfit:
    """Why an answer does not fit."""

    error_type: str
    message: str


class AnswerReader:
    """Reads the answers to requests that asked for a schema."""

    def __init__(self, schema: OutputSchema) -> None:
        self._decode: Callable[[str], Any] = msgspec.json.Decoder(schema.types.answer).decode
        self._converters = [(i, _CONVERT[c.kind]) for i, c in enumerate(schema.columns) if c.kind in _CONVERT]
        #: of a row without a fitting answer
        self.nothing: Values = (None,) * len(schema.columns)

    def read_all(self, results: ResultBlock) -> tuple[ResultBlock, list[Values]]:
        """The values of answers; those that do not fit come back as ``invalid_output``, with their texts and why."""
        values, failures = [], {}
        for place, (status, text, reason) in enumerate(zip(results.statuses, results.texts, results.stop_reasons, strict=True)):
            answer = self.nothing if status != RequestStatus.SUCCEEDED.value else self._read(text or "", reason)
            if isinstance(answer, _Unfit):
                failures[place], answer = answer, self.nothing
            values.append(answer)
        if failures:
            statuses, types, messages = list(results.statuses), list(results.error_types), list(results.error_messages)
            for place, unfit in failures.items():
                statuses[place], types[place], messages[place] = RequestStatus.INVALID_OUTPUT.value, unfit.error_type, unfit.message
            results = replace(results, statuses=statuses, error_types=types, error_messages=messages)
        return results, values

    def _read(self, text: str, stop_reason: str | None) -> Values | _Unfit:
        if stop_reason == "refusal":
            return _Unfit(REFUSED, "The model refused to answer; stop_reason is refusal.")
        try:
            return self._values(text)
        except (msgspec.MsgspecError, UnicodeError, OverflowError, RecursionError) as e:
            if stop_reason in _CUT:
                return _Unfit(TRUNCATED, f"The answer was cut before its end; stop_reason is {stop_reason}.")
            return _Unfit(INVALID, f"The answer does not fit output_schema: {e}")

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


def _json_text(value: Any) -> str:
    return _encode(value).decode()


def _in_utc(value: datetime) -> datetime:
    """:raises OverflowError: for a time whose UTC lies outside the years 1 to 9999"""
    return value.astimezone(UTC)


_CONVERT: dict[str, Callable[[Any], Any]] = {"json": _json_text, "date-time": _in_utc}

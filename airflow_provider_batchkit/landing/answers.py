"""Answers → values of columns. An answer that is unfinished, or that does not fit the schema, is an ``invalid_output``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.api.decode import mended
from airflow_provider_batchkit.model import RequestStatus
from airflow_provider_batchkit.schema.output import OutputSchema

#: values in the order of the schema's columns
Values = tuple[Any, ...]

#: ``error_type`` of a finished answer that does not fit
INVALID = "invalid_output"

#: an escaped NUL, after an even number of backslashes: PostgreSQL's texts cannot hold one
_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")
_encode = msgspec.json.Encoder(order="deterministic").encode


@dataclass(frozen=True, slots=True)
class _Unfit:
    """Why an answer does not fit."""

    message: str


class AnswerReader:
    """Reads the answers to requests that asked for a schema."""

    def __init__(self, schema: OutputSchema) -> None:
        self._decode: Callable[[str], Any] = msgspec.json.Decoder(schema.types.answer).decode
        self._converters = [(i, _CONVERT[c.kind]) for i, c in enumerate(schema.columns) if c.kind in _CONVERT]
        #: the values of a row without a fitting answer
        self.nothing: Values = (None,) * len(schema.columns)

    def read_all(self, results: ResultBlock) -> tuple[ResultBlock, list[Values]]:
        """The values of answers. Answers that do not fit come back as ``invalid_output``, with their texts and the reason."""
        values: list[Values] = []
        statuses, types, messages = list(results.statuses), list(results.error_types), list(results.error_messages)
        for place, (status, text, unfinished) in enumerate(zip(results.statuses, results.texts, results.error_types, strict=True)):
            answer = self.nothing if status != RequestStatus.SUCCEEDED.value else self._read(text or "")
            if isinstance(answer, _Unfit):
                statuses[place] = RequestStatus.INVALID_OUTPUT.value
                if unfinished is None:
                    types[place], messages[place] = INVALID, answer.message
                answer = self.nothing
            elif status == RequestStatus.SUCCEEDED.value:
                # cut JSON does not parse, so an answer that can be read was whole at its last token
                types[place] = messages[place] = None
            values.append(answer)
        return replace(results, statuses=statuses, error_types=types, error_messages=messages), values

    def _read(self, text: str) -> Values | _Unfit:
        try:
            return self._values(text)
        except (msgspec.MsgspecError, UnicodeError, OverflowError, RecursionError) as e:
            return _Unfit(f"The answer does not fit output_schema: {e}")

    def _values(self, text: str) -> Values:
        if "\\u0000" in text:
            text = _NUL.sub(r"\1\\ufffd", text)
        if "\\ud" in text or "\\uD" in text:
            text = mended(text.encode()).decode()
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
    """:raises OverflowError: the time's UTC lies outside the years 1 to 9999"""
    return value.astimezone(UTC)


_CONVERT: dict[str, Callable[[Any], Any]] = {"json": _json_text, "date-time": _in_utc}

"""``output_schema``: it is read, checked, sent and journaled, and found again when the answers land."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import msgspec

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.schema.types import Column, SchemaTypes
from airflow_provider_batchkit.schema.wire import refuse, wire_schema

#: names that every database takes for a column when they are quoted; PostgreSQL cuts names after 63 bytes
_COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
#: prefix of the stage's own columns
_RESERVED_PREFIX = "batchkit_"


class OutputSchema:
    """A JSON Schema of answers. Equal texts are equal schemas. The order of properties counts, because the model answers in that order."""

    def __init__(self, text: str) -> None:
        """:param text: the schema as :attr:`text` gave it"""
        #: the schema as it was given, as JSON
        self.text = text

    @classmethod
    def parse(cls, given: Any) -> OutputSchema:
        """Read and check the schema that a user gives.

        :param given: a JSON Schema as a mapping, or a Pydantic model class
        :raises BatchInputError: the value is no schema, or cannot be sent, or cannot become columns; the error names the place
        """
        if isinstance(given, type) and hasattr(given, "model_json_schema"):
            given = given.model_json_schema()
        if not isinstance(given, Mapping):
            raise BatchInputError(
                f"output_schema must be a JSON Schema (a mapping) or a Pydantic model class, not {given!r:.100}. Nothing was sent."
            )
        try:
            schema = cls(msgspec.json.encode(given).decode())
        except (TypeError, ValueError, msgspec.MsgspecError) as e:
            raise BatchInputError(f"output_schema cannot be written as JSON: {e}. Nothing was sent.") from e
        schema._check()
        return schema

    def _check(self) -> None:
        wire_schema(self._root)
        try:
            msgspec.json.Decoder(self.types.answer)
        except BatchInputError:
            raise
        except (TypeError, ValueError, OverflowError, NotImplementedError) as e:
            raise BatchInputError(f"output_schema cannot be checked: {e}. Nothing was sent.") from e
        names: dict[str, str] = {}
        for name in (column.name for column in self.columns):
            if not _COLUMN_NAME.fullmatch(name) or name.lower().startswith(_RESERVED_PREFIX):
                refuse(
                    f"the property {name!r}",
                    f"cannot be a column: up to 63 letters, digits and '_', not a digit first, not {_RESERVED_PREFIX!r} first",
                )
            if name.lower() in names:
                refuse(f"the properties {names[name.lower()]!r} and {name!r}", "would be one column")
            names[name.lower()] = name

    @cached_property
    def _root(self) -> dict[str, Any]:
        root: dict[str, Any] = msgspec.json.decode(self.text)
        return root

    @cached_property
    def types(self) -> SchemaTypes:
        """Types of the columns and of the decoder."""
        return SchemaTypes(self._root)

    @property
    def columns(self) -> tuple[Column, ...]:
        """A column for each property, in their order."""
        return self.types.columns

    @cached_property
    def format(self) -> dict[str, Any]:
        """The Messages API's ``output_config.format``. The schema is raw JSON, so that sorting keys does not reorder its properties."""
        return {"type": "json_schema", "schema": msgspec.Raw(msgspec.json.encode(wire_schema(self._root)))}

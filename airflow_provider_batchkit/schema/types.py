"""Schema → types: those of the columns, and that of the msgspec decoder, which reads and checks an answer in one pass.

The decoder checks types, required and unknown properties, enums of strings or integers, bounds, patterns, dates and times, at any depth.
A value that may have several types (other than null, or integer and number) is not checked.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from airflow_provider_batchkit.schema.wire import literals, members, only_member, properties_of, refuse, types_of

_INT64 = 2**63
_Refs = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """One property of the answer as a column. All columns are nullable, because a row may have no answer.

    ``kind``: ``integer`` (64 bits), ``number`` (double precision), ``boolean``, ``string``, ``date``, ``date-time`` or ``json``.
    """

    name: str
    kind: str


class SchemaTypes:
    """Types of a root schema whose form :func:`~airflow_provider_batchkit.schema.wire.wire_schema` has checked."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        """:raises BatchInputError: the root is no object, or a ``$ref`` leads nowhere or back to itself"""
        self._root = root
        node, refs = self._resolved(root, "$", ())
        if node.get("type") != "object":
            refuse("$", "must be an object whose properties are the columns; wrap an array or a single value into one property")
        properties = properties_of(node, "$")
        kinds, fields = [], []
        for name, member in properties.items():
            kind, type_ = self._value(member, f"$.{name}", refs)
            kinds.append(kind)
            # an absent property and a null both give NULL in the column
            fields.append(type_ if name in node.get("required", ()) else (type_ | None, None))
        self.columns = tuple(Column(name, kind) for name, kind in zip(properties, kinds, strict=True))
        self.answer = _struct("Answer", list(properties), fields)

    def _resolved(self, node: Mapping[str, Any], where: str, refs: _Refs) -> tuple[Mapping[str, Any], _Refs]:
        """The schema that a ``$ref``, or an ``allOf`` of one schema, stands for."""
        while "$ref" in node or "allOf" in node:
            if "$ref" not in node:
                node = only_member(node, where)
                continue
            ref = node["$ref"]
            if ref in refs:
                refuse(where, f"holds {ref} within itself; the API takes no recursive schemas")
            refs = (*refs, ref)
            node = self._lookup(ref, where)
        return node, refs

    def _lookup(self, ref: Any, where: str) -> Mapping[str, Any]:
        found: Any = self._root if isinstance(ref, str) and ref.startswith("#") else None
        for part in str(ref).removeprefix("#").strip("/").split("/"):
            if part and found is not None:
                found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            refuse(where, f"refers to {ref!r}, which the schema does not define")
        return found

    def _alternatives(self, node: Mapping[str, Any], where: str, refs: _Refs) -> Iterator[tuple[Mapping[str, Any], _Refs]]:
        """The node, as schemas of one type each."""
        node, refs = self._resolved(node, where, refs)
        choices = next((keyword for keyword in ("anyOf", "oneOf") if keyword in node), None)
        if choices is not None:
            for member in members(node, choices, where):
                yield from self._alternatives(member, where, refs)
        elif "enum" in node or "const" in node:
            yield node, refs
        else:
            yield from (({**node, "type": kind}, refs) for kind in types_of(node, where))

    def _value(self, node: Mapping[str, Any], where: str, refs: _Refs) -> tuple[str, Any]:
        """The column's kind and the decoder's type for a value."""
        found = [self._single(each, where, inner) for each, inner in self._alternatives(node, where, refs)]
        nullable = any(null for _, _, null in found)
        typed = [(kind, type_) for kind, type_, _ in found if kind != "null"]
        kinds = {kind for kind, _ in typed}
        if len(typed) == 1:
            kind, type_ = typed[0]
        elif kinds and kinds <= {"integer", "number"}:
            kind, type_ = "number", float
        else:
            return "json", Any
        return kind, type_ | None if nullable else type_

    def _single(self, node: Mapping[str, Any], where: str, refs: _Refs) -> tuple[str, Any, bool]:
        """Kind and type of a schema of one type, and whether null is among its values."""
        if "enum" in node or "const" in node:
            values = literals(node, where)
            return *_enum([value for value in values if value is not None]), None in values
        kind = node["type"]
        if kind == "null":
            return "null", None, True
        if kind == "boolean":
            return kind, bool, False
        if kind == "string":
            return *_string(node, where), False
        if kind in ("integer", "number"):
            return kind, _integer(node) if kind == "integer" else _number(node), False
        if kind == "array":
            _, items = self._value(node["items"], f"{where}[]", refs)
            return "json", _with(list[items], min_length=node.get("minItems"), max_length=node.get("maxItems")), False  # type: ignore[valid-type]
        return "json", self._object(node, where, refs), False

    def _object(self, node: Mapping[str, Any], where: str, refs: _Refs) -> Any:
        properties = properties_of(node, where)
        required = node.get("required", ())
        fields = []
        for name, member in properties.items():
            _, type_ = self._value(member, f"{where}.{name}", refs)
            fields.append(type_ if name in required else (type_ | msgspec.UnsetType, msgspec.UNSET))
        return _struct("Object", list(properties), fields)


def _struct(title: str, names: list[str], types: list[Any]) -> Any:
    """A struct of properties. A type with a default is given as a pair. Fields are numbered, because a property may have any name."""
    fields = [(f"f{i}", *type_) if isinstance(type_, tuple) else (f"f{i}", type_) for i, type_ in enumerate(types)]
    return msgspec.defstruct(
        title,
        fields,
        rename={f"f{i}": name for i, name in enumerate(names)},
        forbid_unknown_fields=True,
        kw_only=True,
        gc=False,
    )


def _with(type_: Any, **bounds: Any) -> Any:
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return Annotated[type_, msgspec.Meta(**given)] if given else type_


def _enum(values: list[Any]) -> tuple[str, Any]:
    if not values:
        return "null", None
    if all(isinstance(value, str) for value in values):
        return "string", Literal[tuple(values)]
    if all(isinstance(value, bool) for value in values):
        return "boolean", bool
    if any(isinstance(value, str | bool) for value in values):
        return "json", Any
    return ("integer", Literal[tuple(values)]) if all(isinstance(value, int) for value in values) else ("number", float)


def _string(node: Mapping[str, Any], where: str) -> tuple[str, Any]:
    if node.get("format") == "date":
        return "date", dt.date
    if node.get("format") == "date-time":
        # RFC 3339 requires an offset; without one, the time is ambiguous
        return "date-time", Annotated[dt.datetime, msgspec.Meta(tz=True)]
    pattern = node.get("pattern")
    if pattern is not None:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as e:
            refuse(where, f"has the pattern {pattern!r}, which is no regular expression: {e}")
    return "string", _with(str, min_length=node.get("minLength"), max_length=node.get("maxLength"), pattern=pattern)


def _integer(node: Mapping[str, Any]) -> Any:
    """Whole numbers of 64 bits within the bounds, which need not be whole themselves."""
    low, high = -_INT64, _INT64 - 1
    if "minimum" in node:
        low = max(low, math.ceil(node["minimum"]))
    if "exclusiveMinimum" in node:
        low = max(low, math.floor(node["exclusiveMinimum"]) + 1)
    if "maximum" in node:
        high = min(high, math.floor(node["maximum"]))
    if "exclusiveMaximum" in node:
        high = min(high, math.ceil(node["exclusiveMaximum"]) - 1)
    multiple = node.get("multipleOf")
    return _with(int, ge=low, le=high, multiple_of=multiple if isinstance(multiple, int) else None)


def _number(node: Mapping[str, Any]) -> Any:
    """Numbers. ``multipleOf`` is not checked: binary fractions cannot decide what is a multiple of 0.1."""
    exclusive = "exclusiveMinimum" in node, "exclusiveMaximum" in node
    return _with(
        float,
        ge=None if exclusive[0] else node.get("minimum"),
        gt=node.get("exclusiveMinimum"),
        le=None if exclusive[1] else node.get("maximum"),
        lt=node.get("exclusiveMaximum"),
    )

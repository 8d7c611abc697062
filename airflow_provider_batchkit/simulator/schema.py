"""Structured output: which JSON Schemas are refused, and a small answer that fits one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec

from .errors import ApiError

MAX_SCHEMA_DEPTH = 32
_FORMATS = {
    "date": "2026-01-02",
    "date-time": "2026-01-02T03:04:05Z",
    "time": "03:04:05Z",
    "email": "row@example.com",
    "uri": "https://example.com/row",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
#: Keywords that the API refuses per type, from its documentation of structured outputs.
_UNSUPPORTED = {
    "string": ("maxLength", "minLength"),
    "integer": ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"),
    "number": ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"),
    "array": ("maxItems", "uniqueItems"),
}


@lru_cache(maxsize=256)
def decoded(schema: bytes) -> Any:
    """The schema as an object, which is shared and must not be changed."""
    return msgspec.json.decode(schema)


@lru_cache(maxsize=256)
def problem_of(schema: bytes) -> str:
    """Why the API would refuse a schema (open objects, bounds, recursion, or no schema at all); ``""`` when it would not."""
    root = decoded(schema)
    if not isinstance(root, dict):
        return "Input should be a valid dictionary"
    for node in _nodes(root):
        kind = node.get("type")
        kinds = kind if isinstance(kind, list) else [kind]
        if "object" in kinds and node.get("additionalProperties") is not False:
            if "additionalProperties" not in node:
                return "For 'object' type, 'additionalProperties' must be explicitly set to false"
            return "For 'object' type, 'additionalProperties' other than false is not supported. Please set 'additionalProperties' to false"
        if "array" in kinds and node.get("minItems", 0) not in (0, 1):
            return "For 'array' type, 'minItems' values other than 0 or 1 are not supported"
        for name in kinds:
            found = [keyword for keyword in _UNSUPPORTED.get(str(name), ()) if keyword in node]
            if found:
                return f"For {name!r} type, properties {', '.join(found)} are not supported"
    if _is_recursive(root, root, frozenset()):
        return "Recursive schemas are not supported"
    return misfit_of(schema)


def encoded(schema: object) -> bytes:
    """A schema as bytes, in the form that these functions take."""
    return msgspec.json.encode(schema)


@lru_cache(maxsize=256)
def misfit_of(schema: bytes) -> str:
    """Why the simulator cannot answer in the schema; ``""`` when it can. A tool's input may have any schema that an object fits."""
    try:
        answer_in_schema(decoded(schema), "0" * 12)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        return f"not a JSON Schema that the simulator understands: {error!r}"
    return ""


def check(schema: bytes) -> None:
    """Raises ApiError (400) for a schema that the API would refuse."""
    problem = problem_of(schema)
    if problem:
        raise ApiError(400, f"output_config.format.schema: {problem}")


def _nodes(schema: object) -> Iterator[dict[str, Any]]:
    """The schema and all schemas inside it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for member in _members(schema):
        yield from _nodes(member)


def _members(schema: dict[str, Any]) -> Iterator[object]:
    """The schemas directly inside a schema."""
    for keyword in ("properties", "$defs", "definitions"):
        members = schema.get(keyword)
        yield from members.values() if isinstance(members, dict) else ()
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        yield from schema.get(keyword) or ()
    yield schema.get("items")


def _is_recursive(schema: object, root: object, inside: frozenset[str]) -> bool:
    """Whether a ``$ref`` leads to a schema that contains it."""
    if not isinstance(schema, dict):
        return False
    if "$ref" not in schema:
        return any(_is_recursive(member, root, inside) for member in _members(schema))
    pointer = str(schema["$ref"])
    return pointer in inside or _is_recursive(_resolve(root, pointer), root, inside | {pointer})


def answer_in_schema(schema: object, digest: str) -> str:
    """A small JSON text that fits ``schema``; its integers and strings come from the digest, so it is the same on every run.

    It handles objects, arrays, strings, integers, numbers, booleans, null, enum, const, anyOf, oneOf, allOf (first member), local ``$ref``,
    lengths and ranges. Other keywords (``pattern``, ``not``, …) are ignored.
    """
    return msgspec.json.encode(_value(schema, schema, digest, "$", 0)).decode()


def _number(digest: str, path: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{digest}{path}".encode(), digest_size=4).digest())


def _resolve(root: object, pointer: str) -> object:
    node = root
    for part in pointer.removeprefix("#").strip("/").split("/"):
        if part and isinstance(node, dict):
            node = node.get(part.replace("~1", "/").replace("~0", "~"), {})
    return node


def _value(schema: object, root: object, digest: str, path: str, depth: int) -> Any:
    if not isinstance(schema, dict) or depth > MAX_SCHEMA_DEPTH:
        return None
    if "$ref" in schema:
        return _value(_resolve(root, str(schema["$ref"])), root, digest, path, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][_number(digest, path) % len(schema["enum"])]
    for choice in ("anyOf", "oneOf", "allOf"):
        if schema.get(choice):
            return _value({**schema[choice][0]}, root, digest, path, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "null")
    if isinstance(kind, list):
        kind = next((name for name in kind if name != "null"), "null")
    if kind == "object":
        return _object(schema, root, digest, path, depth)
    if kind == "array":
        size = max(1, schema.get("minItems", 1)) if schema.get("maxItems", 1) else 0
        return [_value(schema.get("items", {"type": "string"}), root, digest, f"{path}[{i}]", depth + 1) for i in range(size)]
    return _scalar(schema, kind, digest, path)


def _object(schema: dict[str, Any], root: object, digest: str, path: str, depth: int) -> dict[str, Any]:
    """An object with all properties near the root and only the required ones deeper down, so that a recursive schema ends."""
    properties = schema.get("properties", {})
    names = properties if depth < MAX_SCHEMA_DEPTH // 8 else [name for name in properties if name in schema.get("required", ())]
    return {name: _value(properties[name], root, digest, f"{path}.{name}", depth + 1) for name in names}


def _scalar(schema: dict[str, Any], kind: str, digest: str, path: str) -> Any:
    number = _number(digest, path)
    if kind == "string":
        text = str(_FORMATS.get(schema.get("format", ""), f"{re.sub('[^a-zA-Z0-9]+', '-', path).strip('-') or 'text'} {number:08x}"))
        return text[: schema.get("maxLength", len(text))].ljust(schema.get("minLength", 0), "x")
    if kind in ("integer", "number"):
        return _in_range(schema, kind, number)
    return number % 2 == 1 if kind == "boolean" else None


def _in_range(schema: dict[str, Any], kind: str, number: int) -> int | float:
    step = 1 if kind == "integer" else 0.25
    low = schema["exclusiveMinimum"] + step if "exclusiveMinimum" in schema else schema.get("minimum")
    high = schema["exclusiveMaximum"] - step if "exclusiveMaximum" in schema else schema.get("maximum")
    if low is None:
        low = 0 if high is None or high > 0 else high - 1000
    if high is None:
        high = low + 1000
    multiple = schema.get("multipleOf")
    if multiple:
        first = -(-low // multiple)
        return (first + number % (max(0, high // multiple - first) + 1)) * multiple  # type: ignore[no-any-return]
    value = low + number % (int(high - low) + 1)
    return int(value) if kind == "integer" else float(value)

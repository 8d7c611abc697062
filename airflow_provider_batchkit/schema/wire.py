"""The schema as it is sent. What the API's structured output needs is added; what it does not take goes into words, or is refused.

Bounds (``minimum``, ``maxLength``, ``pattern``, …) are not part of the API's schemas. As in the SDK, they go into the description, which
the model reads; unlike there, the answers are checked against them when they land. The rules are those of the API's documentation
(platform.claude.com, "Structured outputs", JSON Schema limitations) and of SDK 2.12 (``anthropic.transform_schema``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from airflow_provider_batchkit.exceptions import BatchInputError

_TYPES = frozenset(("object", "array", "string", "integer", "number", "boolean", "null"))
_FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"))
#: keywords that are sent as they are
_KEPT = ("title", "description", "default")
#: keywords that the description tells the model
_TOLD = frozenset(
    (
        "minLength", "maxLength", "pattern", "format", "contentEncoding", "contentMediaType",
        "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
        "minItems", "maxItems", "uniqueItems", "examples",
    )
)  # fmt: skip
#: keywords that say nothing about an answer
_DROPPED = frozenset(("$schema", "$id", "$comment", "$defs", "definitions", "deprecated", "readOnly", "writeOnly", "discriminator"))
_DEFINITIONS = ("$defs", "definitions")


def refuse(where: str, problem: str) -> NoReturn:
    """:raises BatchInputError: always"""
    raise BatchInputError(f"output_schema: {where} {problem}. Nothing was sent.")


def wire_schema(root: Mapping[str, Any]) -> dict[str, Any]:
    """The root schema with its definitions. The order is kept, because the model answers in that order.

    :raises BatchInputError: structured output cannot express something; the error names the place
    """
    sent = _wire(root, "$")
    for keyword in _DEFINITIONS:
        if isinstance(root.get(keyword), Mapping):
            sent[keyword] = {name: _wire(node, f"$.{keyword}.{name}") for name, node in root[keyword].items()}
    return sent


def _wire(node: Any, where: str) -> dict[str, Any]:
    if not isinstance(node, Mapping):
        refuse(where, f"must be a schema, a mapping, not {type(node).__name__}")
    if "$ref" in node:
        return {"$ref": node["$ref"]}
    if "allOf" in node:
        return _wire(only_member(node, where), where)
    sent = {keyword: node[keyword] for keyword in _KEPT if keyword in node}
    used = {*_KEPT, *_DROPPED}
    choices = next((keyword for keyword in ("anyOf", "oneOf") if keyword in node), None)
    if choices is not None:
        sent["anyOf"] = [_wire(member, f"{where}.{choices}[{i}]") for i, member in enumerate(members(node, choices, where))]
        used |= {choices, "type"}
    elif "enum" in node or "const" in node:
        literals(node, where)
        sent.update({keyword: node[keyword] for keyword in ("type", "enum", "const") if keyword in node})
        used |= {"type", "enum", "const"}
    else:
        sent["type"] = node.get("type")
        used |= {"type", *_by_type(node, where, sent)}
    _tell(node, where, sent, used)
    return sent


def _by_type(node: Mapping[str, Any], where: str, sent: dict[str, Any]) -> set[str]:
    """Add what is specific to the node's types; returns the keywords that this handles."""
    kinds = types_of(node, where)
    used: set[str] = set()
    if "object" in kinds:
        properties = properties_of(node, where)
        sent["properties"] = {name: _wire(member, f"{where}.{name}") for name, member in properties.items()}
        if "required" in node:
            sent["required"] = list(node["required"])
        sent["additionalProperties"] = False
        used |= {"properties", "required", "additionalProperties"}
    if "array" in kinds:
        if "items" not in node:
            refuse(where, "is an array without items: say what is in it")
        sent["items"] = _wire(node["items"], f"{where}[]")
        used.add("items")
        if node.get("minItems") in (0, 1):
            sent["minItems"] = node["minItems"]
            used.add("minItems")
    if "string" in kinds and node.get("format") in _FORMATS:
        sent["format"] = node["format"]
        used.add("format")
    return used


def _tell(node: Mapping[str, Any], where: str, sent: dict[str, Any], used: set[str]) -> None:
    """Put the bounds into the description. A keyword that can neither be sent nor be checked later is refused."""
    rest = [keyword for keyword in node if keyword not in used]
    unknown = [keyword for keyword in rest if keyword not in _TOLD]
    if unknown:
        refuse(where, f"uses {', '.join(unknown)}, which the API's structured output does not have")
    if rest:
        told = "{" + ", ".join(f"{keyword}: {json.dumps(node[keyword], ensure_ascii=False)}" for keyword in rest) + "}"
        sent["description"] = f"{sent['description']}\n\n{told}" if "description" in sent else told


def types_of(node: Mapping[str, Any], where: str) -> list[str]:
    """The names of a node's types."""
    kind = node.get("type")
    kinds: list[Any] = kind if isinstance(kind, list) else [kind]
    if not kinds or not all(isinstance(name, str) and name in _TYPES for name in kinds):
        refuse(where, f"needs a type, one of {', '.join(sorted(_TYPES))}, or enum, const or anyOf; it has {kind!r}")
    return kinds


def properties_of(node: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The properties of an object, which must list at least one and allow no others."""
    if isinstance(node.get("additionalProperties"), Mapping):
        refuse(where, "is a mapping with any keys (additionalProperties); name its properties, or make it an array of objects")
    properties = node.get("properties")
    if not isinstance(properties, Mapping) or not properties:
        refuse(where, "is an object without properties")
    required = node.get("required", [])
    unknown = [name for name in required if name not in properties] if isinstance(required, list | tuple) else [required]
    if unknown:
        refuse(where, f"requires {', '.join(map(str, unknown))}, which is not among its properties")
    return properties


def members(node: Mapping[str, Any], keyword: str, where: str) -> list[Any]:
    """The schemas that a node lists under ``keyword``, at least one."""
    found = node[keyword]
    if not isinstance(found, list) or not found:
        refuse(where, f"has {keyword} without members")
    return found


def only_member(node: Mapping[str, Any], where: str) -> Any:
    """The only schema of an ``allOf``."""
    found = members(node, "allOf", where)
    if len(found) > 1:
        refuse(where, "has allOf with several members; write the schema that they make together")
    return found[0]


def literals(node: Mapping[str, Any], where: str) -> list[Any]:
    """The values of an ``enum`` or a ``const``."""
    values = [node["const"]] if "const" in node else node["enum"]
    if not isinstance(values, list | tuple) or not values or not all(v is None or isinstance(v, str | int | float) for v in values):
        refuse(where, "needs an enum of at least one string, number, boolean or null")
    return list(values)

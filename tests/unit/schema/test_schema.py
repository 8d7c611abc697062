"""``output_schema``: what is sent, what is refused, and how answers become values."""

from __future__ import annotations

import copy
import datetime as dt
import enum
import json
from typing import Any, Literal

import anthropic
import msgspec
import pytest
from pydantic import BaseModel, Field

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.exceptions import BatchInputError, RequestError
from airflow_provider_batchkit.landing.answers import AnswerReader
from airflow_provider_batchkit.model import TRUNCATED, UNFINISHED, BatchItem, RequestStatus
from airflow_provider_batchkit.request.build import RequestDefaults, encode_params
from airflow_provider_batchkit.schema import Column, OutputSchema


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Maker(BaseModel):
    name: str
    founded: dt.date | None = None


class Product(BaseModel):
    summary: str = Field(description="One sentence.", max_length=40)
    size: Size
    stock: int = Field(ge=0)
    price: float | None
    organic: bool
    seen_on: dt.date
    seen_at: dt.datetime | None = None
    tags: list[str]
    maker: Maker
    grade: Literal["a", "b"] | None = None


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def sent(given: Any) -> Any:
    """The schema in the bytes of a request."""
    params = RequestDefaults(output_format=OutputSchema.parse(given).format).merged({})
    return json.loads(encode_params(params))["output_config"]["format"]["schema"]


def kinds(given: Any) -> dict[str, str]:
    return {column.name: column.kind for column in OutputSchema.parse(given).columns}


def read(given: Any, text: str, stop_reason: str = "end_turn") -> tuple[BatchItem, tuple[Any, ...]]:
    unfinished = UNFINISHED.get(stop_reason)
    status = RequestStatus.SUCCEEDED if unfinished in (None, TRUNCATED) else RequestStatus.INVALID_OUTPUT
    item = BatchItem("c", status, text, stop_reason, error_type=unfinished)
    return read_item(OutputSchema.parse(given), item)


def read_item(schema: OutputSchema, item: BatchItem) -> tuple[BatchItem, tuple[Any, ...]]:
    """What becomes of one result; the others around it are left alone."""
    good = BatchItem("g", RequestStatus.EXPIRED, error_type="t", error_message="m")
    block, (nothing, values, _) = AnswerReader(schema).read_all(ResultBlock.of([good, item, good]))
    assert block.rows([0, 2]) == ResultBlock.of([good, good]) and set(nothing) == {None}
    (status,), (error_type,), (message,) = block.rows([1]).statuses, block.rows([1]).error_types, block.rows([1]).error_messages
    found = msgspec.structs.replace(item, status=RequestStatus(status), error_type=error_type, error_message=message)
    assert block.rows([1]) == ResultBlock.of([found])
    return found, values


GOOD = {
    "summary": "A lamp.", "size": "small", "stock": 3, "price": 2, "organic": True, "seen_on": "2026-01-02",
    "seen_at": "2026-01-02T03:04:05+02:00", "tags": ["b", "a"], "maker": {"name": "Ö"}, "grade": None,
}  # fmt: skip


def test_a_model_s_fields_are_columns_in_their_order() -> None:
    """Optional fields are of their type; lists and models are JSON."""
    assert kinds(Product) == {
        "summary": "string", "size": "string", "stock": "integer", "price": "number", "organic": "boolean", "seen_on": "date",
        "seen_at": "date-time", "tags": "json", "maker": "json", "grade": "string",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": ["string", "null"]}, "string"),
        ({"type": ["integer", "number"]}, "number"),
        ({"type": ["integer", "string"]}, "json"),
        ({"enum": [True, False, None]}, "boolean"),
        ({"enum": [1, 2]}, "integer"),
        ({"enum": [1.5, 2]}, "number"),
        ({"enum": ["x", 2]}, "json"),
        ({"const": "x"}, "string"),
        ({"type": "null"}, "json"),
        ({"type": "string", "format": "uuid"}, "string"),
        ({"oneOf": [{"type": "boolean"}, {"type": "null"}]}, "boolean"),
        ({"allOf": [{"type": "string", "format": "date"}]}, "date"),
    ],
)
def test_the_kind_of_a_column_follows_from_its_schema(schema: Any, kind: str) -> None:
    """Null makes nothing else of a type; several types are taken as JSON."""
    assert OutputSchema.parse(an_object(a=schema)).columns == (Column("a", kind),)


def test_what_is_sent_is_what_the_sdk_would_send() -> None:
    """For a Pydantic model, but for two things that the API documents to take: a default, and an enum's type."""

    def without_extras(node: Any) -> Any:
        if isinstance(node, dict):
            node = {k: without_extras(v) for k, v in node.items() if k != "default" and not (k == "type" and {"enum", "const"} & set(node))}
            if "description" in node and "{" in node["description"]:
                node["description"] = node["description"].partition("{")[0].strip()
            return {k: v for k, v in node.items() if v != ""}
        return [without_extras(each) for each in node] if isinstance(node, list) else node

    assert without_extras(sent(Product)) == without_extras(anthropic.transform_schema(Product))


def test_properties_are_sent_in_their_order_and_closed() -> None:
    """The model answers in that order, so sorting keys for the digest must not reach it; every object says that it has no others."""
    schema = an_object(zebra={"type": "string"}, apple=an_object(y={"type": "string"}, x={"type": "string"}))
    found = sent(schema)
    assert (list(found["properties"]), list(found["properties"]["apple"]["properties"])) == (["zebra", "apple"], ["y", "x"])
    assert found["additionalProperties"] is found["properties"]["apple"]["additionalProperties"] is False
    assert "additionalProperties" not in schema


def test_bounds_go_into_the_description_and_are_checked_in_the_answers() -> None:
    """The API has no bounds; the model reads them, and an answer beyond them does not fit."""
    schema = an_object(n={"type": "integer", "minimum": 1, "maximum": 3, "description": "How many."})
    assert sent(schema)["properties"]["n"] == {"type": "integer", "description": "How many.\n\n{minimum: 1, maximum: 3}"}
    assert read(schema, '{"n": 3}')[1] == (3,)
    assert read(schema, '{"n": 4}')[0].error_message == "The answer does not fit output_schema: Expected `int` <= 3 - at `$.n`"


class Tree(BaseModel):
    children: list[Tree]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("a string", "must be a JSON Schema"),
        ({"type": "array", "items": {"type": "string"}}, r"\$ must be an object whose properties are the columns"),
        (an_object(), r"\$ is an object without properties"),
        (Tree, "within itself; the API takes no recursive schemas"),
        (an_object(a={}), r"\$.a needs a type"),
        (an_object(a={"type": "text"}), r"\$.a needs a type"),
        (an_object(a={"type": "object", "additionalProperties": {"type": "string"}}), r"\$.a is a mapping with any keys"),
        (an_object(a={"type": "array"}), r"\$.a is an array without items"),
        (an_object(a={"type": "string", "not": {}}), r"\$.a uses not"),
        (an_object(a={"enum": []}), r"\$.a needs an enum"),
        (an_object(a={"enum": [2**70]}), "cannot be checked"),
        (an_object(a={"anyOf": []}), r"\$.a has anyOf without members"),
        (an_object(a={"allOf": [{"type": "string"}] * 2}), r"\$.a has allOf with several members"),
        (an_object(a={"$ref": "#/$defs/b"}), r"\$.a refers to '#/\$defs/b'"),
        (an_object(a={"type": "string", "pattern": "("}), r"\$.a has the pattern '\('"),
        (an_object(a={"type": "string", "minLength": -1}), "cannot be checked"),
        ({**an_object(a={"type": "string"}), "required": ["b"]}, r"\$ requires b"),
        (an_object(**{"a b": {"type": "string"}}), "the property 'a b' cannot be a column"),
        (an_object(**{"a" * 64: {"type": "string"}}), "cannot be a column"),
        (an_object(batchkit_key={"type": "string"}), "the property 'batchkit_key' cannot be a column"),
        (an_object(a={"type": "string"}, A={"type": "string"}), "'a' and 'A' would be one column"),
        ({**an_object(a={"type": "string"}), "examples": [object()]}, "cannot be written as JSON"),
    ],
)
def test_a_schema_that_cannot_be_asked_for_or_land_is_refused(given: Any, problem: str) -> None:
    """With the place and the reason, before anything is sent."""
    with pytest.raises(BatchInputError, match=problem) as caught:
        OutputSchema.parse(given)
    assert "Nothing was sent." in str(caught.value)


def test_an_answer_becomes_values() -> None:
    """Dates are dates, times are UTC, a whole number is a number too, nested values are JSON text, what is absent is None."""
    item, values = read(Product, json.dumps(GOOD))
    assert item.status is RequestStatus.SUCCEEDED
    seen = dt.datetime(2026, 1, 2, 1, 4, 5, tzinfo=dt.UTC)
    assert values == ("A lamp.", "small", 3, 2.0, True, dt.date(2026, 1, 2), seen, '["b","a"]', '{"name":"Ö"}', None)
    assert isinstance(values[3], float)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stock": 1.5}, "Expected `int`, got `float` - at `$.stock`"),
        ({"stock": "1"}, "Expected `int`, got `str` - at `$.stock`"),
        ({"stock": -1}, "Expected `int` >= 0 - at `$.stock`"),
        ({"stock": 2**63}, "at `$.stock`"),
        ({"organic": 1}, "Expected `bool`, got `int` - at `$.organic`"),
        ({"size": "huge"}, "Invalid enum value 'huge' - at `$.size`"),
        ({"seen_on": "2026-02-30"}, "Invalid RFC3339 encoded date - at `$.seen_on`"),
        ({"seen_at": "2026-01-02T03:04:05"}, "Expected `datetime` with a timezone component - at `$.seen_at`"),
        ({"seen_at": "0001-01-01T00:00:00+14:00"}, "date value out of range"),
        ({"summary": "x" * 41}, "Expected `str` of length <= 40 - at `$.summary`"),
        ({"tags": [1]}, "Expected `str`, got `int` - at `$.tags[0]`"),
        ({"maker": {}}, "Object missing required field `name` - at `$.maker`"),
        ({"maker": {"name": "x", "town": "y"}}, "Object contains unknown field `town` - at `$.maker`"),
        ({"maker": {"name": "x", "founded": "long ago"}}, "Invalid RFC3339 encoded date - at `$.maker.founded`"),
        ({"colour": "red"}, "Object contains unknown field `colour`"),
    ],
)
def test_an_answer_that_does_not_fit_says_where_and_why(change: dict[str, Any], reason: str) -> None:
    """It keeps its text, and has no values."""
    text = json.dumps({**GOOD, **change})
    item, values = read(Product, text)
    assert (item.status, item.error_type, item.text) == (RequestStatus.INVALID_OUTPUT, "invalid_output", text)
    assert reason in (item.error_message or "")
    assert values == (None,) * 10


@pytest.mark.parametrize(
    ("text", "stop_reason", "error_type"),
    [
        ('{"summary": "A la', "max_tokens", "truncated"),
        ('{"summary": "A la', "model_context_window_exceeded", "truncated"),
        ("", "refusal", "refused"),
        (json.dumps(GOOD), "refusal", "refused"),
        ('{"summary": "A la', "end_turn", "invalid_output"),
        ("Here it is:", "end_turn", "invalid_output"),
        ("", "end_turn", "invalid_output"),
    ],
)
def test_cut_refused_and_other_answers_are_told_apart(text: str, stop_reason: str, error_type: str) -> None:
    """By the API's stop_reason, which is kept; a refusal is none the less one when it fits."""
    item, _ = read(Product, text, stop_reason)
    assert (item.status, item.error_type, item.stop_reason) == (RequestStatus.INVALID_OUTPUT, error_type, stop_reason)


def test_an_answer_that_is_whole_at_the_last_token_fits() -> None:
    """JSON that is cut is no JSON; so what reads well was not cut."""
    assert read(Product, json.dumps(GOOD), "max_tokens")[0].status is RequestStatus.SUCCEEDED


def test_a_nul_character_is_replaced_and_an_escaped_backslash_is_not() -> None:
    """PostgreSQL holds none, in text or JSON; \\\\u0000 in JSON is a backslash and five characters."""
    schema = an_object(a={"type": "string"}, b={"type": "array", "items": {"type": "string"}})
    assert read(schema, r'{"a": "x\u0000y", "b": ["\\u0000", "\\\u0000"]}')[1] == ("x\ufffdy", r'["\\u0000","\\' + '\ufffd"]')


def test_values_of_several_types_may_be_absent_at_any_depth() -> None:
    """What may be of several types is taken as it comes; what is optional and absent is NULL, or is not in the nested JSON."""
    several = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    schema = {"type": "object", "properties": {"a": several, "b": {"type": "object", "properties": {"c": several, "d": {"type": "null"}}}}}
    assert read(schema, '{"a": "x", "b": {"c": 1}}')[1] == ('"x"', '{"c":1}')
    assert read(schema, '{"b": {"d": null}}')[1] == (None, '{"d":null}')
    assert read(schema, "{}")[1] == (None, None)


def test_a_failed_request_is_passed_through() -> None:
    """Only answers are read."""
    item = BatchItem("c", RequestStatus.EXPIRED)
    assert read_item(OutputSchema.parse(Product), item) == (item, (None,) * 10)


def test_a_schema_is_the_same_after_its_way_through_the_ledger() -> None:
    """Its text gives the same columns and checks, with the bounds that are not sent."""
    schema = OutputSchema.parse(Product)
    again = OutputSchema(schema.text)
    assert (again.text, again.columns) == (schema.text, schema.columns)
    item = BatchItem("c", RequestStatus.SUCCEEDED, json.dumps({**GOOD, "stock": -1}), "end_turn")
    assert read_item(again, item)[0].status is RequestStatus.INVALID_OUTPUT
    assert copy.deepcopy(schema).columns == schema.columns


def test_a_schema_joins_the_other_output_settings_and_excludes_another_format() -> None:
    """``effort`` stays; a format of the params, of either API, is refused before anything is sent."""
    output_format = OutputSchema.parse(Product).format
    merged = RequestDefaults(params={"output_config": {"effort": "low"}}, output_format=output_format).merged({})
    assert merged["output_config"] == {"effort": "low", "format": output_format}
    refused: list[dict[str, Any]] = [{"output_config": {"format": {"type": "json_schema", "schema": {}}}}, {"output_format": {}}]
    for own in refused:
        with pytest.raises(RequestError, match="leave one of them out"):
            RequestDefaults(output_format=output_format).merged(own)

"""Names in params and names of models: what is misspelt or another vendor's is refused before anything is sent."""

from __future__ import annotations

import re
from typing import Any

import pytest

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError
from airflow_provider_batchkit.request.build import RequestBuilder, RequestDefaults
from airflow_provider_batchkit.request.params import ParamNames, check_params, parse_allowed
from airflow_provider_batchkit.request.template import RowTemplate

GOOD: dict[str, Any] = {"model": "claude-haiku-5-5", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
TOOL = {"name": "look_up", "description": "…", "input_schema": {"type": "object", "properties": {"a": {}}, "additionalProperties": False}}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_token": 5}, "params has 'max_token', which the Messages API does not know; the nearest is 'max_tokens'"),
        ({"Temperature": 0}, "params has 'Temperature'.*the nearest is 'temperature'"),
        ({"stop": ["x"]}, "params has 'stop'"),
        ({"n": 2}, r"params has 'n'.*; there are cache_control, container"),
        (
            {"extra_body": {"verbosity": 1}},
            "'extra_body' in params is an argument of the SDK's own calls: put the parameters that it holds",
        ),
        ({"extra_headers": {}}, "'extra_headers' in params is an argument of the SDK's own calls: headers belong to the connection"),
        ({"timeout": 3}, "'timeout' in params is an argument of the SDK's own calls"),
        ({"betas": []}, "'betas' in params is sent as the header anthropic-beta"),
        ({"workspace_id": "wrkspc_1"}, "'workspace_id' in params is sent as a header"),
        ({"custom_id": "a"}, "'custom_id' in params stands beside params"),
        ({"mcp_servers": []}, "'mcp_servers' is a parameter of the beta API: it needs the header anthropic-beta"),
        ({"thinking": {"type": "enabled", "budget_token": 1024}}, "thinking has 'budget_token'.*the nearest is 'budget_tokens'"),
        ({"thinking": {"budget_token": 1024}}, "thinking has 'budget_token'"),
        ({"output_config": {"efort": "low"}}, "output_config has 'efort'.*the nearest is 'effort'"),
        (
            {"output_config": {"format": {"type": "json_schema", "shema": {}}}},
            r"output_config\.format has 'shema'.*'output_config\.format\.shema'",
        ),
        ({"metadata": {"userid": "1"}}, "metadata has 'userid'.*the nearest is 'user_id'"),
        (
            {"system": [{"type": "text", "text": "x", "cache_controll": {}}]},
            r"system\[0\] has 'cache_controll'.*add 'system.cache_controll'",
        ),
        (
            {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "tll": "1h"}}]},
            r"system\[0\]\.cache_control has 'tll'",
        ),
        ({"tools": [TOOL, {**TOOL, "descripton": "x"}]}, r"tools\[1\] has 'descripton'.*the nearest is 'description'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_use": 1}]}, r"tools\[0\] has 'max_use'"),
        ({"tool_choice": {"type": "tool", "nam": "look_up"}}, "tool_choice has 'nam'"),
        ({"model": "anthropic/claude-haiku-5-5"}, "another vendor's name; the Messages API calls it 'claude-haiku-5-5'"),
    ],
)
def test_a_name_that_the_sdk_does_not_know_is_refused_with_the_nearest_one(more: dict[str, Any], message: str) -> None:
    """At the top and where a parameter's type tells what it holds; nothing has been sent."""
    names = ParamNames()
    for _ in range(2):  # what was refused once is refused again
        with pytest.raises(RequestError, match=message) as error:
            check_params({**GOOD, **more}, names)
    assert "Nothing was sent" in str(error.value)


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "stream": False, "service_tier": "auto", "inference_geo": "us"},
        {"system": "text", "metadata": {"user_id": "1"}, "stop_sequences": ["a"], "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {
            "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
            "tools": [TOOL],
            "tool_choice": {"type": "auto"},
        },
        {
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "output_config": {"format": {"type": "json_schema", "schema": {"a": {"b": 1}}}},
        },
        {"thinking": {"type": "of_next_year", "depth": 3}, "tools": [{"type": "oracle_20300101", "name": "oracle", "questions": 3}]},
        {"tools": [{**TOOL, "type": "custom"}], "container": "abc"},
        {"messages": [{"role": "user", "content": [{"type": "new_block", "anything": 1}]}]},
    ],
)
def test_what_the_api_takes_passes(more: dict[str, Any]) -> None:
    """Also kinds of blocks, tools and thinking that are newer than the SDK, whose names nobody can know."""
    check_params({**GOOD, **more})


def test_a_value_that_cannot_be_encoded_does_not_hide_a_name() -> None:
    """A set is no JSON, and the misspelt name beside it is told first."""
    with pytest.raises(RequestError, match="max_token"):
        check_params({**GOOD, "metadata": {"user_id": {1}}, "max_token": 5})


def test_newer_names_are_let_through_by_name() -> None:
    """A nested one with its path; the others stay refused."""
    names = ParamNames(["verbosity", "output_config.verbosity", "tools.weight"])
    check_params({**GOOD, "verbosity": 1, "output_config": {"verbosity": 1}, "tools": [{**TOOL, "weight": 1}]}, names)
    with pytest.raises(RequestError, match="thinking has 'verbosity'"):
        check_params({**GOOD, "thinking": {"type": "adaptive", "verbosity": 1}}, names)
    check_params({**GOOD, "anything": 1, "model": "anthropic/claude-haiku-5-5"}, ParamNames(allowed=True))


def test_the_beta_api_takes_more() -> None:
    """Where the client sends the header; and it has names of its own to misspell."""
    beta = ParamNames(beta=True)
    check_params({**GOOD, "mcp_servers": [{"type": "url", "url": "https://a", "name": "a"}], "output_format": {}}, beta)
    with pytest.raises(RequestError, match=re.escape("mcp_servers[0] has 'nam'")):
        check_params({**GOOD, "mcp_servers": [{"type": "url", "url": "https://a", "nam": "a"}]}, beta)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [(None, []), ("", []), ("False", False), ("true", True), ("verbosity", ["verbosity"]), ("a, b.c\n d", ["a", "b.c", "d"])],
)
def test_the_configuration_gives_a_boolean_or_names(text: str | None, allowed: Any) -> None:
    """Names with commas, spaces or lines between."""
    assert parse_allowed(text) == allowed


def test_a_single_string_is_no_list_of_names() -> None:
    """It would allow its letters."""
    with pytest.raises(BatchInputError, match="allow_unknown_params must be True, or a list of names, not 'verbosity'"):
        ParamNames("verbosity")


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ("anthropic/claude-haiku-5-5", "claude-haiku-5-5"),
        ("openrouter/anthropic/claude-sonnet-4.6", "claude-sonnet-4-6"),
        ("anthropic/claude-sonnet-4.6:beta", "claude-sonnet-4-6"),
        ("anthropic:claude-opus-5", "claude-opus-5"),
        ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "claude-sonnet-4-5-20250929"),
        ("anthropic.claude-opus-4-6-v1", "claude-opus-4-6"),
        ("bedrock/global.anthropic.claude-opus-4-8", "claude-opus-4-8"),
        ("arn:aws:bedrock:us-east-1:1234:inference-profile/eu.anthropic.claude-opus-4-8-v1:0", "claude-opus-4-8"),
        ("claude-haiku-4-5@20251001", "claude-haiku-4-5-20251001"),
        ("claude-opus-4-8@default", "claude-opus-4-8"),
        ("publishers/anthropic/models/claude-opus-4-8", "claude-opus-4-8"),
        ("vertex_ai/claude-3-5-sonnet-v2@20241022", "claude-3-5-sonnet-20241022"),
    ],
)
def test_another_vendors_name_of_a_model_is_refused_with_the_right_one(given: str, own: str) -> None:
    """As the model of a job, in its params, of a native request, and inside a tool."""
    message = re.escape(f"the model {given!r} has another vendor's name; the Messages API calls it {own!r}")
    native = {"custom_id": "a", "params": {**GOOD, "model": given}}
    for defaults, item in [
        (RequestDefaults(given, 5), "hello"),
        (RequestDefaults(None, 5, params={"model": given}), "hello"),
        (RequestDefaults("claude-haiku-5-5", 5), native),
    ]:
        with pytest.raises(RequestError, match=message):
            RequestBuilder(defaults).build(item, 0)
    row = RequestBuilder(RequestDefaults(given, 5), key=["k"], prompt=RowTemplate("{{ row.k }}", name="prompt"), job_id="0" * 20)
    with pytest.raises(RequestError, match=message):
        row.build_all([{"k": 1}], 0)
    advisor = {"type": "advisor_20260301", "name": "advisor", "model": given}
    with pytest.raises(RequestError, match=message):
        check_params({**GOOD, "tools": [advisor]}, ParamNames(beta=True))


@pytest.mark.parametrize("model", ["claude-haiku-5-5", "claude-haiku-4-5-20251001", "claude-2.1", "claude-instant-v1", "my-own", "gpt-9"])
def test_any_other_name_is_for_the_api_to_judge(model: str) -> None:
    """Also one that is no model of today."""
    check_params({**GOOD, "model": model})


def test_native_requests_are_checked_each() -> None:
    """A good one before it, and the same names in another nesting, hide nothing."""
    builder = RequestBuilder(RequestDefaults())
    items = [{"custom_id": f"r{i}", "params": {**GOOD, "thinking": {"type": "enabled", "budget_tokens": 1024}}} for i in range(50)]
    items.append({"custom_id": "odd", "params": {**GOOD, "thinking": {"type": "enabled", "budget_token": 1024}}})
    with pytest.raises(RequestError, match=r"request 50 \('odd'\): thinking has 'budget_token'"):
        list(builder.pieces(items))

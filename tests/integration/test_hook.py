"""The hook's two clients: of one connection, the synchronous one of the official provider and the asynchronous one of our own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from airflow.providers.anthropic.exceptions import AnthropicError

from airflow_provider_batchkit.hooks.batchkit import BatchKitHook

IDENTITY = {"identity_token_file": "/nowhere/token", "federation_rule_id": "fdrl_1", "organization_id": "o", "service_account_id": "svac_1"}
AWS = {"platform": "aws", "anthropic_client_kwargs": {"api_key": "k", "workspace_id": "wrkspc_1"}}
#: what a connection says → the part of its URI before the extra, and its extra
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "a key": (":secret@", {}),
    "a key and a gateway": (":secret@gateway.example", {}),
    "options of the client": (
        ":secret@gateway.example",
        {"anthropic_client_kwargs": {"api_key": "k", "base_url": "http://other.example", "max_retries": 7, "timeout": 12.5}},
    ),
    "a header": (":secret@", {"anthropic_client_kwargs": {"default_headers": {"x-team": "catalog"}}}),
    "the environment": ("", {}),
    "a workload's identity": ("", {"workload_identity": IDENTITY}),
    "Claude Platform on AWS": ("", {**AWS, "aws_region": "eu-central-1"}),
}


def connect(monkeypatch: pytest.MonkeyPatch, before: str, extra: dict[str, Any]) -> BatchKitHook:
    monkeypatch.setenv("AIRFLOW_CONN_ANTHROPIC_DEFAULT", f"anthropic://{before}/?__extra__={quote(json.dumps(extra))}")
    return BatchKitHook()


def face(client: Any) -> dict[str, Any]:
    """What tells two clients apart, without the prefix of the asynchronous one's class."""
    names = ("api_key", "auth_token", "base_url", "max_retries", "timeout", "workspace_id", "aws_region")
    shown = {name: getattr(client, name, None) for name in names}
    headers = {name: value for name, value in client.default_headers.items() if isinstance(value, str) and "async" not in value.lower()}
    headers.pop("User-Agent", None)
    return {"class": type(client).__name__.removeprefix("Async"), **shown, "headers": headers}


@pytest.mark.parametrize("way", WAYS)
def test_both_clients_say_who_they_are_in_the_same_way(airflow_db: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A trigger sees the batches of the task that waits for them."""
    if way == "the environment":
        monkeypatch.setenv("ANTHROPIC_API_KEY", "of-the-environment")
    hook = connect(monkeypatch, *WAYS[way])
    one, other = face(hook.conn), face(asyncio.run(hook.get_async_conn()))
    for headers in (one["headers"], other["headers"]):
        headers.pop("X-Stainless-Async", None)
    assert one == other


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"platform": "bedrock"}, "not available on the 'bedrock' platform"),
        ({"platform": "mars"}, "not available on the 'mars' platform"),
        ({"workload_identity": {**IDENTITY, "organization_id": ""}}, "lacks organization_id"),
    ],
)
def test_a_connection_that_cannot_work_is_an_error_that_says_why(
    airflow_db: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], says: str
) -> None:
    """The message names the platform or the field."""
    hook = connect(monkeypatch, "", extra)
    with pytest.raises(AnthropicError, match=says):
        asyncio.run(hook.get_async_conn())
    if "platform" in extra:
        with pytest.raises(AnthropicError, match=says):
            _ = hook.kit


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("timeout", "600"),
        ("timeout", [5, 600]),
        ("timeout", True),
        ("timeout", 0),
        ("max_retries", "2"),
        ("max_retries", 1.5),
        ("max_retries", -1),
    ],
)
def test_an_option_of_the_client_that_is_no_number_is_found_at_once(
    airflow_db: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: Any
) -> None:
    """The client takes it, and would fail in the middle of a call: the journal is written then, or the batch is paid."""
    hook = connect(monkeypatch, ":secret@", {"anthropic_client_kwargs": {option: value}})
    with pytest.raises(AnthropicError, match=f"anthropic_client_kwargs of the connection: {option} must be"):
        _ = hook.kit
    with pytest.raises(AnthropicError, match=f"{option} must be"):
        asyncio.run(hook.get_async_conn())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, "5") for name in ("Content-Length", "content-length", "Transfer-Encoding", "Content-Encoding", "Range", "If-None-Match")],
        ("Content-Type", "text/plain"),
        ("Accept-Encoding", "br"),
        ("x-team", 5),
        ("x-team", None),
        ("x-team", "catalog\n"),
        ("x-team", "Größe"),
        ("x team", "catalog"),
    ],
)
def test_a_header_with_which_some_calls_cannot_work_is_found_at_once(
    airflow_db: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    """With Content-Length a batch is created and paid, and its results cannot be read."""
    hook = connect(monkeypatch, ":secret@", {"anthropic_client_kwargs": {"default_headers": {name: value}}})
    with pytest.raises(AnthropicError, match=f"header '{name}' cannot be sent with every call"):
        _ = hook.kit
    with pytest.raises(AnthropicError, match="cannot be sent"):
        asyncio.run(hook.get_async_conn())


def test_a_key_with_a_line_break_is_found_at_once_and_not_shown(airflow_db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was pasted with the end of its line."""
    hook = connect(monkeypatch, "", {"anthropic_client_kwargs": {"api_key": "sk-secret\n"}})
    with pytest.raises(AnthropicError, match="cannot be sent with every call") as caught:
        _ = hook.kit
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Host", "api.example"),
        ("x-api-key", "another"),
        ("authorization", "Bearer gateway"),
        ("Accept-Encoding", "gzip;q=0.5, identity"),
        ("content-type", "application/json; charset=utf-8"),
        ("connection", "close"),
        ("anthropic-beta", "x"),
    ],
)
def test_a_header_that_a_gateway_may_need_stays(airflow_db: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Both clients send it."""
    hook = connect(monkeypatch, ":secret@", {"anthropic_client_kwargs": {"default_headers": {name: value}}})
    assert hook.kit.client.default_headers[name] == value
    assert asyncio.run(hook.get_async_conn()).default_headers[name] == value

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

"""The hook: the batch engine on the official Anthropic connection.

It uses only public names of the official provider. The provider has no public way to make an async client from a connection that has
already been read: its ``get_async_conn``, which exists from 1.2 on, reads parts of the connection synchronously. So :func:`_async_client`
makes the client from the fields that the documentation of ``AnthropicHook`` names.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from airflow.providers.anthropic.exceptions import AnthropicError
from airflow.providers.anthropic.hooks.anthropic import FIRST_PARTY_PLATFORMS, AnthropicHook
from airflow.providers.common.compat.sdk import Connection

from airflow_provider_batchkit.hooks.request_lines import lower_request_lines
from airflow_provider_batchkit.hooks.settings import absence_seconds, allowed_params, configured_prices

if TYPE_CHECKING:
    from anthropic import Anthropic, AsyncAnthropic, WorkloadIdentityCredentials

    from airflow_provider_batchkit.kit import BatchKit


#: Headers that describe a single message, or ask for a part of an answer. Given for all calls, they break some: a download waits for a body
#: that never comes, or ends early.
_OF_ONE_MESSAGE = frozenset({"content-length", "transfer-encoding", "content-encoding", "te", "trailer", "upgrade", "expect", "range"})
#: headers that the client sets, and what they may be instead
_FIXED = {"content-type": re.compile(r"application/json\b.*"), "accept-encoding": re.compile(r"(?:(?:gzip|deflate|identity)\b[^,]*,?\s*)+")}
#: RFC 9110: names, and values of visible ASCII without blanks at the ends
_HEADER_NAME, _HEADER_VALUE = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+"), re.compile(r"(?:[!-~](?:[\t -~]*[!-~])?)?")


@dataclass(frozen=True, slots=True)
class _ConnectionValues:
    """The fields of an ``anthropic`` connection."""

    host: str | None
    password: str | None
    extra: dict[str, Any]

    @property
    def platform(self) -> str:
        return str(self.extra.get("platform") or "anthropic").lower()


class BatchKitHook(AnthropicHook):
    """Message batches over an ``anthropic`` connection, with every way to authenticate that the official hook has.

    ``hook.kit`` is a :class:`~airflow_provider_batchkit.kit.BatchKit`; everything of ``AnthropicHook`` works as well.

    :param anthropic_conn_id: connection of type ``anthropic``; its ``extra["model"]`` is the default model
    """

    conn_name_attr = "anthropic_conn_id"

    def __init__(self, anthropic_conn_id: str = AnthropicHook.default_conn_name, **kwargs: Any) -> None:
        super().__init__(anthropic_conn_id, **kwargs)
        self.anthropic_conn_id = anthropic_conn_id

    @cached_property
    def kit(self) -> BatchKit:
        """The batch engine on this connection, with the prices of Airflow's configuration.

        :raises BatchInputError: when ``[batchkit] price_overrides`` names a file that cannot be used
        :raises AnthropicError: on a platform that does not serve the Message Batches API (Bedrock, Vertex, Foundry), for an option of
            the client that is no number where one is needed, and for a header with which some calls cannot work
        """
        from airflow_provider_batchkit.kit import BatchKit

        _refuse_other_platforms(self.platform)
        client = cast("Anthropic", self.conn)
        _refuse_odd_options(client)
        lower_request_lines(client.base_url)
        kit = BatchKit(client, price_book=configured_prices(), allow_unknown_params=allowed_params())
        kit.absence_s = absence_seconds()
        return kit

    async def get_async_conn(self) -> AsyncAnthropic:
        """A new async client, with the connection and its extra read without blocking the event loop. The caller closes it.

        :raises AnthropicError: as :attr:`kit` does
        """
        connection = await self._read_connection_async()
        # making a client reads the CA certificates, which takes 30 ms, and perhaps credential files, so it runs outside the event loop
        client = await asyncio.to_thread(_async_client, connection)
        _refuse_odd_options(client)
        lower_request_lines(client.base_url)
        return client

    async def _read_connection_async(self) -> _ConnectionValues:
        if hasattr(Connection, "aextra_dejson"):
            connection = await self.aget_connection(self.conn_id)
            return _ConnectionValues(connection.host, connection.password, await connection.aextra_dejson())
        # Before 3.3.2, Airflow's own async lookup masks secrets with a blocking call, which fails beside another lookup on the same loop.
        # asgiref's threads pass their messages to the supervisor through that loop; the threads of asyncio.to_thread do not.
        from asgiref.sync import sync_to_async

        return await sync_to_async(self._read_connection)()

    def _read_connection(self) -> _ConnectionValues:
        connection = self.get_connection(self.conn_id)
        return _ConnectionValues(connection.host, connection.password, connection.extra_dejson)


def _refuse_other_platforms(platform: str) -> None:
    if platform not in FIRST_PARTY_PLATFORMS:
        raise AnthropicError(
            f"The Message Batches API is not available on the {platform!r} platform. Use the first-party Anthropic API "
            "(platform='anthropic') or Claude Platform on AWS (platform='aws')."
        )


def _refuse_odd_options(client: Anthropic | AsyncAnthropic) -> None:
    """The client takes any value for these, and fails with it in the middle of a call: after the journal was written, or the batch paid."""
    import httpx2
    from anthropic import Omit

    timeout: object = client.timeout
    retries: object = client.max_retries
    if not (timeout is None or isinstance(timeout, httpx2.Timeout) or (_is_number(timeout) and timeout > 0)):
        raise AnthropicError(f"anthropic_client_kwargs of the connection: timeout must be a number of seconds above 0, not {timeout!r}.")
    if not (_is_number(retries) and isinstance(retries, int) and retries >= 0):
        raise AnthropicError(f"anthropic_client_kwargs of the connection: max_retries must be a whole number, 0 or more, not {retries!r}.")

    for name, value in client.default_headers.items():
        if not isinstance(value, Omit):
            _refuse_header(name, value)


def _refuse_header(name: str, value: object) -> None:
    """:raises AnthropicError: for a header with which some calls cannot work. The value may be a secret and is not shown."""
    known = name.lower()
    if not isinstance(value, str) or not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
        why = "its value must be a text of printable ASCII characters, without blanks or line breaks at its ends"
    elif known in _OF_ONE_MESSAGE or known.startswith("if-"):
        why = "it is about a single message, and would break other calls"
    elif known in _FIXED and not _FIXED[known].fullmatch(value.lower()):
        why = "the client sets it to what it can read and write"
    else:
        return
    raise AnthropicError(
        f"The connection's header {name!r} cannot be sent with every call: {why}. Look at default_headers in its anthropic_client_kwargs, "
        "at its key, and at ANTHROPIC_CUSTOM_HEADERS. Nothing was sent."
    )


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _async_client(connection: _ConnectionValues) -> AsyncAnthropic:
    """The async counterpart of the client that ``AnthropicHook.get_conn`` makes. It is bound to no event loop before its first call."""
    from anthropic import AsyncAnthropic, AsyncAnthropicAWS

    _refuse_other_platforms(connection.platform)
    options = dict(connection.extra.get("anthropic_client_kwargs") or {})
    if connection.platform == "aws":
        return AsyncAnthropicAWS(aws_region=connection.extra.get("aws_region"), **options)
    options["base_url"] = options.get("base_url") or connection.host or None
    if identity := connection.extra.get("workload_identity"):
        return AsyncAnthropic(credentials=_credentials(identity), **options)
    # without a key, the SDK reads its credentials from the environment
    options["api_key"] = options.get("api_key") or connection.password or None
    return AsyncAnthropic(**options)


def _credentials(identity: dict[str, Any]) -> WorkloadIdentityCredentials:
    from anthropic import IdentityTokenFile, WorkloadIdentityCredentials

    missing = [name for name in ("identity_token_file", "federation_rule_id", "organization_id") if not identity.get(name)]
    if missing:
        raise AnthropicError(f"The workload_identity configuration lacks {', '.join(missing)}.")
    names = ("federation_rule_id", "organization_id", "service_account_id", "workspace_id", "scope")
    return WorkloadIdentityCredentials(
        identity_token_provider=IdentityTokenFile(identity["identity_token_file"]),
        **{name: identity[name] for name in names if identity.get(name)},
    )

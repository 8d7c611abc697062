"""The hook: the official Anthropic connection, and on it the batch engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.providers.anthropic.hooks.anthropic import AnthropicHook
from airflow.providers.common.compat.sdk import AirflowException, BaseHook, Connection, conf

from airflow_provider_batchkit.exceptions import BatchInputError

if TYPE_CHECKING:
    from airflow.providers.anthropic.hooks.anthropic import AsyncAnthropicClient
    from sqlalchemy.engine import Engine

    from airflow_provider_batchkit.cost.prices import PriceBook
    from airflow_provider_batchkit.jobs.settle import SettleTimes
    from airflow_provider_batchkit.kit import BatchKit
    from airflow_provider_batchkit.request.failures import Failures


@dataclass(frozen=True)
class _ConnectionValues:
    """The fields of a connection that the official hook reads, resolved beforehand."""

    host: str | None
    password: str | None
    extra_dejson: dict[str, Any]


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
        :raises AnthropicError: on a platform that does not serve the Message Batches API (Bedrock, Vertex, Foundry)
        """
        from airflow_provider_batchkit.kit import BatchKit
        from airflow_provider_batchkit.request.params import parse_allowed

        self._require_first_party("The Message Batches API")
        kit = BatchKit(
            self._first_party_conn,
            price_book=configured_prices(),
            allow_unknown_params=parse_allowed(conf.get("batchkit", "allow_unknown_params", fallback=None)),
        )
        kit.absence_s = absence_seconds()
        return kit

    async def get_async_conn(self) -> AsyncAnthropicClient:
        """The async client, with the connection and its extra read without blocking the event loop.

        The official hook has this method from 1.2 on, and reads ``extra_dejson`` synchronously in it, which on a busy triggerer may fail
        (common-compat's documentation of ``get_async_extra_dejson``).

        :raises AnthropicError: on a platform that does not serve the Message Batches API, with an official hook older than 1.2
        """
        if "_connection" not in self.__dict__:
            self.__dict__["_connection"] = await self._resolved_connection()
        # Making a client reads the CA certificates for 30 ms and may read credential files, so it is not done on the event loop.
        return await asyncio.to_thread(self._async_client)

    async def _resolved_connection(self) -> _ConnectionValues:
        if hasattr(Connection, "aextra_dejson"):
            connection = await self.aget_connection(self.conn_id)
            return _ConnectionValues(connection.host, connection.password, await connection.aextra_dejson())
        # Before 3.3.2, Airflow's own async lookup masks secrets with a blocking call, which fails beside another lookup on the same loop.
        # asgiref's threads, unlike those of asyncio.to_thread, hand what they send to the supervisor to that loop.
        from asgiref.sync import sync_to_async

        return await sync_to_async(self._read_connection)()

    def _read_connection(self) -> _ConnectionValues:
        connection = self.get_connection(self.conn_id)
        return _ConnectionValues(connection.host, connection.password, connection.extra_dejson)

    def _async_client(self) -> AsyncAnthropicClient:
        """The async twin of :meth:`get_conn`'s client. It is bound to no event loop before its first call."""
        if hasattr(AnthropicHook, "get_async_conn"):
            return asyncio.run(super().get_async_conn())  # it awaits nothing, since the connection is resolved
        from anthropic import AsyncAnthropic, AsyncAnthropicAWS

        self._require_first_party("The Message Batches API")
        extra = self._connection.extra_dejson
        options = dict(extra.get("anthropic_client_kwargs", {}))
        if self.platform == "aws":
            return self._build_aws_client(AsyncAnthropicAWS, extra.get("aws_region"), options)
        options["base_url"] = options.get("base_url") or self._connection.host or None
        if identity := extra.get("workload_identity"):
            return AsyncAnthropic(credentials=self._workload_identity_credentials(identity), **options)
        # without a key, the SDK reads its credentials from the environment
        options["api_key"] = options.get("api_key") or self._connection.password or None
        return AsyncAnthropic(**options)


def configured_prices() -> PriceBook:
    """The price book of Airflow's configuration, section ``batchkit``.

    :raises BatchInputError: for an override file that cannot be used
    """
    from airflow_provider_batchkit.cost.prices import PriceBook, load_price_overrides

    path = conf.get("batchkit", "price_overrides", fallback=None)
    if path and not Path(path).is_absolute():
        raise BatchInputError(f"[batchkit] price_overrides must be an absolute path, not {path!r}. Nothing was sent or written.")
    return PriceBook(
        load_price_overrides(path) if path else None,
        live=conf.getboolean("batchkit", "live_prices", fallback=False),
        live_url=conf.get("batchkit", "live_prices_url", fallback=None) or None,
    )


def configured_failures() -> Failures:
    """What says which failures pass, with the patterns of Airflow's configuration.

    :raises BatchInputError: for a pattern that is not valid
    """
    from airflow_provider_batchkit.request.failures import Failures

    return Failures.parse(conf.get("batchkit", "passing_errors", fallback=None))


def absence_seconds() -> float:
    """How long a batch that answers 404 is looked at again before it is called gone, in this deployment."""
    from airflow_provider_batchkit.api.polling import ABSENCE_S

    found: float = conf.getfloat("batchkit", "absence_seconds", fallback=ABSENCE_S)
    return found


def settle_times(settle_seconds: float | None = None) -> SettleTimes:
    """How long a batch that a killed attempt may have sent is looked for, in this deployment.

    :param settle_seconds: of the task; its default where it has none
    """
    from airflow_provider_batchkit.jobs.settle import DEFAULT_TIMES, SettleTimes

    settle_s = DEFAULT_TIMES.settle_s if settle_seconds is None else float(settle_seconds)
    return SettleTimes(settle_s, absence_seconds())


#: what to install for a connection type whose hook is missing
_EXTRAS = {"postgres": "postgres", "sqlite": "sqlite"}


@contextmanager
def sql_engine(conn_id: str) -> Iterator[Engine]:
    """A SQLAlchemy engine of a SQL connection. It keeps one connection open between uses, and looks whether that still lives before it
    is used again; at the end all are closed.

    :raises BatchInputError: when the connection is not of a SQL database, or the provider of its type is not installed
    """
    from airflow.providers.common.sql.hooks.sql import DbApiHook
    from sqlalchemy.pool import QueuePool

    from airflow_provider_batchkit.ledger import prepare_engine

    hook = _hook_of(BaseHook.get_connection(conn_id))
    if not isinstance(hook, DbApiHook):
        raise BatchInputError(f"The connection {conn_id!r} is a {type(hook).__name__}, not a SQL database. Nothing was sent.")
    engine = prepare_engine(hook.get_sqlalchemy_engine({"poolclass": QueuePool, "pool_size": 1, "pool_pre_ping": True}))
    try:
        yield engine
    finally:
        engine.dispose()


def _hook_of(connection: Connection) -> Any:
    try:
        return connection.get_hook()
    except AirflowException as e:
        if not str(e).startswith("Unknown hook type"):
            raise
        kind = connection.conn_type
        package = f"airflow-provider-batchkit[{_EXTRAS[kind]}]" if kind in _EXTRAS else f"apache-airflow-providers-{kind}"
        raise BatchInputError(
            f"The connection {connection.conn_id!r} is of type {kind!r}, and no installed provider has a hook for it. Install "
            f"{'it' if kind in _EXTRAS else 'its provider, for most types'} with: pip install '{package}'. Nothing was sent."
        ) from e

"""Databases of results that are not the ledger's: one contract, one module for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from airflow_provider_batchkit.landing.warehouse.base import Warehouse

__all__ = ["KINDS", "Warehouse", "warehouse_of"]

#: databases that have a module here
KINDS = ("duckdb", "mysql", "postgres", "snowflake", "sqlite")


def warehouse_of(kind: str, conn_id: str, connect: Callable[[], Any]) -> Warehouse:
    """The adapter of a database.

    :param kind: one of :data:`KINDS`
    :param conn_id: its Airflow connection, by which the ledger knows the database
    :param connect: gives a DBAPI connection of its driver
    """
    match kind:
        case "duckdb":
            from airflow_provider_batchkit.landing.warehouse.duckdb import DuckDB

            return DuckDB(conn_id, connect)
        case "mysql":
            from airflow_provider_batchkit.landing.warehouse.mysql import MySQL

            return MySQL(conn_id, connect)
        case "postgres":
            from airflow_provider_batchkit.landing.warehouse.postgres import PostgreSQL

            return PostgreSQL(conn_id, connect)
        case "snowflake":
            from airflow_provider_batchkit.landing.warehouse.snowflake import Snowflake

            return Snowflake(conn_id, connect)
        case "sqlite":
            from airflow_provider_batchkit.landing.warehouse.sqlite import SQLite

            return SQLite(conn_id, connect)
        case _:
            raise ValueError(kind)

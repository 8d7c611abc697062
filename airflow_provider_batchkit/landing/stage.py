"""The stage: a temporary table that holds a batch's rows until one set of statements moves them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection


def create_stage(connection: Connection, columns: Sequence[tuple[str, Any]]) -> sa.Table:
    """A fresh temporary table of this connection; on PostgreSQL it goes with the transaction."""
    stage = sa.Table(
        f"batchkit_stage_{secrets.token_hex(6)}",
        sa.MetaData(),
        *(sa.Column(name, type_, nullable=True, autoincrement=False) for name, type_ in columns),
        prefixes=["TEMPORARY"],
        postgresql_on_commit="DROP",
    )
    stage.create(connection, checkfirst=False)
    return stage

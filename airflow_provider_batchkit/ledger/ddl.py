"""The ledger's tables and views as SQL text, for a database in which an administrator creates the tables."""

from __future__ import annotations

import secrets
from typing import Any

import sqlalchemy as sa

from airflow_provider_batchkit.ledger.rollup import view_statements
from airflow_provider_batchkit.ledger.tables import VERSION, metadata, version


def statements(dialect: str) -> list[str]:
    """The statements that create a ledger on this dialect (``postgresql``, ``sqlite``, ``mysql`` …), in order and without semicolons.

    The last one writes the ledger's version and its random id; each ledger needs its own id. A task that finds both creates nothing.
    """
    found = list[str]()
    engine: Any = sa.create_mock_engine(f"{dialect}://", lambda element, *_, **__: found.append(_text(element, engine.dialect)))
    metadata.create_all(engine, checkfirst=False)
    found.extend(view_statements(engine.dialect))
    first = sa.insert(version).values(version=VERSION, ledger_id=secrets.token_hex(16))
    found.append(str(first.compile(dialect=engine.dialect, compile_kwargs={"literal_binds": True})))
    return found


def _text(element: Any, dialect: sa.Dialect) -> str:
    return str(element.compile(dialect=dialect)).strip()

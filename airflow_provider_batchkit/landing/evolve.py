"""Result tables of every release: the result columns that a landing writes to an existing table, and those that it adds.

The key, the properties of an ``output_schema`` and :data:`REQUIRED` are required. Every other column is written where the table has it,
so a table that an earlier release or somebody else made stays usable. A table that this package made gets the columns that later
releases have added. It is recognized by its columns: the key first, and all of :data:`FIRST_RELEASE` in their order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from airflow_provider_batchkit.landing.columns import result_fits
from airflow_provider_batchkit.landing.existing import ExistingTable
from airflow_provider_batchkit.ledger.engine import write_transaction

log = logging.getLogger(__name__)

REQUIRED = ("response", "status", "custom_id", "batch_id")
FIRST_RELEASE = (
    *("response", "status", "stop_reason", "error_type", "error_message", "model", "input_tokens", "output_tokens", "cost_usd"),
    *("custom_id", "batch_id", "landed_at"),
)
#: seconds for which adding columns waits until others leave the table; after that, the landing goes on without the columns
_LOCK_S = 10


@dataclass(frozen=True, slots=True)
class Layout:
    """How a landing treats the result columns of an existing table."""

    #: result columns that are not written
    left_out: frozenset[str] = frozenset()
    #: left-out columns that can be added to the table
    addable: tuple[str, ...] = ()
    #: the table's own columns with the name of a result column, which are left alone
    not_ours: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: ExistingTable, key_names: Sequence[str], result_names: Sequence[str]) -> Layout:
        """
        :param key_names: names of the key columns; empty where ``custom_id`` is the key
        :param result_names: result columns in their order in a new table
        """
        newer = [name for name in result_names if name not in FIRST_RELEASE]
        lacking = [name for name in newer if not found.has(name)]
        present = [name for name in newer if found.has(name)]
        # this package did not extend a table that has all columns of the first release and only some of the later ones
        own = present if lacking and all(map(found.has, FIRST_RELEASE)) else []
        own = own or [name for name in present if not result_fits(name, found.type_of(name), found.dialect)]
        left_out = {name for name in result_names if name not in REQUIRED and not found.has(name)} | {*own}
        addable = lacking if not own and _is_ours(found, key_names) else []
        return cls(frozenset(left_out), tuple(addable), tuple(own))


def _is_ours(found: ExistingTable, key_names: Sequence[str]) -> bool:
    names = list(map(found.compared, found.columns))
    first = list(map(found.compared, FIRST_RELEASE))
    keys = list(map(found.compared, key_names))
    start = names.index(first[0]) if first[0] in names else len(names)
    return found.is_table and names[: len(keys)] == keys and names[start : start + len(first)] == first


def add_columns(engine: Engine, table: sa.Table, names: Iterable[str]) -> None:
    """Add columns to a table, or log why they are not added: a landing goes on without them."""
    names = list(names)
    quote = engine.dialect.identifier_preparer
    try:
        with write_transaction(engine) as connection:
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_S}s'")
            for name in names:
                kind = table.c[name].type.compile(dialect=engine.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {quote.format_table(table)} ADD COLUMN {quote.quote(name)} {kind}")
    except DBAPIError as e:
        log.warning("%s was not given the columns %s, and what belongs there is not kept: %s", table.fullname, ", ".join(names), e.orig)
    else:
        log.info("%s was made by an earlier release, and has the columns %s from now on", table.fullname, ", ".join(names))

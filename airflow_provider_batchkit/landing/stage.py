"""The stage: a temporary table that holds a batch's rows until one set of statements moves them.

While results are downloaded only the stage is written, which nobody else sees: no lock of the table or the ledger is held meanwhile.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.ledger.bulk import BulkRow, loader_for
from airflow_provider_batchkit.model import BatchItem, RequestStatus, format_pico_exact

#: a chunk is written when it has this many rows (more cost the garbage collector more than they save), or characters of text
_CHUNK_ROWS = 1_000
_CHUNK_CHARACTERS = 4_000_000

#: what differs from row to row, behind the table's key and answer columns; money for the table is text here, which every database takes
#: exactly
_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("response", sa.Text()),
    ("status", sa.String(16)),
    ("stop_reason", sa.String(64)),
    ("error_type", sa.String(100)),
    ("error_message", sa.Text()),
    ("model", sa.String(100)),
    ("input_tokens", sa.BigInteger()),
    ("output_tokens", sa.BigInteger()),
    ("cost_usd", sa.Numeric(38, 12).with_variant(sa.Text(), "sqlite")),
    ("custom_id", sa.String(64)),
    # how the row is known in the ledger, and its exact cost there
    ("batchkit_key", sa.Text()),
    ("batchkit_batch_cost", sa.BigInteger()),
    ("batchkit_standard_cost", sa.BigInteger()),
    # 0 for a row that shares another row's request
    ("batchkit_asked", sa.SmallInteger()),
)


class AskedKeys:
    """The source rows that a batch answers, by ``custom_id``. Resident: two strings a row."""

    def __init__(self, rows: Iterable[tuple[str, str, bool]]) -> None:
        """:param rows: (custom_id, key, asked); of rows that share a request, the one that is asked is billed"""
        self._billed: dict[str, str] = {}
        self._copies: dict[str, list[str]] = {}
        for custom_id, key, asked in rows:
            if custom_id not in self._billed:
                self._billed[custom_id] = key
                continue
            copies = self._copies.setdefault(custom_id, [])
            if asked:
                copies.append(self._billed[custom_id])
                self._billed[custom_id] = key
            else:
                copies.append(key)

    @property
    def custom_ids(self) -> Collection[str]:
        """Every request of the batch."""
        return self._billed

    def billed(self, custom_id: str) -> str:
        """The key of the row that pays for the request."""
        return self._billed[custom_id]

    def copies(self, custom_id: str) -> list[str]:
        """Keys of the other rows that the request answers."""
        return self._copies.get(custom_id, _NONE)


_NONE: list[str] = []


class Stage:
    """A fresh temporary table of a connection, and the rows on their way into it; on PostgreSQL it goes with the transaction."""

    def __init__(self, connection: Connection, table: ResultTable, keys: AskedKeys | None, *, portable: bool = False) -> None:
        """
        :param keys: None for a batch that no ledger knows, whose rows are known by ``custom_id``
        :param portable: use no database's own bulk path
        """
        self.counts: Counter[str] = Counter()
        self._connection = connection
        self._result_table = table
        self._keys = keys
        self._load = loader_for(connection, portable=portable)
        self._rows: list[BulkRow] = []
        self._row_keys: list[str] = []
        self._characters = 0
        key_types = [(c.name, c.type) for c in table.table.columns][: len(table.key_columns)]
        answer_types = [(name, sa.Text() if name in table.json_names else type_) for name, type_ in table.answer_columns]
        self._no_values: BulkRow = (None,) * len(answer_types)
        self.table = sa.Table(
            f"batchkit_stage_{secrets.token_hex(6)}",
            sa.MetaData(),
            *(sa.Column(name, type_, nullable=True, autoincrement=False) for name, type_ in (*key_types, *answer_types, *_COLUMNS)),
            prefixes=["TEMPORARY"],
            postgresql_on_commit="DROP",
        )
        self.table.create(connection, checkfirst=False)

    def put(self, item: BatchItem, cost: tuple[int, int] | None, values: BulkRow | None = None) -> None:
        """Add the rows that one result answers.

        :param cost: batch and standard cost in picodollars; None when it is not known
        :param values: the answer's, in the order of the table's answer columns
        """
        values = self._no_values if values is None else values
        if self._keys is None:
            self._add(item, "", cost, values, asked=1)
            return
        self._add(item, self._keys.billed(item.custom_id), cost, values, asked=1)
        for key in self._keys.copies(item.custom_id):
            self._add(item, key, None if cost is None else (0, 0), values, asked=0)

    def _add(self, item: BatchItem, key: str, cost: tuple[int, int] | None, values: BulkRow, *, asked: int) -> None:
        text, usage = item.text, item.usage
        status = "succeeded" if item.status is RequestStatus.SUCCEEDED else item.status.value
        self.counts[status] += 1
        batch, standard = (None, None) if cost is None else cost
        self._row_keys.append(key)
        self._rows.append(
            (
                *values,
                text,
                status,
                item.stop_reason,
                item.error_type,
                item.error_message,
                item.model,
                None if usage is None else usage.prompt_tokens,
                None if usage is None else usage.output_tokens,
                None if batch is None else format_pico_exact(batch),
                item.custom_id,
                key,
                batch,
                standard,
                asked,
            )
        )
        if text is not None:
            self._characters += len(text)
        if len(self._rows) >= _CHUNK_ROWS or self._characters >= _CHUNK_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self._rows:
            keys = self._result_table.keys_of(self._row_keys)
            self._load(self._connection, self.table, [(*key, *row) for key, row in zip(keys, self._rows, strict=True)])
        self._rows, self._row_keys, self._characters = [], [], 0

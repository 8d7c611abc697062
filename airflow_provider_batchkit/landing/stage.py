"""The stage: a temporary table that holds a batch's rows until one set of statements moves them.

While results are downloaded only the stage is written, which nobody else sees: no lock of the table or the ledger is held meanwhile.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.ledger.bulk import bulk_loader
from airflow_provider_batchkit.model import BatchItem, RequestStatus
from airflow_provider_batchkit.schema.answers import Values
from airflow_provider_batchkit.shards import IndexEntry

#: a chunk is written when it has this many rows (more cost the garbage collector more than they save), or characters of text
_CHUNK_ROWS = 1_000
_CHUNK_CHARACTERS = 4_000_000

#: what differs from row to row, behind the table's key and answer columns
_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("response", sa.Text()),
    ("status", sa.String(16)),
    ("stop_reason", sa.String(64)),
    ("error_type", sa.String(100)),
    ("error_message", sa.Text()),
    ("model", sa.String(100)),
    ("input_tokens", sa.BigInteger()),
    ("output_tokens", sa.BigInteger()),
    ("custom_id", sa.String(64)),
    # how the row is known in the ledger, and its exact cost
    ("batchkit_key", sa.Text()),
    ("batchkit_batch_cost", sa.BigInteger()),
    ("batchkit_standard_cost", sa.BigInteger()),
    # 0 for a row that shares another row's request
    ("batchkit_asked", sa.SmallInteger()),
)


class AskedKeys:
    """The source rows that a batch answers, by ``custom_id``. Resident: two strings a row."""

    def __init__(self, pieces: Iterable[Sequence[IndexEntry]]) -> None:
        """:param pieces: what the batch asks; of rows that share a request, the one that is asked is billed"""
        self._billed: dict[str, str] = {}
        self._copies: dict[str, list[str]] = {}
        for piece in pieces:
            fresh = {entry.custom_id: entry.key for entry in piece}
            if len(fresh) == len(piece) and self._billed.keys().isdisjoint(fresh):
                self._billed.update(fresh)
            else:
                self._add_one_by_one(piece)

    def _add_one_by_one(self, entries: Iterable[IndexEntry]) -> None:
        for entry in entries:
            custom_id, key = entry.custom_id, entry.key
            if custom_id not in self._billed:
                self._billed[custom_id] = key
                continue
            copies = self._copies.setdefault(custom_id, [])
            if entry.asked:
                copies.append(self._billed[custom_id])
                self._billed[custom_id] = key
            else:
                copies.append(key)

    @property
    def custom_ids(self) -> AbstractSet[str]:
        """Every request of the batch."""
        return self._billed.keys()

    def billed(self, custom_ids: Iterable[str]) -> list[str]:
        """The keys of the rows that pay for the requests."""
        billed = self._billed
        return [billed[custom_id] for custom_id in custom_ids]

    def copies(self, custom_id: str) -> list[str]:
        """Keys of the other rows that the request answers."""
        return self._copies.get(custom_id, _NONE)

    @property
    def any_copies(self) -> bool:
        """Whether some rows share a request."""
        return bool(self._copies)


_NONE: list[str] = []
_Cost = tuple[int, int] | None
_UNKNOWN = (None, None)
#: place of the status in ``_COLUMNS``
_STATUS = 1


class Stage:
    """A fresh temporary table of a connection, and the rows on their way into it; on PostgreSQL it goes with the transaction."""

    def __init__(self, connection: Connection, table: ResultTable, keys: AskedKeys | None, *, portable: bool = False) -> None:
        """
        :param keys: None for a batch that no ledger knows, whose rows are known by ``custom_id``
        :param portable: use no database's own bulk path
        """
        self.counts: Counter[str] = Counter()
        self._result_table = table
        self._keys = keys
        self._waiting = _Rows()
        key_types = [(c.name, c.type) for c in table.table.columns][: len(table.key_columns)]
        answer_types = [(name, sa.Text() if name in table.json_names else type_) for name, type_ in table.answer_columns]
        self._no_values: Values = (None,) * len(answer_types)
        self.table = sa.Table(
            f"batchkit_stage_{secrets.token_hex(6)}",
            sa.MetaData(),
            *(sa.Column(name, type_, nullable=True, autoincrement=False) for name, type_ in (*key_types, *answer_types, *_COLUMNS)),
            prefixes=["TEMPORARY"],
            postgresql_on_commit="DROP",
        )
        self.table.create(connection, checkfirst=False)
        self._loader = bulk_loader(connection, self.table, portable=portable)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Within it rows may be put, and nothing else done with the connection; behind it they are in the table."""
        with self._loader:
            yield
            self._flush()

    def put(self, items: Sequence[BatchItem], costs: Sequence[_Cost], values: Sequence[Values] | None = None) -> None:
        """Add the rows that results answer.

        :param costs: of each, batch and standard cost in picodollars; None when it is not known
        :param values: of each answer, in the order of the table's answer columns
        """
        values = [self._no_values] * len(items) if values is None else values
        keys = [""] * len(items) if self._keys is None else self._keys.billed(item.custom_id for item in items)
        self._add(items, keys, costs, values, asked=1)
        if self._keys is not None and self._keys.any_copies:
            self._put_copies(self._keys, items, costs, values)

    def _put_copies(self, keys: AskedKeys, items: Sequence[BatchItem], costs: Sequence[_Cost], values: Sequence[Values]) -> None:
        """Add the rows that share a request with another, which pays for it."""
        for item, cost, answer in zip(items, costs, values, strict=True):
            copies = keys.copies(item.custom_id)
            free = None if cost is None else (0, 0)
            at_a_time = max(1, min(_CHUNK_ROWS, _CHUNK_CHARACTERS // len(item.text or "-")))
            for start in range(0, len(copies), at_a_time):
                part = copies[start : start + at_a_time]
                self._add([item] * len(part), part, [free] * len(part), [answer] * len(part), asked=0)

    def _add(
        self, items: Sequence[BatchItem], keys: Sequence[str], costs: Sequence[_Cost], values: Sequence[Values], *, asked: int
    ) -> None:
        self._waiting.add(items, keys, costs, values, asked=asked)
        if len(self._waiting.items) >= _CHUNK_ROWS or self._waiting.characters >= _CHUNK_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        """Write what is waiting."""
        rows = self._waiting
        if rows.items:
            keys = self._result_table.key_values(rows.keys)
            columns = rows.columns()
            self.counts.update(columns[_STATUS])
            self._loader.write([*keys, *zip(*rows.values, strict=True), *columns])
        self._waiting = _Rows()


class _Rows:
    """Rows on their way into a stage."""

    def __init__(self) -> None:
        self.items: list[BatchItem] = []
        self.keys: list[str] = []
        self.values: list[Values] = []
        self.characters = 0
        self._costs: list[_Cost] = []
        self._asked: list[int] = []

    def add(self, items: Sequence[BatchItem], keys: Sequence[str], costs: Sequence[_Cost], values: Sequence[Values], *, asked: int) -> None:
        self.items += items
        self.keys += keys
        self.values += values
        self._costs += costs
        self._asked += [asked] * len(items)
        self.characters += sum([len(item.text) for item in items if item.text is not None])

    def columns(self) -> list[Sequence[Any]]:
        """The values of ``_COLUMNS``."""
        items, usages = self.items, [item.usage for item in self.items]
        succeeded = RequestStatus.SUCCEEDED
        batch, standard = zip(*[_UNKNOWN if cost is None else cost for cost in self._costs], strict=True)
        return [
            [item.text for item in items],
            ["succeeded" if item.status is succeeded else item.status.value for item in items],
            [item.stop_reason for item in items],
            [item.error_type for item in items],
            [item.error_message for item in items],
            [item.model for item in items],
            [None if usage is None else usage.prompt_tokens for usage in usages],
            [None if usage is None else usage.output_tokens for usage in usages],
            [item.custom_id for item in items],
            self.keys,
            batch,
            standard,
            self._asked,
        ]

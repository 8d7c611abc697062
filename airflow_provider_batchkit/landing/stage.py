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

from airflow_provider_batchkit.blocks import ResultBlock
from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.ledger.bulk import bulk_loader
from airflow_provider_batchkit.schema.answers import Values
from airflow_provider_batchkit.shards import IndexEntry

#: a chunk is written when it has this many rows (more cost the garbage collector more than they save), or characters of text
_CHUNK_ROWS = 1_000
_CHUNK_CHARACTERS = 4_000_000

_STOP_REASON_CHARS, _ERROR_TYPE_CHARS, _MODEL_CHARS = 64, 100, 100

#: what differs from row to row, behind the table's key and answer columns
_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("response", sa.Text()),
    ("status", sa.String(16)),
    ("stop_reason", sa.String(_STOP_REASON_CHARS)),
    ("error_type", sa.String(_ERROR_TYPE_CHARS)),
    ("error_message", sa.Text()),
    ("model", sa.String(_MODEL_CHARS)),
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
_NAMES = [name for name, _ in _COLUMNS]
_STATUS, _KEY = _NAMES.index("status"), _NAMES.index("batchkit_key")


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

    def put(self, results: ResultBlock, costs: Sequence[_Cost], values: Sequence[Values] | None = None) -> None:
        """Add the rows that results answer.

        :param costs: of each, batch and standard cost in picodollars; None when it is not known
        :param values: of each answer, in the order of the table's answer columns
        """
        values = [self._no_values] * len(results) if values is None else values
        keys = [""] * len(results) if self._keys is None else self._keys.billed(results.custom_ids)
        self._add(results, keys, costs, values, asked=1)
        if self._keys is not None and self._keys.any_copies:
            self._put_copies(self._keys, results, costs, values)

    def _put_copies(self, keys: AskedKeys, results: ResultBlock, costs: Sequence[_Cost], values: Sequence[Values]) -> None:
        """Add the rows that share a request with another, which pays for it."""
        for place, custom_id in enumerate(results.custom_ids):
            copies = keys.copies(custom_id)
            free = None if costs[place] is None else (0, 0)
            at_a_time = max(1, min(_CHUNK_ROWS, _CHUNK_CHARACTERS // len(results.texts[place] or "-")))
            for start in range(0, len(copies), at_a_time):
                part = copies[start : start + at_a_time]
                same = results.rows([place] * len(part))
                self._add(same, part, [free] * len(part), [values[place]] * len(part), asked=0)

    def _add(self, results: ResultBlock, keys: Sequence[str], costs: Sequence[_Cost], values: Sequence[Values], *, asked: int) -> None:
        self._waiting.add(results, keys, costs, values, asked=asked)
        if len(self._waiting) >= _CHUNK_ROWS or self._waiting.characters >= _CHUNK_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        """Write what is waiting."""
        rows = self._waiting
        if len(rows):
            keys = self._result_table.key_values(rows.keys)
            self.counts.update(rows.columns[_STATUS])
            self._loader.write([*keys, *zip(*rows.values, strict=True), *rows.columns])
        self._waiting = _Rows()


class _Rows:
    """Rows on their way into a stage."""

    def __init__(self) -> None:
        #: the values of ``_COLUMNS``
        self.columns: list[list[Any]] = [[] for _ in _COLUMNS]
        self.values: list[Values] = []
        self.characters = 0

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def keys(self) -> list[str]:
        return self.columns[_KEY]

    def add(self, results: ResultBlock, keys: Sequence[str], costs: Sequence[_Cost], values: Sequence[Values], *, asked: int) -> None:
        more: list[Sequence[Any]] = [
            results.texts,
            results.statuses,
            _cut(results.stop_reasons, _STOP_REASON_CHARS),
            _cut(results.error_types, _ERROR_TYPE_CHARS),
            results.error_messages,
            _cut(results.models, _MODEL_CHARS),
            _known(results.prompt_tokens, results.billed),
            _known(results.output_tokens, results.billed),
            results.custom_ids,
            keys,
            [None if cost is None else cost[0] for cost in costs],
            [None if cost is None else cost[1] for cost in costs],
            [asked] * len(results),
        ]
        for column, added in zip(self.columns, more, strict=True):
            column += added
        self.values += values
        self.characters += sum([len(text) for text in results.texts if text is not None])


def _known(counts: Sequence[int], billed: Sequence[bool]) -> Sequence[int | None]:
    return counts if all(billed) else [count if counted else None for count, counted in zip(counts, billed, strict=True)]


def _cut(texts: Sequence[str | None], most: int) -> Sequence[str | None]:
    """The texts, none longer than the column: an odd one must not keep a hundred thousand others from landing."""
    if all(text is None or len(text) <= most for text in set(texts)):
        return texts
    return [text and text[:most] for text in texts]

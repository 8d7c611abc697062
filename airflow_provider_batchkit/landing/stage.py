"""The stage: temporary tables that hold a batch's rows until one set of statements moves them.

While results are downloaded, only the stage is written, which nobody else sees. Meanwhile no lock of the table or the ledger is held.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any, ClassVar, Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.cost.prices import format_pico_exact
from airflow_provider_batchkit.cost.tally import Costs
from airflow_provider_batchkit.landing.answers import Values
from airflow_provider_batchkit.landing.table import STAGE_COLUMNS, ResultTable
from airflow_provider_batchkit.ledger.bulk import BulkColumns, bulk_loader
from airflow_provider_batchkit.ledger.outcomes import digests_of, encode_succeeded
from airflow_provider_batchkit.ledger.tables import keep_entries_plain, succeeded
from airflow_provider_batchkit.model import UNFINISHED, RequestStatus, outcome_rank
from airflow_provider_batchkit.request.shards import IndexEntry

#: number of rows of shared requests that are written together; long answers make it fewer
_COPIES_TOGETHER = 1_000
_COPIED_CHARACTERS = 4_000_000

_STOP_REASON_CHARS, _ERROR_TYPE_CHARS, _MODEL_CHARS, _ID_CHARS = 64, 100, 100, 100

_LONG_TEXT = sa.Text().with_variant(sa.Text(1 << 24), "mysql", "mariadb")

#: columns whose values differ between rows; they come after the table's key and answer columns
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
    ("cost_usd", sa.Text()),
    *STAGE_COLUMNS,
)
#: columns that only some result tables have
_LATER_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("content", _LONG_TEXT),
    ("stop_details", _LONG_TEXT),
    ("message_id", sa.String(_ID_CHARS)),
    ("request_id", sa.String(_ID_CHARS)),
)


class AskedKeys:
    """The source rows that a batch answers, by ``custom_id``. Memory: two strings a row."""

    def __init__(self, pieces: Iterable[Sequence[IndexEntry]]) -> None:
        """:param pieces: entries of what the batch asks; of rows that share a request, the one that is asked is billed"""
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
    def billed(self) -> Mapping[str, str]:
        """Every request of the batch, with the key of the row that pays for it."""
        return self._billed

    def copies(self, custom_id: str) -> list[str]:
        """Keys of the other rows that the request answers."""
        return self._copies.get(custom_id, _NONE)

    def those_of(self, keys: Iterable[str]) -> frozenset[str]:
        """The keys among these that belong to the batch."""
        mine = {*self._billed.values(), *chain.from_iterable(self._copies.values())}
        return frozenset(key for key in keys if key in mine)

    @property
    def any_copies(self) -> bool:
        """Whether some rows share a request."""
        return bool(self._copies)


_NONE: list[str] = []
_SUCCEEDED, _MISSING = RequestStatus.SUCCEEDED.value, RequestStatus.MISSING.value
#: the rank of the best outcome without an answer, and a rank worse than all others
_UNANSWERED, _NO_RANK = outcome_rank(RequestStatus.ERRORED.value, None), 1_000
_UNFINISHED = frozenset(UNFINISHED.values())


@dataclass(frozen=True, slots=True)
class StageTables:
    """The staged rows of a batch."""

    #: rows for the result table, with what the ledger keeps of the failed ones
    rows: sa.Table
    #: the facts that the ledger keeps of the rows that succeeded
    succeeded: sa.Table

    def drop(self, connection: Connection) -> None:
        """Remove the tables, unless they go with the connection."""
        if connection.connection.is_detached:
            return
        for table in (self.rows, self.succeeded):
            table.drop(connection)


class Loader(Protocol):
    """Takes the rows of a stage, column by column."""

    def write(self, columns: BulkColumns) -> None:
        """Add rows."""


class Stage:
    """A batch's rows on their way into a table, and what the ledger keeps of them."""

    _loader: Loader

    def __init__(self, table: ResultTable, keys: AskedKeys | None, ranks: Mapping[str, int]) -> None:
        """
        :param keys: None for a batch that no ledger knows, whose rows are identified by ``custom_id``
        :param ranks: key → rank of an outcome that stands; rows with a worse outcome are counted and left out
        """
        #: rows per outcome, including those that are left out
        self.counts: Counter[str] = Counter()
        #: unfinished answers among the counted rows, per ``error_type``
        self.unfinished: Counter[str] = Counter()
        self._result_table = table
        self._keys = keys
        self._ranks = ranks
        #: whether the ledger keeps any of the staged rows in a row of its own, because it has no whole answer
        self.any_failed = False
        #: keys of the rows that were left out
        self.left_out: set[str] = set()
        self._no_values: Values = (None,) * len(table.answer_columns)
        self._later = [(name, type_) for name, type_ in _LATER_COLUMNS if name in table.written_results]
        self._packed: list[dict[str, Any]] = []

    @property
    def columns(self) -> list[tuple[str, Any]]:
        """(name, type) of the columns whose values differ between rows, after the table's key and answer columns."""
        return [*_COLUMNS, *self._later]

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Inside the block, rows may be put. After it, they are where they belong."""
        yield

    def forget_keys(self) -> None:
        """Free the map of keys, once every row has been put."""
        self._keys, self._ranks = None, {}

    def put(self, results: ResultBlock, costs: Costs, values: Sequence[Values] | None = None) -> None:
        """Add the rows that results answer.

        :param results: the results, with their keys for a batch that a ledger knows
        :param costs: the cost of each result
        :param values: the values of each answer, in the order of the table's answer columns
        """
        if not len(results):
            return
        values = [self._no_values] * len(results) if values is None else values
        self._write(results, results.keys, costs, values, asked=True)
        if self._keys is not None and self._keys.any_copies:
            self._put_copies(self._keys, results, costs, values)

    def _put_copies(self, keys: AskedKeys, results: ResultBlock, costs: Costs, values: Sequence[Values]) -> None:
        """Add the rows that share a request with another, which pays for it."""
        free = [None if cost is None else 0 for cost in costs[0]]
        copies = [(place, key) for place, custom_id in enumerate(results.custom_ids) for key in keys.copies(custom_id)]
        together = max(1, min(_COPIES_TOGETHER, _COPIED_CHARACTERS // max(len(text or "-") for text in results.texts)))
        for start in range(0, len(copies), together):
            part = copies[start : start + together]
            places = [place for place, _ in part]
            cost = [free[place] for place in places]
            same = results.rows(places)
            self._write(same, [key for _, key in part], (cost, cost), [values[place] for place in places], asked=False)

    def _write(self, results: ResultBlock, keys: Sequence[str] | None, costs: Costs, values: Sequence[Values], *, asked: bool) -> None:
        """:param keys: None for a batch that no ledger knows"""
        answered = results.statuses.count(_SUCCEEDED) == len(results)
        self.counts.update({_SUCCEEDED: len(results)} if answered else results.statuses)
        # the ledger distinguishes rows that a further round may ask again, including truncated answers that succeeded
        final = answered and results.error_types.count(None) == len(results)
        if not final:
            self.unfinished.update([kind for kind in results.error_types if kind in _UNFINISHED])
        if keys is not None and self._ranks and not self._ranks.keys().isdisjoint(keys):
            places = self._places_that_stand(results, keys)
            results, keys, values = results.rows(places), [keys[place] for place in places], [values[place] for place in places]
            costs = [costs[0][place] for place in places], [costs[1][place] for place in places]
            if not places:
                return
        batch_costs, standard_costs = costs
        if final:
            failed = [False] * len(results)
        else:
            failed = [s != _SUCCEEDED or kind is not None for s, kind in zip(results.statuses, results.error_types, strict=True)]
            self.any_failed = self.any_failed or any(failed)
        if keys is not None:
            self._pack(failed, keys, digests_of(results.custom_ids), batch_costs, standard_costs, asked=asked)
        self._loader.write(
            [
                *self._result_table.key_values(keys or ()),
                *(zip(*values, strict=True) if self._no_values else ()),
                results.texts,
                results.statuses,
                _cut(results.stop_reasons, _STOP_REASON_CHARS),
                _cut(results.error_types, _ERROR_TYPE_CHARS),
                results.error_messages,
                _cut(results.models, _MODEL_CHARS),
                _where(results.billed, results.prompt_tokens),
                _where(results.billed, results.output_tokens),
                results.custom_ids,
                list(map(format_pico_exact, batch_costs)),
                _where(failed, batch_costs),
                _where(failed, standard_costs),
                _where(failed, keys or [None] * len(results)),
                _where(failed, [asked] * len(results)),
                *(self._value_of[name](results) for name, _ in self._later),
            ]
        )

    def _places_that_stand(self, results: ResultBlock, keys: Sequence[str]) -> list[int]:
        """Places of the rows whose outcome is at least as good as that of any other round of the job."""
        places = []
        for place, (key, status, error_type) in enumerate(zip(keys, results.statuses, results.error_types, strict=True)):
            stands = self._ranks.get(key, _NO_RANK)
            # a missing answer may exist and be billed: a failure that costs nothing must not hide it, or the row would be paid for twice
            if stands < outcome_rank(status, error_type) and not (status == _MISSING and stands >= _UNANSWERED):
                self.left_out.add(key)
            else:
                places.append(place)
        return places

    _value_of: ClassVar[dict[str, Callable[[ResultBlock], Sequence[Any]]]] = {
        "content": lambda results: results.contents or [None] * len(results),
        "stop_details": lambda results: results.stop_details or [None] * len(results),
        "message_id": lambda results: _cut(results.message_ids, _ID_CHARS),
        "request_id": lambda results: _cut(results.request_ids, _ID_CHARS),
    }

    def _pack(self, failed: Sequence[bool], *columns: Sequence[Any], asked: bool) -> None:
        """Keep what the ledger needs of the rows that succeeded."""
        rows = list(zip(*columns, strict=True))
        if any(failed):
            rows = list(compress(rows, [not out for out in failed]))
        if rows:
            self._packed.append({"part": len(self._packed), "asked": asked, "source_rows": len(rows), "entries": encode_succeeded(rows)})


class TemporaryStage(Stage):
    """A stage of fresh temporary tables of a connection; on PostgreSQL they go with the transaction."""

    def __init__(
        self,
        connection: Connection,
        table: ResultTable,
        keys: AskedKeys | None,
        ranks: Mapping[str, int],
        *,
        portable: bool = False,
    ) -> None:
        """:param portable: whether the database's own bulk path is avoided"""
        super().__init__(table, keys, ranks)
        self._connection = connection
        rows = _temporary("rows", *self._staged_columns())
        packed = _temporary("succeeded", *((c.name, c.type) for c in succeeded.columns if c.name not in ("job_id", "shard")))
        keep_entries_plain(packed)
        self.tables = StageTables(rows, packed)
        for stage in (rows, packed):
            stage.create(connection, checkfirst=False)
        self._bulk = self._loader = bulk_loader(connection, rows, portable=portable)

    def _staged_columns(self) -> list[tuple[str, Any]]:
        table = self._result_table
        answer_columns = [(name, sa.Text() if name in table.json_names else type_) for name, type_ in table.answer_columns]
        return [*table.staged_keys(self._connection.dialect), *answer_columns, *self.columns]

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Inside the block, rows may be put, and the connection serves nothing else. After it, the rows are in the tables."""
        with self._bulk:
            yield
        if self._packed:
            self._connection.execute(sa.insert(self.tables.succeeded), self._packed)
            self._packed.clear()


def _temporary(what: str, *columns: tuple[str, Any]) -> sa.Table:
    return sa.Table(
        f"batchkit_stage_{what}_{secrets.token_hex(6)}",
        sa.MetaData(),
        *(sa.Column(name, type_, nullable=True, autoincrement=False) for name, type_ in columns),
        prefixes=["TEMPORARY"],
        postgresql_on_commit="DROP",
    )


def _where(wanted: Sequence[bool], values: Sequence[Any]) -> Sequence[Any]:
    """The values where they are wanted, and None elsewhere."""
    if all(wanted):
        return values
    if not any(wanted):
        return [None] * len(values)
    return [value if want else None for want, value in zip(wanted, values, strict=True)]


def _cut(texts: Sequence[str | None], most: int) -> Sequence[str | None]:
    """The texts, cut to the column's length: one odd text must not keep a hundred thousand others from landing."""
    if texts.count(texts[0]) == len(texts) and len(texts[0] or "") <= most:
        return texts
    if None not in texts and max(map(len, texts)) <= most:  # type: ignore[arg-type] # it is not
        return texts
    if all(text is None or len(text) <= most for text in set(texts)):
        return texts
    return [text and text[:most] for text in texts]

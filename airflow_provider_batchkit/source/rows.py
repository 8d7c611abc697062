"""Items of a source, taken some at a time. Rows that come together stay in columns: a dict for each costs much at a million rows."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice, repeat
from typing import Any, overload


class Rows(Sequence[Mapping[str, Any]]):
    """Rows with the same columns: a sequence of mappings, each made when it is read."""

    def __init__(self, names: Sequence[str], values: Sequence[Sequence[Any]], types: Mapping[str, str] | None = None) -> None:
        """
        :param names: names of the columns
        :param values: values of each row, in the columns' order
        :param types: column → the name of its type, where the source says more about it than the values do
        """
        self.types = types or {}
        self._names = names
        self._values = values

    @cached_property
    def columns(self) -> dict[str, Sequence[Any]]:
        """The values of each column; empty without any row."""
        return dict(zip(self._names, zip(*self._values, strict=True), strict=False))

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, at: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, at: slice) -> Rows: ...

    def __getitem__(self, at: int | slice) -> dict[str, Any] | Rows:
        if isinstance(at, slice):
            return Rows(self._names, self._values[at], self.types)
        return dict(zip(self._names, self._values[at], strict=True))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(dict, map(zip, repeat(self._names), self._values))


def column_of(rows: Sequence[Mapping[str, Any]], name: str) -> Sequence[Any]:
    """One column of some rows.

    :raises KeyError: when a row lacks it
    """
    return rows.columns[name] if isinstance(rows, Rows) else [row[name] for row in rows]


class Items:
    """Takes items from an iterable."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)

    def take(self, most: int) -> Sequence[Any]:
        """The next items, from one to ``most``; none at the end."""
        return list(islice(self._items, most))

    def close(self) -> None:
        """Give up the items that were not taken, and close their source: a query's cursor holds locks, even after an error."""
        if isinstance(self._items, Generator):
            self._items.close()


class RowItems(Items):
    """Takes rows from an iterable of :class:`Rows`, which are never empty."""

    def __init__(self, chunks: Iterable[Rows]) -> None:
        super().__init__(chunks)
        self._left: Sequence[Any] = ()

    def take(self, most: int) -> Sequence[Any]:
        """See :meth:`Items.take`."""
        chunk = self._left or next(self._items, ())
        self._left = chunk[most:]
        return chunk if len(chunk) <= most else chunk[:most]

"""Rows that stay together, and taking some of them at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from airflow_provider_batchkit.source.rows import Items, RowItems, Rows, column_of
from airflow_provider_batchkit.source.types import KeyTypes

ROWS: Sequence[Mapping[str, Any]] = Rows(["id", "name"], [(1, "tea"), (2, None), (3, "cup")])
MAPPINGS: Sequence[Mapping[str, Any]] = [{"id": 1, "name": "tea"}, {"id": 2, "name": None}, {"id": 3, "name": "cup"}]


def test_rows_are_a_sequence_of_mappings() -> None:
    """As a list of dicts would be."""
    assert list(ROWS) == MAPPINGS == [ROWS[0], ROWS[1], ROWS[-1]]
    assert list(ROWS[1:]) == MAPPINGS[1:] and len(ROWS[1:]) == 2 and not ROWS[3:]
    assert [list(column_of(rows, "name")) for rows in (ROWS, MAPPINGS)] == [["tea", None, "cup"]] * 2
    for rows in (ROWS, MAPPINGS):
        with pytest.raises(KeyError):
            column_of(rows, "price")


def test_rows_without_columns_are_rows() -> None:
    """PostgreSQL has them: ``SELECT FROM products``."""
    assert list(Rows([], [(), ()])) == [{}, {}] and len(Rows([], [(), ()])) == 2


def test_key_types_of_rows_are_those_of_mappings() -> None:
    """A column that is not there counts as text: the rows may be native requests, which have keys of their own."""
    found = []
    for rows in (ROWS, MAPPINGS):
        types = KeyTypes(["id", "name", "sku"])
        types.see(rows)
        found.append(types.result())
    assert found[0] == found[1] == [("id", "integer"), ("name", "text"), ("sku", "text")]


@pytest.mark.parametrize("most", [1, 2, 3, 4, 100])
def test_items_are_taken_in_order_and_at_most_so_many(most: int) -> None:
    """Whatever came together."""
    chunks = [Rows(["id"], [(i,) for i in range(start, stop)]) for start, stop in ((0, 5), (5, 6), (6, 10))]
    for source in (RowItems(chunks), Items({"id": i} for i in range(10))):
        taken: list[Any] = []
        while part := source.take(most):
            assert len(part) <= most
            taken += part
        assert taken == [{"id": i} for i in range(10)]
        assert not source.take(most)

"""The catalog of the examples: products in SQLite, and reviews of them in a CSV file."""

from __future__ import annotations

import contextlib
import csv
import os
import sqlite3
from pathlib import Path

_MATERIALS = ("oak", "steel", "linen", "glass", "ceramic", "bamboo", "leather", "copper", "wool", "cork")
_THINGS = ("desk lamp", "side table", "water bottle", "backpack", "bookshelf", "teapot", "blanket", "notebook", "chair", "planter")
_COLORS = ("black", "white", "green", "blue", "red", "grey", "amber", "ivory")


def fill_catalog(catalog: Path, rows: int) -> None:
    """Make the SQLite catalog with ``rows`` products, unless it is there with as many."""
    catalog.parent.mkdir(exist_ok=True)
    with contextlib.closing(sqlite3.connect(catalog)) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS products (sku TEXT PRIMARY KEY, name TEXT NOT NULL, attributes TEXT NOT NULL)")
        if connection.execute("SELECT COUNT(*) FROM products").fetchone() != (rows,):
            connection.execute("DELETE FROM products")
            connection.executemany("INSERT INTO products VALUES (?, ?, ?)", map(_product, range(rows)))
            connection.commit()
    print(f"Catalog: {rows:,} products in {os.path.relpath(catalog)}")


def write_reviews(path: Path, catalog: Path) -> None:
    """Make the CSV file of the example DAG csv_to_table: two reviews of each of the catalog's first thousand products."""
    with contextlib.closing(sqlite3.connect(catalog)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM products ORDER BY sku LIMIT 1000")]
    with path.open("w", newline="") as file:
        reviews = csv.writer(file)
        reviews.writerow(["review_id", "product", "stars", "text"])
        for number, name in enumerate(names):
            reviews.writerow([f"R-{number:04d}-1", name, 5, f'My "{name}" arrived in two days,\nand it is as good as it looks.'])
            reviews.writerow([f"R-{number:04d}-2", name, 2, "It broke in the first week. The refund was quick, though."])


def _product(number: int) -> tuple[str, str, str]:
    material = _MATERIALS[number % 10]
    thing = _THINGS[number // 10 % 10]
    color = _COLORS[number // 100 % 8]
    return f"SKU-{number:06d}", f"{material.title()} {thing} no. {number}", f"color {color}, material {material}, {10 + number % 90} cm"

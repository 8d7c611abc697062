"""The catalog of the examples: products in SQLite, and reviews of them in a CSV file."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import sqlite3
from pathlib import Path

_MATERIALS = ("oak", "steel", "linen", "glass", "ceramic", "bamboo", "leather", "copper", "wool", "cork")
_THINGS = ("desk lamp", "side table", "water bottle", "backpack", "bookshelf", "teapot", "blanket", "notebook", "chair", "planter")
_FINISHES = ("matt", "polished", "brushed", "oiled", "raw", "glazed", "waxed")
_MAKERS = ("a family workshop in Porto", "a cooperative near Graz", "two sisters in Gdańsk", "a small factory in Lyon", "a studio in Leeds")
_COLORS = ("black", "white", "green", "blue", "red", "grey", "amber", "ivory")

#: number of a product modulo 100 → the simulator's marker in a review of it, which decides how that request ends
_ENDS = {40: "overloaded", 70: "errored", 90: "max_tokens"}

#: bytes of a product's name and attributes together: with the words around them a prompt of 768 bytes
_PRODUCT_BYTES = 690


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
    """Make the CSV file of the example DAG csv_to_table: two reviews of each of the first thousand products; some fail."""
    with contextlib.closing(sqlite3.connect(catalog)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM products ORDER BY sku LIMIT 1000")]
    with path.open("w", newline="") as file:
        reviews = csv.writer(file)
        reviews.writerow(["review_id", "product", "stars", "text"])
        for number, name in enumerate(names):
            reviews.writerow([f"R-{number:04d}-1", name, 5, f'My "{name}" arrived in two days,\nand it is as good as it looks.'])
            marker = f" [[sim:{_ENDS[number % 100]}]]" if number % 100 in _ENDS else ""
            reviews.writerow([f"R-{number:04d}-2", name, 2, f"It broke in the first week. The refund was quick, though.{marker}"])


def change_products(catalog: Path, count: int, edition: int) -> None:
    """Give ``count`` products new attributes, other ones for each ``edition``, as a shop does between two runs."""
    with contextlib.closing(sqlite3.connect(catalog, timeout=60)) as connection, connection:
        (rows,) = connection.execute("SELECT COUNT(*) FROM products").fetchone()
        numbers = ((edition * count + number) % rows for number in range(min(count, rows)))
        changed = ((attributes, sku) for sku, _, attributes in (_product(number, edition) for number in numbers))
        connection.executemany("UPDATE products SET attributes = ? WHERE sku = ?", changed)


def _product(number: int, edition: int = 0) -> tuple[str, str, str]:
    material = _MATERIALS[number % 10]
    thing = _THINGS[number // 10 % 10]
    color = _COLORS[number // 100 % 8]
    finish = _FINISHES[number // 5 % 7]
    maker = _MAKERS[number // 3 % 5]
    name = f"{material.title()} {thing} no. {number}"
    size = 10 + number % 90
    attributes = (
        f"color {color}, material {material}, {size} cm, {size * 37} g, {finish}, made by {maker} in series of {50 + number % 450}. "
        f"Its {material} comes from a single supplier and is checked by hand; every piece is a little different in grain and shade. "
        "Wipe it with a soft, dry cloth, keep it out of the dishwasher and away from open fire. "
        "Packed without plastic, sent within three working days, taken back within sixty. "
        "It stands on felt, leaves no marks, and needs neither tools nor instructions to be put up; two of them fit side by side. "
        "Spare parts can be ordered for ten years. Awarded by readers of a design magazine, and sold in eleven countries. "
        f"Edition {edition}, lot "
    )
    # the lot makes all products equally long, which makes the bill a round sum
    missing = _PRODUCT_BYTES - len((name + attributes).encode())
    lot = hashlib.blake2b(f"{number}/{edition}".encode()).hexdigest()[:missing]
    return f"SKU-{number:06d}", name, attributes + lot

"""Names of tables and columns: which of them a database takes."""

from __future__ import annotations

from collections.abc import Iterable
from string import ascii_lowercase, ascii_uppercase

from sqlalchemy.engine import Dialect

#: PostgreSQL gives every table these columns (PostgreSQL documentation, "System Columns")
_SYSTEM_COLUMNS = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})
#: databases that limit a name's characters; the others limit its bytes
_LIMIT_CHARACTERS = frozenset({"mysql", "mariadb", "mssql"})
#: databases in which names that differ in case are one column
_FOLD_COLUMNS = frozenset({"sqlite", "mysql", "mariadb", "mssql"})
#: SQLite ignores the case of these letters alone
_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)


def column_name(name: str, dialect: Dialect) -> str:
    """A column's name as the database compares it."""
    return name.translate(_LOWER) if dialect.name in _FOLD_COLUMNS else name


def name_problems(names: Iterable[tuple[str, str]], dialect: Dialect) -> list[str]:
    """What keeps names from being used, a sentence part for each.

    :param names: (what it is, name)
    """
    return [f"{what} {name!r} {problem}" for what, name in names if (problem := _problem(what, name, dialect))]


def _problem(what: str, name: str, dialect: Dialect) -> str | None:
    if not name:
        return "is empty"
    if "\0" in name:
        return "holds a NUL character, which no name may hold"
    most, unit = dialect.max_identifier_length, "characters" if dialect.name in _LIMIT_CHARACTERS else "bytes in UTF-8"
    size = len(name) if dialect.name in _LIMIT_CHARACTERS else len(name.encode("utf-8", "surrogatepass"))
    if size > most:
        return f"has {size:,} {unit}, and {dialect.name} takes {most:,}"
    if dialect.name == "postgresql" and what not in ("table", "schema") and name in _SYSTEM_COLUMNS:
        return "is the name of a system column of PostgreSQL"
    if dialect.name == "sqlite" and what == "table" and name.translate(_LOWER).startswith("sqlite_"):
        return "begins with 'sqlite_', which SQLite keeps for its own tables"
    return None


def spelled(schema: str | None, table: str) -> str:
    """A table's name as SQL, every part in quotes."""
    return ".".join('"{}"'.format(part.replace('"', '""')) for part in (schema, table) if part)

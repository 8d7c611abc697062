"""Names of tables and columns, and whether a database takes them."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.engine import Dialect

from airflow_provider_batchkit.ledger.names import SQLITE_FOLDS

#: PostgreSQL gives every table these columns (PostgreSQL documentation, "System Columns")
_SYSTEM_COLUMNS = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})
#: databases that limit a name's characters; the others limit its bytes
_LIMIT_CHARACTERS = frozenset({"mysql", "mariadb", "mssql"})
#: databases in which column names that differ only in case are equal
_FOLD_COLUMNS = frozenset({"sqlite", "mysql", "mariadb", "mssql"})


def column_name(name: str, dialect: Dialect) -> str:
    """A column's name as the database compares it."""
    return name.translate(SQLITE_FOLDS) if dialect.name in _FOLD_COLUMNS else name


def name_problems(names: Iterable[tuple[str, str]], dialect: Dialect) -> list[str]:
    """Reasons why names cannot be used, as parts of a sentence.

    :param names: pairs of what is named, and its name
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
    if dialect.name == "sqlite" and what == "table" and name.translate(SQLITE_FOLDS).startswith("sqlite_"):
        return "begins with 'sqlite_', which SQLite keeps for its own tables"
    return None

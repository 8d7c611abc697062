"""Names of tables and columns: which of them a database takes, and the one name of a table however it is spelled."""

from __future__ import annotations

from collections.abc import Iterable
from string import ascii_lowercase, ascii_uppercase

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect

#: PostgreSQL gives every table these columns (PostgreSQL documentation, "System Columns")
_SYSTEM_COLUMNS = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})
#: databases that limit a name's characters; the others limit its bytes
_LIMIT_CHARACTERS = frozenset({"mysql", "mariadb", "mssql"})
#: databases in which names that differ in case are one column
_FOLD_COLUMNS = frozenset({"sqlite", "mysql", "mariadb", "mssql"})
#: SQLite ignores the case of these letters alone
_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)

_RESOLVE = sa.text(
    "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
    "WHERE c.oid = to_regclass(:spelled)"
)


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


def canonical_name(connection: Connection, schema: str | None, table: str) -> str:
    """The one name of a table, equal for every way to spell it. A table's own name holds no dot, so that two tables never share one.

    PostgreSQL looks the table up as its statements do, under the connection's search_path. A table that does not exist has the name that
    it would have once it is created.
    """
    dialect = connection.dialect
    if dialect.name == "postgresql":
        found = connection.execute(_RESOLVE, {"spelled": spelled(schema, table)}).first()
        if found is not None:
            return f"{found.nspname}.{found.relname}"
        schema = schema or connection.execute(sa.select(sa.func.current_schema())).scalar()
    elif dialect.name == "sqlite":
        table, schema = table.translate(_LOWER), (schema or "main").translate(_LOWER)
        return table if schema == "main" else f"{schema}.{table}"
    else:
        schema = schema or dialect.default_schema_name
    return f"{schema}.{table}" if schema else table


def spelled(schema: str | None, table: str) -> str:
    """A table's name as SQL, every part in quotes."""
    return ".".join('"{}"'.format(part.replace('"', '""')) for part in (schema, table) if part)

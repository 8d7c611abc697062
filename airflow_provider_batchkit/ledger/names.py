"""The name by which a database knows a table, however a task spells it."""

from __future__ import annotations

from string import ascii_lowercase, ascii_uppercase

import sqlalchemy as sa
from sqlalchemy.engine import Connection

#: SQLite ignores the case of ASCII letters only
SQLITE_FOLDS = str.maketrans(ascii_uppercase, ascii_lowercase)

_RESOLVE = sa.text(
    "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
    "WHERE c.oid = to_regclass(:spelled)"
)


def table_identity(connection: Connection, name: str) -> str:
    """The one name of a table, equal for every spelling of it. A table's own name must not contain a dot, so two tables never share a name.

    PostgreSQL looks the table up as its statements do, under the connection's search_path. A table that does not exist has the name that
    it would have once it is created.

    :param name: ``table`` or ``schema.table``
    """
    in_schema, _, table = name.rpartition(".")
    schema: str | None = in_schema or None
    dialect = connection.dialect
    if dialect.name == "postgresql":
        found = connection.execute(_RESOLVE, {"spelled": spelled(schema, table)}).first()
        if found is not None:
            return f"{found.nspname}.{found.relname}"
        schema = schema or connection.execute(sa.select(sa.func.current_schema())).scalar()
    elif dialect.name == "sqlite":
        table, schema = table.translate(SQLITE_FOLDS), (schema or "main").translate(SQLITE_FOLDS)
        return table if schema == "main" else f"{schema}.{table}"
    else:
        schema = schema or dialect.default_schema_name
    return f"{schema}.{table}" if schema else table


def spelled(schema: str | None, table: str) -> str:
    """A table's name as SQL, every part in quotes."""
    return ".".join('"{}"'.format(part.replace('"', '""')) for part in (schema, table) if part)

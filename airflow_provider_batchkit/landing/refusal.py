"""Rows that a result table refuses when they are written to it, after they were paid for: by a constraint, a trigger or a column's type."""

from __future__ import annotations

from typing import Any

from airflow_provider_batchkit.exceptions import BatchKitError, TableError, WarehouseBusyError


def refusal(error: BaseException, table: str, batch_id: str) -> BatchKitError | None:
    """A driver's error as an error that says what to do; None for an error that is not a driver's.

    PEP 249 names the classes. A constraint or a value that does not fit is terminal; triggers and some constraints of MySQL cannot be told
    from a lost connection by the class, and may pass.

    :param batch_id: the first batch whose rows were to be written
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    if "Error" not in names:
        return None
    beginning = f"{table} did not take the rows of {batch_id}: {str(error).strip()}. "
    if names & {"IntegrityError", "DataError"}:
        return TableError(
            f"{beginning}A constraint, a trigger or a column's type is in the way. Nothing was written and nothing is lost: results stay "
            "with the API for 29 days. Alter the table and clear the task: it lands them then, and asks and pays nothing again."
        )
    return WarehouseBusyError(
        f"{beginning}Nothing is lost: results stay with the API for 29 days, and a retry lands them, and asks and pays nothing again. "
        "Where a constraint or a trigger of the table is in the way, alter it and try again."
    )


def not_kept(key: Any, table: str, batch_id: str) -> TableError:
    """The error for a row that the database took without an error, and that is not in the table under its key."""
    return TableError(
        f"{table} would store the key {key!s} of {batch_id} as another value, or not at all: a column of its key is narrower than the "
        "source's, or a trigger or a rule keeps the row out. Nothing was written and nothing is lost: results stay with the API for 29 "
        "days. Alter the table and clear the task: it lands them then, and asks and pays nothing again."
    )

"""Why rows of a job have no whole answer, and which of them are worth asking again. Nothing here writes.

A row is asked again when it failed for a reason that passes, as :mod:`~airflow_provider_batchkit.request.failures` judges it. A row that
is ``missing`` is not asked again: its answer may be there and billed, and reading the results again costs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from airflow_provider_batchkit.ledger.engine import Part
from airflow_provider_batchkit.ledger.tables import batch, failed
from airflow_provider_batchkit.model import RequestStatus
from airflow_provider_batchkit.request.failed import KEYS_KEPT, FailedRows, merged
from airflow_provider_batchkit.request.failures import KNOWN_FAILURES, WORTH_ASKING, Failure, Failures, Reason

_T = TypeVar("_T")
_KEYS_AT_A_TIME, _IDS_AT_A_TIME = 5_000, 500
#: number of reasons that a person is shown, and of keys for each of them
_REASONS_SHOWN, _KEYS_SHOWN = 20, 3


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows that a round asks again, by their last outcome."""

    #: the wanted error types or statuses; None wants the rows that failed for one of ``reasons``
    outcomes: Collection[str] | None = None
    reasons: Collection[Reason] = WORTH_ASKING
    #: classifies a failure by its reason
    failures: Failures = KNOWN_FAILURES

    def __contains__(self, failure: Failure) -> bool:
        if self.outcomes is None:
            return self.failures.reason(failure) in self.reasons
        return failure.error_type in self.outcomes or failure.status in self.outcomes


WORTH_A_ROUND = Wanted()


class FailedRequests(Part):
    """The part of the ledger that selects failed rows for further rounds."""

    def count_failed(self, job_id: str, which: Wanted = WORTH_A_ROUND) -> int:
        """How many rows of a job ``which`` selects by their last outcome."""
        with self.engine.connect() as connection:
            return sum(rows for failure, rows in _kinds(connection, failed.c.job_id == job_id) if failure in which)

    def failed_keys(self, job_id: str, which: Wanted = WORTH_A_ROUND, shard: int | None = None) -> Iterator[str]:
        """Keys of the rows that :meth:`count_failed` counts; with ``shard`` only rows whose last outcome is from this shard."""
        here = [failed.c.job_id == job_id] if shard is None else [failed.c.job_id == job_id, failed.c.shard == shard]
        with self.engine.connect() as connection:
            for row in _rows(connection, *here):
                if Failure(row.status, row.error_type, row.words) in which:
                    yield row.key

    def stopped_by_account(self, job_id: str, shards: Collection[int], failures: Failures = KNOWN_FAILURES) -> str | None:
        """How many rows of these shards failed because of the account, and with which error, as a text; None when no row did."""
        with self.engine.connect() as connection:
            kinds = list(_kinds(connection, failed.c.job_id == job_id, failed.c.shard.in_(shards)))
        account = [(failure, rows) for failure, rows in kinds if failures.reason(failure) is Reason.ACCOUNT]
        if not account:
            return None
        failure = max(account, key=lambda kind: kind[1])[0]
        return f"{sum(rows for _, rows in account):,} rows failed with {failure.error_type}: {failure.error_message}"

    def failed_in(self, batch_ids: Collection[str], failures: Failures = KNOWN_FAILURES) -> list[FailedRows]:
        """The failed rows of these landed batches, which may be of several jobs. Batches that the ledger does not know add none."""
        shards = defaultdict[str, list[int]](list)
        found: list[FailedRows] = []
        with self.engine.connect() as connection:
            for ids in _pieces(list(batch_ids)):
                for job_id, shard in connection.execute(sa.select(batch.c.job_id, batch.c.shard).where(batch.c.batch_id.in_(ids))):
                    shards[job_id].append(shard)
            for job_id, those in shards.items():
                for some in _pieces(those):
                    found += failed_kinds(connection, Wanted(failures=failures), failed.c.job_id == job_id, failed.c.shard.in_(some))
        return merged(found)


class Reasons(Part):
    """The part of the overview that says why rows failed."""

    def failed_rows(self, job_id: str, failures: Failures = KNOWN_FAILURES) -> tuple[list[FailedRows], int]:
        """Why rows of a job have no whole answer: the 20 most frequent reasons, and how many rows have another one."""
        found = sa.select(failed.c.status, failed.c.error_type, _WORDS, failed.c.error_message).where(failed.c.job_id == job_id).subquery()
        kind = (found.c.status, found.c.error_type, found.c.words)
        rows = sa.func.count().label("rows")
        statement = sa.select(*kind, sa.func.min(found.c.error_message), rows).group_by(*kind).order_by(rows.desc(), *kind)
        shown = list[FailedRows]()
        with self.engine.connect() as connection:
            total = connection.execute(sa.select(sa.func.count()).where(failed.c.job_id == job_id)).scalar_one()
            for status, error_type, words, message, count in connection.execute(statement.limit(_REASONS_SHOWN)).all():
                here = [failed.c.job_id == job_id, failed.c.status == status, failed.c.error_type.is_not_distinct_from(error_type)]
                if status == RequestStatus.ERRORED.value:
                    here.append(failed.c.error_message.is_not_distinct_from(words))
                keys = [row.key for row in _rows(connection, *here, ordered=True, limit=_KEYS_SHOWN)]
                reason = failures.reason(Failure(status, error_type, words))
                shown.append(FailedRows(status, error_type, reason.value, message, int(count), keys, reason in WORTH_ASKING))
        return shown, int(total) - sum(one.rows for one in shown)

    def keys_like(self, job_id: str, key: str, *, limit: int = 500, after: str | None = None) -> list[str]:
        """Keys of the job's rows that failed for the same reason as the row with this key, in the order of their text.

        :param after: the last key of the page before
        """
        one = failed.alias("one")
        errored = one.c.status == RequestStatus.ERRORED.value
        same = (
            one.c.job_id == failed.c.job_id,
            one.c.status == failed.c.status,
            one.c.error_type.is_not_distinct_from(failed.c.error_type),
            sa.or_(sa.not_(errored), one.c.error_message.is_not_distinct_from(failed.c.error_message)),
        )
        statement = sa.select(failed.c.key).join(one, sa.and_(*same)).where(failed.c.job_id == job_id, one.c.key == key)
        if after is not None:
            statement = statement.where(failed.c.key > after)
        with self.engine.connect() as connection:
            return list(connection.execute(statement.order_by(failed.c.key).limit(limit)).scalars())

    def failed_page(
        self, job_id: str, *, limit: int = 1000, after: str | None = None, status: str | None = None, error_type: str | None = None
    ) -> list[dict[str, Any]]:
        """Rows of a job that have no whole answer, by key: ``key``, ``status``, ``error_type``, ``error_message``.

        :param after: the last key of the page before
        :param status: only rows with this outcome
        :param error_type: only rows with this type of error
        """
        columns = (failed.c.key, failed.c.status, failed.c.error_type, failed.c.error_message)
        statement = sa.select(*columns).where(failed.c.job_id == job_id).order_by(failed.c.key).limit(limit)
        if after is not None:
            statement = statement.where(failed.c.key > after)
        if status is not None:
            statement = statement.where(failed.c.status == status)
        if error_type is not None:
            statement = statement.where(failed.c.error_type == error_type)
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(statement).mappings()]


#: the error's message, for errors of the API only: the message of an answer that does not fit its schema differs from row to row
_WORDS = sa.case((failed.c.status == RequestStatus.ERRORED.value, failed.c.error_message), else_=sa.null()).label("words")


def _kinds(connection: Connection, *here: sa.ColumnElement[bool]) -> Iterator[tuple[Failure, int]]:
    """The distinct failures, each with its number of rows."""
    found = sa.select(failed.c.status, failed.c.error_type, _WORDS).where(*here).subquery()
    kind = (found.c.status, found.c.error_type, found.c.words)
    statement = sa.select(*kind, sa.func.count()).group_by(*kind).order_by(*kind)
    for *failure, rows in connection.execution_options(yield_per=_KEYS_AT_A_TIME).execute(statement):
        yield Failure(*failure), rows


def _rows(connection: Connection, *here: sa.ColumnElement[bool], limit: int | None = None, ordered: bool = False) -> sa.CursorResult[Any]:
    """The key and the fields of :class:`Failure` of each failed row."""
    statement = sa.select(failed.c.key, failed.c.status, failed.c.error_type, _WORDS).where(*here).limit(limit)
    if ordered:
        statement = statement.order_by(failed.c.key)
    return connection.execution_options(yield_per=_KEYS_AT_A_TIME).execute(statement)


def _pieces(values: Sequence[_T]) -> Iterator[Sequence[_T]]:
    return (values[start : start + _IDS_AT_A_TIME] for start in range(0, len(values), _IDS_AT_A_TIME))


def failed_kinds(connection: Connection, which: Wanted, *here: sa.ColumnElement[bool]) -> Iterator[FailedRows]:
    """Failed rows by status, type and reason.

    :param which: the rows that a further round would ask, by their reasons
    """
    groups: dict[tuple[str, str | None, Reason], tuple[str | None, int]] = {}
    for failure, rows in _kinds(connection, *here):
        group = (failure.status, failure.error_type, which.failures.reason(failure))
        words, before = groups.get(group, (failure.error_message, 0))
        groups[group] = words, before + rows
    for (status, error_type, reason), (words, rows) in groups.items():
        alike = [failed.c.status == status, failed.c.error_type.is_not_distinct_from(error_type)]
        alone = sum(group[:2] == (status, error_type) for group in groups) == 1
        candidates = _rows(connection, *here, *alike, ordered=True, limit=KEYS_KEPT if alone else None)
        keys = (row.key for row in candidates if which.failures.reason(Failure(row.status, row.error_type, row.words)) is reason)
        yield FailedRows(status, error_type, reason.value, words, rows, list(islice(keys, KEYS_KEPT)), reason in which.reasons)
        candidates.close()

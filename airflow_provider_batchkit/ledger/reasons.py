"""Why rows of a job have no whole answer. Nothing here writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from airflow_provider_batchkit.ledger.tables import failed
from airflow_provider_batchkit.model import RequestStatus
from airflow_provider_batchkit.request.failed import advice_for
from airflow_provider_batchkit.request.failures import KNOWN_FAILURES, Failure, Failures

_REASONS = 20
_KEYS = 3


@dataclass(frozen=True, slots=True)
class FailedRows:
    """Rows of a job that have no whole answer, all for one reason."""

    status: str
    error_type: str | None
    #: for errors the API's message, which all of these rows have; for other outcomes the message of one of the rows
    message: str | None
    rows: int
    #: the keys of some of these rows
    keys: tuple[str, ...]
    #: whether asking again may help, and what to do
    advice: str


class Reasons:
    """The part of the overview that says why rows failed."""

    engine: Engine

    def failed_rows(self, job_id: str, failures: Failures = KNOWN_FAILURES) -> tuple[list[FailedRows], int]:
        """Why rows of a job have no whole answer: the 20 most frequent reasons, and how many rows have another one."""
        words = sa.case((failed.c.status == RequestStatus.ERRORED.value, failed.c.error_message), else_=sa.null()).label("words")
        found = sa.select(failed.c.status, failed.c.error_type, words, failed.c.error_message).where(failed.c.job_id == job_id).subquery()
        kind = (found.c.status, found.c.error_type, found.c.words)
        rows = sa.func.count().label("rows")
        statement = sa.select(*kind, sa.func.min(found.c.error_message).label("message"), rows).group_by(*kind)
        with self.engine.connect() as connection:
            total = connection.execute(sa.select(sa.func.count()).where(failed.c.job_id == job_id)).scalar_one()
            kinds = connection.execute(statement.order_by(rows.desc(), *kind).limit(_REASONS)).all()
            shown = [self._reason(connection, job_id, one, failures) for one in kinds]
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

    @staticmethod
    def _reason(connection: Connection, job_id: str, one: Any, failures: Failures) -> FailedRows:
        here = [failed.c.job_id == job_id, failed.c.status == one.status, failed.c.error_type.is_not_distinct_from(one.error_type)]
        if one.status == RequestStatus.ERRORED.value:
            here.append(failed.c.error_message.is_not_distinct_from(one.words))
        keys = connection.execute(sa.select(failed.c.key).where(*here).order_by(failed.c.key).limit(_KEYS)).scalars().all()
        advice = advice_for(one.status, one.error_type, failures.reason(Failure(one.status, one.error_type, one.words)))
        return FailedRows(one.status, one.error_type, one.message, int(one.rows), tuple(keys), advice)

    def failed_keys(
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

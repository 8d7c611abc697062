"""The contract of a database of results, and the statements that are the same on all of them.

A load is published in one transaction that begins with the fence row of its table. The fence holds an even number, twice the last turn at
the table; a publish makes it odd. So two transactions that want different things of the fence write different values to one column of one
row, which every database either queues or refuses. DuckDB, for one, lets two transactions pass that write the value that is there.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from airflow_provider_batchkit.exceptions import BatchKitError, TableError, WarehouseBusyError
from airflow_provider_batchkit.landing.refusal import not_kept, refusal
from airflow_provider_batchkit.landing.table import ResultTable, WriteDisposition
from airflow_provider_batchkit.model import ANSWERED, RequestStatus

log = logging.getLogger(__name__)

#: of each database of results: the last turn at each table, and the loads that are published
FENCE, PUBLISHED = "batchkit_fence", "batchkit_published"
#: how the tables begin that prove, before anything is paid, that staging tables can be made
PROBE = "batchkit_probe"
#: their names, with the time at which they were made, and the seconds after which no preflight can still be at work with one
_PROBE_NAME = re.compile(rf"{PROBE}_([0-9a-f]{{8}})_[0-9a-f]{{8}}")
_PROBE_S = 3600
#: how long an older publish that still runs is waited for
_DRAIN_S = 600.0
_SUCCEEDED = RequestStatus.SUCCEEDED.value
_ANSWERED = ", ".join(f"'{status.value}'" for status in ANSWERED)

#: a block of rows, column by column
Columns = Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Publish:
    """How a staged load is to be published."""

    load_id: str
    attempt_id: str
    stage: str
    turn: int
    disposition: WriteDisposition
    #: of an append, whose rows are keyed by key and batch
    batch_id: str
    #: batches over whose answers it may write; None for all
    older: Sequence[str] | None = None
    #: batches of earlier rounds of the same job
    earlier: Sequence[str] = ()
    #: The batches of a replace, where they are of several jobs or rounds and so may have the same keys. Of equals the last one's rows stay.
    order: Sequence[str] = ()


class Warehouse(ABC):
    """A database of results, over connections of its driver. Methods that take a connection leave it open."""

    #: what people call it
    name: ClassVar[str]
    #: the driver reads ``%`` as itself in a statement without parameters
    quote_character: ClassVar[str] = '"'

    def __init__(self, conn_id: str, connect: Callable[[], Any]) -> None:
        self.conn_id = conn_id
        self._connect = connect

    # --- connections --------------------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self) -> Iterator[Any]:
        """A connection of the driver's, ready for the statements here, closed at the end."""
        with closing(self._connect()) as connection:
            self.prepare(connection)
            yield connection

    def prepare(self, connection: Any) -> None:  # noqa: B027 - most databases need none
        """Settings of a fresh connection."""

    @contextmanager
    def transaction(self, connection: Any) -> Iterator[None]:
        """One transaction, committed at the end and rolled back on an error."""
        self.begin(connection)
        try:
            yield
        except BaseException:
            self.rollback(connection)
            raise
        self.commit(connection)

    def begin(self, connection: Any) -> None:  # noqa: B027 - most drivers do it themselves
        """Begin a transaction, where the driver does not do so with its first statement."""

    def commit(self, connection: Any) -> None:
        """Commit, where a transaction is open."""
        connection.commit()

    def rollback(self, connection: Any) -> None:
        """Roll back, where a transaction is open."""
        connection.rollback()

    def run(self, connection: Any, statement: str) -> None:
        """Run a statement without parameters."""
        with closing(connection.cursor()) as cursor:
            cursor.execute(statement)

    def rows(self, connection: Any, statement: str) -> list[tuple[Any, ...]]:
        """The rows of a query without parameters."""
        with closing(connection.cursor()) as cursor:
            cursor.execute(statement)
            return [tuple(row) for row in cursor.fetchall()]

    # --- names --------------------------------------------------------------------------------------------------------------------

    def quote(self, name: str) -> str:
        """A name as SQL."""
        q = self.quote_character
        return f"{q}{name.replace(q, q * 2)}{q}"

    def beside(self, table: ResultTable, name: str) -> str:
        """The name, as SQL, of another table in the schema of a result table."""
        schema = table.table.schema
        return f"{self.quote(schema)}.{self.quote(name)}" if schema else self.quote(name)

    def spelled(self, table: ResultTable) -> str:
        """A result table's name as SQL."""
        return self.beside(table, table.table.name)

    @staticmethod
    def literal(text: str) -> str:
        """A text as SQL; of batch ids and names of our own, which hold no backslash."""
        if "\\" in text or "\0" in text:
            raise TableError(f"{text!r} cannot be written as SQL. Nothing was published.")
        return "'{}'".format(text.replace("'", "''"))

    @abstractmethod
    def identity(self, connection: Any, name: str) -> str:
        """The one name of a table in its database, equal for every way to spell it."""

    def known_as(self, connection: Any, name: str) -> str:
        """The name by which the ledger knows a table of this database."""
        found = f"{self.conn_id}:{self.identity(connection, name)}"
        # what the ledger's column holds
        return found if len(found) <= 250 else f"{found[:180]}~{hashlib.sha256(found.encode()).hexdigest()[:40]}"

    # --- the table ----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def check(self, connection: Any, table: ResultTable) -> bool:
        """Whether the table exists; what a landing writes to it is noted in ``table``.

        :raises TableError: when results cannot land in it; the message lists every reason
        """

    @abstractmethod
    def create(self, connection: Any, table: ResultTable, *, unique_key: bool) -> None:
        """Create the table unless somebody just did; ``unique_key`` when no key comes twice."""

    def is_empty(self, connection: Any, table: ResultTable) -> bool:
        """Whether the table has no row."""
        return not self.rows(connection, f"SELECT 1 FROM {self.spelled(table)} LIMIT 1")

    def create_books(self, connection: Any, table: ResultTable) -> None:
        """Create the tables of fences and markers beside a result table, and its fence, unless they are there."""
        fence, published = self.beside(table, FENCE), self.beside(table, PUBLISHED)
        self.run(connection, f"CREATE TABLE IF NOT EXISTS {fence} (name VARCHAR(64) NOT NULL PRIMARY KEY, turn BIGINT NOT NULL)")
        self.run(
            connection,
            f"CREATE TABLE IF NOT EXISTS {published} (load_id VARCHAR(64) NOT NULL PRIMARY KEY, attempt_id VARCHAR(64) NOT NULL)",
        )
        self.commit(connection)

    # --- staging ------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def stage(self, connection: Any, table: ResultTable, name: str, blocks: Iterable[Columns]) -> int:
        """Create a permanent staging table and fill it; says how many rows it has then.

        :param blocks: of rows, in the order of ``table.column_names``
        """

    def probe(self, connection: Any, table: ResultTable) -> None:
        """Prove that this user can make and fill tables beside a result table: one is made, and dropped.

        :raises WarehouseBusyError: when that fails, whatever the reason: it may pass, and a retry pays for nothing
        """
        name = f"{PROBE}_{int(time.time()):x}_{secrets.token_hex(4)}"
        try:
            self.stage(connection, table, name, [])
            self.drop(connection, table, [name])
            self._drop_old_probes(connection, table)
        except BatchKitError:
            raise
        except Exception as e:
            raise WarehouseBusyError(
                f"No staging table can be made in {self.name} beside {table.name}, behind the connection {self.conn_id!r}: {e}. A landing "
                "needs the right to create tables there, and to drop its own. Nothing was sent."
            ) from e

    def _drop_old_probes(self, connection: Any, table: ResultTable) -> None:
        """Drop the tables of preflights whose worker died before it dropped its own."""
        before = time.time() - _PROBE_S
        for name in self.stages(connection, table, f"{PROBE}_"):
            made = _PROBE_NAME.fullmatch(name)
            if made is None or int(made[1], 16) > before:
                continue
            try:
                self.drop(connection, table, [name])
            except Exception as e:  # noqa: BLE001 - another user's table keeps nobody from landing
                self.rollback(connection)
                log.info("%s is left of a preflight and cannot be dropped: %s", name, e)

    def count(self, connection: Any, table: ResultTable, name: str) -> int:
        """How many rows a staging table has."""
        return int(self.rows(connection, f"SELECT COUNT(*) FROM {self.beside(table, name)}")[0][0])

    @abstractmethod
    def stages(self, connection: Any, table: ResultTable, prefix: str) -> list[str]:
        """Names of the staging tables in a result table's schema that begin with ``prefix``."""

    def drop(self, connection: Any, table: ResultTable, names: Iterable[str]) -> None:
        """Drop staging tables."""
        for name in names:
            self.run(connection, f"DROP TABLE IF EXISTS {self.beside(table, name)}")
        self.commit(connection)

    # --- fence and markers --------------------------------------------------------------------------------------------------------

    def raise_fence(self, connection: Any, table: ResultTable, fence: str, turn: int) -> bool:
        """Raise a table's fence to a turn, once older publishes that run have ended. False when it is higher already.

        :param fence: its name
        :raises WarehouseBusyError: when an older publish does not end
        """
        until = time.monotonic() + _DRAIN_S
        while True:
            try:
                return self._raise_fence(connection, table, fence, turn)
            except Exception as e:
                if not self.is_conflict(e) or time.monotonic() > until:
                    raise
                log.info("An older landing in %s still runs, and is waited for: %s", table.name, e)
                time.sleep(0.2)

    def _raise_fence(self, connection: Any, table: ResultTable, fence: str, turn: int) -> bool:
        books, name = self.beside(table, FENCE), self.literal(fence)
        with self.transaction(connection):
            self.lock(connection, table)
            self.run(connection, f"UPDATE {books} SET turn = {2 * turn} WHERE name = {name} AND turn < {2 * turn}")
            found = self.rows(connection, f"SELECT turn FROM {books} WHERE name = {name}")
            if not found:
                self.run(connection, f"INSERT INTO {books} (name, turn) VALUES ({name}, {2 * turn})")
                return True
            return int(found[0][0]) == 2 * turn

    def lock(self, connection: Any, table: ResultTable) -> None:  # noqa: B027 - the fence row itself is a lock on most databases
        """Begin a transaction of the fence: wait for those that run, where an UPDATE of the fence row would not see what they commit."""

    def is_conflict(self, error: Exception) -> bool:
        """Whether an error says that another transaction was in the way, and that the same may succeed later."""
        return False

    def marked(self, connection: Any, table: ResultTable, load_ids: Sequence[str]) -> dict[str, str]:
        """Those of some loads whose marker is there: they are published, each by the attempt that is named."""
        if not load_ids:
            return {}
        wanted = ", ".join(map(self.literal, load_ids))
        found = self.rows(connection, f"SELECT load_id, attempt_id FROM {self.beside(table, PUBLISHED)} WHERE load_id IN ({wanted})")
        self.rollback(connection)
        return dict(found)

    # --- publishing ---------------------------------------------------------------------------------------------------------------

    def publish(self, connection: Any, table: ResultTable, fence: str, how: Publish) -> bool:
        """Move a staged load into the table, with its marker, in one transaction. False, and nothing is changed, behind a higher fence.

        :raises TableError: when the table would store a key as another one, or refuses a row
        :raises WarehouseBusyError: when the database refuses a statement for a reason that may pass
        """
        books, name = self.beside(table, FENCE), self.literal(fence)
        try:
            with self.transaction(connection):
                self.lock(connection, table)
                self.run(connection, f"UPDATE {books} SET turn = {2 * how.turn + 1} WHERE name = {name} AND turn = {2 * how.turn}")
                if self.rows(connection, f"SELECT turn FROM {books} WHERE name = {name}") != [(2 * how.turn + 1,)]:
                    raise _Fenced  # noqa: TRY301 - it rolls the transaction back
                for statement in self.statements(table, how):
                    self.run(connection, statement)
                self._check_keys(connection, table, how)
                marker = f"{self.literal(how.load_id)}, {self.literal(how.attempt_id)}"
                self.run(connection, f"INSERT INTO {self.beside(table, PUBLISHED)} (load_id, attempt_id) VALUES ({marker})")
        except _Fenced:
            return False
        except Exception as e:
            if self.is_conflict(e):
                log.info("Another landing in %s came first: %s", table.name, e)
                return False
            refused = refusal(e, table.name, how.batch_id)
            if refused is None:
                raise
            raise refused from e
        return True

    def statements(self, table: ResultTable, how: Publish) -> list[str]:
        """What moves staged rows into the table."""
        target, stage = self.spelled(table), self.beside(table, how.stage)
        names = ", ".join(map(self.quote, table.column_names))
        staged = ", ".join(f"s.{self.quote(name)}" for name in table.column_names)
        plain = f"INSERT INTO {target} ({names}) SELECT {staged} FROM {stage} s"
        same = self._same(table, "t", "s")
        first = self.quote(table.key_names[0])
        lacking = f"{plain} LEFT JOIN {target} t ON {same} WHERE t.{first} IS NULL"
        if how.disposition is WriteDisposition.REPLACE:
            # of equal keys an answer is written before a failure, and among these the later batch's before the earlier one's
            those = [f"s.status {is_it} '{_SUCCEEDED}' AND s.batch_id = " for is_it in ("=", "<>")]
            several = [f"{lacking} AND {one}{self.literal(batch_id)}" for one in those for batch_id in reversed(how.order)]
            return [f"DELETE FROM {target}", *(several or [plain])]
        if how.disposition is WriteDisposition.MERGE:
            return [self.update(table, how), lacking]
        own = f"batch_id = {self.literal(how.batch_id)}"
        found = [f"DELETE FROM {target} WHERE {own}"]
        if how.older is not None:
            # a row without an answer gives way; what is answered stays as it is
            found = [f"DELETE FROM {target} WHERE {own} AND status NOT IN ({_ANSWERED})"]
            plain = f"{plain} LEFT JOIN {target} t ON {same} AND t.{own} WHERE t.{first} IS NULL"
        if how.earlier:
            again = f"EXISTS (SELECT 1 FROM {stage} s WHERE {self._same(table, target, 's')})"
            found.append(f"DELETE FROM {target} WHERE batch_id IN ({', '.join(map(self.literal, how.earlier))}) AND {again}")
        return [*found, plain]

    def update(self, table: ResultTable, how: Publish) -> str:
        """What a merge writes over rows that are there: a failed request never overwrites an answer."""
        values = ", ".join(f"{self.quote(name)} = s.{self.quote(name)}" for name in self._changed(table))
        return (
            f"UPDATE {self.spelled(table)} AS t SET {values} FROM {self.beside(table, how.stage)} AS s "
            f"WHERE {self._same(table, 't', 's')} AND {self._better(how)}"
        )

    @staticmethod
    def _changed(table: ResultTable) -> list[str]:
        return [name for name in table.column_names if name not in table.key_names]

    def _better(self, how: Publish, t: str = "t") -> str:
        over = "" if how.older is None else f" AND {t}.batch_id IN ({', '.join(map(self.literal, how.older)) or 'NULL'})"
        return f"((s.status = '{_SUCCEEDED}'{over}) OR {t}.status IS NULL OR {t}.status <> '{_SUCCEEDED}')"

    def _same(self, table: ResultTable, left: str, right: str) -> str:
        return " AND ".join(f"{left}.{self.quote(name)} = {right}.{self.quote(name)}" for name in table.key_names)

    def _check_keys(self, connection: Any, table: ResultTable, how: Publish) -> None:
        stage, first = self.beside(table, how.stage), self.quote(table.key_names[0])
        there = f"LEFT JOIN {self.spelled(table)} t ON {self._same(table, 't', 's')}"
        lost = self.rows(connection, f"SELECT s.{first} FROM {stage} s {there} WHERE t.{first} IS NULL LIMIT 1")
        if how.disposition is WriteDisposition.MERGE and not lost:
            # what a merge had to write over is the staged batch's by now
            kept = f"{self._better(how)} AND t.batch_id <> s.batch_id"
            lost = self.rows(connection, f"SELECT s.{first} FROM {stage} s {there} WHERE {kept} LIMIT 1")
        if lost:
            raise not_kept(lost[0][0], table.name, how.batch_id)


class _Fenced(Exception):
    """Somebody else has had a later turn."""


def busy(name: str, conn_id: str, why: object) -> WarehouseBusyError:
    """The error of a database that another process keeps to itself."""
    return WarehouseBusyError(
        f"{name} behind the connection {conn_id!r} cannot be opened: {why}. Another process has it, and one that is stopped keeps it. "
        "Nothing was lost: the next try goes on from the ledger."
    )

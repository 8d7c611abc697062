"""Loads and turns. A load is what one fetch lands in a table of another database; a turn is the right to publish in that table.

A load is ``open`` when an attempt has begun it, ``prepared`` when its outcomes and its bill are noted here, and ``landed`` when its rows
are known to be in the table. Only the youngest attempt that has opened a load may prepare it or mark it as landed; the holder of the turn
at the table marks every load whose marker is in the table.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from airflow_provider_batchkit.exceptions import LeaseLostError, TurnTakenError
from airflow_provider_batchkit.ledger.engine import Part, clock, write_transaction
from airflow_provider_batchkit.ledger.tables import load, prepared, turn, version


class LoadState(str, Enum):
    """How far a load has come."""

    OPEN = "open"
    PREPARED = "prepared"
    LANDED = "landed"


@dataclass(frozen=True, slots=True)
class Load:
    """A load, as an attempt has opened it."""

    load_id: str
    table: str
    attempt_id: str
    state: LoadState
    #: the attempt that prepared the load last, and how many rows it will publish; None before
    prepared_by: str | None
    rows: int | None


@dataclass(frozen=True, slots=True)
class PreparedPart:
    """A part of what a load will write to the ledger: a row of ``batchkit_prepared``."""

    batch_id: str
    kind: str
    entries: str
    asked: bool | None = None
    source_rows: int | None = None


class Loads(Part):
    """The part of the ledger that keeps loads and turns."""

    def ledger_id(self) -> str:
        """The ledger's own id."""
        with self.engine.connect() as connection:
            return str(connection.execute(sa.select(version.c.ledger_id)).scalar_one())

    def open_load(self, fetch_id: str, table: str, attempt_id: str) -> Load:
        """Begin a load, or take over one that an older attempt has begun and that has not landed.

        :param fetch_id: the id of these batches landing in this table, the same for every attempt
        :param attempt_id: a UUIDv7 in its text form: a younger attempt has a greater one
        :raises LeaseLostError: when a younger attempt has opened it
        """
        try:
            return self._open_load(fetch_id, table, attempt_id)
        except IntegrityError:
            # another attempt created the row between our SELECT and our INSERT
            return self._open_load(fetch_id, table, attempt_id)

    def _open_load(self, fetch_id: str, table: str, attempt_id: str) -> Load:
        with write_transaction(self.engine) as connection:
            done = sa.select(sa.func.count()).where(load.c.fetch_id == fetch_id, load.c.state == LoadState.LANDED.value)
            number = connection.execute(done).scalar_one()
            load_id = hashlib.sha256(f"{fetch_id} {number}".encode()).hexdigest()[:32]
            here = load.c.load_id == load_id
            if connection.execute(sa.update(load).where(here).values(load_id=load_id)).rowcount == 0:
                opened: dict[str, Any] = {"state": LoadState.OPEN.value, "attempt_id": attempt_id, "opened_at": clock(connection)}
                connection.execute(sa.insert(load).values(load_id=load_id, fetch_id=fetch_id, table_name=table, **opened))
                return Load(load_id, table, attempt_id, LoadState.OPEN, None, None)
            found = connection.execute(sa.select(load).where(here)).one()
            if attempt_id < found.attempt_id:
                raise _load_lost(load_id, attempt_id)
            connection.execute(sa.update(load).where(here).values(attempt_id=attempt_id))
            return Load(load_id, table, attempt_id, LoadState(found.state), found.prepared_by, found.rows_staged)

    def prepare_load(self, opened: Load, rows: int, parts: Sequence[PreparedPart], also: Callable[[Connection], None]) -> bool:
        """Note what a load will write to the ledger, beside what older attempts noted. False when it has landed.

        :param also: makes further writes in the same transaction
        :raises LeaseLostError: when a younger attempt has opened it
        """
        with write_transaction(self.engine) as connection:
            open_states = [LoadState.OPEN.value, LoadState.PREPARED.value]
            mine = sa.and_(load.c.load_id == opened.load_id, load.c.attempt_id == opened.attempt_id, load.c.state.in_(open_states))
            values = {"state": LoadState.PREPARED.value, "rows_staged": rows, "prepared_by": opened.attempt_id}
            if connection.execute(sa.update(load).where(mine).values(values)).rowcount == 0:
                return self._has_landed(connection, opened)
            own = sa.and_(prepared.c.load_id == opened.load_id, prepared.c.attempt_id == opened.attempt_id)
            connection.execute(sa.delete(prepared).where(own))
            if parts:
                noted = [
                    {
                        "load_id": opened.load_id,
                        "attempt_id": opened.attempt_id,
                        "batch_id": part.batch_id,
                        "part": number,
                        "kind": part.kind,
                        "asked": part.asked,
                        "source_rows": part.source_rows,
                        "entries": part.entries,
                    }
                    for number, part in enumerate(parts)
                ]
                connection.execute(sa.insert(prepared), noted)
            also(connection)
            return True

    @staticmethod
    def _has_landed(connection: Connection, opened: Load) -> bool:
        found = connection.execute(sa.select(load.c.state).where(load.c.load_id == opened.load_id)).scalar()
        if found != LoadState.LANDED.value:
            raise _load_lost(opened.load_id, opened.attempt_id)
        return False

    def check_load(self, opened: Load) -> None:
        """:raises LeaseLostError: when a younger attempt has opened the load"""
        with self.engine.connect() as connection:
            found = connection.execute(sa.select(load.c.attempt_id).where(load.c.load_id == opened.load_id)).scalar()
        if found != opened.attempt_id:
            raise _load_lost(opened.load_id, opened.attempt_id)

    def done_loads(self, opened: Load) -> set[str]:
        """The first 20 characters of the ids of the table's landed loads, and of ``opened`` where this attempt still has its lease. What
        older attempts have staged for these loads is not needed any more.
        """
        mine = sa.and_(load.c.load_id == opened.load_id, load.c.attempt_id == opened.attempt_id)
        done = sa.and_(load.c.table_name == opened.table, sa.or_(load.c.state == LoadState.LANDED.value, mine))
        with self.engine.connect() as connection:
            return {load_id[:20] for load_id in connection.execute(sa.select(load.c.load_id).where(done)).scalars()}

    def abandon_load(self, opened: Load) -> None:
        """Delete a load that was not published and must not be, because other loads have landed its batches."""
        with write_transaction(self.engine) as connection:
            mine = sa.and_(load.c.load_id == opened.load_id, load.c.attempt_id == opened.attempt_id, load.c.state != LoadState.LANDED.value)
            if connection.execute(sa.delete(load).where(mine)).rowcount:
                drop_parts(connection, opened.load_id)

    def prepared_loads(self, table: str) -> list[str]:
        """Ids of the loads of a table that are prepared, and may have been published."""
        statement = sa.select(load.c.load_id).where(load.c.table_name == table, load.c.state == LoadState.PREPARED.value)
        with self.engine.connect() as connection:
            return list(connection.execute(statement.order_by(load.c.opened_at)).scalars())

    # --- turns --------------------------------------------------------------------------------------------------------------------

    def take_turn(self, opened: Load, seconds: float) -> int | None:
        """The number of a fresh turn at the load's table; None while another load has the turn. This takes over the turn of an older
        attempt of the same load, and that of a landed load, whose owner died before it gave the turn back.

        :param seconds: after which another load may take the turn
        """
        with write_transaction(self.engine) as connection:
            connection.execute(sa.update(version).values(turns=sa.func.coalesce(version.c.turns, 0) + 1))
            number = int(connection.execute(sa.select(version.c.turns)).scalar_one())
            now = clock(connection)
            values = {"turn": number, "load_id": opened.load_id, "until": now + timedelta(seconds=seconds)}
            landed = turn.c.load_id.in_(sa.select(load.c.load_id).where(load.c.state == LoadState.LANDED.value))
            free = sa.or_(turn.c.load_id.is_(None), turn.c.load_id == opened.load_id, turn.c.until < now, landed)
            here = turn.c.table_name == opened.table
            if connection.execute(sa.update(turn).where(here, free).values(values)).rowcount:
                return number
            if connection.execute(sa.select(turn.c.turn).where(here)).first() is not None:
                return None
            connection.execute(sa.insert(turn).values(table_name=opened.table, **values))
            return number

    def wait_for_turn(self, opened: Load, seconds: float, patience_s: float) -> int:
        """Wait until the turn is free, and take it; see :meth:`take_turn`.

        :param patience_s: seconds that this call waits at most
        :raises TurnTakenError: when another load still has the turn after that
        """
        end, pause = time.monotonic() + patience_s, 0.05
        while (number := self.take_turn(opened, seconds)) is None:
            if time.monotonic() >= end and (taken := self._turn_taken(opened)) is not None:
                raise taken
            time.sleep(pause)
            pause = min(pause * 1.5, 2.0)
        return number

    def _turn_taken(self, opened: Load) -> TurnTakenError | None:
        """The error that names the load which has the turn; None when the turn has been given back meanwhile."""
        with self.engine.connect() as connection:
            found = connection.execute(sa.select(turn.c.load_id, turn.c.until).where(turn.c.table_name == opened.table)).one()
        if found.load_id is None:
            return None
        return TurnTakenError(
            f"Load {found.load_id} has the turn at {opened.table}, until {found.until:%H:%M:%S} UTC at the latest: it is landing there, or "
            "its worker died. Nothing is lost: this landing takes its turn afterwards.",
            found.until,
        )

    def give_turn_back(self, table: str, number: int) -> None:
        """Free the turn, unless another load has taken it already."""
        with write_transaction(self.engine) as connection:
            connection.execute(sa.update(turn).where(turn.c.table_name == table, turn.c.turn == number).values(load_id=None))


def lock_prepared(connection: Connection, load_id: str, attempt_id: str | None) -> bool:
    """Move a prepared load to ``landed``, in the transaction that writes what it prepared. False when the load is not prepared (any more).

    :param attempt_id: the attempt that must hold the lease; None for a caller that has seen the load's marker behind the fence
    :raises LeaseLostError: when another attempt has the lease
    """
    here = sa.and_(load.c.load_id == load_id, load.c.state == LoadState.PREPARED.value)
    mine = here if attempt_id is None else sa.and_(here, load.c.attempt_id == attempt_id)
    if connection.execute(sa.update(load).where(mine).values(state=LoadState.LANDED.value)).rowcount:
        return True
    if attempt_id is not None and connection.execute(sa.select(load.c.load_id).where(here)).first() is not None:
        raise _load_lost(load_id, attempt_id)
    return False


def parts_of(connection: Connection, load_id: str, attempt_id: str, kind: str) -> Iterator[tuple[str, Any]]:
    """(batch id, entries) of each part of this kind that an attempt has prepared."""
    here = sa.and_(prepared.c.load_id == load_id, prepared.c.attempt_id == attempt_id, prepared.c.kind == kind)
    # one statement per part: some drivers would read all parts into memory
    for part, batch_id in connection.execute(sa.select(prepared.c.part, prepared.c.batch_id).where(here).order_by(prepared.c.part)).all():
        text = connection.execute(sa.select(prepared.c.entries).where(here, prepared.c.part == part)).scalar_one()
        yield batch_id, json.loads(text)


def drop_parts(connection: Connection, load_id: str) -> None:
    """Delete what a load prepared, once it is written or abandoned."""
    connection.execute(sa.delete(prepared).where(prepared.c.load_id == load_id))


def _load_lost(load_id: str, attempt_id: str) -> LeaseLostError:
    return LeaseLostError(
        f"A younger attempt than {attempt_id} lands the same results (load {load_id}). This attempt stops; the younger one goes on."
    )

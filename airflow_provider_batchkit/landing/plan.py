"""What must be written to a table for a fetch's batches, given what has landed there before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.engine import Connection

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.ledger import Ledger
from airflow_provider_batchkit.ledger.landings import Landed, generation, landed_in, younger_is_there
from airflow_provider_batchkit.ledger.records import BatchRecord
from airflow_provider_batchkit.model import BatchSnapshot, common_key_type, key_kind
from airflow_provider_batchkit.schema import OutputSchema


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that must land, and its row in the ledger; the row is None for a batch that was submitted elsewhere."""

    batch_id: str
    record: BatchRecord | None


#: returns an ended batch as the API shows it now
Look = Callable[[Batch], BatchSnapshot]


@dataclass(frozen=True, slots=True)
class Plan:
    """What must be written to a table for a fetch's batches: those that have not landed there under ``number``.

    A table that is missing, or empty although rows were written to it, is filled anew under the next number. So the number of any batch
    that has ever landed in the table says whether its rows are there.
    """

    #: the table's name in the ledger
    table: str
    batches: Sequence[Batch]
    number: int
    #: the latest landing in the table of each of the batches
    landed: Mapping[str, Landed]
    #: whether the user insists on writing batches again that have landed
    rewrites: bool

    @classmethod
    def make(cls, connection: Connection, table: str, is_empty: Callable[[], bool], batches: Sequence[Batch], *, rewrite: bool) -> Plan:
        """
        :param connection: a connection to the ledger
        :param is_empty: whether the table is missing or has no row
        """
        ids = [batch.batch_id for batch in batches]
        return cls(table, batches, landing_number(connection, table, is_empty), landed_in(connection, ids, table), rewrite)

    def has_landed(self, batch: Batch) -> bool:
        """Whether the batch is in the table already, and stays as it is."""
        return not self.rewrites and batch.batch_id in self.landed and self.landed[batch.batch_id].number == self.number

    def is_torn(self, batch: Batch) -> bool:
        """Whether the batch is in the table without some of its answers."""
        return batch.record is not None and self.has_landed(batch) and not self.landed[batch.batch_id].complete

    def before(self, batch_id: str) -> Landed | None:
        """The batch's latest landing in the table; None where the plan ignores it."""
        return None if self.rewrites else self.landed.get(batch_id)

    def would_replace_younger(self, connection: Connection, batches: Sequence[Batch]) -> bool:
        """Whether a ``replace`` that fills the table anew would delete the rows of a later run, which has already filled it."""
        known = [self.landed[batch.batch_id] for batch in batches if batch.batch_id in self.landed]
        if self.rewrites or len(known) < len(batches):
            return False
        return all(younger_is_there(connection, self.table, self.number, one) for one in known)

    def has_changed(self, connection: Connection, ids: Sequence[str], is_empty: Callable[[], bool]) -> str | None:
        """What has changed in the table for these batches since the plan was made; None for nothing."""
        if landed_in(connection, ids, self.table) != {batch_id: self.landed[batch_id] for batch_id in ids if batch_id in self.landed}:
            return f"{', '.join(ids)} landed in {self.table} while their results were read."
        if landing_number(connection, self.table, is_empty) != self.number:
            return f"{self.table} was emptied or filled while the results were read."
        return None


def landing_number(connection: Connection, table: str, is_empty: Callable[[], bool]) -> int:
    """The number under which a batch would land in the table now."""
    last, written = generation(connection, table)
    return max(last + (written and is_empty()), 1)


def common_key(ledger: Ledger, batches: Sequence[Batch]) -> list[tuple[str, str]]:
    """The key of all the batches.

    :raises BatchInputError: the batches have different keys
    """
    keys = {tuple(ledger.key_columns(b.record.job_id)) if b.record is not None else () for b in batches}
    # a source may report its types to one job and not to another, which an earlier release submitted
    if len({tuple((column, key_kind(type_name)) for column, type_name in key) for key in keys}) > 1:
        raise BatchInputError(
            f"The batches {_names(batches)} have different keys "
            f"({'; '.join(sorted(', '.join(f'{c} {t}' for c, t in k) or 'custom_id' for k in keys))}) and cannot land in one table. "
            "Nothing was written."
        )
    return [(alike[0][0], common_key_type({type_name for _, type_name in alike})) for alike in zip(*keys, strict=True)]


def common_schema(ledger: Ledger, batches: Sequence[Batch]) -> OutputSchema | None:
    """The schema that the answers of all the batches must fit.

    :raises BatchInputError: the batches have different schemas
    """
    jobs = {b.record.job_id if b.record is not None else None for b in batches}
    texts = {None if job_id is None else ledger.output_schema_of(job_id) for job_id in jobs}
    if len(texts) > 1:
        raise BatchInputError(
            f"The batches {_names(batches)} asked with different output schemas, or some with none, and cannot "
            "land together. Fetch those of one schema at a time. Nothing was written."
        )
    text = texts.pop()
    return None if text is None else OutputSchema(text)


def _names(batches: Sequence[Batch]) -> str:
    return ", ".join(batch.batch_id for batch in batches)

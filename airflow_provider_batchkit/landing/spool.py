"""The spool: a batch's rows on the worker's disk, read once from the API, until another database than the ledger's has them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from itertools import compress
from pathlib import Path
from typing import Any

from airflow_provider_batchkit.landing.stage import AskedKeys, Stage
from airflow_provider_batchkit.landing.table import ResultTable
from airflow_provider_batchkit.ledger.bulk import BulkColumns
from airflow_provider_batchkit.ledger.loads import PreparedPart
from airflow_provider_batchkit.model import ANSWERED

#: the columns of the stage that the ledger keeps of a failed row
FAILED_COLUMNS = (
    *("batchkit_key", "custom_id", "batchkit_asked", "status", "error_type", "error_message"),
    *("batchkit_batch_cost", "batchkit_standard_cost"),
)
_ANSWERED = frozenset(status.value for status in ANSWERED)


class Spool(Stage):
    """Writes rows to a file, and keeps what the ledger needs of them."""

    def __init__(self, path: Path, table: ResultTable, keys: AskedKeys | None, ranks: Mapping[str, int], *, include_failed: bool) -> None:
        super().__init__(table, keys, ranks)
        self._path = path
        self._include_failed = include_failed
        self._names = [*(name for name, _ in table.key_columns), *(name for name, _ in table.answer_columns), *dict(self.columns)]
        self._loader = self
        #: number of rows for the table
        self.rows = 0
        self._failed: list[str] = []

    @contextmanager
    def filling(self) -> Iterator[None]:
        with self._path.open("wb") as self._file:
            yield

    def write(self, columns: BulkColumns) -> None:
        """Add rows, in the order of a stage's columns."""
        named = dict(zip(self._names, columns, strict=True))
        if any(key is not None for key in named["batchkit_key"]):
            failed = [row for row in zip(*(named[name] for name in FAILED_COLUMNS), strict=True) if row[0] is not None]
            self._failed.append(json.dumps(failed))
        wanted = [self._include_failed or status in _ANSWERED for status in named["status"]]
        if not any(wanted):
            return
        self.rows += sum(wanted)
        kept = {name: named[name] for name in self._names if name in self._result_table.column_names}
        if not all(wanted):
            kept = {name: list(compress(column, wanted)) for name, column in kept.items()}
        pickle.dump({name: list(column) for name, column in kept.items()}, self._file, pickle.HIGHEST_PROTOCOL)

    def parts(self, batch_id: str) -> list[PreparedPart]:
        """What the ledger keeps of the rows."""
        return [
            *(PreparedPart(batch_id, "succeeded", p["entries"], p["asked"], p["source_rows"]) for p in self._packed),
            *(PreparedPart(batch_id, "failed", text) for text in self._failed),
            *([PreparedPart(batch_id, "left_out", json.dumps(sorted(self.left_out)))] if self.left_out else []),
        ]

    def blocks(self, batch_id: str, round_number: int, landed_at: datetime) -> Iterator[Sequence[Sequence[Any]]]:
        """The rows for the table, column by column in the order of its columns."""
        with self._path.open("rb") as file:
            while True:
                try:
                    block = pickle.load(file)  # noqa: S301 - this process wrote it
                except EOFError:
                    return
                rows = len(block["status"])
                for name, value in (("batch_id", batch_id), ("landed_at", landed_at), ("round", round_number)):
                    if name in self._result_table.written_results:
                        block[name] = [value] * rows
                if "cost_usd" in block:
                    block["cost_usd"] = [None if cost is None else Decimal(cost) for cost in block["cost_usd"]]
                yield [block[name] for name in self._result_table.column_names]

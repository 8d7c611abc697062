"""Ledgers of every version that was released, each as the statements that made it and the rows that it held.

``version_N.json`` was written by the code of that version: ``sqlite`` and ``postgresql`` are its CREATE statements, ``rows`` its tables.
Batch ids are placeholders, ``{running}``, since the batches are made anew for every test, with the requests of the ledger's own journal.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anthropic
import sqlalchemy as sa

FOLDER = Path(__file__).parent
VERSIONS = sorted(int(path.stem.partition("_")[2]) for path in FOLDER.glob("version_*.json"))
_TIME = "at"


class KeptLedger:
    """A ledger of some version, as data."""

    def __init__(self, version: int) -> None:
        self._kept = json.loads((FOLDER / f"version_{version}.json").read_text())
        times = [value[_TIME] for rows in self._kept["rows"].values() for row in rows for value in row.values() if _is_time(value)]
        #: brings the youngest of its times to this moment: what is settled is looked for among the batches of its time
        self._shift = dt.datetime.now(dt.UTC) - max(map(dt.datetime.fromisoformat, times))

    @property
    def runs(self) -> list[str]:
        """The DAG runs whose jobs it holds."""
        return [row["run_id"] for row in self._kept["rows"]["batchkit_job"]]

    def custom_ids(self, job_id: str) -> list[str]:
        """The requests that a job has journaled, in their order."""
        parts = [row["entries"]["bytes"] for row in self._kept["rows"]["batchkit_journal"] if row["job_id"] == job_id]
        return [json.loads(line)[1] for part in parts for line in part.splitlines()]

    def job_id(self, run_id: str) -> str:
        """The id of the job of a run."""
        return next(str(row["job_id"]) for row in self._kept["rows"]["batchkit_job"] if row["run_id"] == run_id)

    def send(self, client: anthropic.Anthropic, run_id: str) -> str:
        """Send what the job of a run has journaled, as its worker had sent it; gives the batch's id."""
        requests: list[Any] = [
            {
                "custom_id": custom_id,
                "params": {
                    "model": "claude-haiku-5-5",
                    "max_tokens": 100,
                    "messages": [{"role": "user", "content": f"{run_id.capitalize()} product {number}"}],
                },
            }
            for number, custom_id in enumerate(self.custom_ids(self.job_id(run_id)))
        ]
        return client.messages.batches.create(requests=requests).id

    def write(self, engine: sa.Engine, batch_ids: Mapping[str, str]) -> None:
        """Make the ledger in an empty database.

        :param batch_ids: placeholder → id
        """
        with engine.begin() as connection:
            for statement in self._kept[engine.dialect.name]:
                connection.exec_driver_sql(statement)
            for name, rows in self._kept["rows"].items():
                if not rows:
                    continue
                table = sa.Table(name, sa.MetaData(), autoload_with=connection)
                for row in rows:
                    connection.execute(sa.insert(table).values({key: self._value(value, batch_ids) for key, value in row.items()}))

    def _value(self, value: Any, batch_ids: Mapping[str, str]) -> Any:
        if _is_time(value):
            return dt.datetime.fromisoformat(value[_TIME]) + self._shift
        if isinstance(value, dict):
            return value["bytes"].encode()
        if isinstance(value, str) and value.startswith("{") and value.endswith("}"):
            return batch_ids.get(value[1:-1], value)
        return value


def _is_time(value: Any) -> bool:
    return isinstance(value, dict) and _TIME in value

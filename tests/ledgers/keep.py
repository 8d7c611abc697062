"""Keep a ledger of the present version, for the tests of all later ones: ``python -m tests.ledgers.keep`` before a version is released.

It holds a job that has landed, one that runs, and one whose worker died right after its POST.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from airflow_provider_batchkit.ledger.rollup import view_statements
from airflow_provider_batchkit.ledger.tables import VERSION, metadata
from airflow_provider_batchkit.simulator import Simulator, SimulatorSettings
from tests.ledgers import FOLDER
from tests.warehouse import Warehouse, kit_for

ROWS = {"landed": 3, "running": 3, "sending": 5}


def keep(path: Path) -> None:
    """Write a ledger of the present version."""
    with tempfile.TemporaryDirectory() as folder, Simulator(SimulatorSettings(clock="manual")) as sim:
        warehouse = Warehouse(sa.create_engine(f"sqlite:///{folder}/ledger.db", poolclass=sa.pool.NullPool), kit_for(sim.base_url))
        ids = {run: _submit(warehouse, sim, run) for run in ROWS}
        sim.end(ids["landed"])
        warehouse.fetch([ids["landed"]], run_id="landed")
        names = {batch_id: f"{{{run}}}" for run, batch_id in ids.items()}
        kept: dict[str, Any] = {"rows": {}}
        for name, dialect in (("sqlite", sqlite.dialect()), ("postgresql", postgresql.dialect())):  # type: ignore[no-untyped-call]
            made: list[Any] = [CreateTable(table) for table in metadata.sorted_tables]
            made += [CreateIndex(index) for table in metadata.sorted_tables for index in table.indexes]
            statements = [*(str(element.compile(dialect=dialect)) for element in made), *view_statements(dialect)]
            kept[name] = [" ".join(statement.split()) for statement in statements]
        with warehouse.engine.connect() as connection:
            for table in metadata.sorted_tables:
                found = connection.execute(sa.select(table)).mappings()
                kept["rows"][table.name] = [{key: _plain(value, names) for key, value in row.items()} for row in found]
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def _submit(warehouse: Warehouse, sim: Simulator, run: str) -> str:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    real = warehouse.ledger.submitted
    if run == "sending":
        warehouse.ledger.submitted = die  # type: ignore[method-assign,assignment]  # the moment of death
    try:
        products = [{"id": i, "name": f"product {i}"} for i in range(ROWS[run])]
        warehouse.submit(products, run_id=run, prompt=f"{run.capitalize()} {{{{ row.name }}}}")
    except KeyboardInterrupt:
        pass
    finally:
        warehouse.ledger.submitted = real  # type: ignore[method-assign]
    return str(sim.stats()["batches"][-1]["id"])


def _plain(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, bytes):
        return {"bytes": value.decode()}
    if isinstance(value, dt.datetime):
        return {"at": value.isoformat()}
    return names.get(value, value) if isinstance(value, str) else value


if __name__ == "__main__":
    keep(FOLDER / f"version_{VERSION}.json")
    sys.exit(0)

"""What the catalog's descriptions cost: runs whenever ``catalog_enrichment`` has written them, and reads the bill from the asset's event.

Needs no connection. ``budget_usd`` is a figure of this example; put what should happen above it in the place of the exception.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pendulum
from airflow.sdk import DAG, Asset, task

with DAG(
    "catalog_cost",
    schedule=[Asset("product_copy")],
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    params={"budget_usd": "500"},
    doc_md=__doc__,
    tags=["batchkit", "example"],
):

    @task
    def report(**context: Any) -> str:
        """Add up the bills of the runs that wrote the table; money is text in them, exact to the last digit."""
        total = Decimal(0)
        for events in context["triggering_asset_events"].values():
            for event in events:
                tally = event.extra["cost_tally"]
                if tally["batch_cost_usd"] is None:
                    raise ValueError(f"{event.source_run_id}: no price is known for one of {', '.join(tally['models'])}")
                print(f"{event.source_run_id}: {event.extra['rows']} rows, ${tally['batch_cost_usd']}, saved ${tally['savings_usd']}")
                total += Decimal(tally["batch_cost_usd"])
        budget = Decimal(context["params"]["budget_usd"])
        if total > budget:
            raise ValueError(f"The descriptions cost ${total}, above ${budget}")
        return str(total)

    report()

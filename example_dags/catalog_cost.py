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
        """Add up the bills of the runs that wrote the table, each once; money is text in them, exact to the last digit."""
        bills = {e.source_run_id: e.extra for events in context["triggering_asset_events"].values() for e in events}
        for run_id, bill in bills.items():
            tally = bill["cost_tally"]
            if tally["batch_cost_usd"] is None:
                raise ValueError(f"{run_id}: no price is known for one of {', '.join(tally['models'])}")
            print(f"{run_id}: {bill['rows']} rows, ${tally['batch_cost_usd']}, saved ${tally['savings_usd']}")
        total = sum(Decimal(bill["cost_tally"]["batch_cost_usd"]) for bill in bills.values())
        budget = Decimal(context["params"]["budget_usd"])
        if total > budget:
            raise ValueError(f"The descriptions cost ${total}, above ${budget}")
        return str(total)

    report()

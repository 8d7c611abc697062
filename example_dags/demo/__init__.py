"""What ``make demo`` and ``make airflow`` run: the example DAG ``catalog_enrichment`` on a catalog of 50,000 products."""

from __future__ import annotations

from pathlib import Path

DAG_ID = "catalog_enrichment"
DAGS_FOLDER = Path(__file__).resolve().parents[1]
#: what the simulator reports for every row: with claude-opus-4-8, $0.008 in a batch and $0.016 otherwise
INPUT_TOKENS, OUTPUT_TOKENS = 2_700, 100

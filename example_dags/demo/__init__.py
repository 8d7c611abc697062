"""What ``make demo`` and ``make airflow`` run: the example DAG ``catalog_enrichment`` on a catalog of 50,000 products."""

from __future__ import annotations

from pathlib import Path

DAG_ID = "catalog_enrichment"
DAGS_FOLDER = Path(__file__).resolve().parents[1]
#: tokens of a product's prompt and of its answer, by the simulator's token model: $0.008 in a batch of claude-opus-4-8, $0.016 otherwise
PROMPT_TOKENS, ANSWER_TOKENS = 200, 600

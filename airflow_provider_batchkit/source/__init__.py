"""Rows from a list, a SQL query, and CSV, JSONL or Parquet files; their keys and the keys' types."""

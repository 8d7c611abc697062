"""The output of commands: tables for people, JSON and YAML for programs, as Airflow's own commands print them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from airflow_provider_batchkit.model import usd_text
from airflow_provider_batchkit.progress import span_text
from airflow_provider_batchkit.ui.answers import plain

Row = Mapping[str, Any]


def show(rows: Sequence[Row], output: str, *, empty: str) -> None:
    """Print rows of the same columns.

    :param output: ``table``, ``plain``, ``json`` or ``yaml``; a table that is wider than the terminal is printed as a list
    :param empty: the text for a person when there is no row
    """
    if output in ("json", "yaml"):
        show_document(rows, output)
    elif not rows:
        print(empty)
    else:
        from airflow.cli.simple_table import AirflowConsole

        texts = [{name: text_of(value) for name, value in row.items()} for row in rows]
        console = AirflowConsole()
        if output == "table" and _width(texts) > console.width:
            # a table would break ids, which the next command takes, over several lines
            names = max(map(len, texts[0]))
            for row in texts:
                console.print("\n".join(f"{name:<{names}}  {text}" for name, text in row.items()), soft_wrap=True, end="\n\n")
        else:
            console.print_as(texts, output)


def _width(rows: Sequence[Mapping[str, str]]) -> int:
    """Characters of the lines of a table of these rows."""
    columns = (max(len(name), *(len(row[name]) for row in rows)) for name in rows[0])
    return sum(columns) + 3 * (len(rows[0]) - 1)


def show_document(document: Any, output: str) -> None:
    """Print values as JSON or YAML: money as exact text, times as ISO 8601, spans in seconds."""
    document = plain(document)
    if output == "json":
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        from airflow.utils import yaml

        print(yaml.dump(document, sort_keys=False, allow_unicode=True), end="")


def text_of(value: Any) -> str:
    """A value as text for a person: money is rounded up to the cent, times are given to the minute."""
    match value:
        case None | () | []:
            return "-"
        case int():
            return f"{value:,}"
        case Decimal():
            return usd_text(value)
        case datetime():
            return f"{value:%Y-%m-%d %H:%M}"
        case timedelta():
            return span_text(value.total_seconds())
        case tuple() | list() | Mapping():
            return ", ".join(f"{text_of(value[one])} {one}" if isinstance(value, Mapping) else text_of(one) for one in value)
        case _:
            # the console would read brackets in a text as its own markup
            return str(value).replace("[", r"\[")

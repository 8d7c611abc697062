"""Notifiers of the tests of alerts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airflow.sdk.bases.notifier import BaseNotifier


class Told(BaseNotifier):
    """Writes what it is told to a file, a line each."""

    template_fields: Sequence[str] = ("text",)

    def __init__(self, path: Path, text: str = "{{ batchkit.message }}", seconds: float = 0) -> None:
        super().__init__()
        self.path = path
        self.text = text
        self.seconds = seconds

    def notify(self, context: Any) -> None:
        time.sleep(self.seconds)
        with self.path.open("a") as file:
            file.write(self.text + "\n")

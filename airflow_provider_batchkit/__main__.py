"""``python -m airflow_provider_batchkit COMMAND …``: see ``--help``."""

from __future__ import annotations

import sys

from airflow_provider_batchkit.commands.registry import main

if __name__ == "__main__":
    sys.exit(main())

"""The plugin, which Airflow loads in every one of its processes. So this module imports only what such a process has loaded anyway:
FastAPI and everything behind the routes are imported with the first request.
"""

from __future__ import annotations

import re
import threading
from typing import Any
from urllib.parse import urlsplit

import airflow
from airflow.plugins_manager import AirflowPlugin
from airflow.providers.common.compat.sdk import conf

#: path of the app below Airflow's base URL
PREFIX = "/batchkit"
_PLACES = ("nav", "dag", "dag_run", "task_instance")
#: The first version that shows the page. Airflow 3.1.0 gives a plugin's page neither React nor the login's cookie, so its entry would lead
#: to an error. 3.1.8 gives both; the versions in between were not run.
_FIRST = (3, 1, 8)


class LazyApp:
    """An ASGI app that is made when it is first called."""

    def __init__(self) -> None:
        self._app: Any = None
        self._lock = threading.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._app is None:
            with self._lock:
                if self._app is None:
                    from airflow_provider_batchkit.ui.app import create_app

                    self._app = create_app()
        await self._app(scope, receive, send)


def base_path() -> str:
    """The path of Airflow's base URL, without a slash at its end. A relative address of the bundle does not work before Airflow 3.3."""
    return urlsplit(conf.get("api", "base_url", fallback="") or "").path.rstrip("/")


def _place(destination: str) -> dict[str, Any]:
    route = "batches" if destination == "nav" else f"batches-of-{destination.replace('_', '-')}"
    icon = f"{base_path()}{PREFIX}/icon"
    return {
        "name": "Batches",
        "bundle_url": f"{base_path()}{PREFIX}/page.js",
        "destination": destination,
        "url_route": route,
        "icon": f"{icon}.svg",
        "icon_dark_mode": f"{icon}-dark.svg",
        # Airflow 3.3 and later read this key; earlier versions put the entry under "Plugins"
        **({"nav_top_level": True} if destination == "nav" else {}),
    }


def places(version: str) -> list[dict[str, Any]]:
    """The places of the page in this version of Airflow; empty before the first version that can show it."""
    known = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    return [_place(destination) for destination in _PLACES] if known >= _FIRST else []


class BatchKitPlugin(AirflowPlugin):
    """The Batches page in the navigation, and as a tab of DAGs, runs and task instances."""

    name = "batchkit"
    fastapi_apps = [{"app": LazyApp(), "url_prefix": PREFIX, "name": "BatchKit"}]  # noqa: RUF012 Airflow reads a plain list
    react_apps = places(airflow.__version__)

"""Airflow's pages in a real browser: for tests, and as pictures for a person to look at.

Needs Debian's chromium (``apt-get install chromium``) and playwright, from the extra ``browser``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Without a sandbox because it may run as root; the rest keeps Chromium from calling home.
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str | None:
    """The path of the installed Chromium, or None."""
    return shutil.which("chromium")


@contextlib.contextmanager
def logged_in(base: str, user: str, password: str, *, size: tuple[int, int] = (1400, 900), dark: bool = False) -> Iterator[Any]:
    """A page of a browser in which a user has logged in through Airflow's form. ``base`` is Airflow's address, also with a path.

    What the page's scripts throw is raised at the end. Where BATCHKIT_PICTURES names a folder, the last picture of the page goes there.
    """
    from playwright.sync_api import sync_playwright

    executable = chromium()
    if executable is None:
        raise RuntimeError("there is no chromium on PATH: apt-get update && apt-get install -y chromium")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory(prefix="batchkit-chromium-") as profile:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=executable,
            headless=True,
            args=CHROMIUM_FLAGS,
            viewport={"width": size[0], "height": size[1]},
            color_scheme="dark" if dark else "light",
        )
        errors: list[str] = []
        try:
            # Airflow's own setting, which wins over the system's
            context.add_init_script(f"localStorage.setItem('theme', '{'dark' if dark else 'light'}')")
            page = context.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(f"{base}/auth/login/")
            page.locator("input[name=username]").fill(user)
            page.locator("input[name=password]").fill(password)
            page.get_by_role("button").filter(has_text="Sign in").click()
            page.wait_for_url(lambda address: "/auth/login" not in address, timeout=60_000)
            yield page
            if folder := os.environ.get("BATCHKIT_PICTURES"):
                page.screenshot(path=str(Path(folder) / f"{time.time():.0f}.png"))
        finally:
            context.close()
        assert errors == [], errors


def screenshot(
    path: Path | str,
    url: str,
    *,
    user: str,
    password: str,
    wait_for: str | None = None,
    size: tuple[int, int] = (1400, 900),
    settle_seconds: float = 8,
) -> str:
    """Log in to Airflow through its login form, open ``url``, and write a PNG to ``path``; gives the page's visible text.

    ``wait_for`` is a text that must appear before the picture is taken, at most 30 seconds after the page was opened;
    ``settle_seconds`` is waited on top of it, for what the page still loads.
    """
    base = "/".join(url.split("/", 3)[:3])
    with logged_in(base, user, password, size=size) as page:
        page.goto(url)
        try:
            if wait_for is not None:
                page.get_by_text(wait_for).first.wait_for(timeout=30_000)
            page.wait_for_timeout(settle_seconds * 1000)
        finally:
            page.screenshot(path=str(path))  # also of the page that never showed it
        return str(page.locator("body").inner_text())

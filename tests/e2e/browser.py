"""Pictures of Airflow's pages, for a person to look at. Not a part of the suite.

Needs Debian's chromium (``apt-get install chromium``) and ``pip install playwright``, which is not in any extra.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

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
    from playwright.sync_api import sync_playwright

    executable = chromium()
    if executable is None:
        raise RuntimeError("there is no chromium on PATH: apt-get update && apt-get install -y chromium")
    base = "/".join(url.split("/", 3)[:3])
    with sync_playwright() as playwright, tempfile.TemporaryDirectory(prefix="batchkit-chromium-") as profile:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=executable, headless=True, args=CHROMIUM_FLAGS, viewport={"width": size[0], "height": size[1]}
        )
        try:
            page = context.new_page()
            page.goto(f"{base}/auth/login/")
            page.locator("input[name=username]").fill(user)
            page.locator("input[name=password]").fill(password)
            page.get_by_role("button").filter(has_text="Sign in").click()
            page.wait_for_url(lambda address: "/auth/login" not in address, timeout=30_000)
            page.goto(url)
            try:
                if wait_for is not None:
                    page.get_by_text(wait_for).first.wait_for(timeout=30_000)
                page.wait_for_timeout(settle_seconds * 1000)
            finally:
                page.screenshot(path=str(path))  # also of the page that never showed it
            return str(page.locator("body").inner_text())
        finally:
            context.close()

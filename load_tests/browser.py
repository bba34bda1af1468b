"""A Chromium without a window, for the tests of the page and its pictures (docs/page). No Python package brings one: on
Debian `apt install chromium-headless-shell`; CHROMIUM names one elsewhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
"""The program; None where there is none."""

# The sandbox wants rights that containers lack; what is loaded is our own page. No call goes out in the background.
_ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


@contextmanager
def chromium() -> Iterator[Browser]:
    """One that runs. Raises RuntimeError where there is none."""
    if CHROMIUM is None:
        raise RuntimeError("no Chromium on PATH; CHROMIUM names one elsewhere")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        yield browser
        browser.close()

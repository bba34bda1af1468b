"""`python -m docs.page` (`make screenshots`): the pictures of the page in the documents, of a real server that runs the
default models under a little load, the classifier in two versions.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from load_tests.browser import chromium
from load_tests.payloads import SENTENCES, photos
from load_tests.servers import tilewave
from load_tests.workloads import default_repository

FOLDER = Path(__file__).parent
MOST_BYTES = 150_000
"""Of a picture: whoever clones the project gets them all."""

_CLASSIFIER, _ENCODER = "efficientnet-lite0", "all-minilm-l6-v2"
_WIDE, _PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
_RUNS = 60  # of each version, before anything is shown: averages of a few runs are no picture of anything
_LIVE_S = 30  # so much of the lines of throughput and latency is seen
_WAIT_MS = 60_000
_QUALITY = 80


def main() -> int:
    """Write them all."""
    with tempfile.TemporaryDirectory(prefix="screenshots-") as temporary:
        folder = Path(temporary)
        models = default_repository(folder, _CLASSIFIER, _ENCODER)
        shutil.copytree(models / _CLASSIFIER / "1", models / _CLASSIFIER / "2")
        photo = folder / "photo.jpg"
        photo.write_bytes(next(photo for photo in photos() if photo.name.startswith("chelsea")).jpeg)
        with tilewave(models, folder, "--device", "cpu") as server, chromium() as browser:
            url = f"http://127.0.0.1:{server.port}"
            for _, version in itertools.product(range(_RUNS), (1, 2)):
                _ask(url, f"{_CLASSIFIER}/images?version={version}", photo.read_bytes(), "image/jpeg")
            with _load(url, photo):
                _try(_open(browser, url, _WIDE, "light"), photo)
            _kernels(_open(browser, url, _WIDE, "light"))
            _compare(_open(browser, url, _WIDE, "dark"))
            _phone(_open(browser, url, _PHONE, "light"))
    return 0


def _ask(url: str, path: str, body: bytes, kind: str) -> None:
    request = urllib.request.Request(f"{url}/v1/models/{path}", body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()


@contextmanager
def _load(url: str, photo: Path) -> Iterator[None]:
    """Two users, one for pictures and one for sentences, who pause between requests. Pictures go to both versions in
    turn, which are compared afterwards: under the same load."""
    done = threading.Event()

    def ask(paths: Sequence[str], body: bytes, kind: str) -> None:
        for path in itertools.cycle(paths):
            if done.wait(0.05):
                return
            _ask(url, path, body, kind)

    texts = json.dumps({"text": SENTENCES[:2]}).encode()
    versions = [f"{_CLASSIFIER}/images?version={version}" for version in (2, 1)]
    with ThreadPoolExecutor(2) as pool:
        users = [
            pool.submit(ask, versions, photo.read_bytes(), "image/jpeg"),
            pool.submit(ask, [f"{_ENCODER}/tokens"], texts, "application/json"),
        ]
        try:
            yield
        finally:
            done.set()
        for user in users:
            user.result()


def _open(browser: Browser, url: str, size: dict[str, int], scheme: str) -> Page:
    phone = {"is_mobile": True, "has_touch": True, "device_scale_factor": 2} if size is _PHONE else {}
    page = browser.new_context(viewport=size, color_scheme=scheme, **phone).new_page()  # type: ignore[arg-type]
    page.set_default_timeout(_WAIT_MS)
    page.goto(url)
    expect(page.locator("#image-file")).to_be_enabled(timeout=_WAIT_MS)
    return page


def _try(page: Page, photo: Path) -> None:
    """A picture with its labels, sentences with their matrix, and what goes on now."""
    page.set_input_files("#image-file", photo)
    expect(page.locator("#image-answer li")).to_have_count(5, timeout=_WAIT_MS)
    page.click("#sentences-form button")
    page.wait_for_selector(".matrix")
    page.wait_for_timeout(_LIVE_S * 1e3)
    _store(page, "try", _down_to(page, "section[aria-labelledby=live-title]"))


def _kernels(page: Page) -> None:
    """The roofline with its slowest step chosen, and the plan by time."""
    _choose_model(page)
    page.click("#plan-table thead >> text=Time")
    page.locator("#plan-table tbody tr").first.click()
    _store(page, "kernels", _part(page, 1060))


def _compare(page: Page) -> None:
    """Two versions, in dark colours."""
    _choose_model(page)
    page.select_option("#other-version", "1")
    page.wait_for_selector(".dot.series-b")
    page.locator("#plan-table tbody tr").nth(4).click()
    _store(page, "dark", _part(page, 1060))


def _phone(page: Page) -> None:
    _choose_model(page)
    page.locator("#plan-table tbody tr").first.click()
    _store(page, "phone", _part(page, 955))


def _choose_model(page: Page) -> None:
    page.select_option("#kernels-model", _CLASSIFIER)
    expect(page.locator("#plan-caption")).to_contain_text(_CLASSIFIER, timeout=_WAIT_MS)
    page.select_option("#kernels-plan", "batch=1")
    expect(page.locator("#plan-caption")).to_contain_text("batch 1", timeout=_WAIT_MS)


def _box(page: Page, selector: str) -> tuple[float, float, float, float]:
    """Left, top, width and height of an element on the whole page."""
    left, top, width, height = page.locator(selector).evaluate(
        "e => { const b = e.getBoundingClientRect(); return [b.x + scrollX, b.y + scrollY, b.width, b.height] }"
    )
    return left, top, width, height


def _down_to(page: Page, selector: str) -> tuple[float, float, float, float]:
    """The page to the end of an element, and a little more."""
    _, top, _, height = _box(page, selector)
    return 0, 0, _WIDE["width"], top + height + 16


def _part(page: Page, most: float) -> tuple[float, float, float, float]:
    """The section of kernels, its upper part."""
    left, top, width, height = _box(page, "section[aria-labelledby=kernels-title]")
    return left, top, width, min(height, most)


def _store(page: Page, name: str, box: tuple[float, float, float, float]) -> None:
    x, y, width, height = box
    clip = {"x": x, "y": y, "width": width, "height": height}
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip)))  # type: ignore[arg-type]
    path = FOLDER / f"{name}.webp"
    picture.save(path, quality=_QUALITY, method=6)
    page.context.close()
    size = path.stat().st_size
    print(f"{path}: {picture.width} × {picture.height}, {size / 1e3:.0f} kB")
    if size > MOST_BYTES:
        raise SystemExit(f"error: more than {MOST_BYTES / 1e3:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())

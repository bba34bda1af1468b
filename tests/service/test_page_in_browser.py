"""A browser on the page, before a real server with the default models: what a person does and sees.

Needs a Chromium (load_tests/browser.py).
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from load_tests.browser import CHROMIUM, chromium
from load_tests.servers import Server, tilewave

CLASSIFIER, ENCODER = "efficientnet-lite0", "all-minilm-l6-v2"
WAIT_MS = 30_000  # a machine that runs other tests is slow
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 320, "height": 640}
KEY, NO_METRICS_KEY = "k" * 20, "i" * 20
BEARER = {"authorization": f"Bearer {KEY}"}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH; CHROMIUM names one elsewhere")


@dataclass
class Tab:
    """A page that is watched: `complaints` are what went to the console, and requests to other hosts."""

    page: Page
    origin: str
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(WAIT_MS)
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", lambda request: self._watch(request.url))

    def _watch(self, address: str) -> None:
        if not address.removeprefix("blob:").startswith(f"{self.origin}/"):
            self.complaints.append(f"outside: {address}")

    def open(self) -> Page:
        """Load the page, and wait until it knows the models."""
        self.page.goto(f"{self.origin}/")
        expect(self.page.locator("#server-state")).to_have_text("Ready.")
        return self.page


@pytest.fixture(scope="module")
def server(model_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Both default models, the classifier in two versions, in a process of its own that asks for keys."""
    folder = tmp_path_factory.mktemp("page")
    for name in (CLASSIFIER, ENCODER):
        shutil.copytree(model_repository / name, folder / "models" / name)
    shutil.copytree(folder / "models" / CLASSIFIER / "1", folder / "models" / CLASSIFIER / "2")
    keys = folder / "keys"
    keys.write_text(f"inference,metrics {KEY}\ninference {NO_METRICS_KEY}\n")
    keys.chmod(0o600)
    with tilewave(folder / "models", folder, "--device", "cpu", "--api-keys", str(keys)) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with chromium() as browser:
        yield browser


def new_tab(server: Server, browser: Browser, **options: Any) -> Tab:
    context = browser.new_context(**{"viewport": WIDE, **options})
    return Tab(context.new_page(), f"http://127.0.0.1:{server.port}")


@pytest.fixture
def tab(server: Server, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Tab]:
    """A tab that has the key; `param`: how its context is. Nothing may go to the console, or to other hosts."""
    tab = new_tab(server, browser, **getattr(request, "param", {}))
    tab.page.add_init_script(f"sessionStorage.setItem('tilewave-api-key', '{KEY}')")
    yield tab
    tab.page.context.close()
    assert tab.complaints == []


def assert_accessible(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def classify(page: Page, photo: Path) -> None:
    expect(page.locator("#image-file")).to_be_enabled()
    page.set_input_files("#image-file", photo)
    expect(page.locator("#image-answer li")).to_have_count(5)


def compare_sentences(page: Page, sentences: list[str]) -> list[list[float]]:
    page.fill("#sentences-text", "\n".join(sentences))
    page.click("#sentences-form button")
    expect(page.locator(".matrix tbody tr")).to_have_count(len(sentences))
    cells = page.locator(".matrix td").all_inner_texts()
    values = [float(text.replace("−", "-")) for text in cells]
    return [values[i : i + len(sentences)] for i in range(0, len(values), len(sentences))]


def test_a_picture_gets_its_label_and_sentences_their_matrix(tab: Tab, photos: Mapping[str, Path]) -> None:
    page = tab.open()
    expect(page.locator("#image-model option").first).to_have_text(f"{CLASSIFIER}, version 2")  # what is served
    classify(page, photos["coffee"])
    first = page.locator("#image-answer li").first
    expect(first.locator(".name")).to_have_text("espresso")
    share = first.locator(".share").inner_text()
    assert 80 <= int(share.removesuffix("\N{NO-BREAK SPACE}%")) <= 100
    widths = page.locator(".labels .bar > span").evaluate_all("bars => bars.map(bar => bar.offsetWidth)")
    assert widths == sorted(widths, reverse=True) and widths[0] > 10 * widths[1]
    expect(page.locator("#image-answer .note")).to_contain_text("compute")
    expect(page.locator("#image-preview")).to_be_visible()

    sentences = ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply."]
    matrix = compare_sentences(page, sentences)
    assert [matrix[i][i] for i in range(3)] == [1, 1, 1]
    assert matrix[0][1] == matrix[1][0] == pytest.approx(0.755, abs=0.01)
    assert abs(matrix[0][2]) < 0.1

    card = page.locator(".card", has_text=ENCODER)
    expect(card.locator("dd strong").first).to_have_text(re.compile(r"^(?!0/s).+/s$"))
    expect(card.locator("dd").nth(1)).to_have_text(re.compile(r"ms|µs"))


def test_the_roofline_has_a_dot_for_every_kernel(tab: Tab, photos: Mapping[str, Path]) -> None:
    page = tab.open()
    page.select_option("#kernels-model", CLASSIFIER)
    expect(page.locator("#kernels-version")).to_have_value("2")
    expect(page.locator("#plan-caption")).to_contain_text(CLASSIFIER)
    plan = page.locator("#kernels-plan").input_value()
    profile = page.request.get(
        f"{tab.origin}/v2/models/{CLASSIFIER}/versions/2/profile", params={"plan": plan}, headers=BEARER
    ).json()
    steps = [step["step"] for step in profile["steps"] if step["calls"]]
    dots = page.locator(".dot")
    expect(dots).to_have_count(len(steps))
    assert len(steps) > 40
    expect(page.locator("#plan-table tbody tr")).to_have_count(len(profile["steps"]))
    labels = dots.evaluate_all("dots => dots.map(dot => dot.getAttribute('aria-label'))")
    assert sorted(label.rpartition(", ")[0].rpartition(", ")[0] for label in labels) == sorted(steps)
    ceilings = page.locator(".ceiling-text").all_text_contents()
    assert [text.split()[0] for text in ceilings] == ["compute", "cache", "memory"]

    box = page.locator("#roofline svg").bounding_box()
    assert box is not None
    for spot in dots.evaluate_all(
        "dots => dots.map(dot => { const b = dot.getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom] })"
    ):
        assert box["x"] <= spot[0] < spot[1] <= box["x"] + box["width"]
        assert box["y"] <= spot[2] < spot[3] <= box["y"] + box["height"]
    page.locator("#roofline [role=option][tabindex='0']").focus()
    expect(page.locator("#step-detail strong")).to_have_text(steps[0])
    page.keyboard.press("ArrowRight")
    expect(page.locator("#step-detail strong")).to_have_text(steps[1])
    page.keyboard.press("End")
    expect(page.locator("#step-detail strong")).to_have_text(steps[-1])
    expect(page.locator("#plan-table tr.chosen th")).to_have_text(steps[-1])
    page.locator("#plan-table tbody tr").nth(2).click()
    expect(page.locator("#step-detail strong")).to_have_text(steps[2])
    cut = "e => e.scrollWidth > e.clientWidth"
    assert page.locator("#plan-table tbody th").nth(4).evaluate(cut)
    assert not page.locator("#plan-table tr.chosen th").evaluate(cut), "the row that is chosen has the whole name"

    page.click("#plan-table thead >> text=Time")
    times = [step["seconds"] for step in profile["steps"]]
    first = page.locator("#plan-table tbody th").first
    expect(first).to_have_text(profile["steps"][times.index(max(times))]["step"])
    expect(page.locator("#plan-table thead th[aria-sort=descending]")).to_have_text("Time")
    page.click("#plan-table thead >> text=Step")
    expect(page.locator("#plan-table thead th[aria-sort=ascending]")).to_have_text("Step")
    names = page.locator("#plan-table tbody th").all_inner_texts()
    assert names == page.evaluate("names => [...names].sort((a, b) => a.localeCompare(b))", names)


def test_the_roofline_s_share_is_seen_without_scrolling(tab: Tab) -> None:
    page = tab.open()
    expect(page.locator(".dot").first).to_be_visible()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        right = "e => e.getBoundingClientRect().right"
        edge = page.locator(".table-scroll").evaluate(right)
        assert page.locator("#plan-table thead th", has_text="Roofline").evaluate(right) <= edge + 1, width
    page.locator(".table-scroll").evaluate("e => e.scrollLeft = 1000")
    left = "e => e.getBoundingClientRect().left"
    name = page.locator("#plan-table tbody th").first
    assert name.evaluate(left) == pytest.approx(page.locator(".table-scroll").evaluate(left), abs=1), "names stay"


def test_a_finger_beside_a_small_dot_means_it(tab: Tab) -> None:
    page = tab.open()
    expect(page.locator(".dot").first).to_be_visible()
    # The dot whose neighbours are farthest away, and a point beside it.
    step, x, y = page.evaluate(
        """() => {
            const boxes = [...document.querySelectorAll(".dot")].map((dot) => [dot, dot.getBoundingClientRect()]);
            const middle = ([, b]) => [(b.left + b.right) / 2, (b.top + b.bottom) / 2];
            const apart = (one, other) => Math.hypot(...middle(one).map((value, i) => value - middle(other)[i]));
            const room = (one) => Math.min(...boxes.filter((other) => other !== one).map((other) => apart(one, other)));
            const lonely = boxes.reduce((best, one) => (room(one) > room(best) ? one : best));
            const [x, y] = middle(lonely);
            return [lonely[0].getAttribute("aria-label"), x, y - lonely[1].height / 2 - 5];
        }"""
    )
    page.evaluate("y => scrollTo(0, y - 300)", y)
    page.mouse.click(x, y - page.evaluate("scrollY"))
    expect(page.locator(".dot.chosen")).to_have_attribute("aria-label", step)
    expect(page.locator("#step-detail strong")).to_have_text(step.rpartition(", ")[0].rpartition(", ")[0])


def test_a_profile_that_has_not_changed_is_not_drawn_again(tab: Tab) -> None:
    page = tab.open()
    expect(page.locator(".dot").first).to_be_visible()
    page.evaluate("document.querySelector('#plan-table tbody tr').id = 'first-drawn'")
    with page.expect_response("**/profile*"):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # it looks again at once
    page.wait_for_timeout(200)
    expect(page.locator("#first-drawn")).to_have_count(1)


def test_a_picture_may_be_dropped(tab: Tab, photos: Mapping[str, Path]) -> None:
    page = tab.open()
    expect(page.locator("#image-file")).to_be_enabled()
    file = io.BytesIO()
    Image.open(photos["camera"]).convert("RGB").resize((256, 256)).save(file, "JPEG")
    carried = page.evaluate_handle(
        """bytes => {
            const carried = new DataTransfer();
            carried.items.add(new File([new Uint8Array(bytes)], "camera.jpg", { type: "image/jpeg" }));
            return carried;
        }""",
        list(file.getvalue()),
    )
    page.dispatch_event("#image-drop", "dragover", {"dataTransfer": carried})
    expect(page.locator("#image-drop")).to_have_class("drop over")
    page.dispatch_event("#image-drop", "drop", {"dataTransfer": carried})
    expect(page.locator("#image-answer .name").first).to_have_text("tripod")
    expect(page.locator("#image-drop")).to_have_class("drop")


def drop(page: Page, where: str, how: str) -> bool:
    """Drop what some JavaScript puts into `d`; whether the page takes it, and the browser does not show it instead."""
    carried = page.evaluate_handle(f"() => {{ const d = new DataTransfer(); {how}; return d; }}")
    taken: bool = page.evaluate(
        """([where, dataTransfer]) => !document.querySelector(where).dispatchEvent(
            new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }))""",
        [where, carried],
    )
    return taken


def test_what_is_dropped_wrongly_is_said_and_does_not_leave_the_page(tab: Tab) -> None:
    page = tab.open()
    expect(page.locator("#image-file")).to_be_enabled()
    file = "d.items.add(new File(['x'], 'a.png', { type: 'image/png' }))"
    problem = page.locator("#image-problem")
    assert drop(page, "footer", f"{file}; {file}")
    expect(problem).to_have_text("One picture at a time, please.")
    assert drop(page, "#image-drop", "d.setData('text/uri-list', 'http://example.org/a.png')")
    expect(problem).to_contain_text("That is no file.")
    assert not drop(page, "#sentences-text", "d.setData('text/plain', 'a sentence')"), "text is the field's"
    with page.expect_response("**/images*"):
        assert drop(page, "footer", file), "beside the place for it"
    expect(problem).to_contain_text("not a JPEG, PNG or WebP")
    page.evaluate("File.prototype.slice = () => ({ arrayBuffer: () => Promise.reject(new Error()) })")
    assert drop(page, "#image-drop", file)
    expect(problem).to_contain_text("Is it a folder")
    assert len(tab.complaints) == 1 and "400" in tab.complaints.pop()


def test_two_versions_stand_side_by_side(tab: Tab) -> None:
    page = tab.open()
    page.select_option("#kernels-model", CLASSIFIER)
    expect(page.locator("#plan-caption")).to_contain_text(CLASSIFIER)
    page.select_option("#kernels-plan", "batch=5")  # what the warm-up has run
    expect(page.locator("#plan-caption")).to_contain_text("batch 5")
    alone = page.locator(".dot").count()
    expect(page.locator("#other-plan")).to_be_hidden()
    page.select_option("#other-version", "1")
    expect(page.locator("#other-plan")).to_have_value("batch=5")
    expect(page.locator(".dot.series-a")).to_have_count(alone)
    expect(page.locator(".dot.series-b")).to_have_count(alone)
    expect(page.locator("#kernels-summary")).to_have_text(re.compile(r"B takes \d+\.\d+ times as long as A"))
    expect(page.locator("#plan-table tbody tr")).to_have_count(alone)
    ratios = page.locator("#plan-table tbody td:nth-child(4)").all_inner_texts()
    assert len(ratios) == alone and all(re.fullmatch(r"\d+\.\d\d", text) for text in ratios)
    page.select_option("#other-plan", "batch=1")
    expect(page.locator("#kernels-summary")).to_contain_text("times as long as A, but their sizes differ.")
    page.select_option("#kernels-plan", "batch=1")
    expect(page.locator("#kernels-summary")).not_to_contain_text("differ")
    page.select_option("#kernels-plan", "batch=5")
    expect(page.locator("#other-plan")).to_have_value("batch=5")


_TOO_WIDE = """document.documentElement.scrollWidth <= innerWidth ? [] :
    [...document.querySelectorAll("body *")]
    .filter(element => element.getBoundingClientRect().right > innerWidth && !element.closest(".table-scroll, svg"))
    .map(element => `${element.tagName}#${element.id}.${element.getAttribute("class")}`)"""


@pytest.mark.parametrize(
    "tab",
    [{"color_scheme": "light"}, {"color_scheme": "dark", "viewport": PHONE, "has_touch": True}],
    ids=["wide and light", "phone and dark"],
    indirect=True,
)
def test_nobody_is_kept_from_using_it(tab: Tab, photos: Mapping[str, Path]) -> None:
    page = tab.open()
    classify(page, photos["chelsea"])
    compare_sentences(page, ["One.", "Two.", "Three."])
    expect(page.locator(".dot").first).to_be_visible()
    page.locator("#roofline [role=option][tabindex='0']").focus()
    expect(page.locator("#step-detail strong")).to_be_visible()
    assert page.evaluate(_TOO_WIDE) == [], "the page is wider than the screen"
    assert_accessible(page)
    page.fill("#sentences-text", "only one")
    page.click("#sentences-form button")
    expect(page.locator("#sentences-problem")).to_have_text("Write two sentences or more, each on a line of its own.")
    page.click("#key-open")
    expect(page.locator("#key-value")).to_be_focused()
    assert_accessible(page)


@pytest.mark.parametrize("tab", [{"viewport": PHONE}, {}], ids=["phone", "wide"], indirect=True)
def test_a_matrix_of_many_sentences_can_be_read(tab: Tab) -> None:
    page = tab.open()
    compare_sentences(page, ["A very long sentence. " * 15, *(f"This is sentence number {i}." for i in range(11))])
    wider = "cells => cells.filter(cell => cell.scrollWidth > cell.clientWidth).map(cell => cell.textContent)"
    assert page.locator(".matrix td, .matrix th").evaluate_all(wider) == [], "numbers lie over their neighbours"
    assert page.evaluate(_TOO_WIDE) == []
    left, width, height = "e => e.getBoundingClientRect().left", "e => e.clientWidth", "e => e.offsetHeight"
    place, names = page.locator(".matrix-scroll"), page.locator(".matrix tbody th")
    assert names.first.evaluate(height) < 4.5 * names.nth(1).evaluate(height), "a long one takes a part of the table"
    assert names.first.inner_text().count("A very long sentence.") == 15, "and is read aloud as it is"
    place.evaluate("e => e.scrollLeft = 10_000")
    assert names.first.evaluate(left) == pytest.approx(place.evaluate(left), abs=1), "sentences stay"
    assert page.locator(".matrix caption span").evaluate(width) <= place.evaluate(width)
    last = page.locator(".matrix tbody tr").first.locator("td").last.bounding_box()
    assert last is not None and last["x"] + last["width"] <= place.evaluate("e => e.getBoundingClientRect().right") + 1
    assert_accessible(page)


@pytest.mark.parametrize("tab", [{"viewport": PHONE}, {}], ids=["phone", "wide"], indirect=True)
@pytest.mark.parametrize("model", [CLASSIFIER, ENCODER])
def test_nothing_lies_over_the_names_of_ceilings_and_plans(tab: Tab, model: str) -> None:
    page = tab.open()
    page.select_option("#kernels-model", model)
    expect(page.locator("#plan-caption")).to_contain_text(model)
    boxes = "nodes => nodes.map(n => n.getBoundingClientRect()).map(b => [b.left, b.right, b.top, b.bottom])"
    # Together: the plot is drawn anew when there are new times.
    both = f"() => ['.dot', '.ceiling-text'].map(one => ({boxes})([...document.querySelectorAll(one)]))"
    dots, names = page.evaluate(both)
    assert len(dots) > 40 and len(names) == 3
    for name in names:
        hidden = [d for d in dots if d[0] < name[1] and name[0] < d[1] and d[2] < name[3] and name[2] < d[3]]
        assert hidden == []
    (caption,) = page.locator("#plan-caption").evaluate_all(boxes)
    (place,) = page.locator(".table-scroll").evaluate_all(boxes)
    assert place[0] <= caption[0] + 1 and caption[1] <= place[1] + 1


def test_a_profile_without_times_or_ceilings_is_said_and_drawn(tab: Tab) -> None:
    page = tab.open()
    expect(page.locator(".dot").first).to_be_visible()

    def change(how: Callable[[dict[str, Any]], object]) -> None:
        """What the server says of the classifier, with something changed."""

        def answer(route: Route) -> None:
            document = route.fetch().json()
            how(document)
            route.fulfill(json=document)

        page.unroute("**/profile*")
        page.route("**/profile*", answer)

    change(lambda document: [step.update(seconds=0, flops_per_second=0) for step in document["steps"]])
    page.select_option("#kernels-model", CLASSIFIER)
    expect(page.locator("#kernels-problem")).to_contain_text("has been timed yet")
    expect(page.locator("#kernels-view")).to_be_hidden()
    change(lambda document: document.update(steps=[], plans=[], plan=None))
    page.select_option("#kernels-version", "1")
    expect(page.locator("#kernels-problem")).to_have_text("Version 1 has not run yet: send it a request.")
    change(lambda document: document["device"].update(peak_flops=0, peak_bytes=0, peak_cache_bytes=0, threads=0))
    page.select_option("#kernels-version", "2")
    expect(page.locator(".dot").first).to_be_visible()
    expect(page.locator(".ceiling")).to_have_count(0)
    expect(page.locator("#kernels-summary")).not_to_contain_text("threads")  # a GPU
    page.unroute("**/profile*")
    # Whose plan has had to make room for others, sees the busiest one instead.
    page.route("**/profile?plan=*", lambda route: route.fulfill(status=404, json={"error": "no such plan"}))
    page.select_option("#kernels-version", "1")
    expect(page.locator("#plan-caption")).to_contain_text("version 1")
    tab.complaints.clear()  # the 404s


@pytest.mark.parametrize(
    "tab", [{}, {"color_scheme": "dark", "viewport": PHONE}], ids=["wide and light", "phone and dark"], indirect=True
)
def test_nobody_is_kept_from_the_api_s_page(tab: Tab) -> None:
    page = tab.page
    page.goto(f"{tab.origin}/docs")
    assert page.locator("details").count() > 30
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate(_TOO_WIDE) == []
    assert_accessible(page)


def test_everything_is_reached_by_keyboard(tab: Tab) -> None:
    page = tab.open()
    expect(page.locator(".dot").first).to_be_visible()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('role') || ''"))
    ids = ["image-model", "image-file", "sentences-model", "sentences-text", "kernels-model", "kernels-version"]
    places = [reached.index(name) for name in [*ids, "kernels-plan", "other-version", "option", "region"]]
    assert places == sorted(places)
    assert reached.count("option") <= 2, "one stop for all dots"
    page.locator("#sentences-text").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator(".matrix tbody tr")).to_have_count(4)


def test_what_goes_wrong_is_said_in_words(tab: Tab, server: Server, tmp_path: Path) -> None:
    page = tab.open()
    wrong = tmp_path / "note.png"
    wrong.write_text("no picture")
    expect(page.locator("#image-file")).to_be_enabled()
    page.set_input_files("#image-file", wrong)
    problem = page.locator("#image-problem")
    expect(problem).to_be_visible()
    assert re.match(r"[A-Z].*\.$", problem.inner_text())
    page.route("**/tokens*", lambda route: route.abort())
    page.click("#sentences-form button")
    expect(page.locator("#sentences-problem")).to_contain_text("The server does not answer.")
    busy = {"status": 429, "headers": {"retry-after": "3"}, "json": {"error": "the queue is full"}}
    page.unroute("**/tokens*")
    page.route("**/tokens*", lambda route: route.fulfill(**busy))
    page.click("#sentences-form button")
    expect(page.locator("#sentences-problem")).to_have_text("The queue is full. Try again in 3 s.")
    page.unroute("**/tokens*")
    page.route(re.compile("/(v1/models|metrics|profile|ready)"), lambda route: route.abort())
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # it looks again at once
    expect(page.locator("#models-problem")).to_contain_text("The server does not answer.")
    expect(page.locator("#server-state")).to_have_text("No answer.")
    for place in ("#live-problem", "#kernels-problem"):
        expect(page.locator(place)).to_have_text("What is seen here is the last that was heard.")
    expect(page.locator(".dot").first).to_be_visible()
    page.unroute(re.compile("/(v1/models|metrics|profile|ready)"))
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    for place in ("#models-problem", "#live-problem", "#kernels-problem"):
        expect(page.locator(place)).to_be_hidden()
    # What the browser itself writes about such answers is expected here, and only that.
    assert len(tab.complaints) >= 3 and all("Failed to load resource" in complaint for complaint in tab.complaints)
    tab.complaints.clear()


def test_a_key_is_asked_for_and_kept_in_the_tab(server: Server, browser: Browser) -> None:
    tab = new_tab(server, browser)
    page = tab.open()
    expect(page.locator("#key-reason")).to_have_text("This server asks for an API key.")
    page.click("#key-cancel")
    refused = len(tab.complaints)
    page.wait_for_timeout(2500)  # longer than the page waits between two looks at the metrics
    assert len(tab.complaints) == refused, "the page goes on asking without a key"
    page.click("#key-open")
    page.keyboard.type("kein Schlüssel")
    page.keyboard.press("Enter")
    expect(page.locator("#key-reason")).to_have_text("A key is letters, digits and signs, without spaces.")
    page.fill("#key-value", "a-key-that-nobody-knows")
    page.keyboard.press("Enter")
    expect(page.locator("#key-reason")).to_have_text("The server does not know this API key.")
    page.keyboard.type(NO_METRICS_KEY)
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(3)
    expect(page.locator("#live-problem")).to_have_text("This API key has not the right 'metrics'.")
    page.click("#key-open")
    page.fill("#key-value", KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#live-problem")).to_be_hidden()
    assert len(compare_sentences(page, ["One.", "Two."])) == 2
    stored = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
    assert stored == [[KEY], [], ""]
    assert KEY not in page.url and KEY not in page.content()
    page.reload()
    expect(page.locator(".card")).to_have_count(3)
    expect(page.locator("#key-dialog")).to_be_hidden()
    page.click("#key-open")
    page.click("#key-forget")
    assert page.evaluate("sessionStorage.length") == 0
    assert all(re.search("40[13]", complaint) for complaint in tab.complaints), tab.complaints
    page.context.close()


def test_metrics_are_read_as_prometheus_reads_them(tab: Tab) -> None:
    label = 'm="a\\"b\\\\,c"'
    counts = [f't_bucket{{le="{edge}",{label}}} {count}' for edge, count in (("1.0", 2.0), ("2.0", 6.0), ("+Inf", 8.0))]
    text = "\n".join(["# HELP t_bucket no sample", *counts, "plain 3.5", 'plain{m="x"} 1e3'])
    script = """async (text) => {
        const { parse, total, buckets, quantile } = await import("/page/metrics.js");
        const samples = parse(text), now = buckets(samples, "t", { m: 'a"b\\\\,c' });
        const none = now.map(([edge]) => [edge, 0]);
        return [total(samples, "plain", {}), total(samples, "plain", { m: "x" }), now.map(([, count]) => count),
                quantile(0.5, now, none), quantile(0.99, now, none), Number.isNaN(quantile(0.5, now, now))];
    }"""
    assert tab.open().evaluate(script, text) == [1003.5, 1000, [2, 6, 8], 1.5, 2, True]

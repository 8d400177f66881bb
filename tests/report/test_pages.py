"""Pages stand alone, cannot be broken by hostile names, and are drawn by a real browser."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stretto.core.record import Recorder
from stretto.core.trace import Key, Spans, Trace
from stretto.report import page, png

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--SCRIPT-->",
    "<!--DATA-->",
    "<img src=x onerror=alert(1)>",
    "&amp;",
)
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,800",
)


def small(source: str, lanes: tuple[str, ...] = ("cpu0", "host"), stretch: float = 1.0) -> Trace:
    """A serving run in small: passes and host work in turn, three requests, a queue and memory."""
    recorder = Recorder(source)
    for step in range(12):
        at = stretch * step
        recorder.span(lanes[0], at, at + 0.8 * stretch, Key("prefill" if step % 4 == 0 else "decode", step=step))
        recorder.span(lanes[-1], at + 0.8 * stretch, at + 0.9 * stretch, Key("host", step=step))
        recorder.counter("queue", at, step % 5)
    for number in range(3):
        recorder.request("requests", number * stretch, (number + 8) * stretch, Key("answer", step=number))
    recorder.memory("cpu0", 0.0, 1e9)
    return recorder.trace()


def large(source: str, count: int) -> Trace:
    """`count` spans on 20 lanes."""
    rows = np.arange(count)
    start = (rows // 20) * 1e-3
    spans = Spans.of(lane=rows % 20, start=start, finish=start + 9e-4, phase=rows // 20 % 4, step=rows // 20)
    lanes, phases = tuple(f"gpu{i}" for i in range(20)), ("forward", "backward", "exchange", "update")
    return Trace(source=source, lanes=lanes, phases=phases, spans=spans)


class Elements(HTMLParser):
    """The elements of a page as a browser would find them: (name, attributes), and the texts of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


def hostile_page() -> str:
    traces = [small(f"simulated {HOSTILE[0]}", HOSTILE), small("measured", HOSTILE)]
    recorder = Recorder("measured")
    for at, phase in enumerate(HOSTILE):
        recorder.span(phase, at, at + 1, Key(phase))
    comparison = traces[0].compare(recorder.trace())
    return page([*traces, recorder.trace()], title=HOSTILE[1], comparison=comparison, notes=HOSTILE)


def test_a_page_stands_alone() -> None:
    traces = [small("simulated"), small("measured", stretch=1.2)]
    text = page(traces, title="two runs", comparison=traces[0].compare(traces[1]), notes=["a note"])
    assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]", text)
    assert not re.search(r"@import|url\(|import\(|fetch\(|XMLHttpRequest", text)
    for _, attributes in Elements(text).found:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "<!--" not in text


def test_a_page_shows_the_comparison() -> None:
    traces = [small("simulated"), small("measured", stretch=1.25)]
    text = page(traces, title="two runs", comparison=traces[0].compare(traces[1]))
    assert "<td>decode<td>9<td>7.2<td>9<td>-20.0%" in text
    assert "<td>total<td>" in text


def test_hostile_names_stay_text() -> None:
    text = hostile_page()
    elements = Elements(text)
    tags = [tag for tag, _ in elements.found]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    data = json.loads(elements.scripts[0])
    assert data[2]["lanes"] == list(HOSTILE)
    assert data[2]["phases"] == list(HOSTILE)
    assert "alert(1)" not in elements.scripts[1]
    assert text.count('"use strict"') == 1


def test_png_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    file = tmp_path / "timeline.png"
    png([small("simulated"), small("measured")], file, title="two runs")
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(file)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10


def test_names_are_no_formulas(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recorder = Recorder("measured")
    recorder.span("plan $a_$", 0.0, 1.0, Key("$\\x_{$"))
    png([recorder.trace()], tmp_path / "timeline.png", title="a $ and $\\y{ $")
    assert (tmp_path / "timeline.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    for file in (CHROMIUM, DRIVER):
        if not file.exists():
            pytest.skip(f"{file} is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=str(DRIVER))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(30)
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


def open_page(browser: Any, text: str, folder: Path) -> float:
    """Open `text` from a file; seconds until it was drawn."""
    file = folder / "timeline.html"
    file.write_text(text, encoding="utf-8")
    browser.get_log("browser")
    start = time.monotonic()
    browser.get(file.as_uri())
    while not drawn(browser) and time.monotonic() < start + 20:
        time.sleep(0.05)
    return time.monotonic() - start


def drawn(browser: Any) -> str | None:
    found: str | None = browser.execute_script("return document.documentElement.dataset.drawn")
    return found


COLOURS = """
const canvas = document.getElementById("canvas");
const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
const context = copy.getContext("2d", { willReadFrequently: true });
context.drawImage(canvas, 0, 0);
const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
const counts = {};
for (let i = 0; i < pixels.length; i += 4) {
  if (pixels[i + 3] !== 255) continue;
  const colour = `${pixels[i]},${pixels[i + 1]},${pixels[i + 2]}`;
  counts[colour] = (counts[colour] || 0) + 1;
}
return counts;
"""

PHASE_COLOURS = ("78,121,167", "242,142,43", "89,161,79", "225,87,89")
"""Of the first four phases; both worlds have four."""

WHEEL = """
const canvas = document.getElementById("canvas"), box = canvas.getBoundingClientRect();
for (let i = 0; i < arguments[0]; i++) canvas.dispatchEvent(new WheelEvent("wheel", {
  deltaY: -100, clientX: box.left + box.width / 2, clientY: box.top + 40, bubbles: true, cancelable: true}));
"""


def colours(browser: Any) -> dict[str, int]:
    """Opaque pixels of the canvas by colour."""
    found: dict[str, int] = browser.execute_script(COLOURS)
    return found


def complaints(browser: Any) -> list[str]:
    """What the browser's console says beyond information."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]


@pytest.mark.browser
@pytest.mark.parametrize(("count", "notches"), [(0, 4), (100_000, 16)], ids=["small", "100,000 spans"])
def test_a_browser_draws_two_traces(count: int, notches: int, browser: Any, tmp_path: Path) -> None:
    traces = [large(source, count) if count else small(source) for source in ("simulated", "measured")]
    seconds = open_page(browser, page(traces, title="two runs"), tmp_path)
    browser.save_screenshot(str(tmp_path / "whole.png"))
    assert drawn(browser) == "2"
    assert seconds < 10
    before = colours(browser)
    assert len(before) > 10
    assert sum(before.values()) > 40_000

    start = time.monotonic()
    browser.execute_script(WHEEL, notches)
    zoomed = colours(browser)
    assert time.monotonic() < start + 10
    browser.save_screenshot(str(tmp_path / "zoomed.png"))
    assert zoomed != before
    assert all(zoomed.get(phase, 0) > 1000 for phase in PHASE_COLOURS), zoomed

    browser.execute_script("document.getElementById('canvas').dispatchEvent(new MouseEvent('dblclick'))")
    assert colours(browser) == before
    assert complaints(browser) == []


@pytest.mark.browser
def test_a_browser_runs_no_hostile_name(browser: Any, tmp_path: Path) -> None:
    open_page(browser, hostile_page(), tmp_path)
    assert drawn(browser) == "3"
    assert browser.title == HOSTILE[1]
    assert browser.execute_script("return document.scripts.length") == 2
    assert browser.execute_script("return document.images.length") == 0
    legend = browser.execute_script("return [...document.querySelectorAll('#legend span')].map(e => e.textContent)")
    assert set(HOSTILE) <= set(legend)
    assert complaints(browser) == []

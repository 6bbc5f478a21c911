"""The report in a browser: a headless Chromium opens it from the disk, and sees all of it drawn.

Screenshots are left in build/screenshots.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from run_logs import HOSTILE, NAMES, train, write

import gradstat

for package in ("jinja2", "plotly"):
    pytest.importorskip(package)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

SCREENSHOTS = Path(__file__).resolve().parents[1] / "build" / "screenshots"
DEVICES = {
    "light": {"viewport": {"width": 1280, "height": 900}},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 375, "height": 812}, "has_touch": True, "is_mobile": True},
}
TIMEOUT = 60_000
"""Milliseconds; on a busy machine plotly.js alone takes seconds to be read."""

ALL_DRAWN = "[...document.querySelectorAll('.plot')].every((plot) => plot.dataset.drawn)"


@pytest.fixture(scope="module")
def browser():
    """Playwright's own Chromium, or the system's."""
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = own if os.path.exists(own) else found
        if path is None:
            pytest.skip(
                "no Chromium was found: run `playwright install chromium`, or apt install it"
            )
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page that was opened from a file, and what it said and asked for meanwhile."""

    def __init__(self, browser, path: Path, device: str) -> None:
        self.context = browser.new_context(**DEVICES[device])
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.url = path.as_uri()

    def draw_all(self) -> None:
        # Charts are drawn as they come into sight, and all of them to be printed.
        for _ in range(TIMEOUT // 100):
            self.page.evaluate("dispatchEvent(new Event('beforeprint'))")
            if self.page.evaluate(ALL_DRAWN):
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"not all charts were drawn; the page said: {self.said}")

    def is_quiet(self) -> bool:
        return self.said == [] and self.asked == [self.url]

    def overflow(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")

    def screenshot(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


@pytest.fixture
def opened(browser):
    pages = []

    def open_page(path: Path, device: str = "light") -> Opened:
        pages.append(Opened(browser, path, device))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return gradstat.make_report(write(folder / "run.db", 200)).save(folder / "run.html")


@pytest.mark.parametrize("device", DEVICES)
def test_report(opened, report, device):
    page = opened(report, device)
    page.draw_all()
    assert page.page.locator(".plot .main-svg").count() >= 9
    assert page.page.locator("#plot-heat .hm image").count() == 1
    assert page.overflow() == 0
    page.screenshot(f"report-{device}")
    assert page.is_quiet(), (page.said, page.asked)


@pytest.mark.parametrize("device", DEVICES)
def test_comparison(opened, tmp_path, device):
    a = write(tmp_path / "sigmoid.db", 120)
    b = write(tmp_path / "gelu.db", 100, findings=(), seed=1, lr=0.01)
    page = opened(gradstat.compare_runs(a, b).save(tmp_path / "compare.html"), device)
    page.draw_all()
    assert page.overflow() == 0
    page.screenshot(f"compare-{device}")
    assert page.is_quiet(), (page.said, page.asked)


def test_a_finding_opens_by_keyboard(opened, report):
    page = opened(report).page
    second = page.locator("details.finding").nth(1)
    assert not second.evaluate("(details) => details.open")
    for _ in range(40):
        page.keyboard.press("Tab")
        if second.locator("summary").evaluate("(summary) => summary === document.activeElement"):
            break
    page.keyboard.press("Enter")
    assert second.evaluate("(details) => details.open")
    assert second.locator("text=use residual connections").is_visible()


def test_charts_have_names_and_numbers_as_text(opened, report):
    page = opened(report).page
    for plot in page.locator(".plot").all():
        assert plot.get_attribute("role") == "img"
        assert len(plot.get_attribute("aria-label")) > 20
    assert page.locator("section:has(.plot)").count() == page.locator(
        "section:has(.plot) p"
    ).evaluate_all("(all) => new Set(all.map((p) => p.closest('section'))).size")
    page.locator("summary", has_text="Layers in numbers").click()
    assert page.locator("td", has_text="16 x 16").first.is_visible()


def test_names_with_html_stay_text(opened, tmp_path):
    run = write(tmp_path / "run.db", 20, [*HOSTILE, *NAMES])
    page = opened(gradstat.make_report(run).save(tmp_path / "a.html"))
    page.draw_all()
    assert page.page.evaluate("window.hacked") is None
    labels = page.page.locator("#plot-flow .ytick text").all_text_contents()
    assert labels[0] == HOSTILE[0]
    assert page.overflow() == 0
    assert page.is_quiet(), (page.said, page.asked)


def test_a_layer_can_be_chosen(opened, report):
    page = opened(report)
    page.draw_all()
    bars = "document.getElementById('plot-histogram').data[0].y.join()"
    before = page.page.evaluate(bars)
    page.page.select_option("#layer", "5")
    page.page.wait_for_timeout(300)
    assert page.page.evaluate(bars) != before


def test_zooming_names_more_layers(opened, tmp_path):
    names = [f"blocks.{n}.weight" for n in range(200)]
    page = opened(
        gradstat.make_report(write(tmp_path / "r.db", 5, names)).save(tmp_path / "a.html")
    )
    page.draw_all()
    ticks = "document.querySelectorAll('#plot-heat .ytick').length"
    labels = "[...document.querySelectorAll('#plot-heat .ytick text')].map((t) => t.textContent)"
    assert page.page.evaluate(ticks) < 60
    page.page.evaluate("Plotly.relayout('plot-heat', {'yaxis.range': [110.5, 99.5]})")
    page.page.wait_for_timeout(500)
    assert "blocks.101.weight" in page.page.evaluate(labels)


def test_dark_follows_the_system(opened, report):
    page = opened(report)
    page.draw_all()
    colour = "getComputedStyle(document.querySelector('#plot-loss .xtick text')).fill"
    light = page.page.evaluate(colour)
    page.page.emulate_media(color_scheme="dark")
    page.page.wait_for_timeout(1000)
    assert page.page.evaluate(colour) != light


BROKEN = {
    "all_nan": {"value": float("nan")},
    "all_inf": {"value": float("inf")},
    "all_zero": {"value": 0.0},
    "empty": {"steps": 0},
    "one_step": {"steps": 1},
    "nothing_more": {"extras": False, "findings": ()},
}


@pytest.mark.parametrize("name", BROKEN)
def test_whatever_the_run(name, opened, tmp_path):
    run = write(tmp_path / "run.db", **{"steps": 20} | BROKEN[name])
    page = opened(gradstat.make_report(run).save(tmp_path / "a.html"), "phone")
    page.draw_all()
    assert page.overflow() == 0
    assert page.is_quiet(), (page.said, page.asked)


def test_of_a_trained_network(opened, tmp_path):
    optimizer = train(tmp_path / "run.db", 60, activations=True, updates=True)
    page = opened(optimizer.gradstat.report().save(tmp_path / "a.html"))
    gradstat.detach(optimizer)
    page.draw_all()
    assert page.is_quiet(), (page.said, page.asked)


def test_a_browser_that_cannot_unpack_says_so(opened, report):
    page = opened(report)
    page.page.add_init_script("delete window.DecompressionStream")
    page.page.reload()
    page.page.wait_for_timeout(300)
    assert page.page.locator("text=This chart could not be drawn").first.is_visible()

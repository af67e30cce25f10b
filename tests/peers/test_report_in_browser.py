"""The report of a fine-tune in a browser: it asks for nothing, says nothing, and fits on screen and paper."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("playwright"):  # where it is missing the tests are only collected; run, they fail
    from playwright.sync_api import Browser

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

from report_cases import EVIL, SETS, Runs

from mesh_transformer.report.make import ReportOptions, write_report

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = Runs(tmp_path_factory.mktemp("report"))
    runs.make()
    return write_report(runs.tuned.run_directory, options=ReportOptions(rows=6), note=lambda _: None)


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1180), ("dark", 1180), ("light", 320)], ids=["light", "dark", "phone"]
)
def test_it_opens_without_a_word_or_a_request(browser: Browser, report: Path, scheme: Any, width: int) -> None:
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    assert said == [] and asked == [report.as_uri()]
    assert page.evaluate("document.querySelectorAll('script, img, b').length") == 0
    for name in SETS:
        assert page.get_by_text(name, exact=True).first.is_visible()
    assert EVIL in page.inner_text("body")
    # Nothing is wider than the window; wide tables scroll by themselves.
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    ground = page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.slice(4))")
    assert (ground < 128) == (scheme == "dark")
    page.close()


def test_every_curve_lies_within_its_picture(browser: Browser, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    outside = page.evaluate("""() => [...document.querySelectorAll("svg")].flatMap((svg) => {
        const box = svg.viewBox.baseVal;
        return [...svg.querySelectorAll("path, circle, text")].map((shape) => [shape, shape.getBBox()])
            .filter(([shape]) => !shape.hasAttribute("transform"))
            .filter(([, b]) => b.x < -1 || b.y < -1 || b.x + b.width > box.width + 1 || b.y + b.height > box.height + 1)
            .map(([shape]) => shape.outerHTML);
    })""")
    assert outside == []
    page.close()


def test_it_prints_dark_on_light(browser: Browser, report: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(report.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()


def test_contrast_of_what_is_quiet(browser: Browser, report: Path) -> None:
    """WCAG's ratio of 4.5 for everything that is read."""
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)  # type: ignore[arg-type]
        page.goto(report.as_uri())
        found = page.evaluate("""() => {
            const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
            const light = (colour) => parts(colour).slice(0, 3).map((c) => c / 255)
                .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
                .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
            const ground = (e) => {
                for (; e; e = e.parentElement) {
                    const [, , , alpha = 1] = parts(getComputedStyle(e).backgroundColor);
                    if (alpha > 0) return getComputedStyle(e).backgroundColor;
                }
                return "rgb(255, 255, 255)";
            };
            return [...document.querySelectorAll("p, td, th, h2, pre, mark, .quiet, .key, svg text")].map((e) => {
                const style = getComputedStyle(e);
                const [a, b] = [light(e.tagName === "text" ? style.fill : style.color), light(ground(e))];
                return [e.tagName, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
            }).filter(([, ratio]) => ratio < 4.5);
        }""")
        assert found == []
        page.close()

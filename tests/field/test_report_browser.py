"""A report in a real browser: light, dark and on a telephone it is whole, readable, and asks nobody for anything."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgefuse.report.report import report
from tests import results

pytestmark = pytest.mark.field
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
VIEWS = {"light": (1200, "light"), "dark": (1200, "dark"), "telephone": (360, "light"), "telephone, dark": (360, "dark")}
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3: of text
CONTRASTS = """() => {
  const parts = color => color.match(/[\\d.]+/g).map(Number);
  const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = color => parts(color).slice(0, 3).map(c => linear(c / 255))
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const page = light(getComputedStyle(document.body).backgroundColor);
  const found = {};
  const words = "p, p span, li, li b, td, th, h1, h2, h3, h4, a, figcaption, summary, svg text:not(.number)";
  for (const each of document.querySelectorAll(words)) {
    const style = getComputedStyle(each), own = light(each instanceof SVGElement ? style.fill : style.color);
    found[each.tagName + "." + (each.getAttribute("class") || "")] = (Math.max(own, page) + .05) / (Math.min(own, page) + .05);
  }
  return found;
}"""
OUTSIDE = """() => [...document.querySelectorAll("svg text, svg circle, svg rect, p, li, h1, h2, h3, h4, figcaption")]
  .filter(each => !each.closest(".scroll") && !each.closest("details:not([open])"))
  .filter(each => { const box = each.getBoundingClientRect(); return box.left < 0 || box.right > innerWidth + 0.5; })
  .map(each => each.outerHTML.slice(0, 200))"""
SIZES = """() => [...document.querySelectorAll("figure .plot > svg")].map(each => each.getBoundingClientRect())
  .map(box => [box.width, box.height])"""
OVERLAPS = """() => [...document.querySelectorAll("figure")].flatMap(figure => {
  const boxes = [...figure.querySelectorAll("svg text:not(.number), p.name, figcaption, ol, .legend")]
    .map(each => [each.textContent.slice(0, 40), each.getBoundingClientRect()]);
  return boxes.flatMap(([name, a], i) => boxes.slice(i + 1)
    .filter(([_, b]) => a.left + 1 < b.right && b.left + 1 < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
    .map(([other]) => figure.querySelector("figcaption").textContent + ": " + name + " / " + other));
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; mend it with: pip install playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}; mend it with: apt-get install chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=["small", "large"])
def page_file(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    result = results.write(getattr(results, request.param)(), folder / f"{request.param}.jsonl")
    return report([result], folder / f"{request.param}.html")


@pytest.fixture(params=VIEWS)
def opened(request, browser, page_file) -> Iterator[tuple[Any, list[str], list[str]]]:
    width, scheme = VIEWS[request.param]
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    yield page, said, asked
    context.close()


def test_the_browser_has_nothing_to_complain_of_and_asks_nobody(opened, page_file):
    page, said, asked = opened
    page.wait_for_load_state("networkidle")
    assert said == []
    assert asked == [page_file.as_uri()]


def test_the_page_is_as_wide_as_the_window_and_nothing_hangs_over(opened):
    page, _, _ = opened
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]
    assert page.evaluate(OUTSIDE) == []


def test_pictures_are_seen_and_their_words_do_not_cover_each_other(opened):
    page, _, _ = opened
    sizes = page.evaluate(SIZES)
    assert len(sizes) >= 5
    assert all(width >= 250 and height >= 15 for width, height in sizes)
    assert page.evaluate(OVERLAPS) == []


def test_every_word_stands_out_from_the_page(opened):
    page, _, _ = opened
    faint = {name: contrast for name, contrast in page.evaluate(CONTRASTS).items() if contrast < LEAST_CONTRAST}
    assert faint == {}


def test_a_page_that_follows_the_system_is_dark_where_the_system_is(browser, page_file):
    colors = set()
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(page_file.as_uri())
        colors.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert len(colors) == 2

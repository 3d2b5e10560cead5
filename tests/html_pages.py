"""Pages as tests look at them: elements, numbers, and what a browser makes of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from energymodel.html_report import WAYS_TO_WRITE
from energymodel.plot_style import BLUE

VOID = {"meta", "link", "br"}
LOADING = {"src", "href", "srcset", "data", "poster", "action", "xlink:href", "background"}


class Page(HTMLParser):
    """What the tests look at: elements in order, `<data>` elements, scripts, ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.texts: dict[str, str] = {}
        self._of: str | None = None
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.numbers.append((attributes["data-key"] or "", attributes["value"] or "", ""))
        if tag in ("script", "style"):
            self._of = attributes.get("id") or tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._of = None

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "data":
            key, value, _ = self.numbers[-1]
            self.numbers[-1] = (key, value, data)
        if self._of is not None:
            self.texts[self._of] = self.texts.get(self._of, "") + data


def at(document: Any, key: str) -> Any:
    for part in key.split("."):
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def assert_numbers_are_those_of_the_json(page: Page, document: dict[str, Any]) -> None:
    """The page holds the document, and each number shown is one of it, rounded."""
    assert json.loads(page.texts["result"]) == document
    for key, value, shown in page.numbers:
        found = at(document, key)
        if found is None:
            assert (value, shown) == ("null", "-"), key
            continue
        assert float(value) == found, key
        factor = key.startswith("underestimate")
        ways = {"gap", "times"} if factor else WAYS_TO_WRITE.keys() - {"gap"}  # no gap from 0
        assert shown in {WAYS_TO_WRITE[way](found) for way in ways}, (key, value, shown)


def assert_it_needs_nothing_else(page: Page) -> None:
    """Nothing is loaded, and every reference is to a part of the page."""
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "img", "audio", "video")
        for name, value in attributes.items():
            if name in LOADING:
                assert value is not None
                assert value.startswith(("#", "data:")), (tag, name, value)
            assert "url(" not in (value or "") or "url(#" in (value or ""), (tag, name)
    assert "@import" not in page.texts["style"]
    assert "url(" not in page.texts["style"]
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert all("src" not in attributes for attributes in scripts)
    for call in ("fetch(", "XMLHttpRequest", "WebSocket", "import(", "sendBeacon", "http:"):
        assert call not in page.texts["script"]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    referred = {
        match
        for _, attributes in page.elements
        for name, value in attributes.items()
        for match in re.findall(r"(?:^|url\()#([\w.-]+)", value or "")
        if name != "style" or "url(" in (value or "")
    }
    assert referred
    assert referred <= set(ids)


def assert_colours_follow_the_page(text: str) -> None:
    """Every colour has a light, a dark and a printed one."""
    css = text[text.index("<style>") : text.index("</style>")]
    body = text[text.index("</style>") :]
    assert "prefers-color-scheme: dark" in css
    assert "@media print" in css
    assert BLUE not in body
    for variable in set(re.findall(r"var\(--([\w-]+)\)", text)):
        assert css.count(f"--{variable}:") >= 3, variable  # light, dark, print


def assert_charts_come_wide_and_narrow(page: Page, count: int) -> None:
    """Each chart is there twice, with a label and texts to point at."""
    classes = [a["class"] for tag, a in page.elements if tag == "svg"]
    assert classes == ["chart wide", "chart narrow"] * count
    assert all(a.get("aria-label") for tag, a in page.elements if tag == "svg")
    hovers = sum(a.get("class") == "hover" for tag, a in page.elements if tag == "g")
    titles = sum(tag == "title" for tag, _ in page.elements)
    assert hovers >= 4 * count
    assert titles == hovers + 1  # that of the page


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const bar = [...document.querySelectorAll("svg.chart .hover")].find((e) => e.checkVisibility());
  const box = bar.getBoundingClientRect();
  const at = {clientX: box.x + 1, clientY: box.y + 1, bubbles: true};
  bar.firstElementChild.dispatchEvent(new PointerEvent("pointermove", at));
  document.documentElement.dataset.probe = JSON.stringify({
    errors,
    requests: performance.getEntriesByType("resource").map((entry) => entry.name),
    width: innerWidth,
    overflow: document.documentElement.scrollWidth - innerWidth,
    tip: document.getElementById("tip").textContent,
    charts: [...document.querySelectorAll("svg.chart")].filter((e) => e.checkVisibility()).length,
  });
});
</script>"""


def assert_a_browser_shows_it(text: str, folder: Path, width: int, charts: int) -> str:
    """No errors, no requests, nothing wider than the window; returns what a part says."""
    assert BROWSER is not None
    page = folder / "page.html"
    page.write_text(text.replace("<head>", "<head>" + PROBE, 1), encoding="utf-8")
    outcome = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/p",
         f"--window-size={width},900", "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in outcome.stderr
    (found,) = re.findall(r'data-probe="([^"]*)"', outcome.stdout)
    probe = json.loads(unescape(found))
    assert probe["errors"] == []
    assert probe["requests"] == []
    assert probe["overflow"] <= 0
    assert probe["charts"] == charts
    assert (probe["width"] <= 600) == (width <= 600)
    return str(probe["tip"])

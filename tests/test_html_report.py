"""The report needs nothing but itself, and its numbers are those of the JSON."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import energymodel
from energymodel import plots
from energymodel.cli import app
from energymodel.html_report import WAYS_TO_WRITE
from energymodel.plot_style import BLUE
from energymodel.prediction_page import prediction_page
from energymodel.report import render
from energymodel.results import Prediction
from energymodel.svg_charts import inline_svg

pytest.importorskip("jinja2", reason="the report's libraries are an extra")
pytest.importorskip("matplotlib", reason="the report's libraries are an extra")

TRACE = "arrival_seconds,input_tokens,output_tokens\n0,1000,20\n1,200,300\n60,50,1\n"
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


def predicted(**options: Any) -> Prediction:
    return energymodel.predict(
        "translation", gpu="a100", grid="france", electricity_price="texas", pue=1.3, **options
    )


@pytest.fixture(scope="module")
def result() -> Prediction:
    return predicted(arrivals="poisson:2")


@pytest.fixture(scope="module")
def text(result: Prediction) -> str:
    return prediction_page(result)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def at(document: Any, key: str) -> Any:
    for part in key.split("."):
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def test_numbers_are_those_of_the_json(result: Prediction, page: Page) -> None:
    document = json.loads(render(result, "json"))
    assert len(page.numbers) > 100
    for key, value, shown in page.numbers:
        found = at(document, key)
        assert float(value) == found, key
        factor = key.startswith("underestimate")
        ways = {"gap", "times"} if factor else WAYS_TO_WRITE.keys() - {"gap"}  # no gap from 0
        assert shown in {WAYS_TO_WRITE[way](found) for way in ways}, (key, value, shown)


def test_what_matters_is_on_the_page(result: Prediction, text: str, page: Page) -> None:
    keys = {key for key, _, _ in page.numbers}
    assert {
        *("energy_joules", "energy_joules_low", "energy_joules_high", "interval_level"),
        *("electricity_usd", "carbon_grams", "inputs.pue", "inputs.grid_grams_per_kwh"),
        *("prefill_joules", "decode_joules", "idle_joules", "timeline.slice_seconds"),
        *(f"naive.{name}" for name in result.naive),
        *(f"by_component_joules.{name}" for name in result.by_component_joules),
        *(f"by_operator_joules.{name}" for name in result.by_operator_joules),
        *(f"bins.{i}.energy_joules" for i in range(len(result.bins))),
        *(f"{n}_seconds.p{p}" for n in ("ttft", "tpot", "e2e") for p in (50, 90, 99)),
    } <= keys
    for said in (result.provenance["grid_source"], result.provenance["electricity_source"]):
        assert said in text
    assert "2023" in result.provenance["electricity_source"]
    assert "2024" in result.provenance["grid_source"]


def test_the_page_holds_the_result(result: Prediction, page: Page) -> None:
    assert json.loads(page.texts["result"]) == json.loads(render(result, "json"))


def test_the_page_needs_nothing_else(page: Page) -> None:
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


def test_references_within_the_page_are_met_and_ids_are_unique(page: Page) -> None:
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


def test_charts_come_wide_and_narrow_with_texts_to_point_at(page: Page) -> None:
    classes = [a["class"] for tag, a in page.elements if tag == "svg"]
    assert classes == ["chart wide", "chart narrow"] * 6
    assert all(a.get("aria-label") for tag, a in page.elements if tag == "svg")
    hovers = sum(a.get("class") == "hover" for tag, a in page.elements if tag == "g")
    titles = sum(tag == "title" for tag, _ in page.elements)
    assert hovers > 50
    assert titles == hovers + 1  # that of the page


def test_colours_follow_the_page(text: str) -> None:
    css = text[text.index("<style>") : text.index("</style>")]
    body = text[text.index("</style>") :]
    assert "prefers-color-scheme: dark" in css
    assert "@media print" in css
    assert BLUE not in body
    for variable in set(re.findall(r"var\(--([\w-]+)\)", text)):
        assert css.count(f"--{variable}:") >= 3, variable  # light, dark, print


def test_text_of_a_trace_is_no_markup(result: Prediction) -> None:
    evil = "</script><script>alert(1)</script>&amp;"
    inputs = dict(result.inputs) | {"trace": evil, "trace_source": evil}
    page = prediction_page(replace(result, inputs=inputs, warnings=(evil,)))
    assert "<script>alert" not in page
    assert json.loads(Page(page).texts["result"])["inputs"]["trace"] == evil


@pytest.mark.parametrize(
    "options",
    [
        {"binning": "paper"},
        {"stack": "transformers"},
        {"model": "mixtral-8x7b", "tensor_parallel": 4, "replicas": 2},
    ],
)
def test_other_setups_have_a_page(options: dict[str, Any]) -> None:
    result = energymodel.predict("translation", gpu="a100", **options)
    page = Page(prediction_page(result))
    charts = sum(tag == "svg" for tag, _ in page.elements)
    assert charts == (10 if options.get("binning") == "paper" else 12)
    assert "electricity_usd" not in {key for key, _, _ in page.numbers}


def test_a_request_of_one_token_has_a_page(tmp_path: Path) -> None:
    trace = tmp_path / "one.csv"
    trace.write_text("arrival_seconds,input_tokens,output_tokens\n0,10,1\n")
    Page(prediction_page(energymodel.predict(str(trace), gpu="a100")))


def test_inline_svg_keeps_the_texts(result: Prediction) -> None:
    svg = inline_svg(plots.latency(result), "x", 'a "label"', "c")
    assert svg.startswith('<svg class="c" viewBox="0 0 ')
    assert 'aria-label="a &quot;label&quot;"' in svg
    assert "<title>TTFT p50: " in svg
    assert "xlink" not in svg
    assert "font-family" not in svg


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


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it_without_errors_or_requests(
    text: str, tmp_path: Path, width: int
) -> None:
    assert BROWSER is not None
    page = tmp_path / "page.html"
    page.write_text(text.replace("<head>", "<head>" + PROBE, 1), encoding="utf-8")
    outcome = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/p",
         f"--window-size={width},900", "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in outcome.stderr
    (found,) = re.findall(r'data-probe="([^"]*)"', outcome.stdout)
    probe = json.loads(unescape(found))
    assert probe["errors"] == []
    assert probe["requests"] == []
    assert probe["overflow"] <= 0
    assert probe["charts"] == 6
    assert "J, " in probe["tip"]
    assert (probe["width"] <= 600) == (width <= 600)


# --- the command --------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", "--gpu", "a100", *(str(a) for a in arguments)])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "small.csv"
    path.write_text(TRACE)
    return path


def test_the_command_writes_the_page_beside_its_output(trace: Path, tmp_path: Path) -> None:
    report = tmp_path / "out.html"
    outcome = run("--trace", trace, "--report", report, "--format", "json",
                  "--electricity-price", "0.1")  # fmt: skip
    assert outcome.exit_code == 0, outcome.stderr
    page = Page(report.read_text(encoding="utf-8"))
    document = json.loads(outcome.stdout)
    assert json.loads(page.texts["result"]) == document
    assert document["electricity_usd"] == pytest.approx(document["energy_joules"] / 3.6e6 * 0.1)


@pytest.mark.parametrize("place", ["small.csv", "missing/out.html", "."])
def test_a_bad_place_is_refused_before_the_work(trace: Path, tmp_path: Path, place: str) -> None:
    outcome = run("--trace", trace, "--report", tmp_path / place)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: --report ")
    assert trace.read_text() == TRACE


def test_report_and_output_are_two_files(trace: Path, tmp_path: Path) -> None:
    same = tmp_path / "out"
    outcome = run("--trace", trace, "--report", same, "--output", same)
    assert outcome.exit_code == 2
    assert not same.exists()


def test_missing_libraries_are_said_before_the_work(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    outcome = run("--trace", trace, "--report", tmp_path / "out.html")
    assert outcome.exit_code == 2
    assert "--report needs jinja2: pip install 'energymodel[report]'" in outcome.stderr
    assert not (tmp_path / "out.html").exists()

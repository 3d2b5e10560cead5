"""The report needs nothing but itself, and its numbers are those of the JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from html_pages import (
    BROWSER,
    Page,
    assert_a_browser_shows_it,
    assert_charts_come_wide_and_narrow,
    assert_colours_follow_the_page,
    assert_it_needs_nothing_else,
    assert_numbers_are_those_of_the_json,
)
from typer.testing import CliRunner, Result

import energymodel
from energymodel import plots
from energymodel.cli import app
from energymodel.prediction_page import prediction_page
from energymodel.report import render
from energymodel.results import Prediction
from energymodel.svg_charts import inline_svg

pytest.importorskip("jinja2", reason="the report's libraries are an extra")
pytest.importorskip("matplotlib", reason="the report's libraries are an extra")
from matplotlib.figure import Figure

TRACE = "arrival_seconds,input_tokens,output_tokens\n0,1000,20\n1,200,300\n60,50,1\n"


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


def test_numbers_are_those_of_the_json(result: Prediction, page: Page) -> None:
    assert_numbers_are_those_of_the_json(page, json.loads(render(result, "json")))
    assert len(page.numbers) > 100


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


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert_it_needs_nothing_else(page)


def test_charts_come_wide_and_narrow_with_texts_to_point_at(page: Page) -> None:
    assert_charts_come_wide_and_narrow(page, 6)


def test_colours_follow_the_page(text: str) -> None:
    assert_colours_follow_the_page(text)


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


def test_formulas_in_a_figure_stay_whole() -> None:
    figure = Figure()
    figure.subplots().set_title(r"$\mathdefault{2\times10^{1}}$")
    svg = inline_svg(figure, "x", "formula", "c")
    Page(f"<p>{svg}</p>")
    assert "font-family" not in svg


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it_without_errors_or_requests(
    text: str, tmp_path: Path, width: int
) -> None:
    assert "J, " in assert_a_browser_shows_it(text, tmp_path, width, charts=6)


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

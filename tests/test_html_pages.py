"""The pages of whatif, plan and validate: whole, needing nothing else, their numbers the JSON's."""

from __future__ import annotations

import json
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

from calibration.fitting.measured_runs import OWN
from calibration.validation.page import validation_page
from calibration.validation.report import json_text, measured_points
from calibration.validation.rows import Comparison, LeftOut, MeasuredRow, offline
from calibration.validation.validate import Validation
from energymodel.cli import app
from energymodel.fleet_plan import Plan
from energymodel.pareto import Targets
from energymodel.plan_candidates import Demand
from energymodel.plan_page import plan_page
from energymodel.planning import Stock
from energymodel.settings import Setting
from energymodel.steady_state import summarise
from energymodel.sweep import Point, Workload
from energymodel.sweep_page import sweep_page
from energymodel.workloads import load_requests

pytest.importorskip("jinja2", reason="the pages' libraries are an extra")
pytest.importorskip("matplotlib", reason="the pages' libraries are an extra")

EVIL = "</script><script>alert(1)</script>&amp;"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


WHATIF = (
    "whatif", "--trace", "azure_code", "--gpu", "a100,h100", "--max-batch", "16,256",
    "--replicas", "2,4", "--ttft", "5", "--confirm", "2", "--compare", "1,8", "--grid", "france",
    "--backend", "sequential",
)  # fmt: skip
PLAN = (
    "plan", "--trace", "azure_conv,azure_code", "--stock", "h100=8,a100=16", "--ttft", "1",
    "--tpot", "0.05", "--max-batch", "256", "--tensor-parallel", "1", "--scale-every", "900",
    "--grid", "france", "--backend", "sequential",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


def written(folder: Path, command: tuple[str, ...]) -> tuple[str, Any]:
    """The page and the JSON that one run of a command writes."""
    page = folder / f"{command[0]}.html"
    done = run(*command, "--format", "json", "--report", page)
    assert done.exit_code == 0, done.output
    return page.read_text(encoding="utf-8"), json.loads(done.stdout)


@pytest.fixture(scope="module")
def whatif(folder: Path) -> tuple[str, Any]:
    return written(folder, WHATIF)


@pytest.fixture(scope="module")
def plan(folder: Path) -> tuple[str, Any]:
    return written(folder, PLAN)


def compared(name: str, predicted: float, measured: float | None, **changes: Any) -> Comparison:
    fitted = changes.pop("fitted", False)
    row = MeasuredRow(
        **{
            "source": OWN,
            "name": name,
            "gpu": "h100",
            "model": "llama-3.2-1b",
            "model_name": "llama-3.2-1b",
            "stack": "vllm",
            "phase": "batch",
            "batch": 4,
            "requests": offline(name, [64] * 4, 8),
            "joules_per_output_token": measured,
            "seconds_per_output_token": 0.01,
            **changes,
        }
    )
    return Comparison(
        row=row,
        fitted=fitted,
        joules_per_output_token=predicted,
        joules_low=0.9 * predicted,
        joules_high=1.1 * predicted,
        seconds_per_output_token=0.02,
        ttft_seconds=0.1,
        tpot_seconds=None,
        naive_joules={"flops_tdp": 0.5},
    )


VALIDATION = Validation(
    comparisons=(
        compared("a", 2.1, 2.0),
        compared("b", 2.6, 2.0, batch=8),
        compared("no meter", 2.0, None, stack="vllm-eager"),
        compared("in the fit", 1.0, 1.1, fitted=True),
    ),
    left_out=(LeftOut(source=OWN, reason="no tokens", rows=3),),
    skipped=("public measurements: no folder was given",),
)


@pytest.fixture(scope="module")
def validation() -> tuple[str, Any]:
    text = json_text(VALIDATION)
    return validation_page(VALIDATION, text, measured_points(VALIDATION)), json.loads(text)


CHARTS = {"whatif": 4, "plan": 3, "validation": 3}
each_page = pytest.mark.parametrize("name", CHARTS)


@each_page
def test_numbers_are_those_of_the_json(name: str, request: pytest.FixtureRequest) -> None:
    text, document = request.getfixturevalue(name)
    page = Page(text)
    assert_numbers_are_those_of_the_json(page, document)
    assert len(page.numbers) > 40


@each_page
def test_a_page_needs_nothing_else(name: str, request: pytest.FixtureRequest) -> None:
    text, _ = request.getfixturevalue(name)
    page = Page(text)
    assert_it_needs_nothing_else(page)
    assert_charts_come_wide_and_narrow(page, CHARTS[name])
    assert_colours_follow_the_page(text)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@each_page
def test_a_browser_shows_it_without_errors_or_requests(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    text, _ = request.getfixturevalue(name)
    for width in (1280, 500):
        assert "J" in assert_a_browser_shows_it(text, tmp_path, width, charts=CHARTS[name])


def keys_of(text: str) -> set[str]:
    return {key for key, _, _ in Page(text).numbers}


def test_whatif_shows_the_best_the_ranking_and_the_comparison(whatif: tuple[str, Any]) -> None:
    text, document = whatif
    keys = keys_of(text)
    for number in document["best"]:
        names = ("joules_per_request", "energy_joules", "energy_joules_low", "usd", "carbon_grams")
        assert {f"points.{number - 1}.{name}" for name in names} <= keys
        assert f"points.{number - 1}.ttft_seconds.p99" in keys
    parts = document["comparison"]["joules_per_request"]
    assert {
        f"comparison.joules_per_request.{n}.first" for n, p in parts.items() if p["first"]
    } <= keys
    assert document["comparison"]["sentence"] in text
    for said in (
        "Ember",
        "profiles/prices.csv",
        "parameters of a100",
        "estimated in steady states",
    ):
        assert said in text


def test_plan_shows_the_fleet_what_binds_and_the_replicas(plan: tuple[str, Any]) -> None:
    text, document = plan
    keys = keys_of(text)
    assert {
        "energy_joules",
        "energy_joules_low",
        "energy_joules_high",
        "usd",
        "carbon_grams",
    } <= keys
    assert {f"gpus.{gpu}" for gpu in document["gpus"]} <= keys
    for i in range(len(document["pools"])):
        assert {f"pools.{i}.replicas", f"pools.{i}.energy_joules", f"pools.{i}.usd"} <= keys
    for i, binding in enumerate(document["bindings"]):
        assert {f"bindings.{i}.share", f"bindings.{i}.saving"} <= keys
        assert binding["change"] in text
    for trace in ("azure_conv", "azure_code"):
        assert {f"latencies.{trace}.{x}_seconds.p99" for x in ("ttft", "tpot")} <= keys
    periods = len(document["scaling"]["replicas"][0])
    assert {f"scaling.replicas.0.{i}" for i in range(periods)} <= keys
    assert {"targets.ttft_seconds", "scaling.energy_joules", "scaling.fixed_joules"} <= keys


def test_validation_shows_both_splits_and_what_is_not_known(validation: tuple[str, Any]) -> None:
    text, document = validation
    keys = keys_of(text)
    for statistic in ("median_abs", "p90_abs", "max_abs", "median"):
        assert f"groups.held_out.source.0.joules.{statistic}" in keys
        assert f"groups.fit.source.0.joules.{statistic}" in keys
    assert "groups.held_out.source.0.coverage" in keys
    assert "groups.held_out.source.0.naive.flops_tdp.median_abs" in keys
    assert document["groups"]["held_out"]["source"][1]["joules"] is None  # never measured
    assert not any(key.startswith("groups.held_out.source.1.joules") for key in keys)
    values = [aim["value"] for aim in document["aims"]]
    assert None in values
    assert {f"aims.{i}.value" for i, value in enumerate(values) if value is not None} <= keys
    for said in ("public measurements: no folder was given", "no tokens", "not measured yet"):
        assert said in text


def test_aims_say_whether_they_are_met(validation: tuple[str, Any]) -> None:
    aim = validation[1]["aims"][0]
    assert aim["n"] == 2
    assert aim["value"] == pytest.approx(0.175)  # median of 5 % and 30 %
    assert aim["met"] is False


# --- what else can come out ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def workload() -> Workload:
    requests = load_requests("azure_code", num_requests=200)
    return Workload(
        binned=replace(summarise(requests), name=EVIL),
        requests=requests,
        output_tokens=int(requests.output_tokens.sum()),
        prices={},
    )


def test_no_setting_within_the_targets_is_a_page(workload: Workload) -> None:
    setting = Setting(gpu="a100")
    points = [
        Point(setting=setting, mode="exact", reason="does not fit <b>"),
        Point(
            setting=replace(setting, max_batch=16),
            mode="binned",
            replicas=1,
            gpus=1,
            energy_joules=2.0,
            energy_joules_low=1.0,
            energy_joules_high=3.0,
            joules_per_request=1.0,
            ttft_seconds={"p50": 5.0, "p90": 5.0, "p99": 5.0},
        ),
    ]
    text = sweep_page(points, "energy", Targets(ttft_seconds=1.0), None, workload, top=5)
    page = Page(text)
    assert "No setting" in text
    assert "1 refused: does not fit &lt;b&gt;" in text
    assert "1 setting served the trace but missed a target" in text
    assert "points.1.energy_joules" in keys_of(text)
    assert "<script>alert" not in text
    assert_it_needs_nothing_else(page)


def test_no_plan_is_a_page_that_says_why(workload: Workload) -> None:
    targets = Targets(ttft_seconds=0.001)
    plan = Plan(objective="energy", targets=targets, infeasible=f"No GPU does. {EVIL}")
    demands = [Demand(name="chat", model="llama-3.1-8b", workload=workload)]
    text = plan_page(plan, None, demands, Stock(gpus={"a100": 1}), margin=0.0)
    Page(text)
    assert "No plan" in text
    assert "No GPU does." in text
    assert "<script>alert" not in text


def test_rent_and_carbon_that_are_not_known_are_not_zero(folder: Path) -> None:
    text, document = written(folder, ("plan", "--trace", "azure_code", "--stock", "rtx-a6000=16"))
    assert document["usd"] is None
    assert "give prices with --price" in text
    assert document["carbon_grams"] is None
    assert "give a grid with --grid" in text
    assert "--scale-every" in text
    assert "0.00 USD" not in text


# --- the options --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [WHATIF, PLAN])
def test_a_bad_place_is_refused_before_the_work(command: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "out"
    for place in (output, tmp_path, tmp_path / "missing" / "page.html"):
        done = run(*command, "--output", output, "--report", place)
        assert done.exit_code == 2
        assert done.stderr.startswith("error: --report ")
        assert not output.exists()


def test_validate_writes_a_page_or_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.validation.report.validate", lambda **_: VALIDATION)
    page = tmp_path / "page.html"
    done = run("validate", "--report", page, "--format", "json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert_numbers_are_those_of_the_json(Page(page.read_text(encoding="utf-8")), document)
    (tmp_path / "folder.html").mkdir()
    refused = run("validate", "--report", tmp_path / "folder.html")
    assert refused.exit_code == 2
    assert "is a folder; name a file" in refused.stderr

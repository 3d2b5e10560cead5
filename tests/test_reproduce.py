"""The paper's findings: stated as in the paper, predicted without looking at it, shown in full."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import energymodel.reproduce as module
from calibration.validation.paper_measurements import measured_findings
from energymodel.cli import app
from energymodel.models import load_model
from energymodel.paper_findings import Estimate, Finding, Measured, Row, load_paper
from energymodel.paper_ideal import flops_by_convention
from energymodel.reproduce import Reproduction, change, expert_kernel_ratio
from energymodel.reproduce_report import as_markdown, as_table, figure_address, to_dict
from energymodel.traces import Requests
from energymodel.workload import predict

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "paper-findings.md"
STATED_PERCENT = {
    "gap-burstgpt-transformers": 506.52,
    "gap-burstgpt-vllm": 63.75,
    "gap-azure_code-transformers": 102.79,
    "gap-azure_code-vllm": 26.59,
    "gap-azure_conv-transformers": 490.23,
    "gap-azure_conv-vllm": 64.22,
    "saving-burstgpt": -73.00,
    "saving-azure_code": -37.58,
    "saving-azure_conv": -72.18,
    "speculation-small": -29.14,
    "speculation-large": 25.65,
    "moe-energy": 54.24,
    "moe-kernel-1": 19.70,
    "moe-kernel-8": 63.0,
    "graph-a100": -25.47,
    "graph-a6000": -2.97,
    "compile-a100": -29.90,
    "compile-rtx-6000-ada": -13.28,
    "compile-a6000": -1.96,
    "tp2-latency": -40.16,
    "tp2-energy": 29.3,
    "tp4-latency": -61.34,
    "tp4-energy": 55.23,
    "continuous-large": -5.0,
}
"""Typed from the paper, not read from the data file."""
NOT_PREDICTED = {"compile-a100", "compile-rtx-6000-ada", "compile-a6000", "tasks"}


@pytest.fixture(scope="module")
def result() -> Reproduction:
    return module.reproduce(measured_findings())


def row_of(result: Reproduction, name: str) -> Row:
    return next(row for row in result.rows if row.finding.id == name)


def test_the_data_file_states_what_the_paper_states() -> None:
    stated = {f.id: f.stated for f in load_paper().findings if f.stated is not None}
    assert {name: round(100 * value, 2) for name, value in stated.items()} == STATED_PERCENT
    for finding in load_paper().findings:
        assert finding.where
        assert finding.why
        assert finding.stated is not None or finding.stated_text


@pytest.mark.parametrize("dataset", ["burstgpt", "azure_code", "azure_conv"])
def test_the_savings_of_table_4_follow_from_its_gaps(dataset: str) -> None:
    eager, served = (STATED_PERCENT[f"gap-{dataset}-{s}"] for s in ("transformers", "vllm"))
    saving = (1 + served / 100) / (1 + eager / 100) - 1
    assert STATED_PERCENT[f"saving-{dataset}"] == pytest.approx(100 * saving, abs=0.01)


def test_every_finding_has_a_row_and_says_where_there_is_no_prediction(
    result: Reproduction,
) -> None:
    assert [row.finding for row in result.rows] == list(load_paper().findings)
    without = {row.finding.id for row in result.rows if row.predicted is None}
    assert without == NOT_PREDICTED
    for row in result.rows:
        p = row.predicted
        if p is None:
            assert row.same_direction is None
            continue
        assert math.isfinite(p.value)
        assert p.setting
        assert p.low is None or p.high is None or p.low <= p.value <= p.high
        if p.spread_low is not None and p.spread_high is not None:
            assert p.spread_low - 1e-12 <= p.value <= p.spread_high + 1e-12


def test_predictions_do_not_look_at_what_is_stated(
    result: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = load_paper()
    other = replace(
        paper,
        findings=tuple(
            replace(f, stated=None if f.stated is None else -0.5 * f.stated) for f in paper.findings
        ),
    )
    monkeypatch.setattr(module, "load_paper", lambda: other)
    again = module.reproduce()
    assert [row.predicted for row in again.rows] == [row.predicted for row in result.rows]


def test_an_interval_of_a_ratio_adds_independent_errors() -> None:
    requests = Requests(
        name="one",
        arrival_seconds=np.zeros(1),
        input_tokens=np.array([32]),
        output_tokens=np.array([4]),
    )
    p = predict(requests, gpu="a6000")
    a = replace(p, energy_joules=2.0, energy_joules_low=1.0, energy_joules_high=4.0)
    b = replace(p, energy_joules=4.0, energy_joules_low=2.0, energy_joules_high=8.0)
    ratio = change(a, b, gpu="a6000", setting="")
    width = math.exp(math.sqrt(2) * math.log(2))
    assert ratio.value == pytest.approx(-0.5)
    assert ratio.low == pytest.approx(0.5 / width - 1)
    assert ratio.high == pytest.approx(0.5 * width - 1)
    exact = replace(b, energy_joules_low=4.0, energy_joules_high=4.0)
    assert change(a, exact, gpu="a6000", setting="").low == pytest.approx(-0.75)


def test_the_experts_kernel_reads_what_the_batch_chose() -> None:
    # one token: the same bytes; eight: 64 (1 - (7/8)**8) of 64 experts against 8
    assert expert_kernel_ratio("h100", 1) == pytest.approx(1.0, abs=0.3)
    bytes_ratio = 64 * (1 - (7 / 8) ** 8) / 8
    assert 0.5 * bytes_ratio < expert_kernel_ratio("a6000", 8) < 1.2 * bytes_ratio


def test_conventions_of_flops() -> None:
    model = load_model("llama-3.1-8b")
    requests = Requests(
        name="one",
        arrival_seconds=np.zeros(1),
        input_tokens=np.array([1000]),
        output_tokens=np.array([25]),
    )
    flops = flops_by_convention(model, requests)
    parameters = 8_030_261_248  # published
    counted = flops["as counted here"]
    by_parameters = flops["2 x parameters x tokens, no attention"]
    assert by_parameters == pytest.approx(2 * parameters * 1024, rel=1e-6)
    assert flops["a multiply-add as one"] == counted / 2
    logits = flops["logits of every prompt token too"] - counted
    assert logits == pytest.approx(2 * 128256 * 4096 * 999, rel=1e-9)


def test_both_readings_of_the_peak(result: Reproduction) -> None:
    dense = {r.dataset: r.stated_dense for r in result.readings if r.stack == "vllm"}
    assert dense == pytest.approx(
        {"burstgpt": -0.181, "azure_code": -0.367, "azure_conv": -0.179}, abs=6e-4
    )
    for reading in result.readings:
        factor = (1 + reading.predicted.value) / (1 + reading.predicted_dense.value)
        assert factor == pytest.approx(309.7 / 154.8, rel=1e-3)
    readings = {gap.reading for gap in result.sensitivity}
    assert {"dense peak", "FLOPs: a multiply-add as one", "batch of at most 8"} <= readings
    assert len(result.sensitivity) == 6 * len(readings)


def test_speculation_is_shown_over_acceptance(result: Reproduction) -> None:
    for pair in result.speculation:
        assert list(pair.change) == ["0.5", "0.6", "0.7", "0.8", "0.9"]
        assert np.all(np.diff(np.array(list(pair.change.values())), axis=0) < 0)


def test_measurements_come_from_the_committed_data(result: Reproduction) -> None:
    measured = {row.finding.id: row.measured for row in result.rows if row.measured is not None}
    assert {"graph-a100", "moe-energy", "moe-kernel-1", "moe-kernel-8"} <= set(measured)
    # medians of the windows moe.fused and moe.dense.olmoe-1b-7b.t8, microseconds of an iteration
    kernel = measured["moe-kernel-8"]
    assert kernel is not None
    assert kernel.value == pytest.approx(202.62 / 44.84 - 1, rel=0.1)
    for m in measured.values():
        assert m is not None
        assert m.gpu == "h100"
        assert m.low <= m.value <= m.high
        assert m.cases >= 1


# --- how a row judges ---------------------------------------------------------------------------


def finding(within: tuple[float | None, float | None], stated: float | None = -0.2) -> Finding:
    return Finding(
        id="x",
        where="",
        statement="x",
        quantity="change of energy",
        unit="percent",
        stated=stated,
        stated_text="",
        within=within,
        not_stated="",
        why="",
    )


def test_a_row_judges_direction_and_interval() -> None:
    estimate = Estimate(gpu="a6000", setting="x", value=0.1, low=-0.3, high=0.4)
    measured = Measured(gpu="h100", setting="x", value=-0.1, low=-0.2, high=0.0, cases=2)
    row = Row(finding=finding((None, 0.0)), predicted=estimate, measured=measured)
    assert row.same_direction is False
    assert row.measured_same_direction is True
    assert row.stated_in_interval is True
    empty = Row(finding=finding((0.0, None), None), predicted=None, measured=None)
    assert (empty.same_direction, empty.stated_in_interval) == (None, None)


# --- as a user runs it --------------------------------------------------------------------------


def skeleton(page: str) -> list[str]:
    """Headings, and what each row of a table is about: everything but numbers and judgements."""
    kept = []
    for line in page.splitlines():
        if line.startswith("#"):
            kept.append(line)
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            kept.append(" | ".join(cells[:4] if len(cells) == 8 else cells[:1]))
    return kept


def test_the_page_is_current_but_for_its_digits(result: Reproduction) -> None:
    now = as_markdown(result, "img/paper-findings.png")
    hint = "docs/paper-findings.md is out of date: make findings"
    assert skeleton(now) == skeleton(PAGE.read_text(encoding="utf-8")), hint


def run(*arguments: str) -> tuple[int, str, str]:
    outcome = CliRunner().invoke(app, ["reproduce", *arguments])
    return outcome.exit_code, outcome.stdout, outcome.stderr


def test_the_command_writes_page_figure_and_json(
    result: Reproduction, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "reproduce", lambda measured: result)
    page, figure = tmp_path / "page.md", tmp_path / "img.png"
    code, _, _ = run("--format", "markdown", "--output", str(page), "--figure", str(figure))
    assert code == 0
    assert "](img.png)" in page.read_text(encoding="utf-8")
    assert figure.read_bytes().startswith(b"\x89PNG")
    code, text, _ = run("--format", "json")
    assert code == 0
    document = json.loads(text)
    assert document == json.loads(json.dumps(to_dict(result)))
    assert len(document["findings"]) == len(result.rows)
    code, text, _ = run()
    assert code == 0
    assert text.strip() == as_table(result, color=False)
    assert "not predicted" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--figure", "x.txt"), "ends in .png"),
        (("--figure", "no/such/folder/x.png"), "does not exist"),
        (("--output", "no/such/folder/x.md"), "does not exist"),
    ],
)
def test_bad_files_are_refused_before_the_work(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "reproduce", lambda measured: pytest.fail("too late"))
    code, _, error = run(*arguments)
    assert code == 2
    assert re.search(message, error)
    assert "Traceback" not in error


def test_the_figure_is_linked_from_where_the_page_is(tmp_path: Path) -> None:
    assert figure_address(tmp_path / "img" / "f.png", tmp_path / "docs" / "p.md") == "../img/f.png"
    assert figure_address(Path("img/f.png"), None) == "img/f.png"

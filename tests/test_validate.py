"""Validation: readers of measured rows, error statistics, split, recorded levels, command."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_serving import StepEngine, World, WorldMeter, in_world
from typer.testing import CliRunner

from calibration.fitting.measured_runs import read_own
from calibration.fitting.public_power import bytes_factor
from calibration.fitting.serving_runs import runs_of
from calibration.metering.recording import append_record
from calibration.serving.cases import run_cases
from calibration.serving.plan import Case, EngineRun, Plan, model_config
from calibration.validation.aims import standings
from calibration.validation.physics_check import kernel_seconds, physics_checks
from calibration.validation.public_runs import ENERGAIZER, SPLITWISE, V2, V3, read_public
from calibration.validation.report import markdown, plot, terminal_text
from calibration.validation.rows import (
    Comparison,
    MeasuredRow,
    compare,
    is_fitted,
    is_power_fitted,
    load_split,
    offline,
    steady_state,
)
from calibration.validation.saturated_check import implied_input_tokens, saturated_sections
from calibration.validation.validate import (
    LEVELS_FILE,
    OWN_RUNS,
    Validation,
    by_source,
    check_levels,
    error_levels,
    error_stats,
    group_by,
    load_levels,
    record_levels,
    to_dict,
    validate,
)
from energymodel import predict
from energymodel.acceptance import expected_tokens
from energymodel.calibrations import load_calibration
from energymodel.cli import app
from energymodel.errors import EnergyModelError
from energymodel.models import load_model
from energymodel.specs import STATIC_STACKS

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_public = pytest.mark.skipif(
    not (SHARED / "data" / "validation").is_dir(),
    reason=f"the public measurements are not there ({SHARED})",
)


def a_row(**changes: Any) -> MeasuredRow:
    values: dict[str, Any] = {
        "source": "own",
        "name": "row",
        "gpu": "h100",
        "model": "llama-3.2-1b",
        "model_name": "llama-3.2-1b",
        "stack": "vllm",
        "phase": "batch",
        "batch": 4,
        "requests": offline("row", [64] * 4, 8),
        "joules_per_output_token": 2.0,
        "seconds_per_output_token": 0.01,
    }
    return MeasuredRow(**{**values, **changes})


def a_comparison(joules: float, *, measured: float | None = 2.0, **changes: Any) -> Comparison:
    return Comparison(
        row=a_row(joules_per_output_token=measured, **changes),
        fitted=False,
        joules_per_output_token=joules,
        joules_low=0.9 * joules,
        joules_high=1.1 * joules,
        seconds_per_output_token=0.02,
        ttft_seconds=0.1,
        tpot_seconds=None,
        naive_joules={"flops_tdp": 0.5},
    )


def a_validation(*comparisons: Comparison) -> Validation:
    return Validation(comparisons=comparisons, left_out=(), skipped=())


# -- errors ---------------------------------------------------------------------------


def test_statistics_of_errors() -> None:
    stats = error_stats([-0.5, 0.1, None, 0.2])
    assert stats is not None
    assert (stats.n, stats.median_abs, stats.max_abs, stats.median) == (3, 0.2, 0.5, 0.1)
    assert stats.p90_abs == pytest.approx(0.44)
    assert error_stats([None]) is None


def test_errors_are_predicted_over_measured() -> None:
    c = a_comparison(2.1)
    assert c.joules_error == pytest.approx(0.05)
    assert c.seconds_error == pytest.approx(1.0)
    assert c.watts_error == pytest.approx(2.1 / 0.02 / 200 - 1)
    assert c.naive_error("flops_tdp") == pytest.approx(-0.75)
    assert c.naive_error("tdp_time") is None
    assert c.ttft_error is None and c.tpot_error is None
    assert c.covered is True
    assert a_comparison(2.5).covered is False


def test_energy_that_was_not_measured_is_unknown_not_zero() -> None:
    c = a_comparison(2.1, measured=None)
    assert c.joules_error is None and c.watts_error is None and c.covered is None
    (group,) = group_by([c], by_source, fitted=False)
    assert group.joules is None and group.coverage is None
    assert group.seconds is not None


def test_fitted_and_held_out_rows_are_never_in_one_group() -> None:
    held, fitted = a_comparison(2.0), replace(a_comparison(9.0), fitted=True)
    (group,) = group_by([held, fitted], by_source, fitted=False)
    assert group.rows == 1
    assert len(error_levels(a_validation(held, fitted))) == 2


# -- the steady state -----------------------------------------------------------------


@given(
    batch=st.integers(1, 64),
    mean_input=st.floats(10, 500),
    mean_output=st.floats(10, 500),
)
def test_the_steady_part_has_the_means_asked_for(
    batch: int, mean_input: float, mean_output: float
) -> None:
    whole, ramp = steady_state(
        "s", batch=batch, mean_input_tokens=mean_input, mean_output_tokens=mean_output
    )
    count = len(whole.input_tokens) - len(ramp.input_tokens)
    assert count >= 600
    for name, mean in (("input_tokens", mean_input), ("output_tokens", mean_output)):
        part = getattr(whole, name).sum() - getattr(ramp, name).sum()
        assert part / count == pytest.approx(mean, abs=0.6)


def test_the_steady_state_keeps_the_batch_full() -> None:
    whole, ramp = (
        predict(requests, gpu="h100", model="llama-3.1-8b", max_batch=32)
        for requests in steady_state("s", batch=32, mean_input_tokens=100, mean_output_tokens=200)
    )
    rate = (whole.output_tokens - ramp.output_tokens) / (whole.wall_seconds - ramp.wall_seconds)
    assert whole.tpot_seconds.p50 is not None
    assert rate * whole.tpot_seconds.p50 == pytest.approx(32, rel=0.03)
    assert rate > whole.output_tokens / whole.wall_seconds  # the ends are not full


def test_a_saturated_row_costs_what_it_adds_to_its_ramp() -> None:
    whole, ramp = steady_state("s", batch=4, mean_input_tokens=50, mean_output_tokens=50)
    options = {"max_batch": 4}
    c = compare(a_row(requests=whole, ramp=ramp, options=options), load_split())
    a, b = (predict(r, gpu="h100", model="llama-3.2-1b", **options) for r in (whole, ramp))
    tokens = a.output_tokens - b.output_tokens
    assert c.joules_per_output_token == pytest.approx((a.energy_joules - b.energy_joules) / tokens)
    assert c.naive_joules["flops_tdp"] == pytest.approx(
        (a.naive["flops_tdp_joules"] - b.naive["flops_tdp_joules"]) / tokens
    )


# -- the split ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fitted"),
    [
        ({}, True),
        ({"stack": "vllm-eager", "phase": "prefill"}, True),
        ({"phase": "trace"}, False),
        ({"gpu": "h200"}, False),
        ({"model_name": "olmoe-1b-7b"}, False),
        ({"model_name": "qwen3-14b"}, False),
        ({"options": {"tensor_parallel": 2}}, True),
        ({"options": {"tensor_parallel": 2}, "model_name": "llama-3.1-8b"}, False),
        ({"options": {"tensor_parallel": 4}}, False),
        ({"options": {"draft_model": "llama-3.2-1b"}, "batch": 32}, True),
        ({"options": {"draft_model": "llama-3.2-1b"}, "batch": 8}, False),
        ({"source": V3}, False),
    ],
)
def test_the_written_split(changes: dict[str, Any], fitted: bool) -> None:
    assert is_fitted(a_row(**changes), load_split()) is fitted


def test_a_split_without_a_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    path.write_text('{"fit": {"sources": ["own"]}}')
    with pytest.raises(EnergyModelError, match=r"split\.json.*gpus"):
        load_split(path)


# -- this project's serving records ---------------------------------------------------


def serving_records(path: Path, monkeypatch: pytest.MonkeyPatch, *, stack: str = "vllm") -> None:
    """What `python -m calibration.serving.run_plan` writes, with its simulated GPU and engine."""
    world = in_world(monkeypatch, World())
    (path.parent / "t.csv").write_text(
        "arrival_seconds,input_tokens,output_tokens\n0,30,5\n0.1,40,6\n0.2,50,7\n"
    )
    cases = (
        Case(input_tokens=7, output_tokens=5, batch=4),
        Case(input_tokens=512, output_tokens=1, batch=2),
        Case(kind="trace", trace="t.csv", arrivals="own"),
        Case(kind="idle", state="context"),
        Case(input_tokens=3, output_tokens=2, batch=13),  # the engine refuses thirteen
    )
    run = EngineRun(
        model="llama-3.2-1b",
        stack=stack,
        budget_seconds=1,
        cases=cases,
        engine={"max_num_seqs": 64},
    )
    plan = Plan(name="p", runs=(run,), folder=path.parent)
    head = {"schema": 1, "plan": "p", "run": 0, "model": run.model, "stack": stack}

    def write(record: dict[str, Any]) -> None:
        append_record(path, {**head, **record})

    settings = {"max_num_batched_tokens": 4096, "max_model_len": 8192, "kv_cache_dtype": "auto"}
    write(
        {
            "kind": "engine",
            "run_plan": asdict(replace(run, cases=())),
            "config": model_config(run.model),
            "settings": {} if stack == "transformers" else settings,
            "identity": {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]},
        }
    )
    run_cases(
        StepEngine(world),
        WorldMeter(world),
        run,
        plan,
        vocab_size=100,
        deadline=1e9,
        write=write,
    )
    write({"kind": "done"})


def test_serving_records_become_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving_records(tmp_path / "a.jsonl", monkeypatch)
    rows, left = read_own(tmp_path)
    batch, prefill, trace = rows
    assert [r.phase for r in rows] == ["batch", "prefill", "trace"]
    assert {r.gpu for r in rows} == {"h100"}
    assert batch.requests.input_tokens.tolist() == [7] * 4
    assert batch.joules_per_output_token == pytest.approx(0.3 * 620 / 20)
    assert batch.seconds_per_output_token == pytest.approx(0.3 / 20)
    assert batch.options == {
        "max_batch": 64,
        "max_step_tokens": 4096,
        "max_model_len": 8192,
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "kv_dtype": None,
        "gpu_memory_utilization": 0.88,  # what `energymodel measure` asks for
    }
    assert prefill.tpot_seconds is None
    assert trace.requests.arrival_seconds.tolist() == [0.0, 0.1, 0.2]
    assert trace.requests.output_tokens.tolist() == [5, 6, 7]
    assert trace.ttft_seconds is not None
    assert replace(batch.model, name="", source="") == replace(
        load_model("llama-3.2-1b"), name="", source=""
    )
    assert [(entry.reason, entry.rows) for entry in left] == [("not measured (error)", 1)]
    split = load_split()
    for row in rows:
        assert compare(row, split).fitted is (row.phase != "trace")


def test_a_steady_state_becomes_a_saturated_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    serving_records(path, monkeypatch)
    engine = path.read_text().splitlines()[0]
    steady = {
        "kind": "steady",
        **{"plan": "p", "run": 0, "model": "llama-3.2-1b", "stack": "vllm"},
        "case_name": "steady-i4-o40-n4",  # with a limit of 4, graphs hold steps of up to 8 tokens
        "case": {"kind": "steady", "batch": 4},
        "window": {"valid": True, "invalid_reason": ""},
        "sequences": 4,
        "mean_sequences": 3.9,
        "joules_per_output_token": 0.2,
        "seconds_per_output_token": 0.001,
        "step_gap_seconds": None,
        "ttft_seconds": None,
        "tpot_seconds": {"p50": 0.004},
        "requests": {
            "before_window": 6,
            "input_tokens": [4] * 20,
            "output_tokens": [10, 20, 30] + [40] * 17,
        },
    }
    path.write_text(f"{engine}\n{json.dumps(steady)}\n")
    (row,), _ = read_own(tmp_path)
    assert (row.phase, row.batch, row.mean_batch) == ("saturated", 4, 3.9)
    assert row.options["max_batch"] == 4
    assert row.ramp is not None
    tokens = row.requests.output_tokens.sum() - row.ramp.output_tokens.sum()
    assert tokens == 14 * 40  # what was started in the window
    compared = compare(row, load_split())
    assert not compared.fitted
    alone = replace(row, requests=offline("x", [4] * 4, 40), ramp=None)
    batch = compare(alone, load_split())  # the steady state is a batch that never drains
    assert compared.seconds_per_output_token == pytest.approx(
        batch.seconds_per_output_token, rel=0.25
    )


def test_rows_of_a_disturbed_host_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    serving_records(path, monkeypatch)
    rows, _ = read_own(tmp_path)
    assert not any(r.unsteady for r in rows)
    edited(path, "run", decode_step_seconds={"p10": 0.02, "p50": 0.08, "p90": 0.09})
    rows, _ = read_own(tmp_path)
    assert [r.unsteady for r in rows] == [True, True, False]  # a trace's steps differ anyway
    assert "(unsteady)" in markdown(a_validation(replace(a_comparison(2.0), row=rows[0])))


def test_static_batches_take_their_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving_records(tmp_path / "a.jsonl", monkeypatch, stack="transformers")
    rows, _ = read_own(tmp_path)
    assert rows[0].options == {"max_batch": 4}
    assert compare(rows[0], load_split()).seconds_per_output_token > 0


def test_compressed_records_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving_records(tmp_path / "a.jsonl", monkeypatch)
    plain, _ = read_own(tmp_path)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.jsonl").unlink()
    packed, _ = read_own(tmp_path)
    assert [r.joules_per_output_token for r in packed] == [r.joules_per_output_token for r in plain]


def test_a_line_cut_off_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    serving_records(path, monkeypatch)
    with path.open("a") as file:
        file.write('{"kind": "run", "joules')
    rows, left = read_own(tmp_path)
    assert len(rows) == 3
    assert "line cut off (the run was killed)" in [entry.reason for entry in left]


def edited(path: Path, kind: str, **changes: Any) -> None:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["kind"] == kind:
            record.update(changes)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_runs_with_drafts_and_with_top_p_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    serving_records(path, monkeypatch)
    drafting = {"method": "draft_model", "model": "llama-3.2-1b", "num_speculative_tokens": 4}
    rates = [0.8, 0.6, 0.4, 0.2]  # of all drafts up to each: three tokens a round
    settings = {"method": "draft_model", "draft_tokens": 4, "acceptance_rates": rates}
    edited(
        path,
        "engine",
        run_plan={"engine": {"speculative_config": drafting}},
        settings={"max_num_batched_tokens": 4096, "speculative_config": settings},
    )
    case = {"kind": "static", "input_tokens": 7, "output_tokens": 5, "batch": 4, "top_p": 0.9}
    edited(path, "run", case=case)
    rows, _ = read_own(tmp_path)
    options = rows[0].options
    assert (options["draft_model"].name, options["draft_tokens"]) == ("llama-3.2-1b", 4)
    assert expected_tokens(options["acceptance"], 4) == pytest.approx(3.0)
    assert options["decoding"] == "sampling"
    compared = compare(rows[0], load_split())
    assert compared.joules_per_output_token > 0.0


@pytest.mark.parametrize("stack", STATIC_STACKS)
def test_static_stacks_serve_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: str
) -> None:
    serving_records(tmp_path / "a.jsonl", monkeypatch, stack=stack)
    rows, _ = read_own(tmp_path)
    assert rows[0].options == {"max_batch": 4}
    assert is_fitted(rows[0], load_split())


def test_windows_that_are_not_valid_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    serving_records(path, monkeypatch)
    edited(path, "run", window={"valid": False, "invalid_reason": "another process"})
    rows, left = read_own(tmp_path)
    assert rows == []
    assert ("window not valid: another process", 3) in [(e.reason, e.rows) for e in left]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run_plan": {"engine": {"speculative_config": {}}}}, "speculative_config"),
        ({"settings": {"prefix_caching": True}}, "prefix caching"),
        ({"run_plan": {"engine": {"quantization": "int3"}}}, "quantised .* not modelled: int3"),
    ],
)
def test_runs_with_what_the_model_lacks_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    serving_records(path, monkeypatch)
    edited(path, "engine", **changes)
    rows, left = read_own(tmp_path)
    assert rows == []
    assert any(re.search(reason, entry.reason) and entry.rows == 3 for entry in left)


def test_a_run_that_its_engine_quantised_is_predicted_with_those_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    serving_records(path, monkeypatch)
    edited(path, "engine", run_plan={"engine": {"quantization": "fp8"}})
    rows, _ = read_own(tmp_path)
    assert {row.options["dtype"] for row in rows} == {"fp8"}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("engine", {"run": 5}, "without the record of its engine"),
        ("engine", {"identity": {"gpus": [{"name": "Toaster 9"}]}}, "Toaster 9"),
        ("engine", {"settings": {"kv_cache_dtype": "int3"}}, "int3"),
        ("run", {"window": None}, "not a serving record"),
    ],
)
def test_records_that_make_no_sense_name_file_and_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    path = tmp_path / "a.jsonl"
    serving_records(path, monkeypatch)
    edited(path, kind, **changes)
    with pytest.raises(EnergyModelError, match=rf"a\.jsonl, line 2: .*{message}"):
        read_own(tmp_path)


# -- recorded levels ------------------------------------------------------------------


def test_errors_may_not_grow_past_their_level(tmp_path: Path) -> None:
    path = tmp_path / "levels.json"
    then = a_validation(a_comparison(2.1), a_comparison(2.2))
    record_levels(then, path)
    levels = load_levels(path)
    assert check_levels(then, levels) == ([], [])
    failures, _ = check_levels(a_validation(a_comparison(2.1), a_comparison(2.3)), levels)
    assert len(failures) == 2  # median and p90
    assert "joules_median_abs is 10.0%, 7.5% recorded" in failures[0]
    failures, _ = check_levels(a_validation(a_comparison(2.1)), levels)
    assert failures == ["own, h100, vllm, held out: 1 rows, 2 recorded"]


def test_sources_that_are_not_there_are_noticed_not_failed(tmp_path: Path) -> None:
    path = tmp_path / "levels.json"
    record_levels(a_validation(a_comparison(2.1), a_comparison(2.1, source=V3)), path)
    failures, notices = check_levels(a_validation(a_comparison(2.1)), load_levels(path))
    assert failures == []
    assert notices == [
        "ML.ENERGY v3, h100, vllm, held out: not checked, its measurements are not there"
    ]
    failures, _ = check_levels(a_validation(a_comparison(2.1, stack="x")), load_levels(path))
    assert failures == ["own, h100, vllm, held out: no rows, 1 recorded"]


def test_recording_keeps_the_levels_of_what_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "levels.json"
    record_levels(a_validation(a_comparison(2.1, source=V3)), path)
    record_levels(a_validation(a_comparison(2.1)), path)
    assert len(load_levels(path)) == 2


def test_broken_levels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text("[1]")
    with pytest.raises(EnergyModelError, match=r"l\.json"):
        load_levels(tmp_path / "l.json")
    with pytest.raises(EnergyModelError, match="--record"):
        load_levels(tmp_path / "none.json")


def test_committed_runs_stay_within_their_recorded_error() -> None:
    if not OWN_RUNS.is_dir() or not LEVELS_FILE.exists():
        pytest.skip(f"no serving runs are committed yet ({OWN_RUNS})")
    failures, _ = check_levels(validate(public=None), load_levels())
    assert failures == []


# -- aims -----------------------------------------------------------------------------


def test_aims_count_held_out_rows_alone() -> None:
    good, bad = a_comparison(2.02), replace(a_comparison(9.0), fitted=True)
    replay = a_comparison(2.2, phase="trace", ttft_seconds=0.1)
    found = {(s.aim.rows, s.aim.statistic): s for s in standings(a_validation(good, bad, replay))}
    batches = found["own batches, vLLM with CUDA graphs", "joules, median |e|"]
    assert (batches.rows, batches.met) == (1, True)
    assert batches.value == pytest.approx(0.01)
    traces = found["own trace replays", "joules, max |e|"]
    assert (traces.rows, traces.met) == (1, False)
    assert found["own trace replays", "TTFT p50, max |e|"].met is True
    nothing = found["own runs, tensor parallel", "joules, median |e|"]
    assert (nothing.value, nothing.met) == (None, None)
    coverage = found["own runs", "measured energy in the 90 % interval"]
    assert (coverage.value, coverage.met) == (1.0, False)  # too wide is not met either


# -- report and command ---------------------------------------------------------------


def test_the_report_shows_every_row_and_both_splits(tmp_path: Path) -> None:
    validation = a_validation(
        a_comparison(2.1), replace(a_comparison(2.4, name="other"), fitted=True)
    )
    page = markdown(validation, ["## More"])
    for text in ("## Rows held out", "## Rows open to fits", "| other (fit) |", "## More", "+20.0"):
        assert text in page
    assert "1 cases were measured" not in page
    twice = markdown(a_validation(a_comparison(2.1), a_comparison(2.1, measured=2.1)))
    assert "1 cases were measured more than once" in twice
    assert "- joules: median 5.0 %" in twice
    plot(validation, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads(json.dumps(to_dict(validation), allow_nan=False))["rows"]
    assert [r["split"] for r in rows] == ["held_out", "fit"]
    assert "own, h100, vllm" in terminal_text(validation, color=False)


def test_the_command_as_a_user_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving_records(tmp_path / "a.jsonl", monkeypatch)
    runner, report = CliRunner(), tmp_path / "report"
    arguments = ["validate", "--own", str(tmp_path)]
    done = runner.invoke(app, [*arguments, "--report", str(report)])
    assert done.exit_code == 0, done.output
    assert "own, h100, vllm" in done.output
    assert "skipped: public measurements: no folder was given" in done.output
    assert sorted(p.name for p in report.iterdir()) == ["validation.md", "validation.png"]
    as_json = runner.invoke(app, [*arguments, "--format", "json"])
    assert len(json.loads(as_json.stdout)["rows"]) == 3


def test_a_failed_check_exits_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = tmp_path / "levels.json"
    levels.write_text('{"own, h100, vllm, held out": {"rows": 1, "joules_median_abs": 0.0001}}')
    monkeypatch.setattr("calibration.validation.validate.LEVELS_FILE", levels)
    monkeypatch.setattr("calibration.validation.validate.load_levels.__defaults__", (levels,))
    serving_records(tmp_path / "a.jsonl", monkeypatch)
    done = CliRunner().invoke(app, ["validate", "--own", str(tmp_path), "--check"])
    assert done.exit_code == 1
    assert "worse than recorded: own, h100, vllm, held out: joules_median_abs" in done.output


def test_nothing_to_compare_with_exits_2(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["validate", "--own", str(tmp_path)])
    assert done.exit_code == 2
    assert "nothing to validate with" in done.output
    for option in ("--own", "--public"):
        done = CliRunner().invoke(app, ["validate", option, str(tmp_path / "none")])
        assert done.exit_code == 2
        assert f"{option} {tmp_path / 'none'}: is no folder" in done.output
    assert CliRunner().invoke(app, ["validate", "--format", "csv"]).exit_code == 2


# -- public rows ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def public_rows() -> dict[tuple[str, str, str], MeasuredRow]:
    rows, _ = read_public(SHARED)
    return {(r.source, r.gpu, r.name): r for r in rows}


@needs_public
def test_public_rows_are_read_in_si_units(
    public_rows: dict[tuple[str, str, str], MeasuredRow],
) -> None:
    row = public_rows[V3, "h100", "llama-3.1-8b tp1 b64"]
    assert row.joules_per_output_token == pytest.approx(0.11858, rel=1e-4)
    assert 1 / row.seconds_per_output_token == pytest.approx(5147.2, rel=1e-4)
    row = public_rows[V3, "h100", "qwen3-32b tp2 b64"]
    assert row.joules_per_output_token == pytest.approx(0.3671)
    row = public_rows[V2, "h100", "llama-3.1-8b tp1 b64"]
    assert row.joules_per_output_token == pytest.approx(0.1711)
    row = public_rows[SPLITWISE, "a100", "llama-2-70b tp2 i512 o128 b1"]
    assert row.seconds_per_output_token * 128 == pytest.approx(7.165, rel=1e-3)
    watts = row.joules_per_output_token / row.seconds_per_output_token  # type: ignore[operator]
    assert watts == pytest.approx(0.736 * 400 * 2, rel=1e-3)
    row = public_rows[ENERGAIZER, "h100", "opt-1.3b i128 b16"]
    assert row.joules_per_output_token * 16 == pytest.approx(9.009, rel=1e-3)  # type: ignore[operator]


@needs_public
def test_rows_that_cannot_be_used_are_counted_with_a_reason() -> None:
    rows, left = read_public(SHARED)
    by_source: dict[str, int] = {}
    for entry in left:
        by_source[entry.source] = by_source.get(entry.source, 0) + entry.rows
    usable = {s: sum(r.source == s for r in rows) for s in (V3, V2, SPLITWISE, ENERGAIZER)}
    assert usable[V3] + by_source[V3] == 23 + 41  # CSV, and Qwen3 in table A1
    assert usable[V2] + by_source[V2] == 190 + 16
    assert usable[ENERGAIZER] + by_source[ENERGAIZER] == 133 + 56
    assert not any(r.gpu == "h100" and r.joules_per_output_token for r in rows
                   if r.source == SPLITWISE)  # fmt: skip


@needs_public
def test_public_rows_are_held_out_but_for_the_power_of_two_a100s(
    public_rows: dict[tuple[str, str, str], MeasuredRow],
) -> None:
    split = load_split()
    fitted = {row.name: row for row in public_rows.values() if is_fitted(row, split)}
    assert all("llama-2-70b tp2 " in name for name in fitted)
    assert {(r.source, r.gpu, r.tensor_parallel) for r in fitted.values()} == {
        (SPLITWISE, "a100", 2)
    }


@needs_public
def test_the_a100_s_joules_per_byte_are_those_of_the_published_power(
    public_rows: dict[tuple[str, str, str], MeasuredRow],
) -> None:
    rows = [r for r in public_rows.values() if is_power_fitted(r, load_split())]
    runs = runs_of([r for r in rows if r.joules_per_output_token])
    assert bytes_factor(runs, load_calibration("a100")) == pytest.approx(1.0, abs=0.02)


@needs_public
def test_published_batches_imply_prompts_of_a_few_hundred_tokens(
    public_rows: dict[tuple[str, str, str], MeasuredRow],
) -> None:
    full = [replace(a_comparison(1.0), row=r) for r in public_rows.values() if r.source == V3]
    implied = [tokens for _, tokens in implied_input_tokens(a_validation(*full))]
    assert len(implied) == 4
    assert np.median(implied) == pytest.approx(345, abs=60)


def test_what_a_saturated_step_holds_beside_the_operators() -> None:
    assert saturated_sections(a_validation(a_comparison(2.0))) == []
    whole, ramp = steady_state("s", batch=32, mean_input_tokens=50, mean_output_tokens=50)
    c = a_comparison(
        2.0, source=V3, batch=32, requests=whole, ramp=ramp, seconds_per_output_token=0.02005
    )
    lengths, drawing = saturated_sections(a_validation(c))
    assert "| 600 |" in lengths
    assert "| llama-3.2-1b | 1 | 128256 | 50 | - | - | - |" in drawing


@needs_public
def test_a_step_put_together_from_public_kernels() -> None:
    model = load_model("llama-3.1-8b")
    decode, source = kernel_seconds(SHARED, "h100", model, tokens=1, context=256)
    assert decode == pytest.approx(5.83e-3, rel=0.01)
    assert "aiconfigurator" in source
    prefill, _ = kernel_seconds(SHARED, "a100", model, tokens=2048, context=2048)
    assert prefill == pytest.approx(0.1156, rel=0.01)


def test_physics_checks_stand_without_public_figures(tmp_path: Path) -> None:
    checks = physics_checks(a_validation(), tmp_path)
    assert physics_checks(a_validation(), None) == checks
    by_case = {(c.case, c.quantity): c for c in checks}
    decode = by_case["llama-3.1-8b, decode, batch 1, h100", "J per token"]
    assert decode.public is None
    floors = [c for c in checks if c.source.startswith("floor")]
    assert len(floors) == 2
    for floor in floors:
        assert floor.public is not None and floor.predicted > floor.public
    ratios = [c for c in checks if c.quantity == "ratio of seconds"]
    assert all(0.25 < c.predicted < 1.0 for c in ratios)


def test_ratios_of_measured_rows_need_both(tmp_path: Path) -> None:
    moe = a_comparison(4.2, measured=4.0, name="olmoe-1b-7b i128 o128 b8")
    dense = a_comparison(2.0, measured=1.0, name="olmo-1b i128 o128 b8")
    case = "olmoe-1b-7b i128 o128 b8 against olmo-1b i128 o128 b8, h100"
    (check,) = (
        c
        for c in physics_checks(a_validation(moe, dense), tmp_path)
        if (c.case, c.quantity) == (case, "ratio of joules")
    )
    assert (check.predicted, check.public) == (pytest.approx(2.1), pytest.approx(4.0))
    assert not any(c.case == case for c in physics_checks(a_validation(moe), tmp_path))


def test_a_folder_without_the_public_files_names_the_first(tmp_path: Path) -> None:
    with pytest.raises(EnergyModelError, match=r"v3_h100_llama31_chat\.csv: cannot be read"):
        read_public(tmp_path)


def test_a_public_file_without_a_column_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "validation" / "mlenergy"
    folder.mkdir(parents=True)
    (folder / "v3_h100_llama31_chat.csv").write_text("gpu_model\nH100\n")
    with pytest.raises(EnergyModelError, match=r"v3_h100_llama31_chat\.csv: a column is missing"):
        read_public(tmp_path)

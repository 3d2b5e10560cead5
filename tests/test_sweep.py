"""Sweeps: estimates against the exact simulation, the front, faults on the way, and the command."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from energymodel import sweep_run
from energymodel.cli import app
from energymodel.errors import ConfigurationError
from energymodel.fleet import Fleet
from energymodel.journal import SweepError
from energymodel.pareto import Targets, compare, pareto_front, ranking
from energymodel.prices import load_prices
from energymodel.replicas import serve_on_replicas
from energymodel.settings import Setting, grid_of
from energymodel.steady_state import estimate, summarise
from energymodel.sweep import Workload, deployment_of, evaluate
from energymodel.sweep_run import points_journal, run_sweep
from energymodel.traces import Requests, read_batches, read_trace
from energymodel.workloads import load_requests

COMMAND = [sys.executable, "-m", "energymodel"]


def workload(requests: Requests) -> Workload:
    return Workload(
        binned=summarise(requests),
        requests=requests,
        output_tokens=int(requests.output_tokens.sum()),
        prices=load_prices(),
    )


@pytest.fixture(scope="module")
def conv() -> Workload:
    return workload(load_requests("azure_conv", num_requests=4000))


def deployed(**axes: object):
    setting = Setting(gpu="a100", **axes)  # type: ignore[arg-type]
    return deployment_of(setting, workload(load_requests("azure_conv", num_requests=1)))


# --- the estimate


@pytest.mark.parametrize("name", ["azure_conv", "azure_code"])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_estimate_is_near_the_exact_energy(name: str, replicas: int) -> None:
    requests = load_requests(name)
    deployment = deployed()
    exact, _ = serve_on_replicas(requests, replicas, deployment)
    found = estimate(summarise(requests), deployment, replicas)
    joules = exact.prefill_joules + exact.decode_joules + exact.idle_joules
    assert found.active_joules + found.idle_joules == pytest.approx(joules, rel=0.1)
    ttft = np.median(exact.first_token_seconds - requests.arrival_seconds)
    if name == "azure_conv":
        assert found.ttft_seconds["p50"] == pytest.approx(ttft, rel=0.3)


def test_pieces_are_summarised_as_the_whole(tmp_path: Path) -> None:
    requests = load_requests("azure_code")
    path = tmp_path / "trace.csv"
    pl.DataFrame(
        {
            "arrival_seconds": requests.arrival_seconds,
            "input_tokens": requests.input_tokens,
            "output_tokens": requests.output_tokens,
        }
    ).write_csv(path)
    pieces = list(read_batches(str(path), rows=1000))
    assert len(pieces) > 3
    whole, parts = summarise(read_trace(str(path))), summarise(pieces)
    np.testing.assert_allclose(parts.requests, whole.requests)
    np.testing.assert_allclose(parts.context_tokens, whole.context_tokens)
    np.testing.assert_allclose(parts.input_lengths, whole.input_lengths)
    assert parts.duration_seconds == whole.duration_seconds
    # a second that straddles two pieces counts twice in the variance, no more
    assert parts.dispersion == pytest.approx(whole.dispersion, rel=0.05)


def test_more_load_takes_more_energy_and_a_backlog_waits() -> None:
    trace = summarise(load_requests("azure_conv"))
    deployment = deployed()
    joules = [
        estimate(trace, deployment, 2, arrival_scale=scale).active_joules for scale in (0.5, 1.0)
    ]
    assert joules[0] > joules[1]  # the same requests, batched less
    crowded = estimate(trace, deployment, 1, arrival_scale=20.0)
    assert crowded.waiting_seconds > 100.0
    assert crowded.ttft_seconds["p99"] > 100.0
    assert crowded.wall_seconds > trace.duration_seconds / 20.0


# --- a fleet fed in pieces


@pytest.mark.parametrize(("replicas", "threads"), [(1, 1), (3, 1), (5, 2)])
def test_a_fleet_fed_in_pieces_equals_the_whole(replicas: int, threads: int) -> None:
    requests = load_requests("azure_code")
    deployment = deployed(max_batch=32)
    whole, _ = serve_on_replicas(requests, replicas, deployment)
    fleet = Fleet(deployment, replicas, threads=threads)
    for start in range(0, requests.rows_read, 777):
        part = slice(start, start + 777)
        fleet.serve(
            requests.arrival_seconds[part],
            requests.input_tokens[part],
            requests.output_tokens[part],
        )
    served = fleet.finish()
    assert served.steps == whole.steps
    assert served.wall_seconds == pytest.approx(whole.wall_seconds, rel=1e-12)
    assert served.prefill_joules == pytest.approx(whole.prefill_joules, rel=1e-9)
    assert served.idle_joules == pytest.approx(whole.idle_joules, rel=1e-9)
    assert served.bin_active_joules.sum() == pytest.approx(served.active_joules, rel=1e-9)
    assert served.bin_requests.sum() == requests.rows_read == served.requests
    ttft = np.percentile(whole.first_token_seconds - requests.arrival_seconds, 90)
    assert served.ttft.percentile(90) == pytest.approx(ttft, rel=0.02)


def test_a_trace_too_long_to_hold_is_simulated_piece_by_piece(
    small: Workload, tmp_path: Path
) -> None:
    assert small.requests is not None
    path = tmp_path / "trace.csv"
    names = ("arrival_seconds", "input_tokens", "output_tokens")
    pl.DataFrame({name: getattr(small.requests, name) for name in names}).write_csv(path)
    long = replace(small, requests=None, path=str(path))
    for scale in (1.0, 2.0):
        setting = Setting(gpu="a100", replicas=2, arrival_scale=scale)
        held, streamed = (evaluate(setting, one, "exact") for one in (small, long))
        assert streamed.energy_joules == pytest.approx(held.energy_joules, rel=1e-9)
        assert streamed.ttft_seconds["p90"] == pytest.approx(held.ttft_seconds["p90"], rel=0.05)
    assert "held at once" in evaluate(Setting(gpu="a100", prefix_hit=0.5), long, "exact").reason


# --- the front, the ranking, the comparison


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=30))
def test_the_front_is_what_nobody_beats(rows: list[tuple[int, ...]]) -> None:
    values = np.array(rows, float)
    front = pareto_front(values)
    for i, row in enumerate(values):
        beaten = any((other <= row).all() and (other < row).any() for other in values)
        assert front[i] == (not beaten)


def test_unknown_values_are_never_on_the_front() -> None:
    assert pareto_front(np.array([[1.0, np.nan], [2.0, 2.0]])).tolist() == [False, True]


def test_ranking_by_energy_and_cost(conv: Workload) -> None:
    settings = grid_of({"gpu": ["a100", "h100", "l4"], "replicas": [2, 4]})
    points = [evaluate(setting, conv, "exact") for setting in settings]
    by_energy = ranking(points, "energy", Targets())
    joules = [points[i].energy_joules for i in by_energy]
    assert joules == sorted(joules)
    by_cost = ranking(points, "cost", Targets())
    assert all(points[i].usd is not None for i in by_cost)
    tight = ranking(points, "energy", Targets(tpot_seconds=0.009))
    assert tight
    assert all(points[i].setting.gpu == "h100" for i in tight)
    with pytest.raises(ConfigurationError, match="--grid"):
        ranking(points, "carbon", Targets())


def test_the_comparison_adds_up(conv: Workload) -> None:
    first, second = (
        evaluate(Setting(gpu="a100", replicas=count), conv, "exact") for count in (2, 4)
    )
    found = compare(first, second, conv.binned.total_requests)
    for side, point in enumerate((first, second)):
        total = sum(pair[side] for pair in found.by_component.values())
        assert total == pytest.approx(point.joules_per_request, rel=1e-9)
    assert found.sentence.startswith("The first takes")
    assert "idle" in found.sentence or "base" in found.sentence
    assert "same energy" in compare(first, first, 10).sentence


def test_settings_that_make_no_sense_become_points_with_the_reason(conv: Workload) -> None:
    for setting, reason in (
        (Setting(gpu="a100", model="llama-3.1-70b"), "GPUs"),
        (Setting(gpu="h100", power_limit_watts=10.0), "power-limit"),
        (Setting(gpu="h100", power_limit_watts=9999.0), "power-limit"),
        (Setting(gpu="h100", replicas=0), "replicas"),
        (Setting(gpu="h100", gpu_memory_utilization=1.5), "gpu-memory-utilization"),
        (Setting(gpu="nonsuch"), "nonsuch"),
        (Setting(gpu="h100", pue=0.5), "pue"),
        (Setting(gpu="h100", tensor_parallel=3), "tensor-parallel"),
        (Setting(gpu="a100", replicas=1, max_batch=2), "keep up"),
    ):
        for mode in ("binned", "exact"):
            point = evaluate(setting, conv, mode)
            assert not point.served
            assert reason in point.reason
            assert point.energy_joules is None


def test_a_power_limit_slows_and_saves_where_it_binds(conv: Workload) -> None:
    free = evaluate(Setting(gpu="h100", replicas=1), conv, "exact")
    capped = evaluate(Setting(gpu="h100", replicas=1, power_limit_watts=250.0), conv, "exact")
    assert capped.ttft_seconds["p99"] > free.ttft_seconds["p99"]
    assert capped.tpot_seconds["p90"] > free.tpot_seconds["p90"]


def test_static_batches_are_simulated_even_in_binned_mode() -> None:
    small = workload(load_requests("azure_conv", num_requests=50))
    point = evaluate(Setting(gpu="h100", stack="transformers", replicas=2), small, "binned")
    assert point.served
    assert point.mode == "exact"


def test_grids_span_all_combinations_and_refuse_faults() -> None:
    settings = grid_of({"max_batch": [1, 2], "gpu": ["a100", "h100"]})
    assert len(settings) == len(set(settings)) == 4
    assert [s.gpu for s in settings] == ["a100", "a100", "h100", "h100"]
    for axes in ({"gpu": []}, {"max_batch": [1]}, {"gpu": ["a100"], "color": [1]}):
        with pytest.raises(ConfigurationError):
            grid_of(axes)
    with pytest.raises(ConfigurationError, match="twice"):
        grid_of({"gpu": ["a100", "a100"]})


# --- runs, and what goes wrong on the way


SETTINGS = grid_of({"gpu": ["a100", "h100"], "max_batch": [8, 64], "replicas": [2, 4]})


def test_processes_and_one_thread_give_the_same_in_order(conv: Workload) -> None:
    alone = run_sweep(SETTINGS, conv, mode="binned", backend="sequential")
    together = run_sweep(SETTINGS, conv, mode="binned", backend="loky", jobs=2)
    assert together == alone
    assert [p.setting for p in alone] == SETTINGS


def test_a_sweep_goes_on_where_it_was_interrupted(conv: Workload, tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    done = []

    def interrupt(point: object) -> None:
        done.append(point)
        if len(done) == 3:
            raise KeyboardInterrupt

    journal = points_journal(path, conv)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(
            SETTINGS, conv, mode="exact", backend="sequential", journal=journal, report=interrupt
        )
    journal.close()
    with path.open("a") as file:
        file.write('{"setting": {"gpu": "a1')  # the line that was being written
    again = points_journal(path, conv)
    assert len(again.kept) == 3
    fresh: list[object] = []
    points = run_sweep(SETTINGS, conv, mode="exact", backend="sequential", journal=again)
    again.close()
    assert points == run_sweep(
        SETTINGS, conv, mode="exact", backend="sequential", report=fresh.append
    )
    assert len(fresh) == len(SETTINGS)
    last = points_journal(path, conv)
    assert len(last.kept) == len(SETTINGS)
    last.close(delete=True)
    assert not path.exists()


def test_a_journal_of_another_trace_is_refused(conv: Workload, tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    points_journal(path, conv).close()
    other = replace(conv, prices={"a100": 1.0})
    with pytest.raises(SweepError, match="another trace"):
        points_journal(path, other)
    path.write_text("not a journal\n")
    with pytest.raises(SweepError, match="another"):
        points_journal(path, conv)


def _die_once(marker: Path, task: tuple[list[Setting], str], trace: Workload) -> list[object]:
    settings, mode = task
    if settings[0].gpu == "h100" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [evaluate(setting, trace, mode) for setting in settings]


def _die_always(task: object, trace: Workload) -> list[object]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


@pytest.fixture
def small() -> Workload:
    return workload(load_requests("azure_code", num_requests=300))


@pytest.mark.filterwarnings("ignore")
def test_a_killed_process_loses_nothing(
    small: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_run, "_evaluate_chunk", partial(_die_once, tmp_path / "died"))
    points = run_sweep(SETTINGS, small, mode="exact", backend="loky", jobs=2)
    assert (tmp_path / "died").exists()
    assert points == [evaluate(setting, small, "exact") for setting in SETTINGS]


@pytest.mark.filterwarnings("ignore")
def test_processes_that_keep_dying_end_the_sweep(
    small: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_run, "_evaluate_chunk", _die_always)
    with pytest.raises(SweepError, match="died 3 times"):
        run_sweep(SETTINGS, small, mode="exact", backend="loky", jobs=2)


@pytest.mark.filterwarnings("ignore")
def test_a_killed_dask_worker_loses_nothing(
    small: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed", reason="needs energymodel[dask]")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        monkeypatch.setattr(sweep_run, "_evaluate_chunk", partial(_die_once, tmp_path / "died"))
        points = run_sweep(
            SETTINGS, small, mode="exact", backend="dask", scheduler=cluster.scheduler_address
        )
    assert (tmp_path / "died").exists()
    assert points == [evaluate(setting, small, "exact") for setting in SETTINGS]


def test_tasks_whose_data_a_dead_dask_worker_held_are_done_again(
    small: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = pytest.importorskip("distributed.client", reason="needs energymodel[dask]")
    evaluated, original, lost = [], sweep_run._evaluate_chunk, [True]

    def evaluate_chunk(task: object, workload: Workload) -> object:
        if lost.pop() if lost else False:
            raise client.FutureCancelledError(key="batch", reason="unknown")
        evaluated.append(task)
        return original(task, workload)

    monkeypatch.setattr(sweep_run, "_evaluate_chunk", evaluate_chunk)
    points = run_sweep(SETTINGS, small, mode="exact", backend="sequential")
    assert not lost
    assert evaluated
    assert points == [evaluate(setting, small, "exact") for setting in SETTINGS]


def test_an_unreachable_scheduler_is_named(
    small: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed", reason="needs energymodel[dask]")
    monkeypatch.setattr(sweep_run, "_CONNECT_SECONDS", 1)
    with pytest.raises(SweepError, match=r"tcp://127.0.0.1:9.*no Dask scheduler"):
        run_sweep(SETTINGS, small, mode="binned", backend="dask", scheduler="tcp://127.0.0.1:9")


# --- the command


def run_command(*options: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*COMMAND, "whatif", *options], capture_output=True, text=True, check=False, **kwargs
    )


BASIC = ("--trace", "azure_code", "--gpu", "a100,h100", "--max-batch", "16,256")


def test_the_command_ranks_confirms_and_compares() -> None:
    result = run_command(*BASIC, "--replicas", "2,4", "--confirm", "2", "--compare", "1,8")
    assert result.returncode == 0, result.stderr
    assert "8 settings" in result.stdout
    assert "best of 8 by energy" in result.stdout
    assert "~" in result.stdout
    assert "Joules a request" in result.stdout
    assert "takes" in result.stdout


@pytest.mark.parametrize("form", ["json", "csv", "parquet"])
def test_the_command_writes_for_programs(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"points.{form}"
    options = ("--mode", "exact", "--grid", "france,world", "--format", form, "--output")
    result = CliRunner().invoke(
        app, ["whatif", *BASIC, "--backend", "sequential", *options, str(path)]
    )
    assert result.exit_code == 0, result.output
    assert not list(tmp_path.glob("*.points.jsonl"))
    if form == "json":
        found = json.loads(path.read_text())
        assert len(found["points"]) == 8
        assert found["best"][0] in found["front"]
        points = found["points"]
        assert {p["mode"] for p in points} == {"exact"}
        return
    table = pl.read_csv(path) if form == "csv" else pl.read_parquet(path)
    assert table.height == 8
    assert table["energy_joules"].min() > 0
    assert (table["energy_joules_low"] < table["energy_joules"]).all()
    assert table["carbon_grams"].null_count() == 0
    assert table["number"].to_list() == list(range(1, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "a100,"), "empty value"),
        (("--gpu", "a100", "--gpu-memory-utilization", "0.9,1.5"), "1.5: must be from 0 to 1"),
        (("--gpu", "a100", "--max-batch", "1,x"), "no number"),
        (("--gpu", "a100", "--mode", "fast"), "unknown mode"),
        (("--gpu", "a100,nonsuch"), "nonsuch"),
        (("--gpu", "a100", "--model", "nonsuch"), "nonsuch"),
        (("--gpu", "a100", "--stack", "vlm"), "Did you mean vllm"),
        (("--gpu", "a100", "--dtype", "bf17"), "unknown dtype"),
        (("--gpu", "a100", "--grid", "nowhere"), "unknown grid"),
        (("--gpu", "a100", "--objective", "speed"), "unknown objective"),
        (("--gpu", "a100", "--ttft", "-1"), "above 0 s"),
        (("--gpu", "a100", "--percentile", "p95"), "unknown percentile"),
        (("--gpu", "a100", "--compare", "1,9"), "two numbers"),
        (("--gpu", "a100", "--price", "a100"), "GPU=USD"),
        (("--gpu", "a100", "--price", "a100=-1"), "no price"),
        (("--gpu", "a100", "--backend", "mpi"), "unknown backend"),
        (("--gpu", "a100", "--backend", "threading", "--scheduler", "x:1"), "--backend dask"),
        (("--gpu", "a100", "--format", "parquet"), "--output"),
        (("--gpu", "a100", "--objective", "carbon"), "--grid"),
        (("--gpu", "a100", "--output", "/nowhere/x.csv"), "does not exist"),
        (("--gpu", "a100", "--jobs", "0"), "at least 1"),
        (("--gpu", "a100", "--max-batch", "64,0"), "--max-batch 0: must be at least 1"),
        (("--gpu", "a100", "--replicas", "0"), "at least 1"),
        (("--gpu", "a100", "--arrival-scale", "nan"), "--arrival-scale nan"),
        (("--gpu", "a100", "--arrival-scale", "1e9"), "to 10000"),
        (("--gpu", "a100", "--power-limit", "-1"), "--power-limit -1"),
        (("--gpu", "a100", "--pue", "0.1"), "from 1 to 10"),
    ],
)
def test_bad_options_are_refused_with_one_message(options: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(
        app, ["whatif", "--trace", "azure_code", "--backend", "sequential", *options]
    )
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_short_trace_is_simulated(tmp_path: Path) -> None:
    """It has no steady state: in windows of a minute three seconds would cost a minute's idling."""
    path = tmp_path / "short.csv"
    path.write_text("arrival_seconds,input_tokens,output_tokens\n0,1200,150\n3.1,2500,40\n")
    asked = ["whatif", "--trace", str(path), "--gpu", "h100", "--backend", "sequential"]
    result = CliRunner().invoke(app, [*asked, "--confirm", "0", "--format", "json"])
    assert result.exit_code == 0, result.output
    (point,) = json.loads(result.output)["points"]
    assert point["mode"] == "exact"
    whole = CliRunner().invoke(
        app, ["predict", "--trace", str(path), "--gpu", "h100", "--format", "json"]
    )
    joules = json.loads(whole.output)["energy_joules"]
    assert point["energy_joules"] == pytest.approx(joules, rel=1e-9)


def test_an_unknown_price_is_no_missed_target() -> None:
    asked = ("--gpu", "h100,mi300x", "--objective", "cost", "--backend", "sequential")
    result = CliRunner().invoke(app, ["whatif", "--trace", "azure_code", *asked])
    assert result.exit_code == 0, result.output
    assert "1 settings have no known cost; give --price or --grid, e.g. mi300x" in result.output


def test_no_setting_that_fits_is_an_answer() -> None:
    result = CliRunner().invoke(
        app, ["whatif", *BASIC, "--backend", "sequential", "--ttft", "0.001"]
    )
    assert result.exit_code == 0
    assert "No setting of 4" in result.output
    assert "is above 0.001 s" in result.output


def test_a_full_disk_keeps_what_was_done(small: Workload, tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    for mode in ("binned", "exact"):  # compiled loops are cached before the disk is full
        evaluate(Setting(gpu="a100"), small, mode)

    def little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    options = (*BASIC, "--backend", "sequential", "--replicas", "1,2,4,8", "--format", "csv")
    full = run_command(
        *options,
        "--output",
        str(path),
        preexec_fn=little_room,
    )
    assert full.returncode == 2
    assert "cannot be written" in full.stderr
    assert "go on" in full.stderr
    assert not path.exists()
    kept = path.with_name("points.csv.points.jsonl").read_text().splitlines()
    assert len(kept) > 2
    result = run_command(*options, "--output", str(path))
    assert result.returncode == 0, result.stderr
    assert pl.read_csv(path).height == 16


def test_ctrl_c_keeps_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    journal = path.with_name("points.csv.points.jsonl")
    options = ("--trace", "azure_conv", "--gpu", "a100,h100", "--max-batch", "16,32,64,128,256")
    options += ("--mode", "exact", "--replicas", "2,3,4,5,6,7,8", "--backend", "sequential")
    process = subprocess.Popen(
        [*COMMAND, "whatif", *options, "--output", str(path), "--format", "csv"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (
        not journal.exists() or journal.read_text().count("\n") < 3
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "points are kept" in message
    assert "Traceback" not in message
    assert journal.exists()
    assert not path.exists()

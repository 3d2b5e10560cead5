"""`energymodel measure` as a user runs it: plans, a simulated GPU, and a fake server."""

from __future__ import annotations

import json
import sys
import threading
import time
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import FakeNvml
from test_serving import StepEngine, World, WorldMeter, in_world
from typer.testing import CliRunner, Result

from calibration.metering.preflight import check_metered
from calibration.metering.windows import MeterError, read_jsonl
from calibration.serving import cases as serving_cases
from calibration.serving import measure as measure_runs
from calibration.serving import run_plan as serving
from calibration.serving.plan import load_plan
from energymodel.cli import app


def measure(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["measure", *(str(a) for a in arguments)])


def refused(outcome: Result) -> str:
    assert outcome.exit_code == 2, outcome.output
    assert isinstance(outcome.exception, SystemExit), "a traceback"
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    return outcome.stderr


def planned(out: Path, *arguments: object) -> Any:
    outcome = measure(*arguments, "--out", out, "--dry-run")
    assert outcome.exit_code == 0, outcome.output
    return load_plan(out / "plan.json")


# -- options to a plan ----------------------------------------------------------------


def test_static_batches_are_all_combinations(tmp_path: Path) -> None:
    plan = planned(
        tmp_path,
        *("--model", "llama-3.2-1b", "--stack", "vllm-eager", "--gpu", 1),
        *("--batch", "1,8", "--input", "128,2048", "--output", 64, "--engine", "max_num_seqs=64"),
    )
    (run,) = plan.runs
    assert plan.gpu_indices == (1,)
    assert run.stack == "vllm-eager"
    assert run.engine == {"max_num_seqs": 64}
    assert [c.name for c in run.cases] == [
        *("idle-context", "idle-polling"),
        *("static-i128-o64-b1", "static-i2048-o64-b1", "static-i128-o64-b8", "static-i2048-o64-b8"),
    ]


def test_two_gpus_share_a_model_and_are_both_metered(tmp_path: Path) -> None:
    plan = planned(tmp_path, "--model", "llama-3.1-8b", "--batch", 1, "--gpu", 0, "--gpu", 1)
    assert plan.gpu_indices == (0, 1)
    assert plan.runs[0].engine == {"tensor_parallel_size": 2}


def test_a_workload_is_replayed_or_gives_a_steady_state_its_lengths(tmp_path: Path) -> None:
    replay = ("--model", "llama-3.2-1b", "--trace", "azure_code", "--speed", 2, "--first", 50)
    (run,) = planned(tmp_path / "a", *replay).runs
    assert run.cases[-1].name == "trace-azure_code.requests-50-x2"
    (run,) = planned(tmp_path / "b", *replay, "--arrivals", "offline").runs
    assert run.cases[-1].name == "trace-azure_code.requests-50-offline"
    few, many = planned(tmp_path / "c", *replay, "--steady", "8,64").runs
    assert [c.name for c in many.cases] == ["steady-azure_code.requests-n64"]
    assert (few.engine["max_num_seqs"], many.engine["max_num_seqs"]) == (8, 64)


def test_a_folder_with_a_config_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    config = json.loads(Path("profiles/models/llama-3.2-1b.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    (run,) = planned(tmp_path / "out", "--model", folder, "--batch", 1).runs
    assert run.name == "my-model/vllm"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", 1), "with --model"),
        (("--model", "llama-3.2-1b"), "nothing to measure"),
        (("--model", "llama-3.2-1x", "--batch", 1), "Did you mean llama-3.2-1b"),
        (("--model", "llama-3.2-1b", "--batch", 1, "--gpu", 0, "--gpu", 0), "names a GPU twice"),
        (("--model", "llama-3.2-1b", "--batch", "1,x"), "--batch takes whole numbers"),
        (("--model", "llama-3.2-1b", "--batch", 1, "--engine", "x"), "NAME=VALUE"),
        (("--model", "llama-3.2-1b", "--trace", "azure_xx"), "azure_code"),
        (("--model", "llama-3.2-1b", "--trace", "azure_code", "--speed", 0), "--speed"),
        (("--model", "llama-3.2-1b", "--batch", 1, "--tracker", "x"), "unknown tracker 'x'"),
        (
            ("--model", "llama-3.2-1b", "--steady", 8, "--stack", "transformers"),
            "serves one batch at a time",
        ),
        (("--model", "llama-3.2-1b", "--steady", 8, "--url", "http://x"), "with --url"),
        (("--plan", "none.json"), "cannot read the plan"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    assert words in refused(measure(*arguments, "--out", tmp_path / "o"))


# -- a simulated GPU ------------------------------------------------------------------


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    made: dict[str, Any] = {"nvml": FakeNvml(watts=(300.0,))}
    binding = types.ModuleType("pynvml")
    binding.__getattr__ = lambda name: getattr(made["nvml"], name)  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    return made


def test_without_a_gpu_software_or_a_free_gpu_it_says_so(
    nvml: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = ("--model", "llama-3.2-1b", "--batch", 1, "--out", tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'energymodel[calibrate]'" in refused(measure(*some))
    torch = types.ModuleType("torch")
    torch.__spec__ = ModuleSpec("torch", None)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert "pip install 'energymodel[vllm]'" in refused(measure(*some))
    nvml["nvml"] = FakeNvml(pids=(99,))
    assert "1 process(es) of others" in refused(measure(*some))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "NVML binding is missing" in refused(measure(*some))
    assert not (tmp_path / "serving.jsonl").exists()


def test_an_engine_on_another_gpu_than_the_metered_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda i: types.SimpleNamespace(uuid=f"AB-{i}"),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    check_metered(["GPU-ab-0"])
    check_metered(["GPU-ab-1", "GPU-ab-0"])
    with pytest.raises(MeterError, match="other GPUs than are metered"):
        check_metered(["GPU-ab-1"])


class H100Meter(WorldMeter):
    def identity(self) -> dict[str, Any]:
        return {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}


def test_each_case_stands_beside_its_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = in_world(monkeypatch, World())

    def simulated(plan_path: Path, records: Path, _: float) -> int:
        plan = load_plan(plan_path)
        serving.record_run(
            StepEngine(world),
            H100Meter(world),  # type: ignore[arg-type]
            plan,
            index=0,
            config=measure_runs.model_config(plan.runs[0].model),
            deadline=1e9,
            write=serving.writer(plan, 0, records),
        )
        return 0

    monkeypatch.setattr(measure_runs, "run_engines", simulated)
    some = ("--model", "llama-3.2-1b", "--batch", "4,13", "--input", 7, "--output", 5)
    for _ in range(2):  # a second time: the table holds what is new
        outcome = measure(*some, "--out", tmp_path)
        assert outcome.exit_code == 0, outcome.output
        assert "error: static-i7-o5-b13: ConfigurationError: thirteen" in outcome.stdout
        (line,) = [s for s in outcome.stdout.splitlines() if s.startswith("llama-3.2-1b i7 o5 b4")]
        assert "9300.000" in line  # 0.3 s at 620 W for 20 tokens
        assert line.count("%") == 2
        assert "idle-polling: 110.0 W" in outcome.stdout
    (engine, _) = [r for r in read_jsonl(tmp_path / "serving.jsonl") if r["kind"] == "engine"]
    assert engine["host"]["python_step_seconds"] > 0


# -- a running server -----------------------------------------------------------------


class FakeServer(BaseHTTPRequestHandler):
    """Streams as many tokens as asked for, one each 5 ms."""

    bodies: list[dict[str, Any]]
    short = 0
    status = 200

    def do_GET(self) -> None:
        self._start("application/json")
        self.wfile.write(json.dumps({"data": [{"id": "served-name"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        self._start("text/event-stream")
        if self.status != 200:
            self.wfile.write(b"no such option")
            return
        made = body["max_tokens"] - self.short
        for _ in range(made):
            time.sleep(0.005)
            self._event({"choices": [{"text": "x"}], "usage": None})
        self._event({"choices": [], "usage": {"completion_tokens": made}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _start(self, kind: str) -> None:
        self.send_response(self.status if self.command == "POST" else 200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[FakeServer]]]:
    handler = type("Handler", (FakeServer,), {"bodies": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", handler
        http.shutdown()
        thread.join()


@pytest.fixture
def no_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle states take seconds."""
    idle = {"watts": 70.0, "window": {"valid": True}}
    monkeypatch.setattr(serving_cases, "measure_idle", lambda *_: idle)


def test_a_running_server_is_metered_under_load(
    nvml: dict[str, Any], server: tuple[str, type[FakeServer]], tmp_path: Path
) -> None:
    url, handler = server
    nvml["nvml"].pids = (7, 8)  # the server's own processes
    (tmp_path / "t.csv").write_text(
        "arrival_seconds,input_tokens,output_tokens\n0,5,3\n0.2,6,60\n0.3,7,1\n"
    )
    outcome = measure(
        *("--model", "llama-3.2-1b", "--url", url, "--out", tmp_path / "o"),
        *("--batch", 2, "--input", 4, "--output", 10, "--trace", tmp_path / "t.csv"),
        *("--window-seconds", 0.3, "--engine", "max_num_seqs=32"),
    )
    assert outcome.exit_code == 0, outcome.output
    engine, *cases = read_jsonl(tmp_path / "o" / "serving.jsonl")
    assert engine["settings"] == {"served_model": "served-name", "interface": "http"}
    static, replay = (r for r in cases if r["kind"] == "run")
    assert static["window"]["valid"], static["window"]["invalid_reason"]
    assert static["joules_per_repeat"] == pytest.approx(300 * static["seconds_per_repeat"], rel=0.1)
    assert static["seconds_per_repeat"] > 10 * 0.005
    assert static["ttft_seconds"]["p50"] < static["seconds_per_repeat"] / 2
    assert static["steps_per_repeat"] == 0
    assert replay["seconds_per_repeat"] > 0.3  # at its own arrivals
    assert max(replay["trace"]["finish_seconds"]) == replay["trace"]["finish_seconds"][1]
    sent = handler.bodies[-1]
    assert sent["ignore_eos"] is True
    assert sent["model"] == "served-name"
    assert len(sent["prompt"]) == 7
    nvml_name = "no prediction to compare with"  # the fake GPU is in no list
    assert nvml_name in outcome.stdout


@pytest.mark.usefixtures("no_idle")
def test_a_server_s_faults_are_told(
    nvml: dict[str, Any], server: tuple[str, type[FakeServer]], tmp_path: Path
) -> None:
    url, handler = server
    some = ("--model", "llama-3.2-1b", "--batch", 1, "--out", tmp_path, "--window-seconds", 0.1)
    assert "no OpenAI-compatible server" in refused(measure(*some, "--url", "http://127.0.0.1:9"))
    handler.short = 3
    outcome = measure(*some, "--url", url)
    assert "made 13 tokens where 16 were asked for" in outcome.stdout
    assert outcome.exit_code == 1  # nothing was measured
    handler.short, handler.status = 0, 400
    assert "refused a request (400): no such option" in measure(*some, "--url", url).stdout


@pytest.mark.usefixtures("no_idle")
def test_codecarbon_meters_the_same_run(
    nvml: dict[str, Any],
    server: tuple[str, type[FakeServer]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OfflineEmissionsTracker:
        def __init__(self, **options: Any) -> None:
            assert options["gpu_ids"] == [0]

        def start(self) -> None:
            self.began = time.monotonic()

        def stop(self) -> None:
            joules = 270.0 * (time.monotonic() - self.began)
            self.final_emissions_data = types.SimpleNamespace(gpu_energy=joules / 3.6e6)

    module = types.ModuleType("codecarbon")
    module.__spec__ = ModuleSpec("codecarbon", None)
    module.OfflineEmissionsTracker = OfflineEmissionsTracker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    outcome = measure(
        *("--model", "llama-3.2-1b", "--url", server[0], "--out", tmp_path, "--batch", 1),
        *("--output", 8, "--window-seconds", 0.2, "--tracker", "codecarbon"),
    )
    assert outcome.exit_code == 0, outcome.output
    (run,) = [r for r in read_jsonl(tmp_path / "serving.jsonl") if r["kind"] == "run"]
    assert run["codecarbon"]["difference"] == pytest.approx(-0.1, abs=0.05)
    assert "codecarbon, static-i128-o8-b1: 27" in outcome.stdout
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    outcome = measure("--plan", tmp_path / "plan.json", "--url", server[0], "--out", tmp_path)
    assert "pip install 'energymodel[codecarbon]'" in refused(outcome)

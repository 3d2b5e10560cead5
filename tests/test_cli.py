"""The command as a user runs it: what it prints, where, and with which exit code."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from energymodel.calibrations import list_calibrations, load_calibration, save_calibration
from energymodel.cli import app
from energymodel.datafiles import data_path
from energymodel.gpus import list_gpus
from energymodel.models import list_models
from energymodel.report import count_text, joules_text, range_text, seconds_text, three_digits

SHARED = Path(__file__).parents[2] / "shared" / "data" / "traces"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the published traces are not beside this checkout"
)
COMMAND = [sys.executable, "-m", "energymodel"]
TRACE = "arrival_seconds,input_tokens,output_tokens\n0,1000,20\n1,200,300\n60,50,1\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "small.csv"
    path.write_text(TRACE)
    return path


def invoke(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def predict(trace: object, *options: object, stdin: bytes | None = None) -> Result:
    return invoke("predict", "--trace", trace, "--gpu", "a100", *options, stdin=stdin)


def result_of(*arguments: object, stdin: bytes | None = None) -> dict:
    outcome = predict(*arguments, "--format", "json", stdin=stdin)
    assert outcome.exit_code == 0, outcome.stderr
    return json.loads(outcome.stdout)


def refused(outcome: Result) -> str:
    """The one message of a run that refused its input."""
    assert outcome.exit_code == 2, outcome.output
    assert outcome.stdout == ""
    assert isinstance(outcome.exception, SystemExit), "a traceback"
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    return outcome.stderr


def start(*arguments: object, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *(str(a) for a in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )


# --- what is printed ----------------------------------------------------------------------------


def test_the_table_says_what_it_rests_on_and_defines_its_terms(trace: Path) -> None:
    outcome = predict(trace, "--grid", "france", "--pue", "1.2")
    assert outcome.exit_code == 0
    text = outcome.stdout
    for part in (
        "small: 3 requests, 1,250 input and 321 output tokens, arrivals trace",
        "llama-3.1-8b (bf16, KV cache bf16) on a100, vllm, batch up to 256, 8192 tokens a step",
        "interval",
        "per request",
        "per output token",
        f"{load_calibration('a100').origin} calibration of a100",
        "TTFT",
        "time to first token, from arrival",
        "time per output token after the first",
        "end to end, from arrival to last token",
        "at PUE 1.2",
        "CO2e",
        "France",
        "Where the joules go",
        "no request in flight",
        "flops_tdp",
        "every FLOP at the datasheet's peak and TDP",
        "Bins",
        "513-1024",
    ):
        assert part in text, part
    heading, *bins = text[text.index("Bins (") :].splitlines()[1:]
    assert heading.split() == [
        "input",
        "output",
        "requests",
        "tokens",
        "energy",
        "interval",
        "/request",
        "naive",
        "factor",
    ]
    assert [len(line.split()) for line in bins] == [12] * 3, "three cells hold a number and a unit"


@pytest.mark.parametrize("columns", ["40", "80", "120", "400"])
def test_tables_fit_the_terminal(trace: Path, monkeypatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    workload = "azure_code" if columns == "80" else trace
    for outcome in (predict(workload), invoke("trace", "describe", workload), invoke("known")):
        assert outcome.exit_code == 0
        assert "…" not in outcome.stdout, "cut off"
        widest = max(len(line) for line in outcome.stdout.splitlines())
        assert widest <= min(max(int(columns), 80), 120)
        assert not any(line.endswith(" ") for line in outcome.stdout.splitlines())


def test_json_is_alone_on_stdout_and_warnings_go_to_stderr(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(TRACE + "70,-5,1\n")
    outcome = predict(path, "--format", "json")
    document = json.loads(outcome.stdout)
    assert document["schema_version"] == 1
    assert document["requests"] == 3
    assert outcome.stderr.startswith("warning: 1 row negative")
    assert document["warnings"] == [outcome.stderr.removeprefix("warning: ").strip()]
    table = predict(path)
    assert "Warning" in table.stdout
    assert "1 row negative" in table.stdout
    assert table.stderr == ""


def test_csv_holds_the_bins(trace: Path) -> None:
    document = result_of(trace)
    rows = list(csv.DictReader(io.StringIO(predict(trace, "--format", "csv").stdout)))
    assert len(rows) == len(document["bins"]) == 3
    for row, expected in zip(rows, document["bins"], strict=True):
        assert {key: float(value) for key, value in row.items()} == expected


def test_the_same_seed_gives_the_same_numbers() -> None:
    one = predict("azure_code", "--format", "json", "--arrivals", "poisson:9", "--seed", "5")
    two = predict("azure_code", "--format", "json", "--arrivals", "poisson:9", "--seed", "5")
    other = predict("azure_code", "--format", "json", "--arrivals", "poisson:9", "--seed", "6")
    assert one.exit_code == 0
    assert one.stdout == two.stdout != other.stdout


def test_names_are_not_taken_for_markup(tmp_path: Path) -> None:
    path = tmp_path / "[bold]night [red].csv"
    path.write_text(TRACE)
    assert "[bold]night [red]: 3 requests" in predict(path).stdout
    assert "[bold]night [red] (plain)" in invoke("trace", "describe", path).stdout


def test_one_token_has_no_tpot(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_seconds,input_tokens,output_tokens\n3,10,1\n")
    assert re.search(r"TPOT +- +- +-", predict(path).stdout)
    assert result_of(path)["tpot_seconds"] == {"p50": None, "p90": None, "p99": None}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 J"),
        (523456.0, "523 kJ"),
        (65000.0, "65.0 kJ"),
        (999.96, "1.00 kJ"),
        (999.4, "999 J"),
        (1.0, "1.00 J"),
        (0.000127, "127 µJ"),
        (3.2e12, "3,200 GJ"),
    ],
)
def test_joules(value: float, text: str) -> None:
    assert joules_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.00531, "5.31 ms"),
        (0.9999, "1.00 s"),
        (119.0, "119 s"),
        (130.0, "2.17 min"),
        (7200.0, "2.00 h"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert seconds_text(value) == text


def test_numbers_are_short_and_plain() -> None:
    assert [three_digits(v) for v in (1239.0, 102.87, 14.53, 1.2345, 0.01234)] == [
        "1,240",
        "103",
        "14.5",
        "1.23",
        "0.0123",
    ]
    assert [count_text(n) for n in (51, 999, 1000, 2_912_345)] == ["51", "999", "1.00k", "2.91M"]
    assert range_text(314e3, 784e3) == "314 - 784 kJ"
    assert range_text(900.0, 1100.0) == "900 J - 1.10 kJ"


def test_describe_in_every_format(trace: Path) -> None:
    table = invoke("trace", "describe", trace).stdout
    assert "3 requests in 60.0 s" in table
    assert "Requests by output tokens" in table
    document = json.loads(invoke("trace", "describe", trace, "--format", "json").stdout)
    assert document["requests"] == 3
    rows = list(
        csv.DictReader(io.StringIO(invoke("trace", "describe", trace, "--format", "csv").stdout))
    )
    assert [int(row["requests"]) for row in rows] == [b["requests"] for b in document["bins"]]


def test_known_lists_every_name() -> None:
    text = invoke("known").stdout
    for name in (*list_gpus(), *list_models(), "vllm-eager", "azure_conv", "France", "mooncake"):
        assert name in text, name
    for line in text.splitlines():
        name = line.split(" ")[0]
        if name in list_gpus():
            assert line.endswith("none yet") == (name not in list_calibrations())


# --- what it takes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_gpus())
def test_every_known_gpu_predicts_or_says_why_not(trace: Path, name: str) -> None:
    outcome = invoke(
        "predict", "--trace", trace, "--gpu", name, "--model", "llama-3.2-1b", "--format", "json"
    )
    if name in list_calibrations():
        assert json.loads(outcome.stdout)["inputs"]["gpu"] == name
    else:
        message = refused(outcome)
        assert f"({name}) has no calibration yet" in message
        assert "a100, h100, h200" in message
        assert "--calibration" in message


@pytest.mark.parametrize("alias", ["A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB", "A100"])
def test_gpu_aliases(trace: Path, alias: str) -> None:
    outcome = invoke("predict", "--trace", trace, "--gpu", alias, "--format", "json")
    assert json.loads(outcome.stdout)["inputs"]["gpu"] == "a100"


@pytest.mark.parametrize("model", list_models())
def test_every_bundled_model_predicts_or_does_not_fit(trace: Path, model: str) -> None:
    options = ["--model", model, "--max-model-len", "2000", "--tensor-parallel"]
    outcome = predict(trace, *options, 1, "--format", "json")
    if outcome.exit_code == 2:
        message = refused(outcome)
        wanted = re.search(r"(\d+) GPUs \(--tensor-parallel (\d+)\) would do", message)
        assert wanted, message
        outcome = predict(trace, *options, wanted[2], "--format", "json")
    assert outcome.exit_code == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert document["inputs"]["model"] == model
    assert document["energy_joules"] > 0


def test_a_folder_with_nothing_but_a_config(trace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    by_folder = result_of(trace, "--model", folder)
    by_file = result_of(trace, "--model", folder / "config.json")
    assert by_folder["inputs"]["model"] == "my-model"
    assert by_folder["energy_joules"] == by_file["energy_joules"]


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_stdin(packed) -> None:
    document = result_of("-", stdin=packed(TRACE.encode()))
    assert document["inputs"]["trace"] == "stdin"
    assert document["input_tokens"] == 1250


@pytest.mark.parametrize(
    "options",
    [
        ("--stack", "vllm-eager"),
        ("--stack", "transformers"),
        ("--arrivals", "offline"),
        ("--arrivals", "poisson:2"),
        ("--replicas", "auto"),
        ("--replicas", "3"),
        ("--tensor-parallel", "2", "--pipeline-parallel", "2"),
        ("--max-batch", "1"),
        ("--max-step-tokens", "512"),
        ("--max-model-len", "2048"),
        ("--dtype", "int4", "--kv-dtype", "fp8"),
        ("--binning", "paper"),
        ("--pue", "1.3", "--grid", "DE"),
        ("--grid", "56"),
        ("--trace-format", "plain", "--strict"),
    ],
)
def test_options(trace: Path, options: tuple[str, ...]) -> None:
    document = result_of(trace, *options)
    parts = document["prefill_joules"] + document["decode_joules"] + document["idle_joules"]
    assert parts == pytest.approx(document["energy_joules"], rel=1e-9)


def test_a_calibration_of_ones_own(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    save_calibration(load_calibration("a100"), path)
    assert result_of(trace, "--calibration", path)["energy_joules"] == pytest.approx(
        result_of(trace)["energy_joules"]
    )
    other = result_of(trace, "--calibration", "h100")
    assert any("calibration is of h100, not of a100" in warning for warning in other["warnings"])


@needs_shared
@pytest.mark.parametrize("gpu", ["a100", "h100"])
@pytest.mark.parametrize(
    ("file", "requests"),
    [
        ("azure_llm_2023_code.csv", 8819),
        ("azure_llm_2023_conv.csv", 19366),
        ("burstgpt_1_head.csv", 364),
        ("mooncake_conversation.csv", 12031),
    ],
)
def test_the_published_traces(file: str, requests: int, gpu: str) -> None:
    arguments = ("--trace", SHARED / file, "--gpu", gpu, "--replicas", "auto", "--format", "json")
    outcome = invoke("predict", *arguments)
    assert outcome.exit_code == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert document["requests"] == requests
    total = pytest.approx(document["energy_joules"], rel=1e-9)
    assert sum(document["by_operator_joules"].values()) == total
    assert sum(b["energy_joules"] for b in document["bins"]) == total
    assert not any("overloaded" in warning for warning in document["warnings"])
    assert document["energy_joules_low"] < document["energy_joules"]
    tdp = {"a100": 400.0, "h100": 700.0}[gpu]
    assert 40.0 < document["average_watts"] / document["gpus"] < tdp


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"arrival_seconds,input_tokens,output_tokens\n", "header but no rows"),
        (b"a,b\n1,2\n", "not the columns"),
        (bytes(range(256)) * 50, "binary data"),
        (TRACE.encode() + b"9" * (3 << 20), "line 5 is longer"),
        (gzip.compress(TRACE.encode() * 900, mtime=0)[:60], "cannot be read"),
        (b"arrival_seconds,input_tokens,output_tokens\n0,1e18,nan\n1,-1,2\n", "none of its 2 rows"),
        (b"arrival_seconds,input_tokens,output_tokens\n0,200000,5\n", "longer than the 131072"),
    ],
)
def test_bad_traces(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    output = tmp_path / "result.json"
    output.write_text("earlier")
    outcome = predict(path, "--format", "json", "--output", output)
    text = refused(outcome)
    assert message in text
    assert "bad" in text
    assert output.read_text() == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.csv", "result.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "a101"), "unknown GPU 'a101'. Did you mean a100?"),
        (("--model", "llama-9"), "unknown model 'llama-9'"),
        (("--model", "/nowhere/config.json"), "no such file or folder"),
        (("--dtype", "fp7"), "unknown dtype 'fp7'"),
        (("--dtype", "fp8"), "does not compute in fp8"),
        (("--kv-dtype", "int4"), "unknown KV dtype"),
        (("--stack", "tgi"), "unknown stack"),
        (("--grid", "narnia"), "unknown grid"),
        (("--trace-format", "xml"), "unknown trace format"),
        (("--binning", "fine"), "unknown binning"),
        (("--calibration", "nope.json"), "nope.json"),
        (("--replicas", "0"), "--replicas 0"),
        (("--pue", "0.5"), "--pue 0.5"),
        (("--seed", "-1"), "--seed -1"),
        (("--max-batch", "0"), "--max-batch 0"),
        (("--max-batch", "9000"), "--max-step-tokens 8192 is below --max-batch 9000"),
        (("--tensor-parallel", "3"), "does not divide llama-3.1-8b (32 attention heads)"),
        (("--pipeline-parallel", "33"), "more than the 32 layers"),
        (("--model", "llama-3.1-70b"), "4 GPUs (--tensor-parallel 4) would do"),
        (("--max-model-len", "100"), "set --max-model-len 1020"),
        (("--binning", "paper", "--replicas", "2"), "leave out --replicas 2"),
        (("--arrivals", "burst"), "poisson:RATE"),
        (("--output", "/nowhere/x.json"), "the folder /nowhere does not exist"),
        (("--output", "."), "is a folder"),
        (("--output", "x" * 300), "no usable path"),
    ],
)
def test_bad_options(trace: Path, options: tuple[str, ...], message: str) -> None:
    assert message in refused(predict(trace, *options))


def test_options_that_typer_refuses(trace: Path) -> None:
    for options in (("--format", "xml"), ("--max-batch", "many"), ("--nope",)):
        outcome = predict(trace, *options)
        assert outcome.exit_code == 2
        assert outcome.stdout == ""
        assert "Traceback" not in outcome.stderr
    assert invoke("predict", "--trace", trace).exit_code == 2


def test_missing_trace() -> None:
    assert "no such file" in refused(predict("absent.csv"))
    assert "unknown workload 'azure_cod'. Did you mean azure_code" in refused(predict("azure_cod"))
    assert "No file has that name" in refused(invoke("trace", "describe", "absent"))


def test_a_gpu_file_of_ones_own(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "my-gpu.json"
    path.write_text(data_path("gpus", "a100.json").read_text())
    arguments = ("predict", "--trace", trace, "--gpu", path, "--format", "json")
    assert "(my-gpu) has no calibration yet" in refused(invoke(*arguments))
    document = json.loads(invoke(*arguments, "--calibration", "a100").stdout)
    assert document["inputs"]["gpu"] == "my-gpu"
    assert any("calibration is of a100" in warning for warning in document["warnings"])


@pytest.mark.parametrize("field", ["base_watts", "joules_per_hbm_byte", "power_cap_watts"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan"), 1e300, "much", None])
def test_a_calibration_with_a_senseless_value(
    trace: Path, tmp_path: Path, field: str, value: object
) -> None:
    document = json.loads(data_path("calibrations", "a100.json").read_text())
    document[field] = value
    path = tmp_path / "own.json"
    path.write_text(json.dumps(document))
    message = refused(predict(trace, "--calibration", path))
    assert f"own.json: $.{field} must be a number" in message


# --- where it goes ------------------------------------------------------------------------------


def test_output_is_written_whole_and_replaces_the_file(trace: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    outcome = predict(trace, "--format", "json", "--output", output)
    assert (outcome.exit_code, outcome.stdout) == (0, "")
    first = json.loads(output.read_text())
    output.chmod(0o640)
    predict(trace, "--format", "json", "--output", output, "--arrivals", "offline")
    assert json.loads(output.read_text())["energy_joules"] < first["energy_joules"]
    assert stat.S_IMODE(output.stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json", "small.csv"]


def test_output_never_replaces_what_is_read(trace: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.csv"
    link.symlink_to(trace)
    for output in (trace, link):
        message = refused(predict(trace, "--output", output))
        assert "would overwrite" in message
        assert "would overwrite" in refused(invoke("trace", "describe", trace, "--output", output))
    own = tmp_path / "own.json"
    save_calibration(load_calibration("a100"), own)
    assert "would overwrite" in refused(predict(trace, "--calibration", own, "--output", own))
    assert trace.read_text() == TRACE


def test_output_through_a_link_keeps_the_link(trace: Path, tmp_path: Path) -> None:
    link, target = tmp_path / "latest.csv", tmp_path / "today.csv"
    link.symlink_to(target)
    predict(trace, "--format", "csv", "--output", link)
    assert link.is_symlink()
    assert target.read_text().startswith("input_low,")


def test_output_to_a_pipe_writes_into_it(trace: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = start(
        "predict", "--trace", trace, "--gpu", "a100", "--format", "json", "--output", pipe
    )
    assert json.loads(pipe.read_text())["requests"] == 3
    assert process.wait() == 0
    assert stat.S_ISFIFO(pipe.stat().st_mode), "the pipe is still there"
    process.communicate()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_output_without_permission(trace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert "cannot be written" in refused(predict(trace, "--output", folder / "x.json"))


def test_a_failed_write_leaves_the_file_as_it_was(trace: Path, tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "result.json"
    output.write_text("earlier")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    outcome = predict(trace, "--format", "json", "--output", output)
    assert outcome.exit_code == 2
    assert "No space left on device" in outcome.stderr
    assert output.read_text() == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json", "small.csv"]


def test_output_to_what_stdout_is(trace: Path, tmp_path: Path) -> None:
    link = tmp_path / "stdout"
    link.symlink_to("/proc/self/fd/1")  # as /dev/stdout is, which no test should risk
    process = start(
        "predict", "--trace", trace, "--gpu", "a100", "--format", "json", "--output", link
    )
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, b"")
    assert json.loads(stdout)["requests"] == 3
    assert link.is_symlink()


def test_a_closed_stdout_is_said(trace: Path) -> None:
    command = " ".join([*COMMAND, "predict", "--trace", str(trace), "--gpu", "a100", ">&-"])
    process = subprocess.run(command, shell=True, capture_output=True, check=False)
    assert process.returncode == 2
    assert process.stderr == b"error: standard output is closed; use --output FILE\n"


def test_a_trace_whose_name_is_no_unicode(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe.csv"
    Path(os.fsdecode(path)).write_text(TRACE)
    for form in ("table", "json"):
        process = subprocess.run(
            [*COMMAND, "predict", "--trace", path, "--gpu", "a100", "--format", form],
            capture_output=True,
            check=False,
        )
        assert (process.returncode, process.stderr) == (0, b"")


def test_a_full_disk_behind_stdout(trace: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(
            [*COMMAND, "predict", "--trace", str(trace), "--gpu", "a100"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert process.returncode == 2
    assert process.stderr.startswith(b"error: standard output cannot be written: No space left")
    assert b"Traceback" not in process.stderr


@pytest.mark.parametrize("what", ["predict", "describe"])
def test_a_closed_pipe_is_no_error(what: str) -> None:
    arguments = ("predict", "--trace", "azure_code", "--gpu", "a100", "--format", "json")
    if what == "describe":
        arguments = ("trace", "describe", "azure_code", "--format", "json")
    process = start(*arguments)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait() == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_interrupt(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    output.write_text("earlier")
    pipe = tmp_path / "trace.csv"
    os.mkfifo(pipe)  # the command waits for the rest of the trace
    process = start("predict", "--trace", pipe, "--gpu", "a100", "--output", output)
    with pipe.open("w") as writer:
        writer.write(TRACE)
        writer.flush()
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.decode().strip() == "interrupted"
    assert output.read_text() == "earlier"


def test_a_terminal_without_the_characters(trace: Path) -> None:
    process = subprocess.run(
        [*COMMAND, "trace", "describe", str(trace)],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert process.returncode == 0
    assert process.stderr == b""
    assert b"Requests by output tokens" in process.stdout


# --- start --------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--version", "--help", "predict --help", "trace --help"])
def test_help_and_version_load_nothing_slow(option: str) -> None:
    script = (
        "import sys\n"
        "from energymodel.cli import main\n"
        f"sys.argv = ['energymodel', *{option.split()!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code in (0, None)\n"
        "slow = {'numpy', 'scipy', 'numba', 'polars', 'matplotlib', 'zstandard', 'torch'}\n"
        "print(sorted(slow & set(sys.modules)), file=sys.stderr)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert process.stderr.strip() == b"[]"
    assert b"nergy" in process.stdout or b"race" in process.stdout


def test_help_names_the_defaults_that_are_not_numbers() -> None:
    text = re.sub(r"[\s│]+", " ", invoke("predict", "--help").stdout)
    for default in ("llama-3.1-8b", "vLLM's for the GPU", "the model's", "from its columns"):
        assert f"[default: {default}]" in text or f"[default: ({default})]" in text, default

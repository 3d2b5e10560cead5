"""Prefill and decode on pools of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from energymodel.cli import app
from energymodel.disaggregation import serve_disaggregated
from energymodel.errors import ConfigurationError
from energymodel.operators import kv_bytes_per_token
from energymodel.replicas import serve_on_replicas
from energymodel.settings import Setting
from energymodel.steady_state import summarise
from energymodel.sweep import Workload, deployment_of, evaluate
from energymodel.traces import Requests
from energymodel.workloads import load_requests


def one(input_tokens: int, output_tokens: int) -> Requests:
    return Requests(
        name="one",
        arrival_seconds=np.zeros(1),
        input_tokens=np.array([input_tokens]),
        output_tokens=np.array([output_tokens]),
        rows_read=1,
    )


@pytest.fixture(scope="module")
def code() -> Workload:
    requests = load_requests("azure_code", num_requests=2000)
    return Workload(
        binned=summarise(requests),
        requests=requests,
        output_tokens=int(requests.output_tokens.sum()),
        prices={},
    )


def test_a_request_alone_is_prefilled_moved_and_decoded(code: Workload) -> None:
    deployment = deployment_of(Setting(gpu="a100"), code)
    request = one(2000, 11)
    apart = serve_disaggregated(request, deployment, 1, deployment, 1)
    together, _ = serve_on_replicas(request, 1, deployment)
    assert apart.first_token_seconds[0] == pytest.approx(together.first_token_seconds[0])
    moved = 2000 * kv_bytes_per_token(deployment.model, deployment.serving)
    seconds = moved / deployment.gpu.link_bytes_per_s
    # the first step of the decode pool follows a pause, which its own first step pays for
    decoding = together.finish_seconds[0] - together.first_token_seconds[0]
    late = apart.finish_seconds[0] - apart.first_token_seconds[0] - seconds - decoding
    assert 0.0 <= late < 0.005
    joules = apart.operators["kv_transfer"]["link"]
    assert joules == pytest.approx(2 * moved * deployment.calibration.joules_per_link_byte)


def test_parts_add_up_and_order_holds(code: Workload) -> None:
    requests = code.requests
    assert requests is not None
    deployment = deployment_of(Setting(gpu="h100"), code)
    served = serve_disaggregated(requests, deployment, 3, deployment, 2)
    active = served.prefill_joules + served.decode_joules
    assert served.request_joules.sum() == pytest.approx(active, rel=1e-9)
    operators = sum(sum(parts.values()) for parts in served.operators.values())
    assert operators + served.wait_joules == pytest.approx(active, rel=1e-9)
    single = requests.output_tokens == 1
    np.testing.assert_array_equal(served.finish_seconds[single], served.first_token_seconds[single])
    assert (served.finish_seconds[~single] > served.first_token_seconds[~single]).all()
    assert (served.first_token_seconds > requests.arrival_seconds).all()
    held = served.wall_seconds * 5
    assert served.busy_seconds < held
    idle = served.idle_joules / deployment.calibration.polling_idle_watts
    assert idle + served.busy_seconds == pytest.approx(held, rel=1e-9)


def test_decoding_no_longer_waits_for_prompts(code: Workload) -> None:
    together = evaluate(Setting(gpu="a100", replicas=4), code, "exact")
    apart = evaluate(Setting(gpu="a100", replicas=1, prefill_replicas=3), code, "binned")
    assert apart.served, apart.reason
    assert apart.mode == "exact"
    assert apart.gpus == together.gpus == 4
    assert apart.tpot_seconds["p99"] < 0.5 * together.tpot_seconds["p99"]


def test_pools_that_cannot_work_together_are_refused(code: Workload) -> None:
    llama = deployment_of(Setting(gpu="a100"), code)
    other = deployment_of(Setting(gpu="a100", model="qwen3-8b"), code)
    static = deployment_of(Setting(gpu="a100", stack="transformers"), code)
    with pytest.raises(ConfigurationError, match="one model"):
        serve_disaggregated(one(10, 2), llama, 1, other, 1)
    with pytest.raises(ConfigurationError, match="continuous"):
        serve_disaggregated(one(10, 2), static, 1, static, 1)
    assert "auto" in evaluate(Setting(gpu="a100", prefill_replicas=1), code, "exact").reason
    negative = Setting(gpu="a100", prefill_replicas=-1, replicas=1)
    assert "0 or more" in evaluate(negative, code, "exact").reason


def test_the_command_compares_pools(code: Workload) -> None:
    result = CliRunner().invoke(
        app,
        [
            *("whatif", "--trace", "azure_code", "--gpu", "h100", "--backend", "sequential"),
            *("--replicas", "2", "--prefill-replicas", "0,2"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "prefill" in result.output


def test_prompts_may_have_gpus_of_another_type(code: Workload) -> None:
    setting = Setting(gpu="a100", prefill_gpu="h100", prefill_replicas=2, replicas=3)
    point = evaluate(setting, code, "binned")
    assert point.served, point.reason
    prefill, decode = (deployment_of(Setting(gpu=gpu), code) for gpu in ("h100", "a100"))
    assert code.requests is not None
    served = serve_disaggregated(code.requests, prefill, 2, decode, 3)
    active = served.prefill_joules + served.decode_joules
    assert point.active_joules == pytest.approx(active, rel=1e-12)
    assert point.gpus == 5
    intervals = [d.calibration.intervals["vllm"] for d in (prefill, decode)]
    assert point.energy_joules is not None
    assert point.energy_joules_low == point.energy_joules * min(i.low for i in intervals)
    assert point.energy_joules_high == point.energy_joules * max(i.high for i in intervals)
    assert point.wall_seconds is not None
    assert point.usd is None
    priced = replace(code, prices={"a100": 1.0, "h100": 3.0})
    hours = point.wall_seconds / 3600.0
    assert evaluate(setting, priced, "exact").usd == pytest.approx((2 * 3.0 + 3 * 1.0) * hours)
    assert evaluate(setting, replace(code, prices={"a100": 1.0}), "exact").usd is None
    same = replace(setting, prefill_gpu="a100")
    assert (
        evaluate(same, code, "exact").energy_joules
        == evaluate(replace(same, prefill_gpu=None), code, "exact").energy_joules
    )
    alone = replace(setting, prefill_replicas=0)
    assert "--prefill-replicas" in evaluate(alone, code, "exact").reason


def test_the_command_takes_gpus_for_prompts() -> None:
    options = ("whatif", "--trace", "azure_code", "--gpu", "a100", "--backend", "sequential")
    options += ("--replicas", "2", "--prefill-replicas", "2", "--prefill-gpu")
    result = CliRunner().invoke(app, [*options, "h100,a100"])
    assert result.exit_code == 0, result.output
    assert "2 best of 2" in result.output
    result = CliRunner().invoke(app, [*options, "nonsuch"])
    assert result.exit_code == 2
    assert "nonsuch" in result.output

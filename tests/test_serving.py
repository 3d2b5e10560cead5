"""The serving measurement with a simulated GPU, a simulated vLLM and stand-in processes."""

from __future__ import annotations

import json
import sys
import textwrap
import types
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.metering.host_speed import host_speed
from calibration.metering.recording import append_record
from calibration.metering.windows import Reading, Window, read_jsonl
from calibration.serving import cases as serving_cases
from calibration.serving import run_plan as serving
from calibration.serving import steady as serving_steady
from calibration.serving import vllm_engine as serving_engine
from calibration.serving.cases import measure_case, metered, run_cases
from calibration.serving.engine import RunLog, TimeUpError
from calibration.serving.plan import (
    Case,
    EngineRun,
    Plan,
    Requests,
    load_plan,
    model_config,
    requests_of,
)
from calibration.serving.run_plan import run_plan
from calibration.serving.vllm_engine import VllmEngine
from energymodel.errors import ConfigurationError, TraceError

IDLE_WATTS = 110.0
ACTIVE_WATTS = 620.0
TICK_SECONDS = 0.1


class World:
    """A clock, a GPU with two power states, and a counter that ticks and lags."""

    def __init__(self, now: float = 3.0, lag_seconds: float = 0.0) -> None:
        self.now = now
        self.lag_seconds = lag_seconds
        self.active: list[tuple[float, float]] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def work(self, seconds: float) -> None:
        self.active.append((self.now, self.now + seconds))
        self.now += seconds

    def energy(self, until: float) -> float:
        busy = sum(min(end, until) - start for start, end in self.active if start < until)
        return IDLE_WATTS * (until - busy) + ACTIVE_WATTS * busy

    def next_tick(self) -> Reading:
        self.now = (np.floor(self.now / TICK_SECONDS + 1e-9) + 1) * TICK_SECONDS
        energy = self.energy(self.now - self.lag_seconds)
        return Reading(time_seconds=self.now, energy_joules=(energy,))


class WorldMeter:
    """The meter's interface over a `World`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.opened: tuple[str, Reading] | None = None

    def identity(self) -> dict[str, Any]:
        return {"gpus": [{"name": "simulated"}]}

    def wait_tick(self) -> Reading:
        return self.world.next_tick()

    def edge(self, keep_busy: Any) -> Reading:
        if keep_busy is None:
            return self.wait_tick()
        tick = int(self.world.now / TICK_SECONDS)
        while int(self.world.now / TICK_SECONDS) == tick:
            keep_busy()
        now = self.world.now
        return Reading(time_seconds=now, energy_joules=(self.world.energy(now),))

    def begin(self, name: str, *, align: bool = True, keep_busy: Any = None) -> None:
        assert self.opened is None
        self.opened = name, self.edge(keep_busy)

    def end(self, *, align: bool = True, keep_busy: Any = None) -> Window:
        assert self.opened is not None
        (name, first), last = self.opened, self.edge(keep_busy)
        self.opened = None
        return Window(
            name=name,
            start_seconds=first.time_seconds,
            end_seconds=last.time_seconds,
            started_unix_seconds=0.0,
            duration_seconds=last.time_seconds - first.time_seconds,
            energy_joules=(last.energy_joules[0] - first.energy_joules[0],),
            energy_method="counter",
            edge_uncertainty_seconds=0.001,
            instant_mean_watts=None,
            instant_std_watts=None,
            instant_drift_watts=None,
            sample_count=0,
            sm_clock_hz=1.98e9,
            throttle_shares={},
            power_capped=False,
            states_before=(),
            states_after=(),
            other_processes=0,
            notes=(),
            valid=True,
            invalid_reason="",
        )

    def abandon(self) -> None:
        self.opened = None


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return in_world(monkeypatch, World())


def in_world(monkeypatch: pytest.MonkeyPatch, world: World) -> World:
    for module in (serving_cases, serving_engine, serving_steady):
        monkeypatch.setattr(module, "clock", world.clock)
        monkeypatch.setattr(
            module, "time", types.SimpleNamespace(sleep=world.sleep, time=lambda: 0.0)
        )
    return world


class StepEngine:
    """Takes 0.3 s for a batch; can be told to fail."""

    def __init__(self, world: World, seconds: float = 0.3) -> None:
        self.world = world
        self.seconds = seconds
        self.served: list[int] = []
        self.lengths: list[int] = []

    def prepare(self, requests: Requests, prompts: list[list[int]]) -> Any:
        if len(requests) == 13:
            raise ConfigurationError("thirteen")
        assert [len(p) for p in prompts] == requests.input_tokens.tolist()
        return requests

    def run(self, prepared: Requests, stop_at: float) -> RunLog:
        if self.world.now > stop_at:
            raise TimeUpError("time was up")
        start, tokens = self.world.now, int(prepared.output_tokens[0])
        self.world.work(self.seconds)
        self.served.append(len(prepared))
        self.lengths.append(tokens)
        ends = np.linspace(0, self.seconds, tokens + 1)[1:]
        batch = np.full(tokens, len(prepared))
        return RunLog(
            start_seconds=start,
            end_seconds=self.world.now,
            add_seconds=0.0,
            ttft_seconds=np.full(len(prepared), ends[0]),
            finish_seconds=np.full(len(prepared), self.seconds),
            step_end_seconds=ends,
            step_tokens=np.concatenate([[prepared.input_tokens.sum()], batch[1:]]),
            step_sequences=batch,
        )

    def poll(self) -> None:
        self.world.sleep(0.001)

    def settings(self) -> dict[str, Any]:
        return {}


def a_plan(**changes: Any) -> Plan:
    return Plan(**{"name": "t", "runs": (), "folder": Path(), "window_seconds": 2.5, **changes})


def outcomes(
    engine: Any, world: World, *cases: Case, deadline: float = 1e9, stack: str = "vllm"
) -> list[Any]:
    records: list[dict[str, Any]] = []
    run = EngineRun(model="m", stack=stack, budget_seconds=1, cases=cases)
    run_cases(
        engine,
        WorldMeter(world),
        run,
        a_plan(),
        vocab_size=100,
        deadline=deadline,
        write=records.append,
    )
    return records


# -- metering -------------------------------------------------------------------------


@given(
    phase=st.floats(0, 0.1),
    durations=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4),
    lag=st.floats(0, serving_cases.COUNTER_LAG_SECONDS),
)
def test_energy_is_that_of_the_work_wherever_it_falls_between_ticks(
    phase: float, durations: list[float], lag: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        world = in_world(patch, World(5.0 + phase, lag))
        engine = StepEngine(world)

        def work() -> list[RunLog]:
            logs = []
            for seconds in durations:
                engine.seconds = seconds
                logs.append(engine.run(requests_of(Case(batch=1, output_tokens=1), Path()), 1e9))
            return logs

        result = metered(WorldMeter(world), "w", work)
    assert result["active_seconds"] == pytest.approx(sum(durations))
    assert result["tail_watts"] == pytest.approx(IDLE_WATTS)
    assert result["joules"] == pytest.approx(ACTIVE_WATTS * sum(durations), rel=1e-6)


def test_a_short_case_repeats_until_the_window_is_full(world: World) -> None:
    engine = StepEngine(world)
    (record,) = outcomes(engine, world, Case(input_tokens=7, output_tokens=5, batch=4))
    assert record["kind"] == "run"
    assert record["repeats"] == 9  # 9 x 0.3 s >= 2.5 s
    assert len(engine.served) == 10  # and one warm-up
    assert record["seconds_per_repeat"] == pytest.approx(0.3)
    assert record["joules_per_repeat"] == pytest.approx(0.3 * ACTIVE_WATTS)
    assert record["input_tokens"] == 28
    assert record["output_tokens"] == 20
    assert record["scheduled_tokens_per_repeat"] == 28 + 4 * 4
    assert record["decode_step_seconds"]["p50"] == pytest.approx(0.06)
    assert record["ttft_seconds"]["p50"] == pytest.approx(0.06)
    assert record["tpot_seconds"]["p90"] == pytest.approx(0.06)
    assert record["steps"]["tokens"].tolist() == [28, 4, 4, 4, 4]
    assert record["window"]["valid"] is True


@pytest.mark.parametrize(("stack", "warm_up"), [("vllm", 16), ("transformers", 40)])
def test_transformers_has_met_every_length_before_it_is_metered(
    world: World, stack: str, warm_up: int
) -> None:
    engine = StepEngine(world)
    outcomes(engine, world, Case(input_tokens=7, output_tokens=40, batch=4), stack=stack)
    assert engine.lengths[0] == warm_up
    assert set(engine.lengths[1:]) == {40}


def test_a_replay_is_warmed_up_with_a_lone_request_and_a_burst(
    world: World, tmp_path: Path
) -> None:
    lines = [f"{0.1 * i},{5 + i},3" for i in range(20)]
    text = "\n".join(["arrival_seconds,input_tokens,output_tokens", *lines])
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    engine = StepEngine(world)
    case = Case(kind="trace", trace="t.csv", arrivals="own")
    measure_case(engine, WorldMeter(world), case, a_plan(folder=tmp_path), 100, 1e9)
    assert engine.served == [1, 16, 20]


def test_a_host_tells_its_speed() -> None:
    found = host_speed()
    assert 1e-9 < found["python_step_seconds"] < 1e-4
    assert found["cpu_count"] >= 1
    assert found["launch_seconds"] is None or found["launch_seconds"] > 0


def test_a_single_output_token_has_no_tpot_and_no_decode_step(world: World) -> None:
    (record,) = outcomes(StepEngine(world), world, Case(input_tokens=7, output_tokens=1, batch=4))
    assert record["tpot_seconds"] is None
    assert record["decode_step_seconds"] is None


def test_one_failing_case_does_not_end_the_others(world: World) -> None:
    cases = [Case(input_tokens=3, output_tokens=2, batch=b) for b in (1, 13, 2)]
    records = outcomes(StepEngine(world), world, *cases)
    assert [r["kind"] for r in records] == ["run", "error", "run"]
    assert records[1]["error"] == "ConfigurationError: thirteen"


def test_cases_beyond_the_deadline_are_recorded_as_skipped(world: World) -> None:
    cases = [Case(input_tokens=3, output_tokens=2, batch=b) for b in (1, 2, 3)]
    records = outcomes(StepEngine(world), world, *cases, deadline=world.now + 5.0)
    assert [r["kind"] for r in records] == ["run", "skipped", "skipped"]
    records = outcomes(StepEngine(world, 30.0), world, *cases[:2], deadline=world.now + 20.0)
    assert "time was up" in records[0]["reason"]


def test_idle_states_are_metered_as_power(world: World) -> None:
    records = outcomes(
        StepEngine(world),
        world,
        Case(kind="idle", state="context"),
        Case(kind="idle", state="polling"),
    )
    assert [r["case_name"] for r in records] == ["idle-context", "idle-polling"]
    assert [r["watts"] for r in records] == pytest.approx([IDLE_WATTS, IDLE_WATTS])


# -- the vLLM engine ------------------------------------------------------------------


class FakeVllm:
    """As much of vLLM as the engine uses: one token a request and step, results a step late."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.waiting: list[list[Any]] = []
        self.in_flight: deque[Any] = deque()
        self.aborted: list[str] = []
        self.arguments: dict[str, Any] = {}
        self.scheduler = types.SimpleNamespace(update_from_output=self._update)
        core = types.SimpleNamespace(scheduler=self.scheduler)
        self.engine_core = types.SimpleNamespace(engine_core=core)
        model = types.SimpleNamespace(max_model_len=64)
        self.vllm_config = types.SimpleNamespace(model_config=model)
        self.llm_engine = self

    def modules(self) -> dict[str, types.ModuleType]:
        vllm, sampling = types.ModuleType("vllm"), types.ModuleType("vllm.sampling_params")

        def llm(model: str, **arguments: Any) -> FakeVllm:
            self.arguments = arguments
            return self

        vllm.LLM = llm  # type: ignore[attr-defined]
        vllm.SamplingParams = types.SimpleNamespace  # type: ignore[attr-defined]
        sampling.RequestOutputKind = types.SimpleNamespace(FINAL_ONLY=2)  # type: ignore[attr-defined]
        return {"vllm": vllm, "vllm.sampling_params": sampling}

    def add_request(self, name: str, prompt: Any, params: Any) -> str:
        self.world.sleep(0.001)
        self.waiting.append([f"{name}-abcd", len(prompt["prompt_token_ids"]), params.max_tokens])
        return f"{name}-abcd"

    def step(self) -> list[Any]:
        running = self.waiting[: self.arguments["max_num_seqs"]]
        batch = {r[0]: (r[1] if r[1] else 1) for r in running}
        for r in running:
            r[1], r[2] = 0, r[2] - 1
        last = {r[0] for r in running if r[2] == 0}
        self.waiting = [r for r in self.waiting if r[2] > 0]
        self.in_flight.append((batch, last))
        if batch and len(self.in_flight) < 2:
            return []
        scheduled, finished = self.in_flight.popleft()
        if scheduled:
            self.world.work(0.01)
        self.scheduler.update_from_output(
            types.SimpleNamespace(
                total_num_scheduled_tokens=sum(scheduled.values()),
                num_scheduled_tokens=scheduled,
            ),
            None,
        )
        return [
            types.SimpleNamespace(finished=True, request_id=name.partition("-")[0])
            for name in sorted(finished)
        ]

    def _update(self, scheduled: Any, output: Any) -> Any:
        made = [
            types.SimpleNamespace(request_id=name, new_token_ids=[1])
            for name in scheduled.num_scheduled_tokens
        ]
        return {0: types.SimpleNamespace(outputs=made)}

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting) or any(batch for batch, _ in self.in_flight)

    def abort_request(self, names: list[str], internal: bool) -> None:
        self.aborted += names
        self.waiting.clear()
        self.in_flight.clear()


@pytest.fixture
def vllm(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[VllmEngine, FakeVllm]:
    fake = FakeVllm(world)
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    run = EngineRun(
        model="m",
        stack="vllm-eager",
        budget_seconds=1,
        cases=(),
        weights="dummy",
        engine={"max_num_seqs": 4},
    )
    return VllmEngine(run, Path("folder"), {}, 0), fake


def some_requests(arrivals: list[float], inputs: list[int], outputs: list[int]) -> Requests:
    return Requests(np.array(arrivals), np.array(inputs), np.array(outputs))


def prompts_of(requests: Requests) -> list[list[int]]:
    return [[1] * n for n in requests.input_tokens]


def test_vllm_gets_the_plan_s_arguments(vllm: tuple[VllmEngine, FakeVllm]) -> None:
    _, fake = vllm
    assert fake.arguments["max_num_seqs"] == 4
    assert fake.arguments["enforce_eager"] is True
    assert fake.arguments["load_format"] == "dummy"
    assert fake.arguments["enable_prefix_caching"] is False


def test_top_p_draws_and_greedy_does_not(vllm: tuple[VllmEngine, FakeVllm]) -> None:
    engine, _ = vllm
    requests = some_requests([0], [5], [3])
    for top_p, temperature, share in ((0.0, 0.0, 1.0), (0.9, 1.0, 0.9)):
        _, [(_, params)] = engine.prepare(replace(requests, top_p=top_p), prompts_of(requests))
        assert (params.temperature, params.top_p) == (temperature, share)
        assert params.max_tokens == 3


class FakeWeight:
    def __init__(self, dtype: str) -> None:
        self.dtype, self.device, self.data, self.held = dtype, "cuda:0", self, "as allocated"

    def view(self, dtype: str) -> FakeWeight:
        return self

    def fill_(self, value: int) -> None:
        self.held = f"all {value}"

    def random_(self, low: int, high: int, generator: Any) -> None:
        self.held = f"random {low} to {high}, seed {generator}"


def test_packed_dummy_weights_get_random_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = types.SimpleNamespace(manual_seed=lambda seed: seed)
    torch = types.SimpleNamespace(uint8="uint8", int32="int32", Generator=lambda device: generator)
    loader = types.SimpleNamespace(initialize_dummy_weights=lambda model, config: called.append(1))
    called: list[int] = []
    package = types.ModuleType("vllm.model_executor.model_loader")
    package.dummy_loader = loader  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, "torch", torch)
    serving_engine._fill_packed_weights(seed=7)
    weights = {
        name: FakeWeight(dtype)
        for name, dtype in (
            *(("w13", "uint8"), ("w13_weight_scale", "uint8"), ("qkv", "bf16")),
            *(("qkv.qweight", "int32"), ("qkv.g_idx", "int32")),
        )
    }
    model = types.SimpleNamespace(named_parameters=weights.items)
    loader.initialize_dummy_weights(model, None)
    assert called == [1]
    assert [w.held for w in weights.values()] == [
        "random 0 to 256, seed 7",
        "all 120",
        "as allocated",
        "random 0 to 256, seed 7",
        "as allocated",
    ]


def test_a_batch_is_logged_step_by_step(vllm: tuple[VllmEngine, FakeVllm]) -> None:
    engine, _ = vllm
    requests = some_requests([0, 0], [5, 7], [3, 1])
    for _ in range(2):  # a second time: ids go on, the log starts anew
        log = engine.run(engine.prepare(requests, prompts_of(requests)), 1e9)
        assert log.step_tokens.tolist() == [12, 1, 1]
        assert log.step_sequences.tolist() == [2, 1, 1]
        assert log.add_seconds == pytest.approx(0.002)
        assert log.step_end_seconds == pytest.approx([0.012, 0.022, 0.032])
        assert log.ttft_seconds == pytest.approx([0.012, 0.012])
        assert log.finish_seconds == pytest.approx([0.032, 0.012])
        assert log.seconds == pytest.approx(0.032)


def test_requests_arrive_at_their_own_times(vllm: tuple[VllmEngine, FakeVllm]) -> None:
    engine, _ = vllm
    requests = some_requests([0, 0.5], [5, 7], [2, 2])
    log = engine.run(engine.prepare(requests, prompts_of(requests)), 1e9)
    assert log.step_tokens.tolist() == [5, 1, 7, 1]
    assert log.finish_seconds[1] > 0.5
    assert log.ttft_seconds == pytest.approx([0.011, 0.011])


def test_time_up_takes_the_requests_back(vllm: tuple[VllmEngine, FakeVllm], world: World) -> None:
    engine, fake = vllm
    requests = some_requests([0, 0], [5, 7], [20, 20])
    with pytest.raises(TimeUpError, match="0 of 2"):
        engine.run(engine.prepare(requests, prompts_of(requests)), world.now + 0.05)
    assert len(fake.aborted) == 2
    assert not fake.has_unfinished_requests()


def test_a_request_longer_than_the_model_is_refused(vllm: tuple[VllmEngine, FakeVllm]) -> None:
    engine, _ = vllm
    requests = some_requests([0], [60], [5])
    with pytest.raises(ConfigurationError, match="65 tokens, the model takes 64"):
        engine.prepare(requests, prompts_of(requests))


def test_settings_that_the_version_lacks_are_none(
    vllm: tuple[VllmEngine, FakeVllm], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, fake = vllm
    monkeypatch.setattr(serving_engine, "torch_settings", dict)
    fake.vllm_config.scheduler_config = types.SimpleNamespace(max_num_seqs=4)
    fake.vllm_config.compilation_config = types.SimpleNamespace()
    settings = engine.settings()
    assert settings["max_num_seqs"] == 4
    assert settings["block_size"] is None


def test_a_steady_state_is_metered_with_a_full_batch(
    vllm: tuple[VllmEngine, FakeVllm], world: World
) -> None:
    engine, fake = vllm
    case = Case(kind="steady", input_tokens=5, output_tokens=10, batch=4, seconds=3.0)
    (record,) = outcomes(engine, world, case)
    assert record["kind"] == "steady", record
    assert record["case_name"] == "steady-i5-o10-n4"
    assert record["mean_sequences"] == pytest.approx(4, abs=0.3)
    # a step of 10 ms makes a token a sequence; a request costs 1 ms of the host, GPU idle
    step = 0.010 + 4 / 10 * 0.001
    assert record["seconds_per_output_token"] == pytest.approx(step / 4, rel=0.1)
    watts = record["joules_per_output_token"] / record["seconds_per_output_token"]
    assert watts == pytest.approx((0.010 * ACTIVE_WATTS + 0.0004 * IDLE_WATTS) / step, rel=0.02)
    assert record["active_seconds"] == pytest.approx(3.0, abs=0.2)
    assert record["tpot_seconds"]["p50"] == pytest.approx(step, rel=0.2)
    requests = record["requests"]
    assert requests["output_tokens"][:5] == [2, 5, 8, 10, 10]  # the first ones end in turn
    assert requests["before_window"] + record["requests_started"] == len(requests["input_tokens"])
    assert not fake.has_unfinished_requests()
    (after,) = outcomes(engine, world, Case(input_tokens=5, output_tokens=3, batch=2))
    assert after["kind"] == "run"  # the engine is usable again


def test_a_steady_state_needs_an_engine_of_its_size(
    vllm: tuple[VllmEngine, FakeVllm], world: World
) -> None:
    case = Case(kind="steady", input_tokens=5, output_tokens=10, batch=8)
    (record,) = outcomes(vllm[0], world, case)
    assert "max_num_seqs 8, this one has 4" in record["error"]


def test_a_steady_state_may_take_the_lengths_of_a_trace(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_seconds,input_tokens,output_tokens\n0,8,4\n9,6,2\n")
    case = Case(kind="steady", trace="t.csv", batch=2)
    assert case.name == "steady-t-n2"
    lengths = serving_steady.lengths_of(case, tmp_path)
    assert [lengths(i) for i in range(5)] == [(8, 2), (6, 2), (8, 4), (6, 2), (8, 4)]


def test_a_stack_of_static_batches_has_no_steady_state(world: World) -> None:
    case = Case(kind="steady", input_tokens=5, output_tokens=10, batch=4)
    (record,) = outcomes(StepEngine(world), world, case, stack="transformers")
    assert "leave steady cases out" in record["error"]


# -- plan, requests, records ----------------------------------------------------------


def plan_file(folder: Path, **changes: Any) -> Path:
    raw = {
        "name": "p",
        "case_sets": {"s": [{"input_tokens": 1, "output_tokens": 1, "batch": 1}]},
        "runs": [
            {"model": "one", "stack": "vllm", "budget_seconds": 30, "case_sets": ["s"]},
            {"model": "two", "stack": "vllm-eager", "budget_seconds": 30, "case_sets": ["s"]},
        ],
        **changes,
    }
    path = folder / "plan.json"
    path.write_text(json.dumps(raw))
    return path


STATIC = {"input_tokens": 128, "output_tokens": 32, "batch": 8}


def test_cases_are_named_by_how_they_decode() -> None:
    names = [Case(**STATIC, **how).name for how in ({}, {"top_p": 0.9}, {"beams": 4})]
    assert names == [f"static-i128-o32-b8{how}" for how in ("", "-p0.9", "-beam4")]
    assert requests_of(Case(**STATIC, beams=4), Path()).beams == 4


@pytest.mark.parametrize("path", sorted(Path("calibration/plans").glob("*.json")), ids=str)
def test_the_shipped_plans_are_sound(path: Path) -> None:
    plan = load_plan(path)
    for run in plan.runs:
        names = [case.name for case in run.cases]
        assert len(set(names)) == len(names)
        assert model_config(run.model)["torch_dtype"] == "bfloat16"
        assert not any(key.startswith("_") for key in model_config(run.model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wat": 1}, "unknown field 'wat'"),
        ({"runs": []}, "'runs' is empty"),
        ({"case_sets": {"s": [{"batch": 1}]}}, "case 0.*input_tokens"),
        ({"case_sets": {"s": [{"kind": "statik"}]}}, "Did you mean static"),
        ({"case_sets": {"s": [{"kind": "trace", "trace": "a", "arrivals": "x"}]}}, "arrivals"),
        ({"case_sets": {"s": [{"kind": "steady", "batch": 4}]}}, "either 'trace' or"),
        ({"case_sets": {"t": []}}, "unknown case set 's'"),
        ({"case_sets": {"s": [{**STATIC, "beams": 2, "top_p": 0.9}]}}, "'beams' of more than 1"),
        ({"case_sets": {"s": [{**STATIC, "beams": 2}]}}, "run 0: 'beams' is for the stack"),
    ],
)
def test_a_plan_that_makes_no_sense_names_the_field(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_plan(plan_file(tmp_path, **changes))


def test_an_unknown_model_lists_the_known() -> None:
    with pytest.raises(ConfigurationError, match=r"Did you mean llama-3.1-8b"):
        model_config("llama-3.1-8x")


def test_a_trace_is_ordered_cut_and_sped_up(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "arrival_seconds,input_tokens,output_tokens\n9,5,5\n4,10,2\n5,900,2\n7,20,3\n"
    )
    case = Case(
        kind="trace", trace="t.csv", arrivals="own", speed=2.0, first=2, max_total_tokens=100
    )
    requests = requests_of(case, tmp_path)
    assert requests.arrival_seconds.tolist() == [0.0, 1.5]
    assert requests.input_tokens.tolist() == [10, 20]
    assert requests.left_out == 1


@pytest.mark.parametrize("row", ["3,x,1", "3,1", "3,0,1", "nan,1,1"])
def test_a_bad_row_of_a_trace_is_named(tmp_path: Path, row: str) -> None:
    (tmp_path / "t.csv").write_text(f"arrival_seconds,input_tokens,output_tokens\n1,1,1\n{row}\n")
    with pytest.raises(TraceError, match=r"row 3, column"):
        requests_of(Case(kind="trace", trace="t.csv"), tmp_path)


def test_records_survive_a_torn_line_and_hold_plain_json(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    append_record(out, {"a": np.array([1, 2]), "b": float("nan"), "c": (np.float64(1.5), None)})
    with out.open("a") as file:
        file.write('{"torn":')
    append_record(out, {"d": Path("x")})
    lines = out.read_text().splitlines()
    assert json.loads(lines[0]) == {"a": [1, 2], "b": None, "c": [1.5, None]}
    assert json.loads(lines[-1]) == {"d": "x"}


# -- the driver -----------------------------------------------------------------------

CHILD = """
    import json, sys, time
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    word, deadline = sys.stdin.readline().split()
    assert word == "go" and float(deadline) > time.monotonic()
    with open(options["--out"], "a") as file:
        file.write(json.dumps({"kind": "done", "run": int(options["--engine"])}) + chr(10))
    if options["--engine"] == "0":
        %s
"""


@pytest.mark.parametrize(
    ("first_engine", "failed"), [("pass", 0), ("sys.exit(3)", 1), ("time.sleep(60)", 1)]
)
def test_an_engine_that_dies_or_hangs_leaves_the_rest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_engine: str, failed: int
) -> None:
    monkeypatch.setattr(serving, "GRACE_SECONDS", 1.0)
    plan = plan_file(tmp_path)
    raw = json.loads(plan.read_text())
    raw["runs"][1]["budget_seconds"] = 10
    raw["runs"][0]["budget_seconds"] = 1.5
    plan.write_text(json.dumps(raw))
    child = (sys.executable, "-c", textwrap.dedent(CHILD % first_engine))
    out = tmp_path / "o.jsonl"
    assert run_plan(plan, out, 12.5, child) == failed
    records = read_jsonl(out)
    assert [r["run"] for r in records if r["kind"] == "done"] == [0, 1]
    assert [r["run"] for r in records if r["kind"] == "exit"] == [0] * failed


def test_a_draft_model_gets_a_folder_with_its_shape(tmp_path: Path) -> None:
    drafting = {"method": "draft_model", "model": "llama-3.2-1b", "num_speculative_tokens": 4}
    given = serving_engine._with_draft_folder(drafting, tmp_path)
    config = json.loads((Path(given["model"]) / "config.json").read_text())
    assert config["num_hidden_layers"] == 16  # Llama-3.2-1B's published config
    assert given["num_speculative_tokens"] == 4
    assert serving_engine._with_draft_folder({"method": "ngram"}, tmp_path) == {"method": "ngram"}

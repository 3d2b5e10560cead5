"""The story of the package: requests in, joules out. Read this file first.

requests -> (arrivals, routing) -> simulate each replica -> energy by phase, operator, bin
                                                         -> the naive answers beside it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energymodel import naive
from energymodel.bins import EXACT_GRID, PAPER_GRID, bin_requests, ceil_to_paper
from energymodel.calibrations import Calibration, load_calibration
from energymodel.costs import CostTables, cost_tables, operator_joules
from energymodel.errors import CapacityError, ConfigurationError, TraceError, unknown_name
from energymodel.gpus import load_gpu
from energymodel.grids import load_grid_intensity
from energymodel.models import active_weight_count, load_model
from energymodel.operators import compute_dtype, request_flops
from energymodel.results import BinEnergy, Percentiles, Prediction
from energymodel.simulator import Simulation, simulate
from energymodel.specs import GpuSpec, ModelSpec, ServingConfig
from energymodel.traces import Requests
from energymodel.units import BYTES_PER_ELEMENT, GIB, JOULES_PER_KWH
from energymodel.workloads import load_requests

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

STACKS = ("vllm", "vllm-eager", "transformers")
DEFAULT_MODEL = "llama-3.1-8b"
DEFAULT_MAX_BATCH = 256
_WEIGHT_DTYPES = tuple(BYTES_PER_ELEMENT)
_KV_DTYPES = ("bf16", "fp16", "fp8")
_OVERLOAD_SECONDS = 600.0
_MOST_REPLICAS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    """Sums over replicas (or over the paper's batches); energies of whole GPU groups."""

    first_token_seconds: Array
    finish_seconds: Array
    request_joules: Array
    operators: Mapping[str, Mapping[str, float]]
    prefill_joules: float
    decode_joules: float
    idle_joules: float
    wait_joules: float
    wall_seconds: float
    busy_seconds: float
    steps: int
    preemptions: int
    throttled_seconds: float
    last_arrival_seconds: float


def predict(
    trace: str | Requests,
    *,
    gpu: str,
    model: str | ModelSpec = DEFAULT_MODEL,
    stack: str = "vllm",
    arrivals: str = "trace",
    replicas: int | str = 1,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    max_batch: int = DEFAULT_MAX_BATCH,
    max_step_tokens: int | None = None,
    max_model_len: int | None = None,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
    binning: str = "exact",
    pue: float = 1.0,
    grid: str | float | None = None,
    seed: int = 0,
    trace_format: str | None = None,
    strict: bool = False,
    calibration: str | None = None,
) -> Prediction:
    """Predict the energy of serving a trace.

    Parameters
    ----------
    trace : file, built-in workload name, `-` for stdin, or requests already read
    gpu : GPU name, alias or file; `model` : bundled name, config.json, folder or spec
    stack : one of `STACKS`
    arrivals : `trace`, `offline` (all at time 0) or `poisson:RATE` [requests/s]
    replicas : model instances that share the requests round robin, or `auto`
    max_batch, max_step_tokens, max_model_len : limits of the engine; None = vLLM's default
    dtype, kv_dtype : stored dtype of weights and KV cache (None = 16 bit)
    binning : `exact`, or `paper` for its ceiling bins and static accounting N/B x E_batch
    pue : facility energy over IT energy; grid : name or gCO2/kWh

    Raises
    ------
    EnergyModelError
        With a message for the user: what is wrong, where, and what to do.
    """
    gpu_spec = load_gpu(gpu)
    model_spec = load_model(model) if isinstance(model, str) else model
    fitted = load_calibration(calibration or gpu_spec.name)
    serving = _serving(
        gpu_spec,
        stack=stack,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        max_model_len=max_model_len,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
    if not np.isfinite(pue) or pue < 1.0:
        raise ConfigurationError(f"--pue {pue} is not a power usage effectiveness; it is >= 1")
    if binning not in ("exact", "paper"):
        raise ConfigurationError(unknown_name("binning", binning, ("exact", "paper")))
    intensity = None if grid is None else load_grid_intensity(str(grid))
    if isinstance(trace, str):
        requests = load_requests(trace, trace_format=trace_format, strict=strict, seed=seed)
    else:
        requests = trace
    requests = _with_arrivals(requests, arrivals, seed)
    warnings = _input_warnings(requests)

    excluded: dict[str, int] = {}
    if binning == "paper":
        inputs, outputs, left_out, excluded = ceil_to_paper(
            requests.input_tokens, requests.output_tokens
        )
        requests = replace(
            requests,
            arrival_seconds=requests.arrival_seconds[~left_out],
            input_tokens=inputs[~left_out],
            output_tokens=outputs[~left_out],
        )
        if sum(excluded.values()):
            detail = ", ".join(f"{count} {kind}" for kind, count in excluded.items() if count)
            warnings.append(f"the paper's binning leaves out requests: {detail}")
    _check_lengths(requests, model_spec, serving, warnings)
    costs = cost_tables(model_spec, serving, gpu_spec, fitted)
    _check_blocks(requests, costs)

    if binning == "paper":
        replica_count = 1
        served = _serve_paper(requests, costs, model_spec, serving, gpu_spec, fitted)
    else:
        replica_count = _replica_count(replicas, requests, costs, serving)
        served = _serve(requests, replica_count, costs, model_spec, serving, gpu_spec, fitted)
    warnings += _load_warnings(served, requests)
    return _prediction(
        requests=requests,
        served=served,
        model=model_spec,
        gpu=gpu_spec,
        serving=serving,
        calibration=fitted,
        replicas=replica_count,
        arrivals=arrivals,
        binning=binning,
        excluded=excluded,
        pue=pue,
        grams_per_kwh=None if intensity is None else intensity.grams_per_kwh,
        grid_source=None if intensity is None else f"{intensity.name}: {intensity.source}",
        seed=seed,
        warnings=warnings,
    )


def _serving(
    gpu: GpuSpec, *, stack: str, dtype: str, kv_dtype: str | None, **limits: Any
) -> ServingConfig:
    if stack not in STACKS:
        raise ConfigurationError(unknown_name("stack", stack, STACKS))
    if dtype not in _WEIGHT_DTYPES:
        raise ConfigurationError(unknown_name("dtype", dtype, _WEIGHT_DTYPES))
    if compute_dtype(dtype) not in gpu.peak_flops_per_s:
        known = [d for d in _WEIGHT_DTYPES if compute_dtype(d) in gpu.peak_flops_per_s]
        raise ConfigurationError(
            f"{gpu.title} does not compute in {compute_dtype(dtype)}, which --dtype {dtype} needs. "
            f"It can serve: {', '.join(known)}."
        )
    if kv_dtype is not None and kv_dtype not in _KV_DTYPES:
        raise ConfigurationError(unknown_name("KV dtype", kv_dtype, _KV_DTYPES))
    if limits["max_step_tokens"] is None:
        # vLLM 0.22, EngineArgs.get_batch_defaults, offline LLM class
        roomy = gpu.hbm_bytes >= 70 * GIB and not gpu.name.startswith("a100")
        limits["max_step_tokens"] = 16384 if roomy else 8192
    for name in ("tensor_parallel", "pipeline_parallel", "max_batch", "max_step_tokens"):
        if limits[name] < 1:
            option = name.replace("_", "-")
            raise ConfigurationError(f"--{option} {limits[name]} makes no sense; it is at least 1")
    if limits["max_step_tokens"] < limits["max_batch"]:
        raise ConfigurationError(
            f"--max-step-tokens {limits['max_step_tokens']} is below --max-batch "
            f"{limits['max_batch']}: every running sequence needs a token of the step's budget"
        )
    return ServingConfig(
        stack=stack,  # type: ignore[arg-type]
        weight_dtype=dtype,
        kv_dtype=kv_dtype or "bf16",
        **limits,
    )


def _with_arrivals(requests: Requests, arrivals: str, seed: int) -> Requests:
    n = len(requests.input_tokens)
    if arrivals == "trace":
        return requests
    if arrivals == "offline":
        return replace(requests, arrival_seconds=np.zeros(n))
    kind, _, rate_text = arrivals.partition(":")
    try:
        rate = float(rate_text)
    except ValueError:
        rate = -1.0
    if kind != "poisson" or not np.isfinite(rate) or rate <= 0:
        raise ConfigurationError(
            f"--arrivals {arrivals} is not understood; it is trace, offline or poisson:RATE "
            "with RATE in requests per second, e.g. poisson:2.5"
        )
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, n)
    return replace(requests, arrival_seconds=np.cumsum(gaps) - gaps[0])


def _input_warnings(requests: Requests) -> list[str]:
    return [
        f"{d.count} rows {d.kind} (first at line {', '.join(map(str, d.first_lines))})"
        for d in requests.dropped
    ]


def _check_lengths(
    requests: Requests, model: ModelSpec, serving: ServingConfig, warnings: list[str]
) -> None:
    limit = serving.max_model_len or model.max_model_len
    if limit > model.max_model_len:
        warnings.append(
            f"--max-model-len {limit} exceeds the {model.max_model_len} tokens {model.name} allows"
        )
    total = requests.input_tokens + requests.output_tokens
    if len(total) == 0:
        raise TraceError(f"{requests.name}: no request is left to serve")
    over = np.flatnonzero(total > limit)
    if len(over):
        worst = int(over[np.argmax(total[over])])
        raise TraceError(
            f"{requests.name}: {len(over)} of {len(total)} requests are longer than the {limit} "
            f"tokens that {model.name} is served with (the longest: request {worst + 1}, "
            f"{requests.input_tokens[worst]} input + {requests.output_tokens[worst]} output "
            f"tokens). Use a model with a longer context, drop those rows, or set --max-model-len "
            f"{int(total.max())} to compute it all the same."
        )


def _check_blocks(requests: Requests, costs: CostTables) -> None:
    _, _, blocks, block, _ = costs.config
    total = requests.input_tokens + requests.output_tokens
    if (longest := int(total.max())) > blocks * block:
        raise CapacityError(
            f"{requests.name}: the longest request ({longest} tokens) does not fit the "
            f"{blocks * block} tokens of KV cache beside the weights; raise --tensor-parallel "
            "or use --kv-dtype fp8"
        )


def _replica_count(
    replicas: int | str, requests: Requests, costs: CostTables, serving: ServingConfig
) -> int:
    """The number asked for, checked to keep up with the arrivals; `auto` finds the least."""
    if replicas != "auto":
        try:
            count = int(replicas)
        except ValueError:
            count = 0
        if not 1 <= count <= _MOST_REPLICAS:
            raise ConfigurationError(
                f"--replicas {replicas} makes no sense; it is auto or 1 to {_MOST_REPLICAS}"
            )
        if not _keeps_up(count, requests, costs, serving):
            enough = _least_replicas(count * 2, requests, costs, serving)
            raise CapacityError(
                f"{requests.name}: {count} replica{'s' if count > 1 else ''} cannot keep up with "
                f"the arrivals (requests would wait without end); about {enough} would. Use "
                f"--replicas {enough} or --replicas auto, or --arrivals offline to ignore arrival "
                "times."
            )
        return count
    return _least_replicas(1, requests, costs, serving)


def _least_replicas(
    start: int, requests: Requests, costs: CostTables, serving: ServingConfig
) -> int:
    high = start
    while not _keeps_up(high, requests, costs, serving):
        high *= 2
        if high > _MOST_REPLICAS:
            raise CapacityError(f"{requests.name}: even {_MOST_REPLICAS} replicas cannot keep up")
    low = high // 2 if high > 1 else 0
    while high - low > 1:
        middle = (low + high) // 2
        if _keeps_up(middle, requests, costs, serving):
            high = middle
        else:
            low = middle
    return high


def _keeps_up(count: int, requests: Requests, costs: CostTables, serving: ServingConfig) -> bool:
    """Whether no request of the first replica waits longer for admission than is bearable.

    Bearable is the trace's own duration, but at least ten minutes: beyond it the backlog only
    grows. Offline traces always keep up.
    """
    duration = float(requests.arrival_seconds[-1])
    if duration == 0.0 or serving.stack == "transformers":
        return True
    pick = slice(0, None, count)
    patience = max(duration, _OVERLOAD_SECONDS)
    served = simulate(
        requests.arrival_seconds[pick],
        requests.input_tokens[pick],
        requests.output_tokens[pick],
        costs,
        abandon_seconds=patience,
    )
    return served is not None


def _serve(
    requests: Requests,
    replicas: int,
    costs: CostTables,
    model: ModelSpec,
    serving: ServingConfig,
    gpu: GpuSpec,
    calibration: Calibration,
) -> _Served:
    """Simulate every replica on its round-robin share of the requests and add them up."""
    n = len(requests.input_tokens)
    first, finish, joules = np.zeros(n), np.zeros(n), np.zeros(n)
    runs: list[Simulation] = []
    for index in range(min(replicas, n)):
        pick = slice(index, None, replicas)
        run = simulate(
            requests.arrival_seconds[pick],
            requests.input_tokens[pick],
            requests.output_tokens[pick],
            costs,
            static_batches=serving.stack == "transformers",
        )
        if run is None:
            raise CapacityError(f"{requests.name}: a request can never be scheduled")
        first[pick], finish[pick] = run.first_token_seconds, run.finish_seconds
        joules[pick] = run.request_joules
        runs.append(run)
    wall = float(finish.max())
    busy = sum(r.totals["gpu_seconds"] + r.totals["wait_seconds"] for r in runs)
    # replicas that never see a request idle as well
    idle_seconds = wall * replicas - busy
    return _sum_up(
        runs,
        weights=np.ones(len(runs)),
        first_token_seconds=first,
        finish_seconds=finish,
        request_joules=joules,
        wall_seconds=wall,
        idle_seconds=idle_seconds,
        last_arrival=float(requests.arrival_seconds[-1]),
        model=model,
        serving=serving,
        gpu=gpu,
        calibration=calibration,
    )


def _serve_paper(
    requests: Requests,
    costs: CostTables,
    model: ModelSpec,
    serving: ServingConfig,
    gpu: GpuSpec,
    calibration: Calibration,
) -> _Served:
    """The paper's accounting: each cell runs N/B full batches, B the largest that fits.

    Section 4.1: E = sum over cells of N / B x E_batch, batches one after another, N/B not
    rounded.
    """
    n = len(requests.input_tokens)
    first, finish, joules = np.zeros(n), np.zeros(n), np.zeros(n)
    runs: list[Simulation] = []
    weights: list[float] = []
    max_batch, _, blocks, block, _ = costs.config
    cells = np.stack([requests.input_tokens, requests.output_tokens], axis=1)
    for input_tokens, output_tokens in np.unique(cells, axis=0):
        members = np.flatnonzero((cells == (input_tokens, output_tokens)).all(axis=1))
        length = int(input_tokens + output_tokens)
        batch = max(1, min(max_batch, blocks // -(-length // block)))
        run = simulate(
            np.zeros(batch),
            np.full(batch, input_tokens),
            np.full(batch, output_tokens),
            costs,
            static_batches=serving.stack == "transformers",
        )
        if run is None:
            raise CapacityError(f"a batch of {batch} x {length} tokens can never be scheduled")
        share = len(members) / batch
        runs.append(run)
        weights.append(share)
        first[members] = run.first_token_seconds.mean()
        finish[members] = run.finish_seconds.mean()
        joules[members] = run.request_joules.mean()
    scale = np.array(weights)
    wall = float(sum(w * r.totals["now"] for w, r in zip(scale, runs, strict=True)))
    return _sum_up(
        runs,
        weights=scale,
        first_token_seconds=first,
        finish_seconds=finish,
        request_joules=joules,
        wall_seconds=wall,
        idle_seconds=0.0,
        last_arrival=0.0,
        model=model,
        serving=serving,
        gpu=gpu,
        calibration=calibration,
    )


def _sum_up(
    runs: list[Simulation],
    *,
    weights: Array,
    first_token_seconds: Array,
    finish_seconds: Array,
    request_joules: Array,
    wall_seconds: float,
    idle_seconds: float,
    last_arrival: float,
    model: ModelSpec,
    serving: ServingConfig,
    gpu: GpuSpec,
    calibration: Calibration,
) -> _Served:
    group = float(serving.tensor_parallel * serving.pipeline_parallel)

    def total(name: str) -> float:
        return float(weights @ np.array([r.totals[name] for r in runs]))

    def sums(name: str) -> Array:
        result: Array = sum(
            (w * getattr(r, name) for w, r in zip(weights, runs, strict=True)),
            start=np.zeros_like(getattr(runs[0], name)),
        )
        return result

    operators = operator_joules(
        model,
        serving,
        gpu,
        calibration,
        token_steps=sums("token_steps"),
        row_steps=sums("row_steps"),
        attention_sums=sums("attention_sums"),
        phase_steps=sums("phase_steps"),
    )
    wait = calibration.base_watts * (total("wait_seconds") + total("stretch_seconds"))
    prefill, decode = total("prefill_joules"), total("decode_joules")
    # under the power limit a jump's operator sums are products of means: close the sum exactly
    counted = sum(sum(parts.values()) for parts in operators.values())
    closing = (prefill + decode - wait) / counted
    idle_watts = (
        calibration.context_idle_watts
        if serving.stack == "transformers"
        else calibration.polling_idle_watts
    )
    return _Served(
        first_token_seconds=first_token_seconds,
        finish_seconds=finish_seconds,
        request_joules=request_joules * group,
        operators={
            name: {part: value * closing * group for part, value in parts.items()}
            for name, parts in operators.items()
        },
        prefill_joules=prefill * group,
        decode_joules=decode * group,
        idle_joules=max(idle_seconds, 0.0) * idle_watts * group,
        wait_joules=wait * group,
        wall_seconds=wall_seconds,
        busy_seconds=total("gpu_seconds") + total("wait_seconds"),
        steps=round(total("steps")),
        preemptions=round(total("preemptions")),
        throttled_seconds=total("throttled_seconds"),
        last_arrival_seconds=last_arrival,
    )


def _load_warnings(served: _Served, requests: Requests) -> list[str]:
    warnings = []
    drain = served.wall_seconds - served.last_arrival_seconds
    if served.last_arrival_seconds > 0 and drain > 0.1 * served.last_arrival_seconds + 30.0:
        warnings.append(
            f"overloaded: the last request arrives at {served.last_arrival_seconds:.0f} s, the "
            f"last token leaves at {served.wall_seconds:.0f} s; more replicas would shorten the "
            "queue"
        )
    if served.preemptions:
        warnings.append(
            f"{served.preemptions} preemptions: the KV cache is full at times and prompts are "
            "computed again"
        )
    return warnings


def _percentiles(values: Array) -> Percentiles:
    if len(values) == 0:
        return Percentiles(p50=0.0, p90=0.0, p99=0.0)
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return Percentiles(p50=float(p50), p90=float(p90), p99=float(p99))


def _prediction(
    *,
    requests: Requests,
    served: _Served,
    model: ModelSpec,
    gpu: GpuSpec,
    serving: ServingConfig,
    calibration: Calibration,
    replicas: int,
    arrivals: str,
    binning: str,
    excluded: dict[str, int],
    pue: float,
    grams_per_kwh: float | None,
    grid_source: str | None,
    seed: int,
    warnings: list[str],
) -> Prediction:
    active = served.prefill_joules + served.decode_joules
    energy = active + served.idle_joules
    interval = calibration.intervals[serving.stack]
    gpus = replicas * serving.tensor_parallel * serving.pipeline_parallel
    inputs, outputs = requests.input_tokens, requests.output_tokens
    flops, output_flops = request_flops(model, inputs.astype(float), outputs.astype(float))
    peak = gpu.peak_flops_per_s[compute_dtype(serving.weight_dtype)]
    by_request = naive.flops_tdp_joules(flops, tdp_watts=gpu.tdp_watts, peak_flops_per_s=peak)
    estimates = _naive_joules(
        flops=flops,
        output_flops=output_flops,
        output_tokens=outputs,
        served=served,
        model=model,
        gpu=gpu,
        peak_flops_per_s=peak,
        replicas=replicas,
        group=gpus // replicas,
    )
    components = {"base": 0.0, "flops": 0.0, "onchip": 0.0, "hbm": 0.0, "link": 0.0}
    for parts in served.operators.values():
        for part, value in parts.items():
            components[part] += value
    components |= {"host_wait": served.wait_joules, "idle": served.idle_joules}
    by_operator = {name: sum(parts.values()) for name, parts in served.operators.items()}
    by_operator |= {"host_wait": served.wait_joules, "idle": served.idle_joules}
    arrival = requests.arrival_seconds if binning == "exact" else np.zeros(len(inputs))
    several = outputs > 1
    tpot = (served.finish_seconds - served.first_token_seconds)[several] / (outputs[several] - 1)
    return Prediction(
        inputs={
            "trace": requests.name,
            "trace_format": requests.trace_format,
            "trace_source": requests.source,
            "gpu": gpu.name,
            "model": model.name,
            "stack": serving.stack,
            "arrivals": arrivals,
            "replicas": replicas,
            "tensor_parallel": serving.tensor_parallel,
            "pipeline_parallel": serving.pipeline_parallel,
            "max_batch": serving.max_batch,
            "max_step_tokens": serving.max_step_tokens,
            "max_model_len": serving.max_model_len or model.max_model_len,
            "dtype": serving.weight_dtype,
            "kv_dtype": serving.kv_dtype,
            "binning": binning,
            "pue": pue,
            "grid_grams_per_kwh": grams_per_kwh,
            "seed": seed,
        },
        requests=len(inputs),
        input_tokens=int(inputs.sum()),
        output_tokens=int(outputs.sum()),
        energy_joules=energy,
        energy_joules_low=energy * interval.low,
        energy_joules_high=energy * interval.high,
        interval_level=interval.level,
        active_joules=active,
        idle_joules=served.idle_joules,
        prefill_joules=served.prefill_joules,
        decode_joules=served.decode_joules,
        by_component_joules=components,
        by_operator_joules=dict(sorted(by_operator.items(), key=lambda item: -item[1])),
        wall_seconds=served.wall_seconds,
        busy_seconds=served.busy_seconds,
        average_watts=energy / served.wall_seconds,
        gpus=gpus,
        replicas=replicas,
        joules_per_request=energy / len(inputs),
        joules_per_output_token=energy / int(outputs.sum()),
        naive={f"{name}_joules": value for name, value in estimates.items()},
        underestimate_factor={name: energy / value for name, value in estimates.items()},
        naive_explanations={name: naive.EXPLANATIONS[name] for name in estimates},
        ttft_seconds=_percentiles(served.first_token_seconds - arrival),
        tpot_seconds=_percentiles(tpot),
        e2e_seconds=_percentiles(served.finish_seconds - arrival),
        steps=served.steps,
        preemptions=served.preemptions,
        facility_joules=energy * pue,
        carbon_grams=None
        if grams_per_kwh is None
        else energy * pue / JOULES_PER_KWH * grams_per_kwh,
        bins=_bins(requests, served, by_request, energy, interval.low, interval.high, binning),
        excluded_requests=excluded,
        provenance={
            "origin": calibration.origin,
            "interval_basis": interval.basis,
            "calibration": dict(calibration.provenance),
            "gpu_sources": dict(gpu.sources),
            "model_source": model.source,
            "grid_source": grid_source,
            "throttled_seconds": served.throttled_seconds,
        },
        warnings=tuple(warnings),
    )


def _naive_joules(
    *,
    flops: Array,
    output_flops: Array,
    output_tokens: Ints,
    served: _Served,
    model: ModelSpec,
    gpu: GpuSpec,
    peak_flops_per_s: float,
    replicas: int,
    group: int,
) -> dict[str, float]:
    """The naive answers by rule [J]; rules that need time are given the simulated time."""
    rules = naive.load_naive_rules()
    datasheet = {"tdp_watts": gpu.tdp_watts, "peak_flops_per_s": peak_flops_per_s}
    held = served.wall_seconds * replicas
    joules = {
        "flops_tdp": naive.flops_tdp_joules(flops.sum(), **datasheet),
        "output_flops_tdp": naive.flops_tdp_joules(output_flops.sum(), **datasheet),
        "tdp_time": naive.tdp_time_joules(held, tdp_watts=gpu.tdp_watts, num_gpus=group),
        "ecologits": naive.ecologits_joules(
            output_tokens.sum(),
            active_parameters=float(active_weight_count(model)),
            rule=rules.ecologits,
            num_gpus=group,
        ),
    }
    watts = naive.vidur_board_watts(rules.vidur_energy, gpu)
    if watts is not None:
        joules["vidur_energy"] = naive.vidur_energy_joules(
            flops.sum(),
            held,
            peak_flops_per_s=peak_flops_per_s,
            idle_watts=watts[0],
            max_watts=watts[1],
            rule=rules.vidur_energy,
            num_gpus=group,
        )
    return {name: float(value) for name, value in joules.items()}


def _bins(
    requests: Requests,
    served: _Served,
    naive_joules: Array,
    energy: float,
    low: float,
    high: float,
    binning: str,
) -> tuple[BinEnergy, ...]:
    """Energy by bin; idle energy is shared out in proportion to active energy."""
    grid = EXACT_GRID if binning == "exact" else PAPER_GRID
    binned = bin_requests(requests.input_tokens, requests.output_tokens, grid)
    active = served.request_joules
    scale = energy / active.sum()
    rows = []
    for index in range(len(binned.requests)):
        members = binned.bin_index == index
        joules = float(active[members].sum())
        naive_bin = float(naive_joules[members].sum())
        count = int(binned.requests[index])
        rows.append(
            BinEnergy(
                input_low=int(binned.input_low[index]),
                input_high=int(binned.input_high[index]),
                output_low=int(binned.output_low[index]),
                output_high=int(binned.output_high[index]),
                requests=count,
                input_tokens=int(requests.input_tokens[members].sum()),
                output_tokens=int(requests.output_tokens[members].sum()),
                mean_input_tokens=float(binned.mean_input[index]),
                mean_output_tokens=float(binned.mean_output[index]),
                energy_joules=joules * scale,
                energy_joules_low=joules * scale * low,
                energy_joules_high=joules * scale * high,
                active_joules=joules,
                joules_per_request=joules * scale / count,
                naive_flops_tdp_joules=naive_bin,
                underestimate_factor=joules * scale / naive_bin,
            )
        )
    return tuple(rows)

"""One setting of a deployment, and what it costs to serve a trace with it.

A `Setting` is a point of a grid over GPU, model, engine options, replicas, load and site.
`evaluate` turns it into a `Point`: estimated in steady states (`binned`), or simulated (`exact`).
A setting that makes no sense or cannot keep up becomes a point with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energymodel.accounting import energy_parts
from energymodel.calibrations import Calibration, load_calibration
from energymodel.costs import of_group
from energymodel.deployment import Deployment, deploy
from energymodel.disaggregation import serve_disaggregated
from energymodel.errors import (
    CapacityError,
    ConfigurationError,
    EnergyModelError,
    TraceError,
)
from energymodel.fleet import Fleet, LatencyHistogram
from energymodel.gpus import load_gpu
from energymodel.grids import load_grid_intensity
from energymodel.prefix import cached_share, with_prefixes
from energymodel.replicas import serve_on_replicas
from energymodel.settings import Setting, deployment_key, only_exact
from energymodel.specs import ServingConfig
from energymodel.steady_state import BinnedTrace, Estimate, estimate
from energymodel.traces import Requests, read_batches
from energymodel.units import JOULES_PER_KWH

Array = NDArray[np.float64]

MODES = ("binned", "exact")
_PERCENTILES = ("p50", "p90", "p99")
_MOST_REPLICAS = 65536
_HOPELESS_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """A trace in both forms, and the prices that costs are counted with."""

    binned: BinnedTrace
    requests: Requests | None
    """None where the trace is too long to be held; it is then read again for every simulation."""
    output_tokens: int
    prices: Mapping[str, float]
    """By canonical GPU name [USD per GPU and hour]."""
    max_model_len: int | None = None
    calibration: str | None = None
    """Calibration file in place of the GPUs' own."""
    path: str = ""
    """File to read piece by piece where `requests` is None."""
    trace_format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A setting and what it costs. Energies of GPU boards [J]; None = not known."""

    setting: Setting
    mode: str
    """`binned` or `exact`."""
    reason: str = ""
    """Why the setting cannot be served; empty where it can."""
    replicas: int | None = None
    gpus: int | None = None
    energy_joules: float | None = None
    energy_joules_low: float | None = None
    energy_joules_high: float | None = None
    active_joules: float | None = None
    idle_joules: float | None = None
    joules_per_request: float | None = None
    joules_per_output_token: float | None = None
    wall_seconds: float | None = None
    average_watts: float | None = None
    ttft_seconds: Mapping[str, float] = field(default_factory=dict)
    tpot_seconds: Mapping[str, float] = field(default_factory=dict)
    usd: float | None = None
    """Rent of the GPUs from the first arrival to the last completion."""
    carbon_grams: float | None = None
    by_component_joules: Mapping[str, float] = field(default_factory=dict)
    """Exact points only."""
    origin: str = ""
    """What the calibration rests on."""

    @property
    def served(self) -> bool:
        """Whether the setting can serve the trace."""
        return not self.reason

    def row(self) -> dict[str, Any]:
        """One flat row for CSV and Parquet."""
        found = asdict(self.setting)
        found["replicas_asked"] = str(found.pop("replicas"))
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("setting", "by_component_joules"):
                continue
            if f.name in ("ttft_seconds", "tpot_seconds"):
                for p in _PERCENTILES:
                    found[f"{f.name.removesuffix('_seconds')}_{p}_seconds"] = value.get(p)
            else:
                found[f.name] = value
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Point:
        """The inverse of `to_dict`."""
        return cls(**{**values, "setting": Setting(**values["setting"])})


def evaluate(setting: Setting, workload: Workload, mode: str) -> Point:
    """What it costs to serve the workload with a setting.

    Parameters
    ----------
    setting : Setting
    workload : Workload
    mode : `binned` (estimated) or `exact` (simulated); static batches are always simulated

    Returns
    -------
    Point
        With `reason` set where the setting is refused or cannot keep up.
    """
    if only_exact(setting):
        mode = "exact"
    try:
        _check_site(setting)
        if mode == "binned":
            return _estimated(setting, workload, deployment_of(setting, workload))
        if workload.requests is None:
            return _streamed(setting, workload)
        point, _, _ = simulated(setting, workload)
    except EnergyModelError as error:
        return Point(setting=setting, mode=mode, reason=str(error))
    return point


def deployment_of(setting: Setting, workload: Workload) -> Deployment:
    """What serves the workload under a setting; kept for settings that share it."""
    return _deployment(deployment_key(setting), workload.max_model_len, workload.calibration)


def prefill_deployment(setting: Setting, workload: Workload) -> Deployment:
    """What computes prompts, where replicas of their own do."""
    return deployment_of(replace(setting, gpu=setting.prefill_gpu or setting.gpu), workload)


def _check_site(setting: Setting) -> None:
    if not 1.0 <= setting.pue <= 10.0:
        raise ConfigurationError(f"--pue {setting.pue:g} is outside 1 to 10")
    if not 0.0 < setting.arrival_scale < np.inf:
        raise ConfigurationError(f"--arrival-scale {setting.arrival_scale:g} is not above 0")
    if setting.prefill_replicas < 0:
        raise ConfigurationError(f"--prefill-replicas {setting.prefill_replicas} is 0 or more")
    if setting.prefill_replicas and setting.replicas == "auto":
        raise ConfigurationError(
            "--prefill-replicas needs a number of --replicas, those that decode; auto is for "
            "replicas that do both"
        )
    if setting.prefill_gpu is not None and not setting.prefill_replicas:
        raise ConfigurationError("--prefill-gpu needs --prefill-replicas, how many of them")


@lru_cache(maxsize=64)
def _grams_per_kwh(grid: str) -> float:
    return load_grid_intensity(grid).grams_per_kwh


@lru_cache(maxsize=16)
def _deployment(key: Setting, max_model_len: int | None, calibration: str | None) -> Deployment:
    gpu = load_gpu(key.gpu)
    fitted: str | Calibration | None = calibration
    if key.power_limit_watts is not None:
        loaded = load_calibration(calibration or gpu.name)
        group = ServingConfig(
            tensor_parallel=key.tensor_parallel, pipeline_parallel=key.pipeline_parallel
        )
        base_watts = of_group(loaded, group).base_watts
        fitted = _limited(loaded, key.power_limit_watts, gpu.tdp_watts, base_watts)
    return deploy(
        gpu=gpu,
        model=key.model,
        stack=key.stack,
        tensor_parallel=key.tensor_parallel,
        pipeline_parallel=key.pipeline_parallel,
        max_batch=key.max_batch,
        max_step_tokens=key.max_step_tokens,
        max_model_len=max_model_len,
        gpu_memory_utilization=key.gpu_memory_utilization,
        dtype=key.dtype,
        kv_dtype=key.kv_dtype,
        calibration=fitted,
    )


def _limited(
    calibration: Calibration, watts: float, tdp_watts: float, base_watts: float
) -> Calibration:
    """The calibration under a board power limit, as `nvidia-smi --power-limit` sets it."""
    lowest = base_watts + 20.0
    if not lowest <= watts <= tdp_watts:
        raise ConfigurationError(
            f"--power-limit {watts:g} W is outside what the board can keep: it draws "
            f"{base_watts:.0f} W before it computes anything, and at most "
            f"{tdp_watts:.0f} W; give {lowest:.0f} to {tdp_watts:.0f}"
        )
    return replace(calibration, power_cap_watts=min(watts, calibration.power_cap_watts))


def _estimated(setting: Setting, workload: Workload, deployment: Deployment) -> Point:
    trace = workload.binned
    if trace.longest_tokens > deployment.max_model_len:
        raise TraceError(
            f"a request of {trace.longest_tokens} tokens is longer than the "
            f"{deployment.max_model_len} tokens that {deployment.model.name} is served with"
        )
    count = _count(setting, workload, deployment)
    duration = trace.duration_seconds / setting.arrival_scale
    load = _load(setting, workload)
    found = estimate(trace, deployment, count, **load)
    if found.waiting_seconds > max(duration, _HOPELESS_SECONDS):
        raise CapacityError(f"{count} replicas cannot keep up with the arrivals")
    return _point(
        setting,
        workload,
        deployment,
        count,
        mode="binned",
        active=found.active_joules,
        idle=found.idle_joules,
        wall=found.wall_seconds,
        ttft=found.ttft_seconds,
        tpot=found.tpot_seconds,
        components={},
    )


def _load(setting: Setting, workload: Workload) -> dict[str, float]:
    hit = setting.prefix_hit
    if hit == "trace":
        hit = 0.0 if workload.requests is None else cached_share(workload.requests)
    return {"arrival_scale": setting.arrival_scale, "prefix_hit": float(hit)}


def _count(setting: Setting, workload: Workload, deployment: Deployment) -> int:
    """Replicas asked for; for `auto` the fewest that the estimate says keep up."""
    if setting.replicas != "auto":
        return _whole(setting.replicas)
    patience = 30.0 + 0.1 * workload.binned.duration_seconds / setting.arrival_scale
    return _fewest(workload.binned, deployment, _load(setting, workload), patience)


def _fewest(
    trace: BinnedTrace, deployment: Deployment, load: Mapping[str, float], patience: float
) -> int:
    def keep_up(count: int) -> bool:
        found: Estimate = estimate(trace, deployment, count, **load)
        return found.waiting_seconds <= patience

    low, high = 0, 1
    while not keep_up(high):
        if high >= _MOST_REPLICAS:
            raise CapacityError(f"even {high} replicas cannot keep up with the arrivals")
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keep_up(middle) else (middle, high)
    return high


def _whole(replicas: int | str) -> int:
    if not isinstance(replicas, int) or not 1 <= replicas <= _MOST_REPLICAS:
        raise ConfigurationError(
            f"--replicas {replicas} makes no sense; it is auto or 1 to {_MOST_REPLICAS}"
        )
    return replicas


def simulated(setting: Setting, workload: Workload) -> tuple[Point, Array, Array]:
    """The exact point of a setting, and every request's TTFT and TPOT [s].

    TPOT is of the requests of more than one output token. Raises what `predict` raises.
    """
    if workload.requests is None:
        raise ConfigurationError("the trace is too long to be held at once")
    deployment = deployment_of(setting, workload)
    requests = with_prefixes(workload.requests, setting.prefix_hit, deployment.serving)
    requests = replace(requests, arrival_seconds=requests.arrival_seconds / setting.arrival_scale)
    _check_lengths(workload, deployment)
    if setting.prefill_replicas:
        count = _whole(setting.replicas)
        prefill = prefill_deployment(setting, workload)
        _check_lengths(workload, prefill)
        served = serve_disaggregated(requests, prefill, setting.prefill_replicas, deployment, count)
    else:
        served, count = serve_on_replicas(requests, setting.replicas, deployment)
    several = requests.output_tokens > 1
    decoding = (served.finish_seconds - served.first_token_seconds)[several]
    ttft = served.first_token_seconds - requests.arrival_seconds
    tpot = decoding / (requests.output_tokens[several] - 1)
    point = _point(
        setting,
        workload,
        deployment,
        count,
        mode="exact",
        active=served.prefill_joules + served.decode_joules,
        idle=served.idle_joules,
        wall=served.wall_seconds,
        ttft=percentiles(ttft),
        tpot=percentiles(tpot),
        components=energy_parts(served)[0],
        slow_host_joules=served.slow_host_joules,
    )
    return point, ttft, tpot


def _check_lengths(workload: Workload, deployment: Deployment) -> None:
    longest = workload.binned.longest_tokens
    if longest > deployment.max_model_len:
        raise TraceError(
            f"a request of {longest} tokens is longer than the {deployment.max_model_len} tokens "
            f"that {deployment.model.name} is served with"
        )
    if longest > deployment.kv_tokens:
        raise CapacityError(
            f"a request of {longest} tokens does not fit the KV cache of {deployment.kv_tokens} "
            "tokens"
        )


def _streamed(setting: Setting, workload: Workload) -> Point:
    """The exact point of a trace that is read piece by piece; latencies are rounded to 1 %."""
    if setting.prefill_replicas or setting.prefix_hit != 0.0:
        raise ConfigurationError(
            "prefix caching and pools for prefill need a trace that can be held at once"
        )
    deployment = deployment_of(setting, workload)
    _check_lengths(workload, deployment)
    count = _count(setting, workload, deployment)
    fleet = Fleet(deployment, count)
    for piece in read_batches(workload.path, trace_format=workload.trace_format):
        arrivals = piece.arrival_seconds / setting.arrival_scale
        fleet.serve(arrivals, piece.input_tokens, piece.output_tokens)
    served = fleet.finish()

    def latency(histogram: LatencyHistogram) -> dict[str, float]:
        found = {p: histogram.percentile(float(p[1:])) for p in _PERCENTILES}
        return {p: value for p, value in found.items() if value is not None}

    return _point(
        setting,
        workload,
        deployment,
        count,
        mode="exact",
        active=served.active_joules,
        idle=served.idle_joules,
        wall=served.wall_seconds,
        ttft=latency(served.ttft),
        tpot=latency(served.tpot),
        components=served.by_component_joules,
    )


def percentiles(seconds: Array) -> dict[str, float]:
    """p50, p90 and p99; empty without values."""
    if seconds.size == 0:
        return {}
    found = np.percentile(seconds, [50, 90, 99]).tolist()
    return dict(zip(_PERCENTILES, found, strict=True))


def _point(
    setting: Setting,
    workload: Workload,
    deployment: Deployment,
    replicas: int,
    *,
    mode: str,
    active: float,
    idle: float,
    wall: float,
    ttft: Mapping[str, float],
    tpot: Mapping[str, float],
    components: Mapping[str, float],
    slow_host_joules: float = 0.0,
) -> Point:
    energy = active + idle
    pools = [(deployment, replicas)]
    if setting.prefill_replicas:
        pools.append((prefill_deployment(setting, workload), setting.prefill_replicas))
    # of pools on different GPUs the total lies within the wider interval of the two
    intervals = [
        pool.calibration.intervals[pool.serving.stack].with_host(slow_host_joules / energy)
        for pool, _ in pools
    ]
    boards = [(pool.gpu.name, count * pool.gpus_per_replica) for pool, count in pools]
    usd = None
    if all(gpu in workload.prices for gpu, _ in boards):
        usd = sum(workload.prices[gpu] * count for gpu, count in boards) * wall / 3600.0
    carbon = None
    if setting.grid is not None:
        carbon = energy * setting.pue / JOULES_PER_KWH * _grams_per_kwh(setting.grid)
    return Point(
        setting=setting,
        mode=mode,
        replicas=replicas,
        gpus=sum(count for _, count in boards),
        energy_joules=energy,
        energy_joules_low=energy * min(interval.low for interval in intervals),
        energy_joules_high=energy * max(interval.high for interval in intervals),
        active_joules=active,
        idle_joules=idle,
        joules_per_request=energy / workload.binned.total_requests,
        joules_per_output_token=energy / workload.output_tokens,
        wall_seconds=wall,
        average_watts=energy / wall,
        ttft_seconds=dict(ttft),
        tpot_seconds=dict(tpot),
        usd=usd,
        carbon_grams=carbon,
        by_component_joules=dict(components),
        origin=", ".join(dict.fromkeys(pool.calibration.origin for pool, _ in pools)),
    )

"""Assembles the result: what was served, beside the naive answers, by bin, with its origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energymodel import __version__, naive
from energymodel.accounting import Served, energy_parts
from energymodel.bins import EXACT_GRID, PAPER_GRID, bin_requests
from energymodel.calibrations import IntervalCalibration
from energymodel.deployment import Deployment
from energymodel.grids import GridIntensity
from energymodel.models import active_weight_count
from energymodel.operator_parts import compute_dtype
from energymodel.operators import request_flops
from energymodel.prices import ElectricityPrice
from energymodel.results import BinEnergy, OperatorWork, Percentiles, Prediction, Speculation
from energymodel.traces import Requests
from energymodel.units import JOULES_PER_KWH

Array = NDArray[np.float64]


def assemble(
    requests: Requests,
    served: Served,
    deployment: Deployment,
    *,
    replicas: int,
    arrivals: str,
    prefix_hit: float | str,
    binning: str,
    excluded: Mapping[str, int],
    pue: float,
    grid: GridIntensity | None,
    electricity: ElectricityPrice | None,
    seed: int,
    warnings: Sequence[str],
    speculation: Speculation | None = None,
) -> Prediction:
    """The public result of a served workload; arguments as in `workload.predict`."""
    active = served.prefill_joules + served.decode_joules
    energy = active + served.idle_joules
    calibration = deployment.calibration
    interval = calibration.intervals[deployment.serving.stack].with_host(
        served.slow_host_joules / energy
    )
    inputs, outputs = requests.input_tokens, requests.output_tokens
    flops, output_flops = request_flops(
        deployment.model, inputs.astype(float), outputs.astype(float)
    )
    estimates = _naive_joules(flops, output_flops, outputs, served, deployment, replicas)
    several = outputs > 1
    decoding = (served.finish_seconds - served.first_token_seconds)[several]
    components, operators = energy_parts(served)
    facility_kwh = energy * pue / JOULES_PER_KWH
    return Prediction(
        inputs=_inputs(requests, deployment, replicas, arrivals, prefix_hit, binning, seed)
        | {
            "pue": pue,
            "grid_grams_per_kwh": None if grid is None else grid.grams_per_kwh,
            "electricity_usd_per_kwh": None if electricity is None else electricity.usd_per_kwh,
        },
        requests=inputs.size,
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
        by_operator_joules=operators,
        operator_work={name: OperatorWork(**work) for name, work in served.work.items()},
        peak_flops_per_s=_peak_flops_per_s(deployment),
        hbm_bytes_per_s=deployment.gpu.hbm_bytes_per_s,
        timeline=served.timeline,
        wall_seconds=served.wall_seconds,
        busy_seconds=served.busy_seconds,
        average_watts=energy / served.wall_seconds,
        gpus=replicas * deployment.gpus_per_replica,
        replicas=replicas,
        joules_per_request=energy / inputs.size,
        joules_per_output_token=energy / int(outputs.sum()),
        naive={f"{name}_joules": value for name, value in estimates.items()},
        underestimate_factor={name: energy / value for name, value in estimates.items()},
        naive_explanations={name: naive.EXPLANATIONS[name] for name in estimates},
        ttft_seconds=_percentiles(served.first_token_seconds - requests.arrival_seconds),
        tpot_seconds=_percentiles(decoding / (outputs[several] - 1)),
        e2e_seconds=_percentiles(served.finish_seconds - requests.arrival_seconds),
        steps=served.steps,
        preemptions=served.preemptions,
        speculation=speculation,
        facility_joules=energy * pue,
        carbon_grams=None if grid is None else facility_kwh * grid.grams_per_kwh,
        electricity_usd=None if electricity is None else facility_kwh * electricity.usd_per_kwh,
        bins=_bins(
            requests,
            served.request_joules,
            _flops_tdp(flops, deployment),
            energy,
            interval,
            binning,
        ),
        excluded_requests=dict(excluded),
        provenance={
            "energymodel_version": __version__,
            "origin": calibration.origin,
            "interval_basis": interval.basis,
            "calibration_gpu": calibration.gpu,
            "calibration": dict(calibration.provenance),
            "gpu_sources": dict(deployment.gpu.sources),
            "model_source": deployment.model.source,
            "grid_source": None if grid is None else f"{grid.name}: {grid.source}",
            "electricity_source": None
            if electricity is None
            else f"{electricity.name}: {electricity.source}",
            "rows_read": requests.rows_read,
            "rows_at_fault": {rows.kind: rows.count for rows in requests.dropped},
            "throttled_seconds": served.throttled_seconds,
        },
        warnings=tuple(warnings),
    )


def _inputs(
    requests: Requests,
    deployment: Deployment,
    replicas: int,
    arrivals: str,
    prefix_hit: float | str,
    binning: str,
    seed: int,
) -> dict[str, Any]:
    serving = deployment.serving
    cached = requests.cached_tokens
    return {
        "trace": requests.name,
        "trace_format": requests.trace_format,
        "trace_source": requests.source,
        "gpu": deployment.gpu.name,
        "model": deployment.model.name,
        "stack": serving.stack,
        "arrivals": arrivals,
        "prefix_hit": prefix_hit,
        "cached_input_tokens": 0 if cached is None else int(cached.sum()),
        "replicas": replicas,
        "tensor_parallel": serving.tensor_parallel,
        "pipeline_parallel": serving.pipeline_parallel,
        "max_batch": serving.max_batch,
        "max_step_tokens": serving.max_step_tokens,
        "max_model_len": deployment.max_model_len,
        "gpu_memory_utilization": serving.gpu_memory_utilization,
        "dtype": serving.weight_dtype,
        "kv_dtype": serving.kv_dtype,
        "decoding": serving.decoding if serving.beams == 1 else f"beam:{serving.beams}",
        "draft_model": None if serving.draft is None else serving.draft.model.name,
        "draft_tokens": 0 if serving.draft is None else serving.draft.tokens,
        "acceptance": None if serving.draft is None else serving.draft.acceptance,
        "host_ratio": deployment.host_ratio,
        "binning": binning,
        "seed": seed,
    }


def _percentiles(values: Array) -> Percentiles:
    if values.size == 0:
        return Percentiles(p50=None, p90=None, p99=None)
    p50, p90, p99 = (float(value) for value in np.percentile(values, [50, 90, 99]))
    return Percentiles(p50=p50, p90=p90, p99=p99)


def _peak_flops_per_s(deployment: Deployment) -> float:
    dtype = compute_dtype(deployment.serving.weight_dtype)
    return deployment.gpu.peak_flops_per_s[dtype]


def _flops_tdp(flops: Array, deployment: Deployment) -> Array:
    """FLOPs x TDP / peak [J], the shape of `flops`."""
    return naive.flops_tdp_joules(
        flops,
        tdp_watts=deployment.gpu.tdp_watts,
        peak_flops_per_s=_peak_flops_per_s(deployment),
    )


def _naive_joules(
    flops: Array,
    output_flops: Array,
    output_tokens: NDArray[np.int64],
    served: Served,
    deployment: Deployment,
    replicas: int,
) -> dict[str, float]:
    """The naive answers by rule [J]; rules that need time are given the simulated time."""
    rules = naive.load_naive_rules()
    gpu, group = deployment.gpu, deployment.gpus_per_replica
    held = served.wall_seconds * replicas
    joules = {
        "flops_tdp": _flops_tdp(flops.sum(), deployment),
        "output_flops_tdp": _flops_tdp(output_flops.sum(), deployment),
        "tdp_time": naive.tdp_time_joules(held, tdp_watts=gpu.tdp_watts, num_gpus=group),
        "ecologits": naive.ecologits_joules(
            output_tokens.sum(),
            active_parameters=float(active_weight_count(deployment.model)),
            rule=rules.ecologits,
            num_gpus=group,
        ),
    }
    watts = naive.vidur_board_watts(rules.vidur_energy, gpu)
    if watts is not None:
        # the rule is concave in MFU: busy and idle time apart, or it would see one half-busy GPU
        busy = served.busy_seconds
        joules["vidur_energy"] = naive.vidur_energy_joules(
            np.array([flops.sum(), 0.0]),
            np.array([busy, max(held - busy, 0.0)]),
            peak_flops_per_s=_peak_flops_per_s(deployment),
            idle_watts=watts[0],
            max_watts=watts[1],
            rule=rules.vidur_energy,
            num_gpus=group,
        ).sum()
    return {name: float(value) for name, value in joules.items()}


def _bins(
    requests: Requests,
    active_joules: Array,
    naive_joules: Array,
    energy: float,
    interval: IntervalCalibration,
    binning: str,
) -> tuple[BinEnergy, ...]:
    """Energy by bin; idle energy is shared out in proportion to active energy."""
    grid = EXACT_GRID if binning == "exact" else PAPER_GRID
    binned = bin_requests(requests.input_tokens, requests.output_tokens, grid)
    scale = energy / active_joules.sum()

    def by_bin(values: NDArray[Any]) -> list[float]:
        sums: list[float] = np.bincount(binned.bin_index, values, binned.requests.size).tolist()
        return sums

    return tuple(
        BinEnergy(
            input_low=input_low,
            input_high=input_high,
            output_low=output_low,
            output_high=output_high,
            requests=count,
            input_tokens=round(input_tokens),
            output_tokens=round(output_tokens),
            mean_input_tokens=input_tokens / count,
            mean_output_tokens=output_tokens / count,
            energy_joules=active * scale,
            energy_joules_low=active * scale * interval.low,
            energy_joules_high=active * scale * interval.high,
            active_joules=active,
            joules_per_request=active * scale / count,
            naive_flops_tdp_joules=flops_tdp,
            underestimate_factor=active * scale / flops_tdp,
        )
        for (
            input_low,
            input_high,
            output_low,
            output_high,
            count,
            input_tokens,
            output_tokens,
            active,
            flops_tdp,
        ) in zip(
            binned.input_low.tolist(),
            binned.input_high.tolist(),
            binned.output_low.tolist(),
            binned.output_high.tolist(),
            binned.requests.tolist(),
            by_bin(requests.input_tokens),
            by_bin(requests.output_tokens),
            by_bin(active_joules),
            by_bin(naive_joules),
            strict=True,
        )
    )

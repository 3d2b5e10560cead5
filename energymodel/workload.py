"""The story of the package: requests in, joules out. Read this file first.

    load -> arrivals -> check that it fits -> serve -> account -> result

Each step lives in a file of its own: `workloads` and `traces` load requests, `arrivals` times them,
`deployment` is what serves them, `replicas` (or `paper_accounting`) serves them with the
`simulator`, `accounting` turns what happened into joules, `assemble` puts the result together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from energymodel.accounting import Served
from energymodel.arrivals import checked_requests, with_arrivals
from energymodel.assemble import assemble
from energymodel.calibrations import Calibration
from energymodel.deployment import Deployment, deploy, setup_warnings
from energymodel.errors import CapacityError, ConfigurationError, TraceError, unknown_name
from energymodel.grids import load_grid_intensity
from energymodel.paper_accounting import (
    check_paper_options,
    round_up_lengths,
    rounding_warnings,
    serve_in_batches,
)
from energymodel.prefix import as_hit, with_prefixes, with_traced_prefixes
from energymodel.prices import load_electricity_price
from energymodel.replicas import bearable_seconds, serve_on_replicas
from energymodel.results import Prediction
from energymodel.specs import (
    DEFAULT_DTYPE,
    DEFAULT_MAX_BATCH,
    DEFAULT_MODEL,
    DEFAULT_STACK,
    GpuSpec,
    ModelSpec,
)
from energymodel.speculation import compare
from energymodel.traces import Requests, explain_dropped
from energymodel.workloads import load_requests

_BINNINGS = ("exact", "paper")
_HIGHEST_PUE = 10.0  # no site comes near it


def predict(
    trace: str | Requests,
    *,
    gpu: str | GpuSpec,
    model: str | ModelSpec = DEFAULT_MODEL,
    stack: str = DEFAULT_STACK,
    arrivals: str = "trace",
    prefix_hit: float | str = 0.0,
    replicas: int | str = 1,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    max_batch: int = DEFAULT_MAX_BATCH,
    max_step_tokens: int | None = None,
    max_model_len: int | None = None,
    gpu_memory_utilization: float | None = None,
    dtype: str = DEFAULT_DTYPE,
    kv_dtype: str | None = None,
    decoding: str = "greedy",
    draft_model: str | ModelSpec | None = None,
    draft_tokens: int | None = None,
    acceptance: float | None = None,
    binning: str = "exact",
    pue: float = 1.0,
    grid: str | float | None = None,
    electricity_price: str | float | None = None,
    seed: int = 0,
    trace_format: str | None = None,
    strict: bool = False,
    host_ratio: float = 1.0,
    calibration: str | Calibration | None = None,
) -> Prediction:
    """Predict the energy of serving a request trace.

    Energy and time run from the first arrival to the last completion, idle time included. Energy
    is that of the GPU boards alone.

    Parameters
    ----------
    trace : str or Requests
        Trace file, `-` for stdin, name of a built-in workload, or requests already read.
    gpu : str or GpuSpec
        Name, alias, NVML name or JSON file of a GPU.
    model : str or ModelSpec
        Bundled name, `config.json`, a folder that holds one, or a cached Hugging Face id.
    stack : str
        `vllm`, `vllm-eager` (no CUDA graphs), `transformers` (static batches) or
        `transformers-compile` (with a static cache and compiled decode steps).
    arrivals : str
        `trace`, `offline` (all requests at time 0) or `poisson:RATE` [requests/s].
    prefix_hit : float or str
        Share of every prompt that is in the prefix cache [-], from 0 to below 1; or `trace`, as a
        Mooncake trace's block ids say, or the `cached_tokens` of requests already read.
    replicas : int or str
        Copies of the model, to which requests go round robin; `auto` finds the fewest that keep up.
    tensor_parallel, pipeline_parallel : int
        GPUs that each layer is split over, and stages that the layers are dealt to.
    max_batch : int
        Sequences in flight (vLLM `max_num_seqs`).
    max_step_tokens : int, optional
        Tokens a step (vLLM `max_num_batched_tokens`); vLLM's default for the GPU if not given.
    max_model_len : int, optional
        Longest context served [tokens]; the model's own if not given.
    gpu_memory_utilization : float, optional
        Share of a GPU's memory for weights and KV cache [-], above 0 to 1 (vLLM's option of that
        name); 0.9 if not given, where vLLM 0.22 takes 0.92.
    dtype : str
        Stored dtype of the weights: bf16, fp16, fp32, fp8, int8, int4 or mxfp4.
    kv_dtype : str, optional
        Stored dtype of the KV cache: bf16 (if not given), fp16 or fp8.
    decoding : str
        `greedy`, `sampling` (temperature and top-p), `sampling-sorted` (the same over the sorted
        vocabulary, as vLLM up to 0.11 and Transformers draw) or `beam:N` (Transformers).
    draft_model : str or ModelSpec, optional
        Model that drafts tokens for vLLM to check (speculative decoding).
    draft_tokens : int, optional
        Tokens that it drafts a round; 0 for none.
    acceptance : float, optional
        Probability that a drafted token is accepted, those before it being so [-].
    binning : str
        `exact`, or `paper` for the paper's ceiling bins and its accounting N/B x E_batch.
    pue : float
        Power usage effectiveness of the site [-], 1 to 10.
    grid : str or float, optional
        Name of a grid, or its carbon intensity [gCO2e/kWh].
    electricity_price : str or float, optional
        Name of a place, or the price of its electricity [USD/kWh].
    seed : int
        Of drawn workloads and Poisson arrivals, 0 or more.
    trace_format : str, optional
        Format of a trace file; found from its columns if not given.
    strict : bool
        Refuse a trace file with any bad row.
    host_ratio : float
        Host times over those of the calibration's machines [-]: 1.5 for a host that takes half as
        long again to launch and schedule (`energymodel doctor` compares).
    calibration : str or Calibration, optional
        Name, JSON file or parameters in place of the GPU's own.

    Returns
    -------
    Prediction

    Raises
    ------
    EnergyModelError
        With a message for the user: what is wrong, where, and what to do.

    Examples
    --------
    >>> import energymodel
    >>> result = energymodel.predict("translation", gpu="a100", arrivals="offline")
    >>> result.energy_joules_low < result.energy_joules < result.energy_joules_high
    True
    """
    _check_options(binning, pue, seed)
    prefix_hit = as_hit(prefix_hit)
    intensity = None if grid is None else load_grid_intensity(str(grid))
    electricity = (
        None if electricity_price is None else load_electricity_price(str(electricity_price))
    )

    def deployed(**drafts: Any) -> Deployment:
        return deploy(
            gpu=gpu,
            model=model,
            stack=stack,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            dtype=dtype,
            kv_dtype=kv_dtype,
            decoding=decoding,
            host_ratio=host_ratio,
            calibration=calibration,
            **drafts,
        )

    deployment = deployed(draft_model=draft_model, draft_tokens=draft_tokens, acceptance=acceptance)
    if isinstance(trace, str):
        requests = load_requests(trace, trace_format=trace_format, strict=strict, seed=seed)
        if prefix_hit == "trace":
            requests = with_traced_prefixes(requests, trace)
    else:
        requests = checked_requests(trace)
    requests = with_prefixes(requests, prefix_hit, deployment.serving)
    warnings = [explain_dropped(rows) for rows in requests.dropped]
    warnings += setup_warnings(deployment)

    excluded: dict[str, int] = {}
    if binning == "paper":
        check_paper_options(replicas=replicas, arrivals=arrivals, prefix_hit=prefix_hit)
        rounded, excluded = round_up_lengths(requests)
        warnings += rounding_warnings(requests, rounded, excluded)
        _check_lengths(rounded, deployment)
        served, replicas_used = serve_in_batches(rounded, deployment), 1
        requests, arrivals = rounded, "offline"
    else:
        requests = with_arrivals(requests, arrivals, seed)
        _check_lengths(requests, deployment)
        served, replicas_used = serve_on_replicas(requests, replicas, deployment)
    warnings += _load_warnings(served, requests)
    speculation = None
    if deployment.serving.draft is not None:
        plain = deployed()
        speculation = compare(
            deployment,
            plain,
            requests,
            joules=_joules(served),
            plain_joules=_plain_joules(requests, replicas_used, plain, binning),
        )
    return assemble(
        requests,
        served,
        deployment,
        replicas=replicas_used,
        arrivals=arrivals,
        prefix_hit=prefix_hit,
        binning=binning,
        excluded=excluded,
        pue=pue,
        grid=intensity,
        electricity=electricity,
        seed=seed,
        warnings=warnings,
        speculation=speculation,
    )


def _joules(served: Served) -> float:
    return served.prefill_joules + served.decode_joules + served.idle_joules


def _plain_joules(
    requests: Requests, replicas: int, plain: Deployment, binning: str
) -> float | None:
    """Energy of the workload without drafts [J]; None where the replicas cannot keep up then."""
    try:
        if binning == "paper":
            return _joules(serve_in_batches(requests, plain))
        return _joules(serve_on_replicas(requests, replicas, plain)[0])
    except CapacityError:
        return None


def _check_options(binning: str, pue: float, seed: int) -> None:
    if binning not in _BINNINGS:
        raise ConfigurationError(unknown_name("binning", binning, _BINNINGS))
    if not 1.0 <= pue <= _HIGHEST_PUE:  # false for NaN as well
        raise ConfigurationError(
            f"--pue {pue:g} is not a power usage effectiveness; it lies between 1 (nothing but the "
            f"computers draws power) and {_HIGHEST_PUE:g}"
        )
    if seed < 0:
        raise ConfigurationError(f"--seed {seed} makes no sense; it is 0 or more")


def _check_lengths(requests: Requests, deployment: Deployment) -> None:
    """Refuse requests longer than the context served or than the KV cache."""
    limit = deployment.max_model_len
    total = requests.input_tokens + requests.output_tokens
    worst = int(np.argmax(total))
    longest = (
        f"the longest, request {worst + 1} in order of arrival, has {requests.input_tokens[worst]} "
        f"input and {requests.output_tokens[worst]} output tokens"
    )
    if total[worst] > limit:
        raise TraceError(
            f"{requests.name}: {np.count_nonzero(total > limit)} of {total.size} requests are "
            f"longer than the {limit} tokens that {deployment.model.name} is served with "
            f"({longest}). Use a model with a longer context, drop those rows, or set "
            f"--max-model-len {total[worst]} to compute it all the same."
        )
    serving = deployment.serving
    beams = f", on {serving.beams} beams" if serving.beams > 1 else ""
    # drafts are written beside the tokens that were accepted: those checked and those proposed
    held = serving.beams * total[worst] + 2 * (serving.decode_queries - 1)
    if held > deployment.kv_tokens:
        raise CapacityError(
            f"{requests.name}: a request does not fit the KV cache of {deployment.kv_tokens} "
            f"tokens that {deployment.model.name} leaves room for on "
            f"{deployment.gpus_per_replica} x {deployment.gpu.title} ({longest}{beams}); raise "
            "--tensor-parallel, or use --kv-dtype fp8 or a smaller --dtype"
        )


def _load_warnings(served: Served, requests: Requests) -> list[str]:
    warnings = []
    waits = served.first_token_seconds - requests.arrival_seconds
    if waits.max() > bearable_seconds(requests):
        warnings.append(
            f"overloaded at times: a request waits up to {waits.max():.0f} s for its first token, "
            f"half of them more than {np.median(waits):.3g} s; --replicas auto finds how many "
            "replicas keep up"
        )
    if served.preemptions:
        warnings.append(
            f"{served.preemptions} preemptions: the KV cache is full at times and prompts are "
            "computed again"
        )
    return warnings

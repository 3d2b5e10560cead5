"""Prefill and decode on GPUs of their own (Splitwise, arXiv 2311.18677; DistServe, 2401.09670).

A prompt is computed on a replica of the prefill pool, which puts out the first token; its KV cache
then travels to a replica of the decode pool, which puts out the rest. Both pools are simulated
exactly, one after the other: decoding never holds up prefill. The transfer takes the KV bytes over
the slower link's bandwidth, once per GPU of the group, beside the computing; a request waits for
its own transfer only.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from energymodel.accounting import Served, merged
from energymodel.deployment import Deployment
from energymodel.errors import ConfigurationError
from energymodel.operators import kv_bytes_per_token
from energymodel.replicas import serve_on_replicas
from energymodel.traces import Requests

Array = NDArray[np.float64]


def serve_disaggregated(
    requests: Requests,
    prefill: Deployment,
    prefill_replicas: int,
    decode: Deployment,
    decode_replicas: int,
) -> Served:
    """Serve requests on two pools and add up.

    Parameters
    ----------
    requests : Requests
    prefill, decode : what a replica of each pool is; of the same model and KV dtype
    prefill_replicas, decode_replicas : at least 1 each

    Returns
    -------
    Served
        Idle energy of both pools runs until the last token of all.

    Raises
    ------
    ConfigurationError
        If the pools differ in model or KV dtype, or serve static batches.
    CapacityError
        If a pool cannot keep up.
    """
    if prefill.static_batches or decode.static_batches:
        raise ConfigurationError("pools for prefill and decode need continuous batching")
    if prefill.serving.draft is not None or decode.serving.draft is not None:
        raise ConfigurationError("pools for prefill and decode are not modelled with drafts")
    if (prefill.model.name, prefill.serving.kv_dtype) != (
        decode.model.name,
        decode.serving.kv_dtype,
    ):
        raise ConfigurationError("pools for prefill and decode need one model and one KV dtype")
    n = requests.input_tokens.size
    first, _ = serve_on_replicas(
        replace(requests, output_tokens=np.ones(n, np.int64)), prefill_replicas, prefill
    )
    several = requests.output_tokens > 1
    seconds, joules = _transfer(requests, prefill, decode)
    arrival = first.first_token_seconds + seconds
    order = np.flatnonzero(several)[np.argsort(arrival[several], kind="stable")]
    finish = first.first_token_seconds.copy()
    request_joules = first.request_joules + np.where(several, joules, 0.0)
    transferred = float(joules[several].sum())
    if order.size == 0:
        return first
    # the first token's KV is computed with the second token, as in any decode step
    start = arrival[order[0]]
    rest = replace(
        requests,
        arrival_seconds=arrival[order] - start,
        input_tokens=requests.input_tokens[order] + 1,
        output_tokens=requests.output_tokens[order] - 1,
        cached_tokens=requests.input_tokens[order],
    )
    second, _ = serve_on_replicas(rest, decode_replicas, decode)
    finish[order] = second.finish_seconds + start
    request_joules[order] += second.request_joules
    wall = float(finish.max())
    idle = sum(
        max(wall * replicas - pool.busy_seconds, 0.0)
        * deployment.gpus_per_replica
        * deployment.calibration.polling_idle_watts
        for pool, replicas, deployment in (
            (first, prefill_replicas, prefill),
            (second, decode_replicas, decode),
        )
    )
    return replace(
        first,
        finish_seconds=finish,
        request_joules=request_joules,
        operators=merged(first.operators, second.operators)
        | {"kv_transfer": {"link": transferred}},
        work=merged(first.work, second.work),
        timeline=None,
        prefill_joules=first.prefill_joules + transferred,
        decode_joules=first.decode_joules + second.prefill_joules + second.decode_joules,
        idle_joules=idle,
        wait_joules=first.wait_joules + second.wait_joules,
        slow_host_joules=first.slow_host_joules + second.slow_host_joules,
        wall_seconds=wall,
        busy_seconds=first.busy_seconds + second.busy_seconds,
        steps=first.steps + second.steps,
        preemptions=first.preemptions + second.preemptions,
        throttled_seconds=first.throttled_seconds + second.throttled_seconds,
    )


def _transfer(requests: Requests, prefill: Deployment, decode: Deployment) -> tuple[Array, Array]:
    """Seconds and joules to move each prompt's KV cache; sender and receiver both pay."""
    per_gpu = kv_bytes_per_token(prefill.model, prefill.serving) * requests.input_tokens
    bandwidth = min(prefill.gpu.link_bytes_per_s, decode.gpu.link_bytes_per_s)
    total = per_gpu * prefill.gpus_per_replica
    joules = total * (
        prefill.calibration.joules_per_link_byte + decode.calibration.joules_per_link_byte
    )
    return np.asarray(per_gpu / bandwidth, np.float64), np.asarray(joules, np.float64)

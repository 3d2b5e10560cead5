"""The paper's accounting: every bin runs N/B full batches, one after another.

Fernandez et al., ACL 2025 (arXiv 2504.17674), section 4.1: lengths are rounded up to the bins, and
E = sum over bins of N / B x E_batch, N/B not rounded. There are no arrivals and no idle time.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from energymodel.accounting import Served, add_up
from energymodel.bins import ceil_to_paper
from energymodel.deployment import Deployment
from energymodel.errors import CapacityError, ConfigurationError, TraceError
from energymodel.simulator import Simulation, simulate
from energymodel.traces import Requests


def check_paper_options(*, replicas: int | str, arrivals: str, prefix_hit: float | str) -> None:
    """Refuse options that the accounting has no use for.

    Raises
    ------
    ConfigurationError
        Unless `replicas` is 1, `arrivals` is `trace` or `offline`, and `prefix_hit` is 0.
    """
    if str(replicas) != "1":
        raise ConfigurationError(
            f"--binning paper counts batches, not replicas; leave out --replicas {replicas} or use "
            "--binning exact"
        )
    if arrivals not in ("trace", "offline"):
        raise ConfigurationError(
            f"--binning paper has no arrivals; leave out --arrivals {arrivals} or use --binning "
            "exact"
        )
    if prefix_hit != 0.0:
        raise ConfigurationError(
            f"--binning paper rounds prompts up and knows no prefix cache; leave out --prefix-hit "
            f"{prefix_hit} or use --binning exact"
        )


def round_up_lengths(requests: Requests) -> tuple[Requests, dict[str, int]]:
    """Requests with lengths rounded up to the paper's bins, all at time 0; those left out counted.

    Raises
    ------
    TraceError
        If every request is longer than the bins.
    """
    inputs, outputs, left_out, excluded = ceil_to_paper(
        requests.input_tokens, requests.output_tokens
    )
    if left_out.all():
        raise TraceError(
            f"{requests.name}: no request is left to serve: all {left_out.size} are longer than "
            "the paper's bins (8192 input, 512 output tokens); use --binning exact"
        )
    kept = replace(
        requests,
        arrival_seconds=np.zeros(np.count_nonzero(~left_out)),
        input_tokens=inputs[~left_out],
        output_tokens=outputs[~left_out],
    )
    return kept, excluded


def rounding_warnings(requests: Requests, rounded: Requests, excluded: dict[str, int]) -> list[str]:
    """What the rounding left out and changed, one line each."""
    warnings = []
    if excluded:
        detail = ", ".join(f"{count} {kind}" for kind, count in excluded.items())
        warnings.append(
            f"the paper's binning leaves out {sum(excluded.values())} of "
            f"{requests.input_tokens.size} requests: {detail}"
        )
    warnings.append(
        f"the paper's binning rounds lengths up, from {requests.input_tokens.sum():,} to "
        f"{rounded.input_tokens.sum():,} input and from {requests.output_tokens.sum():,} to "
        f"{rounded.output_tokens.sum():,} output tokens; arrivals and idle time are not counted"
    )
    return warnings


def serve_in_batches(requests: Requests, deployment: Deployment) -> Served:
    """Run N/B batches of each pair of lengths, B the largest batch that fits."""
    n = requests.input_tokens.size
    first, finish, joules = np.zeros((3, n))
    runs: list[Simulation] = []
    counts: list[float] = []
    scheduler = deployment.costs.scheduler
    cells, member = np.unique(
        np.stack([requests.input_tokens, requests.output_tokens], axis=1),
        axis=0,
        return_inverse=True,
    )
    for index, (input_tokens, output_tokens) in enumerate(cells):
        members = np.flatnonzero(member.ravel() == index)
        length = int(input_tokens + output_tokens)
        block = scheduler.kv.block_tokens
        held = deployment.serving.beams * -(-length // block) * block  # tokens of whole blocks
        batch = min(scheduler.max_batch, scheduler.kv.sequences(held))
        run = simulate(
            np.zeros(batch),
            np.full(batch, input_tokens),
            np.full(batch, output_tokens),
            deployment.costs,
            static_batches=deployment.static_batches,
        )
        if run is None:
            raise CapacityError(f"a batch of {batch} x {length} tokens can never be scheduled")
        runs.append(run)
        counts.append(members.size / batch)
        first[members] = run.first_token_seconds.mean()
        finish[members] = run.finish_seconds.mean()
        joules[members] = run.request_joules.mean()
    weights = np.array(counts)
    return add_up(
        runs,
        deployment,
        weights=weights,
        first_token_seconds=first,
        finish_seconds=finish,
        request_joules=joules,
        wall_seconds=float(weights @ np.array([run.totals["now"] for run in runs])),
        idle_seconds=0.0,
    )

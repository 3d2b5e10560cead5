"""The simple rules people use for inference energy, to stand beside the model's own answer.

Each rule is a pure function on arrays; constants come from `profiles/naive_rules.json`, each with
its source. GPU energy only: no host, no PUE.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from energymodel.datafiles import data_path
from energymodel.specs import GpuSpec

FloatArray = NDArray[np.float64]

_JOULES_PER_WATT_HOUR = 3600.0

EXPLANATIONS: Mapping[str, str] = {
    "flops_tdp": (
        "every FLOP at the datasheet's peak and TDP; misses idle time, launch gaps, bytes moved "
        "(decode waits for memory) and padding of tiles"
    ),
    "output_flops_tdp": (
        "as flops_tdp, with output tokens only; misses the prompt as well as idle time, launch "
        "gaps, bytes and padding"
    ),
    "tdp_time": (
        "TDP for as long as the GPUs are held; misses that idle and memory-bound GPUs draw far "
        "less than TDP, so it errs upwards"
    ),
    "vidur_energy": (
        "power from MFU alone; misses the bytes: decode has almost no MFU but draws well above "
        "idle, and launch gaps count as plain low MFU"
    ),
    "ecologits": (
        "a fit over output tokens and active parameters at batch 64 on H100; misses the prompt, "
        "your batch, your GPU, idle time and launch gaps"
    ),
}
"""One line per rule: what it assumes and what it misses. Its keys are the rules' names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VidurEnergyRule:
    """Constants of the power rule of Vidur-Energy."""

    mfu_saturation: float
    """MFU from which on the board draws its maximum [1]."""
    exponent: float
    board_watts: Mapping[str, tuple[float, float]]
    """(idle, maximum) power [W] by canonical GPU name, as its authors set them."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EcologitsRule:
    """Constants of EcoLogits' fit of GPU energy per output token."""

    watt_hours_per_token_per_billion_parameters: float
    batch_decay: float
    """Change of the logarithm of the parameter term per sequence in the batch [1]."""
    watt_hours_per_token: float
    batch: float
    """Batch that EcoLogits assumes for every service."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveRules:
    """Constants of the published rules."""

    vidur_energy: VidurEnergyRule
    ecologits: EcologitsRule


def load_naive_rules() -> NaiveRules:
    """Read the shipped constants of the published rules."""
    data = json.loads(data_path("naive_rules.json").read_text(encoding="utf-8"))
    vidur = data["vidur_energy"]
    board_watts = {gpu: (w["idle"], w["max"]) for gpu, w in vidur.pop("board_watts").items()}
    return NaiveRules(
        vidur_energy=VidurEnergyRule(board_watts=board_watts, **vidur),
        ecologits=EcologitsRule(**data["ecologits"]),
    )


def flops_tdp_joules(flops: ArrayLike, *, tdp_watts: float, peak_flops_per_s: float) -> FloatArray:
    """Energy at peak efficiency, E = FLOPs * TDP / peak; any shape in, the same shape out.

    Of all tokens it is the "theoretical optimal" of Fernandez et al. (ACL 2025, arXiv 2504.17674,
    section 4.1); of output tokens alone, the common back-of-the-envelope number.

    Parameters
    ----------
    flops : array_like
        Useful work [FLOP].
    tdp_watts : float
        Board power limit of one GPU [W].
    peak_flops_per_s : float
        Dense peak of one GPU at the dtype used [FLOP/s].

    Returns
    -------
    ndarray
        Energy [J]. The number of GPUs cancels out.
    """
    return np.asarray(flops, dtype=np.float64) * (tdp_watts / peak_flops_per_s)


def tdp_time_joules(seconds: ArrayLike, *, tdp_watts: float, num_gpus: int = 1) -> FloatArray:
    """Energy at full board power, E = TDP * time * GPUs; any shape in, the same shape out.

    Parameters
    ----------
    seconds : array_like
        Time for which the GPUs are held [s].
    tdp_watts : float
        Board power limit of one GPU [W].
    num_gpus : int
        GPUs held.

    Returns
    -------
    ndarray
        Energy [J].
    """
    return np.asarray(seconds, dtype=np.float64) * (tdp_watts * num_gpus)


def vidur_board_watts(rule: VidurEnergyRule, gpu: GpuSpec) -> tuple[float, float] | None:
    """(idle, maximum) power [W] that Vidur-Energy's rule takes for a GPU.

    Its authors' own numbers where they gave any, else the published idle power and the TDP; None
    where no idle power was published: the rule then has no answer for this GPU.
    """
    if gpu.name in rule.board_watts:
        return rule.board_watts[gpu.name]
    return None if gpu.idle_watts is None else (gpu.idle_watts, gpu.tdp_watts)


def vidur_energy_joules(
    flops: ArrayLike,
    seconds: ArrayLike,
    *,
    peak_flops_per_s: float,
    idle_watts: float,
    max_watts: float,
    rule: VidurEnergyRule,
    num_gpus: int = 1,
) -> FloatArray:
    """Energy by the power rule of Vidur-Energy, which sees nothing but MFU.

    P = P_idle + (P_max - P_idle) * (min(MFU, MFU_sat) / MFU_sat)**gamma, E = P * time * GPUs, with
    MFU = FLOPs / (time * GPUs * peak). The rule is concave in MFU: pass one element per step and
    add up, not the totals, to get what its authors compute.

    Parameters
    ----------
    flops : array_like
        Useful work of each step on all GPUs [FLOP].
    seconds : array_like
        Duration of each step [s]; broadcasts with `flops`. Zero gives zero energy.
    peak_flops_per_s : float
        Dense peak of one GPU at the dtype used [FLOP/s].
    idle_watts, max_watts : float
        Board power of one GPU at rest and at most [W], see `vidur_board_watts`.
    rule : VidurEnergyRule
        Constants, see `load_naive_rules`.
    num_gpus : int
        GPUs that share the work.

    Returns
    -------
    ndarray
        Energy [J], one element per step.

    References
    ----------
    Ozcan et al., arXiv 2507.11417.
    """
    work, time = np.broadcast_arrays(
        np.asarray(flops, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    )
    capacity = time * (num_gpus * peak_flops_per_s)
    mfu = np.divide(work, capacity, out=np.zeros(work.shape), where=capacity > 0.0)
    load = (np.minimum(mfu, rule.mfu_saturation) / rule.mfu_saturation) ** rule.exponent
    watts = idle_watts + (max_watts - idle_watts) * load
    joules: FloatArray = watts * time * num_gpus
    return joules


def ecologits_joules(
    output_tokens: ArrayLike,
    *,
    active_parameters: float,
    rule: EcologitsRule,
    num_gpus: int = 1,
    batch: float | None = None,
) -> FloatArray:
    """GPU energy by EcoLogits' fit over output tokens; any shape in, the same shape out.

    E = tokens * GPUs * (alpha * exp(beta * B) * P_active + gamma), P_active in billions.

    Parameters
    ----------
    output_tokens : array_like
        Generated tokens.
    active_parameters : float
        Weights that one token passes through (all of them in a dense model).
    rule : EcologitsRule
        Constants, see `load_naive_rules`.
    num_gpus : int
        GPUs that one copy of the model occupies (EcoLogits multiplies by it).
    batch : float, optional
        Sequences in flight; EcoLogits' fixed 64 unless given.

    Returns
    -------
    ndarray
        Energy [J].

    References
    ----------
    EcoLogits methodology, "Environmental Impacts of LLM Inference", version 0.9.
    """
    sequences = rule.batch if batch is None else batch
    slope = rule.watt_hours_per_token_per_billion_parameters * np.exp(rule.batch_decay * sequences)
    watt_hours = slope * (active_parameters / 1e9) + rule.watt_hours_per_token
    tokens = np.asarray(output_tokens, dtype=np.float64)
    joules: FloatArray = tokens * (num_gpus * watt_hours * _JOULES_PER_WATT_HOUR)
    return joules

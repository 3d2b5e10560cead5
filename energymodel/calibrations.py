"""The fitted parameters of a GPU: what turns FLOPs and bytes into seconds and joules.

`load_calibration` reads `profiles/calibrations/<gpu>.json`. Every file carries its origin
(measured, public-data or datasheet), its provenance and the interval that its held-out errors
earned; the numbers themselves live only there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from energymodel.datafiles import data_path
from energymodel.errors import ProfileError
from energymodel.specs import Origin

SCHEMA_VERSION = 1
_MOST = 1e30  # no unit used here comes near it
_ABOVE_ZERO = frozenset(
    {
        *("compute_efficiency", "memory_efficiency", "eight_bit_efficiency", "sharpness"),
        *("clock_energy_exponent", "power_cap_watts", "onchip_speedup", "low", "high"),
    }
)
"""Fields that something is divided by, or raised to the inverse of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCalibration:
    """How kernels of one operator class use the GPU.

    A call takes `call_seconds + hbm_latency_seconds + splits x split_seconds + reductions x
    reduction_seconds + tiles x tile_seconds / SMs + (t_compute**p + t_memory**p)**(1/p)`, p =
    `sharpness`, with
    t_compute = executed FLOPs / (peak x compute_efficiency x wave fill**wave_exponent) and
    t_memory = bytes / (bandwidth x memory_efficiency), or what a row takes in one thread block,
    put together by the same p. Prefill attention has p = 1: the tables of the simulator add up its
    statistics.
    """

    compute_efficiency: float
    """Share of the datasheet's peak that large calls reach [-]."""
    memory_efficiency: float
    """Share of the datasheet's bandwidth that large calls reach [-] (links: of the link's)."""
    call_seconds: float
    """Fixed time of a call inside a CUDA graph [s]."""
    sharpness: float = 4.0
    """p of the transition between memory- and compute-bound [-]."""
    wave_exponent: float = 0.0
    """How much a partly filled last wave of tiles costs [-], 0 = nothing, 1 = a full wave."""
    tile_seconds: float = 0.0
    """Time an SM spends on a tile before and after its arithmetic [s]; of `elementwise` on an
    element that a kernel passes slowly (`unfused.py`)."""
    split_seconds: float = 0.0
    """Time of the second kernel that adds up parts, where too few tiles fill the GPU and the sums
    were split over more thread blocks [s], see `roofline.splits`."""
    block_seconds_per_byte: float = 0.0
    """Time of a byte that one thread block passes alone [s/B]: what a row takes in a kernel that
    gives each row to one block."""
    block_joules_per_byte: float = 0.0
    """Energy of a byte that such kernels move beyond that of other kernels [J/B]: they load and
    store element by element."""
    reduction_seconds: float = 0.0
    """Time of a sum over such a row, for which the block's threads wait for each other [s]."""
    hbm_latency_seconds: float = 0.0
    """What a call whose data lie in device memory takes beyond one that finds them in the L2 [s],
    until the first bytes are there."""
    eight_bit_efficiency: float = 1.0
    """Compute efficiency of 8-bit products relative to 16-bit ones [-]."""
    active_watts: float = 0.0
    """Power of the busy SMs above the base, whatever they compute [W]; not in the fixed time."""
    flop_energy_factor: float = 1.0
    """Joules per FLOP of this class relative to a large GEMM's [-]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackCalibration:
    """What a serving stack adds to the kernels of a step. Times in seconds."""

    step_host_seconds: float
    """Host time of a step; overlaps the GPU's, the longer of the two counts."""
    sequence_host_seconds: float
    """Host time per sequence of a step."""
    launch_seconds: float
    """Host time per kernel launched outside a CUDA graph."""
    kernels_per_layer: float
    """Kernels that a layer of Llama launches where no graph replays them."""
    norm_kernels: float = 1.0
    """Those of them that each of its two RMS norms launches."""
    piecewise_kernels: float = 3.0
    """Launches of a layer whose graphs leave attention out: steps with prompts that fit a graph."""
    step_gap_seconds: float
    """GPU idle between two steps that nothing overlaps."""
    layer_gap_seconds: float = 0.0
    """The same per layer: what compiled code checks before its graphs are replayed."""
    start_gap_seconds: float = 0.0
    """GPU idle before the first step after a pause: no step runs while it is prepared."""
    request_host_seconds: float = 0.0
    """Host time to admit one request; overlaps the GPU's but in the first step after a pause."""
    parallel_host_seconds: float = 0.0
    """Host time of a step beyond that where other processes drive further GPUs."""
    parallel_sequence_share: float = 1.0
    """Share of the host time per sequence that counts where other processes drive further GPUs:
    they prepare a step's inputs while the engine schedules [-]."""
    draft_host_seconds: float = 0.0
    """Host time to prepare a pass of a draft model; overlaps the GPU's."""
    round_host_seconds: float = 0.0
    """Host time of a round of speculative decoding; nothing overlaps it, because the next one is
    scheduled when the drafts are known."""
    round_sequence_host_seconds: float = 0.0
    """The same per sequence of the round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalCalibration:
    """Relative interval of predictions, from held-out errors or (datasheet) from transfer."""

    level: float
    low: float
    """Lower end as a share of the prediction (0.9 = 10 % below)."""
    high: float
    """Upper end as a share of the prediction."""
    basis: str
    """Where the two numbers come from."""
    host_spread: float = 0.0
    """How far the host's time may be off [-]: this times what a slow host would add, as a share
    of the energy, widens the interval, in quadrature."""

    def with_host(self, slow_host_share: float) -> IntervalCalibration:
        """The interval of a workload to whose energy a slow host would add that share."""
        extra = self.host_spread * slow_host_share
        if extra <= 0.0:
            return self
        high = 1.0 + math.hypot(self.high - 1.0, extra)
        low = 1.0 / (1.0 + math.hypot(1.0 / self.low - 1.0, extra))
        return replace(self, low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """All fitted parameters of one GPU."""

    gpu: str
    origin: Origin
    cold_idle_watts: float
    """Board power with no process on the GPU [W]."""
    context_idle_watts: float
    """Board power with a process holding a context, nothing running [W]."""
    polling_idle_watts: float
    """Board power while the engine waits for requests, clocks up [W]."""
    base_watts: float
    """Board power with a context open, before what kernels compute and move [W]."""
    joules_per_flop: Mapping[str, float]
    """Energy of a FLOP by compute dtype at the highest clock [J/FLOP]."""
    joules_per_hbm_byte: float
    joules_per_onchip_byte: float
    joules_per_link_byte: float
    power_cap_watts: float
    """Sustained board power at the limit [W]."""
    clock_energy_exponent: float
    """a in: core energy at clock share x is x**a of that at the highest clock [-]."""
    kernels: Mapping[str, KernelCalibration]
    """By operator class: gemm, moe, attention_prefill, attention_decode, elementwise, sampling,
    communication; gemm_int8 (torch's), gemm_scaled (8-bit), gemm_packed and moe_packed (4-bit
    weights), for which gemm and moe stand in where they lack."""
    stacks: Mapping[str, StackCalibration]
    intervals: Mapping[str, IntervalCalibration]
    """By stack."""
    provenance: Mapping[str, Any]
    """Machine, driver, versions, date, checksum of the windows, held-out errors."""
    kernel_watts: float = 0.0
    """Board power above the base while kernels run one after another, whatever they do [W]."""
    kernel_gap_seconds: float = 0.0
    """What each kernel of a step takes beyond the same kernel repeated alone [s]: it waits for
    another one's last block, and for its own data."""
    onchip_speedup: float = 3.0
    """Bandwidth of the L2 relative to the device memory's [-]."""
    onchip_share_of_l2: float = 0.5
    """Share of the L2 that activations handed from kernel to kernel may fill [-]."""
    schema_version: int = field(default=SCHEMA_VERSION)


def with_host_times(calibration: Calibration, ratio: float) -> Calibration:
    """The calibration with every time of the stacks' hosts longer by a ratio."""
    timed = [f.name for f in fields(StackCalibration) if f.name.endswith("_seconds")]
    return replace(
        calibration,
        stacks={
            name: replace(stack, **{t: getattr(stack, t) * ratio for t in timed})
            for name, stack in calibration.stacks.items()
        },
    )


def load_calibration(name_or_path: str) -> Calibration:
    """Calibration of a GPU by canonical name, or from a JSON file.

    Raises
    ------
    ProfileError
        If there is no such file, or a field is missing, unknown or not a number.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = data_path("calibrations", f"{name_or_path}.json")
    if not path.is_file():
        raise ProfileError(
            f"no calibration for '{name_or_path}' ({path} is missing). Known: "
            f"{', '.join(list_calibrations())}. `energymodel fit` makes one from measured windows."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read as JSON ({error})") from error
    calibration: Calibration = _build(Calibration, document, str(path), "$")
    if calibration.schema_version != SCHEMA_VERSION:
        raise ProfileError(
            f"{path}: schema_version {calibration.schema_version} is not {SCHEMA_VERSION}; "
            "make the file again with `energymodel fit`"
        )
    return calibration


def list_calibrations() -> tuple[str, ...]:
    """Canonical names of the GPUs that have a calibration."""
    return tuple(sorted(p.stem for p in data_path("calibrations").glob("*.json")))


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write a calibration as JSON, keys in the order of the dataclass."""
    path.write_text(json.dumps(asdict(calibration), indent=1) + "\n", encoding="utf-8")


def _build(kind: Any, value: Any, where: str, at: str) -> Any:
    """Turn parsed JSON into dataclass `kind`, checking names and types strictly."""
    origin = get_origin(kind)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ProfileError(f"{where}: {at} must be an object")
        hints = get_type_hints(kind)
        known = {f.name: f for f in fields(kind)}
        if unknown := sorted(set(value) - set(known)):
            raise ProfileError(f"{where}: {at} has unknown fields {', '.join(unknown)}")
        needed = {n for n, f in known.items() if f.default is f.default_factory}  # both MISSING
        if missing := sorted(needed - set(value)):
            raise ProfileError(f"{where}: {at} lacks {', '.join(missing)}")
        built = {n: _build(hints[n], v, where, f"{at}.{n}") for n, v in value.items()}
        return kind(**built)  # type: ignore[operator]
    if origin is not None and isinstance(value, dict):
        inner = get_args(kind)[1]
        return {k: _build(inner, v, where, f"{at}.{k}") for k, v in value.items()}
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
            raise ProfileError(f"{where}: {at} must be a number from 0 to 1e30, not {value!r}")
        if value == 0 and at.rpartition(".")[2] in _ABOVE_ZERO:
            raise ProfileError(f"{where}: {at} must be above 0")
        return float(value)
    if kind is int and not isinstance(value, int):
        raise ProfileError(f"{where}: {at} must be a whole number, not {value!r}")
    if kind is str and not isinstance(value, str):
        raise ProfileError(f"{where}: {at} must be text, not {value!r}")
    if str(origin) == "typing.Literal" and value not in get_args(kind):
        raise ProfileError(f"{where}: {at} must be one of {get_args(kind)}, not {value!r}")
    if isinstance(kind, UnionType):
        return value
    return value

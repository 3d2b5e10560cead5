"""The result of a prediction: one frozen dataclass, and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Percentiles over the requests [s]; None where no request has the quantity."""

    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BinEnergy:
    """Energy of the requests of one bin. Bounds are inclusive, in tokens."""

    input_low: int
    input_high: int
    output_low: int
    output_high: int
    requests: int
    input_tokens: int
    output_tokens: int
    mean_input_tokens: float
    mean_output_tokens: float
    energy_joules: float
    """Active energy of the bin's requests and their share of the idle energy [J]."""
    energy_joules_low: float
    energy_joules_high: float
    active_joules: float
    joules_per_request: float
    naive_flops_tdp_joules: float
    """The bin's FLOPs x TDP / peak [J]."""
    underestimate_factor: float
    """energy_joules / naive_flops_tdp_joules [-]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorWork:
    """What one operator did, summed over all GPUs."""

    executed_flops: float
    """FLOPs run [FLOP]: padding of tiles included, and exponentials of prefill attention as the
    FLOPs whose time they take."""
    hbm_bytes: float
    """Moved to and from device memory [B]."""
    gpu_seconds: float
    """Time of its kernels [s]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """What drafting tokens does to a workload."""

    tokens_per_round: float
    """Tokens that a round gives each sequence on average [-]."""
    mean_context_tokens: float
    """Context of a decoding sequence, averaged over the output tokens."""
    paying_batch: int
    """Most sequences in flight at which decoding with drafts takes less energy a token, at that
    context; 0 = never, `max_batch` = always."""
    plain_joules_per_output_token: float | None
    """Of the same workload without drafts [J]; None where it cannot be served so."""
    change: float | None
    """Change of the energy per output token by the drafts [-], negative where they save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Energy by slice of time, of all GPUs.

    Slice i starts i x slice_seconds after the first arrival; the last one ends with the last
    completion. Energy of many like steps that the simulator takes at once is spread evenly over
    their time.
    """

    slice_seconds: float
    prefill_joules: tuple[float, ...]
    decode_joules: tuple[float, ...]
    idle_joules: tuple[float, ...]
    """Of replicas without a request in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Energy, time and latency of a workload, and what the naive estimates say.

    Energy and wall time run from the first arrival to the last completion, idle time between
    requests included. Energies are of the GPU boards; `facility_joules` multiplies by the PUE.
    """

    inputs: Mapping[str, Any]
    """Every setting the prediction rests on, defaults resolved."""
    requests: int
    input_tokens: int
    output_tokens: int
    energy_joules: float
    """Total, active and idle [J]."""
    energy_joules_low: float
    energy_joules_high: float
    interval_level: float
    """Probability that the interval is meant to hold with [-]."""
    active_joules: float
    """While at least one request is in flight [J]."""
    idle_joules: float
    """While none is, on any replica [J]."""
    prefill_joules: float
    decode_joules: float
    by_component_joules: Mapping[str, float]
    """base (SMs powered), flops, onchip, hbm, link, host_wait (GPU waits for the host), idle."""
    by_operator_joules: Mapping[str, float]
    operator_work: Mapping[str, OperatorWork]
    peak_flops_per_s: float
    """Datasheet's peak of one GPU for the dtype served [FLOP/s]."""
    hbm_bytes_per_s: float
    """Datasheet's device memory bandwidth of one GPU [B/s]."""
    timeline: Timeline | None
    """None for the paper's accounting, which has no time of day."""
    wall_seconds: float
    busy_seconds: float
    """With requests in flight, summed over the replicas [s]."""
    average_watts: float
    gpus: int
    replicas: int
    joules_per_request: float
    joules_per_output_token: float
    naive: Mapping[str, float]
    """Energy by each naive rule, keys end in `_joules` [J]."""
    underestimate_factor: Mapping[str, float]
    """energy_joules over each naive rule [-]."""
    naive_explanations: Mapping[str, str]
    """What each rule leaves out, one line each."""
    ttft_seconds: Percentiles
    """Arrival to first token."""
    tpot_seconds: Percentiles
    """Mean time between a request's tokens after its first; requests of one token left out."""
    e2e_seconds: Percentiles
    """Arrival to last token."""
    steps: int
    preemptions: int
    speculation: Speculation | None
    """None without a draft model."""
    facility_joules: float
    """energy_joules x PUE [J]."""
    carbon_grams: float | None
    """CO2-equivalent at the grid's intensity [g]; None where no grid was given."""
    electricity_usd: float | None
    """facility_joules at the price of electricity [USD]; None where no price was given."""
    bins: tuple[BinEnergy, ...]
    excluded_requests: Mapping[str, int]
    """Requests a binning leaves out, by reason."""
    provenance: Mapping[str, Any]
    warnings: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as in the JSON output."""
        return asdict(self)

    def to_frame(self) -> pl.DataFrame:
        """The bins as a polars frame, a column per field of `BinEnergy`, a row per bin.

        `.write_parquet(path)` stores it; `pandas.DataFrame(result.to_dict()["bins"])` is the same
        for pandas.
        """
        import polars as pl  # noqa: PLC0415 (60 ms that only a frame should cost)

        return pl.DataFrame([asdict(row) for row in self.bins])

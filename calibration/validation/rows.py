"""A measured row, its prediction by the model, and the error between the two.

Readers (`public_runs.py`, `measured_runs.py`) turn what somebody measured into `MeasuredRow`s;
`compare` gives a row to `energymodel.predict` and keeps what is needed to judge it.
Energies and times are per output token, so that a row of one batch and one of a saturated
server can stand in one table; relative errors do not depend on that choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from energymodel.errors import EnergyModelError
from energymodel.results import Prediction
from energymodel.specs import ModelSpec
from energymodel.traces import Requests
from energymodel.workload import predict

DATA = Path(__file__).resolve().parent.parent / "data"
SPLIT_FILE = DATA / "split.json"

OWN = "own"
"""Source of the rows that this project measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRow:
    """What was served, on what, and what it took."""

    source: str
    name: str
    gpu: str
    """Name that `load_gpu` takes."""
    model: str | ModelSpec
    model_name: str
    stack: str
    phase: str
    """`prefill` (one output token), `batch` (one batch to its end), `saturated` (steady state at
    a full batch) or `trace`."""
    batch: int
    """Sequences in flight at most."""
    requests: Requests
    ramp: Requests | None = None
    """Requests whose cost is subtracted, see `steady_state`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `predict`."""
    joules_per_output_token: float | None
    """All GPUs [J]; None = not measured."""
    seconds_per_output_token: float
    """1 / throughput [s]."""
    ttft_seconds: float | None = None
    """Median over the requests [s]."""
    tpot_seconds: float | None = None
    mean_batch: float | None = None
    """Sequences in flight on average; None = not published."""
    unsteady: bool = False
    """The same step took very different times: something disturbed the host."""
    note: str = ""

    @property
    def case(self) -> tuple[str, ...]:
        """What was measured: rows of equal cases are measurements of the same thing."""
        options = (f"{name}={value}" for name, value in sorted(self.options.items()))
        return self.source, self.gpu, self.stack, self.name, *options

    @property
    def plain(self) -> bool:
        """Whether tokens were decoded greedily, one a step."""
        drafts, decoding = self.options.get("draft_tokens"), self.options.get("decoding", "greedy")
        return not drafts and decoding == "greedy"

    @property
    def tensor_parallel(self) -> int:
        """GPUs a layer is split over."""
        return int(self.options.get("tensor_parallel", 1))

    @property
    def pipeline_parallel(self) -> int:
        """Stages that the layers are dealt to."""
        return int(self.options.get("pipeline_parallel", 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Rows that a reader could not use."""

    source: str
    reason: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A row and its prediction. Errors are predicted / measured - 1."""

    row: MeasuredRow
    fitted: bool
    """Whether the row may have been used in a fit (`data/split.json`)."""
    joules_per_output_token: float
    joules_low: float
    """Lower end of the interval, per output token [J]."""
    joules_high: float
    seconds_per_output_token: float
    ttft_seconds: float | None
    tpot_seconds: float | None
    """None where no request has a second token."""
    naive_joules: Mapping[str, float]
    """By naive rule, per output token [J]."""

    @property
    def joules_error(self) -> float | None:
        """Relative error of the energy; None where it was not measured."""
        return _error(self.joules_per_output_token, self.row.joules_per_output_token)

    @property
    def seconds_error(self) -> float | None:
        """Relative error of the time per output token."""
        return _error(self.seconds_per_output_token, self.row.seconds_per_output_token)

    @property
    def ttft_error(self) -> float | None:
        """Relative error of the median time to first token."""
        return _error(self.ttft_seconds, self.row.ttft_seconds)

    @property
    def tpot_error(self) -> float | None:
        """Relative error of the median time per output token of a request."""
        return _error(self.tpot_seconds, self.row.tpot_seconds)

    @property
    def watts(self) -> float:
        """Predicted average power of all GPUs [W]."""
        return self.joules_per_output_token / self.seconds_per_output_token

    @property
    def watts_error(self) -> float | None:
        """Relative error of the average power."""
        return _error(self.watts, measured_watts(self.row))

    @property
    def covered(self) -> bool | None:
        """Whether the measured energy lies within the interval."""
        measured = self.row.joules_per_output_token
        return None if measured is None else self.joules_low <= measured <= self.joules_high

    def naive_error(self, rule: str) -> float | None:
        """Relative error of a naive rule's energy; None where the rule has no answer."""
        if rule not in self.naive_joules:
            return None
        return _error(self.naive_joules[rule], self.row.joules_per_output_token)


def measured_watts(row: MeasuredRow) -> float | None:
    """Measured average power of all GPUs [W]."""
    joules = row.joules_per_output_token
    return None if joules is None else joules / row.seconds_per_output_token


def _error(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or measured is None else predicted / measured - 1.0


def offline(name: str, input_tokens: Any, output_tokens: Any) -> Requests:
    """Requests that are all there at time 0; arrays of shape (n,) or scalars that broadcast."""
    inputs, outputs = np.broadcast_arrays(np.atleast_1d(input_tokens), output_tokens)
    return Requests(
        name=name,
        arrival_seconds=np.zeros(len(inputs)),
        input_tokens=inputs.astype(np.int64),
        output_tokens=outputs.astype(np.int64),
    )


INPUT_LOG_STD = 1.0
"""Spread of drawn prompt lengths: standard deviation of their logarithm."""
OUTPUT_GAMMA_SHAPE = 2.0
"""Spread of drawn output lengths: a gamma distribution of this shape (std = 0.71 x mean)."""


def steady_state(
    name: str, *, batch: int, mean_input_tokens: float, mean_output_tokens: float, seed: int = 0
) -> tuple[Requests, Requests]:
    """Two offline workloads whose difference is a saturated server at `batch` sequences.

    Both begin with the same requests (the batch fills, and the lengths drift out of step) and
    end with the same (the batch drains); the first has more in between. What it costs beyond
    the second is the steady state, newcomers' prefill included.

    Prompt lengths are log-normal, output lengths gamma distributed; the drawn outputs are
    scaled to the given mean.
    """
    head, tail = 4 * batch, 2 * batch
    middle = max(6 * batch, 600)
    rng = np.random.default_rng(seed)
    count = head + middle + tail
    outputs = rng.gamma(OUTPUT_GAMMA_SHAPE, mean_output_tokens / OUTPUT_GAMMA_SHAPE, count)
    mu = np.log(mean_input_tokens) - INPUT_LOG_STD**2 / 2
    inputs = rng.lognormal(mu, INPUT_LOG_STD, count)
    between = slice(head, head + middle)
    outputs[between] *= mean_output_tokens / outputs[between].mean()
    inputs[between] *= mean_input_tokens / inputs[between].mean()
    whole = offline(name, np.maximum(1, np.rint(inputs)), np.maximum(1, np.rint(outputs)))
    ends = np.r_[0:head, head + middle : count]
    return whole, offline(name, whole.input_tokens[ends], whole.output_tokens[ends])


def compare(row: MeasuredRow, split: Mapping[str, Any]) -> Comparison:
    """Predict a row.

    Raises
    ------
    EnergyModelError
        If the model refuses the row, e.g. because it does not fit the GPUs.
    """
    whole = _predict(row, row.requests)
    ramp = None if row.ramp is None else _predict(row, row.ramp)

    def beyond_ramp(quantity: Callable[[Prediction], float]) -> float:
        return quantity(whole) - (0.0 if ramp is None else quantity(ramp))

    tokens = beyond_ramp(lambda p: p.output_tokens)
    joules = beyond_ramp(lambda p: p.energy_joules) / tokens
    seconds = beyond_ramp(lambda p: p.wall_seconds) / tokens
    return Comparison(
        row=row,
        fitted=is_fitted(row, split),
        joules_per_output_token=joules,
        joules_low=joules * whole.energy_joules_low / whole.energy_joules,
        joules_high=joules * whole.energy_joules_high / whole.energy_joules,
        seconds_per_output_token=seconds,
        ttft_seconds=whole.ttft_seconds.p50,
        tpot_seconds=whole.tpot_seconds.p50,
        naive_joules={
            rule.removesuffix("_joules"): beyond_ramp(partial(_naive, rule)) / tokens
            for rule in whole.naive
        },
    )


def _naive(rule: str, prediction: Prediction) -> float:
    return prediction.naive[rule]


def _predict(row: MeasuredRow, requests: Requests) -> Prediction:
    return predict(requests, gpu=row.gpu, model=row.model, stack=row.stack, **row.options)


_SPLIT_FIELDS = (
    *("sources", "gpus", "models", "stacks", "phases", "tensor_parallel"),
    *("tensor_parallel_models", "draft_batches"),
)

_POWER_FIELDS = ("sources", "gpus", "tensor_parallel")


def load_split(path: Path = SPLIT_FILE) -> dict[str, Any]:
    """The written split into rows that fits may use and rows that they may not.

    Raises
    ------
    EnergyModelError
        If the file cannot be read or lacks a field.
    """
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        fit = split["fit"]
        for key in _SPLIT_FIELDS:
            if not isinstance(fit[key], list):
                raise EnergyModelError(f"{path}: fit.{key} must be a list")
        for key in _POWER_FIELDS if "public_power" in split else ():
            if not isinstance(split["public_power"][key], list):
                raise EnergyModelError(f"{path}: public_power.{key} must be a list")
    except (OSError, ValueError) as error:
        raise EnergyModelError(f"{path}: cannot be read as JSON ({error})") from error
    except (KeyError, TypeError) as error:
        raise EnergyModelError(
            f"{path}: the field {error} of fit or public_power is missing"
        ) from error
    return dict(split)


def is_fitted(row: MeasuredRow, split: Mapping[str, Any]) -> bool:
    """Whether the split lets fits use this row; everything that it does not name is held out."""
    fit = split["fit"]
    if row.pipeline_parallel > 1 or str(row.options.get("decoding")).startswith("beam"):
        return False
    on_one_gpu, drafting = row.tensor_parallel == 1, "draft_model" in row.options
    return is_power_fitted(row, split) or bool(
        row.source in fit["sources"]
        and row.gpu in fit["gpus"]
        and row.model_name in fit["models"]
        and row.stack in fit["stacks"]
        and row.phase in fit["phases"]
        and row.tensor_parallel in fit["tensor_parallel"]
        and (on_one_gpu or row.model_name in fit["tensor_parallel_models"])
        and (not drafting or row.batch in fit["draft_batches"])
    )


def is_power_fitted(row: MeasuredRow, split: Mapping[str, Any]) -> bool:
    """Whether joules per byte of a GPU that was not measured here rest on this row's power."""
    power = split.get("public_power")
    return power is not None and bool(
        row.source in power["sources"]
        and row.gpu in power["gpus"]
        and row.tensor_parallel in power["tensor_parallel"]
    )

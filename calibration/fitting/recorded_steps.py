"""Serving runs as the steps they consist of, recorded once and costed anew for any calibration.

Where all requests wait from the start, what each step holds does not depend on what steps cost.
`record` lets the schedulers of `energymodel` serve such runs and notes every step;
`RecordedRuns.totals` costs all steps of all runs at once, as `simulator.simulate` would, in a few
milliseconds. Everything up to the power limit is linear:

- a step is a weighted sum of parts, which are the rows of `costs.CostTables` that occur;
- a part is a weighted sum of kernels, whose costs `roofline.kernel_costs` gives;
- host time and gap of a step are weighted sums of `costs.host_seconds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fitting.fit_kernels import row_tables
from energymodel.calibrations import Calibration
from energymodel.costs import (
    ATTENTION_STATS,
    host_seconds,
    of_group,
    other_passes,
    reorder_seconds,
    split_table,
)
from energymodel.deployment import Deployment
from energymodel.operators import OperatorTable, operator_table, step_stats
from energymodel.roofline import (
    joules_per_flop,
    kernel_costs,
    longer,
    operator_work,
    step_seconds_and_joules,
)
from energymodel.simulator import simulate, tables_of
from energymodel.specs import GpuSpec, ModelSpec, ServingConfig
from energymodel.step_costs import NOW, pass_parts
from energymodel.traces import Requests

Array = NDArray[np.float64]

Part = tuple[int, str, int]
"""Kind of pass of the deployment, field of `CostTables`, row of it."""

_HOST_FIELDS = 11
_LARGE = 1e9
"""Of an attention statistic, so that costs per unit follow from it; they are proportional."""
ROUNDING = 0.02
"""Share of the host's seconds within which the longer of GPU and host changes over: at equality a
step takes 1 % longer than either. A sharp corner would stop a fit where it stands."""
_SMALL = 1e-9
"""Of an attention statistic: attention runs, and takes nothing beyond its calls."""


# -- recording ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """What a step is made of."""

    parts: dict[Part, float]
    host: Array
    """(11,) weights of `costs.host_seconds` in the host's time."""
    gap: Array
    """(11,) weights of them in the gap."""
    following: Array
    """(11,) weights of them in the launch of a step after it, see `step_costs.told_late`; 0 where
    an engine tells tokens at once."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Steps of one run, in order: `count` steps run linearly from `first` to `last`."""

    spans: list[tuple[int, Step, Step]]
    first_tokens: Array
    """(requests,) steps until each request's first token was out, ascending."""


def can_be_recorded(requests: Requests) -> bool:
    """Whether all requests wait from the start."""
    return not np.any(requests.arrival_seconds)


def record(deployment: Deployment, requests: Requests) -> Recording:
    """Steps in which a replica serves requests that all wait from the start."""
    costs = deployment.costs
    draft_tokens = costs.draft_tokens
    kinds = [tables_of(each) for each in (costs, *costs.others)]
    spans: list[tuple[int, Step, Step]] = []

    def cost(step: Step) -> tuple[Any, ...]:
        """Cost in the form of `step_cost` and `round_cost`: a second, and the step at the end."""
        return (1.0, 1.0, 1.0, 1.0, *(0.0,) * 7, False, *(0,) * 4, step)

    def step_cost(*arguments: Any) -> tuple[Any, ...]:
        *work, starting, tables, _, _ = arguments
        kind = next(i for i, own in enumerate(kinds) if own[0] is tables[0])
        return cost(_step(kind, kinds[kind], *work, starting, deployment.static_batches))

    def round_cost(*arguments: Any) -> tuple[Any, ...]:
        *work, starting, _, _, _, _ = arguments
        return cost(_round(kinds, draft_tokens, *work, starting))

    def add_steps(k: int, first: tuple[Any, ...], last: tuple[Any, ...], *rest: Any) -> None:
        spans.append((k, first[-1], last[-1]))
        rest[-1][NOW] += k

    def told_late(*arguments: Any) -> float:
        """Let the next step hold those that go on; `_step` took all for such."""
        first, _, rows, going_on, _, _, graph_tokens, _ = arguments
        if going_on != rows:
            following = first[-1].following
            following[:] = 0.0
            following[_launches(going_on < len(graph_tokens), 0)] = 1.0
            following[3] = going_on
        return 0.0

    hooks = {
        "step_cost": step_cost,
        "round_cost": round_cost,
        "account": add_steps,
        "add_steps": add_steps,
        "count_passes": lambda *_: None,
        "told_late": told_late,
    }
    served = _uncompiled(simulate, hooks)(
        requests.arrival_seconds,
        requests.input_tokens,
        requests.output_tokens,
        costs,
        static_batches=deployment.static_batches,
    )
    return Recording(spans=spans, first_tokens=np.sort(served.first_token_seconds))


def _uncompiled(function: Any, others: dict[str, Any]) -> Any:
    """A function in plain Python with what it calls, which `others` replaces by name."""
    plain = getattr(function, "py_func", function)
    names = dict(plain.__globals__)
    for name in plain.__code__.co_names:
        if name in others:
            names[name] = others[name]
        elif hasattr(names.get(name), "py_func"):
            names[name] = _uncompiled(names[name], others)
    copy = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)
    copy.__kwdefaults__ = plain.__kwdefaults__
    return copy


_pass_parts: Callable[..., Any] = pass_parts.py_func


def _add_pass(
    parts: dict[Part, float],
    kind: int,
    tables: Any,
    work: tuple[int, int, Sequence[float], int, int],
    times: float = 1.0,
) -> bool:
    """Add the parts of a pass, `times` over; returns whether a captured graph runs it.

    work : tokens, rows, attention statistics, prefills and decodes, as of `step_costs.pass_parts`
    """
    *_, att, prefills, decodes = work
    *_, token_row, row_row, in_graph, beyond = _pass_parts(*work, tables)
    found = [("tokens", token_row, beyond), ("rows", row_row, 1.0)]
    for phase, present, stats in ((0, prefills, (2, 3)), (1, decodes, (0, 1))):
        if present:
            found.append(("phases", phase, 1.0))
            found += [("attention", j, att[j]) for j in stats]
    for name, number, weight in found:
        key = (kind, name, int(number))
        parts[key] = parts.get(key, 0.0) + times * float(weight)
    return bool(in_graph)


def _step(
    kind: int,
    tables: Any,
    tokens: int,
    rows: int,
    att: Sequence[float],
    prefills: int,
    decodes: int,
    starting: bool,
    told_at_once: bool,
) -> Step:
    """The step as `step_costs.step_cost` costs it."""
    parts: dict[Part, float] = {}
    in_graph = _add_pass(parts, kind, tables, (tokens, rows, att, prefills, decodes))
    host, gap = np.zeros((2, _HOST_FIELDS))
    host[_launches(in_graph, prefills)] = 1.0
    host[3] = rows
    gap[4], gap[5], gap[6] = 1.0, att[0], float(starting)
    (gap if starting else host)[7] = prefills
    following = np.zeros(_HOST_FIELDS)
    if not told_at_once:
        following[_launches(rows < len(tables[4]), 0)] = 1.0
        following[3] = rows
    return Step(parts, host, gap, following)


def _round(
    kinds: Sequence[Any],
    draft_tokens: int,
    work: tuple[int, int, int],
    check: Sequence[float],
    first: Sequence[float],
    further: Sequence[float],
    starting: bool,
) -> Step:
    """The round as `speculative_batching.round_cost` costs it."""
    decoding, prompts, prompt_tokens = work
    sequences, others = decoding + prompts, draft_tokens - 1
    checked = (draft_tokens + 1) * decoding
    tokens = checked + prompt_tokens
    parts: dict[Part, float] = {}
    host, gap = np.zeros((2, _HOST_FIELDS))

    served = tokens, checked + prompts, check, prompts, decoding
    host[_launches(_add_pass(parts, 0, kinds[0], served), prompts)] += 1.0
    host[0] -= 1.0  # the host's time of a round holds it
    drafted = tokens + sequences, sequences, first, prompts, decoding
    _add_pass(parts, 1, kinds[1], drafted)
    drafted = sequences, sequences, further, 0, sequences
    _add_pass(parts, 2, kinds[2], drafted, float(others))
    host[8] = draft_tokens

    gap[3], gap[7], gap[9], gap[10] = sequences, prompts, 1.0, sequences
    gap[4], gap[6] = 1.0 + draft_tokens, float(starting)
    return Step(parts, host, gap, np.zeros(_HOST_FIELDS))  # the next round waits for the drafts


def _launches(in_graph: bool, prefills: int) -> int:
    """Which of `costs.host_seconds` says how long the host needs for a step."""
    if not in_graph:
        return 2
    return 1 if prefills else 0


# -- costing -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Kernels of one GPU; arrays (kernels,)."""

    gpu: GpuSpec
    work: dict[str, Array]
    """Arguments of `roofline.kernel_costs` that no calibration changes."""
    classes: tuple[str, ...]
    dtypes: tuple[str, ...]
    op_class: NDArray[np.int64]
    """Index of `classes`."""
    compute_dtype: NDArray[np.int64]
    """Index of `dtypes`."""
    has_calls: Array
    """1 where the fixed time of calls counts, else 0."""

    def tables(self, calibration: Calibration) -> Array:
        """Memory s, compute s, fixed J and core J of each kernel (kernels, 4)."""
        classes = [calibration.kernels[c] for c in self.classes]

        def parameter(name: str) -> Array:
            values = np.array([getattr(c, name) for c in classes])[self.op_class]
            return values * self.has_calls if name == "call_seconds" else values

        flops = np.array([joules_per_flop(calibration, d) for d in self.dtypes])
        costs = kernel_costs(
            **self.work,
            joules_per_flop=flops[self.compute_dtype],
            gap_seconds=calibration.kernel_gap_seconds * self.has_calls,
            gpu=self.gpu,
            calibration=calibration,
            parameter=parameter,
        )
        return row_tables(costs)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRuns:
    """Recorded runs of one GPU, ready to be costed. Matrices are sparse."""

    kernels: Kernels
    parts: Any
    """(parts, kernels) weights."""
    steps: Any
    """(steps, parts) weights."""
    hosts: tuple[tuple[ModelSpec, ServingConfig], ...]
    host: Any
    """(steps, 11 hosts) weights of `costs.host_seconds` of each of `hosts` in the host's time."""
    gap: Any
    """(steps, 11 hosts) weights of them in the gap."""
    following: Any
    """(steps, 11 hosts) weights of them in the launch of a step after it, see `Step`."""
    step_hosts: NDArray[np.int64]
    """(steps,) which of `hosts` a step is of."""
    first_steps: NDArray[np.int64]
    """(runs,) first step of each."""
    until_first_token: Array
    """(steps,) share of the step that counts for the run's median TTFT."""
    first_token: Array
    """(steps,) share of that median whose tokens the step gives."""
    gpus: Array
    """(runs,) GPUs of a replica."""

    def totals(
        self, calibration: Calibration, rounding: float = ROUNDING
    ) -> tuple[Array, Array, Array]:
        """Joules of all GPUs, seconds and median TTFT of the runs; each (runs,).

        Numbers of the calibration may be complex, which gives derivatives (`robust_minimum`);
        `rounding` : see `ROUNDING`; 0 = as the simulator has it.
        """
        groups = [of_group(calibration, serving) for _, serving in self.hosts]
        apart = next((g for g in groups if g is not calibration), calibration)
        tables = self.steps @ (self.parts @ self.kernels.tables(apart))
        host = np.concatenate(
            [
                host_seconds(
                    model,
                    calibration.stacks[serving.stack],
                    serving,
                    reorder_seconds(model, serving, self.kernels.gpu, calibration),
                )
                for model, serving in self.hosts
            ]
        )
        link = np.array([g.base_watts - calibration.base_watts for g in groups])
        seconds, joules = step_seconds_and_joules(
            *(tables, calibration, self.host @ host, self.gap @ host),
            *(link[self.step_hosts], rounding),
        )

        def by_run(values: Array) -> Array:
            return np.asarray(np.add.reduceat(values, self.first_steps))

        busy = seconds - self.gap @ host - self.host @ host  # of the GPU, after the host is done
        following = self.following @ host
        late = longer(busy, following, rounding) - busy
        ttft = by_run(seconds * self.until_first_token + late * self.first_token)
        return by_run(joules) * self.gpus, by_run(seconds), ttft


def recorded_runs(runs: Sequence[tuple[Deployment, Requests]]) -> RecordedRuns:
    """Record runs of one GPU, at least one, whose requests all wait from the start.

    Raises
    ------
    ValueError
        If the runs are of several GPUs or pipeline stages, or requests arrive later.
    """
    from scipy.sparse import csr_array  # noqa: PLC0415

    gpu = runs[0][0].gpu
    if any(d.gpu != gpu for d, _ in runs):
        raise ValueError("recorded runs are of one GPU")
    if any(d.serving.pipeline_parallel > 1 for d, _ in runs):
        raise ValueError("recorded runs have one pipeline stage")
    if not all(can_be_recorded(requests) for _, requests in runs):
        raise ValueError("steps of requests that arrive over time depend on what steps cost")
    deployments = list({id(d): d for d, _ in runs}.values())
    number = {id(d): i for i, d in enumerate(deployments)}
    columns: dict[tuple[int, Part], int] = {}
    entries = _Entries(), _Entries(), _Entries(), _Entries()
    first_steps, until_first_token, step_hosts = [], [], []
    length = 0
    for deployment, requests in runs:
        d = number[id(deployment)]
        recording = record(deployment, requests)
        first_steps.append(length)
        for count, first, last in recording.spans:
            at = np.arange(length, length + count)
            share = np.arange(count) / max(count - 1, 1)
            for part, weight in first.parts.items():
                column = columns.setdefault((d, part), len(columns))
                entries[0].add(at, column, weight + (last.parts[part] - weight) * share)
            of_host = (
                (first.host, last.host),
                (first.gap, last.gap),
                (first.following, last.following),
            )
            for matrix, (start, stop) in zip(entries[1:], of_host, strict=True):
                for j in np.flatnonzero(start):
                    weights = start[j] + (stop[j] - start[j]) * share
                    matrix.add(at, _HOST_FIELDS * d + j, weights)
            length += count
        until_first_token.append(_median_weights(recording, length - first_steps[-1]))
        step_hosts.append(np.full(length - first_steps[-1], d))
    kernels, parts = _kernels(deployments, columns, gpu)
    hosts = length, _HOST_FIELDS * len(deployments)
    return RecordedRuns(
        kernels=kernels,
        parts=parts,
        steps=csr_array(entries[0].matrix(), shape=(length, len(columns))),
        hosts=tuple((d.model, d.serving) for d in deployments),
        host=csr_array(entries[1].matrix(), shape=hosts),
        gap=csr_array(entries[2].matrix(), shape=hosts),
        following=csr_array(entries[3].matrix(), shape=hosts),
        step_hosts=np.concatenate(step_hosts),
        first_steps=np.array(first_steps),
        until_first_token=np.concatenate(until_first_token),
        first_token=np.concatenate([w - np.append(w[1:], 0.0) for w in until_first_token]),
        gpus=np.array([float(d.gpus_per_replica) for d, _ in runs]),
    )


class _Entries:
    """Entries of a sparse matrix."""

    def __init__(self) -> None:
        self.rows: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        self.columns: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        self.weights: list[Array] = [np.empty(0)]

    def add(self, rows: NDArray[np.int64], column: int, weights: Array) -> None:
        """Add weights (n,) in rows (n,) of one column."""
        self.rows.append(rows)
        self.columns.append(np.full(len(rows), column))
        self.weights.append(weights)

    def matrix(self) -> tuple[Array, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Weights, and their rows and columns."""
        rows, columns = np.concatenate(self.rows), np.concatenate(self.columns)
        return np.concatenate(self.weights), (rows, columns)


def _median_weights(recording: Recording, steps: int) -> Array:
    """Share of each step (steps,) in the median time until a first token is out."""
    n = len(recording.first_tokens)
    middle = recording.first_tokens[[(n - 1) // 2, n // 2]]
    return np.asarray((np.arange(steps)[:, None] < middle).mean(axis=1))


def _kernels(
    deployments: Sequence[Deployment], columns: dict[tuple[int, Part], int], gpu: GpuSpec
) -> tuple[Kernels, Any]:
    """The kernels of all parts, and their weights in them (parts, kernels)."""
    from scipy.sparse import csr_array  # noqa: PLC0415

    work: list[dict[str, Array]] = []
    classes: list[str] = []
    dtypes: list[str] = []
    has_calls, entries, count = [], _Entries(), 0
    for d, deployment in enumerate(deployments):
        model, serving = deployment.model, deployment.serving
        for kind, of_kind in enumerate(((model, serving), *other_passes(model, serving))):
            numbers: dict[str, list[tuple[int, int]]] = {}
            for (owner, (k, name, number)), column in columns.items():
                if (owner, k) == (d, kind):
                    numbers.setdefault(name, []).append((number, column))
            for name, found in numbers.items():
                each = np.array([float(number) for number, _ in found])
                for table, stats, calls, weight in _kernels_of(*of_kind, name, each):
                    shape = len(stats), len(table.names)
                    arguments = operator_work(table, stats, gpu)
                    work.append(
                        {k: np.broadcast_to(v, shape).ravel() for k, v in arguments.items()}
                    )
                    classes += table.op_class * len(stats)
                    dtypes += table.compute_dtype * len(stats)
                    has_calls.append(np.full(shape, calls).ravel())
                    for _, column in found:
                        at = np.arange(count, count + shape[1])
                        entries.add(at, column, np.full(shape[1], weight))
                        count += shape[1]
    class_names, op_class = np.unique(classes, return_inverse=True)
    dtype_names, compute_dtype = np.unique(dtypes, return_inverse=True)
    weights, (at_kernel, at_part) = entries.matrix()
    kernels = Kernels(
        gpu=gpu,
        work={k: np.concatenate([block[k] for block in work]) for k in work[0]},
        classes=tuple(class_names.tolist()),
        dtypes=tuple(dtype_names.tolist()),
        op_class=op_class,
        compute_dtype=compute_dtype,
        has_calls=np.concatenate(has_calls),
    )
    return kernels, csr_array((weights, (at_part, at_kernel)), shape=(len(columns), count))


def _kernels_of(
    model: ModelSpec, serving: ServingConfig, name: str, numbers: Array
) -> Iterator[tuple[OperatorTable, Array, float, float]]:
    """What rows of a field of `CostTables` are made of, as `costs.cost_tables` makes them.

    Each is operators, their statistics (len(numbers), len(STATS)), whether the fixed time of their
    calls counts, and the weight of their costs.
    """
    token_ops, row_ops, attention = split_table(operator_table(model, serving))

    def of_attention(**stats: Array) -> Array:
        return step_stats(model, tokens=0.0, **stats)

    if name == "tokens":
        yield token_ops, step_stats(model, tokens=numbers), 1.0, 1.0
        yield attention, of_attention(prefill_rows=numbers), 0.0, 1.0
    elif name == "rows":
        yield row_ops, step_stats(model, tokens=numbers, rows=numbers), 1.0, 1.0
        yield attention, of_attention(decode_sequences=numbers), 0.0, 1.0
        yield attention, of_attention(prefill_rows=numbers), 0.0, -1.0
    elif name == "attention":
        stats = {s: _LARGE * (numbers == i) for i, s in enumerate(ATTENTION_STATS)}
        yield attention, of_attention(**stats), 0.0, 1.0 / _LARGE
    else:
        of_phase = [numbers == 1, numbers == 1, numbers == 0, numbers == 0]
        stats = {s: _SMALL * p for s, p in zip(ATTENTION_STATS, of_phase, strict=True)}
        yield attention, of_attention(**stats), 1.0, 1.0

"""How boards meet their power limit, from bursts of products (`calibration/kernels/bursts.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.metering.windows import read_jsonl
from calibration.validation.report import markdown_table

Array = NDArray[np.float64]

_SLOWER = 1.04
"""A product that takes so much longer than the first ones meets the limit."""
_FIRST = 5
_SETTLED_SECONDS = 0.3
_REST_SECONDS = 0.05
_COUNTER_SECONDS = 0.1
"""Period of the boards' energy counter: what it says before is of other load."""
_RESTS = {"none": "nothing", "cool": "copies in the L2", "light": "reads of device memory"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """Products one after another, begun after a rest."""

    rest: str
    ends_seconds: Array
    """Of the products, from the end of the first (n,)."""
    seconds: Array
    """Each one's time (n,)."""
    reported_share: float | None
    """SM clock that the driver gives once the board has settled, over the highest [-]."""

    @property
    def full_seconds(self) -> float:
        """Time of a product before the limit bites [s]."""
        return float(np.median(self.seconds[:_FIRST]))

    @property
    def onset_seconds(self) -> float | None:
        """When products begin to take longer [s]; None = never in this burst."""
        late = np.flatnonzero(self.seconds > _SLOWER * self.full_seconds)
        return float(self.ends_seconds[late[0]]) if len(late) else None

    @property
    def settled_rate(self) -> float | None:
        """Rate of products once the board has settled, over that of the first ones [-]."""
        late = self.ends_seconds > _SETTLED_SECONDS
        if not late.any():
            return None
        return self.full_seconds / float(np.median(self.seconds[late]))


def bursts_of(record: Mapping[str, Any]) -> Iterator[Burst]:
    """The large products of a pattern that follow a rest of at least 50 ms."""
    ends, step = np.array(record["end_seconds"]), np.array(record["step_of_kernel"])
    samples = np.array(record["samples"], dtype=float)
    steps = record["pattern"]["steps"]
    for number, (kind, _) in enumerate(steps):
        if kind != "heavy" or number == 0 or steps[number - 1][1] < _REST_SECONDS:
            continue
        mine = ends[step == number]
        at = samples[:, 0] - record["start_seconds"]
        late = (at > mine[0] + _SETTLED_SECONDS) & (at < mine[-1])
        yield Burst(
            rest=steps[number - 1][0],
            ends_seconds=mine[1:] - mine[0],
            seconds=np.diff(mine),
            reported_share=float(np.nanmedian(samples[late, 2]) / np.nanmax(samples[:, 2]))
            if late.any()
            else None,
        )


def product_joules(record: Mapping[str, Any]) -> tuple[float, float]:
    """Mean time [s] and energy [J, whole board] of a product, of a wave over copies in the L2.

    The energy counter over the wave, less the copies' power, metered before it, for the rest of
    the time. ValueError if the pattern is no such wave.
    """
    kinds = [kind for kind, _ in record["pattern"]["steps"]]
    if set(kinds) != {"cool", "heavy"} or kinds[0] != "cool":
        raise ValueError(f"no wave over copies: {record['pattern']['name']}")
    ends, step = np.array(record["end_seconds"]), np.array(record["step_of_kernel"])
    samples = np.array(record["samples"], dtype=float)
    ticks = np.flatnonzero(np.diff(samples[:, 3]) > 0) + 1
    at, joules = samples[ticks, 0] - record["start_seconds"], samples[ticks, 3]
    heavy = np.array([kinds[i] == "heavy" for i in step])

    def between(first: float, last: float) -> NDArray[np.int64]:
        return np.flatnonzero((at >= first) & (at <= last))[[0, -1]]

    alone = ends[step == 0]
    first, last = between(alone[0] + _COUNTER_SECONDS, alone[-1])
    rest_watts = (joules[last] - joules[first]) / (at[last] - at[first])
    first, last = between(ends[heavy][0] + _COUNTER_SECONDS, ends[-1])
    mine = heavy & (ends > at[first]) & (ends <= at[last])
    taken = np.diff(ends, prepend=0.0)[mine]
    length = at[last] - at[first]
    total = joules[last] - joules[first] - rest_watts * (length - taken.sum())
    return float(taken.mean()), float(total / len(taken))


def limit_table(paths: Sequence[Path]) -> str:
    """Onset and depth of the power limit by board and by what ran before."""
    rows = []
    for path in paths:
        found = [b for r in read_jsonl(path) if r["kind"] == "burst" for b in bursts_of(r)]
        for rest, named in _RESTS.items():
            mine = [b for b in found if b.rest == rest]
            onsets = [b.onset_seconds for b in mine if b.onset_seconds is not None]
            rates = [b.settled_rate for b in mine if b.settled_rate is not None]
            clocks = [b.reported_share for b in mine if b.reported_share is not None]
            if not mine:
                continue
            rows.append(
                [
                    f"{path.name.removesuffix('.jsonl.gz')}, after {named}",
                    f"{len(mine)}",
                    f"{1e3 * float(np.median([b.full_seconds for b in mine])):.3f}",
                    _spread([1e3 * s for s in onsets]),
                    f"{100 * float(np.median(rates)):.0f}" if rates else "-",
                    f"{100 * float(np.median(clocks)):.0f}" if clocks else "-",
                ]
            )
    head = ("board", "bursts", "ms at first", "slower after ms", "rate then %", "clock given %")
    return markdown_table(head, rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "never"
    return f"{np.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"

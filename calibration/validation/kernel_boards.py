"""Boards whose kernel windows were recorded, and how far two boards of a kind agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Literal

from calibration.fitting.measurements import Measurements, read_measurements
from calibration.kernels.comparisons import Record, repeated, valid_cases
from energymodel.errors import EnergyModelError

SAME_CLOCK = 0.005
"""Clocks of two windows count as the same up to this difference [-]."""
Cause = Literal["host", "power limit", "clock", "draw", "time"]
CAUSES: Mapping[Cause, str] = {
    "host": "the host launches each kernel: its speed differs",
    "power limit": "the power limit held the clock down on at least one board",
    "clock": f"clocks differ by more than {100 * SAME_CLOCK:g} % without the power limit",
    "draw": "same clock, times within 1 %: one board draws more",
    "time": "same clock, times differ by more than 1 %",
}
BAR = 0.01
"""What two boards may differ by [-]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One file of windows: one board, or several measured together."""

    name: str
    measured: Measurements
    cases: Mapping[str, Record]
    """Last valid window of each case."""

    @property
    def gpu(self) -> str:
        """Name of the GPU model."""
        return self.measured.gpu.name

    @property
    def serials(self) -> frozenset[str]:
        """Hashed serial numbers of its boards."""
        headers = [r for r in self.measured.records if r.get("kind") == "header"]
        return frozenset(str(g["uuid_sha256"]) for h in headers for g in h["identity"]["gpus"])


def read_boards(folder: Path) -> list[Board]:
    """All files of kernel windows in a folder, by name.

    Raises
    ------
    EnergyModelError
        If there are none, or one holds no valid window of a known GPU.
    """
    paths = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
    if not paths:
        raise EnergyModelError(f"{folder}: no .jsonl or .jsonl.gz file of kernel windows")
    boards = []
    for path in paths:
        measured = read_measurements([path])
        boards.append(
            Board(
                name=path.name.split(".")[0],
                measured=measured,
                cases=valid_cases(measured.records),
            )
        )
    return boards


def by_case(boards: Sequence[Board]) -> dict[str, list[Record]]:
    """Records of each case, one per board that has it."""
    found: dict[str, list[Record]] = {}
    for board in boards:
        for name, record in board.cases.items():
            found.setdefault(name, []).append(record)
    return found


def middle(records: Sequence[Record], value: Callable[[Record], float | None] | str) -> float:
    """Median over the records of a field or function [its unit]."""
    get = (lambda r: r[value]) if isinstance(value, str) else value
    return float(median(v for v in map(get, records) if v is not None))


# -- two boards of a kind ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """The same case on two boards of a kind; differences are second / first - 1."""

    case: str
    boards: tuple[str, str]
    first: Record
    second: Record

    @property
    def op_class(self) -> str:
        """The suite's class."""
        return str(self.first["op_class"])

    @property
    def seconds(self) -> float | None:
        """Difference of the time of an iteration [-]; None for states without one."""
        return self._difference("iteration_seconds")

    @property
    def watts(self) -> float:
        """Difference of mean power [-]."""
        return float(self.second["power_watts"] / self.first["power_watts"] - 1.0)

    @property
    def joules(self) -> float | None:
        """Difference of the energy of an iteration [-]; None for states without one."""
        return self._difference("energy_per_iteration_joules")

    def _difference(self, field: str) -> float | None:
        one, other = self.first.get(field), self.second.get(field)
        return None if not one or not other else float(other / one - 1.0)

    @property
    def largest(self) -> float:
        """Largest size of the three differences [-]."""
        return max(abs(d) for d in (self.seconds, self.watts, self.joules) if d is not None)

    @property
    def clocks(self) -> tuple[float, float]:
        """Mean SM clocks [Hz]."""
        return clock(self.first), clock(self.second)

    @property
    def cause(self) -> Cause:
        """What the windows record about a difference."""
        one, other = self.first, self.second
        if not one["graph"] and one["op_class"] in ("decode_stack", "moe_loop"):
            return "host"
        if one["window"]["power_capped"] or other["window"]["power_capped"]:
            return "power limit"
        slow, fast = sorted(self.clocks)
        if fast / slow - 1.0 > SAME_CLOCK:
            return "clock"
        return "draw" if self.seconds is None or abs(self.seconds) <= BAR else "time"


def clock(record: Record) -> float:
    """Mean SM clock of a window [Hz]."""
    return float(record["window"]["sm_clock_hz"])


def celsius(record: Record) -> float:
    """Mean of the temperatures before and after a window [degrees C]."""
    window = record["window"]
    states = [*window["states_before"], *window["states_after"]]
    return float(sum(s["temperature_celsius"] for s in states) / len(states))


def repeats(boards: Sequence[Board]) -> Iterator[list[Repeat]]:
    """Common cases of every two different boards of a kind; pairs without any are left out."""
    for one, other in combinations(boards, 2):
        if one.gpu != other.gpu or one.serials & other.serials:
            continue
        common = [n for n in one.cases if n in other.cases and one.cases[n]["gpus"] == 1]
        if common:
            yield [
                Repeat(
                    case=name,
                    boards=(one.name, other.name),
                    first=one.cases[name],
                    second=other.cases[name],
                )
                for name in sorted(common)
            ]


def twice(boards: Sequence[Board]) -> Iterator[list[Repeat]]:
    """Cases that a board measured twice in one sitting; boards without any are left out."""
    for board in boards:
        pairs = repeated(board.cases)
        if pairs:
            yield [
                Repeat(case=one["case"], boards=(board.name, board.name), first=one, second=other)
                for one, other in pairs
            ]


def idle_offset_watts(pair: Sequence[Repeat]) -> float | None:
    """Median difference of two boards' power in states without work at the same clock [W].

    Idle states and kernels that do next to nothing; None where no such state was measured twice.
    """
    apart = [
        r.second["power_watts"] - r.first["power_watts"]
        for r in pair
        if r.op_class in ("idle", "base") and r.cause in ("draw", "time")
    ]
    return median(apart) if apart else None


def without_offset(repeat: Repeat, offset_watts: float) -> float:
    """Difference of watts that is left when the boards' idle difference is taken off [-]."""
    watts = repeat.second["power_watts"] - offset_watts
    return float(watts / repeat.first["power_watts"] - 1.0)

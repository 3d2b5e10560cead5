"""What the paper states, and rows that set it beside a prediction and a measurement.

The paper is Fernandez et al., ACL 2025 (arXiv 2504.17674); its statements are in
`profiles/paper_findings.json`, each with its place. Nothing is fitted to them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from energymodel.datafiles import data_path

Unit = Literal["percent", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One statement of the paper. Values are fractions of 1, or exponents."""

    id: str
    where: str
    """Table, figure or topic."""
    statement: str
    quantity: str
    """What the number is; a change is negative where energy or time is saved."""
    unit: Unit
    """How values are shown."""
    stated: float | None
    """None where the paper gives words only."""
    stated_text: str
    within: tuple[float | None, float | None]
    """Values between these go the paper's way."""
    not_stated: str
    """Conditions that the paper leaves open."""
    why: str
    """Why a prediction may differ."""

    @property
    def title(self) -> str:
        """The statement, with its quantity where that is not plain from it."""
        quantity = self.quantity.split(",")[0]
        known = quantity == "change of energy" or self.unit == "plain"
        return self.statement if known else f"{self.statement}: {quantity}"

    def agrees(self, value: float) -> bool:
        """Whether a value goes the paper's way."""
        low, high = self.within
        return (low is None or value > low) and (high is None or value < high)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperIdeal:
    """The constants of the paper's "theoretical optimal" energy."""

    peak_flops_per_s: float
    tdp_watts: float
    gpu: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """Everything that is taken from the paper."""

    source: str
    ideal: PaperIdeal
    draft_tokens: int
    """Of its speculative decoding."""
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A prediction of a finding."""

    gpu: str
    setting: str
    """Model, lengths and batch that were computed."""
    value: float
    low: float | None = None
    """Interval from the calibration's; None for times, of which it holds none."""
    high: float | None = None
    spread_low: float | None = None
    """Least value over the conditions that the paper leaves open."""
    spread_high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What this project measured of a finding, on another GPU than the paper."""

    gpu: str
    setting: str
    value: float
    low: float
    """Least of the cases."""
    high: float
    cases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A finding, stated, predicted and measured."""

    finding: Finding
    predicted: Estimate | None
    measured: Measured | None

    @property
    def same_direction(self) -> bool | None:
        """Whether the prediction goes the paper's way; None without one."""
        return None if self.predicted is None else self.finding.agrees(self.predicted.value)

    @property
    def measured_same_direction(self) -> bool | None:
        """Whether the measurement goes the paper's way; None without one."""
        return None if self.measured is None else self.finding.agrees(self.measured.value)

    @property
    def stated_in_interval(self) -> bool | None:
        """Whether the stated value lies in the prediction's interval; None without either."""
        p, stated = self.predicted, self.finding.stated
        if stated is None or p is None or p.low is None or p.high is None:
            return None
        return p.low <= stated <= p.high

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, the judgements included."""
        return asdict(self) | {
            "same_direction": self.same_direction,
            "measured_same_direction": self.measured_same_direction,
            "stated_in_interval": self.stated_in_interval,
        }


def load_paper() -> Paper:
    """Read the shipped statements of the paper."""
    data = json.loads(data_path("paper_findings.json").read_text(encoding="utf-8"))
    return Paper(
        source=data["source"],
        ideal=PaperIdeal(**data["ideal"]),
        draft_tokens=data["draft_tokens"],
        findings=tuple(_finding(entry) for entry in data["findings"]),
    )


def _finding(entry: Mapping[str, Any]) -> Finding:
    low, high = entry["within"]
    return Finding(**{**entry, "within": (low, high)})

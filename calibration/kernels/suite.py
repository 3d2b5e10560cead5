"""The kernel suites: which cases, in which order, and how long they take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random

from calibration.kernels.cases import Case, all_cases
from energymodel.errors import ConfigurationError, unknown_name

SUITES = ("quick", "full")
OVERHEAD_SECONDS = 0.5
"""Typical time of a case besides warm-up and window: buffers, capture, two half ticks."""
COMPILE_SECONDS = 2.0
"""Typical time to compile the two Triton kernels of one fused MoE configuration."""
PACKED_COMPILE_SECONDS = 8.0
"""As `COMPILE_SECONDS`, of the kernels that unpack experts and route themselves."""


def build_suite(name: str, *, gpus: int = 1) -> tuple[Case, ...]:
    """All cases of a suite that `gpus` GPUs can run, in no particular order.

    Raises
    ------
    ConfigurationError
        If the suite is unknown.
    """
    if name not in SUITES:
        raise ConfigurationError(unknown_name("suite", name, SUITES))
    cases = [case for case in all_cases() if case.gpus <= gpus]
    if name == "quick":
        cases = [case for case in cases if case.priority == 0]
    again = [c for i, c in enumerate(c for c in cases if c.priority == 0) if i % 4 == 0]
    repeats = [replace(c, name=f"{c.name}.r2", repeat=2, priority=1) for c in again if c.graph]
    return tuple(cases + repeats)


def ordered(cases: Iterable[Case], seed: int) -> tuple[Case, ...]:
    """Measuring order: cold idle first, then by priority, classes mixed at random.

    Within a priority every class is spread evenly over the time (stratified), so that a
    run cut short has seen all classes, and slow drifts do not fall on one class alone.
    """
    random = Random(seed)
    keyed: list[tuple[tuple[float, ...], Case]] = []
    groups: dict[tuple[int, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.priority, case.op_class), []).append(case)
    for (priority, _), members in sorted(groups.items()):
        random.shuffle(members)
        for rank, case in enumerate(members):
            spread = (rank + random.random()) / len(members)
            keyed.append(((_STATE_ORDER.get(case.launcher, 9), priority, spread), case))
    return tuple(case for _, case in sorted(keyed, key=lambda pair: pair[0]))


_STATE_ORDER = {"idle_cold": 0, "idle_context": 1}


def estimated_seconds(case: Case, window_seconds: float) -> float:
    """Wall time to expect of a case [s], for the progress bar and the time limit."""
    compiling = {"moe_fused": COMPILE_SECONDS, "moe_mxfp4": PACKED_COMPILE_SECONDS}
    beside = OVERHEAD_SECONDS + compiling.get(case.launcher, 0.0)
    return case.warmup_seconds + window_seconds + beside

"""Which windows of the suite belong together, and what they say about each other.

Pure functions on records of valid windows by case name (`valid_cases`): experts' kernels of the
same useful FLOPs, a decode step from a CUDA graph and launched eagerly, the best of each kind
against the datasheet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from energymodel.specs import GpuSpec

Record = Mapping[str, Any]
_GEMM_DTYPES = ("bf16", "fp8", "int8")
EXPERT_KERNELS = {
    "moe_dense": "GEMM",
    "moe_fused": "fused",
    "moe_grouped": "grouped",
    "moe_loop": "loop",
}
"""Ways to do the same useful FLOPs, by launcher; `GEMM`: one MLP of a token's experts' width."""


def valid_cases(records: Sequence[Record]) -> dict[str, Record]:
    """Last valid record of each case, by name."""
    return {r["case"]: r for r in records if r.get("kind") == "case" and r.get("valid")}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ExpertWork:
    """One amount of useful work of a mixture's experts."""

    model: str
    tokens: int
    skewed: bool


def expert_kernels(cases: Mapping[str, Record]) -> dict[ExpertWork, dict[str, Record]]:
    """Records by work and kernel (a value of `EXPERT_KERNELS`), repeats left out.

    The GEMM has no routing: it stands beside balanced and skewed routing of as many tokens.
    """
    found: dict[ExpertWork, dict[str, Record]] = {}
    for record in cases.values():
        kernel = EXPERT_KERNELS.get(record["launcher"])
        if kernel is None or record["repeat"] > 1:
            continue
        shape = record["shape"]
        key = ExpertWork(
            model=record["family"], tokens=int(shape["tokens"]), skewed=bool(shape["skewed"])
        )
        found.setdefault(key, {})[kernel] = record
    for key, kernels in found.items():
        balanced = ExpertWork(model=key.model, tokens=key.tokens, skewed=False)
        if key.skewed and "GEMM" in found.get(balanced, {}):
            kernels["GEMM"] = found[balanced]["GEMM"]
    return dict(sorted(found.items()))


def rows_per_useful(fused: Record) -> float:
    """Expert rows that the fused kernel computes, tiles filled up, over those that count [-]."""
    shape = fused["shape"]
    return float(fused["details"]["expert_rows"] / (shape["tokens"] * shape["top_k"]))


def graph_and_eager(cases: Mapping[str, Record]) -> Iterator[tuple[Record, Record]]:
    """Pairs of the same decode step, replayed from a CUDA graph and launched by the host."""
    for name, record in sorted(cases.items()):
        eager = cases.get(name.replace(".graph", ".eager"))
        if record["op_class"] == "decode_stack" and name.endswith(".graph") and eager is not None:
            yield record, eager


def launch_seconds(eager: Record) -> float | None:
    """Host time of an operation of an eager step [s]; None where it was not recorded."""
    operations, host = eager["details"].get("dispatched_ops"), eager["host_seconds_per_iteration"]
    return float(host / operations) if operations and host else None


def repeated(cases: Mapping[str, Record]) -> list[tuple[Record, Record]]:
    """Cases that one run measured twice: first and second record."""
    return [
        (cases[name.removesuffix(".r2")], record)
        for name, record in cases.items()
        if name.endswith(".r2") and name.removesuffix(".r2") in cases
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """The best window of a kind of kernel."""

    title: str
    record: Record
    per_second: float
    """FLOPs or bytes a second."""
    is_compute: bool
    share: float | None
    """Of the datasheet's peak [-]; None where it states none."""
    joules_per_unit: float
    """Board energy per FLOP or byte [J]."""
    joules_above_base: float | None
    """The same without base power; None where that was not measured."""


def base_watts(cases: Mapping[str, Record]) -> float | None:
    """Power of a board that runs kernels which do next to nothing [W]."""
    return min((r["power_watts"] for r in cases.values() if r["op_class"] == "base"), default=None)


def flops_per_second(record: Record) -> float:
    """FLOPs run a second, padding included."""
    return float(record["executed_flops"] / record["iteration_seconds"])


def bytes_per_second(record: Record) -> float:
    """Bytes read and written a second, wherever they lie."""
    return float((record["hbm_bytes"] + record["activation_bytes"]) / record["iteration_seconds"])


def reached(cases: Mapping[str, Record], spec: GpuSpec | None) -> Iterator[Reached]:
    """The highest rate of each kind of kernel; kinds that were not measured are left out."""
    base = base_watts(cases)
    for title, kind, is_compute, chosen in _KINDS:
        found = [r for r in cases.values() if r.get("iteration_seconds") and chosen(r)]
        if not found:
            continue
        rate = flops_per_second if is_compute else bytes_per_second
        record = max(found, key=rate)
        peak = None
        if spec is not None and is_compute:
            peak = spec.peak_flops_per_s.get(kind)
        elif spec is not None and kind == "hbm":
            peak = spec.hbm_bytes_per_s
        value, watts = rate(record), record["power_watts"]
        yield Reached(
            title=title,
            record=record,
            per_second=value,
            is_compute=is_compute,
            share=None if peak is None else value / peak,
            joules_per_unit=watts / value,
            joules_above_base=None if base is None else (watts - base) / value,
        )


def _has(**fields: str) -> Callable[[Record], bool]:
    return lambda record: all(record[name] == value for name, value in fields.items())


_KINDS: tuple[tuple[str, str, bool, Callable[[Record], bool]], ...] = (
    *((f"GEMM {d}", d, True, _has(op_class="gemm", dtype=d)) for d in _GEMM_DTYPES),
    ("prefill attention", "bf16", True, _has(op_class="attention_prefill")),
    ("fused MoE", "bf16", True, _has(op_class="moe")),
    ("decode attention", "hbm", False, _has(op_class="attention_decode")),
    *(
        (f"{kind} {place}", place, False, _has(family=f"{kind}.{place}"))
        for kind in ("copy", "read", "write")
        for place in ("hbm", "l2")
    ),
)

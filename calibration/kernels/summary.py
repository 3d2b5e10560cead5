"""One page about a file of windows: what the GPU reached, what it drew, what went wrong.

    python -m calibration.kernels.summary windows.jsonl

writes `windows.summary.md` and, where matplotlib is installed, `windows.summary.png`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from calibration.kernels.comparisons import (
    Record,
    expert_kernels,
    graph_and_eager,
    launch_seconds,
    reached,
    repeated,
    rows_per_useful,
    valid_cases,
)
from calibration.metering.windows import read_jsonl
from energymodel.errors import EnergyModelError, ProfileError
from energymodel.gpus import load_gpu
from energymodel.specs import GpuSpec


def summarize(records: Sequence[Record]) -> str:
    """Summary page in Markdown.

    Raises
    ------
    EnergyModelError
        If there is no header or no valid window.
    """
    header = next((r for r in reversed(records) if r.get("kind") == "header"), None)
    cases = valid_cases(records)
    if header is None or not cases:
        raise EnergyModelError(f"the file holds no valid window{_commonest_fault(records)}")
    gpu = header["identity"]["gpus"][0]
    spec = _datasheet(str(gpu["name"]))
    parts = [
        f"# Calibration of {gpu['name']}\n",
        f"Driver {header['identity']['driver_version']}, power limit "
        f"{_show(gpu['power_limit_watts'], '{:.0f}')} W, energy by "
        f"{header['identity']['energy_method']}, tick "
        f"{_show(header['identity']['tick_seconds'], '{:.3f}')} s.\n",
        _windows(records, cases),
        _reached(cases, spec),
        _states(cases),
        _steps(cases),
        _experts(cases),
        _trust(cases),
        _problems(records),
    ]
    return "\n".join(part for part in parts if part)


def _commonest_fault(records: Sequence[Record]) -> str:
    reasons = Counter(str(r.get("invalid_reason")) for r in records if r.get("kind") == "case")
    if not reasons:
        return "; run `energymodel calibrate` first"
    reason, count = reasons.most_common(1)[0]
    return f": {count} of {reasons.total()} say '{reason}'"


def _datasheet(name: str) -> GpuSpec | None:
    try:
        return load_gpu(name)
    except ProfileError:
        return None


def _show(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [f"## {title}\n", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _windows(records: Sequence[Record], cases: Mapping[str, Record]) -> str:
    found = [r for r in records if r.get("kind") == "case"]
    by_class = Counter(r["op_class"] for r in cases.values())
    capped = Counter(r["op_class"] for r in cases.values() if r["window"]["power_capped"])
    bad = Counter(r["op_class"] for r in found if not r.get("valid"))
    rows = [
        [name, str(by_class[name]), str(capped[name]), str(bad[name])]
        for name in sorted(by_class | bad)
    ]
    rows.append(["all", str(by_class.total()), str(capped.total()), str(bad.total())])
    return _table("Windows", ["class", "valid", "at the power limit", "not valid"], rows)


def _reached(cases: Mapping[str, Record], spec: GpuSpec | None) -> str:
    rows = [
        [
            best.title,
            best.record["case"],
            f"{best.per_second / 1e12:.0f} TFLOP/s"
            if best.is_compute
            else f"{best.per_second / 1e9:.0f} GB/s",
            "" if best.share is None else f"{best.share:.0%}",
            f"{best.record['power_watts']:.0f}",
            f"{best.joules_per_unit * 1e12:.2f}",
            _show(
                None if best.joules_above_base is None else best.joules_above_base * 1e12, "{:.2f}"
            ),
        ]
        for best in reached(cases, spec)
    ]
    unit = "pJ/FLOP or pJ/B"
    head = ["best of", "case", "rate", "of datasheet", "W", unit, f"{unit} above base"]
    return _table("Reached", head, rows)


def _states(cases: Mapping[str, Record]) -> str:
    rows = []
    for name, r in sorted(cases.items()):
        if r["op_class"] in ("idle", "base"):
            clock = r["window"]["sm_clock_hz"]
            degrees = r["window"]["states_after"][0]["temperature_celsius"]
            seconds = r.get("iteration_seconds")
            rows.append(
                [
                    name,
                    f"{r['power_watts']:.1f}",
                    _show(None if clock is None else clock / 1e6, "{:.0f}"),
                    _show(degrees, "{:.0f}"),
                    "" if seconds is None else f"{seconds * 1e6:.2f}",
                ]
            )
    return _table("Idle and base", ["state", "W", "SM MHz", "deg C", "us per kernel"], rows)


def _steps(cases: Mapping[str, Record]) -> str:
    rows = []
    for graph, eager in graph_and_eager(cases):
        launch = launch_seconds(eager)
        rows.append(
            [
                graph["case"].removeprefix("stack.").removesuffix(".graph"),
                f"{graph['iteration_seconds'] * 1e3:.2f}",
                f"{eager['iteration_seconds'] * 1e3:.2f}",
                f"{graph['energy_per_iteration_joules']:.3f}",
                f"{eager['energy_per_iteration_joules']:.3f}",
                "" if launch is None else f"{launch * 1e6:.1f}",
            ]
        )
    head = ["decode step", "graph ms", "eager ms", "graph J", "eager J", "host us per operation"]
    return _table("CUDA Graph against eager", head, rows)


def _experts(cases: Mapping[str, Record]) -> str:
    rows = []
    for work, kernels in expert_kernels(cases).items():
        if "fused" not in kernels or "GEMM" not in kernels:
            continue
        fused, gemm = kernels["fused"], kernels["GEMM"]
        rows.append(
            [
                work.model + (" (skewed)" if work.skewed else ""),
                str(work.tokens),
                f"{fused['iteration_seconds'] / gemm['iteration_seconds']:.2f}",
                f"{fused['energy_per_iteration_joules'] / gemm['energy_per_iteration_joules']:.2f}",
                f"{fused['details']['distinct_experts']:.1f}",
                f"{rows_per_useful(fused):.2f}",
            ]
        )
    head = ["model", "tokens", "time", "energy", "distinct experts", "rows computed per useful"]
    return _table("Fused MoE over the GEMM with the same useful FLOPs", head, rows)


def _trust(cases: Mapping[str, Record]) -> str:
    rows = []
    pairs = repeated(cases)
    for title, key in (("time", "iteration_seconds"), ("energy", "energy_per_iteration_joules")):
        apart = [abs(b[key] / a[key] - 1) for a, b in pairs if a.get(key) and b.get(key)]
        if apart:
            rows.append([f"repeat of a case, {title}", f"{median(apart):.2%}", f"{max(apart):.2%}"])
    agree = [
        abs(r["window"]["instant_mean_watts"] / r["power_watts"] - 1)
        for r in cases.values()
        if r["window"]["instant_mean_watts"] is not None
    ]
    if agree:
        title = "instant power against the counter"
        rows.append([title, f"{median(agree):.2%}", f"{max(agree):.2%}"])
    edges = [
        r["window"]["edge_uncertainty_seconds"] / r["window"]["duration_seconds"]
        for r in cases.values()
        if r["window"]["edge_uncertainty_seconds"] is not None
    ]
    if edges:
        rows.append(["edges off the tick", f"{median(edges):.2%}", f"{max(edges):.2%}"])
    return _table("How far to trust it", ["difference", "median", "largest"], rows)


def _problems(records: Sequence[Record]) -> str:
    bad = [r for r in records if r.get("kind") == "case" and not r.get("valid")]
    rows = [[r["case"], str(r.get("error") or r.get("invalid_reason"))[:160]] for r in bad]
    return _table("Not valid", ["case", "reason"], rows)


def plot(records: Sequence[Record], path: Path) -> None:
    """Figure of the page: GEMM rate and energy over rows, power over traffic, MoE over dense."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    cases = [r for r in valid_cases(records).values() if r.get("iteration_seconds")]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    gemms = [r for r in cases if r["op_class"] == "gemm" and r["dtype"] == "bf16"]
    for family in sorted({r["family"] for r in gemms}):
        of = sorted(
            (r["shape"]["m"], r["flops"] / r["iteration_seconds"] / 1e12,
             r["energy_per_iteration_joules"] / r["flops"] * 1e12)
            for r in gemms if r["family"] == family and not r["shape"]["resident"]
        )  # fmt: skip
        axes[0, 0].plot([p[0] for p in of], [p[1] for p in of], ".-", lw=0.6)
        axes[0, 1].plot([p[0] for p in of], [p[2] for p in of], ".-", lw=0.6)
    axes[0, 0].set(xscale="log", yscale="log", xlabel="rows m", ylabel="bf16 GEMM [TFLOP/s]")
    axes[0, 1].set(xscale="log", yscale="log", xlabel="rows m", ylabel="bf16 GEMM [pJ/FLOP]")
    for op_class in sorted({r["op_class"] for r in cases}):
        of_class = [r for r in cases if r["op_class"] == op_class]
        axes[1, 0].plot(
            [(r["hbm_bytes"] + r["activation_bytes"]) / r["iteration_seconds"] / 1e9
             for r in of_class],
            [r["power_watts"] for r in of_class], ".", label=op_class,
        )  # fmt: skip
    axes[1, 0].set(xscale="log", xlabel="bytes moved [GB/s]", ylabel="power [W]")
    axes[1, 0].legend(fontsize=6)
    by_name = {r["case"]: r for r in cases}
    for model in sorted({r["family"] for r in cases if r["op_class"] == "moe"}):
        points = sorted(
            (r["shape"]["tokens"], r["energy_per_iteration_joules"]
             / by_name[n.replace("fused", "dense")]["energy_per_iteration_joules"])
            for n, r in by_name.items()
            if r["op_class"] == "moe" and r["family"] == model
            and n.replace("fused", "dense") in by_name
        )  # fmt: skip
        axes[1, 1].plot([p[0] for p in points], [p[1] for p in points], ".-", label=model)
    axes[1, 1].set(xscale="log", xlabel="tokens", ylabel="fused MoE over dense GEMM, energy [1]")
    if axes[1, 1].lines:
        axes[1, 1].legend(fontsize=6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_summary(windows: Path) -> Path:
    """Write the page (and the figure, where matplotlib is there) beside the windows.

    Raises
    ------
    EnergyModelError
        If the file holds nothing valid or the page cannot be written.
    """
    records = read_jsonl(windows)
    page = windows.with_suffix(".summary.md")
    text = summarize(records)
    try:
        page.write_text(text, encoding="utf-8")
        plot(records, windows.with_suffix(".summary.png"))
    except OSError as error:
        raise EnergyModelError(f"cannot write {page}: {error.strerror}") from error
    except ImportError:
        pass  # the page says it all; the figure is for those who have matplotlib
    return page


def main() -> int:
    """Command line; returns the exit status."""
    expected = 2
    if len(sys.argv) != expected:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        page = write_summary(Path(sys.argv[1]))
    except EnergyModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(page.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

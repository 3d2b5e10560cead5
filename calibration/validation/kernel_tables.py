"""Tables of measured kernels, in Markdown: experts, CUDA graphs, rates, states, all-reduces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from calibration.fitting.measurements import machine_of
from calibration.kernels.comparisons import (
    EXPERT_KERNELS,
    ExpertWork,
    Reached,
    Record,
    base_watts,
    expert_kernels,
    launch_seconds,
    reached,
    rows_per_useful,
)
from calibration.validation.kernel_boards import Board, by_case, celsius, clock, middle
from calibration.validation.report import markdown_table
from energymodel.gpus import load_gpu
from energymodel.paper_findings import Finding, load_paper

PAPER_MODEL = "olmoe-1b-7b"
"""Mixture whose fused kernel the paper timed."""
STATED_BATCHES = {"moe-kernel-1": 1, "moe-kernel-8": 8}
"""Tokens of the paper's findings on the fused kernel."""
GRAPH_FINDINGS = ("graph-a100", "graph-a6000")

Work = dict[str, list[Record]]
"""Records by kernel, one per board."""


def findings() -> dict[str, Finding]:
    """What the paper states, by id."""
    return {finding.id: finding for finding in load_paper().findings}


def change(ratio: float | None) -> str:
    """A ratio as a change in percent."""
    return "-" if ratio is None else f"{100.0 * (ratio - 1.0):+.1f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


def signed(value: float | None) -> str:
    """A difference in percent."""
    return "-" if value is None else f"{100.0 * value:+.1f}"


def _span(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def gpus_of(boards: Sequence[Board]) -> list[str]:
    """GPU models in the order of the files."""
    return list(dict.fromkeys(board.gpu for board in boards))


def of_gpu(boards: Sequence[Board], gpu: str) -> list[Board]:
    """Boards of one model."""
    return [board for board in boards if board.gpu == gpu]


# -- what was measured ------------------------------------------------------------------------


def boards_table(boards: Sequence[Board]) -> str:
    """One row a file: board, windows, driver, software."""
    rows = []
    for board in boards:
        machine = machine_of(board.measured)
        software = ", ".join(
            f"{name} {'/'.join(versions)}"
            for name, versions in machine["software"].items()
            if name in ("torch", "triton", "vllm", "flash_attention")
        )
        records = [r for r in board.measured.records if r.get("kind") == "case"]
        bad = Counter(str(r.get("invalid_reason") or r.get("error")) for r in records
                      if not r.get("valid"))  # fmt: skip
        limits = {
            f"{g['power_limit_watts']:.0f}"
            for r in board.measured.records
            if r.get("kind") == "header"
            for g in r["identity"]["gpus"]
            if g["power_limit_watts"] is not None
        }
        rows.append(
            [
                board.name,
                load_gpu(board.gpu).title,
                str(len(board.cases)),
                str(bad.total()),
                "/".join(sorted(limits)) or "unknown",
                ", ".join(machine["driver"]),
                software,
                ", ".join(machine["measured_on"]),
            ]
        )
    head = ("file", "GPU", "valid windows", "not valid", "limit W", "driver", "software", "day")
    return markdown_table(head, rows)


# -- experts ----------------------------------------------------------------------------------


def experts_of(boards: Sequence[Board]) -> dict[ExpertWork, Work]:
    """Experts' kernels of one GPU model, records of all boards together."""
    found: dict[ExpertWork, Work] = {}
    for board in boards:
        for work, kernels in expert_kernels(board.cases).items():
            for kernel, record in kernels.items():
                found.setdefault(work, {}).setdefault(kernel, []).append(record)
    for work, records in found.items():
        balanced = found.get(replace(work, skewed=False), {})
        if work.skewed and "GEMM" in balanced:
            records["GEMM"] = balanced["GEMM"]
    return dict(sorted(found.items()))


def over_gemm(kernels: Work, kernel: str, field: str) -> float | None:
    """Median of a kernel's field over that of the GEMM [-]; None without either."""
    if kernel not in kernels or "GEMM" not in kernels:
        return None
    return middle(kernels[kernel], field) / middle(kernels["GEMM"], field)


SECONDS, JOULES = "iteration_seconds", "energy_per_iteration_joules"


def experts_table(boards: Sequence[Board]) -> str:
    """Every kernel over the GEMM with the same useful FLOPs."""
    rows = []
    for work, kernels in experts_of(boards).items():
        if "GEMM" not in kernels or len(kernels) == 1:
            continue
        gemm = kernels["GEMM"]
        row = [
            work.model,
            str(work.tokens),
            "skewed" if work.skewed else "balanced",
            f"{1e6 * middle(gemm, SECONDS):.1f}",
            f"{1e3 * middle(gemm, JOULES):.2f}",
        ]
        for kernel in list(EXPERT_KERNELS.values())[1:]:
            row += [_times(over_gemm(kernels, kernel, f)) for f in (SECONDS, JOULES)]
        fused = kernels.get("fused")
        if fused is None:
            row += ["-"] * 3
        else:
            distinct = middle(fused, lambda r: r["details"]["distinct_experts"])
            row += [
                f"{distinct:.1f}",
                _times(over_gemm(kernels, "fused", "hbm_bytes")),
                f"{middle(fused, rows_per_useful):.2f}",
            ]
        rows.append([*row, "/".join(str(len(kernels.get(k, ()))) for k in ("GEMM", "fused"))])
    head = (
        *("model", "tokens", "routing", "GEMM us", "GEMM mJ"),
        *("fused: time", "energy", "grouped: time", "energy", "loop: time", "energy"),
        *("experts read", "weights read / GEMM's", "rows run / useful", "boards"),
    )
    return markdown_table(head, rows)


def experts_beside_paper(boards: Sequence[Board]) -> str:
    """The paper's two figures beside the same batches here."""
    known = findings()
    gpus = gpus_of(boards)
    rows = []
    for name, tokens in STATED_BATCHES.items():
        work = ExpertWork(model=PAPER_MODEL, tokens=tokens, skewed=False)
        row = [known[name].statement, change(1.0 + (known[name].stated or 0.0))]
        for field in (SECONDS, JOULES):
            for gpu in gpus:
                kernels = experts_of(of_gpu(boards, gpu)).get(work, {})
                row.append(change(over_gemm(kernels, "fused", field)))
        kernels = experts_of(boards).get(work, {})
        row.append(_times(over_gemm(kernels, "fused", "hbm_bytes")))
        rows.append(row)
    measured = [f"{gpu.upper()} {what} %" for what in ("time", "energy") for gpu in gpus]
    head = ("stated by the paper", "time %", *measured, "weights read / GEMM's")
    return markdown_table(head, rows)


# -- CUDA graphs ------------------------------------------------------------------------------


def graph_steps(boards: Sequence[Board]) -> dict[tuple[str, int], Work]:
    """Decode steps of a GPU model by stack and batch: records of `graph` and `eager`.

    Steps that were measured one way only are left out.
    """
    found: dict[tuple[str, int], Work] = {}
    for name, records in by_case(boards).items():
        first = records[0]
        if first["op_class"] == "decode_stack" and not name.endswith(".r2"):
            key = (first["family"], int(first["shape"]["batch"]))
            found.setdefault(key, {})["graph" if first["graph"] else "eager"] = records
    return {key: kinds for key, kinds in sorted(found.items()) if len(kinds) == len(_LAUNCHES)}


_LAUNCHES = ("graph", "eager")


def graph_over_eager(kinds: Work, field: str) -> float:
    """Median over the boards of a step from a graph, over that of the eager step [-]."""
    return middle(kinds["graph"], field) / middle(kinds["eager"], field)


def graphs_table(boards: Sequence[Board]) -> str:
    """A decode step from a CUDA graph against the same step launched by the host."""
    rows = []
    for gpu in gpus_of(boards):
        for (model, batch), kinds in graph_steps(of_gpu(boards, gpu)).items():
            launches = [s for e in kinds["eager"] if (s := launch_seconds(e)) is not None]
            row = [f"{gpu.upper()}, {model}", str(batch)]
            for field, scale, form in ((SECONDS, 1e3, "{:.2f}"), (JOULES, 1.0, "{:.3f}")):
                row += [_span([scale * r[field] for r in kinds[k]], form) for k in _LAUNCHES]
                row.append(change(graph_over_eager(kinds, field)))
            row += [_span([r["power_watts"] for r in kinds[k]], "{:.0f}") for k in _LAUNCHES]
            row.append(_span([1e6 * s for s in launches], "{:.1f}") if launches else "-")
            row.append("/".join(str(len(kinds[k])) for k in _LAUNCHES))
            rows.append(row)
    head = (
        *("GPU, stack", "batch", "graph ms", "eager ms", "time %"),
        *("graph J", "eager J", "energy %", "graph W", "eager W", "host us a launch", "boards"),
    )
    return markdown_table(head, rows)


def graphs_beside_paper() -> str:
    """What the paper states on CUDA graphs."""
    known = findings()
    lines = []
    for name in GRAPH_FINDINGS:
        finding = known[name]
        lines.append(
            f"- {finding.statement}: {finding.quantity} {100.0 * (finding.stated or 0.0):+.2f} %"
            f" (not stated: {finding.not_stated})."
        )
    return "\n".join(lines)


# -- rates, states, links ---------------------------------------------------------------------


def best_reached(boards: Sequence[Board]) -> list[Reached]:
    """The best of each kind over all boards of a GPU model."""
    best: dict[str, Reached] = {}
    for board in boards:
        for found in reached(board.cases, load_gpu(board.gpu)):
            known = best.get(found.title)
            if known is None or found.per_second > known.per_second:
                best[found.title] = found
    return list(best.values())


def reached_table(boards: Sequence[Board]) -> str:
    """Highest rates against the datasheet, joules per FLOP and byte."""
    rows = []
    for gpu in gpus_of(boards):
        for best in best_reached(of_gpu(boards, gpu)):
            above = best.joules_above_base
            rows.append(
                [
                    f"{gpu.upper()}, {best.title}",
                    best.record["case"],
                    f"{best.per_second / 1e12:.0f} TFLOP/s"
                    if best.is_compute
                    else f"{best.per_second / 1e9:.0f} GB/s",
                    "-" if best.share is None else f"{100.0 * best.share:.0f}",
                    f"{clock(best.record) / 1e6:.0f}",
                    f"{best.record['power_watts']:.0f}",
                    f"{1e12 * best.joules_per_unit:.2f}",
                    "-" if above is None else f"{1e12 * above:.2f}",
                ]
            )
    unit = "pJ/FLOP or pJ/B"
    head = ("GPU, best of", "case", "rate", "of datasheet %", "SM MHz", "W", unit, "above base")
    return markdown_table(head, rows)


def states_table(boards: Sequence[Board]) -> str:
    """Power without work, by board."""
    rows = []
    for board in boards:
        for name, record in sorted(board.cases.items()):
            if record["op_class"] in ("idle", "base"):
                seconds = record.get(SECONDS)
                rows.append(
                    [
                        f"{board.name}, {name}",
                        f"{record['power_watts']:.1f}",
                        f"{clock(record) / 1e6:.0f}",
                        f"{celsius(record):.0f}",
                        "-" if seconds is None else f"{1e6 * seconds:.2f}",
                    ]
                )
    return markdown_table(("board, state", "W", "SM MHz", "deg C", "us a kernel"), rows)


def links_table(boards: Sequence[Board]) -> str:
    """All-reduces over sizes."""
    rows = []
    for board in boards:
        spec = load_gpu(board.gpu)
        records = [r for r in board.cases.values() if r["op_class"] == "communication"]
        base = base_watts(board.cases) or _base_of_kind(boards, board.gpu)
        for record in sorted(records, key=lambda r: r["link_bytes"]):
            rate = record["link_bytes"] / record[SECONDS]
            watts = record["power_watts"] / record["gpus"]
            above = None if base is None else (watts - base) * record[SECONDS]
            rows.append(
                [
                    f"{board.name}, {record['gpus']} GPUs",
                    f"{record['shape']['bytes'] / 2**10:.0f}",
                    f"{1e6 * record[SECONDS]:.1f}",
                    f"{rate / 1e9:.1f}",
                    "-"
                    if not spec.link_bytes_per_s
                    else f"{100 * rate / spec.link_bytes_per_s:.1f}",
                    f"{watts:.0f}",
                    f"{1e3 * record[JOULES]:.3f}",
                    "-" if above is None else f"{1e12 * above / record['link_bytes']:.0f}",
                ]
            )
    head = (
        *("boards", "KiB", "us", "GB/s each way", "of datasheet %", "W a GPU", "mJ, all GPUs"),
        "pJ/B above base, a GPU",
    )
    return markdown_table(head, rows) if rows else "None measured yet."


def _base_of_kind(boards: Sequence[Board], gpu: str) -> float | None:
    """Median base power of the boards of a kind [W]."""
    found = [w for b in of_gpu(boards, gpu) if (w := base_watts(b.cases)) is not None]
    return median(found) if found else None

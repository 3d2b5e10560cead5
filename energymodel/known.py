"""What `energymodel known` lists: every name that an option takes."""

from __future__ import annotations

import io
import textwrap

from energymodel.calibrations import list_calibrations, load_calibration
from energymodel.deployment import STACKS
from energymodel.gpus import list_gpus, load_gpu
from energymodel.grids import list_grids
from energymodel.models import list_models
from energymodel.trace_formats import known_formats
from energymodel.units import TERA
from energymodel.workloads import list_workloads

_WIDTH = 80


def render_known(*, color: bool = False) -> str:
    """The GPUs as a table, all other names as wrapped lists."""
    lists = {
        "Models (--model; also any config.json)": list_models(),
        "Stacks (--stack)": STACKS,
        "Workloads (--trace; also any trace file)": list_workloads(),
        "Trace formats (--trace-format)": known_formats(),
        "Grids (--grid; also ISO codes and numbers in gCO2e/kWh)": list_grids(),
    }
    blocks = [_gpus(color=color)]
    for title, names in lists.items():
        text = textwrap.fill(
            ", ".join(names),
            _WIDTH,
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
        )
        blocks.append(f"{title}\n{text}")
    return "\n\n".join(blocks)


def _gpus(*, color: bool) -> str:
    from rich.console import Console  # noqa: PLC0415 (slow to import)
    from rich.table import Table  # noqa: PLC0415

    calibrated = list_calibrations()
    table = Table(title="GPUs (--gpu)", title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "board", "bf16 TFLOP/s", "limit", "calibration"):
        right = heading in ("bf16 TFLOP/s", "limit")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for name in list_gpus():
        gpu = load_gpu(name)
        peak = gpu.peak_flops_per_s.get("bf16")
        table.add_row(
            name,
            gpu.title.removeprefix("NVIDIA "),
            "-" if peak is None else f"{peak / TERA:.0f}",
            f"{gpu.tdp_watts:.0f} W",
            load_calibration(name).origin if name in calibrated else "none yet",
        )
    console = Console(
        file=io.StringIO(), force_terminal=color, width=_WIDTH, highlight=False, force_jupyter=False
    )
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())

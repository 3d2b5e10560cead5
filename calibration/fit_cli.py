"""The `fit` command: measured windows and runs to a calibration file for `predict`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from energymodel.terminal import check_writable, print_text, user_errors, write_bytes


def fit(
    windows: Annotated[
        list[Path],
        typer.Argument(
            metavar="WINDOWS...",
            help="Files or folders of kernel windows (calibrate) and serving records (measure).",
        ),
    ],
    gpu: Annotated[
        str | None,
        typer.Option(help="Name of the GPU, if its driver's name for it is not known."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help="Calibration to start from.", show_default="the GPU's own that ships"),
    ] = None,
    split: Annotated[
        Path | None,
        typer.Option(help="Which runs the fit may see (JSON); without, all but trace replays."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Calibration file to write.", show_default="GPU.json here")
    ] = None,
) -> None:
    """Fit a calibration to what was measured on a GPU; needs no GPU and no torch.

    The file is what `predict --calibration FILE` takes. The table shows how far off kernels and
    runs are that the fit has not seen.
    """
    with user_errors():
        check_writable(out, *(str(path) for path in windows), start)
        from calibration.fitting.machine_fit import fit_machine  # noqa: PLC0415
        from calibration.fitting.measurements import read_measurements  # noqa: PLC0415
        from calibration.fitting.transfer import start_from  # noqa: PLC0415
        from calibration.validation.rows import load_split  # noqa: PLC0415
        from energymodel.calibrations import (  # noqa: PLC0415
            list_calibrations,
            save_calibration,
        )
        from energymodel.errors import ConfigurationError  # noqa: PLC0415

        measured = read_measurements(windows, gpu)
        out = Path(f"{measured.gpu.name}.json") if out is None else out
        check_writable(out, *(str(path) for path in windows), start)
        if start is None and measured.gpu.name not in list_calibrations():
            raise ConfigurationError(
                f"no calibration of the {measured.gpu.title} ships; name one of a GPU like it to "
                f"start from with --start. Known: {', '.join(list_calibrations())}"
            )
        fitted = fit_machine(
            measured,
            start_from(start or measured.gpu.name, measured.gpu.name),
            lambda text: typer.echo(text, err=True),
            None if split is None else load_split(split),
        )
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "calibration.json"
            save_calibration(fitted, part)
            write_bytes(part.read_bytes(), out)
        print_text(_table(fitted.provenance))
        for stack, interval in fitted.intervals.items():
            print_text(
                f"{stack}: {interval.low - 1:+.0%} to {interval.high - 1:+.0%} ({interval.basis})"
            )
        typer.echo(
            f"wrote {out}; use it: energymodel predict --gpu {fitted.gpu} --calibration {out} ...",
            err=True,
        )


def _table(provenance: Mapping[str, Any]) -> str:
    """Held-out errors by operator class and by stack: median and 90th percentile."""
    head = f"{'left out of the fit':24}{'n':>5}"
    for quantity in ("seconds", "watts", "joules"):
        head += f"{quantity + ' median':>16}{'p90':>7}"
    lines = [head]
    windows, runs = provenance["held_out_errors"], provenance["held_out_runs"]
    for name, errors in {**windows, **{f"runs, {k}": v for k, v in runs.items()}}.items():
        line = f"{name:24}{errors['joules']['n']:5d}"
        for quantity in ("seconds", "watts", "joules"):
            error = errors.get(quantity)
            shown = ("", "") if error is None else (f"{error['median']:.1%}", f"{error['p90']:.1%}")
            line += f"{shown[0]:>16}{shown[1]:>7}"
        alone = provenance["shape_families"].get(name) == 1
        lines.append(line + ("  one shape family: as before the fit" if alone else ""))
    if seen := provenance["start_has_seen"]:
        lines.append(
            f"It started from a calibration that was fitted to {', '.join(seen)} too: "
            "these errors are smaller than those of windows it never saw."
        )
    if missing := provenance["classes_not_measured"]:
        lines.append(f"not measured, as before the fit: {', '.join(missing)}")
    return "\n".join(lines)

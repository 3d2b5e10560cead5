"""The runner: measures the cases of a suite and appends each window to a file as it comes.

`energymodel calibrate` (`calibrate_cli.py`) is its command. The file holds one JSON object
per line: a `header` for each sitting (machine, driver, software) and a `case` for each
measurement. Every line is on disk before the next case starts; a run that was killed is
resumed by the same command, which cuts off a torn last line and skips what is there. A case
that fails is recorded with its reason, and the run goes on.

Power is that of the GPU kept busy from tick to tick of its energy counter, so
energy per iteration = mean power x mean time of an iteration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calibration.kernels.cases import Case
from calibration.kernels.pump import Launchable, Pump, Timing, Work
from calibration.kernels.rig import Rig, cuda_rig
from calibration.kernels.suite import build_suite, estimated_seconds, ordered
from calibration.metering.preflight import free_gpus, require
from calibration.metering.recording import WindowFile
from calibration.metering.windows import Meter, MeterError, Window, window_to_json
from energymodel.errors import EnergyModelError

SCHEMA_VERSION = 1
_IDLE_WINDOW_SECONDS = 2.0
_NAP_SECONDS = 0.002
_HALF_TICK_SECONDS = 0.05
_UNSTEADY_SHARE = 0.25

Progress = Callable[[int, int, str, float], None]
"""Called before each case with (cases done, cases in all, name, seconds left)."""


class ContextLostError(EnergyModelError):
    """The CUDA context is broken for good; only a new process can go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run did."""

    path: Path
    measured: int
    """Valid windows written by this run."""
    invalid: int
    failed: int
    skipped: int
    """Cases this machine's software cannot run."""
    left: int
    """Cases that the time limit left out."""
    wall_seconds: float


@dataclass(slots=True)
class _Tally:
    measured: int = 0
    invalid: int = 0
    failed: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)


def run_suite(
    meter: Meter,
    cases: Iterable[Case],
    out_path: Path,
    *,
    open_rig: Callable[[], Rig],
    window_seconds: float = 1.2,
    time_limit_seconds: float = math.inf,
    seed: int = 0,
    preheat_seconds: float = 4.0,
    progress: Progress | None = None,
) -> Outcome:
    """Measure `cases` with `meter`, appending to `out_path`; resumes what is there.

    Parameters
    ----------
    open_rig
        Makes the rig (and with it the CUDA context) once the cold idle state is measured.
    window_seconds
        Length of a window [s]; both edges lie on ticks.
    time_limit_seconds
        Wall time of the whole run [s]; a case that may not fit is left out.
    preheat_seconds
        Time of heavy load before the first kernel, so that the first windows are not cold [s].

    Raises
    ------
    MeterError
        If the GPU can no longer be metered.
    ContextLostError
        If a kernel broke the CUDA context.
    EnergyModelError
        If the file cannot be written (full disk), is in use, or is of another GPU model.
    """
    started = time.monotonic()
    with WindowFile(out_path) as file:
        identity = meter.identity()
        file.check_gpu(identity)
        todo = [c for c in ordered(cases, seed) if c.name not in file.done]
        session = _Session(meter, open_rig, window_seconds, preheat_seconds)
        tally = _Tally()
        header_written = False
        left = 0
        for index, case in enumerate(todo):
            remaining = time_limit_seconds - (time.monotonic() - started)
            if remaining < estimated_seconds(case, window_seconds):
                left += 1
                continue
            if progress is not None:
                expected = sum(estimated_seconds(c, window_seconds) for c in todo[index:])
                progress(index, len(todo), case.name, min(remaining, expected))
            if not header_written:
                file.append(_header(identity, seed, window_seconds))
                header_written = True
            record = session.measure(case, tally)
            if session.fatal is None or isinstance(session.fatal, ContextLostError):
                file.append(record)  # otherwise the case is not to blame, nor done
            if session.software and not session.software_written:
                file.append({"kind": "software", "software": session.software})
                session.software_written = True
            if session.fatal is not None:
                raise session.fatal
        session.close()
    return Outcome(
        path=out_path,
        measured=tally.measured,
        invalid=tally.invalid,
        failed=tally.failed,
        skipped=tally.skipped,
        left=left,
        wall_seconds=time.monotonic() - started,
    )


def _header(identity: dict[str, Any], seed: int, window_seconds: float) -> dict[str, Any]:
    return {
        "kind": "header",
        "schema_version": SCHEMA_VERSION,
        "identity": identity,
        "seed": seed,
        "window_seconds": window_seconds,
        "started_unix_seconds": time.time(),
    }


class _Session:
    """One sitting: the meter, the rig once it is open, and how a case is measured."""

    def __init__(
        self,
        meter: Meter,
        open_rig: Callable[[], Rig],
        window_seconds: float,
        preheat_seconds: float,
    ) -> None:
        self._meter = meter
        self._open_rig = open_rig
        self._window_seconds = window_seconds
        self._preheat_seconds = preheat_seconds
        self._rig: Rig | None = None
        self.software: dict[str, str] = {}
        self.software_written = False
        self.fatal: EnergyModelError | None = None

    def measure(self, case: Case, tally: _Tally) -> dict[str, Any]:
        """Record of one case, whatever becomes of it."""
        record: dict[str, Any] = {"kind": "case", "case": case.name, **_case_fields(case)}
        record["started_unix_seconds"] = time.time()
        before = time.monotonic()
        try:
            record.update(self._idle(case) if case.op_class == "idle" else self._kernel(case))
            record["status"] = "ok"
            tally.measured += bool(record["valid"])
            tally.invalid += not record["valid"]
        except (KeyboardInterrupt, SystemExit):
            self._meter.abandon()
            raise
        except Exception as error:
            self._meter.abandon()
            record.update(_failure(error))
            tally.skipped += record["status"] == "skipped"
            tally.failed += record["status"] == "failed"
            tally.problems.append(f"{case.name}: {record['error']}")
            self._survive(error)
        record["wall_seconds"] = time.monotonic() - before
        return record

    def close(self) -> None:
        """Give the device's memory back."""
        if self._rig is not None:
            self._rig.release()

    def _survive(self, error: Exception) -> None:
        """Decide whether the run can go on after a failure."""
        cause: BaseException | None = error
        while cause is not None:  # the frames hold the case's buffers
            cause.__traceback__ = None
            cause = cause.__context__
        if isinstance(error, MeterError):
            self.fatal = error
        elif self._rig is None:
            self.fatal = EnergyModelError(f"the GPU cannot be used: {error}")
        else:
            try:
                self._rig.release()
            except Exception as broken:
                self.fatal = ContextLostError(
                    f"the CUDA context is lost after '{error}' ({broken}); run the same "
                    "command again: it goes on with the next case"
                )

    def _ready(self, *, preheat: bool) -> Rig:
        if self._rig is None:
            self._rig = self._open_rig()
            self.software = dict(self._rig.software)
        if preheat and self._preheat_seconds > 0:
            seconds, self._preheat_seconds = self._preheat_seconds, 0.0
            self._rig.preheat(seconds)
        return self._rig

    def _kernel(self, case: Case) -> dict[str, Any]:
        rig = self._ready(preheat=True)
        before = time.monotonic()
        work, launchable = rig.build(case)
        pump = Pump(launchable, rig.device)
        prepared = time.monotonic() - before
        pump.run(case.warmup_seconds)
        self._meter.begin(case.name, keep_busy=pump)
        pump.mark()
        pump.run(max(0.0, self._window_seconds - _HALF_TICK_SECONDS))
        window = self._meter.end(keep_busy=pump)
        timing = pump.timing()
        pump.drain()
        fields = _kernel_fields(case, work, launchable, timing, window)
        del pump, launchable, work
        rig.release()
        return {**fields, "prepare_seconds": prepared}

    def _idle(self, case: Case) -> dict[str, Any]:
        pause: Callable[[], None] = _nap
        seconds = max(self._window_seconds, _IDLE_WINDOW_SECONDS)
        if case.launcher != "idle_cold":
            rig = self._ready(preheat=False)
            if case.launcher != "idle_context":
                pause = rig.idler(case)
        elif self._rig is not None:
            raise MeterError("the cold idle state comes before anything uses the GPU")
        _repeat(pause, case.warmup_seconds)
        self._meter.begin(case.name, keep_busy=pause)
        _repeat(pause, seconds - _HALF_TICK_SECONDS)
        window = self._meter.end(keep_busy=pause)
        return {
            "power_watts": _watts(window, case.gpus),
            "valid": window.valid,
            "invalid_reason": window.invalid_reason,
            "window": window_to_json(window),
        }


def _nap() -> None:
    time.sleep(_NAP_SECONDS)


def _repeat(action: Callable[[], None], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        action()


def _case_fields(case: Case) -> dict[str, Any]:
    fields = asdict(case)
    del fields["name"]
    fields["executed_flops"] = case.flops
    return fields


def _kernel_fields(
    case: Case, work: Work, launchable: Launchable, timing: Timing, window: Window
) -> dict[str, Any]:
    """Measured quantities of a kernel's window; pure."""
    reasons = [window.invalid_reason] if window.invalid_reason else []
    power = _watts(window, case.gpus)
    seconds = timing.iteration_seconds
    if seconds is None:
        reasons.append("fewer than two launches ended inside the window")
    energy = None if power is None or seconds is None else power * seconds
    share = timing.launch_std_share
    return {
        **{name: value for name, value in work.counts.items()},
        "backend": work.backend,
        "details": dict(work.details),
        "graph": launchable.graph,
        "rotation": work.rotation,
        "iterations_per_launch": launchable.iterations,
        "launches": timing.launches,
        "iteration_seconds": seconds,
        "launch_std_share": share,
        "unsteady": share is not None and share > _UNSTEADY_SHARE,
        "host_seconds_per_iteration": timing.host_seconds_per_iteration,
        "power_watts": power,
        "energy_per_iteration_joules": energy,
        "valid": not reasons,
        "invalid_reason": "; ".join(reasons),
        "window": window_to_json(window),
    }


def _failure(error: Exception) -> dict[str, Any]:
    kind = type(error).__name__
    text = f"{kind}: {error}"[:500]
    status = "skipped" if kind == "UnavailableError" else "failed"
    if "OutOfMemory" in kind or "out of memory" in str(error).lower():
        text = f"out of GPU memory ({text})"
    return {"status": status, "error": text, "valid": False, "invalid_reason": text}


def _watts(window: Window, gpus: int) -> float | None:
    """Mean power of the first `gpus` GPUs, which the case runs on; others of the meter idle."""
    joules = math.fsum(window.energy_joules[:gpus])
    if math.isnan(joules) or window.duration_seconds <= 0:
        return None
    return joules / window.duration_seconds


# -- on real GPUs ----------------------------------------------------------------------------


def calibrate(
    gpus: Sequence[int],
    suite: str,
    out: Path,
    *,
    window_seconds: float,
    time_limit_seconds: float,
    seed: int = 0,
    preheat_seconds: float = 4.0,
    use_vllm: bool = True,
    progress: Progress | None = None,
) -> Outcome:
    """Measure a suite on real GPUs; what `energymodel calibrate` calls.

    `out` is a file (`.jsonl`) or a folder that gets `windows.jsonl`.

    Raises
    ------
    EnergyModelError
        With the reason and the remedy, if the GPU, the software or the file stand in the way.
    """
    path = out if out.suffix == ".jsonl" else out / "windows.jsonl"
    cases = build_suite(suite, gpus=len(gpus))
    meter = free_gpus(gpus)
    require("torch", "calibrate")  # imported later: the cold GPU is measured first
    return run_suite(
        meter,
        cases,
        path,
        open_rig=lambda: cuda_rig(meter.uuids(), use_vllm=use_vllm),
        window_seconds=window_seconds,
        time_limit_seconds=time_limit_seconds,
        seed=seed,
        preheat_seconds=preheat_seconds,
        progress=progress,
    )


def list_cases(suite: str, window_seconds: float, seed: int, gpus: int = 1) -> str:
    """Table of a suite's cases in measuring order: work and time to expect."""
    lines = [f"{'case':44} {'class':18} {'GFLOP':>11} {'HBM MB':>9} {'on chip MB':>10} {'s':>5}"]
    total = 0.0
    cases = ordered(build_suite(suite, gpus=gpus), seed)
    for case in cases:
        seconds = estimated_seconds(case, window_seconds)
        total += seconds
        lines.append(
            f"{case.name:44} {case.op_class:18} {case.flops / 1e9:11.3f} "
            f"{case.hbm_bytes / 1e6:9.2f} {case.activation_bytes / 1e6:10.2f} {seconds:5.1f}"
        )
    lines.append(f"{len(cases)} cases, about {total:.0f} s")
    return "\n".join(lines)


if __name__ == "__main__":  # for machines where the package is not installed
    import typer

    from calibration.calibrate_cli import calibrate as command

    typer.run(command)

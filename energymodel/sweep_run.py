"""Evaluates many settings in parallel, on this machine or on a Dask cluster, and can go on later.

Points go to a journal as they come, one JSON object a line. Whatever ends a sweep (Ctrl-C, a full
disk, a cluster that goes away), the same call goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from energymodel import __version__
from energymodel.errors import EnergyModelError
from energymodel.sweep import Point, Setting, Workload, deployment_key, evaluate

BACKENDS = ("loky", "threading", "sequential", "dask")
_ATTEMPTS = 3  # after which a sweep whose workers keep dying is given up
_CHUNK = {"binned": 64, "exact": 4}  # points a worker does at a time
_CONNECT_SECONDS = 10

Report = Callable[[Point], object]


class SweepError(EnergyModelError):
    """A sweep could not end; says what is kept."""


class Journal:
    """Points done so far, in a file.

    Parameters
    ----------
    path : Path
    fingerprint : str
        Of everything but the settings; a journal of another trace or version is refused.

    Raises
    ------
    SweepError
        If the file belongs to another sweep, is no journal, or cannot be written.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.points: dict[tuple[Setting, str], Point] = {}
        head = json.dumps({"energymodel": __version__, "fingerprint": fingerprint}) + "\n"
        try:
            kept = self._read(head) if path.exists() else ""
            # a line that was cut off is dropped
            if not kept:
                path.write_text(head, encoding="utf-8")
            self._file = path.open("r+b", buffering=0)
            self._file.truncate(len((kept or head).encode()))
            self._file.seek(0, 2)
        except OSError as error:
            raise SweepError(f"{path}: cannot be written ({error.strerror})") from error

    def _read(self, head: str) -> str:
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if not lines or not lines[0].endswith("\n"):
            return ""
        if lines[0] != head:
            raise SweepError(
                f"{self.path} holds points of another trace, price list or version of energymodel; "
                "delete it, or choose another --output"
            )
        kept = [head]
        for line in lines[1:]:
            try:
                point = Point.from_dict(json.loads(line))
            except (ValueError, TypeError, KeyError):
                break
            if not line.endswith("\n"):
                break
            self.points[point.setting, point.mode] = point
            kept.append(line)
        return "".join(kept)

    def add(self, point: Point) -> None:
        """Keep a point; SweepError if the disk is full."""
        try:
            data = (json.dumps(point.to_dict()) + "\n").encode()
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise SweepError(
                f"{self.path}: cannot be written ({error.strerror}); {len(self.points)} points are "
                "kept there, run the same command again to go on"
            ) from error
        self.points[point.setting, point.mode] = point

    def close(self, *, delete: bool = False) -> None:
        """Close the file; delete it once the results are elsewhere."""
        self._file.close()
        if delete:
            self.path.unlink(missing_ok=True)


def fingerprint(workload: Workload) -> str:
    """Short hash of the trace, prices and options that points depend on."""
    binned = workload.binned
    digest = hashlib.sha256()
    for array in (
        binned.requests,
        binned.output_tokens,
        binned.context_tokens,
        binned.input_lengths,
        binned.input_requests,
    ):
        digest.update(array.tobytes())
    rest = (sorted(workload.prices.items()), workload.max_model_len, workload.calibration)
    digest.update(repr(rest).encode())
    return digest.hexdigest()[:16]


def run_sweep(
    settings: Sequence[Setting],
    workload: Workload,
    *,
    mode: str,
    backend: str = "loky",
    scheduler: str | None = None,
    jobs: int = -1,
    journal: Journal | None = None,
    report: Report = lambda point: None,
) -> list[Point]:
    """Evaluate settings.

    Parameters
    ----------
    settings : in the order in which points come back
    workload : Workload
    mode : `binned` or `exact`
    backend : one of `BACKENDS`; `loky` are processes of this machine
    scheduler : address of a Dask scheduler; with the dask backend and no address, a local cluster
    jobs : workers; -1 = one per core
    journal : keeps points, and gives those of an earlier run
    report : called with each point, for a progress bar

    Raises
    ------
    SweepError
        If the scheduler cannot be reached, workers keep dying, or the journal cannot be written.
    KeyboardInterrupt
        Passed on, after what was done is in the journal.
    """
    done: dict[Setting, Point] = {}
    if journal is not None:
        for (setting, kept_mode), point in journal.points.items():
            if kept_mode == mode or setting.stack == "transformers":
                done[setting] = point
    wanted = [setting for setting in dict.fromkeys(settings) if setting not in done]
    for setting in settings:
        if setting in done:
            report(done[setting])
    for attempt in range(_ATTEMPTS):
        missing = [setting for setting in wanted if setting not in done]
        if not missing:
            break
        try:
            with _parallel(backend, scheduler, jobs, workload) as run:
                for points in run(_chunks(missing, mode), mode):
                    for point in points:
                        done[point.setting] = point
                        if journal is not None:
                            journal.add(point)
                        report(point)
        except Exception as error:
            if not _worker_died(error):
                raise
            if attempt == _ATTEMPTS - 1:
                kept = f", {len(done)} points are kept" if journal is not None else ""
                raise SweepError(
                    f"workers died {_ATTEMPTS} times (killed, or out of memory?){kept}; try fewer "
                    "with --jobs"
                ) from error
    return [done[setting] for setting in settings]


def _chunks(settings: Sequence[Setting], mode: str) -> list[list[Setting]]:
    """Settings in groups that share their cost tables, cut to an even size."""
    groups: dict[Setting, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(deployment_key(setting), []).append(setting)
    size = _CHUNK[mode]
    chunks: list[list[Setting]] = []
    for group in groups.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            if chunks and len(chunks[-1]) + len(part) <= size // 4:
                chunks[-1].extend(part)
            else:
                chunks.append(list(part))
    return chunks


def evaluate_all(settings: Sequence[Setting], workload: Workload, mode: str) -> list[Point]:
    """What a worker does."""
    return [evaluate(setting, workload, mode) for setting in settings]


@contextmanager
def _parallel(
    backend: str, scheduler: str | None, jobs: int, workload: Workload
) -> Iterator[Callable[[list[list[Setting]], str], Iterator[list[Point]]]]:
    """A function that evaluates chunks and yields their points as they come."""
    import joblib  # noqa: PLC0415 (140 ms that only a sweep should cost)

    def run(chunks: list[list[Setting]], mode: str) -> Iterator[list[Point]]:
        calls = (joblib.delayed(evaluate_all)(chunk, workload, mode) for chunk in chunks)
        workers = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
        found: Iterator[list[Point]] = workers(calls)
        return found

    if backend != "dask":
        with joblib.parallel_config(backend=backend, n_jobs=jobs):
            yield run
        return
    with _dask_client(scheduler, jobs), joblib.parallel_config(backend="dask", scatter=[workload]):
        yield run


@contextmanager
def _dask_client(scheduler: str | None, jobs: int) -> Iterator[Any]:
    try:
        from distributed import Client, LocalCluster  # noqa: PLC0415
    except ImportError as error:
        raise SweepError("--backend dask needs Dask: pip install 'energymodel[dask]'") from error
    if scheduler is None:
        workers = None if jobs < 1 else jobs
        with (
            LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as local,
            Client(local) as client,
        ):
            yield client
        return
    try:
        client = Client(scheduler, timeout=_CONNECT_SECONDS)
    except (OSError, TimeoutError, ValueError) as error:
        raise SweepError(
            f"--scheduler {scheduler}: no Dask scheduler answers there within {_CONNECT_SECONDS} "
            "seconds; check the address (tcp://HOST:8786) and that it runs"
        ) from error
    try:
        if not client.scheduler_info()["workers"]:
            raise SweepError(f"--scheduler {scheduler}: the cluster has no workers; start some")
        yield client
    finally:
        client.close()


def _worker_died(error: Exception) -> bool:
    """Whether a worker process was lost: by loky's, Dask's or the pipe's word."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TerminatedWorkerError", "BrokenProcessPool", "KilledWorker"})

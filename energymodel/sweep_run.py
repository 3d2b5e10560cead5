"""Evaluates many settings in parallel, on this machine or on a Dask cluster, and can go on later.

Points go to a journal as they come; whatever ends a sweep, the same call goes on from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from energymodel.errors import ConfigurationError
from energymodel.journal import Journal, SweepError
from energymodel.settings import Setting, deployment_key, only_exact
from energymodel.sweep import Point, Workload, evaluate

BACKENDS = ("loky", "threading", "sequential", "dask")
_ATTEMPTS = 3  # after which a sweep whose workers keep dying is given up
_CHUNK = {"binned": 64, "exact": 4}  # points a worker does at a time
_CONNECT_SECONDS = 10

Report = Callable[[Point], object]
PointsJournal = Journal[tuple[Setting, str], Point]


def points_journal(path: Path, workload: Workload) -> PointsJournal:
    """The journal of a sweep; SweepError as in `Journal`."""

    def read(value: Any) -> tuple[tuple[Setting, str], Point]:
        point = Point.from_dict(value)
        return (point.setting, point.mode), point

    return Journal(
        path,
        fingerprint(workload),
        what="points",
        read=read,
        write=lambda _, point: point.to_dict(),
    )


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
    if workload.requests is not None and workload.requests.cached_tokens is not None:
        digest.update(workload.requests.cached_tokens.tobytes())
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
    journal: PointsJournal | None = None,
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
        for (setting, kept_mode), point in journal.kept.items():
            if kept_mode == mode or only_exact(setting):
                done[setting] = point
    wanted = [setting for setting in dict.fromkeys(settings) if setting not in done]
    for setting in settings:
        if setting in done:
            report(done[setting])
    tasks = [(chunk, mode) for chunk in _chunks(wanted, mode)]
    for _, points in run_tasks(
        _evaluate_chunk, tasks, workload, backend=backend, scheduler=scheduler, jobs=jobs
    ):
        for point in points:
            done[point.setting] = point
            if journal is not None:
                journal.add((point.setting, point.mode), point)
            report(point)
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


def _evaluate_chunk(task: tuple[Sequence[Setting], str], workload: Workload) -> list[Point]:
    """What a worker does."""
    settings, mode = task
    return [evaluate(setting, workload, mode) for setting in settings]


def run_tasks(
    function: Callable[[Any, Any], Any],
    tasks: Sequence[Any],
    shared: Any,
    *,
    backend: str = "loky",
    scheduler: str | None = None,
    jobs: int = -1,
) -> Iterator[tuple[int, Any]]:
    """Call `function(task, shared)` for every task, in parallel; tasks of lost workers again.

    Parameters
    ----------
    function : defined in a module, so that workers can import it
    tasks : first arguments
    shared : second argument of all, sent to a cluster once
    backend, scheduler, jobs : as in `run_sweep`

    Yields
    ------
    The task's number and its result, as they come.

    Raises
    ------
    SweepError
        If the scheduler cannot be reached, or workers keep dying.
    ConfigurationError
        If there are no jobs.
    """
    if jobs < 1 and jobs != -1:
        raise ConfigurationError(f"--jobs {jobs}: must be at least 1, or -1 for one per core")
    open_tasks = dict(enumerate(tasks))
    for attempt in range(_ATTEMPTS):
        if not open_tasks:
            return
        try:
            with _workers(backend, scheduler, jobs, shared) as run:
                for number, result in run(function, list(open_tasks.items())):
                    del open_tasks[number]
                    yield number, result
        except Exception as error:
            if not _worker_died(error):
                raise
            if attempt == _ATTEMPTS - 1:
                raise SweepError(
                    f"workers died {_ATTEMPTS} times (killed, or out of memory?), "
                    f"{len(tasks) - len(open_tasks)} of {len(tasks)} tasks are done; try fewer "
                    "with --jobs"
                ) from error


def _numbered(
    function: Callable[[Any, Any], Any], number: int, task: Any, shared: Any
) -> tuple[int, Any]:
    return number, function(task, shared)


_Run = Callable[[Callable[[Any, Any], Any], list[tuple[int, Any]]], Iterator[tuple[int, Any]]]


@contextmanager
def _workers(backend: str, scheduler: str | None, jobs: int, shared: Any) -> Iterator[_Run]:
    """A function that runs numbered tasks and yields their results as they come."""
    import joblib  # noqa: PLC0415 (140 ms that only a sweep should cost)

    def run(
        function: Callable[[Any, Any], Any], tasks: list[tuple[int, Any]]
    ) -> Iterator[tuple[int, Any]]:
        call = joblib.delayed(_numbered)
        workers = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
        found: Iterator[tuple[int, Any]] = workers(
            call(function, number, task, shared) for number, task in tasks
        )
        return found

    if backend != "dask":
        with joblib.parallel_config(backend=backend, n_jobs=jobs):
            yield run
        return
    with (
        _dask_client(scheduler, jobs),
        joblib.parallel_config(backend="dask", scatter=[shared]),
    ):
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
    """Whether a worker process was lost: by loky's, Dask's or the pipe's word.

    Dask cancels the tasks that need data which was scattered to a worker that died.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    lost = {"TerminatedWorkerError", "BrokenProcessPool", "KilledWorker", "FutureCancelledError"}
    return bool(names & lost)

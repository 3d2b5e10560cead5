"""Compiles the package's loops with Numba, and keeps the result on disk.

Numba looks for changes in a function's own file only, and would go on with a compiled loop after a
function that it calls, in another file, has changed. Here the folder of the cache is named after
the content of all compiled files, so that any change compiles them all again. Folders of older
content go when a new one is made and they were not used for a week.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numba
from numba import njit

_FILES = (
    "compiled",
    "step_costs",
    "step_heaps",
    "kv_cache",
    "requests_in_flight",
    "continuous_batching",
    "static_batching",
    "speculative_batching",
    "steady_state",
)

_ROOM_BYTES = 64 << 20  # free space without which nothing is cached
_UNUSED_SECONDS = 7 * 86_400.0  # after which a folder may go
_FOLDER = re.compile(r"energymodel-[0-9a-f]{16}")


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function on its first call, without the interpreter's lock; cached on disk."""
    return _compiled(function, inline="never")


def inlined(function: Callable[..., Any]) -> Any:
    """The same for a function that is copied to where it is called.

    For results of many numbers, which cost more to hand over than to compute.
    """
    return _compiled(function, inline="always")


def _compiled(function: Callable[..., Any], inline: Literal["never", "always"]) -> Any:
    folder = cache_folder()
    if folder is None:
        return njit(nogil=True, inline=inline)(function)
    config: Any = numba.config  # filled at run time
    before = config.CACHE_DIR
    config.CACHE_DIR = folder
    try:
        return njit(cache=True, nogil=True, inline=inline)(function)
    finally:
        config.CACHE_DIR = before


@cache
def cache_folder() -> str | None:
    """Where compiled loops lie: in `NUMBA_CACHE_DIR`, beside the package, or in the user's cache.

    The first of them that can be written and has room, or else a temporary folder; None if there is
    no room anywhere.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256(numba.__version__.encode())
    for name in _FILES:
        digest.update((here / f"{name}.py").read_bytes())
    name = f"energymodel-{digest.hexdigest()[:16]}"
    given = os.environ.get("NUMBA_CACHE_DIR")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    places = [here / "__pycache__", user / "energymodel", Path(tempfile.gettempdir())]
    for place in [Path(given), *places] if given else places:
        folder = place / name
        try:
            is_new = not folder.is_dir()
            folder.mkdir(parents=True, exist_ok=True)
            room = shutil.disk_usage(folder).free
        except OSError:
            continue
        if os.access(folder, os.W_OK) and room > _ROOM_BYTES:
            _mark_used(folder)
            if is_new:
                remove_unused(place, time.time() - _UNUSED_SECONDS)
            return str(folder)
    return None


def _mark_used(folder: Path) -> None:
    """Renew the folder's time, which reading its files leaves alone."""
    with contextlib.suppress(OSError):  # of another user, who may write it too
        os.utime(folder)


def remove_unused(place: Path, before: float) -> None:
    """Remove the folders of compiled loops in a place that were last used before a time [s].

    Nothing else is touched: no link, no other name; what cannot be removed stays.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(place)):
            if (
                _FOLDER.fullmatch(entry.name)
                and entry.is_dir(follow_symlinks=False)
                and entry.stat(follow_symlinks=False).st_mtime < before
            ):
                shutil.rmtree(entry.path, ignore_errors=True)

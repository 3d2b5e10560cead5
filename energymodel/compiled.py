"""Compiles the package's loops with Numba, and keeps the result on disk.

Numba looks for changes in a function's own file only, and would go on with a compiled loop after a
function that it calls, in another file, has changed. Here the folder of the cache is named after
the content of all compiled files, so that any change compiles them all again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import njit

_FILES = ("compiled", "step_costs", "continuous_batching", "static_batching", "steady_state")


_ROOM_BYTES = 64 << 20  # free space without which nothing is cached


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function on its first call, without the interpreter's lock; cached on disk."""
    folder = cache_folder()
    if folder is None:
        return njit(nogil=True)(function)
    config: Any = numba.config  # filled at run time
    before = config.CACHE_DIR
    config.CACHE_DIR = folder
    try:
        return njit(cache=True, nogil=True)(function)
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
            folder.mkdir(parents=True, exist_ok=True)
            room = shutil.disk_usage(folder).free
        except OSError:
            continue
        if os.access(folder, os.W_OK) and room > _ROOM_BYTES:
            return str(folder)
    return None

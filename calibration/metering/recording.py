"""Files of records: append-only JSON lines, on disk line by line.

`WindowFile` is the runner's: one writer, resumed. `append_record` is for serving records, which
one process after another appends.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from calibration.metering.windows import read_jsonl
from energymodel.errors import ConfigurationError, EnergyModelError


class RecordingError(EnergyModelError):
    """The file of windows cannot be written; what was written stays."""


class WindowFile:
    """Appends records to a file of windows, and knows which cases it holds already.

    A case counts as done when it has a valid window, or failed before (measure it again
    with another file); invalid windows stay in the file and are measured again, and so are
    cases skipped for missing software.

    Raises
    ------
    RecordingError
        If the file cannot be opened or written, or another run is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[str] = set()
        self._gpus: list[str] | None = None
        self._descriptor = -1

    def __enter__(self) -> WindowFile:
        """Open, lock, cut off a torn last line and read what is there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RecordingError(f"cannot write {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise RecordingError(
                f"{self.path} is being written by another run; wait for it or choose another --out"
            ) from error
        try:
            whole = self.path.read_bytes()
            if whole.startswith(b"\x1f\x8b"):
                raise RecordingError(f"{self.path} is compressed; choose another --out")
            end = whole.rfind(b"\n") + 1
            os.lseek(self._descriptor, 0, os.SEEK_END)
            if _is_json(whole[end:]):
                os.write(self._descriptor, b"\n")  # only its end is missing
            else:
                os.ftruncate(self._descriptor, end)
                os.lseek(self._descriptor, 0, os.SEEK_END)
            self._resume(read_jsonl(self.path))
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close and unlock."""
        os.close(self._descriptor)

    def _resume(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if record.get("kind") == "header":
                self._gpus = _gpu_names(record.get("identity", {}))
            elif record.get("kind") == "case" and (
                record.get("valid") or record.get("status") == "failed"
            ):
                self.done.add(str(record.get("case")))

    def check_gpu(self, identity: Mapping[str, Any]) -> None:
        """Refuse to mix GPU models in one file.

        Raises
        ------
        ConfigurationError
            If the file holds windows of other GPUs.
        """
        now = _gpu_names(identity)
        if self._gpus is not None and self._gpus != now:
            raise ConfigurationError(
                f"{self.path} holds windows of {self._gpus}, this machine has {now}; "
                "choose another --out"
            )

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and wait until it is on disk.

        Raises
        ------
        RecordingError
            If the disk is full or gone; the lines before stay whole.
        """
        line = json.dumps(_finite(record), allow_nan=False, separators=(",", ":")) + "\n"
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        data = line.encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            raise RecordingError(
                f"cannot write {self.path}: {error.strerror}; make room, then run the same "
                "command again (what was measured is kept)"
            ) from error


def _gpu_names(identity: Mapping[str, Any]) -> list[str]:
    return [str(gpu.get("name")) for gpu in identity.get("gpus", [])]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and sync it to disk; a torn last line is closed first."""
    line = json.dumps(_finite(record), separators=(",", ":"), allow_nan=False).encode() + b"\n"
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _finite(value: Any) -> Any:
    """Turn a value into plain JSON types; NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, list | tuple | set):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)

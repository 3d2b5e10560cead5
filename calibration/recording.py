"""The file of windows: append-only JSON lines, on disk line by line, one writer at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from calibration.windows import read_jsonl
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
            os.ftruncate(self._descriptor, whole.rfind(b"\n") + 1)
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
        line = json.dumps(record, allow_nan=False, separators=(",", ":"), default=str) + "\n"
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

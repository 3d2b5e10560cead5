"""Results of long work kept in a file as they come, so that the same command can go on later.

One JSON object a line, below a head that says what work they belong to. Whatever ends the work
(Ctrl-C, a full disk, a cluster that goes away), the file stays; it goes when the work is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, TypeVar

from energymodel import __version__
from energymodel.errors import EnergyModelError

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class SweepError(EnergyModelError):
    """Long work could not end; says what is kept."""


class Journal(Generic[Key, Value]):
    """Results done so far, in a file.

    Parameters
    ----------
    path : Path
    fingerprint : str
        Of everything that results depend on but their keys; a journal of other work is refused.
    what : str
        What the results are, in the plural, for messages.
    read : callable
        From a line's JSON value to key and result; ValueError, TypeError or KeyError if it is none.
    write : callable
        The inverse: from key and result to a JSON value.

    Raises
    ------
    SweepError
        If the file belongs to other work, is no journal, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        *,
        what: str,
        read: Callable[[Any], tuple[Key, Value]],
        write: Callable[[Key, Value], Any],
    ) -> None:
        self.path = path
        self.what = what
        self.kept: dict[Key, Value] = {}
        self._read, self._write = read, write
        head = json.dumps({"energymodel": __version__, "fingerprint": fingerprint}) + "\n"
        try:
            whole = self._load(head) if path.exists() else ""
            # a line that was cut off is dropped
            if not whole:
                path.write_text(head, encoding="utf-8")
            self._file = path.open("r+b", buffering=0)
            self._file.truncate(len((whole or head).encode()))
            self._file.seek(0, 2)
        except OSError as error:
            raise SweepError(f"{path}: cannot be written ({error.strerror})") from error

    def _load(self, head: str) -> str:
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if not lines or not lines[0].endswith("\n"):
            return ""
        if lines[0] != head:
            raise SweepError(
                f"{self.path} holds {self.what} of another trace, other options or another version "
                "of energymodel; delete it, or choose another --output"
            )
        whole = [head]
        for line in lines[1:]:
            try:
                key, value = self._read(json.loads(line))
            except (ValueError, TypeError, KeyError):
                break
            if not line.endswith("\n"):
                break
            self.kept[key] = value
            whole.append(line)
        return "".join(whole)

    def add(self, key: Key, value: Value) -> None:
        """Keep a result; SweepError if the disk is full."""
        try:
            data = (json.dumps(self._write(key, value)) + "\n").encode()
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise SweepError(
                f"{self.path}: cannot be written ({error.strerror}); {len(self.kept)} {self.what} "
                "are kept there, run the same command again to go on"
            ) from error
        self.kept[key] = value

    def close(self, *, delete: bool = False) -> None:
        """Close the file; delete it once the results are elsewhere."""
        self._file.close()
        if delete:
            self.path.unlink(missing_ok=True)


def journal_path(output: Path | None, what: str) -> Path | None:
    """The journal beside a result, `OUTPUT.points.jsonl`; none for a terminal, pipe or device."""
    if output is None or (output.exists() and not output.is_file()):
        return None
    return output.with_name(f"{output.name}.{what}.jsonl")

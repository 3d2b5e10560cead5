"""Polls something in a thread of its own, beside the work that it watches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

Row = tuple[float | None, ...]


class Poller:
    """Calls `read` again and again while its block runs, and keeps each answer.

    Parameters
    ----------
    read
        Returns one row of numbers; None for what is not known.
    period_seconds
        Between the end of one call and the next.
    """

    def __init__(self, read: Callable[[], Row], period_seconds: float) -> None:
        self._read, self._period_seconds = read, period_seconds
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self.rows: list[Row] = []
        """Monotonic time [s], then what `read` returned."""

    def _poll(self) -> None:
        try:
            while not self._stop.is_set():
                now = round(time.monotonic(), 5)
                self.rows.append((now, *self._read()))
                time.sleep(self._period_seconds)
        except Exception as error:  # it would end with the thread, unseen
            self._failure = error

    def __enter__(self) -> Poller:
        """Start polling."""
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop polling; raises what `read` raised."""
        self._stop.set()
        self._thread.join()
        if self._failure is not None and kind is None:
            raise self._failure

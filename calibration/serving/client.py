"""A running OpenAI-compatible server as an engine: requests go out when they are due.

Prompts are token ids and lengths are fixed (`ignore_eos`), which vLLM and SGLang take. The server
runs on the GPU that is metered; what it does step by step, it does not tell.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from calibration.serving.engine import RunLog, TimeUpError
from calibration.serving.plan import Requests
from energymodel.errors import EnergyModelError

clock = time.monotonic
_TIMEOUT_SECONDS = 600.0
_MOST_IN_FLIGHT = 2048


class ServerError(EnergyModelError):
    """The server cannot be reached, refuses a request, or answers with another length."""


class ServerEngine:
    """Engine protocol over HTTP.

    Parameters
    ----------
    url : such as http://localhost:8000, with or without /v1

    Raises
    ------
    ServerError
        If there is no such server, or it serves no model.
    """

    caches_prefixes = True  # vLLM's server does unless told otherwise, and does not say

    def __init__(self, url: str) -> None:
        self.base = url.rstrip("/").removesuffix("/v1") + "/v1"
        try:
            with urllib.request.urlopen(f"{self.base}/models", timeout=30) as answer:
                self.served = str(json.load(answer)["data"][0]["id"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ServerError(
                f"no OpenAI-compatible server at {self.base} ({error}); start one, for example "
                "with `vllm serve`, and give its address with --url"
            ) from error

    def prepare(self, requests: Requests, prompts: list[list[int]]) -> Any:
        """Arrivals, and the body of each request."""
        bodies = [
            {
                "model": self.served,
                "prompt": prompt,
                "max_tokens": int(tokens),
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for prompt, tokens in zip(prompts, requests.output_tokens, strict=True)
        ]
        return requests.arrival_seconds.tolist(), bodies

    def run(self, prepared: Any, stop_at: float) -> RunLog:
        """Send each request when it is due, each in a thread of its own; wait for all."""
        arrivals, bodies = prepared
        count = len(bodies)
        first, finish = np.zeros(count), np.zeros(count)
        stop = threading.Event()

        def serve(i: int, start: float) -> None:
            if not stop.is_set():
                first[i], finish[i] = self._complete(bodies[i], stop)
                first[i] -= start
                finish[i] -= start

        add_seconds = 0.0
        with ThreadPoolExecutor(min(count, _MOST_IN_FLIGHT)) as pool:
            start = clock()
            futures = []
            try:
                for i, due in enumerate(arrivals):
                    while (wait := start + due - clock()) > 0:
                        time.sleep(min(wait, 0.2))
                        _check(stop_at, i, count)
                    before = clock()
                    futures.append(pool.submit(serve, i, start))
                    add_seconds += clock() - before
                for i, future in enumerate(futures):
                    while not future.done():
                        _check(stop_at, i, count)
                        time.sleep(0.002)
                    future.result()
            finally:
                stop.set()
        none, counts = np.empty(0), np.empty(0, dtype=np.int64)
        return RunLog(
            start_seconds=start,
            end_seconds=start + float(finish.max()),
            add_seconds=add_seconds,
            ttft_seconds=first - np.array(arrivals),
            finish_seconds=finish,
            step_end_seconds=none,
            step_tokens=counts,
            step_sequences=counts,
        )

    def _complete(self, body: dict[str, Any], stop: threading.Event) -> tuple[float, float]:
        """One request; the clock at its first token and at its end."""
        request = urllib.request.Request(
            f"{self.base}/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        first, made = None, None
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
                for line in answer:
                    if stop.is_set():
                        break
                    if not line.startswith(b"data: {"):
                        continue
                    if first is None:
                        first = clock()
                    if b'"completion_tokens"' in line:
                        usage = json.loads(line[6:]).get("usage")
                        made = usage and usage["completion_tokens"]
            end = clock()
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(300).decode(errors="replace")
            raise ServerError(f"the server refused a request ({error.code}): {said}") from error
        except (OSError, ValueError) as error:
            raise ServerError(f"the server at {self.base} broke off a request: {error}") from error
        if not stop.is_set() and (first is None or made != body["max_tokens"]):
            raise ServerError(
                f"the server made {made} tokens where {body['max_tokens']} were asked for; it must "
                "take `ignore_eos` and report `usage` (vLLM and SGLang do)"
            )
        return first or end, end

    def poll(self) -> None:
        """Do nothing: the server polls for itself."""

    def settings(self) -> dict[str, Any]:
        """What is known of the server."""
        return {"served_model": self.served, "interface": "http"}


def _check(stop_at: float, done: int, count: int) -> None:
    if clock() > stop_at:
        raise TimeUpError(f"time was up with {done} of {count} requests complete")

"""What a serving measurement asks of an engine, and how one is made.

Engines (`vllm_engine`, `transformers_engine`) are built from a folder with nothing but a
`config.json`: random weights, no tokenizer, no download. They answer `run(prepared)` with a
`RunLog`, the times of every step and request. vLLM and torch are imported inside functions, so
these modules load without them.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from calibration.serving.plan import EngineRun, Requests
from energymodel.errors import EnergyModelError

clock = time.monotonic

VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
}
"""Set before vLLM is imported: no network, and the engine in this process."""

VLLM_ARGUMENTS = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "max_num_seqs": 256,
    "disable_log_stats": True,
    "gpu_memory_utilization": 0.88,
}
"""Arguments of vLLM's `LLM` class; a plan may override each."""


class TimeUpError(EnergyModelError):
    """The time given to an engine ended in the middle of a case."""


@dataclass(frozen=True, slots=True)
class RunLog:
    """What happened while a list of requests was served once. Times from the start of it."""

    start_seconds: float
    """Monotonic clock at the first arrival."""
    end_seconds: float
    """Monotonic clock when the last request was complete."""
    add_seconds: float
    """Host time spent in handing requests to the engine."""
    ttft_seconds: NDArray[np.float64]
    """Arrival to first token, by request."""
    finish_seconds: NDArray[np.float64]
    """First arrival to completion, by request."""
    step_end_seconds: NDArray[np.float64]
    """When the result of each step was there, by step."""
    step_tokens: NDArray[np.int64]
    """Tokens processed, by step."""
    step_sequences: NDArray[np.int64]
    """Requests in the batch, by step."""

    @property
    def seconds(self) -> float:
        """First arrival to last completion."""
        return self.end_seconds - self.start_seconds


class Engine(Protocol):
    """What the measuring loop needs of an engine."""

    def prepare(self, requests: Requests, prompts: list[list[int]]) -> Any:
        """Bring requests into the form that `run` takes, outside of any measurement."""

    def run(self, prepared: Any, stop_at: float) -> RunLog:
        """Serve them once; TimeUpError when the monotonic clock passes `stop_at`."""

    def poll(self) -> None:
        """Ask once for work, as an idle server does."""

    def settings(self) -> dict[str, Any]:
        """Return what the engine decided for itself."""


def preload(stack: str) -> bool:
    """Import what the stack needs, without touching the GPU (this takes 20 s for vLLM).

    Modules that open a CUDA context on import are left to the engine: while another engine is
    metered, a second process on the GPU would spoil its windows. Returns whether CUDA was
    initialised all the same.
    """
    os.environ.update(VLLM_ENVIRONMENT)
    import torch  # noqa: PLC0415

    if stack.startswith("transformers"):
        from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401, PLC0415

        return bool(torch.cuda.is_initialized())
    from vllm import LLM, SamplingParams  # noqa: F401, PLC0415

    with suppress(Exception):  # saves time only; the engine imports them anyway
        import vllm.model_executor.models.llama  # noqa: PLC0415
        import vllm.v1.engine.core  # noqa: PLC0415
        import vllm.v1.worker.gpu_worker  # noqa: F401, PLC0415
    return bool(torch.cuda.is_initialized())


def build(run: EngineRun, folder: Path, config: dict[str, Any], seed: int) -> Engine:
    """Start the engine of a run from a folder with its `config.json`."""
    from calibration.serving.transformers_engine import TransformersEngine  # noqa: PLC0415
    from calibration.serving.vllm_engine import VllmEngine  # noqa: PLC0415 - both import this

    if run.stack.startswith("transformers"):
        return TransformersEngine(folder, compiled=run.stack == "transformers-compile")
    return VllmEngine(run, folder, config, seed)


def torch_settings() -> dict[str, Any]:
    """Versions of torch and of the CUDA it was built for."""
    import torch  # noqa: PLC0415

    return {"torch_version": torch.__version__, "cuda_version": torch.version.cuda}

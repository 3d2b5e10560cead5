"""The engines that a serving measurement drives: vLLM in this process, and Transformers.

Both are built from a folder with nothing but a `config.json`: random weights, no tokenizer,
no download. Both answer `run(prepared)` with a `RunLog`, the times of every step and request.
vLLM and torch are imported inside functions, so this module loads without them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from calibration.serving.plan import EngineRun, Requests
from energymodel.errors import ConfigurationError, EnergyModelError

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

STEPS_IN_FLIGHT = 2
"""Batches that vLLM's asynchronous scheduling holds at once."""

DEFAULT_WEIGHT_STD = 0.02
"""Standard deviation of untrained weights where the config has no `initializer_range`."""


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

    if stack == "transformers":
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
    if run.stack == "transformers":
        return TransformersEngine(folder)
    return VllmEngine(run, folder, config, seed)


class VllmEngine:
    """vLLM's offline `LLM` class, stepped by hand."""

    def __init__(self, run: EngineRun, folder: Path, config: dict[str, Any], seed: int) -> None:
        from vllm import LLM, SamplingParams  # noqa: PLC0415
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        arguments: dict[str, Any] = {**VLLM_ARGUMENTS, **run.engine}
        if run.stack == "vllm-eager":
            arguments["enforce_eager"] = True
        self.llm = LLM(model=str(folder), **arguments)
        self.engine = self.llm.llm_engine
        self._params: Callable[[int], Any] = lambda tokens: SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._count = 0
        self._steps: list[tuple[float, int, int]] = []
        self._first: dict[str, float] = {}
        self._names: dict[str, str] = {}
        self.made_tokens = 0
        self.max_sequences = int(arguments["max_num_seqs"])
        self._record_steps()
        self.weights = run.weights
        if run.weights == "normal":
            std = float(config.get("initializer_range") or DEFAULT_WEIGHT_STD)
            try:
                self.llm.apply_model(lambda model: _randomise(model, std, seed))
            except Exception as error:  # the engine works with its own weights as well
                self.weights = f"dummy, because {type(error).__name__}: {error}"

    def _record_steps(self) -> None:
        """Note each finished step where the scheduler takes its result: about 10 us a step."""
        scheduler = self.engine.engine_core.engine_core.scheduler
        original = scheduler.update_from_output
        steps, first = self._steps, self._first

        def update_from_output(scheduled: Any, output: Any) -> Any:
            now = clock()
            result = original(scheduled, output)
            if scheduled.total_num_scheduled_tokens:
                sequences = len(scheduled.num_scheduled_tokens)
                steps.append((now, scheduled.total_num_scheduled_tokens, sequences))
                for group in result.values():
                    for item in group.outputs:
                        if item.new_token_ids:
                            self.made_tokens += len(item.new_token_ids)
                            first.setdefault(item.request_id, now)
            return result

        scheduler.update_from_output = update_from_output

    def prepare(self, requests: Requests, prompts: list[list[int]]) -> Any:
        """Prompts and sampling parameters by request; refuses what the model cannot hold."""
        limit = int(self.engine.vllm_config.model_config.max_model_len)
        longest = int((requests.input_tokens + requests.output_tokens).max())
        if longest > limit:
            raise ConfigurationError(
                f"a request has {longest} tokens, the model takes {limit}; "
                "set max_total_tokens of the case or leave the case out"
            )
        items = [
            ({"prompt_token_ids": prompt}, self._params(int(tokens)))
            for prompt, tokens in zip(prompts, requests.output_tokens, strict=True)
        ]
        return requests.arrival_seconds.tolist(), items

    def run(self, prepared: Any, stop_at: float) -> RunLog:
        """Add each request when it is due, step while any is unfinished, sleep otherwise."""
        arrivals, items = prepared
        engine, count = self.engine, len(items)
        base = self._count
        self._count += count
        self._steps.clear()
        self._first.clear()
        internal: list[str] = []
        finish = [0.0] * count
        done = added = 0
        add_seconds = 0.0
        start = clock()
        try:
            while done < count:
                now = clock()
                if now > stop_at:
                    raise TimeUpError(f"time was up with {done} of {count} requests complete")
                if added < count and start + arrivals[added] <= now:
                    while added < count and start + arrivals[added] <= now:
                        prompt, params = items[added]
                        internal.append(engine.add_request(str(base + added), prompt, params))
                        added += 1
                    add_seconds += clock() - now
                if done < added:
                    for output in engine.step():
                        if output.finished:
                            finish[int(output.request_id.partition("-")[0]) - base] = clock()
                            done += 1
                else:
                    time.sleep(max(0.0, min(start + arrivals[added], stop_at) - clock()))
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                self._abandon(internal)
            raise
        end = clock()
        first = np.array([self._first[name] for name in internal])
        steps = np.array(self._steps)
        return RunLog(
            start_seconds=start,
            end_seconds=end,
            add_seconds=add_seconds,
            ttft_seconds=first - start - np.array(arrivals),
            finish_seconds=np.array(finish) - start,
            step_end_seconds=steps[:, 0] - start,
            step_tokens=steps[:, 1].astype(np.int64),
            step_sequences=steps[:, 2].astype(np.int64),
        )

    def submit(self, prompt: list[int], output_tokens: int) -> str:
        """Hand over one request; returns its name."""
        given, self._count = str(self._count), self._count + 1
        params = self._params(output_tokens)
        name = self.engine.add_request(given, {"prompt_token_ids": prompt}, params)
        self._names[given] = name
        return str(name)

    def advance(self) -> list[str]:
        """Do a step; names of the requests that it completed."""
        done = [o.request_id.partition("-")[0] for o in self.engine.step() if o.finished]
        return [self._names.pop(given) for given in done]

    def first_token_seconds(self, name: str) -> float:
        """Monotonic clock at a request's first token; known until it is asked for."""
        return self._first.pop(name)

    def step_times(self) -> list[tuple[float, int, int]]:
        """End, tokens and sequences of every step since the last run."""
        return list(self._steps)

    def withdraw(self, names: list[str]) -> None:
        """Take requests back and forget what was noted."""
        self._abandon(names)
        self._steps.clear()
        self._first.clear()
        self._names.clear()

    def _abandon(self, names: list[str]) -> None:
        """Take requests back, and the results of the batches that are still in flight."""
        self.engine.abort_request(names, internal=True)
        for _ in range(STEPS_IN_FLIGHT + 1):
            self.engine.step()

    def poll(self) -> None:
        """Ask the engine whether any request is unfinished."""
        self.engine.has_unfinished_requests()

    def settings(self) -> dict[str, Any]:
        """Return the engine's own settings; None where this version does not tell."""
        config = self.engine.vllm_config
        scheduler, compilation = config.scheduler_config, config.compilation_config
        ask: dict[str, Callable[[], Any]] = {
            "vllm_version": lambda: __import__("vllm").__version__,
            "max_num_batched_tokens": lambda: scheduler.max_num_batched_tokens,
            "max_num_seqs": lambda: scheduler.max_num_seqs,
            "long_prefill_token_threshold": lambda: scheduler.long_prefill_token_threshold,
            "chunked_prefill": lambda: scheduler.enable_chunked_prefill,
            "async_scheduling": lambda: scheduler.async_scheduling,
            "max_model_len": lambda: config.model_config.max_model_len,
            "enforce_eager": lambda: config.model_config.enforce_eager,
            "compilation_mode": lambda: str(compilation.mode),
            "cudagraph_mode": lambda: str(compilation.cudagraph_mode),
            "cudagraph_capture_sizes": lambda: list(compilation.cudagraph_capture_sizes or ()),
            "block_size": lambda: config.cache_config.block_size,
            "num_gpu_blocks": lambda: config.cache_config.num_gpu_blocks,
            "kv_cache_dtype": lambda: str(config.cache_config.cache_dtype),
            "prefix_caching": lambda: config.cache_config.enable_prefix_caching,
            "v2_model_runner": lambda: config.use_v2_model_runner,
            "attention_backend": lambda: sorted(
                {
                    layer.attn_backend.get_name()
                    for layer in compilation.static_forward_context.values()
                    if hasattr(layer, "attn_backend")
                }
            ),
            "flash_attention_version": _flash_attention_version,
            "tensor_parallel_size": lambda: config.parallel_config.tensor_parallel_size,
        }
        answers: dict[str, Any] = {"weights": self.weights, **_torch_settings()}
        for name, question in ask.items():
            answers[name] = None
            with suppress(Exception):  # a setting that this version lacks is not an error
                answers[name] = question()
        return answers

    def distinct_experts(
        self, batch: int, requests: Requests, prompts: list[list[int]]
    ) -> list[dict[str, float]]:
        """Serve a batch with CUDA graphs off and note what the routers choose; not for metering.

        Returns one entry for each number of tokens in a step: the distinct experts of a layer
        (mean, least, most over layers and steps) and the fullest expert's share of the tokens.
        Empty for a dense model.
        """
        import torch  # noqa: PLC0415
        from vllm.config import CUDAGraphMode  # noqa: PLC0415
        from vllm.forward_context import BatchDescriptor  # noqa: PLC0415

        context = self.engine.vllm_config.compilation_config.static_forward_context
        routers = [
            layer.router
            for layer in context.values()
            if hasattr(getattr(layer, "router", None), "set_capture_fn")
        ]
        if not routers:
            return []
        seen: dict[int, list[tuple[int, float]]] = {}

        def capture(expert_ids: Any) -> None:
            counts = torch.bincount(expert_ids.flatten().long())
            distinct, most = int((counts > 0).sum()), int(counts.max())
            tokens = int(expert_ids.shape[0])
            seen.setdefault(tokens, []).append((distinct, most / tokens))

        def no_graph(num_tokens: int, **_: Any) -> Any:
            return CUDAGraphMode.NONE, BatchDescriptor(num_tokens)

        dispatcher = self.engine.model_executor.driver_worker.worker.model_runner
        dispatcher = dispatcher.cudagraph_dispatcher
        try:
            dispatcher.dispatch = no_graph
            for router in routers:
                router.set_capture_fn(capture)
            self.run(self.prepare(requests, prompts), float("inf"))
        finally:
            for router in routers:
                router.set_capture_fn(None)
            del dispatcher.dispatch  # the class's own method again
        return [
            {
                "batch": batch,
                "step_tokens": tokens,
                "layer_steps": len(values),
                "distinct_mean": float(np.mean([v[0] for v in values])),
                "distinct_min": float(min(v[0] for v in values)),
                "distinct_max": float(max(v[0] for v in values)),
                "fullest_share_mean": float(np.mean([v[1] for v in values])),
            }
            for tokens, values in sorted(seen.items())
        ]


class TransformersEngine:
    """`generate()` of Hugging Face Transformers, eager, one static batch at a time."""

    def __init__(self, folder: Path) -> None:
        import torch  # noqa: PLC0415
        from transformers import (  # noqa: PLC0415
            AutoConfig,
            AutoModelForCausalLM,
            GenerationConfig,
        )

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = AutoConfig.from_pretrained(str(folder))
        with torch.device(self.device):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
        self.model.eval()
        self.generation = GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
        )
        self.model.generation_config = self.generation
        self._forward_starts: list[float] = []
        self.model.register_forward_pre_hook(lambda *_: self._forward_starts.append(clock()))

    def prepare(self, requests: Requests, prompts: list[list[int]]) -> Any:
        """Token ids on the device; refuses requests of unequal length and arrivals over time."""
        import torch  # noqa: PLC0415

        lengths = set(requests.input_tokens.tolist()), set(requests.output_tokens.tolist())
        if max(len(length) for length in lengths) > 1 or requests.arrival_seconds.any():
            raise ConfigurationError(
                "the transformers stack runs static cases only: equal requests, all at once"
            )
        return torch.tensor(prompts, device=self.device), int(requests.output_tokens[0])

    def run(self, prepared: Any, stop_at: float) -> RunLog:
        """Generate a fixed number of tokens for the batch; `stop_at` counts at the start only."""
        import torch  # noqa: PLC0415

        ids, tokens = prepared
        if clock() > stop_at:
            raise TimeUpError("time was up before the batch began")
        self._forward_starts.clear()
        batch, length = ids.shape
        start = clock()
        output = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens
        )
        if self.device == "cuda":
            torch.cuda.synchronize()
        end = clock()
        if output.shape[1] != length + tokens:
            raise ConfigurationError(
                f"generate() made {output.shape[1] - length} tokens, {tokens} were asked for"
            )
        # A forward starts when the step before it is complete.
        ends = np.array([*self._forward_starts[1:], end]) - start
        return RunLog(
            start_seconds=start,
            end_seconds=end,
            add_seconds=0.0,
            ttft_seconds=np.full(batch, ends[0]),
            finish_seconds=np.full(batch, end - start),
            step_end_seconds=ends,
            step_tokens=np.array([batch * length] + [batch] * (len(ends) - 1)),
            step_sequences=np.full(len(ends), batch),
        )

    def poll(self) -> None:
        """Do nothing: there is no queue to ask."""

    def settings(self) -> dict[str, Any]:
        """Versions and the attention implementation."""
        import transformers  # noqa: PLC0415

        return {
            **_torch_settings(),
            "transformers_version": transformers.__version__,
            "attention_implementation": self.model.config._attn_implementation,
            "weights": "normal",
        }


def _randomise(model: Any, std: float, seed: int) -> int:
    """Give a model the weights it would have before training; returns how many tensors changed.

    vLLM's dummy weights lie within 1e-3 of zero, norms included, and equal shapes get equal
    values, so that every layer and router is the same. Power and routing follow the values.
    """
    import torch  # noqa: PLC0415

    changed = 0
    with torch.inference_mode():
        generators: dict[Any, Any] = {}
        for name, weight in model.named_parameters():
            if not weight.is_floating_point() or weight.element_size() == 1:
                continue  # quantised storage: the engine's own values stay
            generator = generators.setdefault(
                weight.device, torch.Generator(weight.device).manual_seed(seed)
            )
            if weight.ndim == 1 and "norm" in name:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, std, generator=generator)
            changed += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return changed


def _torch_settings() -> dict[str, Any]:
    import torch  # noqa: PLC0415

    return {"torch_version": torch.__version__, "cuda_version": torch.version.cuda}


def _flash_attention_version() -> Any:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version  # noqa: PLC0415

    return get_flash_attn_version()

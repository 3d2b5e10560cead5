"""vLLM as a serving measurement drives it: its offline engine in this process, step by step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from calibration.serving.engine import (
    VLLM_ARGUMENTS,
    RunLog,
    TimeUpError,
    clock,
    torch_settings,
)
from calibration.serving.expert_counts import counted_experts, summarised
from calibration.serving.plan import EngineRun, Requests, model_config
from energymodel.errors import ConfigurationError

STEPS_IN_FLIGHT = 2
"""Batches that vLLM's asynchronous scheduling holds at once."""

DEFAULT_WEIGHT_STD = 0.02
"""Standard deviation of untrained weights where the config has no `initializer_range`."""


class VllmEngine:
    """vLLM's offline `LLM` class, stepped by hand."""

    def __init__(self, run: EngineRun, folder: Path, config: dict[str, Any], seed: int) -> None:
        from vllm import LLM, SamplingParams  # noqa: PLC0415
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        arguments: dict[str, Any] = {**VLLM_ARGUMENTS, **run.engine}
        if run.stack == "vllm-eager":
            arguments["enforce_eager"] = True
        if drafting := arguments.get("speculative_config"):
            arguments["speculative_config"] = _with_draft_folder(drafting, folder)
        if "quantization_config" in config:
            _fill_packed_weights(seed)
        self.llm = LLM(model=str(folder), **arguments)
        self.engine = self.llm.llm_engine
        self._params: Callable[[int, float], Any] = lambda tokens, top_p: SamplingParams(
            temperature=1.0 if top_p else 0.0,
            top_p=top_p or 1.0,
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
            ({"prompt_token_ids": prompt}, self._params(int(tokens), requests.top_p))
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
        params = self._params(output_tokens, 0.0)
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
            "quantization": lambda: config.model_config.quantization,
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
            "pipeline_parallel_size": lambda: config.parallel_config.pipeline_parallel_size,
            "custom_all_reduce": lambda: not config.parallel_config.disable_custom_all_reduce,
            "speculative_config": lambda: _drafting(config.speculative_config),
        }
        answers: dict[str, Any] = {"weights": self.weights, **torch_settings()}
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
        from vllm.config import CUDAGraphMode  # noqa: PLC0415
        from vllm.forward_context import BatchDescriptor  # noqa: PLC0415

        def no_graph(num_tokens: int, **_: Any) -> Any:
            return CUDAGraphMode.NONE, BatchDescriptor(num_tokens)

        worker = self.engine.model_executor.driver_worker.worker
        dispatcher = worker.model_runner.cudagraph_dispatcher
        context = self.engine.vllm_config.compilation_config.static_forward_context
        with counted_experts(context.values()) as seen:
            try:
                dispatcher.dispatch = no_graph
                self.run(self.prepare(requests, prompts), float("inf"))
            finally:
                del dispatcher.dispatch  # the class's own method again
        return summarised(seen, batch)


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
            if not weight.is_floating_point() or weight.element_size() == 1 or "scale" in name:
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


_SCALE_EXPONENT_BYTE = 120
"""Shared exponent of a block of packed weights (OCP microscaling: 127 stands for 2**0): 2**-7."""


def _fill_packed_weights(seed: int) -> None:
    """Have vLLM's loader of dummy weights fill packed storage with random bits too.

    It leaves integers as they were allocated, mostly zeros, and power follows the values.
    """
    import torch  # noqa: PLC0415
    from vllm.model_executor.model_loader import dummy_loader  # noqa: PLC0415

    original = dummy_loader.initialize_dummy_weights

    def initialize(model: Any, *arguments: Any, **named: Any) -> None:
        original(model, *arguments, **named)
        for name, weight in model.named_parameters():
            packed = weight.dtype == torch.int32 and name.endswith("qweight")  # GPTQ's
            if weight.dtype != torch.uint8 and not packed:
                continue
            if "scale" in name:
                weight.data.fill_(_SCALE_EXPONENT_BYTE)
            else:
                generator = torch.Generator(weight.device).manual_seed(seed)
                weight.data.view(torch.uint8).random_(0, 256, generator=generator)

    dummy_loader.initialize_dummy_weights = initialize


def _with_draft_folder(drafting: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The speculative settings with the draft model's shape in a folder of its own."""
    if "model" not in drafting:
        return drafting
    draft = folder / "draft"
    draft.mkdir()
    config = json.dumps(model_config(drafting["model"]))
    (draft / "config.json").write_text(config, encoding="utf-8")
    return {**drafting, "model": str(draft)}


def _drafting(config: Any) -> dict[str, Any] | None:
    if config is None:
        return None
    return {
        "method": config.method,
        "draft_tokens": config.num_speculative_tokens,
        "acceptance_rates": config.synthetic_acceptance_rates,
    }


def _flash_attention_version() -> Any:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version  # noqa: PLC0415

    return get_flash_attn_version()

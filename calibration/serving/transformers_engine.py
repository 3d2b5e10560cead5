"""Hugging Face Transformers as a serving measurement drives it: `generate()` of whole batches."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from calibration.serving.engine import RunLog, TimeUpError, clock, torch_settings
from calibration.serving.plan import Requests
from energymodel.errors import ConfigurationError


class TransformersEngine:
    """`generate()` of Hugging Face Transformers, one static batch at a time.

    Eager with a cache that grows; or `compiled`: with a static cache, for which `generate` runs
    the decode step through torch.compile and CUDA graphs by itself.
    """

    def __init__(self, folder: Path, *, compiled: bool = False) -> None:
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
        self.compiled = compiled
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
            **({"cache_implementation": "static"} if compiled else {}),
        )
        self._forward_starts: list[float] = []
        before = self.model.prepare_inputs_for_generation

        @functools.wraps(before)  # `generate` reads its signature
        def noted(*inputs: Any, **more: Any) -> Any:  # a hook would become part of what is compiled
            self._forward_starts.append(clock())
            return before(*inputs, **more)

        self.model.prepare_inputs_for_generation = noted

    def prepare(self, requests: Requests, prompts: list[list[int]]) -> Any:
        """Token ids on the device; refuses requests of unequal length and arrivals over time."""
        import torch  # noqa: PLC0415

        lengths = set(requests.input_tokens.tolist()), set(requests.output_tokens.tolist())
        if max(len(length) for length in lengths) > 1 or requests.arrival_seconds.any():
            raise ConfigurationError(
                "the transformers stack runs static cases only: equal requests, all at once"
            )
        ids = torch.tensor(prompts, device=self.device)
        how: dict[str, Any] = {}
        if requests.top_p:
            how = {"do_sample": True, "top_p": requests.top_p, "top_k": 0}
        elif requests.beams > 1:
            how = {"num_beams": requests.beams}
        return ids, int(requests.output_tokens[0]), how

    def run(self, prepared: Any, stop_at: float) -> RunLog:
        """Generate a fixed number of tokens for the batch; `stop_at` counts at the start only."""
        import torch  # noqa: PLC0415

        ids, tokens, how = prepared
        if clock() > stop_at:
            raise TimeUpError("time was up before the batch began")
        self._forward_starts.clear()
        batch, length = ids.shape
        sequences = batch * how.get("num_beams", 1)
        start = clock()
        output = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **how
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
            step_tokens=np.array([sequences * length] + [sequences] * (len(ends) - 1)),
            step_sequences=np.full(len(ends), sequences),
        )

    def poll(self) -> None:
        """Do nothing: there is no queue to ask."""

    def settings(self) -> dict[str, Any]:
        """Versions and the attention implementation."""
        import transformers  # noqa: PLC0415

        return {
            **torch_settings(),
            "transformers_version": transformers.__version__,
            "attention_implementation": self.model.config._attn_implementation,
            "cache": "static, compiled" if self.compiled else "dynamic",
            "weights": "normal",
        }

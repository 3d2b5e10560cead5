"""Which experts the layers of a vLLM model choose, counted while it serves; not while metered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

Seen = dict[int, list[tuple[int, float]]]
"""By tokens of a step, for each layer: distinct experts, and the fullest one's share of tokens."""


@contextmanager
def counted_experts(layers: Iterable[Any]) -> Iterator[Seen]:
    """Note what every layer with experts among `layers` chooses, until the block ends.

    A layer's router chooses, or (monolithic, as vLLM calls the kernels of gpt-oss) the kernel
    itself, from the router's logits: the experts with the largest ones.
    """
    seen: Seen = {}

    def note(expert_ids: Any) -> None:
        counts = np.bincount(expert_ids.flatten().tolist())
        tokens = int(expert_ids.shape[0])
        chosen = int(np.count_nonzero(counts)), float(counts.max()) / tokens
        seen.setdefault(tokens, []).append(chosen)

    with ExitStack() as undo:
        for layer in layers:
            method = getattr(layer, "quant_method", None)
            router = getattr(layer, "router", None)
            if getattr(method, "is_monolithic", False):
                method.apply_monolithic = _noting(method.apply_monolithic, layer.top_k, note)
                undo.callback(delattr, method, "apply_monolithic")  # the class's own again
            elif hasattr(router, "set_capture_fn"):
                router.set_capture_fn(note)
                undo.callback(router.set_capture_fn, None)
        yield seen


def _noting(
    apply: Callable[..., Any], top_k: int, note: Callable[[Any], None]
) -> Callable[..., Any]:
    def noting(*args: Any, router_logits: Any, **more: Any) -> Any:
        note(router_logits.topk(top_k, dim=-1).indices)
        return apply(*args, router_logits=router_logits, **more)

    return noting


def summarised(seen: Seen, batch: int) -> list[dict[str, float]]:
    """One entry for each number of tokens of a step: the counts over layers and steps."""
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

"""What choosing a token does to the logits: bytes and kernels by decoding strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GREEDY_BYTES_PER_LOGIT = 14.0
"""2 written, 2 read, 4 written as 32 bit, 4 + 2 read by the search of the largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What choosing a token launches beyond greedy decoding."""

    name: str
    bytes_per_logit: float
    """Of logits in 32 bit."""
    kernels: int
    slow_passes: float = 0.0
    """Times that a logit is passed by kernels that the SMs bound, not the memory (`unfused.py`)."""


_SORTED = Draw(name="top_p", bytes_per_logit=284.0, kernels=145, slow_passes=12.5)
"""Top-p over the sorted vocabulary in torch's operators, as vLLM up to 0.11 and Transformers draw.

So that, as work of the class `elementwise`, it takes what the kernel windows `sampling.sorted` took
on the H100: within 4 % of the seconds for 64 and 256 rows, -11 and +54 % for 8 and 1; on the H200,
whose memory is faster and whose SMs are not, -10, -1, -17 and +47 %. Joules of 8 rows and more come
out 16 to 43 % low: what a sort draws beyond its bytes is not modelled."""

BEYOND_GREEDY: Mapping[tuple[str, bool], Draw] = {
    ("sampling", False): Draw(name="top_p", bytes_per_logit=52.0, kernels=5),
    ("sampling-sorted", False): _SORTED,
    ("sampling", True): _SORTED,
    ("sampling-sorted", True): _SORTED,
    ("beam", True): Draw(name="beam_top_k", bytes_per_logit=40.0, kernels=26),
}
"""By decoding strategy and whether batches are static.

vLLM 0.22 without FlashInfer, 8 rows or more (`TopKTopPSampler.forward_native`, `random_sample`):
division by the temperature 8, the Triton top-p filter (two passes that read, one that masks) 16,
softmax 12, exponential draws 4, division by them 12.

Beam search in Transformers (`_beam_search`): log-softmax 12, addition of the beams' scores 8, top-k
over beams x vocabulary 20 (four passes of a radix select and one that gathers); the rest are small
kernels on a few numbers per beam.
"""

"""What choosing a token does to the logits: bytes and kernels by decoding strategy."""

from __future__ import annotations

from collections.abc import Mapping

GREEDY_BYTES_PER_LOGIT = 14.0
"""2 written, 2 read, 4 written as 32 bit, 4 + 2 read by the search of the largest."""

_SORTED = ("top_p", 360.0, 137)
"""Top-p over the sorted vocabulary in torch's operators, as vLLM up to 0.11 and Transformers draw.

So that, as work of the class `elementwise`, it takes what the kernel windows `sampling.sorted` took
on the H100: within 1 % of the seconds for 64 and 256 rows, -6 and +62 % for 8 and 1; joules -23 to
0 % for 8 rows and more. It is 16 % short on the H200, whose memory is faster and whose sort is
not."""

BEYOND_GREEDY: Mapping[tuple[str, bool], tuple[str, float, int]] = {
    ("sampling", False): ("top_p", 52.0, 5),
    ("sampling-sorted", False): _SORTED,
    ("sampling", True): _SORTED,
    ("sampling-sorted", True): _SORTED,
    ("beam", True): ("beam_top_k", 40.0, 26),
}
"""What choosing a token launches beyond greedy decoding, by strategy and whether batches are
static: name, bytes per logit in 32 bit, kernels.

vLLM 0.22 without FlashInfer, 8 rows or more (`TopKTopPSampler.forward_native`, `random_sample`):
division by the temperature 8, the Triton top-p filter (two passes that read, one that masks) 16,
softmax 12, exponential draws 4, division by them 12.

Beam search in Transformers (`_beam_search`): log-softmax 12, addition of the beams' scores 8, top-k
over beams x vocabulary 20 (four passes of a radix select and one that gathers); the rest are small
kernels on a few numbers per beam.
"""

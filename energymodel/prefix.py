"""Prompts that begin as earlier ones: how many of their tokens the prefix cache holds.

A cached token is not computed, but its KV blocks are held and read. The cache is taken as endless
and shared by all replicas, as with routing by prefix or a shared store: what a trace's block ids
give is the most that caching can do.
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from energymodel.errors import ConfigurationError, TraceError
from energymodel.specs import STATIC_STACKS, ServingConfig
from energymodel.trace_files import unpacked
from energymodel.traces import Requests

Ints = NDArray[np.int64]

_BLOCK_TOKENS = 512  # of Mooncake's block ids (Qin et al. 2024, arXiv 2407.00079)
_SEEN = "prefix_blocks_seen_before"


def with_prefixes(requests: Requests, hit: float | str, serving: ServingConfig) -> Requests:
    """The requests with what the prefix cache of an engine holds of them.

    Parameters
    ----------
    requests : Requests
    hit : share of every prompt, or `trace` for the `cached_tokens` that the requests carry
    serving : ServingConfig

    Raises
    ------
    ConfigurationError
        If `hit` is neither, the requests carry none, or the engine has no prefix cache.
    """
    share = as_hit(hit)
    if share != 0.0 and serving.stack in STATIC_STACKS:
        raise ConfigurationError(
            f"the {serving.stack} stack has no prefix cache; use --prefix-hit 0"
        )
    if share == "trace":
        if requests.cached_tokens is None:
            raise ConfigurationError("--prefix-hit trace: no block ids were read from the trace")
        return requests
    uncached = replace(requests, cached_tokens=None)
    return with_given_share(uncached, float(share), block_tokens=serving.block_tokens)


def as_hit(value: float | str) -> float | str:
    """A share of the prompts' tokens, or `trace`; ConfigurationError for anything else."""
    if value == "trace":
        return "trace"
    try:
        return float(value)
    except ValueError:
        raise ConfigurationError(
            f"--prefix-hit {value} is neither a share of the prompts' tokens nor trace"
        ) from None


def with_given_share(requests: Requests, share: float, *, block_tokens: int) -> Requests:
    """Requests of which the same share of every prompt is cached, in whole blocks.

    Raises
    ------
    ConfigurationError
        If the share is not from 0 to below 1.
    """
    if not 0.0 <= share < 1.0:
        raise ConfigurationError(
            f"--prefix-hit {share:g}: must be a share of the prompts' tokens, from 0 to below 1"
        )
    if share == 0.0:
        return requests
    cached = (share * requests.input_tokens // block_tokens * block_tokens).astype(np.int64)
    return replace(requests, cached_tokens=np.minimum(cached, requests.input_tokens - 1))


def with_traced_prefixes(requests: Requests, path: str) -> Requests:
    """Requests with the prefixes that a Mooncake trace's block ids show to be repeated.

    Parameters
    ----------
    requests : as read from the trace
    path : Mooncake JSON lines with `hash_ids`, or CSV with a column `prefix_blocks_seen_before`;
        plain, gzip or zstd

    Raises
    ------
    TraceError
        If the file has neither, or its rows are not those of the requests.
    """
    if not Path(path).is_file():
        raise TraceError(
            f"{path}: is no file whose block ids can be read; --prefix-hit trace needs Mooncake's "
            "file. Give a share instead, e.g. --prefix-hit 0.3"
        )
    try:
        with unpacked(Path(path), path) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: block ids cannot be read ({error})") from error
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        blocks = _from_ids(lines) if lines[0].startswith("{") else _from_column(lines)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise TraceError(
            f"{path}: has no block ids; --prefix-hit trace needs Mooncake JSON lines with hash_ids,"
            f" or CSV with a column {_SEEN}. Give a share instead, e.g. --prefix-hit 0.3"
        ) from error
    if len(blocks) != requests.input_tokens.size or requests.dropped:
        raise TraceError(
            f"{path}: rows are bad or out of order, so that block ids cannot be matched with the "
            f"{requests.input_tokens.size} requests; repair the file, or give a share"
        )
    cached = np.minimum(np.array(blocks) * _BLOCK_TOKENS, requests.input_tokens - 1)
    return replace(requests, cached_tokens=cached)


def cached_share(requests: Requests) -> float:
    """Share of all prompt tokens that is cached [-]."""
    if requests.cached_tokens is None:
        return 0.0
    return float(requests.cached_tokens.sum() / requests.input_tokens.sum())


def _from_column(lines: list[str]) -> list[int]:
    return [int(row[_SEEN]) for row in csv.DictReader(lines)]


def _from_ids(lines: list[str]) -> list[int]:
    """Leading blocks of each prompt that an earlier one had."""
    seen: set[int] = set()
    found = []
    for line in lines:
        ids = json.loads(line)["hash_ids"]
        fresh = next((i for i, block in enumerate(ids) if block not in seen), len(ids))
        found.append(fresh)
        seen.update(ids)
    return found

"""A synthetic week of fleet traffic in the form and size of the published Azure 2024 traces.

The published week (44,107,694 rows: 16,803,695 code and 27,303,999 conv) is too large to ship.
Lengths are drawn from the built-in workloads, which were derived from the 2023 traces; arrivals
follow a daily and weekly cycle that we chose. It serves to measure speed, not to learn about
Azure's traffic.

    python benchmarks/week.py OUTPUT.csv [ROWS]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from energymodel.workloads import load_requests

ROWS = 44_107_694
CODE_SHARE = 16_803_695 / ROWS
WEEK_SECONDS = 7 * 86_400
_PIECE = 2_000_000  # rows drawn at once
_START_US = 1_715_299_200_000_000  # 2024-05-10 00:00 UTC, the first day published


def write_week(path: Path, rows: int = ROWS, *, share: float = 1.0, seed: int = 0) -> None:
    """Write `rows` requests spread over the first `share` of a week."""
    import polars as pl  # noqa: PLC0415

    per_second = np.random.default_rng(seed).multinomial(rows, _weekly_shares(share))
    starts = np.cumsum(per_second)
    first_second = 0
    with path.open("wb") as file:
        for piece in range(-(-rows // _PIECE)):
            last_second = int(np.searchsorted(starts, min((piece + 1) * _PIECE, rows)))
            counts = per_second[first_second : last_second + 1]
            size = int(counts.sum())
            if size == 0:
                continue
            rng = np.random.default_rng((seed, piece))
            seconds = np.repeat(np.arange(first_second, last_second + 1), counts)
            arrival = np.sort(seconds + rng.random(size))
            inputs, outputs = _lengths(size, seed=seed + piece, rng=rng)
            frame = pl.DataFrame(
                {
                    "TIMESTAMP": (_START_US + arrival * 1e6).astype(np.int64),
                    "ContextTokens": inputs,
                    "GeneratedTokens": outputs,
                }
            ).with_columns(pl.from_epoch("TIMESTAMP", "us").dt.replace_time_zone("UTC"))
            frame.write_csv(
                file, include_header=piece == 0, datetime_format="%Y-%m-%d %H:%M:%S%.6f%:z"
            )
            first_second = last_second + 1


def _weekly_shares(share: float) -> np.ndarray:
    """Share of the requests in each second: a daily sine, a quieter weekend."""
    seconds = np.arange(max(round(share * WEEK_SECONDS), 1))
    daily = 1.0 + 0.6 * np.sin(2 * np.pi * (seconds / 86_400 - 0.375))
    weekend = np.isin(seconds // 86_400, (1, 2))  # 10 May 2024 was a Friday
    rate = daily * np.where(weekend, 0.6, 1.0)
    return rate / rate.sum()


def _lengths(size: int, *, seed: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    code = min(max(round(size * CODE_SHARE), 1), max(size - 1, 1))
    draws = [load_requests("azure_code", seed=seed, num_requests=code)]
    if size > code:
        draws.append(load_requests("azure_conv", seed=seed, num_requests=size - code))
    order = rng.permutation(size)
    inputs = np.concatenate([draw.input_tokens for draw in draws])[order]
    outputs = np.concatenate([draw.output_tokens for draw in draws])[order]
    return inputs, outputs


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_week(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else ROWS)

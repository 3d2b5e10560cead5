"""Kernel times and powers that aiconfigurator published, as rows of the fit.

The tables (ai-dynamo/aiconfigurator, `systems/data/*/vllm/*`, Apache-2.0, commit in COMMIT) were
taken with its own collector inside vLLM. What its rows are, read from the collector's source:

- `latency` is in milliseconds, of one call, from CUDA events around repeated replays of a CUDA
  graph. A100 and H100 rows ran nine replays, mostly too short for the power limit, so the clock
  is taken as the highest; H100 GEMMs of more than 8,192 rows ran up to a second and are 4 to 8 %
  slower than the fit. H200 rows ran 0.3 s (calls under 0.1 ms) or 1 s, at most 3,000 replays,
  with the power limit in force: what clock they ran at is not recorded.
- GEMM: a graph holds six layers with weights of their own, so weights come from device memory
  only where six of them pass the L2. Rows below twice the L2 are left out. Weights were not
  initialised, so power and clock of single rows scatter. `fp8` rows hold the kernel that
  quantises the activations; `fp8_block` rows ran without a graph and time the host: left out.
- Attention: one call per replay on the same cache, so caches below twice the L2 are warm and
  left out of decode; short calls (7 to 12 us) time the replay itself. Fewer than 8 heads are
  left out. Context rows hold whole
  prompts only. Those of vLLM 0.14 and 0.24 write the cache too: with keys and values counted
  three times there (read, written, read) and once for 0.22 the fits of the same chip agree on
  the rest. Prompts under a tile of 128 tokens are left out: the
  kernel packs the heads of a group into a tile there, the simulator does not.
- MoE: one call of the whole fused expert path (alignment, two GEMMs, activation, sum), expert
  parallelism 1 here. Loads by expert are drawn again from the collector's own law; where it drew
  five at random, so do we, with another seed. Experts narrower than 256 or not a multiple of 16
  wide (tensor parallelism 8 to 32) are left out. The A100's vLLM 0.14 took tiles of 16 rows up to
  as many tokens as experts, then 64.
- Custom all-reduce: `message_size` counts 16-bit elements.
- `power` (H200) averages NVML readings each 100 ms, themselves averages over up to 1 s, from the
  first replay on: a reading can only be too low, by up to the whole rise from idle. How often a
  kernel ran was set from its warm-up, compilation included, and is not recorded: fused experts
  that fill the memory's bandwidth stand there with 160 W.

H100 rows come in two speeds up to 20 % apart at one shape (several boards or memory clocks):
no smooth model of shape goes below about 3.3 % there (a boosted-tree fit: median 3.3 %, p90
9.5 %; H200 1.8 % and 5.3 %; A100 3.6 % and 10.5 %).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibration.fitting.fit_kernels import KernelRows
from energymodel.errors import EnergyModelError
from energymodel.experts import expert_activation_bytes, moe_tile_rows
from energymodel.specs import GpuSpec
from energymodel.tiles import (
    SOFTMAX_WIDTH,
    TILE,
    decode_head_width,
    decode_key_block,
    decode_query_rows,
)

if TYPE_CHECKING:
    import polars as pl

Array = NDArray[np.float64]

REPOSITORY = "ai-dynamo/aiconfigurator"
COMMIT = "095f58a5"
_REPLAYS = 3000
"""Most replays of a row that measured power."""
_TRUSTED_SECONDS = 1.0
"""Shortest run whose power is used."""
_LARGEST_GEMM = 16384
"""Rows of the largest GEMM used [tokens]: no step is larger."""
_NARROWEST_EXPERT = 256
_WRITES_CACHE = ("0.14.0", "0.24.0")
"""vLLM versions whose attention rows hold the writing of the cache."""
_FEWEST_HEADS = 8
"""Query heads on one GPU, from which on attention fills it."""


def table_path(folder: Path, gpu_name: str, kind: str) -> Path | None:
    """Path of a table (`gemm`, `moe`, `context_attention`, ...) of a GPU; None if there is none."""
    found = sorted(folder.glob(f"{gpu_name}_sxm_*_{kind}_perf.parquet"))
    return found[0] if found else None


def used_files(folder: Path, gpu: GpuSpec) -> list[str]:
    """Names of the tables that `read_rows` reads."""
    paths = (table_path(folder, gpu.name, kind) for kind in _READERS)
    return [path.name for path in paths if path is not None]


def read_rows(folder: Path, gpu: GpuSpec) -> KernelRows:
    """All usable 16-bit rows of a GPU, one after another by class.

    Raises
    ------
    EnergyModelError
        If the folder has no table of the GPU, or a table lacks a column; names the file.
    """
    import polars as pl  # noqa: PLC0415

    parts = []
    for kind, reader in _READERS.items():
        path = table_path(folder, gpu.name, kind)
        if path is None:
            continue
        try:
            parts.append(reader(path, gpu))
        except (OSError, pl.exceptions.PolarsError) as error:
            raise EnergyModelError(
                f"{path}: not an aiconfigurator table of {kind} ({error})"
            ) from error
    if not parts:
        raise EnergyModelError(f"{folder}: no table of {gpu.name} ({gpu.name}_sxm_*.parquet)")
    return KernelRows.join(parts)


def read_eight_bit_gemm(folder: Path, gpu: GpuSpec) -> KernelRows | None:
    """GEMMs of fp8 with one scale per tensor, quantising included; None if the GPU has none."""
    path = table_path(folder, gpu.name, "gemm")
    rows = read_gemm(path, gpu, "fp8") if path is not None else None
    return rows if rows is not None and len(rows) else None


def read_gemm(path: Path, gpu: GpuSpec, dtype: str = "bf16") -> KernelRows:
    """GEMM rows whose weights come from device memory; a family is one (n, k)."""
    import polars as pl  # noqa: PLC0415

    name, size = {"bf16": ("bfloat16", 2.0), "fp8": ("fp8", 1.0)}[dtype]
    table = pl.read_parquet(path).filter(
        (pl.col("gemm_dtype") == name) & (pl.col("m") <= _LARGEST_GEMM)
    )
    table = table.filter(6.0 * size * pl.col("n") * pl.col("k") > 2.0 * gpu.l2_bytes)
    m, n, k = (_column(table, c) for c in ("m", "n", "k"))
    return _rows(
        table,
        "gemm",
        dtype,
        family=("n", "k"),
        calls_a_replay=6.0,
        flops=2.0 * m * n * k,
        executed_flops=2.0 * m * n * k,
        hbm_bytes=size * n * k,
        activation_bytes=m * (size * k + 2.0 * n),
        tiles=m * n / TILE**2,
        gemm_rows=m,
        gemm_columns=n,
        gemm_k=k,
    )


def read_context_attention(path: Path, gpu: GpuSpec) -> KernelRows:
    """Prefill attention without a window; a family is one (heads, KV heads, head width)."""
    import polars as pl  # noqa: PLC0415

    table = _attention(path).filter(pl.col("isl") >= TILE)
    batch, length, heads, kv, width = (
        _column(table, c)
        for c in ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim")
    )
    rows = np.ceil(length / TILE) * TILE
    passes = np.where(table["version"].is_in(_WRITES_CACHE).to_numpy(), 3.0, 1.0)
    pairs = batch * rows * (rows + TILE) / 2.0
    return _rows(
        table,
        "attention_prefill",
        "bf16",
        family=_HEADS,
        flops=4.0 * heads * width * pairs,
        executed_flops=4.0 * heads * (width + SOFTMAX_WIDTH) * pairs,
        activation_bytes=4.0 * batch * rows * (heads + passes * kv) * width,
        tiles=batch * rows * heads / TILE,
    )


def read_generation_attention(path: Path, gpu: GpuSpec) -> KernelRows:
    """Decode attention over caches beyond the L2; a family as in prefill.

    FlashAttention 2 (A100) leaves SMs idle with few sequences of ungrouped heads: left out.
    """
    import polars as pl  # noqa: PLC0415

    table = _attention(path)
    cache = (
        pl.col("batch_size")
        * (pl.col("step") + 1.0)
        * pl.col("num_key_value_heads")
        * pl.col("head_dim")
        * 4.0
    )
    table = table.filter(cache > 2.0 * gpu.l2_bytes)
    if gpu.architecture == "ampere":
        table = table.filter(
            (pl.col("num_heads") > pl.col("num_key_value_heads"))
            | (pl.col("batch_size") * pl.col("num_key_value_heads") >= gpu.sm_count)
        )
    batch, step, heads, kv, width = (
        _column(table, c)
        for c in ("batch_size", "step", "num_heads", "num_key_value_heads", "head_dim")
    )
    keys = batch * (step + 1.0)
    key_block = decode_key_block(width)
    blocks = np.ceil((step + 1.0) / key_block)
    rows = decode_query_rows(heads / kv)
    return _rows(
        table,
        "attention_decode",
        "bf16",
        family=_HEADS,
        flops=4.0 * keys * heads * width,
        executed_flops=4.0 * batch * blocks * key_block * kv * rows * decode_head_width(width),
        hbm_bytes=4.0 * keys * kv * width,
        activation_bytes=4.0 * batch * heads * width,
        tiles=batch * kv,
        key_blocks=blocks,
    )


def read_moe(path: Path, gpu: GpuSpec) -> KernelRows:
    """Fused experts on one GPU; a family is one (experts, top-k, width, hidden size)."""
    import polars as pl  # noqa: PLC0415

    table = pl.read_parquet(path).filter(
        (pl.col("moe_dtype") == "bfloat16")
        & (pl.col("moe_ep_size") == 1)
        & (pl.col("num_tokens") <= _LARGEST_GEMM)
    )
    table = table.with_columns(width=pl.col("inter_size") // pl.col("moe_tp_size"))
    generator = np.random.default_rng(0)
    tokens, hidden, width, top_k, experts = (
        _column(table, c) for c in ("num_tokens", "hidden_size", "width", "topk", "num_experts")
    )
    tiles = moe_tile_rows(tokens)
    if table["version"][0] == "0.14.0":
        tiles = np.where(tokens <= experts, 16.0, 64.0)
    load = np.array(
        [
            _expert_load(int(t), int(e), int(k), law, tile, generator)
            for t, e, k, law, tile in zip(
                tokens, experts, top_k, table["distribution"], tiles, strict=True
            )
        ]
    )
    distinct, rows = load[:, 0], load[:, 1]
    per_row = 3.0 * width * hidden
    cold = 2.0 * distinct * per_row > 2.0 * gpu.l2_bytes
    keep = cold & (width >= _NARROWEST_EXPERT) & (width % 16 == 0)
    return _rows(
        table,
        "moe",
        "bf16",
        family=("num_experts", "topk", "width", "hidden_size"),
        flops=2.0 * tokens * top_k * per_row,
        executed_flops=2.0 * rows * per_row,
        hbm_bytes=2.0 * distinct * per_row,
        activation_bytes=tokens * expert_activation_bytes(hidden, 2.0 * width, width, top_k),
        tiles=rows * (2.0 * width + hidden) / TILE**2,
    ).pick(keep)


def read_all_reduce(path: Path, gpu: GpuSpec) -> KernelRows:
    """Custom all-reduce captured in a graph; a family is one number of GPUs."""
    import polars as pl  # noqa: PLC0415

    table = pl.read_parquet(path).filter(pl.col("backend") == "vllm_graph")
    gpus = _column(table, "num_gpus")
    sent = 2.0 * (gpus - 1.0) / gpus * 2.0 * _column(table, "message_size")
    return _rows(
        table, "communication", "bf16", family=("num_gpus",), calls_a_replay=5.0, link_bytes=sent
    )


_READERS: dict[str, Callable[[Path, GpuSpec], KernelRows]] = {
    "gemm": read_gemm,
    "moe": read_moe,
    "context_attention": read_context_attention,
    "generation_attention": read_generation_attention,
    "custom_allreduce": read_all_reduce,
}
_HEADS = ("num_heads", "num_key_value_heads", "head_dim")


def _attention(path: Path) -> pl.DataFrame:
    import polars as pl  # noqa: PLC0415

    table = pl.read_parquet(path).filter(
        (pl.col("kv_cache_dtype") == "bfloat16")
        & (pl.col("head_dim") <= 256)
        & (pl.col("num_heads") >= _FEWEST_HEADS)
    )
    if "window_size" in table.columns:
        table = table.filter(pl.col("window_size") == 0)
    return table


def _column(table: pl.DataFrame, name: str) -> Array:
    return table[name].to_numpy().astype(float)


def _rows(
    table: pl.DataFrame,
    op_class: str,
    dtype: str,
    *,
    family: tuple[str, ...],
    calls_a_replay: float = 1.0,
    **work: Array,
) -> KernelRows:
    count = len(table)
    zeros = np.zeros(count)
    seconds = _column(table, "latency") * 1e-3
    watts, clock = np.full(count, np.nan), np.ones(count)
    if "power" in table.columns:
        trusted = seconds * calls_a_replay * _REPLAYS >= _TRUSTED_SECONDS
        watts = np.where(trusted, _column(table, "power"), np.nan)
        clock = np.full(count, np.nan)
    columns = ("flops", "executed_flops", "hbm_bytes", "activation_bytes", "link_bytes")
    columns += ("tiles", "key_blocks")
    shapes = table.select(family).rows()
    return KernelRows(
        name=tuple(f"{op_class} row {i}" for i in range(count)),
        op_class=(op_class,) * count,
        family=tuple("x".join(map(str, shape)) for shape in shapes),
        dtype=(dtype,) * count,
        board=("",) * count,
        board_idle_watts=zeros,
        block_bytes=zeros,
        reductions=zeros,
        calls=np.ones(count),
        gemm_rows=work.get("gemm_rows", zeros),
        gemm_columns=work.get("gemm_columns", zeros),
        gemm_k=work.get("gemm_k", zeros),
        seconds=seconds,
        watts=watts,
        clock=clock,
        **{c: work.get(c, zeros) for c in columns},
    )


def _expert_load(
    tokens: int, experts: int, top_k: int, law: str, tile: float, generator: np.random.Generator
) -> tuple[float, float]:
    """Distinct experts and padded rows of a collector's routing `law`, mean of its draws."""
    if law == "balanced":
        distinct = min(experts, tokens * top_k)
        rows = np.ceil(tokens * top_k / distinct / tile) * tile * distinct
        return float(distinct), float(rows)
    alpha = 1.0 - float(law.removeprefix("power_law_"))
    low, high = (1.0, tokens * 0.8) if tokens * top_k > experts else (0.01, 2.0)
    draws = []
    for _ in range(5):
        u = generator.random(experts)
        share = ((high**alpha - low**alpha) * u + low**alpha) ** (1.0 / alpha)
        counts = np.minimum(np.round(share / share.sum() * tokens * top_k), tokens)
        missing = int(tokens * top_k - counts.sum())
        order = np.argsort(counts)
        while missing > 0:  # the collector fills the least loaded first
            spare = order[counts[order] < tokens][:missing]
            counts[spare] += 1
            missing -= len(spare)
        while missing < 0:
            spare = order[::-1][counts[order[::-1]] > 0][:-missing]
            counts[spare] -= 1
            missing += len(spare)
        draws.append([(counts > 0).sum(), (np.ceil(counts / tile) * tile).sum()])
    distinct, rows = np.mean(draws, axis=0)
    return float(distinct), float(rows)

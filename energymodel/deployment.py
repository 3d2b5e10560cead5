"""What serves the requests: GPU, model, engine options and calibration, checked to fit together."""

from __future__ import annotations

from dataclasses import dataclass, replace

from energymodel.calibrations import (
    Calibration,
    list_calibrations,
    load_calibration,
    with_host_times,
)
from energymodel.costs import CostTables, cost_tables
from energymodel.errors import CapacityError, ConfigurationError, ProfileError, unknown_name
from energymodel.expert_tiles import with_tuned_tiles
from energymodel.gpus import load_gpu
from energymodel.models import load_model
from energymodel.operator_parts import WEIGHTS_ONLY, compute_dtype
from energymodel.operators import operator_table
from energymodel.specs import (
    DEFAULT_DTYPE,
    DEFAULT_GPU_MEMORY_UTILIZATION,
    DEFAULT_MAX_BATCH,
    DEFAULT_MODEL,
    DEFAULT_STACK,
    STATIC_STACKS,
    Decoding,
    Draft,
    GpuSpec,
    ModelSpec,
    MoeSpec,
    ServingConfig,
)
from energymodel.units import BYTES_PER_ELEMENT, GIB

STACKS = ("vllm", "vllm-eager", "transformers", "transformers-compile")
"""Serving stacks, as `--stack` takes them."""

_FASTEST_HOST, _SLOWEST_HOST = 0.05, 20.0
_WEIGHT_DTYPES = tuple(BYTES_PER_ELEMENT)
_KV_DTYPES = ("bf16", "fp16", "fp8")
_MOST_BEAMS = 64
_MOST_DRAFT_TOKENS = 32
_MOST_STEP_TOKENS = 2**18  # the cost tables hold a row for each; no engine comes near it


_LARGEST_CAPTURED = {"GptOssForCausalLM": 1024}
"""Tokens of the largest CUDA graph where a model's config in vLLM 0.22 fixes it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Deployment:
    """One replica: a model on a group of GPUs under one engine, and what its steps cost."""

    gpu: GpuSpec
    model: ModelSpec
    serving: ServingConfig
    calibration: Calibration
    costs: CostTables
    """Per GPU of the group."""
    host_ratio: float = 1.0
    """Host times over those of the calibration as it was loaded [-]."""

    @property
    def gpus_per_replica(self) -> int:
        """GPUs that one copy of the model occupies."""
        return self.serving.tensor_parallel * self.serving.pipeline_parallel

    @property
    def static_batches(self) -> bool:
        """Whether a batch starts and ends together, as in Transformers' `generate`."""
        return self.serving.stack in STATIC_STACKS

    @property
    def kv_tokens(self) -> int:
        """Tokens of the longest sequence whose KV cache fits beside the weights."""
        longest = self.costs.scheduler.kv.longest_tokens
        return self.max_model_len if longest is None else longest

    @property
    def max_model_len(self) -> int:
        """Longest context served [tokens]."""
        return self.serving.max_model_len or self.model.max_model_len


def deploy(
    *,
    gpu: str | GpuSpec,
    model: str | ModelSpec = DEFAULT_MODEL,
    stack: str = DEFAULT_STACK,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    max_batch: int = DEFAULT_MAX_BATCH,
    max_step_tokens: int | None = None,
    max_model_len: int | None = None,
    gpu_memory_utilization: float | None = None,
    dtype: str = DEFAULT_DTYPE,
    kv_dtype: str | None = None,
    decoding: str = "greedy",
    draft_model: str | ModelSpec | None = None,
    draft_tokens: int | None = None,
    acceptance: float | None = None,
    host_ratio: float = 1.0,
    calibration: str | Calibration | None = None,
) -> Deployment:
    """Load GPU, model and calibration, check the options against them, and cost every step.

    Arguments and defaults as in `workload.predict`.

    Raises
    ------
    ProfileError, UnsupportedModelError
        If the GPU, its calibration or the model is unknown or malformed.
    ConfigurationError
        If an option is unknown, out of range, or impossible for this model or GPU.
    CapacityError
        If the weights do not fit; says how many GPUs would do.
    """
    gpu_spec = load_gpu(gpu) if isinstance(gpu, str) else gpu
    model_spec = load_model(model) if isinstance(model, str) else model
    if stack not in STACKS:
        raise ConfigurationError(unknown_name("stack", stack, STACKS))
    _check_dtypes(gpu_spec, dtype, kv_dtype)
    _check_parallel(model_spec, tensor_parallel, pipeline_parallel)
    if max_step_tokens is None:
        max_step_tokens = _default_step_tokens(gpu_spec)
    _check_limits(max_batch, max_step_tokens, max_model_len)
    if gpu_memory_utilization is None:
        gpu_memory_utilization = DEFAULT_GPU_MEMORY_UTILIZATION
    check_memory(gpu_memory_utilization)
    strategy, beams = _decoding(decoding, stack)
    draft = _draft(draft_model, draft_tokens, acceptance, model_spec, stack, tensor_parallel)
    serving = ServingConfig(
        stack=stack,  # type: ignore[arg-type]
        weight_dtype=dtype,
        kv_dtype=kv_dtype or "bf16",
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        decoding=strategy,
        beams=beams,
        graph_batch_sizes=captured_sizes(
            max_batch * (1 if draft is None else draft.tokens + 1),
            max_step_tokens,
            largest=_LARGEST_CAPTURED.get(model_spec.architecture),
        ),
    )
    if draft is not None:
        serving = with_drafts(serving, draft)
    if not _FASTEST_HOST <= host_ratio <= _SLOWEST_HOST:
        raise ConfigurationError(
            f"--host-ratio {host_ratio:g}: the host's times over the calibration's lie between "
            f"{_FASTEST_HOST:g} and {_SLOWEST_HOST:g}"
        )
    fitted = with_host_times(_calibration(gpu_spec, calibration), host_ratio)
    model_spec = with_tuned_tiles(model_spec, serving, gpu_spec)
    try:
        costs = cost_tables(model_spec, serving, gpu_spec, fitted)
    except CapacityError as error:
        smaller = _smaller_checkpoint(model_spec, serving, gpu_spec)
        raise CapacityError(f"{error}. {smaller}" if smaller else str(error)) from error
    return Deployment(
        gpu=gpu_spec,
        model=model_spec,
        serving=serving,
        calibration=fitted,
        costs=costs,
        host_ratio=host_ratio,
    )


def _decoding(decoding: str, stack: str) -> tuple[Decoding, int]:
    """Strategy and beams from `greedy`, `sampling`, `sampling-sorted` or `beam:N`."""
    if decoding in ("greedy", "sampling", "sampling-sorted"):
        return decoding, 1  # type: ignore[return-value]
    name, _, number = decoding.partition(":")
    if name != "beam" or not number.isdecimal() or not 1 <= int(number) <= _MOST_BEAMS:
        raise ConfigurationError(
            f"--decoding {decoding} is unknown; it is greedy, sampling, sampling-sorted or beam:N, "
            f"N hypotheses from 1 to {_MOST_BEAMS}"
        )
    if int(number) == 1:
        return "greedy", 1
    if stack == "transformers":
        return "beam", int(number)
    why = (
        "vLLM keeps no beams: it sends every hypothesis anew as a request, for each token"
        if stack not in STATIC_STACKS
        else "Transformers compiles no step of it"
    )
    raise ConfigurationError(
        f"beam search is not modelled for --stack {stack} ({why}); use --stack transformers"
    )


def _draft(
    model: str | ModelSpec | None,
    tokens: int | None,
    acceptance: float | None,
    target: ModelSpec,
    stack: str,
    tensor_parallel: int,
) -> Draft | None:
    """The draft model, if there is one and it proposes anything."""
    if model is None:
        if tokens or acceptance is not None:
            raise ConfigurationError(
                "--draft-tokens and --acceptance say how a draft model does; name it with "
                "--draft-model"
            )
        return None
    if tokens is None or not 0 <= tokens <= _MOST_DRAFT_TOKENS:
        given = "--draft-tokens is missing" if tokens is None else f"--draft-tokens {tokens}"
        raise ConfigurationError(
            f"{given}; with --draft-model it says how many tokens a round proposes, 0 (none) to "
            f"{_MOST_DRAFT_TOKENS}"
        )
    if acceptance is None or not 0.0 <= acceptance <= 1.0:  # false for NaN as well
        given = "--acceptance is missing" if acceptance is None else f"--acceptance {acceptance:g}"
        raise ConfigurationError(
            f"{given}; the probability that a drafted token is accepted lies between 0 and 1 and "
            "follows from both models and the text: measure it, or try several"
        )
    if tokens == 0:
        return None
    if stack in STATIC_STACKS:
        raise ConfigurationError(
            f"--draft-model is modelled for vllm and vllm-eager, not for --stack {stack}"
        )
    draft = load_model(model) if isinstance(model, str) else model
    if draft.vocab_size != target.vocab_size:
        raise ConfigurationError(
            f"the vocabularies of {target.name} ({target.vocab_size} tokens) and of its draft "
            f"model {draft.name} ({draft.vocab_size}) differ; vLLM needs equal ones"
        )
    _check_parallel(draft, tensor_parallel, 1)
    return Draft(model=draft, tokens=tokens, acceptance=acceptance)


def captured_sizes(tokens: int, step_tokens: int, largest: int | None = None) -> tuple[int, ...]:
    """Token counts for which vLLM 0.22 captures CUDA graphs (`_set_cudagraph_sizes`).

    tokens : of a step in which a full batch decodes; largest : where a model's config fixes it
    """
    largest = min(largest or min(2 * tokens, 512), step_tokens)
    sizes = {size for size in (1, 2, 4) if size <= largest}
    sizes.update(range(8, min(largest + 1, 256), 8), range(256, largest + 1, 16))
    if step_tokens <= largest:
        sizes.add(step_tokens)
    return tuple(sorted(sizes))


def with_drafts(serving: ServingConfig, draft: Draft) -> ServingConfig:
    """The serving setup with drafts; refuses what vLLM cannot schedule with them.

    Graphs are captured for whole sequences of checked tokens (vLLM's
    `adjust_cudagraph_sizes_for_spec_decode`).
    """
    queries, largest = draft.tokens + 1, max(serving.graph_batch_sizes)
    rounded = {-(-size // queries) * queries for size in serving.graph_batch_sizes}
    captured = tuple(sorted(size for size in rounded if size <= largest))
    serving = replace(serving, draft=draft, decode_queries=queries, graph_batch_sizes=captured)
    if serving.pipeline_parallel > 1:
        raise ConfigurationError("--draft-model is not modelled with --pipeline-parallel")
    needed = serving.max_batch * (serving.decode_queries + 1)
    if serving.max_step_tokens < needed:
        raise ConfigurationError(
            f"--max-step-tokens {serving.max_step_tokens} is too few for --max-batch "
            f"{serving.max_batch} with {draft.tokens} draft tokens: a round checks "
            f"{serving.decode_queries} tokens of every sequence and keeps a slot more, {needed} in "
            "all; raise the one or lower the other"
        )
    return serving


def setup_warnings(deployment: Deployment) -> list[str]:
    """What is unusual about a deployment, one line each."""
    warnings = []
    model, gpu, calibration = deployment.model, deployment.gpu, deployment.calibration
    if deployment.max_model_len > model.max_model_len:
        warnings.append(
            f"--max-model-len {deployment.max_model_len} exceeds the {model.max_model_len} tokens "
            f"{model.name} allows"
        )
    if smaller := _smaller_checkpoint(model, deployment.serving, gpu):
        warnings.append(smaller)
    serving = deployment.serving
    if serving.draft is not None or serving.decoding != "greedy":
        other = "drafts" if serving.draft is not None else f"{serving.decoding} decoding"
        warnings.append(
            "the interval is mostly that of greedy decoding without drafts; few or none of the "
            f"runs it rests on had {other}"
        )
    if packed := {serving.weight_dtype, model.expert_dtype} & WEIGHTS_ONLY:
        names = " or ".join(sorted(map(str, packed)))
        table = operator_table(model, serving)
        used = {c for c in table.op_class if c.endswith("_packed")}
        here = used <= set(calibration.provenance.get("kernel_windows", ()))
        where = "" if here else ", timed on an H200"
        warnings.append(
            f"{names} weights are predicted by kernels that unpack them{where}; hardly a run that "
            "the interval rests on had such weights"
        )
    if calibration.gpu != gpu.name:
        warnings.append(
            f"the calibration is of {calibration.gpu}, not of {gpu.name}: energy and time are as "
            "if this GPU used its peaks as that one does, and drew that one's power"
        )
    return warnings


def _smaller_checkpoint(model: ModelSpec, serving: ServingConfig, gpu: GpuSpec) -> str:
    """A hint where the published weights are smaller than those served; else empty."""
    stored, served = model.checkpoint_dtype, serving.weight_dtype
    if stored is None or model.expert_dtype is not None:  # experts keep their own dtype anyway
        return ""
    smaller = BYTES_PER_ELEMENT[stored] < min(BYTES_PER_ELEMENT[served], 2.0)
    if not smaller or compute_dtype(stored) not in gpu.peak_flops_per_s:
        return ""
    return (
        f"The checkpoint of {model.name} stores {stored} weights, --dtype {served} counts larger "
        f"ones; --dtype {stored} serves it as published"
    )


def _calibration(gpu: GpuSpec, given: str | Calibration | None) -> Calibration:
    """The parameters given, or the GPU's own."""
    if isinstance(given, Calibration):
        return given
    if given is None and gpu.name not in list_calibrations():
        raise ProfileError(
            f"{gpu.title} ({gpu.name}) has no calibration yet, so there is nothing to predict its "
            f"energy from. GPUs with one: {', '.join(list_calibrations())}. Give a file of your "
            "own with --calibration, or measure the GPU."
        )
    return load_calibration(given or gpu.name)


def _default_step_tokens(gpu: GpuSpec) -> int:
    """Default of vLLM 0.22: EngineArgs.get_batch_defaults, offline LLM class."""
    roomy = gpu.hbm_bytes >= 70 * GIB and not gpu.name.startswith("a100")
    return 16384 if roomy else 8192


def _check_dtypes(gpu: GpuSpec, dtype: str, kv_dtype: str | None) -> None:
    if dtype not in _WEIGHT_DTYPES:
        raise ConfigurationError(unknown_name("dtype", dtype, _WEIGHT_DTYPES))
    if compute_dtype(dtype) not in gpu.peak_flops_per_s:
        known = [d for d in _WEIGHT_DTYPES if compute_dtype(d) in gpu.peak_flops_per_s]
        raise ConfigurationError(
            f"{gpu.title} does not compute in {compute_dtype(dtype)}, which --dtype {dtype} needs. "
            f"It can serve: {', '.join(known)}."
        )
    if kv_dtype is not None and kv_dtype not in _KV_DTYPES:
        raise ConfigurationError(unknown_name("KV dtype", kv_dtype, _KV_DTYPES))


def _check_parallel(model: ModelSpec, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Refuse splits that vLLM refuses: it deals out whole heads, columns and layers."""
    for option, value in (
        ("tensor-parallel", tensor_parallel),
        ("pipeline-parallel", pipeline_parallel),
    ):
        if value < 1:
            raise ConfigurationError(f"--{option} {value} makes no sense; it is at least 1")
    if pipeline_parallel > model.num_layers:
        raise ConfigurationError(
            f"--pipeline-parallel {pipeline_parallel} is more than the {model.num_layers} layers "
            f"of {model.name}; a stage holds at least one layer"
        )
    if _splits(model, tensor_parallel):
        return
    heads = sorted({group.attention.num_heads for group in model.layers})
    possible = [n for n in range(1, heads[0] + 1) if _splits(model, n)]
    raise ConfigurationError(
        f"--tensor-parallel {tensor_parallel} does not divide {model.name} "
        f"({', '.join(map(str, heads))} attention heads) into equal parts; possible: "
        f"{', '.join(map(str, possible))}"
    )


def _splits(model: ModelSpec, parts: int) -> bool:
    for group in model.layers:
        attention, block = group.attention, group.feed_forward
        if isinstance(block, MoeSpec):
            widths = (block.expert_intermediate_size, block.shared_intermediate_size)
        else:
            widths = (block.intermediate_size, 0)
        if attention.num_heads % parts or any(width % parts for width in widths):
            return False
        kv_heads = attention.num_kv_heads  # fewer than parts are copied to every part
        if attention.kind == "gqa" and kv_heads % parts and parts % kv_heads:
            return False
    return True


def check_memory(utilization: float) -> None:
    """Refuse what is no share of a GPU's memory, with ConfigurationError."""
    if not 0.0 < utilization <= 1.0:  # true for NaN as well
        raise ConfigurationError(
            f"--gpu-memory-utilization {utilization:g} is no share of the GPU's memory; it is "
            "above 0 and at most 1"
        )


def _check_limits(max_batch: int, max_step_tokens: int, max_model_len: int | None) -> None:
    limits = {"max-batch": max_batch, "max-step-tokens": max_step_tokens}
    if max_model_len is not None:
        limits["max-model-len"] = max_model_len
    for option, value in limits.items():
        if value < 1:
            raise ConfigurationError(f"--{option} {value} makes no sense; it is at least 1")
    if max_step_tokens > _MOST_STEP_TOKENS:
        raise ConfigurationError(
            f"--max-step-tokens {max_step_tokens} is beyond any engine; it is at most "
            f"{_MOST_STEP_TOKENS}"
        )
    if max_step_tokens < max_batch:
        raise ConfigurationError(
            f"--max-step-tokens {max_step_tokens} is below --max-batch {max_batch}: every running "
            "sequence needs a token of the step's budget; raise the one or lower the other"
        )

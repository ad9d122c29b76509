"""Estimates what a config needs of a machine, memory of a rank and seconds of a phase, without loading anything.

Everything is counted from the model's dimensions, by the formulas beside each function. Rates of GPUs are assumptions
(`MACHINES`), marked as such where they are printed; those of a CPU are measured on the spot. An estimate is at full
prompts and at `MEAN_LENGTH` of the longest answer.
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eepo_fast.config import Config
from eepo_fast.policy.footprint import AUTOCAST, BUCKET_ELEMENTS, KEYS, Shape, kept_bytes, pass_bytes, score_bytes
from eepo_fast.policy.loading import read_model_config
from eepo_fast.types import UserError

GIB = 1 << 30
BUCKET = 500_000_000  # elements: DeepSpeed's default for reduce and gather, however small the model is
MEAN_LENGTH = 0.35  # of max_new_tokens: what reasoning answers come to under these limits
CONTEXT_GIB = 2.0  # CUDA context, NCCL, allocator
GPUS_A_NODE = 8
KEPT_GIB = 1.0  # left free for the allocator's fragments


@dataclass(frozen=True)
class Machine:
    name: str
    ranks: int
    memory_gib: float
    """Memory of one rank's device."""
    flops: float
    """The dense 16-bit GEMM rate that a training step reaches."""
    bytes_per_s: float
    link_bytes_per_s: float
    """The rate of a collective, a rank."""
    measured: bool = False

    @property
    def device(self) -> str:
        """Is `cpu` for rates measured on the spot, which are a CPU's."""
        return "cpu" if self.measured else "cuda"

    @property
    def neighbours(self) -> int:
        """Is the number of ranks on one node."""
        return min(self.ranks, GPUS_A_NODE)


MACHINES = {  # GiB a device, GEMM FLOP/s reached, copy bandwidth reached, collective bandwidth reached
    "A100-80GB": (79.1, 200e12, 1.7e12, 200e9),
    "H100-80GB": (79.1, 450e12, 2.8e12, 300e9),
    "H200": (139.8, 500e12, 4.2e12, 300e9),
    "B200": (178.0, 1000e12, 6.8e12, 600e9),
}


def find_machine(name: str | None, ranks: int) -> Machine:
    """Returns the machine of a name such as `8xA100-80GB`, or this one with `ranks` processes; UserError on others."""
    if name is None:
        return this_machine(ranks)
    match = re.fullmatch(r"(\d+)x(.+)", name)
    if match is None or match[2] not in MACHINES or match[1] == "0":
        raise UserError(
            f"--machine: expected a number, x and one of {', '.join(MACHINES)}, such as 8xA100-80GB; found {name!r}"
        )
    return Machine(name, int(match[1]), *MACHINES[match[2]])


def this_machine(ranks: int) -> Machine:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        # the nearest of the known ones, by memory
        known = min(MACHINES, key=lambda k: abs(MACHINES[k][0] * GIB - properties.total_memory))
        return Machine(properties.name, ranks, properties.total_memory / GIB, *MACHINES[known][1:])
    memory = device_memory_gib(ranks)
    a = torch.randn(1024, 1024)
    big = torch.empty(1 << 25)
    flops = 2 * 1024**3 / _best_seconds(lambda: a @ a)
    bandwidth = 2 * big.numel() * 4 / _best_seconds(lambda: big.clone())
    return Machine("this CPU", ranks, memory, flops / ranks, bandwidth / ranks, bandwidth / ranks, measured=True)


def device_memory_gib(ranks: int) -> float:
    """Returns the memory of this rank's GPU, or its share of the host's where there is none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB / ranks


def _best_seconds(run, repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def find_shape(config: Config) -> Shape:
    """Returns the shape from model.dimensions, completed from the folder's config.json where there is one. UserError
    where they do not say enough."""
    known: dict[str, Any] = dict(config.model.dimensions)
    path = Path(config.model.path).expanduser() / "config.json"
    if path.is_file():
        known = read_model_config(path) | known
    known.setdefault("model_type", Path(config.model.path).name.lower())
    shape = Shape.of(known)
    if shape is None:
        missing = [name for name in KEYS if not isinstance(known.get(name), int)]
        raise UserError(
            f"model.dimensions: an estimate needs {', '.join(missing)} of {config.model.path}; add them, as its "
            "config.json has them"
        )
    return shape


def memory(config: Config, shape: Shape, machine: Machine) -> dict[str, float]:
    """Returns the GiB of a rank while the policy is updated, by what they are for."""
    train, n, w = config.train, machine.ranks, shape.weights
    sharded, stage = train.engine == "deepspeed", train.zero_stage
    itemsize = 4 if config.model.dtype == "float32" or not sharded or stage == 0 else 2
    compute = 4 if config.model.dtype == "float32" else 2
    cut = n if sharded else 1
    parts: dict[str, float] = {"weights": itemsize * w}
    if sharded and stage == 3:  # two layers and the head are whole while they are used
        held = 0 if train.offload_parameters else w / cut
        parts["weights"] = itemsize * (held + 2 * shape.layer_weights + shape.vocab_size * shape.hidden_size)
    on_host = train.offload_optimizer
    has_masters = sharded and stage > 0
    parts["masters"] = 0 if on_host or not has_masters else 4 * w / cut
    parts["optimizer"] = 0 if on_host else 8 * w / (cut if has_masters else 1)
    parts["gradients"] = 4 * w if not sharded or stage <= 1 else 4 * w / cut
    parts["gradient buckets"] = 2 * BUCKET * itemsize if sharded and stage >= 2 else 0
    parts["activations"], whole = micro_batch(config, shape, machine)
    parts["head workspace"] = whole - parts["activations"]  # or the workspace of a layer that is recomputed
    parts["reference"] = (compute if sharded else 4) * w if config.grpo.kl_coef else 0
    return {name: value / GIB for name, value in parts.items()}


def batch_of(config: Config) -> tuple[int, int]:
    """Returns (tokens of a full micro-batch, itemsize as the formulas of footprint.py take it)."""
    train = config.train
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    below = AUTOCAST if train.engine != "deepspeed" or train.zero_stage == 0 else 2
    return max(train.micro_batch_tokens, longest), 4 if config.model.dtype == "float32" else below


def micro_batch(config: Config, shape: Shape, machine: Machine, backward_bytes: float = 0.0) -> tuple[float, float]:
    """Returns the bytes of a full micro-batch: (what is kept between its passes, all at its peak)."""
    where, again = (shape, *batch_of(config)), config.train.gradient_checkpointing
    whole = pass_bytes(*where, machine.device, checkpointing=again, backward_bytes=backward_bytes)
    return kept_bytes(*where, again), whole


def engine_memory(config: Config, shape: Shape, machine: Machine) -> tuple[float, float]:
    """Returns GiB of the engine on a rank: (its weights, its cache of keys and values). vLLM fills its share."""
    rollout = config.rollout
    itemsize = 4 if rollout.dtype == "float32" else 2
    weights = itemsize * shape.weights / rollout.tensor_parallel / GIB
    if rollout.engine == "vllm" and not machine.measured:
        return weights, max(0.0, rollout.gpu_memory_utilization * machine.memory_gib - weights - CONTEXT_GIB)
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    return weights, min(rollout.max_sequences, samples(config, machine)) * longest * shape.kv_bytes(itemsize) / GIB


def samples(config: Config, machine: Machine) -> int:
    """Returns how many completions of one stage one engine samples."""
    halves = 2 if config.eepo.enabled else 1
    engines = max(1, machine.ranks // config.rollout.tensor_parallel)
    return -(-config.train.prompts_per_iteration * config.rollout.group_size // halves // engines)


def wire_bytes(config: Config, micro_batches: float) -> float:
    """Returns the bytes a weight that cross a rank's link in one update. DeepSpeed sums gradients by an all-reduce
    (twice their size): once an update in stages 0 and 1, at every micro-batch in stage 2, which waits for it with
    `overlap_comm`, too. Stage 3 scatters them at every micro-batch, and gathers the weights for each pass forward and
    backward. Stages 1 and 2 gather the weights once an update. All is in the dtype computed with; stage 0 in fp32."""
    stage, itemsize = config.train.zero_stage, 4 if config.model.dtype == "float32" else 2
    if stage == 0:
        return 2 * 4
    if stage == 3:
        return 3 * itemsize * micro_batches
    return 2 * itemsize * (micro_batches if stage == 2 else 1) + itemsize


def seconds(config: Config, shape: Shape, machine: Machine) -> dict[str, float]:
    """Returns the seconds of an iteration's phases. Rollout: a step reads the weights and the cache once and multiplies
    a token a sequence; the stage lasts as long as its longest answer. Passes: 2 FLOP a weight and token forward, 4
    backward, 2 again where activations are recomputed. AEPO's extra samples are a stage of their own; each is counted
    as right, and so has a gradient: once for the term's norm, and again in the update it is added to."""
    rollout, train, n = config.rollout, config.train, machine.ranks
    mean = MEAN_LENGTH * rollout.max_new_tokens
    prompt = config.data.max_prompt_tokens * 0.2
    itemsize = 4 if rollout.dtype == "float32" else 2
    room = engine_memory(config, shape, machine)[1] * GIB / shape.kv_bytes(itemsize) * rollout.tensor_parallel
    tp = rollout.tensor_parallel

    def stage(count: int) -> float:
        running = max(1, min(rollout.max_sequences, count, int(room / (prompt + mean))))
        cache = running * (prompt + mean / 2) * shape.kv_bytes(itemsize) / tp * MEAN_LENGTH
        multiply = 2 * shape.multiplied_weights * running * MEAN_LENGTH / machine.flops / tp
        step = (itemsize * shape.weights / tp + cache) / machine.bytes_per_s + multiply
        return -(-count // running) * rollout.max_new_tokens * step

    completions = train.prompts_per_iteration * rollout.group_size
    tokens = completions * (prompt + mean) / n
    forward = tokens * (2 * shape.multiplied_weights + shape.attention_flops(prompt + mean)) / machine.flops
    step = forward * (4 if train.gradient_checkpointing else 3)
    stages = 2 if config.eepo.enabled else 1
    result = {"rollout": stages * stage(samples(config, machine))}
    extra = config.aepo.num_extra(train.prompts_per_iteration, rollout.group_size)
    if extra:
        result["aepo"] = stage(-(-extra // max(1, n // tp))) + step * extra / completions
    if config.eepo.enabled:
        result["unlearn"] = step / 2
        gathered = 2 * shape.weights / machine.link_bytes_per_s if n > 1 else 0.0
        result["forget"] = gathered + 8 * shape.weights / n / machine.bytes_per_s
    if config.grpo.kl_coef:
        result["reference"] = forward
    updates = train.prompts_per_iteration // train.prompts_per_update
    wire = 0.0
    if n > 1:
        micro_batches = -(-tokens // (updates * max(train.micro_batch_tokens, prompt + mean)))
        wire = updates * wire_bytes(config, micro_batches) * shape.weights / machine.link_bytes_per_s
        if config.eepo.enabled:  # ∇L goes to its owners at every micro-batch, in fp32; half of the completions
            result["unlearn"] += 4 * shape.weights * -(-updates * micro_batches // 2) / machine.link_bytes_per_s
    added = extra / completions if config.aepo.mode == "term" else 0.0  # else the extra samples replace others
    result["update"] = step * (1 + added) + wire + updates * 20 * shape.weights / n / machine.bytes_per_s
    result["sync"] = 6 * shape.weights / machine.bytes_per_s
    return result


def needed(config: Config, shape: Shape, machine: Machine) -> dict[str, float]:
    """Returns GiB at an iteration's peaks: the policy's update and the optimizer's step in it, the unlearning pass, and
    the rollout with ∇L at hand. The engine sleeps, if it is told to, in all but the last."""
    parts, (weights, cache) = memory(config, shape, machine), engine_memory(config, shape, machine)
    sharded, stage = config.train.engine == "deepspeed", config.train.zero_stage
    engine, awake = weights + cache, 0.0 if config.rollout.sleep else weights + cache
    static = parts["weights"] + parts["masters"] + parts["optimizer"] + parts["reference"]
    static += 0.0 if machine.measured else CONTEXT_GIB + KEPT_GIB
    gradients, buckets = parts["gradients"], parts["gradient buckets"]
    if sharded and stage == 3:  # it keeps its buffers for gradients between updates
        static += gradients + buckets
        gradients = buckets = 0.0
    passes = micro_batch(config, shape, machine, buckets * GIB)[1] / GIB
    # DeepSpeed takes the norm of a rank's gradient in float64, one weight, or what the rank has of it, after the other
    largest = min(shape.vocab_size * shape.hidden_size, shape.weights / machine.ranks)
    norm = 8 * largest / GIB if sharded and stage in (1, 2) else 0.0
    peaks = {
        "update": static + gradients + passes + awake,
        "optimizer's step": static + gradients + norm + awake,
    }
    if config.eepo.enabled:
        # ∇L is summed on its owner; a micro-batch's own is whole until it is sent there, in two buckets at a time
        passes = micro_batch(config, shape, machine, 2 * 4 * BUCKET_ELEMENTS if sharded else 0.0)[1] / GIB
        judged = score_bytes(shape, *batch_of(config), machine.device) / GIB
        peaks["forget step's check"] = static + judged + engine  # the engine is awake, and ∇L is gone
        static += 4 * shape.weights / (machine.ranks if sharded else 1) / GIB
        peaks["unlearning pass"] = static + passes + awake
    if config.psn.enabled:
        peaks["noise"] = static + 4 * shape.weights / GIB + engine
    peaks["rollout"] = static + engine
    return peaks


def streamed_peak(config: Config, shape: Shape, peaks: dict[str, float], engine: float) -> float | None:
    """Returns GiB while ∇L is made beside an engine that samples; None where that is never done."""
    sharded = config.train.engine == "deepspeed"
    if not config.eepo.enabled or (sharded and config.train.zero_stage == 3) or config.rollout.tensor_parallel > 1:
        return None
    whole = 4 * shape.weights / GIB if sharded else 0.0  # this rank's own sum, beside its share of everybody's
    return peaks["unlearning pass"] + whole + (engine if config.rollout.sleep else 0.0)


def start_on_host(config: Config, shape: Shape, machine: Machine) -> float:
    """Returns GiB of a node's memory that its ranks take together while they start: each loads the model in fp32;
    DeepSpeed's is rounded there, beside the fp32 weights, which become the masters. This is arithmetic."""
    rounded = 2 if config.train.engine == "deepspeed" and config.model.dtype != "float32" else 0
    return machine.neighbours * (4 + rounded) * shape.weights / GIB


def check_engine_memory(config: Config, memory_gib: float, *, on_gpu: bool) -> None:
    """Raises a UserError where an engine cannot hold the whole model in a rank's memory, or in the share it may take.
    Nothing is said where the model's shape is not known without a download."""
    try:
        shape = find_shape(config)
    except UserError:
        return
    rollout = config.rollout
    itemsize = 4 if rollout.dtype == "float32" else 2
    weights = itemsize * shape.weights / rollout.tensor_parallel / GIB
    limited = rollout.engine == "vllm" and on_gpu
    room = rollout.gpu_memory_utilization * memory_gib - CONTEXT_GIB if limited else memory_gib
    if weights > room:
        share = "rollout.gpu_memory_utilization" if limited else "rollout.engine"
        remedy = "raise it, or rollout.tensor_parallel" if limited else "take a machine with more memory"
        raise UserError(
            f"{share}: the engine holds the whole model, however the policy is sharded: expected room for its "
            f"{weights:.1f} GiB of weights on a rank, found {max(0.0, room):.1f} of {memory_gib:.1f} GiB; {remedy}"
        )


def what_would_fit(config: Config, shape: Shape, machine: Machine) -> str | None:
    """Returns the least change of settings, one or more, tried in this order, that fits; None where none does."""
    sharded = config.train.engine == "deepspeed"
    steps: list[tuple[str, str, object]] = []
    if config.rollout.engine == "vllm" and not machine.measured:
        steps.append(("rollout", "sleep", True))
    steps.append(("train", "gradient_checkpointing", True))
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    steps.append(("train", "micro_batch_tokens", min(config.train.micro_batch_tokens, longest)))
    if sharded:
        steps += [("train", "zero_stage", 2), ("train", "zero_stage", 3), ("train", "offload_optimizer", True)]
    tried, names = config, []
    for section, key, value in steps:
        current = getattr(getattr(tried, section), key)
        if current == value or (key == "zero_stage" and current > value):
            continue
        names.append(f"{section}.{key}={str(value).lower()}")
        tried = tried.model_copy(update={section: getattr(tried, section).model_copy(update={key: value})})
        if max(needed(tried, shape, machine).values()) <= machine.memory_gib:
            return " ".join(names)
    return None


def how_known(config: Config, machine: Machine) -> list[str]:
    """Returns lines that say which figures were held against traces (tests/rehearsal), and which were not."""
    train = config.train
    sharded = train.engine == "deepspeed"
    untraced = [f"train.zero_stage={train.zero_stage}"] if sharded and train.zero_stage != 2 else []
    untraced += ["train.offload_*"] if train.offload_optimizer or train.offload_parameters else []
    untraced += ["train.packing=false"] if not train.packing else []
    untraced += [f"model.dtype={config.model.dtype}"] if config.model.dtype != "bfloat16" else []
    untraced = ["a CPU"] if machine.measured else untraced
    if untraced:
        return [f"  all of it is arithmetic: nothing was traced with {' and '.join(untraced)}"]
    return [
        "  the policy's peaks: by formulas within 10% of traces of three models, two layers of each played, the rest",
        "  counted on, without Liger, which takes less; the check of the forget step is arithmetic",
        f"  the engine's share, {CONTEXT_GIB + KEPT_GIB:g} GiB of context, host memory and seconds are arithmetic",
    ]


def _when_unlearning_runs(config: Config, machine: Machine, beside: float | None) -> list[str]:
    """Returns lines that say, for a GPU, whether unlearning runs beside sampling or after it."""
    if not config.eepo.enabled or machine.measured:
        return []
    if beside is None:
        spread = ["rollout.tensor_parallel=1"] if config.rollout.tensor_parallel > 1 else []
        cut = ["train.zero_stage=2 or less"] if config.train.zero_stage == 3 else []
        return [f"  unlearning runs after sampling: beside it with {' and '.join([*spread, *cut])}"]
    fits = beside <= machine.memory_gib
    where = "runs beside sampling" if fits else "runs after sampling: there is no room beside it"
    return [f"  {'with unlearning beside sampling, GiB:':<44}{beside:>12.2f}", f"  unlearning {where}"]


def estimate(config: Config, machine: Machine) -> list[str]:
    """Returns the lines to print: memory of a rank by part, whether it fits, seconds of a phase."""
    try:
        shape = find_shape(config)
    except UserError as error:
        return [f"no estimate of memory and time: {error}"]
    parts, (weights, cache) = memory(config, shape, machine), engine_memory(config, shape, machine)
    kind = "measured rates" if machine.measured else "assumed rates"
    lines = [f"on {machine.name}: {machine.ranks} ranks of {machine.memory_gib:.1f} GiB, {kind}; estimates:"]
    parts |= {"engine: weights": weights, "engine: cache": cache}
    lines += [f"  {name + ', GiB a rank:':<44}{value:>12.2f}" for name, value in parts.items() if value]
    peaks = needed(config, shape, machine)
    lines += [f"  {f'at the peak of the {name}, GiB:':<44}{value:>12.2f}" for name, value in peaks.items()]
    peak = max(peaks.values())
    if peak > machine.memory_gib:
        change = what_would_fit(config, shape, machine)
        hint = f"with {change} it would" if change else "no setting of this list would make it fit: take more ranks"
        lines.append(f"  does not fit into {machine.memory_gib:.1f} GiB: {hint}")
    else:
        lines.append(f"  fits, with {machine.memory_gib - peak:.1f} GiB to spare")
    lines += _when_unlearning_runs(config, machine, streamed_peak(config, shape, peaks, weights + cache))
    host = start_on_host(config, shape, machine)
    lines.append(f"  {'host memory at the start, GiB a node:':<44}{host:>12.2f}")
    longest = (config.data.max_prompt_tokens + config.rollout.max_new_tokens) * shape.kv_bytes() / GIB
    if cache and config.rollout.engine == "vllm" and cache < longest / config.rollout.tensor_parallel:
        lines.append("  the engine's cache does not hold one sequence: raise rollout.gpu_memory_utilization")
    times = seconds(config, shape, machine)
    lines += [f"  {name + ', s an iteration:':<44}{value:>12.1f}" for name, value in times.items()]
    lines.append(f"  {'an iteration, s:':<44}{sum(times.values()):>12.1f}")
    return lines + how_known(config, machine)

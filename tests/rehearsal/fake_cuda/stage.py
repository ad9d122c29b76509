"""What the scenes are played with: models of true sizes, completions, an engine without a model.

Shapes are those of the configs; numbers do not exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.attention.varlen  # defines its operators
from eepo_kernels import ForgetStats, forget, linear_chunks, linear_loss, native, row_stats, sync, tensor_key
from torch import nn
from tracing import Launches, Trace
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from eepo_fast.algorithm import overlap
from eepo_fast.config import Config, load_config
from eepo_fast.types import Grade, Problem, Prompt, Rollout, Segment, WeightsVersion

ROOT = Path(__file__).parents[3]
FAMILIES = {
    "qwen2.5-3b": (Qwen2Config, Qwen2ForCausalLM),
    "llama-3.2-3b-instruct": (LlamaConfig, LlamaForCausalLM),
    "qwen3-8b-base": (Qwen3Config, Qwen3ForCausalLM),
}
varlen = torch.ops.torch_attn


class Immediately:
    """Stands for a pool of one thread: PyTorch's modes are a thread's own. Work is done when it is given."""

    def __init__(self, *_, **__):
        pass

    def submit(self, work, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # the future's reader gets it
            future.set_exception(error)
        return future

    def shutdown(self, **_) -> None:
        pass


def read_config(name: str, *overrides: str, machine: str | None = None) -> Config:
    files = [ROOT / "configs" / f"{name}.yaml", *([ROOT / "configs/machines" / f"{machine}.yaml"] if machine else [])]
    return load_config([str(f) for f in files], ["data.train=unused", *overrides])


def make_model(config: Config, name: str, layers: int | None = None, device: str = "cuda"):
    make_config, make = FAMILIES[name]
    dimensions = dict(config.model.dimensions)
    dimensions["num_hidden_layers"] = layers or dimensions["num_hidden_layers"]
    with torch.device(device):
        return make(make_config(**dimensions, max_position_embeddings=32768)).eval()


def make_rollouts(count: int, length: int, prompt: int = 512, stage: int = 1) -> list[Rollout]:
    """Sequences of `length` tokens as they are read, the prompt's in it."""
    rollouts = []
    for i in range(count):
        shared = Prompt(Problem(f"p{i // 4}", "", "1"), "", [5] * prompt)
        new = length - prompt + 1
        rollout = Rollout(shared, stage, i, [Segment([7] * new, [-1.0] * new, WeightsVersion(0, stage == 2))], True)
        rollout.reward, rollout.advantage = float(i % 2), 1.0 - 2 * (i % 2)
        rollouts.append(rollout)
    return rollouts


@contextmanager
def playing(active: float = 1.0) -> Iterator[Trace]:
    """A trace in which kernels are noted and not launched. active: share of a chunk's rows that have a gradient."""
    names = ("row_stats_fwd_kernel", "row_grad_kernel")
    kernels, add_to = {name: getattr(row_stats, name) for name in names}, linear_chunks.Pending.add_to

    def add_some(self, pack) -> None:
        self.num_active.read()
        first = not trace.launches["row_grad_kernel"].programs
        count = max(1, int(active * len(self.order)) // 2 * 2 - first)  # one odd number: then the places are, too
        pack.add(self.rows, self.order, count, self.coefficients, self.tokens)

    with Trace.begin() as trace:
        trace.launches = {name: Launches(name) for name in names}
        trace.instead[torch.ops.eepo_kernels.linear_logprobs.default] = linear_loss._linear_logprobs._init_fn
        trace.transient[varlen._varlen_attn_backward.default] = _attention_backward_bytes
        for name in names:
            setattr(row_stats, name, trace.launches[name])
        linear_chunks.Pending.add_to = add_some
        kept = {name: getattr(native, name) for name in ("library", "matrix_table", "run")}
        native.library = lambda device_type: device_type
        native.matrix_table = lambda dst, *_: dst
        native.run = trace.weight_update
        to, nn.Module.to = nn.Module.to, moved
        pool, overlap.ThreadPoolExecutor = overlap.ThreadPoolExecutor, Immediately
        try:
            yield trace
        finally:
            linear_chunks.Pending.add_to = add_to
            for name, function in kept.items():
                setattr(native, name, function)
            overlap.ThreadPoolExecutor, nn.Module.to = pool, to
            for name, kernel in kernels.items():
                setattr(row_stats, name, kernel)


def _attention_backward_bytes(grad, query, key, *_, **__) -> int:
    """Of flash attention's backward pass beside what it returns: dQ summed in fp32, and keys' and values' gradients of
    each query head where heads share them."""
    return query.numel() * 4 + (2 * 2 * query.numel() if key.shape[1] != query.shape[1] else 0)


def moved(self: nn.Module, *arguments, **options) -> nn.Module:
    """Module.to: PyTorch's own swaps two tensors' insides, which those that are watched do not bear."""
    known: dict[int, nn.Parameter] = {}
    for module in self.modules():
        for name, p in module._parameters.items():
            if p is not None:
                here = p.detach()
                there = here.to(*arguments, **options)
                made = p if there is here else nn.Parameter(there, requires_grad=p.requires_grad)
                known.setdefault(id(p), made)
                module._parameters[name] = known[id(p)]
        for name, b in module._buffers.items():
            module._buffers[name] = b if b is None else b.to(*arguments, **options)
    return self


class StubEngine:
    """16-bit weights on the device, and completions as long as they may be."""

    def __init__(self, model):
        self.weights = {n: torch.empty_like(p, dtype=torch.bfloat16) for n, p in model.named_parameters()}
        self.weights_version = WeightsVersion(0, False)

    def sync(self, weights, version) -> None:
        for bucket in weights:
            sync([self.weights[name] for name in bucket], list(bucket.values()))
        self.weights_version = version

    def forget(self, gradient, *, eta, rounding, seed, step, norm=None) -> ForgetStats:
        self.weights_version = self.weights_version._replace(forgotten=True)
        names, options = list(gradient), dict(eta=eta, rounding=rounding, seed=seed, step=step)
        layout = dict(keys=[tensor_key(n) for n in names], offsets=[0] * len(names))
        return forget([self.weights[n] for n in names], list(gradient.values()), **layout, **options)

    def generate(self, requests, sampling, progress=None, finished=None, quorum=1.0) -> list[Rollout]:
        found = []
        for request in requests:
            for k in range(len(request.seeds)):
                length = request.limit(k, sampling)
                segment = Segment([7] * length, [-1.0] * length, self.weights_version)
                found.append(request.rollout(k, segment, finished=True, preempted=False))
                if finished:
                    finished(found[-1])
        return found

    def score(self, rollouts, temperature):
        return [[-1.0] * r.num_tokens for r in rollouts]

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


class StubGrader:
    beside_sampling = False

    def grade(self, problems, completions, *, seconds=None):
        return [Grade(float(i % 2), "ok", 0.0) for i in range(len(completions))]


class StubTokenizer:
    pad_token_id = 0

    def decode(self, ids, **_) -> str:
        return "1"

"""Measures for bench/gpu_check.py, beside the other benches: the machine, a forget step at 3B, memory against its
estimate. `python bench/gpu_measures.py weight_update [--small]`."""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import interleaved, peak_bytes, record
from eepo_kernels import checksums, forget, sync, tensor_key
from models import make_model

from eepo_fast.algorithm.forget import compute_unlearning
from eepo_fast.config import EepoConfig, OptimizerConfig
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.types import Problem, Prompt, Rollout, Segment, WeightsVersion

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def machine(small: bool) -> list[dict]:
    found: dict[str, str | float] = {}
    of_modules = importlib.metadata.packages_distributions()
    for module in ("triton", "transformers", "vllm", "deepspeed", "liger_kernel", "flash_attn"):
        names = of_modules.get(module, [])
        found[module] = f"{names[0]} {importlib.metadata.version(names[0])}" if names else "not installed"
    if GPU:
        free, total = torch.cuda.mem_get_info()
        found |= {"free_gib": free / 2**30, "total_gib": total / 2**30}
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return [{"task": "machine", **found}]


def weight_update(small: bool) -> list[dict]:
    """Measures sync and forget of bf16 weights from fp32, the kernel alone and the embedded engine's whole step,
    against a copy of as many bytes (2 + 2 + 4 a weight)."""
    model = make_model("demo" if small else "qwen2.5-3b")
    masters = {name: p.detach() for name, p in model.named_parameters()}
    engine = HfEngine(model, dtype=torch.bfloat16, max_sequences=1, pad_id=0, device=DEVICE)
    engine.sync([masters], WeightsVersion(0, False))
    gradient = {name: torch.randn_like(p) * 1e-4 for name, p in masters.items()}
    held = [p.data for p in engine.weights.values()]
    sources = [gradient[name] for name in engine.weights]
    keys, zeros = [tensor_key(name) for name in engine.weights], [0] * len(held)
    count = sum(w.numel() for w in held)
    source = torch.randn(count, device=DEVICE)  # a copy of it moves 8 bytes a weight
    target = torch.empty_like(source)

    def kernel(rounding: str):
        layout = dict(keys=keys, offsets=zeros, backend="native" if GPU else "auto")  # PyTorch's time is no kernel's
        return lambda: forget(held, sources, eta=3e-3, rounding=rounding, **layout)

    seconds = interleaved(
        {
            "copy": lambda: target.copy_(source),
            "sync": lambda: sync(held, [masters[name] for name in engine.weights]),
            "nearest": kernel("nearest"),
            "stochastic": kernel("stochastic"),
        },
        5,
    )
    whole = []
    for step in range(4):  # as the trainer counts time/forget_s; the first warms up
        engine.sync([masters], WeightsVersion(step, False))
        synchronize()
        started = time.perf_counter()
        engine.forget(gradient, eta=3e-3, rounding="stochastic", seed=0, step=step)
        synchronize()
        whole.append(time.perf_counter() - started)
    return [
        {
            "task": "weight update",
            "weights": count,
            "sync_ms": 1e3 * seconds["sync"],
            "forget_kernel_ms": 1e3 * seconds["stochastic"],
            "forget_ms": 1e3 * sorted(whole[1:])[1],
            "nearest_over_copy": seconds["nearest"] / seconds["copy"],
            "stochastic_over_copy": seconds["stochastic"] / seconds["copy"],
            "copy_gb_per_s": 8 * count / seconds["copy"] / 1e9,
            **host_ms(),
        }
    ]


def host_ms(count: int = 434) -> dict[str, float]:
    """Returns milliseconds of the host for a forget step, and for checksums, of as many tensors as a model of 3B has,
    with next to nothing in them."""
    weights = [torch.zeros(16, dtype=torch.bfloat16, device=DEVICE) for _ in range(count)]
    gradients = [torch.zeros(16, device=DEVICE) for _ in range(count)]
    layout = dict(keys=[tensor_key(f"layers.{i}") for i in range(count)], offsets=[0] * count)
    calls = {
        "forget_host_ms": lambda: forget(weights, gradients, eta=3e-3, rounding="stochastic", **layout),
        "checksums_host_ms": lambda: checksums(weights),
    }
    return {name: 1e3 * seconds for name, seconds in interleaved(calls, 20).items()}


def memory(small: bool) -> list[dict]:
    """Measures peaks over their estimates, packed, in bf16 under autocast: an unlearning pass of one micro-batch, with
    ∇L; a later micro-batch of an update, whose gradients are there; and the first step, which makes the moments."""
    rows = []
    tokens = 256 if small else 8192
    for checkpointing in (False, True):
        model = make_model("demo" if small else "qwen2.5-0.5b")
        policy = TorchPolicy(
            model,
            compute_dtype=torch.bfloat16,
            temperature=1.0,
            micro_batch_tokens=tokens,
            pad_id=0,
            packed=True,
            optimizer=OptimizerConfig(),
            gradient_checkpointing=checkpointing,
        )
        length = 64 if small else 1024
        rollouts = [
            Rollout(
                Prompt(Problem(f"p{i}", "", ""), "", [5] * 16), 1, i,
                [Segment([6] * (length - 16), [0.0] * (length - 16), WeightsVersion(0, False))], True,
            )
            for i in range(tokens // length)
        ]  # fmt: skip
        for phase, found, estimate in peaks(policy, rollouts):
            rows.append(
                {
                    "task": "memory",
                    "phase": phase,
                    "checkpointing": checkpointing,
                    "tokens": tokens,
                    "measured_gib": found / 2**30,
                    "estimated_gib": estimate / 2**30,
                    "measured_over_estimate": found / estimate,
                }
            )
    return rows


def peaks(policy: TorchPolicy, rollouts: list[Rollout]) -> Iterator[tuple[str, int, float]]:
    """Returns (phase, bytes at its peak beyond what was there before, the estimate of them)."""
    config, weights = EepoConfig(gate="always"), sum(p.nbytes for p in policy.model.parameters())

    def backward(some: list[Rollout]) -> None:
        for batch in policy.micro_batches(some):
            policy.backward(batch, lambda stats, rows: -stats.logprobs / len(rollouts))

    compute_unlearning(policy, rollouts[:1], config, [])  # warms up
    one_pass = policy.pass_bytes(gradient=True)
    yield "unlearning", peak_bytes(lambda: compute_unlearning(policy, rollouts, config, [])), one_pass + weights
    backward(rollouts[:1])
    yield "update", peak_bytes(lambda: backward(rollouts)), one_pass
    yield "optimizer's step", peak_bytes(policy.step), 2 * weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["machine", "weight_update", "memory"])
    parser.add_argument("--small", action="store_true", help="for a CPU")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    record({"machine": machine, "weight_update": weight_update, "memory": memory}[args.task](args.small), args.out)


if __name__ == "__main__":
    main()

"""The scenes: what a run does on a GPU, played at true sizes. Each returns what was found, as JSON."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import SimpleNamespace

import torch
from eepo_kernels import fused_linear_loss
from faults import replaced
from footprints import memory
from stage import StubEngine, StubGrader, StubTokenizer, make_model, make_rollouts, playing, read_config
from tracing import GIB, Trace

from eepo_fast.algorithm.forget import GradientPass
from eepo_fast.algorithm.losses import PolicyTokens, policy_loss, token_weights
from eepo_fast.algorithm.trainer import Trainer
from eepo_fast.config import EepoConfig, GrpoConfig, OptimizerConfig
from eepo_fast.distributed import World
from eepo_fast.policy.plain import MOMENTS, TorchPolicy
from eepo_fast.run import build
from eepo_fast.types import Problem, Prompt, WeightsVersion

MODEL = "qwen2.5-3b"
LENGTH = 4096  # tokens of a sequence; four fill a micro-batch


def make_policy(config, model, **settings) -> TorchPolicy:
    defaults = dict(
        compute_dtype=torch.bfloat16,
        temperature=1.0,
        micro_batch_tokens=4 * LENGTH,
        pad_id=0,
        packed=True,
        optimizer=OptimizerConfig(),
        gradient_checkpointing=True,
    )
    return TorchPolicy(model, **{**defaults, **settings})


def found_in(trace: Trace) -> dict:
    attention = {"varlen": 0, "sdpa": 0}
    for name, count in trace.calls.items():
        attention["varlen"] += count if name == "torch_attn._varlen_attn.default" else 0
        attention["sdpa"] += count if "scaled_dot_product" in name and "backward" not in name else 0
    return {
        "gib": {n: {"start": p.start / GIB, "peak": p.peak / GIB, "end": p.end / GIB} for n, p in trace.phases.items()},
        "waits": dict(trace.waits),
        "attention": attention,
        "programs": {name: len(found.programs) for name, found in trace.launches.items()},
        "launches": {name: sum(found.programs.values()) for name, found in trace.launches.items()},
        "updates": {str(operation): count for operation, count in trace.updates.items()},
        "host_gib": trace.host_peak / GIB,
        "misaligned": {name: found.misaligned for name, found in trace.launches.items()},
        "kernel_dtypes": {
            name: sorted({part[0] for key in found.programs for part in key if part[0].startswith("torch.")})
            for name, found in trace.launches.items()
        },
    }


def head(num_tokens: int = 4 * LENGTH) -> dict:
    """The fused head alone, under autocast, with an odd number of rows that have a gradient."""
    hidden_size, words = 2048, 151_936
    with playing(active=0.37) as trace:
        hidden = torch.empty(num_tokens, hidden_size, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = torch.empty(words, hidden_size, device="cuda", requires_grad=True)
        targets = torch.empty(num_tokens, dtype=torch.int64, device="cuda")
        with trace.phase("loss"), torch.autocast("cuda", torch.bfloat16):
            loss, _ = fused_linear_loss(hidden, weight, targets, lambda stats, rows: -stats.logprobs)
        with trace.phase("backward"):
            loss.backward()
        assert weight.grad.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
        return found_in(trace)


def policy(layers: int | None = None, checkpointing: bool = True, batches: int = 1) -> dict:
    """The update: micro-batches' backward passes and the optimizer's step; then a scoring pass."""
    config = read_config(MODEL)
    with playing() as trace:
        made = make_policy(config, make_model(config, MODEL, layers), gradient_checkpointing=checkpointing)
        trace.waits.clear()  # of the checks at the start
        rollouts = make_rollouts(4 * batches, LENGTH)
        for k, micro in enumerate(made.micro_batches(rollouts)):
            with trace.phase(f"batch {k}"):
                tokens = PolicyTokens.of(
                    micro, token_weights(micro, rollouts, 1e-3), WeightsVersion(0, False), with_reference=False
                )
                made.backward(micro, policy_loss(GrpoConfig(kl_coef=0.0), tokens))
        with trace.phase("step"):
            made.step()
        with trace.phase("score"):
            made.score(rollouts[:4])
        found = found_in(trace) | {"moments_on": moments_on(made)}
        weights = {name: p.detach().cpu() for name, p in made.model.named_parameters()}
        saved = {
            f"{key}.{name}": made.optimizer.state[p][key].cpu()
            for name, p in made.model.named_parameters()
            for key in MOMENTS
        }
        made.load_state(weights, saved, 1)  # a resumed run's, from the files of a checkpoint
        return found | {"moments_on, resumed": moments_on(made)}


def moments_on(policy: TorchPolicy) -> list[str]:
    return sorted({t.device.type for state in policy.optimizer.state.values() for t in state.values()})


def unlearning(layers: int | None = None, batches: int = 2) -> dict:
    """∇L over micro-batches, beside the policy's weights and moments."""
    config = read_config(MODEL)
    with playing() as trace:
        made = make_policy(config, make_model(config, MODEL, layers))
        trace.waits.clear()
        rollouts = make_rollouts(4 * batches, LENGTH)
        whole = GradientPass(made, EepoConfig(), len(rollouts), 2)
        for k in range(batches):
            with trace.phase(f"batch {k}"):
                whole.add(rollouts[4 * k : 4 * k + 4])
        with trace.phase("result"):
            found = whole.result(rollouts)
        assert len(found.gradient.tensors) == len(made.shapes)
        assert all(p.grad is None for p in made.model.parameters())
        return found_in(trace) | {"gradient_gib": sum(g.nbytes for g in found.gradient.tensors.values()) / GIB}


def trainer(layers: int = 2) -> dict:
    """A whole iteration with a reference: sync, two stages, unlearning, the forget step, scores, update."""
    overrides = ["rollout.max_new_tokens=512", "train.engine=torch", "train.micro_batch_tokens=8192"]
    overrides += ["train.prompts_per_iteration=4", "train.prompts_per_update=2", "rollout.group_size=8"]
    config = read_config(MODEL, *overrides, "eepo.alpha=9.0")
    with playing() as trace:
        model = make_model(config, MODEL, layers)
        shared = dict(micro_batch_tokens=config.train.micro_batch_tokens)
        made = make_policy(config, model, **shared)
        frozen = make_model(config, MODEL, layers).requires_grad_(False)
        reference = make_policy(config, frozen, **shared, optimizer=None, gradient_checkpointing=False)
        prompts = [Prompt(Problem(f"p{i}", "", "1"), "", [5] * 256) for i in range(4)]
        played = Trainer(
            config, policy=made, reference=reference, engine=StubEngine(model), grader=StubGrader(),
            prompts=prompts, tokenizer=StubTokenizer(), stop_token_ids=[1],
        )  # fmt: skip
        trace.waits.clear()
        with trace.phase("iteration"):
            _, row = played.iteration()
        return found_in(trace) | {"row": {k: v for k, v in row.items() if k.startswith(("unlearn/", "tokens/"))}}


def start(layers: int = 4) -> dict:
    """Policy and reference of one device, from a model on the host; more of the host than that model."""
    config = read_config(MODEL, "train.engine=torch", "train.liger=false")
    with playing() as trace:
        model = make_model(config, MODEL, layers, device="cpu")
        trace.host_peak = before = trace.alive["cpu"]
        made, reference = build.make_policies(config, model, StubTokenizer(), World())
        where = {p.device.type for m in (made.model, reference.model) for p in (*m.parameters(), *m.buffers())}
        return {
            "host_gib": (trace.host_peak - before) / GIB,
            "model_gib": before / GIB,
            "devices": sorted(where),
            "reference_requires_grad": any(p.requires_grad for p in reference.model.parameters()),
        }


class FirstTiming(Exception):
    """A bench has come to what it measures."""


def bench_iteration() -> dict:
    """Models, trainers, and an iteration of each under the counter of FLOPs."""
    import bench_iteration as bench
    import models

    models.SHAPES["rehearsed"] = (2048, 11008, 2, 16, 2, 151_936, True)
    arguments = ["bench", "--model", "rehearsed", "--prompts", "2", "--group-size", "4"]
    counted = {}

    def flops(trainer, count=bench.flops) -> float:
        name = "eepo" if trainer.config.eepo.enabled else "grpo"
        counted[name] = count(trainer)
        return counted[name]

    def timed(*_):
        raise FirstTiming

    changes = {(sys, "argv"): arguments, (bench, "flops"): flops, (bench.Rounds, "ours"): timed}
    changes[bench, "make_engine"] = lambda rollout, model, *_: StubEngine(model)
    with playing() as trace, ExitStack() as changed:
        for (owner, name), value in changes.items():
            changed.enter_context(replaced(owner, name, value))
        try:
            bench.main()
        except FirstTiming:
            return found_in(trace) | {"flops": counted}
    raise AssertionError("it measures nothing")


def bench_weight_update() -> dict:
    """The variants of `speed`, each once to warm up and once timed, over a plan like the engine's."""
    import bench_weight_update as bench

    with playing() as trace:
        config = read_config(MODEL)
        model = make_model(config, MODEL, 2)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        views = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights.values()]
        zeros = [0] * len(views)
        plan = SimpleNamespace(
            views=views, sources=lambda named: list(named.values()), keys=zeros, offsets=zeros,
            row_strides=[w.shape[-1] for w in weights.values()],
        )  # fmt: skip
        held = dict(zip(weights, views, strict=True))
        loader = SimpleNamespace(load_weights=lambda pairs: [held[name].copy_(w) for name, w in pairs])
        llm = SimpleNamespace(collective_rpc=lambda *_, **__: None)
        engine = SimpleNamespace(_updater=SimpleNamespace(plan=plan), _model=loader, llm=llm)
        gradient = {name: torch.empty_like(w) for name, w in weights.items()}
        before = trace.host_peak
        bench.speed(model, engine, gradient, 1)
        return found_in(trace) | {"host_gib": (trace.host_peak - before) / GIB}


SCENES = {
    f.__name__: f for f in (head, policy, unlearning, trainer, start, memory, bench_iteration, bench_weight_update)
}

"""Scenes of memory: what an iteration holds on the device, phase by phase, with the policy that a run would make."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import ExitStack, nullcontext

import torch
import torch.distributed as dist
from device import MEMORY
from faults import replaced
from stage import StubTokenizer, make_model, make_rollouts, playing, read_config
from torch.testing._internal.distributed.fake_pg import FakeStore
from tracing import GIB, Phase, Trace

from eepo_fast.algorithm import forget
from eepo_fast.algorithm.forget import GradientPass
from eepo_fast.algorithm.losses import PolicyTokens, policy_loss, token_weights
from eepo_fast.algorithm.overlap import Background, StreamedUnlearning
from eepo_fast.config import Config, EepoConfig, GrpoConfig
from eepo_fast.distributed import World
from eepo_fast.policy import plain, zero
from eepo_fast.run import build
from eepo_fast.types import WeightsVersion

LENGTH = 4096  # tokens of a sequence; four fill a micro-batch
SHORT = 600  # of the micro-batch before: it makes what the one that is looked at adds to


class Ranks(World):
    """One of several, whose collectives move nothing: what they write is there, and no number is."""

    def gather(self, value) -> list:
        return [value] * self.size

    def total(self, values) -> list[float]:
        return list(values)


def memory(model: str, engine: str, checkpointing: list[bool], layers: int = 2, **more) -> dict:
    """By checkpointing: `weights`, how many there are, and of each phase of an iteration that is not the first GiB at
    its start, kept by the second layer, kept between the two passes, and at its peak. more: `overrides` of the config,
    `explain`, and what `_play_alone` or `_play_rank` takes."""
    overrides, explain = more.pop("overrides", []), more.pop("explain", False)
    found, play = {}, _play_rank if engine == "deepspeed" else _play_alone
    for again in checkpointing:
        settings = [f"train.engine={engine}", "train.liger=false", f"train.gradient_checkpointing={again}"]
        config = read_config(model, *settings, *overrides)
        with ExitStack() as changed, playing() as trace:
            trace.explained = Counter() if explain else None
            for module in (plain, zero, forget):
                changed.enter_context(replaced(module, "named", _noting(trace)))
            made = make_model(config, model, layers)
            facts = {"weights": sum(p.numel() for p in made.parameters())}
            facts |= play(trace, config, made, **more)
            phases = {name: _in_gib(phase) for name, phase in trace.phases.items()}
        found[str(again)] = facts | phases
        gc.collect()  # DeepSpeed's parts hold one another
    return found


def _in_gib(phase: Phase) -> dict:
    found = {name: getattr(phase, name) / GIB for name in ("start", "layer", "kept", "peak")}
    held = phase.explained.most_common(25)
    return found | ({"at the peak": {where: size / GIB for where, size in held}} if held else {})


def _noting(trace: Trace):
    """In the place of a range on a profiler's timeline."""

    def named(what: str):
        if what == "micro-batch backward" and trace.running:
            trace.running[-1].kept = trace.alive["cuda"]
        return nullcontext()

    return named


def _watch_layers(trace: Trace, policy) -> None:
    """Notes what the second layer keeps in a forward pass: as much as every other but the first."""
    ends: list[int] = []

    def ended(layer, *_) -> None:
        if trace.running and not trace.running[-1].kept and torch.is_grad_enabled():
            ends.append(trace.alive["cuda"])
            if len(ends) == 2:
                trace.running[-1].layer = ends[1] - ends[0]
                ends.clear()

    for layer in policy.model.base_model.layers[:2]:
        layer.register_forward_hook(ended)


def _backward(policy, rollouts) -> None:
    (micro,) = policy.micro_batches(rollouts)
    tokens = PolicyTokens.of(
        micro, token_weights(micro, rollouts, 1e-3), WeightsVersion(0, False), with_reference=False
    )
    policy.backward(micro, policy_loss(GrpoConfig(kl_coef=0.0), tokens))


def _play_alone(trace: Trace, config: Config, model, *, engine_gib: float, streamed: bool) -> dict:
    """The step, a later micro-batch of an update, a later one of unlearning beside an engine that samples or after it,
    and the second stage, which ∇L is kept for. model: on the device. engine_gib: what the engine holds while it is
    awake."""
    policy, reference = build.make_policies(config, model, StubTokenizer(), World())
    _watch_layers(trace, policy)

    def make_gradients() -> None:
        for parameter in policy.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    make_gradients()
    with trace.phase("optimizer's step"):
        policy.step()
    make_gradients()
    with trace.phase("update"):
        _backward(policy, make_rollouts(4, LENGTH))
    policy.optimizer.zero_grad()
    rollouts, facts = [*make_rollouts(2, SHORT), *make_rollouts(4, LENGTH)], {}
    sampling = torch.empty(int(streamed * engine_gib * GIB), dtype=torch.uint8, device="cuda")
    if streamed:
        beside = StreamedUnlearning(policy, EepoConfig(), len(rollouts), 2, Background("unlearn", threaded=True))
        whole, add = beside.whole, beside._work
    else:
        whole = GradientPass(policy, EepoConfig(), len(rollouts), 2)
        add = whole.add
    with replaced(torch.cuda, "mem_get_info", lambda *_: (MEMORY - trace.alive["cuda"], MEMORY)):
        add(rollouts[:2])
        with trace.phase("unlearning pass"):
            add(rollouts[2:])
    if streamed:
        facts["put off"] = beside.put_off
    del sampling
    with trace.phase("rollout"):
        sampling = torch.empty(int(engine_gib * GIB), dtype=torch.uint8, device="cuda")
    assert sampling.is_cuda
    assert reference is not None and len(whole.gradient.tensors) in (0, len(policy.shapes))
    return facts


def _play_rank(trace: Trace, config: Config, model, *, ranks: int) -> dict:
    """The first of `ranks`: a later micro-batch of an update, its step, a micro-batch of the unlearning pass, and the
    second stage without the engine."""
    from deepspeed.runtime import utils
    from deepspeed.runtime.zero import stage_1_and_2

    join = dist.init_process_group
    # the policy asks for a group of its own; it gets one of `ranks`, of whom none is there
    fake = dict(store=FakeStore(), rank=0, world_size=ranks)
    with replaced(dist, "init_process_group", lambda *_, **__: join("fake", **fake)):
        policy, reference = build.make_policies(config, model, StubTokenizer(), Ranks(0, ranks))
    _watch_layers(trace, policy)
    policy._make_moments(1.0)
    _backward(policy, make_rollouts(ranks, SHORT))
    rollouts = make_rollouts(4 * ranks, LENGTH)
    with trace.phase("update"):
        _backward(policy, rollouts)
    with ExitStack() as changed, trace.phase("optimizer's step"):
        for module in (utils, stage_1_and_2):  # a norm is a number, of which there are none
            changed.enter_context(replaced(module, "is_invalid_grad_norm", lambda _: False))
        policy.step()
    whole = GradientPass(policy, EepoConfig(), len(rollouts), 1)
    with trace.phase("unlearning pass"):
        whole.add(rollouts)
    with trace.phase("rollout"):
        assert reference is not None and whole.gradient.flats
    return {"fused": policy.base_optimizer.defaults["fused"]}

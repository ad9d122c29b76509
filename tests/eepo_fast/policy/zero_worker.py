"""One of two gloo ranks that train with DeepSpeed; run by test_zero.py under torchrun."""

import copy
import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from eepo_fast.algorithm.forget import compute_unlearning
from eepo_fast.algorithm.losses import PolicyTokens, policy_loss
from eepo_fast.algorithm.overlap import Background, StreamedUnlearning
from eepo_fast.algorithm.ratio import set_old_logprobs
from eepo_fast.config import make_config
from eepo_fast.distributed import start_world
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.policy.shards import all_gather
from eepo_fast.policy.zero import ZeroPolicy
from eepo_fast.rollout.engine import Sampling, make_requests
from eepo_fast.rollout.exchange import generate_everywhere
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.types import Problem, Prompt, Rollout, Segment, WeightsVersion

COMMON = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip


def make_model(family):
    torch.manual_seed(0)
    if family == "tied":
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **COMMON))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=False, **COMMON))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(6)
    return model.eval()


def make_rollouts(num, stage, seed):
    g = torch.Generator().manual_seed(seed)
    rollouts = []
    for i in range(num):
        prompt = Prompt(Problem(f"p{i // 2}", "", "1"), "", torch.randint(2, 61, (3 + i % 4,), generator=g).tolist())
        n = int(torch.randint(1, 24, (1,), generator=g))
        ids = torch.randint(2, 61, (n,), generator=g).tolist()
        logprobs = (-4 - torch.rand(n, generator=g)).tolist()
        version = WeightsVersion(0, stage == 2)
        rollouts.append(Rollout(prompt, stage, i, [Segment(ids, logprobs, version)], True, reward=float(i % 2)))
        rollouts[-1].advantage = 1.0 if i % 2 else -1.0
    return rollouts


def flat(tensors):
    return torch.cat([t.detach().float().flatten() for t in tensors]).double()


def whole_gradient(gradient):
    if isinstance(gradient.__dict__.get("tensors"), dict):
        return flat(gradient.tensors.values())
    parts = {}
    for bucket, values in zip(gradient.buckets, gradient.flats, strict=True):
        parts.update(all_gather(bucket, values, gradient.world))
    return flat(parts.values())


def update(policy, config, rollouts, loss="ppo"):
    """Two GRPO steps on the same rollouts; the losses."""
    losses, grpo = [], config.grpo.model_copy(update={"loss": loss})
    counted = sum(r.num_tokens for r in rollouts)
    for r, logprobs in zip(rollouts, policy.score(rollouts).logprobs, strict=True):
        r.prox_logprobs = logprobs
    set_old_logprobs(rollouts, config.grpo, WeightsVersion(0, False))
    for _ in range(2):
        total = 0.0
        for micro in policy.micro_batches(rollouts):
            weights = micro.per_token([1 / counted for r in micro.rollouts])
            tokens = PolicyTokens.of(micro, weights, WeightsVersion(0, False), with_reference=False)
            total += float(policy.backward(micro, policy_loss(grpo, tokens))[0])
        norm, applied = policy.step()
        losses += [policy.world.total([total])[0], norm, float(applied)]
    return losses


def run(policy, engine, config, start):
    """Everything that must not depend on the ranks: as one dict of vectors and numbers."""
    rollouts = make_rollouts(10, 1, 5)
    found = compute_unlearning(policy, rollouts, config.eepo, [])
    engine.sync(policy.weights(), WeightsVersion(0, False))
    held = flat(engine.weights.values())
    result = {
        "gradient": whole_gradient(found.gradient),
        "numbers": torch.tensor([found.loss, found.grad_norm, found.active_fraction, found.mean_entropy]).double(),
        "logprobs": torch.tensor([v for r in rollouts for v in r.prox_logprobs]).double(),
    }
    again = [streamed(policy, config, takes, rollouts) for takes in ({0, 1}, {1}, set())]
    for key, values in zip(("gradient", "numbers", "columns"), zip(*again, strict=True), strict=True):
        result[f"streamed {key}"] = torch.cat(values)
    stats = policy.forget(engine, found.gradient, config.eepo, seed=3, step=4)
    result["forgotten"] = flat(engine.weights.values()) - held
    result["stats"] = torch.tensor([stats.retention, stats.intended_norm]).double()
    mixed = rollouts + make_rollouts(6, 2, 6)
    result["losses"] = torch.tensor(update(policy, config, mixed)).double()
    result["losses of sequences"] = torch.tensor(update(policy, config, mixed, "gspo")).double()
    after = flat(value for _, value in policy.masters())
    result["updated"] = after - start
    result["poisoned"] = poison(policy, rollouts)
    result["alone"] = torch.tensor(update(policy, config, rollouts[:1])).double()  # ranks without a token
    result["after one"] = flat(value for _, value in policy.masters()) - after
    return result


def streamed(policy, config, takes, rollouts):
    """What unlearning finds that has begun on the ranks `takes`, on a thread, with completions of their own; more had
    been expected. The others have given up. Where no rank has the weights, all is done after the stage."""
    for r in rollouts:
        r.prox_logprobs = r.entropy = r.gate = None
    begun, rank, size = None, policy.world.rank, policy.world.size
    if policy.stream_tokens is not None:
        stream = StreamedUnlearning(policy, config.eepo, len(rollouts) + 3, 7, Background("unlearn", threaded=True))
        stream.queue.most = 20
        for r in rollouts[rank::size]:
            stream.take(r)
        stream.background.wait()
        assert len(stream.whole.done) > 1, "most of it is done before the stage ends"
        if rank not in takes and size > 1:
            stream.drop()
        begun = stream.hand_over()
    found = compute_unlearning(policy, rollouts, config.eepo, [], begun=begun)
    numbers = [found.loss, found.grad_norm, found.active_fraction, found.mean_entropy]
    columns = [v for r in rollouts for v in [*r.prox_logprobs, *r.entropy, *r.gate]]
    return whole_gradient(found.gradient), torch.tensor(numbers).double(), torch.tensor(columns).double()


def exchanged(world):
    """Tokens and log-probs of all completions, of which this rank's own are those that its engine handed over."""
    engine, handed = HfEngine(make_model("tied"), dtype=torch.float32, max_sequences=8, pad_id=0), []
    prompts = [Prompt(Problem(f"p{i}", "", "1"), "", [3 + i, 9, 5]) for i in range(5)]
    engine.weights_version = WeightsVersion(0, False)
    rollouts = generate_everywhere(
        engine, make_requests(prompts, 1, range(3), 0, 0), Sampling(1.0, 12, (1, 7)), expected_tokens=[1.0] * 5,
        world=world, ranks_per_engine=1, decode=lambda r: str(r.token_ids), finished=handed.append,
    )  # fmt: skip
    assert 3 <= len(handed) < len(rollouts) == 15 and set(handed) <= set(rollouts)
    return [[r.prompt.id, r.sample_index, r.token_ids, r.rollout_logprobs, r.completion] for r in rollouts]


def poison(policy, rollouts):
    """Updates applied, and weights moved, by a gradient that is NaN on the last rank."""
    before = flat(value for _, value in policy.masters())
    factor = float("nan") if policy.world.rank == policy.world.size - 1 else 1.0
    for micro in policy.micro_batches(rollouts):
        policy.backward(micro, lambda stats, rows: stats.logprobs * factor)
    _, applied = policy.step()
    moved = (flat(value for _, value in policy.masters()) - before).norm()
    return torch.tensor([float(applied), float(moved)]).double()


def state_of(thing, seen=None, path=""):
    """Every tensor and number within reach of DeepSpeed's engine and optimizer, with its place."""
    seen = set() if seen is None else seen
    if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
        yield path, thing.detach().clone()
        for name in ("grad", "grad_accum", "ds_tensor"):
            if getattr(thing, name, None) is not None:
                yield f"{path}.{name}", getattr(thing, name).detach().clone()
    elif isinstance(thing, int | float | bool):
        yield path, torch.tensor(thing)
    elif id(thing) not in seen and isinstance(thing, dict | list | tuple):
        seen.add(id(thing))
        for key, value in thing.items() if isinstance(thing, dict) else enumerate(thing):
            yield from state_of(value, seen, f"{path}[{key if isinstance(key, str | int) else ''}]")


def snapshot(policy):
    engine = policy.deepspeed
    parts = {"engine": {k: v for k, v in vars(engine).items() if "timer" not in k and k != "losses"}}
    parts["zero"] = dict(vars(engine.optimizer))
    parts["adam"] = list(policy.base_optimizer.state.values()) + policy.base_optimizer.param_groups
    parts["weights"] = list(policy.module.parameters())
    return {path: value for name, part in parts.items() for path, value in state_of(part, None, name)}


def touched(policy, config):
    """What of DeepSpeed's state an unlearning pass and a forget step change, with a gradient waiting to be applied."""
    rollouts = make_rollouts(6, 1, 9)
    counted = sum(r.num_tokens for r in rollouts)
    (micro, *_) = policy.micro_batches(rollouts)
    policy.backward(micro, lambda stats, rows: -stats.logprobs / counted)
    before = snapshot(policy)
    found = compute_unlearning(policy, rollouts, config.eepo, [])
    streamed(policy, config, {0, 1}, rollouts)
    sums = torch.zeros(4, dtype=torch.float64)
    options = dict(seed=0, step=0)
    for _ in policy.forgetful_buckets(found.gradient, config.eepo, sums, **options):
        pass
    after = snapshot(policy)
    policy.backward(micro, lambda stats, rows: -stats.logprobs / counted)  # the control: this must be seen
    assert len(before) > 100 and differences(before, snapshot(policy))
    return differences(before, after)


def differences(before, after):
    changed = [k for k in before if k not in after or not torch.equal(before[k], after[k])]
    return sorted(changed) + sorted(after.keys() - before.keys())


def compare(found, expected):
    """Distance of each vector, relative to the expected one's own norm."""
    return {k: float((found[k] - v).norm() / v.norm().clamp_min(1e-30)) for k, v in expected.items()}


def main(world):
    report = {}
    first, *others = world.gather(exchanged(world))
    assert all(other == first for other in others)
    for family, dtype, stage, packing, tokens, checkpointing, *offload in json.loads(sys.argv[1]):
        config = make_config({
            "model": {"path": "unused"}, "data": {"train": "arithmetic"},
            "grpo": {"kl_coef": 0.0, "entropy_coef": 1e-3, "ratio": ("sampler", "decoupled", "policy")[stage % 3]},
            # steps that bf16 weights can follow closely; and an Adam whose step is not the gradient's sign
            "eepo": {"alpha": 9.0, "learning_rate": 0.05 if dtype == "float32" else 5.0},
            "optimizer": {"learning_rate": 1e-2, "eps": 1e-8 if dtype == "float32" else 1e-1},
            "train": {
                "engine": "deepspeed", "zero_stage": stage, "packing": packing, "micro_batch_tokens": tokens,
                "gradient_checkpointing": checkpointing, "offload_optimizer": bool(offload),
            },
        })  # fmt: skip
        model, compute = make_model(family), getattr(torch, dtype)
        engine_dtype = compute
        engine = HfEngine(model, dtype=engine_dtype, max_sequences=8, pad_id=0)
        start = flat(model.parameters())
        plain = TorchPolicy(
            copy.deepcopy(model), compute_dtype=compute, temperature=0.8, micro_batch_tokens=999, pad_id=0,
            optimizer=config.optimizer,
        )  # fmt: skip
        expected = run(plain, HfEngine(model, dtype=engine_dtype, max_sequences=8, pad_id=0), config, start)
        policy = ZeroPolicy(
            model, world=world, train=config.train, compute_dtype=compute, engine_dtype=engine_dtype, temperature=0.8,
            pad_id=0, optimizer=config.optimizer,
        )  # fmt: skip
        found = run(policy, engine, config, start)
        name = (
            f"{family} {dtype} stage {stage} packing {packing} tokens {tokens} checkpointing {checkpointing} {offload}"
        )
        report[name] = compare(found, expected)
        report[name]["poisoned"] = float(found["poisoned"].norm())
        skipped = compare({key: 0 * value for key, value in found.items()}, expected)
        report[name] |= {"skipped step": min(skipped["forgotten"], skipped["updated"])}
        report[name] |= {"retention": float(found["stats"][0])}
        report[name]["touched"] = touched(policy, config)
    say_found(world, report)


def say_found(world, report):
    """What the `launch` fixture reads: every rank's report, from the first."""
    everything = world.gather(report)
    if world.is_main:
        print("FOUND " + json.dumps(everything), flush=True)


if __name__ == "__main__":
    with start_world() as world:
        main(world)

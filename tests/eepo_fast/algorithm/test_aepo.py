"""AEPO's term and the released code's replacement, against plain references; the overlays of configs/methods."""

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from eepo_fast.algorithm import aepo
from eepo_fast.algorithm.ablations import find_ablation
from eepo_fast.algorithm.advantages import group_advantages
from eepo_fast.algorithm.forget import compute_unlearning
from eepo_fast.config import load_config
from eepo_fast.rewards.arithmetic import ArithmeticGrader
from eepo_fast.types import Grade, UserError

ROOT = Path(__file__).parents[3]
ONE_UPDATE = {"prompts_per_update": 4}


def logprobs(model, rollout):
    ids = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
    logits = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1].double()
    return torch.log_softmax(logits, -1)[range(rollout.num_tokens), rollout.token_ids]


def gradient(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()


@pytest.fixture
def applied(monkeypatch):
    """The gradient that each update applies, in the place of the optimizer's step."""
    seen = []

    def step(policy):
        seen.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]).double())
        policy.optimizer.zero_grad(set_to_none=True)
        return float(seen[-1].norm()), True

    monkeypatch.setattr("eepo_fast.policy.plain.TorchPolicy.step", step)
    return seen


def grpo_reference(model, rows):
    """-mean over tokens of A log π: GRPO's gradient at a ratio of 1."""
    tokens = sum(r.num_tokens for r in rows)
    return -sum(r.advantage * logprobs(model, r).sum() for r in rows) / tokens


def settings(**changes):
    return {"enabled": True, "target_entropy": 9.0, "num_samples": 30, "coef": 0.7, **changes}


def make(make_trainer, **sections):
    return make_trainer(eepo={"enabled": False}, **{"train": ONE_UPDATE, **sections})


def test_the_term_is_added_to_grpo(make_trainer, applied):
    trainer = make(make_trainer, aepo=settings())
    model = copy.deepcopy(trainer.policy.model)
    batch, row = trainer.iteration()
    extra = batch.extra
    assert len(extra) == 30 == row["aepo/num_samples"] and {r.stage for r in extra} == {3}
    right = [r for r in extra if r.reward == 1]
    assert 0 < len(right) < 30 and row["aepo/num_positive"] == len(right)
    tokens = sum(r.num_tokens for r in extra)

    def term():
        return -0.7 * sum(logprobs(model, r).sum() for r in right) / tokens

    expected = gradient(model, grpo_reference(model, batch.rollouts) + term())
    assert (applied[0] - expected).norm() < 1e-4 * expected.norm()
    alone = gradient(model, grpo_reference(model, batch.rollouts))
    assert (alone - expected).norm() > 1e-2 * expected.norm(), "the control: the term is seen"
    assert row["aepo/grad_norm"] == pytest.approx(float(gradient(model, term()).norm()), rel=1e-4)


def test_each_update_gets_its_share_of_the_samples(make_trainer, applied):
    trainer = make(make_trainer, aepo=settings(), train={"prompts_per_update": 2})
    model = copy.deepcopy(trainer.policy.model)
    batch, _ = trainer.iteration()
    assert len(applied) == 2
    for u in (0, 1):
        share = batch.extra[u::2]
        term = -0.7 * sum(r.reward * logprobs(model, r).sum() for r in share) / sum(r.num_tokens for r in share)
        expected = gradient(model, grpo_reference(model, batch.rollouts[8 * u : 8 * u + 8]) + term)
        assert (applied[u] - expected).norm() < 1e-4 * expected.norm()


def test_the_released_replacement(make_trainer, applied):
    trainer = make(make_trainer, aepo=settings(mode="replace", num_samples=3))
    model = copy.deepcopy(trainer.policy.model)
    batch, row = trainer.iteration()
    assert len(batch.extra) == 4, "a group for the first quarter of four prompts"
    kept = [r for r, a in zip(batch.extra, group_advantages([r.reward for r in batch.extra]), strict=True) if a > 0.05]
    kept = kept[:3]
    assert row["aepo/num_positive"] == len(kept)
    rows = kept + batch.rollouts[len(kept) :]
    assert all(r.advantage == 1.0 for r in kept) and len(rows) == 16
    expected = gradient(model, grpo_reference(model, rows))
    assert (applied[0] - expected).norm() < 1e-4 * expected.norm()


def test_half_as_many_replace_above_the_target(make_rollouts, test_config):
    # of 8 right answers: num_samples is the limit, there are fewer, or the batch has no room
    cases = ((0.5, 6, 32, 6), (0.51, 6, 32, 3), (0.5, 30, 32, 8), (0.51, 30, 32, 4), (0.51, 30, 5, 2))
    for entropy, num_samples, batch_size, limit in cases:
        rollouts = make_rollouts([3] * 16)
        for i, r in enumerate(rollouts):
            r.reward = float(i % 2)
        config = test_config(aepo=settings(mode="replace", num_samples=num_samples, target_entropy=0.5)).aepo
        extra = aepo.Aepo(config, entropy)
        extra.rollouts = rollouts
        extra.choose_samples(4, batch_size)
        assert [r.sample_index for r in extra.used] == list(range(1, 16, 2))[:limit]


@pytest.mark.parametrize("changes", [{}, {"mode": "replace"}, {"num_samples": 3}])
def test_the_plan_counts_the_extra_samples(prompts, test_config, changes):
    config = test_config(aepo=settings(**changes)).aepo
    requests = aepo.extra_requests(config, prompts, 4, 0, 0)
    assert sum(len(r.seeds) for r in requests) == config.num_extra(len(prompts), 4) > 0


def test_a_negative_reward_is_not_a_right_answer(make_rollouts, test_config):
    rollouts = make_rollouts([3] * 4)
    for r, reward in zip(rollouts, (-1.0, 0.0, 0.5, None), strict=True):
        r.reward = reward
    extra = aepo.Aepo(test_config(aepo=settings()).aepo, 0.5)
    extra.rollouts = rollouts
    extra.choose_samples(4, 4)
    assert extra.used == [rollouts[2]] and extra.num_positive == 1 and rollouts[2].advantage == 0.5


def test_no_right_sample_means_no_term(make_trainer, applied):
    changes = []
    for enabled in (True, False):
        trainer = make(make_trainer, aepo=settings() if enabled else {})
        grade = trainer.grader.grade

        def no_extra(problems, completions, *, seconds=None, grade=grade):
            found = grade(problems, completions)
            return found[:16] + [type(found[0])(0.0, "ok", 0.0)] * (len(found) - 16)

        trainer.grader.grade = no_extra
        _, row = trainer.iteration()
        if enabled:
            assert row["aepo/num_positive"] == 0 == row["aepo/grad_norm"]
    changes = applied
    assert torch.equal(changes[0], changes[1])


def test_hot_below_the_target_cold_above_and_from_the_policy(make_trainer):
    """Entropy is 0 before the first update, so that it starts hot; with EEPO the samples come from θ, not from θ'."""
    trainer = make_trainer(
        eepo={"enabled": True, "alpha": 9.0, "learning_rate": 0.05}, aepo=settings(target_entropy=1e-6)
    )
    first, row = trainer.iteration()
    assert row["aepo/temperature"] == 1.2 and row["aepo/entropy"] == 0
    assert {tuple(r.weights_version) for r in first.extra} == {(0, False)}
    assert any(r.weights_version.forgotten for r in first.stage(2))
    _, second = trainer.iteration()
    assert second["aepo/temperature"] == 0.8 and second["aepo/entropy"] == pytest.approx(row["entropy/policy"])


def test_samples_are_drawn_at_that_temperature(make_trainer):
    trainer = make(make_trainer, aepo=settings(temperature_high=1.2))
    model = copy.deepcopy(trainer.policy.model)
    batch, _ = trainer.iteration()
    for r in batch.extra[:4]:
        ids = torch.tensor([r.prompt.token_ids + r.token_ids])
        logits = model(ids).logits[0, len(r.prompt.token_ids) - 1 : -1].double() / 1.2
        expected = torch.log_softmax(logits, -1)[range(r.num_tokens), r.token_ids]
        assert r.rollout_logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollout.temperature=1.2"], "rollout.temperature: expected 1 with aepo.enabled.*; set rollout.temperature=1"),
        (["aepo.temperature_low=1.3"], "aepo.temperature_low: expected below"),
    ],
)
def test_settings_that_cannot_be(overrides, message):
    files = [str(ROOT / "configs" / name) for name in ("demo.yaml", "methods/aepo.yaml")]
    with pytest.raises(UserError, match=message):
        load_config(files, overrides)


# What each overlay changes of EEPO, and nothing else.
DIFFERENCES = {
    "eepo": {},
    "grpo": {"eepo.enabled": False},
    "high_temperature": {"eepo.enabled": False, "rollout.temperature": 1.2},
    "entropy_bonus": {"eepo.enabled": False, "grpo.entropy_coef": 1e-3},
    "clip_higher": {"eepo.enabled": False, "grpo.clip_high": 0.28},
    "more_rollouts": {"eepo.enabled": False, "rollout.group_size": 16},
    "aepo": {"eepo.enabled": False, "aepo.enabled": True},
    "eepo_aepo": {"aepo.enabled": True},
    "eepo_nll": {"eepo.loss": "nll"},
    "eepo_always": {"eepo.gate": "always"},
    "eepo_multistep": {"eepo.num_steps": 3},
    "eepo_iteration_gate": {"eepo.gate": "iteration"},
    "eepo_random": {"eepo.direction": "random"},
    "eepo_hotter": {"eepo.direction": "temperature", "eepo.learning_rate": 0.2},
    "dr_grpo": {
        "eepo.enabled": False, "grpo.advantage": "dr_grpo", "grpo.aggregation": "constant", "grpo.kl_coef": 0.0,
    },
    "rloo": {"eepo.enabled": False, "grpo.advantage": "rloo"},
    "dapo": {
        "eepo.enabled": False, "reward.overlong_share": 0.2, "reward.overlong_penalty": 0.5, "grpo.clip_high": 0.28,
        "grpo.kl_coef": 0.0, "grpo.dynamic_sampling": True,
    },
    "gspo": {
        "eepo.enabled": False, "grpo.loss": "gspo", "grpo.aggregation": "sequence", "grpo.clip_low": 3e-4,
        "grpo.clip_high": 4e-4, "grpo.kl_coef": 0.0,
    },
    "cispo": {
        "eepo.enabled": False, "grpo.loss": "cispo", "grpo.clip_low": 1.0, "grpo.clip_high": 4.0, "grpo.kl_coef": 0.0,
    },
    "pass_at_k": {
        "eepo.enabled": False, "grpo.advantage": "pass_at_k", "grpo.pass_k": 4, "grpo.clip_high": 0.28,
        "grpo.kl_coef": 0.0,
    },
    "nsr": {
        "eepo.enabled": False, "grpo.advantage": "nsr", "grpo.positive_weight": 0.1, "grpo.kl_coef": 0.0,
        "grpo.entropy_coef": 1e-4,
    },
    "unlikeliness": {
        "eepo.enabled": False, "grpo.advantage": "unlikeliness", "grpo.rank_penalty": 0.25, "grpo.kl_coef": 0.1,
    },
    "kl_cov": {
        "eepo.enabled": False, "grpo.loss": "kl_cov", "grpo.cov_share": 2e-3, "grpo.cov_coef": 1.0,
        "grpo.kl_coef": 0.0,
    },
    "psn": {
        "eepo.enabled": False, "psn.enabled": True, "psn.sigma": 4e-3, "grpo.ratio": "decoupled",
        "grpo.ratio_cap": 10.0, "grpo.aggregation": "sequence",
    },
}  # fmt: skip


def needs(overlay):
    """What else a config needs under it."""
    several = "Needs more updates than one" in overlay.read_text().replace("\n# ", " ")
    return ["train.prompts_per_iteration=8", "train.prompts_per_update=4"] if several else []


def flat(sections):
    return {f"{s}.{k}": json.dumps(v) for s, part in sections.items() for k, v in part.items()}


@pytest.mark.parametrize("base", ["configs/demo.yaml", "configs/qwen2.5-3b.yaml"])
def test_overlays_change_what_their_names_say(base):
    found = sorted(path.stem for path in (ROOT / "configs/methods").glob("*.yaml"))
    assert found == sorted(DIFFERENCES)
    base = str(ROOT / base)
    one_device = ["train.engine=torch"] if "qwen" in base else []
    eepo = load_config([base, str(ROOT / "configs/methods/eepo.yaml")], one_device)
    eepo = flat({name: section.model_dump() for name, section in eepo})  # also what EEPO alone does not read
    for name, expected in DIFFERENCES.items():
        overlay = ROOT / f"configs/methods/{name}.yaml"
        more = [*one_device, *needs(overlay)]
        mine = flat(load_config([base, str(overlay)], more).model_dump())
        changed = {key: json.loads(value) for key, value in mine.items() if value != eepo[key]}
        changed = {key: value for key, value in changed.items() if not any(m.startswith(key) for m in more)}
        assert changed.items() <= expected.items(), name
        assert all(json.loads(mine[key]) == value for key, value in expected.items()), name
        assert overlay.read_text().startswith("# "), "its head says what differs"
        if one_device:
            refused = "Needs train.engine=torch" in overlay.read_text()
            with pytest.raises(UserError, match=r"use train\.engine=torch") if refused else nullcontext():
                load_config([base, str(overlay)], [])


def test_a_random_direction_is_as_long_as_the_gradient(make_policy, make_rollouts, test_config):
    policy, rollouts = make_policy(), make_rollouts([5, 7, 3, 9])
    found = {}
    for direction, seed in (("gradient", (0, 0)), ("random", (0, 0)), ("random", (0, 0)), ("random", (0, 1))):
        eepo = test_config(eepo={"alpha": 9.0, "direction": direction}).eepo
        result = compute_unlearning(policy, rollouts, eepo, [], ablation=find_ablation(eepo, seed))
        found.setdefault((direction, seed), []).append(
            torch.cat([g.flatten() for g in result.gradient.tensors.values()])
        )
        norm = result.grad_norm
    (true,), (one, same), (other,) = found.values()
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert float(one.norm()) == pytest.approx(norm, rel=1e-4) == pytest.approx(float(true.norm()), rel=1e-4)
    assert abs(float(torch.nn.functional.cosine_similarity(one, true, dim=0))) < 4 / math.sqrt(len(one))


class RightGrader(ArithmeticGrader):
    """Everything is right, so that GRPO has no gradient and the term acts alone."""

    def grade(self, problems, completions, *, seconds=None):
        return [Grade(1.0, "ok", 0.0) for _ in completions]


def late_entropy(make_trainer, target, **changes):
    """Of the policy over the second half of 40 iterations, from where the last call has left the model."""
    values = settings(target_entropy=target, num_samples=24, coef=1.0, temperature_low=0.6, temperature_high=1.6)
    config = {"optimizer": {"learning_rate": 7e-4}, "aepo": {**values, **changes}}
    trainer = make(make_trainer, grader=RightGrader(), **config)
    found = [trainer.iteration()[1]["entropy/policy"] for _ in range(40)]
    return sum(found[20:]) / 20


@pytest.mark.slow
def test_entropy_follows_the_target(make_trainer):
    """Four targets on both sides of where the model is; without the term it stays there."""
    assert late_entropy(make_trainer, 0.9, coef=0.0) == pytest.approx(1.7, abs=0.2)
    targets = (1.3, 1.6, 1.9, 2.2)
    found = [late_entropy(make_trainer, target) for target in targets]
    assert found == sorted(found) and found == pytest.approx(targets, abs=0.2)

"""`eepo.step: kl`: η follows the KL that stage 2 shows; and what it does to the iteration."""

import math
import random

import pytest

from eepo_fast.algorithm.step_size import add_step, with_length
from eepo_fast.checkpoint import load_checkpoint
from eepo_fast.types import UserError

KL_STEP = {"alpha": 9.0, "learning_rate": 0.02, "step": "kl", "target_kl": 0.01}


HOTTER = {"direction": "temperature", "learning_rate": 0.02, "step": "kl", "target_kl": 0.01}


def rate(config, steps):
    return with_length(config, steps).learning_rate


def follow(test_config, kl_of, iterations, start=1e-3, target=0.05):
    """(η, KL) of each step on a model whose KL at η in iteration t is kl_of(t, η)."""
    config = test_config(eepo={"learning_rate": start, "step": "kl", "target_kl": target}).eepo
    steps, found = [], []
    for t in range(iterations):
        eta = rate(config, steps)
        found.append((eta, kl_of(t, eta)))
        steps = add_step(steps, *found[-1], taken=True, too_far=False)
    return found


def test_noise_is_not_answered_with_more(test_config):
    """What is measured is off by a third, as with some hundred tokens; a slope of 1 would answer with more of it."""
    rng, worst = random.Random(0), 0.0
    for _ in range(20):
        seen = follow(test_config, lambda t, eta: (eta / 0.03) ** 2 * math.exp(rng.gauss(0, 0.3)), 60)
        worst = max(worst, *((eta / 0.03) ** 2 for eta, _ in seen[10:]))
    assert worst < 4 * 0.05


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_it_finds_the_target_and_stays(test_config, power):
    found = follow(test_config, lambda t, eta: (eta / 0.03) ** power, 12)
    assert all(kl == pytest.approx(0.05, rel=0.02) for _, kl in found[8:])


def test_it_follows_a_gradient_that_grows(test_config):
    """As entropy falls, the same η goes ten thousand times as far by the end; a fixed one would leave the model."""
    grow = lambda t: 10 ** (4 * t / 40)  # noqa: E731
    found = follow(test_config, lambda t, eta: grow(t) * (eta / 0.01) ** 2, 40)
    assert all(0.02 < kl < 0.1 for _, kl in found[6:])
    assert grow(39) * (found[6][0] / 0.01) ** 2 > 30 * 0.05, "the control"


def test_its_changes_are_bounded(test_config):
    config = test_config(eepo={"learning_rate": 1e-3, "step": "kl", "target_kl": 0.05}).eepo
    assert rate(config, []) == 1e-3
    assert rate(config, [(1e-3, 1e-12)]) == pytest.approx(8e-3) == rate(config, [(1e-3, 0.0)])
    for before, now in ((-9.9e-9, 5e-9), (5e-9, -9.9e-9), (0.0, 1e-9), (1e-9, 0.0)):  # what rounding makes of nothing
        assert rate(config, [(1e-3, before), (4e-3, now)]) == pytest.approx(3.2e-2)
    assert rate(config, [(1e-3, 0.9e3)]) == pytest.approx(1e-3 / 8)
    assert rate(config, [(1e-3, None)]) == pytest.approx(5e-4)
    # a secant between two steps of nearly one length would be noise
    assert rate(config, [(1e-3, 0.04), (1.001e-3, 0.08)]) == pytest.approx(1.001e-3 * math.sqrt(0.05 / 0.08))
    assert rate(test_config(eepo={"learning_rate": 1e-3}).eepo, [(1e-3, 0.5)]) == 1e-3, "fixed"


def test_what_is_noted_of_a_step():
    one = [(1e-3, 0.1)]
    assert add_step(one, 2e-3, 0.2, taken=True, too_far=False) == [*one, (2e-3, 0.2)]
    assert add_step([*one, (2e-3, 0.2)], 3e-3, 0.3, taken=True, too_far=False) == [(2e-3, 0.2), (3e-3, 0.3)]
    assert add_step(one, 2e-3, math.nan, taken=False, too_far=False) == one, "a closed gate says nothing"
    assert add_step(one, 2e-3, math.nan, taken=True, too_far=False) == one
    assert add_step(one, 2e-3, math.nan, taken=False, too_far=True) == [*one, (2e-3, None)]
    assert add_step(one, 2e-3, 1.4, taken=True, too_far=True) == [*one, (2e-3, 1.4)]


def test_training_keeps_the_strength_of_forgetting(make_trainer, tmp_path, save_checkpoint):
    trainer = make_trainer(eepo=KL_STEP, rollout={"group_size": 16})
    rows = [trainer.iteration()[1] for _ in range(8)]
    assert rows[0]["unlearn/learning_rate"] == 0.02 != rows[1]["unlearn/learning_rate"]
    late = [row["unlearn/kl_low_variance"] for row in rows[4:]]
    assert sum(late) / len(late) == pytest.approx(0.01, rel=0.6) and all(row["unlearn/applied"] == 1 for row in rows)
    for row in rows:
        assert row["unlearn/strength"] == pytest.approx(row["unlearn/learning_rate"] * row["unlearn/grad_norm"] ** 2)
    steps = trainer.state.forget_steps
    assert [list(s) for s in steps] == [
        [row["unlearn/learning_rate"], row["unlearn/kl_low_variance"]] for row in rows[-2:]
    ]
    folder = save_checkpoint(tmp_path / "run", trainer)
    restored = load_checkpoint(folder, trainer.policy)
    assert [tuple(s) for s in restored.forget_steps] == steps


def test_the_engine_takes_the_step_that_is_logged(make_trainer, monkeypatch):
    trainer = make_trainer(eepo=KL_STEP)
    taken, forget = [], trainer.engine.forget
    monkeypatch.setattr(trainer.engine, "forget", lambda g, **o: taken.append(o["eta"]) or forget(g, **o))
    assert [trainer.iteration()[1]["unlearn/learning_rate"] for _ in range(3)] == taken and len(set(taken)) == 3


def test_a_step_taken_back_makes_the_next_shorter(make_trainer):
    trainer = make_trainer(eepo={**KL_STEP, "learning_rate": 3.0, "max_kl": 0.05, "max_step": 99.0})
    rows = [trainer.iteration()[1] for _ in range(3)]
    assert rows[0]["unlearn/resampled"] == 1 and rows[0]["unlearn/applied"] == 0 == rows[0]["unlearn/skipped"]
    assert rows[1]["unlearn/learning_rate"] < 3.0 / 2


def test_a_step_that_would_be_too_long_is_as_long_as_it_may(make_trainer):
    """And taken, every time; a fixed one is not taken at all."""
    trainer = make_trainer(eepo={**KL_STEP, "learning_rate": 3.0, "max_step": 1e-4})
    taken, forget = [], trainer.engine.forget
    trainer.engine.forget = lambda g, **o: taken.append((o["eta"], o["norm"])) or forget(g, **o)
    for _ in range(4):
        longest = 1e-4 * trainer.policy.weights_norm
        _, row = trainer.iteration()
        assert row["unlearn/applied"] == 1 and row["unlearn/too_long"] == 0
        assert taken[-1][0] == row["unlearn/learning_rate"]
        assert row["unlearn/learning_rate"] * row["unlearn/grad_norm"] == pytest.approx(longest, rel=1e-6)
    fixed = make_trainer(eepo={"alpha": 9.0, "learning_rate": 3.0, "max_step": 1e-4})
    assert fixed.iteration()[1]["unlearn/too_long"] == 1


def test_a_random_direction_gets_the_same_kl(make_trainer):
    """As long as ∇L its KL is next to nothing: only with the KL matched is it a control."""
    sizes = {"rollout": {"group_size": 16}}
    fixed = make_trainer(eepo={"alpha": 9.0, "learning_rate": 0.02, "direction": "random"}, **sizes)
    assert fixed.iteration()[1]["unlearn/kl_low_variance"] < 1e-3
    trainer = make_trainer(eepo={**KL_STEP, "direction": "random", "max_step": 9.0}, **sizes)
    rows = [trainer.iteration()[1] for _ in range(12)]
    late = [row["unlearn/kl_low_variance"] for row in rows[8:]]
    assert sum(late) / len(late) == pytest.approx(0.01, rel=0.6), late


def test_stage_two_can_be_hotter_at_the_same_kl(make_trainer):
    once = {"prompts_per_update": 4}
    trainer = make_trainer(eepo={**HOTTER}, rollout={"group_size": 16}, train=once)
    rows = []
    for _ in range(10):
        batch, row = trainer.iteration()
        rows.append(row)
    late = [row["unlearn/kl_low_variance"] for row in rows[6:]]
    assert sum(late) / len(late) == pytest.approx(0.01, rel=0.6), late
    assert {r.weights_version.forgotten for r in batch.stage(2)} == {True}
    assert {r.weights_version.forgotten for r in batch.stage(1)} == {False}
    assert row["policy/ratio_mean_stage1"] == pytest.approx(1, abs=1e-5) and row["policy/ratio_mean_stage2"] != 1
    assert row["entropy/stage2"] > row["entropy/stage1"] - 0.5 and row["rollout/logprob_gap"] < 1e-5
    again = make_trainer(eepo={**HOTTER, "learning_rate": 9.0, "max_kl": 0.02})
    batch, row = again.iteration()
    assert row["unlearn/resampled"] == 1 and not any(r.weights_version.forgotten for r in batch.rollouts)


@pytest.mark.parametrize(
    "eepo, message",
    [
        ({"step": "kl", "target_kl": 2.0}, r"eepo.target_kl: expected below eepo.max_kl \(1.0\)"),
        ({"target_kl": 0.1}, r"eepo.target_kl: expected eepo.step=kl with it, found fixed"),
        ({"step": "kl", "learning_rate": 0.0}, r"eepo.learning_rate: expected above 0 with eepo.step=kl"),
        ({"direction": "temperature", "alpha": 0.1}, r"eepo.alpha: expected eepo.direction=gradient with it"),
    ],
)
def test_mistakes_are_named(test_config, eepo, message):
    with pytest.raises(UserError, match=message):
        test_config(eepo=eepo)

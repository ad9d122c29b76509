"""How completions are sampled beside EEPO's two stages: parameter noise, a temperature a stage, one's own."""

import copy
import math

import pytest
import torch

from eepo_fast.algorithm.methods import check_methods
from eepo_fast.types import UserError

PSN = {"enabled": True, "sigma": 0.05}
OFF = {"enabled": False}


def weights(engine):
    return {name: weight.clone() for name, weight in engine.weights.items()}


@pytest.fixture
def watch():
    """The engine's weights whenever it samples, by the stage that is asked for."""

    def of(trainer):
        found, generate = [], trainer.engine.generate

        def watched(requests, *arguments, **options):
            found.append((requests[0].stage, weights(trainer.engine)))
            return generate(requests, *arguments, **options)

        trainer.engine.generate = watched
        return found

    return of


def test_noise_is_as_large_as_asked_on_the_chosen_weights(make_trainer, watch):
    trainer = make_trainer(eepo=OFF, psn=PSN)
    theta, seen = {n: p.detach().clone() for n, p in trainer.policy.model.named_parameters()}, watch(trainer)
    batch, row = trainer.iteration()
    ((stage, held),) = seen
    assert stage == 1 and len(batch.stage(1)) == len(batch.rollouts), "the whole group, in one stage"
    change = {name: held[name] - theta[name] for name in theta}
    assert all((change[name].abs().max() > 0) == ("mlp" in name) for name in theta)
    noisy = torch.cat([c.flatten() for name, c in change.items() if "mlp" in name])
    assert noisy.std().item() == pytest.approx(0.05, rel=0.03) and abs(noisy.mean().item()) < 3e-3
    assert {r.weights_version.forgotten for r in batch.rollouts} == {True}
    assert row["unlearn/kl"] > 0 and row["unlearn/applied"] == 1 and row["unlearn/learning_rate"] == 0.05
    assert row["policy/weight_mean"] > 0, "it has an importance weight"


def test_noise_is_drawn_anew_and_by_the_seed(make_trainer, tiny_model, watch):
    start, found = copy.deepcopy(tiny_model.state_dict()), []
    for seed in (0, 0, 1):
        tiny_model.load_state_dict(start)
        trainer = make_trainer(eepo=OFF, psn=PSN, run={"seed": seed}, optimizer={"learning_rate": 0.0})
        seen = watch(trainer)
        trainer.iteration()
        trainer.iteration()
        found.append([held["model.layers.0.mlp.up_proj.weight"] for _, held in seen])
    same, again, other = found
    assert torch.equal(same[0], again[0]) and torch.equal(same[1], again[1])
    assert not torch.equal(same[0], same[1]) and not torch.equal(same[0], other[0])


def test_noise_follows_its_kl(make_trainer):
    trainer = make_trainer(
        eepo=OFF, psn={**PSN, "sigma": 0.002, "target_kl": 0.02}, optimizer={"learning_rate": 0.0},
        rollout={"group_size": 16, "max_new_tokens": 16},
    )  # fmt: skip
    rows = [trainer.iteration()[1] for _ in range(9)]
    assert rows[0]["unlearn/learning_rate"] == 0.002 and rows[0]["unlearn/kl_low_variance"] < 0.004
    found = [row["unlearn/kl_low_variance"] for row in rows[4:]]
    assert 0.01 < math.exp(sum(map(math.log, found)) / len(found)) < 0.04, found


def test_noise_that_goes_too_far_is_taken_back(make_trainer, watch):
    trainer = make_trainer(eepo=OFF, psn={**PSN, "sigma": 3.0, "max_kl": 0.05})
    theta, seen = {n: p.detach().clone() for n, p in trainer.policy.model.named_parameters()}, watch(trainer)
    batch, row = trainer.iteration()
    assert row["unlearn/resampled"] == 1 and len(seen) == 2
    assert all(torch.equal(seen[1][1][name], theta[name]) for name in theta)
    assert {r.weights_version.forgotten for r in batch.rollouts} == {False}


def test_noise_on_no_weight_is_one_line(make_trainer):
    trainer = make_trainer(eepo=OFF, psn={**PSN, "weights": "nowhere"})
    with pytest.raises(UserError, match=r"psn.weights: expected part of a weight's name, found 'nowhere'"):
        trainer.iteration()


def test_noise_goes_with_carry_and_additions(make_trainer, more_prompts, watch):
    trainer = make_trainer(eepo=OFF, psn=PSN, rollout={"carry": 1, "quorum": 0.6, "max_new_tokens": 16})
    trainer.prompts = more_prompts
    rows = [trainer.iteration()[1] for _ in range(4)]
    assert max(row["rollout/staleness_max"] for row in rows) > 0 and all(row["unlearn/applied"] for row in rows)
    trainer = make_trainer(eepo=OFF, psn=PSN, aepo={"enabled": True, "num_samples": 4})
    theta, seen = {n: p.detach().clone() for n, p in trainer.policy.model.named_parameters()}, watch(trainer)
    trainer.iteration()
    (stage, held), (_, noisy) = seen
    assert stage == 3 and all(torch.equal(held[name], theta[name]) for name in theta), "AEPO's are from the policy"
    assert not all(torch.equal(noisy[name], theta[name]) for name in theta)


def test_hot_tokens_are_others_however_often_they_went_on(make_trainer, more_prompts):
    """With carry, in as many parts as they have; and each completion is graded once."""
    graded = []
    trainer = make_trainer(
        eepo={"alpha": 1e-9, "temperature": 2.0}, rollout={"carry": 1, "quorum": 0.3, "max_new_tokens": 24}
    )
    trainer.prompts, trainer.stop_token_ids, grade = more_prompts, [1, 5, 8, 9, 12], trainer.grader.grade
    trainer.grader.grade = lambda problems, texts, **more: graded.extend(texts) or grade(problems, texts, **more)
    parts, done = 0, 0
    for _ in range(4):
        batch, _ = trainer.iteration()
        done += len(batch.rollouts)
        for r in [*batch.rollouts, *(r for g in trainer.state.groups for r in g.rollouts)]:
            hot = [s for s, stage in zip(r.segments, r.segment_stages, strict=True) if stage == 2]
            assert all(s.weights_version.forgotten for s in hot)
            parts = max(parts, len(hot))
    ended = sum(not r.preempted for g in trainer.state.groups for r in g.rollouts)
    assert parts > 1 and len(graded) == done + ended


@pytest.mark.parametrize("rate", [0.05, 0.0], ids=["forgets", "forgets nothing"])
def test_stage_2_has_a_temperature_of_its_own(make_trainer, scored, rate):
    """Its log-probs are at that temperature, of θ' (or θ, where nothing is forgotten), and it counts as of others."""
    trainer = make_trainer(eepo={"alpha": 9.0, "learning_rate": rate, "temperature": 2.0})
    theta, held, generate = copy.deepcopy(trainer.policy.model), {}, trainer.engine.generate

    def watched(requests, *arguments, **options):
        held[requests[0].stage] = weights(trainer.engine)
        return generate(requests, *arguments, **options)

    trainer.engine.generate = watched
    batch, row = trainer.iteration()
    forgetful = copy.deepcopy(theta)
    forgetful.load_state_dict(held[2], strict=False)
    for r in batch.rollouts:
        model, temperature = (theta, 1.0) if r.stage == 1 else (forgetful, 2.0)
        expected = scored(model, r, temperature).tolist()
        assert r.rollout_logprobs == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert r.weights_version.forgotten == (r.stage == 2)
    assert row["entropy/stage2"] > row["entropy/stage1"] and row["policy/weight_mean"] > 0


OWN = '''
from dataclasses import replace

def hot_half(it):
    """The second half hotter, in one stage each."""
    size = it.config.rollout.group_size
    it.sync()
    cold = it.generate("stage1", it.requests(1, range(size // 2)))
    hot = it.generate("stage2", it.requests(2, range(size // 2, size)), temperature=1.5)
    return [*cold, *hot]

def too_few(it):
    it.sync()
    return it.generate("stage1", it.requests(1, range(1)))
'''


def test_a_sampler_that_is_no_function_is_refused(test_config):
    with pytest.raises(UserError, match=r"rollout.sampler: expected a function, found that os:name is a str"):
        check_methods(test_config(eepo=OFF, rollout={"sampler": "os:name"}))


def test_a_sampler_of_ones_own(make_trainer, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    trainer = make_trainer(eepo=OFF, rollout={"sampler": f"{tmp_path}/mine.py:hot_half"})
    batch, row = trainer.iteration()
    assert len(batch.stage(1)) == len(batch.stage(2)) == 8 and row["entropy/stage2"] > row["entropy/stage1"]
    trainer = make_trainer(eepo=OFF, rollout={"sampler": f"{tmp_path}/mine.py:too_few"})
    with pytest.raises(
        UserError, match=r"rollout.sampler: expected each of 16 completions once, .* found 4, of which 4"
    ):
        trainer.iteration()

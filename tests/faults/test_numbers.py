"""Numbers that are none, steps that go too far, weights that are not who they say: caught, counted, and survived."""

import math
from dataclasses import replace

import pytest
import torch

from eepo_fast.algorithm import forget, guards, iteration, stages
from eepo_fast.algorithm.advantages import set_advantages
from eepo_fast.rewards import ArithmeticGrader
from eepo_fast.rollout.engine import Sampling, make_requests
from eepo_fast.types import EngineError, Grade, RolloutBatch, Segment, UserError

OPEN = {"alpha": 9.0, "learning_rate": 0.05}


def weights_of(trainer):
    return torch.cat([w.flatten().double() for w in trainer.policy.named_weights().values()])


def poisoned(monkeypatch):
    """The unlearning gradient has a NaN in it."""
    original = forget.GradientPass.result

    def result(self, rollouts):
        found = original(self, rollouts)
        next(iter(found.gradient.tensors.values())).view(-1)[0] = math.nan
        found.grad_norm = found.gradient.norm()
        return found

    monkeypatch.setattr(forget.GradientPass, "result", result)


@pytest.mark.fault(9)
def test_a_nan_in_the_unlearning_gradient_skips_the_step(make_trainer, monkeypatch):
    """On two ranks: tests/eepo_fast/policy/test_zero.py, `poisoned`."""
    poisoned(monkeypatch)
    trainer = make_trainer(eepo=OPEN)
    batch, row = trainer.iteration()
    assert row["unlearn/skipped"] == row["unlearn/non_finite"] == 1
    assert not any(r.weights_version.forgotten for r in batch.rollouts)
    assert torch.isfinite(weights_of(trainer)).all() and math.isfinite(row["policy/loss"])


def test_without_the_guard_the_nan_reaches_the_engine(make_trainer, monkeypatch):
    poisoned(monkeypatch)
    trainer = make_trainer(eepo=OPEN)
    monkeypatch.setattr(stages, "went_too_far", lambda *args: False)  # which would take it back
    original = forget.compute_unlearning

    def believing(*args, **options):
        result = original(*args, **options)
        result.apply = True
        return result

    monkeypatch.setattr("eepo_fast.algorithm.iteration.compute_unlearning", believing)
    try:
        trainer.iteration()
    except Exception:
        return
    assert any(not torch.isfinite(w).all() for w in trainer.engine.weights.values())


class Grader(ArithmeticGrader):
    def __init__(self, grades):
        self.grades = grades

    def grade(self, problems, completions, *, seconds=None):
        return [self.grades[i % len(self.grades)] for i in range(len(completions))]


MISSING = {
    "NaN": Grade(math.nan, "ok", 0.0), "infinite": Grade(math.inf, "ok", 0.0), "timeout": Grade(0.0, "timeout", 5.0),
    "error": Grade(0.0, "error", 0.0),
}  # fmt: skip


@pytest.mark.fault(10)
@pytest.mark.fault(21)
@pytest.mark.parametrize("kind", MISSING)
def test_a_reward_that_is_none_is_left_out_and_counted(make_trainer, kind):
    trainer = make_trainer(eepo=OPEN, grader=Grader([Grade(1.0, "ok", 0.0), Grade(0.0, "ok", 0.0), MISSING[kind]]))
    batch, row = trainer.iteration()
    missing = [r for r in batch.rollouts if r.reward is None]
    assert len(missing) == row["reward/missing"] > 0 and all(r.advantage == 0 for r in missing)
    assert 0 < row["reward/mean"] < 1 and torch.isfinite(weights_of(trainer)).all()
    for group in batch.groups():
        known = [r.reward for r in group if r.reward is not None]
        if len(set(known)) > 1:
            mean, std = sum(known) / len(known), torch.tensor(known).std().item()
            assert group[0].reward is None or group[0].advantage == pytest.approx(
                (group[0].reward - mean) / (std + 1e-6)
            )


def test_without_the_guard_a_nan_reward_poisons_its_group(make_rollouts, test_config):
    rollouts = make_rollouts([3, 3, 3, 3])
    for r, reward in zip(rollouts, (1.0, 0.0, math.nan, 1.0), strict=True):
        r.prompt, r.reward = rollouts[0].prompt, reward
    try:
        set_advantages(RolloutBatch(rollouts, 4), test_config())
    except AttributeError:  # what Python 3.11's statistics make of it
        return
    assert all(math.isnan(r.advantage) for r in rollouts)


@pytest.mark.fault(11)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_rewards_give_no_advantage_and_are_counted(make_trainer, value):
    trainer = make_trainer(eepo=OPEN, grader=Grader([Grade(value, "ok", 0.0)]))
    before = weights_of(trainer)
    batch, row = trainer.iteration()
    assert row["group/all_equal_fraction"] == 1 and all(r.advantage == 0 for r in batch.rollouts)
    assert row["policy/loss"] == 0 and row["policy/grad_norm"] == 0
    assert torch.equal(before, weights_of(trainer)), "AdamW without decay leaves weights without a gradient"
    both = [Grade(1.0, "ok", 0.0), Grade(0.0, "ok", 0.0)]
    ordinary = make_trainer(eepo=OPEN, grader=Grader(both))  # the control: other rewards do move it
    ordinary.iteration()
    assert not torch.equal(before, weights_of(ordinary))


@pytest.mark.fault(12)
def test_empty_and_cut_off_completions(make_trainer, monkeypatch):
    """Empty: an engine gives no token at all. Cut off: the limit is one token."""
    trainer = make_trainer(eepo=OPEN)
    original = trainer.engine.generate

    def generate(requests, sampling, *more):
        rollouts = original(requests, sampling)  # nothing is handed over before it is what it is
        for r in rollouts[::3]:
            r.segments = [Segment([], [], r.weights_version)]
        return rollouts

    monkeypatch.setattr(trainer.engine, "generate", generate)
    batch, row = trainer.iteration()
    assert sum(r.num_tokens == 0 for r in batch.rollouts) >= 5
    assert math.isfinite(row["policy/loss"]) and torch.isfinite(weights_of(trainer)).all()
    cut = make_trainer(eepo=OPEN, rollout={"max_new_tokens": 1})
    _, row = cut.iteration()
    assert row["length/mean"] == 1 and row["length/truncated_fraction"] > 0 and math.isfinite(row["policy/loss"])


@pytest.mark.fault(17)
def test_a_forget_step_that_is_too_long_is_not_taken(make_trainer):
    trainer = make_trainer(eepo={**OPEN, "learning_rate": 1e3})
    batch, row = trainer.iteration()
    assert row["unlearn/too_long"] == row["unlearn/skipped"] == 1 and math.isnan(row["unlearn/retention"])
    assert not trainer.engine.weights_version.forgotten and math.isfinite(row["policy/loss"])
    assert row["policy/ratio_mean_stage2"] == pytest.approx(1, abs=0.2), "sampled from θ"
    # the control: without the cap the same step is taken, and stage 2 is the text of a broken model
    wild = make_trainer(eepo={**OPEN, "learning_rate": 1e3, "max_step": 1e30, "max_kl": 1e30})
    batch, row = wild.iteration()
    assert row["unlearn/too_long"] == 0 and batch.rollouts[-1].weights_version.forgotten and row["unlearn/kl"] > 1


@pytest.mark.fault(17)
def test_a_forget_step_that_went_too_far_is_taken_back(make_trainer):
    """Stage 2 is sampled again from θ, with θ's version, and nothing of θ' is in the update."""
    far = {**OPEN, "learning_rate": 1e3, "max_step": 1e30}
    batch, row = make_trainer(eepo={**far, "max_kl": 1.0}).iteration()
    assert row["unlearn/resampled"] == 1 and row["unlearn/kl"] > 1
    assert not any(r.weights_version.forgotten for r in batch.rollouts)
    batch, row = make_trainer(eepo={**far, "max_kl": 1e30}).iteration()  # the control
    assert row["unlearn/resampled"] == 0 and all(r.weights_version.forgotten for r in batch.stage(2))


@pytest.mark.fault(14)
def test_the_policy_is_restored_exactly(make_trainer):
    """By copying, in every dtype: after forget and sync the engine holds nearest(policy), bit for bit."""
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(eepo=OPEN, rollout={"dtype": dtype})
        weights = trainer.policy.named_weights()
        before = {name: w.clone() for name, w in trainer.engine.weights.items()}
        unlearning = forget.compute_unlearning(
            trainer.policy,
            trainer.engine.generate(trainer_requests(trainer), Sampling(1.0, 8, (1,))),
            trainer.config.eepo,
            [],
        )
        trainer.policy.forget(trainer.engine, unlearning.gradient, trainer.config.eepo, seed=0, step=0)
        moved = {name: w.clone() for name, w in trainer.engine.weights.items()}
        assert any(not torch.equal(before[n], moved[n]) for n in before)
        # the control: taking the step back by subtracting it leaves weights different
        undone = [
            (moved[n].float() - 0.05 * unlearning.gradient.tensors[n]).to(moved[n].dtype).ne(before[n]).sum().item()
            for n in before
        ]
        assert sum(undone) > 0
        trainer.engine.sync([weights], trainer.engine.weights_version._replace(forgotten=False))
        assert all(torch.equal(trainer.engine.weights[n], w.to(before[n].dtype)) for n, w in weights.items())


def trainer_requests(trainer):
    return make_requests(trainer.prompts, 1, range(2), 0, 0)


@pytest.mark.fault(15)
@pytest.mark.parametrize("when", ["after sync", "after forget"])
def test_an_engine_that_is_not_as_it_was_made_will_not_sample(make_trainer, monkeypatch, when):
    trainer = make_trainer(eepo=OPEN)
    original, calls = trainer.engine.generate, []

    def generate(requests, sampling, *more):
        if len(calls) == (when == "after forget"):
            with torch.no_grad():
                next(iter(trainer.engine.weights.values())).view(-1)[3] += 1e-3
        calls.append(1)
        return original(requests, sampling, *more)

    monkeypatch.setattr(trainer.engine, "generate", generate)
    before = weights_of(trainer)
    with pytest.raises(EngineError, match=r"1 of \d+ weights.*embed_tokens"):
        trainer.iteration()
    assert torch.equal(before, weights_of(trainer)) and trainer.state.step == 0
    calls.clear()
    monkeypatch.setattr(trainer.engine, "_check_weights", lambda: None)  # the control
    trainer.iteration()


def test_a_sync_that_loses_a_tensor_is_noticed(make_trainer, monkeypatch):
    """The checksum is of what was to be written, not of what is there."""
    from eepo_fast.rollout import hf

    trainer = make_trainer(eepo=OPEN)
    trainer.iteration()
    original = hf.sync
    monkeypatch.setattr(hf, "sync", lambda targets, sources: original(targets[1:], sources[1:]))
    with pytest.raises(EngineError, match="weights of the engine are not what the last update left"):
        trainer.iteration()


@pytest.mark.fault(18)
@pytest.mark.parametrize("wrong", ["version", "forgotten", "stage"])
def test_a_rollout_of_other_weights_is_refused(make_trainer, monkeypatch, wrong):
    trainer_ = make_trainer(eepo=OPEN)
    original = trainer_.engine.generate

    def generate(requests, sampling, *more):
        rollouts = original(requests, sampling, *more)
        last, version = rollouts[-1], rollouts[-1].weights_version
        if wrong == "stage":
            last.stage = 2
        else:
            other = version._replace(**{"policy_version": 7} if wrong == "version" else {"forgotten": True})
            last.segments = [replace(last.segments[0], weights_version=other)]
        return rollouts

    monkeypatch.setattr(trainer_.engine, "generate", generate)
    with pytest.raises(EngineError, match="expected completions of stage 1 from weights"):
        trainer_.iteration()
    monkeypatch.setattr(iteration, "check_version", lambda *args: None)  # the control
    if wrong != "stage":
        trainer_.iteration()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_logprob_that_is_none_leaves_its_completion_out(make_trainer, monkeypatch, value):
    trainer = make_trainer(eepo=OPEN, grader=Grader([Grade(1.0, "ok", 0.0), Grade(0.0, "ok", 0.0)]))
    original = trainer.engine.generate

    def generate(requests, sampling, *more):
        rollouts = original(requests, sampling, *more)
        rollouts[1].segments[0].rollout_logprobs[0] = value
        return rollouts

    monkeypatch.setattr(trainer.engine, "generate", generate)
    _, row = trainer.iteration()
    assert row["rollout/non_finite_logprobs"] == 2 and row["reward/missing"] == 2
    assert row["policy/updates_skipped"] == 0 and torch.isfinite(weights_of(trainer)).all()
    assert row["unlearn/resampled"] == 0
    for module in ("trainer", "ratio"):  # the control
        monkeypatch.setattr(f"eepo_fast.algorithm.{module}.has_finite_logprobs", lambda r: True)
    _, row = trainer.iteration()
    assert row["policy/updates_skipped"] > 0 if math.isnan(value) else row["policy/non_finite_ratios"] > 0


def test_a_loss_that_is_none_is_counted_and_its_update_dropped(make_trainer, monkeypatch):
    trainer = make_trainer(eepo=OPEN)
    original, calls = trainer.policy.backward, []

    def backward(batch, loss_fn):
        calls.append(1)
        poison = math.nan if len(calls) == 1 else 1.0
        return original(batch, lambda *args: loss_fn(*args) * poison)

    monkeypatch.setattr(trainer.policy, "backward", backward)
    _, row = trainer.iteration()
    assert row["policy/non_finite_losses"] == 1 and row["policy/updates_skipped"] == 1
    assert torch.isfinite(weights_of(trainer)).all()


def out_of_memory(monkeypatch, policy, most):
    """Micro-batches of more than `most` tokens do not fit."""
    original = policy.loss

    def loss(batch, loss_fn):
        if batch.input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(batch, loss_fn)

    monkeypatch.setattr(policy, "loss", loss)


@pytest.mark.fault(25)
def test_out_of_memory_halves_micro_batches_of_the_same_samples(make_trainer, tiny_model, monkeypatch):
    import copy

    start = copy.deepcopy(tiny_model.state_dict())
    settings = dict(eepo=OPEN, train={"micro_batch_tokens": 4096}, optimizer={"learning_rate": 1e-5})
    plain = make_trainer(**settings)
    _, expected = plain.iteration()
    wanted = weights_of(plain)
    tiny_model.load_state_dict(start)
    trainer = make_trainer(**settings)
    out_of_memory(monkeypatch, trainer.policy, 60)
    _, row = trainer.iteration()
    assert row["policy/out_of_memory"] >= 4 and expected["policy/out_of_memory"] == 0
    assert row["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=1e-5)
    assert row["policy/loss"] == pytest.approx(expected["policy/loss"], rel=1e-4, abs=1e-7)
    assert row["entropy/policy"] == pytest.approx(expected["entropy/policy"], rel=1e-5), "nothing is counted twice"
    assert torch.allclose(weights_of(trainer), wanted, rtol=0, atol=1e-6)
    assert trainer.iteration()[1]["policy/out_of_memory"] == 0, "it stays halved"


def test_memory_that_no_halving_frees_is_one_line(make_trainer, monkeypatch):
    trainer = make_trainer(eepo=OPEN)
    out_of_memory(monkeypatch, trainer.policy, 0)
    with pytest.raises(UserError, match=r"out of memory: CUDA out of memory.*lower train.micro_batch_tokens"):
        trainer.iteration()
    # the control
    monkeypatch.setattr("eepo_fast.algorithm.iteration.within_memory", lambda policy, compute: (compute(), 0))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.iteration()


def test_the_guard_of_the_step_scores_few_and_survives_few_nans(make_trainer, make_rollouts, monkeypatch):
    trainer = make_trainer()
    rollouts = make_rollouts([3] * 40)
    scored = []
    original = trainer.policy.score
    trainer.policy.score = lambda chosen: scored.append(chosen) or original(chosen)
    assert all(map(math.isfinite, guards.forget_kl(trainer.policy, rollouts)))
    assert len(scored[0]) == 40, "their 120 tokens are few"
    monkeypatch.setattr(guards, "KL_TOKENS", 60)
    guards.forget_kl(trainer.policy, rollouts)
    assert len(scored[1]) == 20 and rollouts.index(scored[1][-1]) >= 36, "spread over all of them"
    monkeypatch.setattr(guards, "KL_TOKENS", 9)
    guards.forget_kl(trainer.policy, rollouts)
    assert len(scored[2]) == guards.KL_SAMPLES
    rollouts[0].segments[0].rollout_logprobs[0] = math.nan
    assert all(map(math.isfinite, guards.forget_kl(trainer.policy, rollouts))), "one is left out"
    for r in rollouts[:21]:
        r.segments[0].rollout_logprobs[0] = math.nan
    assert all(map(math.isnan, guards.forget_kl(trainer.policy, rollouts))), "most: it is the model; the step goes back"


def test_a_step_to_weights_that_are_no_numbers_is_taken_back(make_trainer):
    trainer = make_trainer(eepo={**OPEN, "learning_rate": 1e20, "max_step": 1e300})
    batch, row = trainer.iteration()
    assert row["unlearn/resampled"] == 1 and row["reward/missing"] == 0
    assert not any(r.weights_version.forgotten for r in batch.rollouts)

"""The iteration as a whole: ratios, mini-batches, missing rewards, and what a checkpoint must bring back."""

import copy
import json
import math

import pytest
import torch

from eepo_fast.checkpoint import changed_keys, load_checkpoint, newest_valid, remove_newer, verify
from eepo_fast.types import Grade, UserError


def weights_of(trainer):
    return torch.cat([w.flatten().double() for w in trainer.policy.named_weights().values()])


OPEN = {"alpha": 9.0, "learning_rate": 0.05}


def test_keys_and_values_of_an_iteration(make_trainer, metric_keys):
    trainer = make_trainer(eepo=OPEN, grpo={"kl_coef": 1e-4}, reference=True)
    batch, row = trainer.iteration()
    assert metric_keys <= set(row)
    signed = {k for k in metric_keys if k.endswith(("_positive", "_negative"))}  # not every stage has both
    of_carry = {k for k in metric_keys if k.startswith("rollout/staleness")}
    of_carry |= {"rollout/carried_fraction", "rollout/held_groups", "length/begun"}
    elsewhere = signed | of_carry | {"policy/high_covariance", "advantage/positive", "advantage/negative"}
    assert len(signed) == 8 and not [k for k in metric_keys - elsewhere if not math.isfinite(row[k])]
    assert all(math.isnan(row[k]) for k in of_carry)
    assert len(batch.rollouts) == 16 and [r.sample_index for r in batch.groups()[1]] == [0, 1, 2, 3]
    assert [r.stage for r in batch.groups()[0]] == [1, 1, 2, 2]
    assert {tuple(r.weights_version) for r in batch.stage(1)} == {(0, False)}
    assert {tuple(r.weights_version) for r in batch.stage(2)} == {(0, True)}
    stage1 = [v for r in batch.stage(1) for v in r.rollout_logprobs]
    assert row["entropy/stage1"] == pytest.approx(-sum(stage1) / len(stage1))
    assert row["rollout/logprob_gap"] < 1e-5 and row["unlearn/retention"] == pytest.approx(1, abs=1e-3)
    assert row["unlearn/strength"] == pytest.approx(0.05 * row["unlearn/grad_norm"] ** 2)
    assert trainer.state.step == 1 and trainer.state.policy_version == 2
    assert trainer.iteration()[1]["policy_version"] == 2


def test_ratio_divides_by_the_weights_that_sampled(make_trainer):
    """First mini-batch: stage 1 at θ has ratio 1, stage 2 at θ' has not, and matches θ over θ' by a plain forward."""
    trainer = make_trainer(eepo=OPEN, train={"prompts_per_update": 4})
    before = copy.deepcopy(trainer.policy.model)
    batch, row = trainer.iteration()
    assert row["policy/ratio_mean_stage1"] == pytest.approx(1, abs=1e-5)
    ratios = []
    for r in batch.stage(2):
        ids = torch.tensor([r.prompt.token_ids + r.token_ids])
        with torch.no_grad():
            logp = torch.log_softmax(before(ids).logits[0, len(r.prompt.token_ids) - 1 : -1], -1)
        now = logp[range(r.num_tokens), r.token_ids]
        ratios += (now - torch.tensor(r.rollout_logprobs)).exp().tolist()
    assert row["policy/ratio_mean_stage2"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert abs(row["policy/ratio_mean_stage2"] - 1) > 1e-3
    kl = [a - b for r in batch.stage(2) for a, b in zip(r.rollout_logprobs, plain(before, r), strict=True)]
    assert row["unlearn/kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3, abs=1e-6)


def plain(model, r):
    with torch.no_grad():
        logits = model(torch.tensor([r.prompt.token_ids + r.token_ids])).logits[0, len(r.prompt.token_ids) - 1 : -1]
    return torch.log_softmax(logits, -1)[range(r.num_tokens), r.token_ids].tolist()


@pytest.mark.parametrize("eepo", [OPEN, {"enabled": False}], ids=["eepo", "grpo"])
def test_micro_batches_never_change_the_result(make_trainer, tiny_model, eepo):
    start = copy.deepcopy(tiny_model.state_dict())
    changes = []
    for micro_batch_tokens in (1, 50, 10_000):
        tiny_model.load_state_dict(start)
        trainer = make_trainer(
            eepo=eepo, train={"micro_batch_tokens": micro_batch_tokens},
            grpo={"kl_coef": 0.1, "entropy_coef": 0.01}, reference=True,
        )  # fmt: skip
        before = weights_of(trainer)
        trainer.iteration()
        changes.append(weights_of(trainer) - before)
    assert changes[0].norm() > 0
    for other in changes[1:]:
        assert (other - changes[0]).norm() <= 1e-2 * changes[0].norm()  # Adam divides tiny gradients by themselves


def test_old_logprobs_come_from_the_unlearning_pass(make_trainer, monkeypatch):
    """Two updates an iteration: with EEPO stage 1 is never scored again, and of stage 2 only what the guard of the
    forget step takes; plain GRPO scores what its second needs."""
    scored = []
    trainer = make_trainer(eepo=OPEN)
    score = trainer.policy.score
    monkeypatch.setattr(trainer.policy, "score", lambda rollouts: scored.append(rollouts) or score(rollouts))
    trainer.iteration()
    assert len(scored) == 1 and all(r.weights_version.forgotten for r in scored[0])
    scored.clear()
    trainer = make_trainer(eepo={"enabled": False})
    original = trainer.policy.score
    monkeypatch.setattr(trainer.policy, "score", lambda rollouts: scored.append(len(rollouts)) or original(rollouts))
    _, row = trainer.iteration()
    assert scored == [8] and math.isnan(row["entropy/stage2"]) and row["policy/ratio_mean_stage1"] != 1


def test_a_closed_gate_leaves_stage_two_on_policy(make_trainer):
    """And the engine, after a whole iteration, bitwise at the policy (which a learning rate of 0 keeps at θ)."""
    trainer = make_trainer(eepo={"alpha": 1e-9}, optimizer={"learning_rate": 0.0})
    batch, row = trainer.iteration()
    for name, weight in trainer.policy.named_weights().items():
        assert torch.equal(trainer.engine.weights[name], weight)
    assert row["unlearn/skipped"] == 1 and not any(r.weights_version.forgotten for r in batch.rollouts)
    assert math.isnan(row["unlearn/retention"])


def test_equal_rewards_change_nothing_without_regularisers(make_trainer, coin_grader):
    class Same(coin_grader):
        def grade(self, problems, completions, *, seconds=None):
            return [Grade(1.0, "ok", 0.0)] * len(completions)

    trainer = make_trainer(grader=Same(), eepo=OPEN)
    before = weights_of(trainer)
    _, row = trainer.iteration()
    assert row["group/all_equal_fraction"] == 1 and row["policy/loss"] == 0
    assert torch.equal(weights_of(trainer), before)


def test_missing_rewards_are_left_out_and_counted(make_trainer, coin_grader):
    batch, row = make_trainer(grader=coin_grader(missing=(0, 5)), eepo=OPEN).iteration()
    assert row["reward/missing"] == 2 == row["reward/status_timeout"]
    missing = [r for r in batch.rollouts if r.reward is None]
    assert len(missing) == 2 and all(r.advantage == 0 for r in missing)
    known = [r.reward for r in batch.rollouts if r.reward is not None]
    assert row["reward/mean"] == pytest.approx(sum(known) / len(known))


def test_non_finite_updates_are_dropped_and_three_in_a_row_stop(make_trainer, monkeypatch):
    trainer = make_trainer(eepo={"enabled": False})

    def poison(batch, *_):
        for rollout in (batch.rollouts[0], batch.rollouts[-1]):
            rollout.advantage = math.nan

    monkeypatch.setattr("eepo_fast.algorithm.trainer.set_advantages", poison)
    before = weights_of(trainer)
    _, row = trainer.iteration()
    assert row["policy/updates_skipped"] == 2 and torch.equal(weights_of(trainer), before)
    assert trainer.state.policy_version == 0
    with pytest.raises(UserError, match="gradient norm"):
        trainer.iteration()


def test_a_non_finite_reward_is_a_missing_one(make_trainer, coin_grader):
    class Infinite(coin_grader):
        def grade(self, problems, completions, *, seconds=None):
            return [Grade(math.inf if i == 3 else float(i % 2), "ok", 0.0) for i in range(len(completions))]

    batch, row = make_trainer(grader=Infinite(), eepo=OPEN).iteration()
    assert row["reward/missing"] == 1 and batch.rollouts[3].reward is None and math.isfinite(row["policy/grad_norm"])


def test_warm_up(make_trainer):
    trainer = make_trainer(optimizer={"learning_rate": 1e-3, "warmup_steps": 3})
    rates = []
    for _ in range(2):
        rates.append(trainer.policy.optimizer.param_groups[0]["lr"])
        trainer.iteration()
    assert rates == pytest.approx([0.25e-3, 0.75e-3])


def test_training_goes_on_bitwise_from_a_checkpoint(make_trainer, tiny_model, save_checkpoint, tmp_path, test_config):
    config = test_config(eepo={"gate": "iteration", "alpha": 2.0}, optimizer={"warmup_steps": 10})
    start = copy.deepcopy(tiny_model.state_dict())
    trainer = make_trainer(config=config)
    trainer.iteration()
    save_checkpoint(tmp_path, trainer, config)
    rows = [trainer.iteration()[1] for _ in range(2)]
    final = weights_of(trainer)

    tiny_model.load_state_dict(start)
    resumed = make_trainer(config=config)
    folder, complaints = newest_valid(tmp_path)
    resumed.state = load_checkpoint(folder, resumed.policy)
    assert not complaints and folder.name == "step_000001" and resumed.state.step == 1 and resumed.state.entropy_window
    again = [resumed.iteration()[1] for _ in range(2)]
    same = [k for k in rows[0] if not k.startswith(("time/", "tokens/per_second"))]
    for a, b in zip(rows, again, strict=True):
        assert {k: a[k] for k in same if a[k] == a[k]} == {k: b[k] for k in same if b[k] == b[k]}
    assert torch.equal(weights_of(resumed), final)


def test_without_the_optimizer_the_end_differs(make_trainer, tiny_model, save_checkpoint, tmp_path, test_config):
    """Negative control of the test above."""
    config = test_config()
    start = copy.deepcopy(tiny_model.state_dict())
    trainer = make_trainer(config=config)
    trainer.iteration()
    save_checkpoint(tmp_path, trainer, config)
    trainer.iteration()
    final = weights_of(trainer)
    tiny_model.load_state_dict(start)
    resumed = make_trainer(config=config)
    resumed.state = load_checkpoint(newest_valid(tmp_path)[0], resumed.policy)
    resumed.policy.optimizer.state.clear()
    resumed.iteration()
    assert not torch.equal(weights_of(resumed), final)


def test_a_damaged_checkpoint_is_named_and_the_last_whole_used(make_trainer, save_checkpoint, tmp_path, test_config):
    trainer = make_trainer()
    folders = []
    for _ in range(3):
        trainer.iteration()
        folders.append(save_checkpoint(tmp_path, trainer, test_config()))
    assert not folders[0].exists(), "keep: 2"
    path = folders[2] / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    found, complaints = newest_valid(tmp_path)
    assert found == folders[1] and "model.safetensors" in complaints[0] and str(folders[2]) in complaints[0]
    remove_newer(tmp_path, 2)
    assert folders[1].exists() and not folders[2].exists()
    (folders[1] / "optimizer.safetensors").unlink()
    assert "optimizer.safetensors" in verify(folders[1])
    with pytest.raises(UserError, match=r"optimizer\.safetensors.*no older one is whole"):
        newest_valid(tmp_path)


def test_going_on_before_a_damaged_checkpoint_keeps_the_new_one(make_trainer, save_checkpoint, tmp_path, test_config):
    """keep: 1, and a damaged step 4 left by a crash: saving step 3 must not be what is dropped."""
    trainer, config = make_trainer(), test_config(checkpoint={"keep": 1})
    (tmp_path / "checkpoints" / "step_000004").mkdir(parents=True)
    trainer.state.step = 2
    remove_newer(tmp_path, 2)
    trainer.iteration()
    folder = save_checkpoint(tmp_path, trainer, config)
    assert newest_valid(tmp_path)[0] == folder


def test_what_may_change_when_a_run_is_resumed(test_config):
    saved = test_config().model_dump()
    assert changed_keys(saved, test_config(train={"iterations": 9, "micro_batch_tokens": 7})) == []
    sharded = test_config(train={"engine": "deepspeed", "zero_stage": 3})
    assert changed_keys(saved, sharded) == [] == changed_keys(sharded.model_dump(), test_config())
    assert changed_keys(saved, test_config(eepo={"enabled": False})) == ["eepo.enabled"]
    other = test_config(eepo={"alpha": 0.7}, optimizer={"learning_rate": 9.0})
    assert changed_keys(saved, other) == ["eepo.alpha", "optimizer.learning_rate"]


def test_a_checkpoint_holds_the_policy_and_never_the_engine(make_trainer, save_checkpoint, tmp_path, test_config):
    from safetensors.torch import load_file

    trainer = make_trainer(eepo=OPEN)
    trainer.iteration()
    assert trainer.engine.weights_version.forgotten
    folder = save_checkpoint(tmp_path, trainer, test_config())
    saved = load_file(folder / "model" / "model.safetensors")
    weights = trainer.policy.named_weights()
    assert set(saved) == set(weights) and all(torch.equal(saved[k], w) for k, w in weights.items())
    assert json.loads((folder / "state.json").read_text())["step"] == 1


def test_a_crash_while_forgetful_touches_the_engine_alone(make_trainer, tiny_model, monkeypatch):
    """The policy and its state are what they were before the iteration, and the next one begins at the policy."""
    start = copy.deepcopy(tiny_model.state_dict())
    expected = make_trainer(eepo=OPEN).iteration()[0]
    tiny_model.load_state_dict(start)
    trainer = make_trainer(eepo=OPEN)
    before, real = weights_of(trainer), trainer.engine.generate

    def crash(requests, sampling, *more):
        if requests[0].stage == 2:
            raise RuntimeError("the engine died")
        return real(requests, sampling, *more)

    monkeypatch.setattr(trainer.engine, "generate", crash)
    with pytest.raises(RuntimeError):
        trainer.iteration()
    assert trainer.engine.weights_version.forgotten
    engine = {name: w.detach().clone() for name, w in trainer.engine.weights.items()}
    assert any(not torch.equal(engine[n], w) for n, w in trainer.policy.named_weights().items())
    assert torch.equal(weights_of(trainer), before) and trainer.state.step == trainer.state.policy_version == 0
    assert not trainer.policy.optimizer.state
    monkeypatch.setattr(trainer.engine, "generate", real)
    trainer.state.entropy_window.clear()
    again = trainer.iteration()[0]
    assert [r.token_ids for r in again.rollouts] == [r.token_ids for r in expected.rollouts]


def test_policy_loss_and_gradient_against_a_plain_mini_batch(make_trainer, monkeypatch, coin_grader):
    """One mini-batch with stage 1, stage 2, a missing reward, KL to a reference that is not the policy, and entropy:
    loss, KL and gradient norm by a plain float64 forward, one sequence at a time."""
    grpo = {"kl_coef": 0.3, "entropy_coef": 0.1}
    trainer = make_trainer(
        eepo=OPEN, grpo=grpo, reference=True, grader=coin_grader(missing=(1, 6)), train={"prompts_per_update": 4}
    )
    with torch.no_grad():
        for p in trainer.reference.model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    model, reference = (copy.deepcopy(p.model).double() for p in (trainer.policy, trainer.reference))
    batch, row = trainer.iteration()

    kept = [r for r in batch.rollouts if r.reward is not None]
    count = sum(r.num_tokens for r in kept)
    assert len(kept) == 14 and {r.stage for r in kept} == {1, 2}
    loss, kl_sum = torch.zeros((), dtype=torch.float64), 0.0
    for r in kept:
        ids, start = torch.tensor([r.prompt.token_ids + r.token_ids]), len(r.prompt.token_ids) - 1
        rows = torch.log_softmax(model(ids).logits[0, start:-1], -1)
        now = rows[range(r.num_tokens), r.token_ids]
        with torch.no_grad():
            ref = torch.log_softmax(reference(ids).logits[0, start:-1], -1)[range(r.num_tokens), r.token_ids]
        old = torch.tensor(r.rollout_logprobs).double() if r.weights_version.forgotten else now.detach()
        ratio = (now - old).exp()
        objective = torch.minimum(ratio * r.advantage, ratio.clamp(0.8, 1.2) * r.advantage)
        kl = (ref - now).exp() - (ref - now) - 1
        entropy = -(rows.exp() * rows).sum(-1)
        loss = loss + (-objective + 0.3 * kl - 0.1 * entropy).sum() / count
        kl_sum += kl.sum().item()
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm().item()
    assert row["policy/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert row["policy/kl"] == pytest.approx(kl_sum / count, rel=1e-4) and row["policy/kl"] > 1e-3


def test_the_log_has_what_forgetting_did_to_each_token(make_trainer):
    """Measured in the engine: the change is that of its weights, θ' against θ, and of nothing with a closed gate."""
    sampled_at = {"rollout": {"temperature": 0.8}}
    trainer = make_trainer(eepo={"learning_rate": 0.05, "alpha": 9.0}, log={"token_details": True}, **sampled_at)
    model = copy.deepcopy(trainer.policy.model)  # θ, before the update
    taken = {}
    forget = trainer.engine.forget

    def watched(gradient, **options):
        taken.update({name: g.clone() for name, g in gradient.items()})
        return forget(gradient, **options)

    trainer.engine.forget = watched
    batch, row = trainer.iteration()
    assert row["unlearn/skipped"] == 0
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.add_(taken[name], alpha=0.05)
    for r in batch.stage(1):
        ids = torch.tensor([r.prompt.token_ids + r.token_ids])
        first = len(r.prompt.token_ids) - 1
        before, after = (
            (m(ids).logits[0, first:-1] / 0.8).log_softmax(-1)[range(r.num_tokens), r.token_ids] for m in (model, moved)
        )
        assert r.forget_change == pytest.approx((after - before).tolist(), abs=1e-4)
    assert min(min(r.forget_change) for r in batch.stage(1)) < -1e-3
    assert not any(r.forget_change for r in batch.stage(2))
    closed = make_trainer(eepo={"alpha": 1e-9}, log={"token_details": True})
    batch, row = closed.iteration()
    assert row["unlearn/skipped"] == 1 and not any(r.forget_change for r in batch.rollouts)
    dumb = make_trainer(eepo={"alpha": 9.0}, log={"token_details": True})
    dumb.engine.score = lambda rollouts, temperature: None  # vLLM's, at a temperature other than 1
    assert not any(r.forget_change for r in dumb.iteration()[0].rollouts)

"""`rollout.quorum`: stage 1's stragglers go on under the forgetful weights; a token keeps whose weights said it."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from eepo_fast.algorithm.guards import check_version
from eepo_fast.algorithm.losses import PolicyTokens
from eepo_fast.algorithm.overlap import Ahead
from eepo_fast.data.prompts import completion_text
from eepo_fast.rollout.engine import Sampling, continuation, make_requests, num_preemptible
from eepo_fast.run.log_files import log_rollouts
from eepo_fast.types import EngineError, Group, Segment, UserError, WeightsVersion

OPEN = {"alpha": 9.0, "learning_rate": 0.05}
QUORUM = 0.25  # of completions most of which reach the limit
SAMPLING = Sampling(1.0, 40, (1,))


def test_the_engine_stops_at_the_quorum(make_engine, prompts):
    """Those that ended are whole and as ever; the others are what they would have been, cut short."""
    engine = make_engine()
    requests = make_requests(prompts, 1, range(6), 0, 0)
    whole = engine.generate(requests, SAMPLING)
    seen = []
    rollouts = engine.generate(requests, SAMPLING, None, seen.append, QUORUM)
    cut = [r for r in rollouts if r.preempted]
    assert 24 - num_preemptible(24, QUORUM) == 6 <= len(rollouts) - len(cut) < 24 and 6 < len(cut) <= 18
    for r, expected in zip(rollouts, whole, strict=True):
        assert r.token_ids == expected.token_ids[: r.num_tokens]
        assert r.preempted == (r.num_tokens < expected.num_tokens)
        assert r.finished == (expected.finished and not r.preempted)
    assert len(seen) == len(set(seen)) and set(seen) == {r for r in rollouts if not r.preempted}
    assert not any(r.preempted for r in whole)


def test_limits_of_single_samples(make_engine, prompts):
    limits = (1, 3, 12, 40)
    requests = [copy.copy(r) for r in make_requests(prompts, 1, range(4), 0, 0)]
    requests = [type(r)(r.prompt, r.stage, r.sample_indices, r.seeds, limits) for r in requests]
    rollouts = make_engine().generate(requests, Sampling(1.0, 12, ()))
    assert [r.num_tokens for r in rollouts] == [1, 3, 12, 12] * len(prompts)
    assert not any(r.finished or r.preempted for r in rollouts)


def test_what_goes_on_is_read_as_a_prompt_and_drawn_anew(make_engine, prompts, scored):
    engine = make_engine()
    requests = make_requests(prompts, 1, range(6), 0, 0)
    cut = [r for r in engine.generate(requests, SAMPLING, None, None, QUORUM) if r.preempted]
    rest = continuation(cut, 2, 0, 0)
    later = engine.generate(rest, SAMPLING)
    for first, merged in zip(cut, later, strict=True):
        assert merged.segments[:-1] == first.segments and first.num_tokens < merged.num_tokens <= 40
        assert merged.num_before == 0, "the weights are the same"
        assert merged.segment_stages == [1, 2] and first.preempted, "and what it began as is as it was"
        assert merged.rollout_logprobs == pytest.approx(scored(engine.model, merged).tolist(), abs=2e-5)
        assert merged.finished == (merged.token_ids[-1] == 1) and not merged.preempted
    seeds = {s for r in requests for s in r.seeds} | {s for r in rest for s in r.seeds}
    assert len(seeds) == 24 + len(cut)


def test_what_must_end_is_waited_for(make_engine, prompts):
    """Beside the quorum; what may be cut is, unless it has ended by then."""
    engine = make_engine()
    requests = make_requests(prompts, 1, range(6), 0, 0)
    free = engine.generate(requests, SAMPLING, None, None, QUORUM)
    due = {r.prompt.id for r in free if r.preempted and r.prompt.id != free[0].prompt.id}
    requests = [replace(r, must_end=r.prompt.id in due) for r in requests]
    rollouts = engine.generate(requests, SAMPLING, None, None, QUORUM)
    assert due and {r.prompt.id for r in rollouts if r.preempted} <= {free[0].prompt.id}
    assert all(r.num_tokens >= f.num_tokens for r, f in zip(rollouts, free, strict=True))


def test_the_quorum_is_a_share_of_what_counts(make_engine, prompts):
    """Of one prompt's samples half are waited for, of the others none; with a quorum of 1 all of the one's."""
    engine, one = make_engine(), prompts[1].id
    requests = [replace(r, counts=r.prompt.id == one) for r in make_requests(prompts, 1, range(6), 0, 0)]
    whole = engine.generate([replace(r, counts=True) for r in requests], SAMPLING)
    lengths = sorted(r.num_tokens for r in whole if r.prompt.id == one)
    for quorum, last in ((0.5, lengths[2]), (1.0, lengths[-1])):
        rollouts = engine.generate(requests, SAMPLING, None, None, quorum)
        assert [r.preempted for r in rollouts] == [r.num_tokens > last for r in whole]
        assert [r.num_tokens for r in rollouts] == [min(r.num_tokens, last) for r in whole]


def test_tokens_of_other_weights_than_believed_are_refused(prompts):
    """Each segment: what was sampled now, and what the completion had said before."""
    said = Segment([4, 5], [-1.0, -1.0], WeightsVersion(0, False))
    (request, *_) = make_requests(prompts, 1, (0,), 0, 0)
    rest = replace(request, before=(said,), rest_stage=2)
    whole = rest.rollout(0, Segment([6], [-1.0], WeightsVersion(1, False)), finished=True, preempted=False)
    check_version([whole], WeightsVersion(1, False), [rest])
    other = Segment([4, 5], [-1.0, -1.0], WeightsVersion(1, False))
    for wrong in (
        replace(whole, segments=[other, whole.segments[1]]),
        replace(whole, segments=whole.segments[1:]),
        replace(whole, stage=2),
    ):
        with pytest.raises(EngineError, match="expected completions of stage 1"):
            check_version([wrong], WeightsVersion(1, False), [rest])
    with pytest.raises(EngineError, match="expected completions of stage 1 from weights"):
        check_version([whole], WeightsVersion(0, True), [rest])


def run(make_trainer, **sections):
    trainer = make_trainer(
        eepo=OPEN, rollout={"max_new_tokens": 40, "group_size": 8, "quorum": QUORUM}, **sections
    )  # fmt: skip
    theta = copy.deepcopy(trainer.policy.model)
    forgetful = {}
    forget = trainer.engine.forget

    def watched(gradient, **options):
        stats = forget(gradient, **options)
        forgetful["model"] = copy.deepcopy(trainer.engine.model)
        return stats

    trainer.engine.forget = watched
    return trainer, theta, forgetful


def test_each_token_is_of_the_weights_that_sampled_it(make_trainer, tmp_path, scored):
    trainer, theta, forgetful = run(make_trainer)
    batch, row = trainer.iteration()
    moved = forgetful["model"]
    late = [r for r in batch.stage(1) if r.num_before]
    assert late and len(batch.rollouts) == 32 and len(batch.stage(1)) == 16
    assert row["unlearn/stragglers"] == len(late) / 16 and row["length/stage1"] > 0
    for r in late:
        assert r.weights_version == WeightsVersion(0, True) and not r.preempted
        before, after = scored(theta, r), scored(moved, r)
        k = r.num_before
        assert r.rollout_logprobs[:k] == pytest.approx(before[:k].tolist(), abs=1e-4)
        assert r.rollout_logprobs[k:] == pytest.approx(after[k:].tolist(), abs=1e-4)
        assert [v.forgotten for v in r.token_versions] == [False] * k + [True] * (r.num_tokens - k)
        assert r.completion == completion_text(trainer.tokenizer, r.token_ids, [1])
    assert (
        max(float((scored(theta, r)[r.num_before :] - scored(moved, r)[r.num_before :]).abs().max()) for r in late)
        > 1e-3
    )
    whole = [r for r in batch.stage(1) if not r.num_before]
    assert all(not r.weights_version.forgotten for r in whole)
    log_rollouts(tmp_path, 1, batch, False, trainer.tokenizer)
    lines = [json.loads(line) for line in (tmp_path / "rollouts/step_000001.jsonl").read_text().splitlines()]
    logged = [line["segments"] for line in lines if line["num_before"]]
    assert logged == [[[0, False, r.num_before], [0, True, r.num_tokens - r.num_before]] for r in late]


def test_ratios_divide_by_those_weights(make_trainer, monkeypatch, scored):
    """The update's old log-probs, in the first mini-batch and in a later one."""
    trainer, theta, forgetful = run(make_trainer, train={"prompts_per_update": 2})
    seen = []

    of = PolicyTokens.of

    def with_rollouts(batch, *arguments, **options):
        seen.append((batch, of(batch, *arguments, **options)))
        return seen[-1][1]

    monkeypatch.setattr(PolicyTokens, "of", with_rollouts)
    batch, _ = trainer.iteration()
    late = {r for r in batch.stage(1) if r.num_before}
    first_half = set(batch.rollouts[: len(batch.rollouts) // 2]) & late
    assert first_half and first_half != late
    found = 0
    for part, tokens in seen:
        for r, old, on_policy in zip(
            part.rollouts, part.split(tokens.old_logprobs), part.split(tokens.on_policy.float()), strict=True
        ):
            if r not in late:
                continue
            k = r.num_before
            found += 1
            if r in first_half:  # its update is the first: θ is what it differentiates
                assert on_policy.tolist() == [1.0] * k + [0.0] * (r.num_tokens - k)
            else:
                assert not on_policy.any()
                assert old[:k].tolist() == pytest.approx(scored(theta, r)[:k].tolist(), abs=1e-4)
            assert old[k:].tolist() == pytest.approx(scored(forgetful["model"], r)[k:].tolist(), abs=1e-4)
    assert found == len(late) > 1


def test_unlearning_is_over_those_that_finished(make_trainer, monkeypatch):
    """|O₁| counts them; streamed or not, the same gradient."""
    grads = []
    for streams in (True, False):
        trainer, *_ = run(make_trainer, train={"micro_batch_tokens": 40})
        if not streams:
            monkeypatch.setattr(Ahead, "stream", lambda *sizes: None)
        original = trainer.policy.forget

        def forget(engine, gradient, *arguments, _original=original, **options):
            grads.append({name: g.clone() for name, g in gradient.tensors.items()})
            raise InterruptedError

        trainer.policy.forget = forget
        with pytest.raises(InterruptedError):
            trainer.iteration()
    first, second = (torch.cat([g.flatten() for g in part.values()]) for part in grads)
    assert first.norm() > 0 and (first - second).norm() < 1e-5 * first.norm()


def test_a_closed_gate_lets_them_go_on_as_they_were(make_trainer):
    sizes = {"rollout": {"max_new_tokens": 40, "group_size": 8, "quorum": QUORUM}, "train": {"prompts_per_update": 4}}
    trainer = make_trainer(eepo={"alpha": 1e-9}, **sizes)
    batch, row = trainer.iteration()
    late = [r for r in batch.stage(1) if len(r.segments) > 1]
    assert row["unlearn/stragglers"] == len(late) / 16 and not any(r.num_before for r in late)
    assert late and row["unlearn/skipped"] == 1 and not any(v.forgotten for r in late for v in r.token_versions)
    assert row["policy/ratio_mean_stage1"] == pytest.approx(1, abs=1e-3)


def test_a_quorum_of_1_changes_nothing(make_trainer):
    rows = []
    for rollout in ({}, {"quorum": 1.0}):
        trainer = make_trainer(eepo=OPEN, rollout=rollout)
        model = copy.deepcopy(trainer.policy.model.state_dict())
        batch, row = trainer.iteration()
        rows.append(([r.token_ids for r in batch.rollouts], row["policy/loss"], row["unlearn/stragglers"]))
        trainer.policy.model.load_state_dict(model)
    assert rows[0] == rows[1] and rows[0][2] == 0


def test_grpo_waits_for_all(make_trainer):
    trainer = make_trainer(eepo={"enabled": False}, rollout={"max_new_tokens": 40, "group_size": 8})
    batch, _ = trainer.iteration()
    assert len(batch.rollouts) == 32 and not any(r.preempted for r in batch.rollouts)
    with pytest.raises(AssertionError):
        type(batch).of([Group(trainer.prompts[0], 0, batch.rollouts[1:8])], 8)


def test_each_batch_of_the_engine_has_its_quorum(make_engine, prompts):
    """Nobody is cut for standing in the last batch, and those who were cut have all begun."""
    requests = make_requests(prompts, 1, range(6), 0, 0)
    rollouts = make_engine(max_sequences=12).generate(requests, SAMPLING, None, None, QUORUM)
    cut = [r for r in rollouts if r.preempted]
    assert len({r.prompt.id for r in cut}) == 4 and min(r.num_tokens for r in cut) > 1


def test_what_went_on_counts_as_stage_two_from_there(make_trainer):
    trainer, *_ = run(make_trainer, train={"prompts_per_update": 4})
    batch, row = trainer.iteration()
    assert row["policy/ratio_mean_stage1"] == pytest.approx(1, abs=1e-6), "θ over θ"
    assert abs(row["policy/ratio_mean_stage2"] - 1) > 1e-5
    said = {1: [], 2: []}  # by the weights, whatever the stage that it began in
    for r in batch.rollouts:
        for logprob, version in zip(r.rollout_logprobs, r.token_versions, strict=True):
            said[2 if version.forgotten else 1].append(logprob)
    for stage, logprobs in said.items():
        assert row[f"entropy/stage{stage}"] == pytest.approx(-sum(logprobs) / len(logprobs))
    (late, *_) = (r for r in batch.stage(1) if r.num_before)
    assert late.token_stages == [1] * late.num_before + [2] * (late.num_tokens - late.num_before)


def test_a_step_a_prompt_needs_all_of_its_completions(test_config):
    with pytest.raises(UserError, match=r"rollout.quorum: expected 1 with eepo.reduction=prompt_sum, found 0.9"):
        test_config(rollout={"quorum": 0.9}, eepo={"reduction": "prompt_sum"})

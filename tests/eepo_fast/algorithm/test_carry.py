"""`rollout.carry`: what has not ended goes on in the next iteration; a group is trained on once, and whole."""

import collections
import copy
import datetime
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from eepo_fast.algorithm.in_flight import nearest, open_groups
from eepo_fast.checkpoint import changed_keys, load_checkpoint
from eepo_fast.checkpoint.groups import load_groups, save_groups
from eepo_fast.compare.runs import differing
from eepo_fast.config import Config, EepoConfig, RolloutConfig, make_config
from eepo_fast.data.prompts import completion_text
from eepo_fast.rollout.exchange import shared_out
from eepo_fast.run.build import about_carrying
from eepo_fast.run.log_files import log_rollouts
from eepo_fast.run.plan import num_iterations
from eepo_fast.types import Group, Rollout, Segment, TrainerState, UserError, WeightsVersion

ROLLOUT = {"max_new_tokens": 40, "group_size": 4, "quorum": 0.7, "carry": 1}
TRAIN = {"prompts_per_iteration": 4, "prompts_per_update": 4}
STOPS = [1, 5, 8, 9, 12]  # so that lengths differ
OPEN = {"alpha": 9.0, "learning_rate": 0.05}
METHODS = {"eepo": OPEN, "grpo": {"enabled": False}}


@pytest.fixture
def make_carrying(make_trainer, more_prompts):
    def make(method="eepo", total=None, **sections):
        sections = {"eepo": METHODS[method], **sections}
        rollout, train = ({**ROLLOUT, **sections.pop("rollout", {})}, {**TRAIN, **sections.pop("train", {})})
        trainer = make_trainer(rollout=rollout, train=train, **sections)
        trainer.total, trainer.prompts, trainer.stop_token_ids = total, more_prompts, STOPS
        return trainer

    return make


def places(groups):
    return [(g.begun, g.prompt.id, r.sample_index) for g in groups for r in g.rollouts]


@pytest.mark.parametrize("carry", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_every_answer_is_trained_on_once(make_carrying, method, carry):
    """Over a run with an end: none is lost, none is counted twice, and nothing is left."""
    total = 12
    ahead = 2 if carry == 1 else 6
    trainer = make_carrying(method, total, rollout={"carry": carry, "quorum": 0.9 - ahead / 10, "in_flight": ahead / 4})
    trained, carried, asked, oldest = [], 0, 16 + 4 * ahead, 0
    for step in range(total):
        batch, row = trainer.iteration()
        assert len(batch.rollouts) == 16 and not any(r.preempted for r in batch.rollouts)
        trained += [(r.begun, r.prompt.id, r.sample_index) for r in batch.rollouts]
        state = trainer.state
        assert state.step == step + 1 and row["rollout/held_groups"] == len(state.groups)
        assert len(state.groups) == min(ahead, 4 * (total - step - 1)), "those begun ahead, and at the end none"
        cut = [r for g in state.groups for r in g.rollouts if r.preempted]
        carried += len(cut)
        assert all(step - r.begun < carry for r in cut), "as often as it may, and no oftener"
        oldest = max([oldest, *(step - r.begun for r in cut)])
        assert row["rollout/carried_fraction"] == pytest.approx(len(cut) / asked)
        asked = 4 * (min(4 + ahead, 4 * (total - step - 1)) - len(state.groups)) + len(cut)
        ages = [step - r.begun for r in batch.rollouts]
        assert row["rollout/staleness_max"] == max(ages) <= carry and min(ages) >= 0
        assert row["rollout/staleness_mean"] <= row["rollout/staleness_max"]
    assert carried > 5 and not trainer.state.groups and (oldest > 0) == (carry > 1)
    counted = collections.Counter(trained)
    assert len(counted) == total * 16 and set(counted.values()) == {1}
    groups = {(begun, prompt) for begun, prompt, _ in trained}
    assert len(groups) == 4 * total and len({begun for begun, _ in groups}) > 9
    of = collections.Counter(prompt for _, prompt in groups)
    assert max(of.values()) - min(of.values()) <= 1, "epochs are whole"


def test_each_token_is_of_the_weights_that_sampled_it(make_carrying, tmp_path, scored):
    trainer, seen, several = make_carrying(optimizer={"learning_rate": 1e-2}), {}, 0
    forget = trainer.engine.forget

    def watched(gradient, **options):
        stats = forget(gradient, **options)
        seen[trainer.state.policy_version, True] = copy.deepcopy(trainer.engine.model)
        return stats

    trainer.engine.forget = watched
    for step in range(6):
        seen[trainer.state.policy_version, False] = copy.deepcopy(trainer.policy.model)
        batch, _ = trainer.iteration()
        for r in batch.rollouts:
            several += len({s.weights_version for s in r.segments}) > 2
            at = 0
            for segment in r.segments:
                now, count = seen[tuple(segment.weights_version)], len(segment.tokens)
                expected = scored(now, r)[at : at + count].tolist()
                assert segment.rollout_logprobs == pytest.approx(expected, abs=1e-4)
                at += count
            assert r.completion == completion_text(trainer.tokenizer, r.token_ids, STOPS)
            assert r.finished == (r.token_ids[-1] in STOPS) and (r.finished or r.num_tokens == 40)
            assert r.segment_stages == [2 if s.weights_version.forgotten else 1 for s in r.segments]
        log_rollouts(tmp_path, step + 1, batch, False, trainer.tokenizer)
        lines = (tmp_path / f"rollouts/step_{step + 1:06d}.jsonl").read_text().splitlines()
        logged = [json.loads(line)["segments"] for line in lines]
        assert logged == [[list(span) for span in r.spans] for r in batch.rollouts]
    assert several > 0, "of three kinds of weights and more"


def test_forgetting_is_of_what_theta_alone_has_sampled(make_carrying, monkeypatch):
    from eepo_fast.algorithm import iteration

    seen, compute = [], iteration.compute_unlearning
    monkeypatch.setattr(
        iteration, "compute_unlearning", lambda p, rs, *a, **o: seen.append(rs) or compute(p, rs, *a, **o)
    )
    trainer, carried = make_carrying(), 0
    for step in range(4):
        cut = [r for g in trainer.state.groups for r in g.rollouts if r.preempted]
        carried += len(cut)
        _, row = trainer.iteration()
        version = {s.weights_version for r in seen[-1] for s in r.segments}
        assert version == {WeightsVersion(step, False)} and all(r.begun == step for r in seen[-1])
        assert row["length/unlearned"] == pytest.approx(sum(r.num_tokens for r in seen[-1]) / len(seen[-1]))
    assert carried


def go(trainer, iterations):
    rows = []
    for _ in range(iterations):
        batch, row = trainer.iteration()
        said = [(r.begun, r.prompt.id, r.sample_index, r.segments, r.reward, r.advantage) for r in batch.rollouts]
        rows.append((said, {k: v for k, v in row.items() if not k.startswith("time/") and "per_second" not in k}))
    return rows


def same(first, second):
    for (said, row), (other, its) in zip(first, second, strict=True):
        assert said == other and row.keys() == its.keys()
        for key, value in row.items():
            assert value == its[key] or (math.isnan(value) and math.isnan(its[key])), key


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_goes_on_with_what_is_in_flight(make_carrying, save_checkpoint, tmp_path, method):
    """Bit for bit; and after an iteration that was interrupted, from its start."""
    settings = {"reference": True, "optimizer": {"learning_rate": 1e-2}, "log": {"token_details": True}}
    trainer = make_carrying(method, **settings)
    theta = copy.deepcopy(trainer.policy.model.state_dict())
    go(trainer, 3)
    assert any(r.preempted for g in trainer.state.groups for r in g.rollouts)
    folder = save_checkpoint(tmp_path / "run", trainer)
    original = trainer.grader.grade

    def interrupted(*arguments, **options):
        raise InterruptedError

    before = copy.deepcopy(trainer.state)
    trainer.grader.grade = interrupted
    with pytest.raises(InterruptedError):
        trainer.iteration()
    trainer.grader.grade = original
    assert [vars(r) for g in before.groups for r in g.rollouts] == [
        {**vars(r), "prompt": b.prompt}
        for g, h in zip(trainer.state.groups, before.groups, strict=True)
        for r, b in zip(g.rollouts, h.rollouts, strict=True)
    ]
    expected = go(trainer, 4)
    trainer.policy.model.load_state_dict(theta)
    resumed = make_carrying(method, **settings)
    resumed.reference.model.load_state_dict(theta)
    resumed.state = load_checkpoint(folder, resumed.policy)
    assert places(resumed.state.groups) == places(before.groups) and resumed.state.cursor == before.cursor
    same(go(resumed, 4), expected)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_iteration_is_done_again(make_carrying, method):
    """In whatever phase it was, and bit for bit: until the update nothing that the next one reads has changed."""

    class Stop(Exception):
        pass

    settings = {"reference": True, "eepo": {**METHODS[method], **({"max_kl": 1e-3} if method == "eepo" else {})}}
    settings |= {
        "log": {"token_details": True},
        "train": {"prompts_per_update": 2},
        "optimizer": {"learning_rate": 1e-2},
    }
    trainer, phases = make_carrying(method, **settings), []
    trainer.on_phase = phases.append
    theta = copy.deepcopy(trainer.policy.model.state_dict())
    expected = go(trainer, 4)
    names = set(phases)
    assert {"sync", "rollout_stage1", "reward", "update", "token_details", "old_logprobs", "ref_logprobs"} <= names
    assert ({"unlearn", "forget", "rollout_stage2", "kl_guard"} <= names) == (method == "eepo")
    trainer.policy.model.load_state_dict(theta)
    again, left = make_carrying(method, **settings), set(names)
    again.reference.model.load_state_dict(theta)

    def stops(phase):
        if phase in left:
            left.remove(phase)
            raise Stop

    again.on_phase, rows = stops, []
    while len(rows) < 4:
        try:
            rows += go(again, 1)
        except Stop:
            assert again.state.step == len(rows)
    assert not left
    same(rows, expected)


def test_carry_is_turned_off_after_what_is_in_flight(make_carrying, make_trainer):
    """It is finished and trained on first; then a run is as any without carry."""
    trainer = make_carrying()
    trained = [r for said, _ in go(trainer, 3) for r in said]
    flying = places(trainer.state.groups)
    assert flying
    trainer.config = make_carrying(rollout={"carry": 0, "quorum": 1.0}).config
    for step in range(3, 6):
        batch, row = trainer.iteration()
        assert math.isnan(row["rollout/carried_fraction"]) and not trainer.state.groups
        now = [(r.begun, r.prompt.id, r.sample_index) for r in batch.rollouts]
        assert set(flying) <= set(now) if step == 3 else {r.begun for r in batch.rollouts} == {step}
        trained += now
    counted = collections.Counter(place[:3] for place in trained)
    assert set(counted.values()) == {1} and len(counted) == 6 * 16


def test_a_step_taken_back_drops_every_token_of_it(make_carrying):
    """Of carried answers, too: they start again from what stage 1 had left of them."""
    trainer = make_carrying(rollout={"quorum": 0.3})
    go(trainer, 2)
    trainer.config = trainer.config.model_copy(
        update={"eepo": trainer.config.eepo.model_copy(update={"learning_rate": 1e3, "max_step": 1e30})}
    )
    ends, generate = [], trainer.engine.generate

    def watched(requests, *arguments):
        found = generate(requests, *arguments)
        ends.append((trainer.engine.weights_version, found))
        return found

    trainer.engine.generate = watched
    carried_on = 0
    for step in range(2, 8):
        ends.clear()
        batch, row = trainer.iteration()
        if not row["unlearn/resampled"]:
            continue
        rollouts = [*batch.rollouts, *(r for g in trainer.state.groups for r in g.rollouts)]
        forgetful = WeightsVersion(step, True)
        assert any(forgetful in r.token_versions for version, found in ends if version.forgotten for r in found)
        assert not any(forgetful in r.token_versions for r in rollouts)
        for r in rollouts:  # what the rejected weights had made of it was graded, too
            if not r.preempted:
                (grade,) = trainer.grader.grade([r.prompt.problem], [r.completion])
                assert r.completion == completion_text(trainer.tokenizer, r.token_ids, STOPS)
                assert r.reward == grade.reward
        first = {(r.begun, r.prompt.id, r.sample_index): r for r in ends[0][1]}
        for r in rollouts:
            if said := first.get((r.begun, r.prompt.id, r.sample_index)):
                assert r.segments[: len(said.segments)] == said.segments
                carried_on += said.begun < step and said.preempted
    assert carried_on > 0, "at least once"


def test_what_is_waited_for_are_the_groups_that_lack_least():
    def group(k, *ended):
        return Group(None, k, [Rollout(None, 1, i, [], e, preempted=not e) for i, e in enumerate(ended)])

    groups = [group(0, True, False), group(0, False, False), group(1, True, True), group(1, False, True)]
    for k, g in enumerate(groups):
        g.prompt = SimpleNamespace(id=str(k))
        for r in g.rollouts:
            r.prompt, r.begun = g.prompt, g.begun
    sampled = [r for g in groups for r in g.rollouts]
    one_each = {groups[0].rollouts[1], groups[3].rollouts[0]}
    assert nearest(groups, 1, sampled) == (set(), 0.0)
    assert nearest(groups, 2, sampled) == (one_each, 1 / 2), "either of them will do"
    assert nearest(groups, 3, sampled) == (one_each, 1.0)
    assert nearest(groups, 4, sampled) == ({r for r in sampled if r.preempted}, 3 / 4)


def test_engines_wait_together_for_as_many():
    """One that is missing is waited for on one engine, not on every one that has a part of what counts."""
    assert shared_out(1 / 8, [1] * 8) == [1] + [0] * 7
    for share, counted in ((0.3, [10, 0, 7]), (1.0, [3, 4]), (5 / 11, [1, 2, 8]), (0.01, [50, 49])):
        found = shared_out(share, counted)
        assert sum(found) == math.ceil(share * sum(counted) - 1e-9)
        assert all(abs(part - share * count) < 1 and part <= count for part, count in zip(found, counted, strict=True))


def test_the_file_of_what_is_in_flight(prompts, tmp_path):
    """All that is known, to the bit; a completion of no tokens and a number that is none, too."""
    first, second = WeightsVersion(3, False), WeightsVersion(3, True)
    segments = [Segment([5, 6], [-0.1, -math.pi], first), Segment([7], [-math.inf], second, 2)]
    whole = Rollout(prompts[0], 1, 0, segments, True, "a\ud800b", 0.1, "ok", begun=3)
    whole.ref_logprobs, whole.gate = [-1.0, -1e-300, -2.0], [1.0, 0.0, 1.0]
    cut = Rollout(prompts[0], 2, 1, [Segment([], [], second)], False, preempted=True, begun=3)
    missing = Rollout(prompts[1], 1, 0, [Segment([9], [-0.5], first)], True, "c", None, "timeout", begun=2)
    groups = [Group(prompts[1], 2, [missing]), Group(prompts[0], 3, [whole, cut])]
    save_groups(groups, tmp_path / "in_flight.safetensors")
    found = load_groups(tmp_path / "in_flight.safetensors")
    assert [(g.prompt, g.begun) for g in found] == [(g.prompt, g.begun) for g in groups]
    assert [vars(r) for g in found for r in g.rollouts] == [vars(r) for g in groups for r in g.rollouts]
    assert load_groups(tmp_path / "none") == []


def test_held_prompts_keep_their_rows_columns(tmp_path, prompts):
    """Of any type, dates too; a reward function of the resumed run sees them again."""
    problem = replace(prompts[0].problem, columns={"when": datetime.date(2026, 1, 2)})
    prompt = replace(prompts[0], problem=problem)
    save_groups([Group(prompt, 0, [])], tmp_path / "g")
    (plain,), (mine,) = load_groups(tmp_path / "g"), load_groups(tmp_path / "g", [prompt])
    assert plain.prompt == prompt and not plain.prompt.problem.columns
    assert mine.prompt.problem.columns == problem.columns


@pytest.mark.parametrize("carry, updates", [(1, 1), (3, 2)])
def test_the_kl_of_a_step_is_of_its_own_stage(make_carrying, carry, updates, scored):
    """Whatever is trained on: what its stage 2 began may all be held."""
    step = {"alpha": 9.0, "learning_rate": 0.05, "step": "kl", "target_kl": 0.02}
    trainer = make_carrying(
        eepo=step, rollout={"carry": carry, "in_flight": 1.0}, train={"prompts_per_update": 4 // updates}
    )
    forgot, forget = [], trainer.engine.forget

    def watched(gradient, **options):
        stats = forget(gradient, **options)
        forgot.append(copy.deepcopy(trainer.engine.model))
        return stats

    trainer.engine.forget, rates, of_others = watched, [], 0
    for k in range(6):
        theta = copy.deepcopy(trainer.policy.model)
        batch, row = trainer.iteration()
        everything = [*batch.rollouts, *(r for g in trainer.state.groups for r in g.rollouts)]
        own = [r for r in everything if r.begun == k and r.stage == 2]
        gaps = torch.cat([scored(forgot[-1], r) - scored(theta, r) for r in own])
        assert row["unlearn/kl"] == pytest.approx(gaps.mean().item(), abs=1e-5)
        assert row["unlearn/kl_low_variance"] == pytest.approx((gaps.neg().expm1() + gaps).mean().item(), abs=1e-5)
        assert trainer.state.forget_steps[-1] == (row["unlearn/learning_rate"], row["unlearn/kl_low_variance"])
        rates.append(row["unlearn/learning_rate"])
        of_others += all(r.begun < k for r in batch.rollouts)
    assert len(set(rates)) == 6 and of_others > 0


def test_the_last_iterations_begin_what_they_train_on(make_carrying, more_prompts):
    config = make_carrying().config
    sizes = []
    state = TrainerState()
    for step in range(5):
        state.step = step
        groups, state.cursor = open_groups(config, state, more_prompts, 5)
        sizes.append(sum(g.begun == step for g in groups))
        state.groups = groups[4:]
    assert sizes == [6, 4, 4, 4, 2] and sum(sizes) == 20 and not state.groups


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"rollout": {"carry": 1}}, r"rollout.carry: expected 0 with rollout.quorum=1, found 1: .*rollout.quorum=0.9"),
        ({"rollout": {"quorum": 0.9}, "eepo": {"enabled": False}}, r"rollout.quorum: expected 1 with one stage"),
        ({"rollout": {"quorum": 0.0}}, r"rollout.quorum: expected greater than 0, found 0.0"),
        (
            {"rollout": {"quorum": 0.9, "carry": 1}, "aepo": {"enabled": True}},
            r"rollout.carry: expected 0 with aepo.en",
        ),
        ({"rollout": {"quorum": 0.9, "carry": 1}, "eepo": {"reduction": "prompt_sum"}}, r"expected 1 with eepo.reduct"),
        ({"rollout": {"quorum": 0.9, "carry": 1}, "grpo": {"ratio": "policy"}}, r"grpo.ratio: expected decoupled"),
        ({"rollout": {"quorum": 0.9}, "eepo": {"direction": "temperature"}}, r"rollout.quorum: expected 1 with eepo.d"),
        ({"eepo": {"quorum": 0.9}}, r"config key eepo.quorum: is rollout.quorum now, found the old name; rename it"),
    ],
)
def test_mistakes_are_named(test_config, sections, message):
    with pytest.raises(UserError, match=message):
        test_config(**sections)


def test_the_ratio_goes_with_carry(test_config):
    waits = {"quorum": 0.9, "carry": 1}
    assert test_config().grpo.ratio == "sampler" and test_config(rollout=waits).grpo.ratio == "decoupled"
    assert test_config(rollout=waits, grpo={"ratio": "sampler"}).grpo.ratio == "sampler"
    assert test_config(rollout=waits, grpo={"ratio_cap": 3.0}).grpo.ratio_cap == 3.0
    saved = test_config().model_dump()
    assert changed_keys(saved, test_config(rollout=waits)) == []
    assert changed_keys(saved, test_config(grpo={"ratio": "decoupled"})) == ["grpo.ratio"]
    assert changed_keys(test_config(rollout=waits).model_dump(), test_config()) == []
    of_policy = test_config(grpo={"ratio": "policy"})
    assert changed_keys(test_config(rollout=waits).model_dump(), of_policy) == ["grpo.ratio"]
    assert changed_keys(of_policy.model_dump(), test_config(rollout=waits)) == ["grpo.ratio"]
    assert changed_keys(saved, test_config(rollout={"quorum": 0.9})) == ["rollout.quorum"]
    more = test_config(rollout={**waits, "in_flight": 1.0, "carry": 2})
    assert changed_keys(test_config(rollout=waits).model_dump(), more) == ["rollout.in_flight"]
    made = Config(
        model=test_config().model,
        data=test_config().data,
        rollout=RolloutConfig(group_size=4, **waits),
        eepo=EepoConfig(),
    )
    assert made.grpo.ratio == "decoupled" and made.rollout.group_size == 4


def test_what_a_run_says_of_carrying(test_config):
    waits, groups = {"quorum": 0.9, "carry": 1}, [Group(None, 0)] * 3

    def said(config, groups=(), total=2):
        return [line.partition(": ")[0] for line in about_carrying(config, TrainerState(step=2, groups=groups), total)]

    assert said(test_config(rollout=waits), groups) == said(test_config()) == []
    assert said(test_config(), groups) == ["rollout.carry=0"]
    assert said(test_config(rollout=waits), groups, total=3) == ["train.iterations=2"]
    assert said(test_config(rollout=waits, grpo={"ratio": "sampler"})) == ["grpo.ratio=sampler"]


def test_keys_of_carry_go_with_it():
    base = {"model": {"path": "m"}, "data": {"train": "arithmetic"}}
    carrying = {**base, "rollout": {"quorum": 0.9, "carry": 1, "in_flight": 0.25}, "grpo": {"ratio_cap": 3.0}}
    said = []
    config = make_config(carrying, {"rollout": {"carry": 0}}, say=said.append)
    assert config.grpo.ratio == "sampler"
    assert said == [
        "rollout.carry=0: rollout.in_flight of an earlier file left out",
        "grpo.ratio=sampler: grpo.ratio_cap of an earlier file left out",
    ]
    assert make_config(carrying).grpo.ratio_cap == 3.0
    with pytest.raises(UserError, match=r"grpo.ratio_cap: expected grpo.ratio=decoupled with it, found sampler"):
        make_config(base, {"grpo": {"ratio_cap": 3.0}})
    explicit, capped = (
        {"grpo": {"ratio": "sampler"}},
        {"rollout": {"quorum": 0.9, "carry": 1}, "grpo": {"ratio_cap": 3.0}},
    )
    for sources in ([base, explicit, capped], [base, {"rollout": {"carry": 0}, "grpo": {"ratio_cap": 3.0}}]):
        with pytest.raises(UserError, match=r"grpo.ratio_cap: expected grpo.ratio=decoupled with it, found sampler"):
            make_config(*sources)
    off = {**base, "rollout": {"carry": 0}, "grpo": {"ratio_cap": 3.0}}
    assert make_config(off, {"rollout": {"quorum": 0.9, "carry": 1}}).grpo.ratio_cap == 3.0
    assert make_config(off, {"grpo": {"ratio": "decoupled"}}).grpo.ratio_cap == 3.0
    decoupled = {**carrying, "grpo": {"ratio": "decoupled"}}
    assert make_config(decoupled, {"rollout": {"carry": 0}, "grpo": {"ratio_cap": 3.0}}).grpo.ratio == "decoupled"
    with pytest.raises(UserError, match=r"rollout.in_flight: expected greater than 0, found 0"):
        make_config(carrying, {"rollout": {"in_flight": 0}})


def test_more_prompts_at_once_than_there_are(test_config):
    config = test_config(rollout={"quorum": 0.9, "carry": 1}, train={"prompts_per_iteration": 8, "iterations": None})
    with pytest.raises(
        UserError, match=r"rollout.in_flight: expected at most 12 prompts begun at once .* among the 11"
    ):
        num_iterations(config, 11)
    assert num_iterations(config, 12) == 1 and num_iterations(config, 20) == 2
    epochs = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 2})})
    assert num_iterations(epochs, 12) == 3, "nothing is dropped at an epoch's end"


@pytest.mark.parametrize("in_flight", [0.5, 1.75])
@pytest.mark.parametrize("num_prompts", [12, 13, 18])
@pytest.mark.parametrize("carries", [(1, 1), (1, 0), (0, 1), (0, 0), (1, 0, 1), (0, 1, 0)])
def test_a_run_ends_when_its_epochs_do(test_config, num_prompts, carries, in_flight):
    """However often carry is turned on and off, after every iteration: whatever was begun is trained on, and no prompt
    oftener than there are epochs."""
    configs = {
        carry: test_config(
            rollout={"quorum": 0.9, "carry": 1, "in_flight": in_flight} if carry else {},
            train={**TRAIN, "iterations": None, "epochs": 3},
        )
        for carry in (0, 1)
    }
    prompts = [SimpleNamespace(id=str(k)) for k in range(num_prompts)]
    for turn in range(1, 9):
        state, trained = TrainerState(), []
        for phase, carry in enumerate(carries):
            config = configs[carry]
            total = num_iterations(config, num_prompts, state)
            stop = total if phase == len(carries) - 1 else min(total, state.step + turn)
            while state.step < stop:
                groups, state.cursor = open_groups(config, state, prompts, total)
                trained += groups[:4]
                state.groups, state.step = groups[4:], state.step + 1
        assert not state.groups and len(trained) == 4 * state.step == 4 * total
        counts = collections.Counter(g.prompt.id for g in trained)
        assert len({(g.begun, g.prompt.id) for g in trained}) == len(trained)
        assert max(counts.values()) <= 3
        dropped = 3 * num_prompts - len(trained)
        assert dropped <= 3 + (3 * (num_prompts % 4) if 0 in carries else 0), "less than a batch, at an epoch's end"


def test_what_is_in_flight_prolongs_a_run_cut_short(make_carrying, more_prompts):
    """`train.iterations` below what is done: the groups in flight are trained on all the same."""
    trainer = make_carrying()
    go(trainer, 3)
    shorter = trainer.config.model_copy(update={"train": trainer.config.train.model_copy(update={"iterations": 2})})
    assert trainer.state.groups and num_iterations(shorter, len(more_prompts), trainer.state) == 4
    trainer.total = 4
    go(trainer, 1)
    assert not trainer.state.groups and num_iterations(shorter, len(more_prompts), trainer.state) == 4


def test_an_iteration_that_forgets_nothing_leaves_the_window(make_carrying):
    """The last one may begin no prompt of its own: of nobody there is no entropy."""
    trainer = make_carrying(total=3, rollout={"in_flight": 1.0}, eepo={**OPEN, "gate": "iteration"})
    go(trainer, 2)
    before = list(trainer.state.entropy_window)
    (_, row), *_ = go(trainer, 1)
    assert trainer.state.entropy_window == before and len(before) == 2 and all(entropy > 0 for entropy in before)
    assert row["unlearn/applied"] == 0 and math.isnan(row["length/unlearned"])


def test_a_result_of_another_way_of_waiting_is_another_run(test_config):
    waits = {"quorum": 0.9, "carry": 1}
    saved = test_config().model_dump()
    older = {**saved, "rollout": {k: v for k, v in saved["rollout"].items() if k not in ("quorum", "carry")}}
    assert differing(saved, test_config()) == differing(older, test_config()) == []
    changed = ["rollout.quorum", "rollout.carry", "rollout.in_flight", "grpo.ratio"]
    assert differing(saved, test_config(rollout=waits)) == differing(older, test_config(rollout=waits)) == changed
    older = {**older, "eepo": {**older["eepo"], "quorum": 0.5}}
    assert differing(older, test_config()) == ["rollout.quorum"]
    assert differing(older, test_config(rollout={"quorum": 0.5})) == []
    assert changed_keys(older, test_config(rollout={"quorum": 0.5})) == []

"""Groups from which nothing can be learned are left out, counted, and made up for in the next iteration."""

import pytest
import torch

from eepo_fast.checkpoint import load_checkpoint
from eepo_fast.run.plan import num_iterations
from eepo_fast.types import Grade

DYNAMIC = {"dynamic_sampling": True}


class Grader:
    """Rewards by the parity of a completion's length, but equal in the groups of the prompts that it is told."""

    beside_sampling = False

    def __init__(self, useless=()):
        self.useless = set(useless)

    def start(self):
        pass

    def grade(self, problems, completions, *, seconds=None):
        return [
            Grade(0.0 if p.id in self.useless else float(len(c) % 2), "ok", 0.0)
            for p, c in zip(problems, completions, strict=True)
        ]


@pytest.fixture
def make(make_trainer, more_prompts):
    def of(useless, **sections):
        trainer = make_trainer(
            grader=Grader(useless), rollout={"group_size": 8, "max_new_tokens": 12, **sections.pop("rollout", {})},
            grpo={**DYNAMIC, **sections.pop("grpo", {})}, **sections,
        )  # fmt: skip
        trainer.prompts, trainer.stop_token_ids = more_prompts, [1, 5, 8, 9, 12]  # answers of many lengths
        return trainer

    return of


def watch_gradients(trainer):
    """The policy's gradient at each of its steps."""
    gradients, step = [], trainer.policy.step

    def watched():
        gradients.append(torch.cat([p.grad.flatten().clone() for p in trainer.policy.model.parameters()]))
        return step()

    trainer.policy.step = watched
    return gradients


def ids(batch):
    return [group[0].prompt.id for group in batch.groups()]


@pytest.mark.parametrize("eepo", [True, False])
def test_useless_groups_are_made_up_for(make, more_prompts, eepo):
    """A quarter of the groups are useless, and begun for nothing: four an iteration are trained on all the same."""
    useless = [p.id for p in more_prompts[::4]]
    trainer = make(useless, eepo={"enabled": eepo})
    debts, trained, begun = [], [], []
    for _ in range(12):
        before = trainer.state.missing
        batch, row = trainer.iteration()
        assert len(set(ids(batch))) == len(ids(batch)) == 4 + before <= 8
        expected = [g for g in batch.groups() if any(r.advantage for r in g)]
        assert row["group/filtered"] == len(batch.groups()) - len(expected)
        assert {g[0].prompt.id for g in batch.groups()} & set(useless) <= {
            g[0].prompt.id for g in batch.groups() if g not in expected
        }
        debts.append(trainer.state.missing)
        trained.append(len(expected))
        begun += ids(batch)
    assert sum(trained) == 4 * 12 - debts[-1] and 0 < max(debts) <= 4, "none is owed, but what the last one lacks"
    assert {begun.count(p.id) for p in more_prompts} <= {len(begun) // 12, -(-len(begun) // 12)}, (
        "an epoch has each once"
    )


def test_the_gradient_is_of_the_useful_groups_alone(make, more_prompts, tiny_model):
    """As if the others had never been there."""
    start, found = {k: v.clone() for k, v in tiny_model.state_dict().items()}, []
    for dynamic in (True, False):
        tiny_model.load_state_dict(start)
        trainer = make([more_prompts[0].id, more_prompts[1].id], grpo={"dynamic_sampling": dynamic},
                       eepo={"enabled": False}, train={"prompts_per_update": 4})  # fmt: skip
        trainer.prompts = more_prompts[:4]
        gradients = watch_gradients(trainer)
        batch, _ = trainer.iteration()
        tokens = [r.num_tokens for r in batch.rollouts]
        useful = [r.num_tokens for g in batch.groups() if any(o.advantage for o in g) for r in g]
        found.append((gradients[0], sum(useful), sum(tokens)))
    (dynamic, useful, _), (plain, _, every) = found
    assert torch.allclose(dynamic, plain * every / useful, rtol=1e-4, atol=1e-7) and useful < every


def test_an_iteration_without_a_useful_group_updates_nothing(make, more_prompts, tiny_model):
    trainer = make([p.id for p in more_prompts])
    before = [p.detach().clone() for p in tiny_model.parameters()]
    for missing in (4, 4):
        batch, row = trainer.iteration()
        assert trainer.state.missing == missing and row["group/filtered"] == len(batch.groups())
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_model.parameters(), strict=True))
    assert trainer.state.policy_version == 0 and trainer.state.step == 2 and row["policy/updates_skipped"] == 0


def test_with_carry_a_debt_is_paid_back(make, more_prompts):
    """One useless iteration, and all useful from then on: what is open comes down to what it would be."""
    trainer = make([], rollout={"carry": 1, "quorum": 0.5})
    grade, trainer.grader.grade = trainer.grader.grade, lambda ps, cs, **k: [Grade(0.0, "ok", 0.0) for _ in cs]
    trainer.iteration()
    owed = [trainer.state.missing]
    trainer.grader.grade = grade
    for _ in range(6):
        trainer.iteration()
        owed.append(trainer.state.missing)
    assert owed[0] == 4 and owed[-1] < 2 and len(trainer.state.groups) <= 6


def test_a_resumed_run_is_as_long(make, more_prompts):
    """However far it has come through its prompts: they are begun faster than they are trained on."""
    trainer = make([p.id for p in more_prompts[::2]], train={"iterations": 99, "epochs": 4})
    fresh = num_iterations(trainer.config, len(more_prompts))
    for _ in range(4):
        trainer.iteration()
        assert num_iterations(trainer.config, len(more_prompts), trainer.state) == fresh == 12
    assert trainer.state.cursor.epoch * 12 + trainer.state.cursor.position > 4 * 4


def test_long_answers_do_not_make_a_group_useful(make, more_prompts):
    """Which has shaped rewards that differ, and an answer as right as the others."""
    reward = {"overlong_share": 0.9}
    trainer = make([p.id for p in more_prompts], reward=reward)
    batch, row = trainer.iteration()
    assert any(r.advantage for r in batch.rollouts) and row["group/filtered"] == len(batch.groups())
    assert row["group/all_equal_fraction"] == 1 and row["reward/overlong"] > 0


def test_with_carry_the_oldest_useful_groups_are_trained_on(make, more_prompts):
    trainer = make([more_prompts[0].id, more_prompts[5].id], rollout={"carry": 1, "quorum": 0.5})
    seen, carried = [], 0.0
    for _ in range(8):
        batch, row = trainer.iteration()
        carried += row["rollout/carried_fraction"]
        trained = [g for g in batch.groups() if any(r.advantage for r in g)]
        begun = [g[0].begun for g in trained]
        assert (
            begun == sorted(begun) and len(trained) <= 4 and row["group/filtered"] == len(batch.groups()) - len(trained)
        )
        held = {(g.begun, g.prompt.id) for g in trainer.state.groups}
        done = {(g[0].begun, g[0].prompt.id) for g in batch.groups()}
        assert not held & done
        seen += done
    assert len(set(seen)) == len(seen) and carried > 0, "none is trained on, or left out, twice"


@pytest.mark.parametrize("seed", range(4))
def test_with_carry_the_run_s_end_leaves_nothing_in_flight(make, more_prompts, seed):
    trainer = make(
        [p.id for p in more_prompts[::2]], rollout={"carry": 2, "quorum": 0.4, "max_new_tokens": 24},
        run={"seed": seed},
    )  # fmt: skip
    trainer.total, owed, carried = 5, [], 0.0
    for _ in range(trainer.total):
        row = trainer.iteration()[1]
        owed.append(trainer.state.missing)
        carried += row["rollout/carried_fraction"]
    assert max(owed) > 0 < carried and not trainer.state.groups


def test_what_is_missing_is_in_the_checkpoint(make, more_prompts, save_checkpoint, tmp_path):
    trainer = make([p.id for p in more_prompts[::2]])
    trainer.iteration()
    assert trainer.state.missing > 0
    folder = save_checkpoint(tmp_path / "run", trainer)
    assert load_checkpoint(folder, trainer.policy, trainer.prompts).missing == trainer.state.missing


def test_without_it_all_groups_are_trained_on(make, more_prompts):
    """The control."""
    trainer = make([p.id for p in more_prompts[::2]], grpo={"dynamic_sampling": False})
    rows = [trainer.iteration()[1] for _ in range(3)]
    assert all(row["group/filtered"] == 0 for row in rows) and trainer.state.missing == 0

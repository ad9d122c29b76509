"""Advantages against float64 formulas that are written another way, and against peers' own numbers."""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from eepo_fast.algorithm.advantages import ADVANTAGES, EPSILON, group_advantages, overlong_penalty, set_advantages
from eepo_fast.config import GrpoConfig
from eepo_fast.config.checks import ADVANTAGES as KNOWN
from eepo_fast.types import RolloutBatch, UserError

PEERS = json.loads((Path(__file__).parent / "peers" / "numbers.json").read_text())
GROUPS = [
    [1.0, 0.0, 0.0, 1.0, 0.0, 0.0],
    [1.0, None, 0.0, 0.0, None, 1.0, 1.0],
    [0.0, 0.0, 0.0, 0.0, 0.0],
    [1.0, 1.0, 1.0],
    [None, 1.0, None],
    [None, None],
    [0.25, -0.5, 1.0, 0.1],
]


def expected_advantage(name, known, likelihoods, config):
    """Of known rewards alone. likelihoods: mean log-probs."""
    n, mean = len(known), math.fsum(known) / len(known) if known else math.nan
    if name == "nsr":
        return [config.positive_weight if r > 0 else -1.0 for r in known]
    if n < 2 or len(set(known)) == 1:
        return [0.0] * n
    if name == "dr_grpo":
        return [r - mean for r in known]
    if name == "rloo":
        return [r - statistics.fmean(known[:i] + known[i + 1 :]) for i, r in enumerate(known)]
    if name == "unlikeliness":
        ranks = [sum(other < own for other in likelihoods) for own in likelihoods]
        lower = [1 - config.rank_penalty * rank / n for rank in ranks]
        known = [r * f if r > 0 else r for r, f in zip(known, lower, strict=True)]
        mean = math.fsum(known) / n
    if name in ("group", "unlikeliness"):
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in known) / (n - 1))
        return [(r - mean) / (std + EPSILON) for r in known]
    assert name == "pass_at_k"
    if n < config.pass_k:
        return [0.0] * n
    # every group of k is looked at, and each completion gets the mean of those that it is in
    groups = [*itertools.combinations(range(n), config.pass_k)]
    rewards = [float(any(known[i] > 0 for i in g)) for g in groups]
    centre, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    if spread == 0:
        return [0.0] * n
    return [
        statistics.fmean((r - centre) / spread for r, g in zip(rewards, groups, strict=True) if i in g)
        for i in range(n)
    ]


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("rewards", GROUPS, ids=range(len(GROUPS)))
def test_an_advantage_against_its_formula(make_rollouts, name, rewards):
    config = GrpoConfig(advantage=name, pass_k=2)
    rollouts = make_rollouts([1 + 3 * (i % 3) for i in range(len(rewards))])  # of one token, too
    found = ADVANTAGES[name](rewards, rollouts, config)
    kept = [i for i, r in enumerate(rewards) if r is not None]
    likelihoods = [statistics.fmean(rollouts[i].rollout_logprobs) for i in kept]
    expected = expected_advantage(name, [rewards[i] for i in kept], likelihoods, config)
    assert [found[i] for i in kept] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert all(found[i] == 0 for i in range(len(rewards)) if i not in kept), "a missing reward is no zero"


def test_each_advantage_is_one_of_its_own(make_rollouts):
    """The control: no two are the same, and the configuration knows them all."""
    rollouts, rewards = make_rollouts([2, 3, 4, 5, 6, 7]), [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    found = [tuple(f(rewards, rollouts, GrpoConfig())) for f in ADVANTAGES.values()]
    assert len(set(found)) == len(ADVANTAGES) == len(KNOWN) and [*ADVANTAGES] == [*KNOWN]


@pytest.mark.parametrize(
    "case", [c for c in PEERS["cases"] if c["name"].startswith("advantage/")], ids=lambda c: c["name"]
)
def test_advantages_are_those_of_a_peer(make_rollouts, case):
    name = {"grpo": "group"}.get(short := case["name"].partition("/")[2], short)
    for group, expected in case["value"].items():
        rewards = PEERS["inputs"]["rewards"][group]
        found = ADVANTAGES[name](rewards, make_rollouts([2] * len(rewards)), GrpoConfig())
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_equal_or_lone_rewards_give_no_gradient():
    assert group_advantages([1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]
    assert group_advantages([1.0, None, None]) == [0.0, 0.0, 0.0]
    with_gap, without = group_advantages([1.0, None, 0.0, 0.0]), group_advantages([1.0, 0.0, 0.0])
    assert [with_gap[0], *with_gap[2:]] == without


def test_of_right_answers_the_unlikely_get_more(make_rollouts):
    rollouts = make_rollouts([4, 4, 4, 4])
    found = ADVANTAGES["unlikeliness"]([1.0, 1.0, 1.0, 0.0], rollouts, GrpoConfig())
    likelihood = [statistics.fmean(r.rollout_logprobs) for r in rollouts]
    order = sorted(range(3), key=lambda i: likelihood[i])
    assert found[order[0]] > found[order[1]] > found[order[2]] > found[3]


@pytest.mark.parametrize(("length", "taken"), [(1, 0), (60, 0), (70, 0.125), (100, 0.5), (140, 0.5)])
def test_long_answers_lose_in_a_straight_line(test_config, make_rollouts, length, taken):
    config = test_config(reward={"overlong_share": 0.4, "overlong_penalty": 0.5}, rollout={"max_new_tokens": 100})
    assert overlong_penalty(length, config) == taken
    assert overlong_penalty(length, test_config(rollout={"max_new_tokens": 100})) == 0
    batch = RolloutBatch(make_rollouts([length, 3, 3, 3]), 4)
    batch.rollouts[1].reward = None
    set_advantages(batch, config)
    assert [r.reward for r in batch.rollouts] == [0.0, None, 0.0, 0.0], "what is logged stays what it was"
    assert (batch.rollouts[0].advantage < 0) == (taken > 0) and batch.rollouts[1].advantage == 0


OWN = """
def halves(rewards, rollouts, config):
    return [0.5 if r else -0.5 for r in rewards]

def short(rewards, rollouts, config):
    return [1.0]

def endless(rewards, rollouts, config):
    return [float("inf")] * len(rewards)
"""


DATACLASS = """
from dataclasses import dataclass

@dataclass
class Settings:
    weight: "float" = 1.0
"""


def test_an_advantage_of_ones_own(test_config, make_rollouts, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    batch = RolloutBatch(make_rollouts([2, 2, 2, 2]), 4)
    for r, reward in zip(batch.rollouts, (1.0, 0.0, None, 0.0), strict=True):
        r.reward = reward
    set_advantages(batch, test_config(grpo={"advantage": f"{path}:halves"}))
    assert [r.advantage for r in batch.rollouts] == [0.5, -0.5, 0.0, -0.5]
    path.write_text(OWN + "\ndef broken(rewards, rollouts, config):\n    return [r - 1 for r in rewards]\n")
    with pytest.raises(UserError, match=r"has no attr"):  # a file is read once
        set_advantages(batch, test_config(grpo={"advantage": f"{path}:broken"}))
    other = tmp_path / "elsewhere" / "mine.py"
    other.parent.mkdir()
    other.write_text(path.read_text() + DATACLASS)
    with pytest.raises(UserError, match=r"broken raises TypeError: .* \(mine.py, line \d+\); mend that"):
        set_advantages(batch, test_config(grpo={"advantage": f"{other}:broken"}))
    for name, words in (("short", r"expected 4 finite numbers"), ("endless", r"found \[inf"), ("none", "has no attr")):
        with pytest.raises(UserError, match=words):
            set_advantages(batch, test_config(grpo={"advantage": f"{path}:{name}"}))

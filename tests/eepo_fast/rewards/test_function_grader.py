"""`reward.function`: a user's own reward, its failures, and its names."""

import json
import logging
import math
from pathlib import Path

import pytest

from eepo_fast.cli import main
from eepo_fast.config import RewardConfig
from eepo_fast.rewards import make_grader
from eepo_fast.types import Problem, UserError

ROOT = Path(__file__).parents[3]
MODULE = """
import math

def by_length(problem, completion):
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "nan":
        return math.nan
    if completion == "none":
        return None
    return len(completion) / 10

def half(problem, completion):
    return 0.5

number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "rewards_under_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_grades_and_what_fails_is_missing(caplog):
    grader = make_grader("arithmetic", RewardConfig(function="rewards_under_test:by_length"))
    texts = ["abc", "raise", "nan", "none", "abcde"]
    with caplog.at_level(logging.WARNING):
        grades = grader.grade([Problem("p", "", "1")] * 5, texts)
    assert [(g.reward, g.status) for g in grades] == [
        (0.3, "ok"), (0.0, "error"), (0.0, "error"), (0.0, "error"), (0.5, "ok"),
    ]  # fmt: skip
    assert len(caplog.records) == 1 and "KeyError" in caplog.text and "counted as a missing reward" in caplog.text
    assert grader.unreadable(["whatever"]) == [] and all(math.isfinite(g.seconds) for g in grades)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rewards_under_test", "expected module:function"),
        ("not_there:grade", "not_there:grade cannot be imported"),
        ("rewards_under_test:nothing", "cannot be imported"),
        ("rewards_under_test:number", "expected a function, found that rewards_under_test:number is a int"),
    ],
)
def test_names_that_are_wrong(name, message, tmp_path, capsys):
    with pytest.raises(UserError, match=message):
        make_grader("arithmetic", RewardConfig(function=name))
    arguments = [str(ROOT / "configs/demo.yaml"), f"reward.function={name}", f"run.root={tmp_path / 'runs'}"]
    assert main(["train", *arguments]) == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_is_trained_on_it(tmp_path):
    small = [
        "train.iterations=1",
        "train.prompts_per_iteration=4",
        "train.prompts_per_update=4",
        "rollout.group_size=4",
    ]
    arguments = [str(ROOT / "configs/demo.yaml"), "reward.function=rewards_under_test:half", f"run.root={tmp_path}"]
    assert main(["train", *arguments, "run.name=r", "train.iterations=1", *small]) == 0
    row = json.loads((tmp_path / "r/metrics.jsonl").read_text())
    assert row["reward/mean"] == 0.5 and row["group/all_equal_fraction"] == 1.0

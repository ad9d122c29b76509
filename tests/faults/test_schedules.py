"""Runs whose learning rate falls: what metrics.jsonl has of it, and where a resumed run is longer or shorter."""

import math
import shutil

import pytest

from eepo_fast.checkpoint import remove_newer
from eepo_fast.run import build
from eepo_fast.run.display import Display

SCHEDULE = ("optimizer.schedule=cosine", "optimizer.min_learning_rate=1e-5", "optimizer.warmup_steps=3")


def last_rates(iterations):
    """The rate of each iteration's last update, of two: 1e-3 after three updates, 1e-5 after all."""
    rates = []
    for update in range(1, 2 * iterations, 2):
        done = (update - 3) / (2 * iterations - 3)
        factor = (update + 1) / 4 if update < 3 else (1 + math.cos(math.pi * done)) / 2
        rates.append(factor * 1e-3 if update < 3 else 1e-5 + factor * (1e-3 - 1e-5))
    return rates


@pytest.fixture
def logged(outcome):
    return lambda run_dir: [row["policy/learning_rate"] for row in outcome(run_dir)[0]]


@pytest.fixture
def cut_back(tmp_path):
    """A copy of a run as it was when checkpoint `step` was the newest."""

    def cut(run_dir, step, to):
        target = tmp_path / to / run_dir.name
        shutil.copytree(run_dir, target)
        remove_newer(target, step)
        (target / "ended.json").unlink()

    return cut


@pytest.fixture
def go_on():
    """Resume; what was said."""

    def run(config):
        said, display = [], Display.silent()
        display.say = said.append
        build.train(config, resume=True, display=display)
        return [line for line in said if "optimizer." in line]

    return run


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_run_is_logged_with_its_rates(make_run, go, logged, engine):
    pytest.importorskip("deepspeed" if engine == "deepspeed" else "torch")
    engine = f"train.engine={engine}"
    assert logged(go(make_run(*SCHEDULE, engine))) == pytest.approx(last_rates(6), rel=1e-12)
    constant = logged(go(make_run("optimizer.warmup_steps=3", engine, root="constant")))
    assert constant == [0.5e-3, *[1e-3] * 5]


def test_a_resumed_run_follows_its_new_length(make_run, go, go_on, logged, cut_back, outcome):
    config = make_run(*SCHEDULE)
    whole = outcome(go(config))
    cut_back(config.run_dir, 3, "same")
    cut_back(config.run_dir, 3, "shorter")
    same, shorter = make_run(*SCHEDULE, root="same"), make_run(*SCHEDULE, "train.iterations=4", root="shorter")
    assert go_on(same) == [] and outcome(same.run_dir) == whole
    line = (
        "optimizer.schedule=cosine: the run ends after iteration {} and no longer after 6; from here on the learning "
    )
    line += "rate is that of a run of {}"
    assert go_on(shorter) == [line.format(4, 4)]
    assert logged(shorter.run_dir) == pytest.approx(last_rates(6)[:3] + last_rates(4)[3:], rel=1e-12)
    longer = make_run(*SCHEDULE, "train.iterations=8")
    assert go_on(longer) == [line.format(8, 8)], "of a run that was finished"
    assert logged(longer.run_dir) == pytest.approx(last_rates(6) + last_rates(8)[6:], rel=1e-12)


def test_what_is_in_flight_leaves_the_end_where_it_was(make_run, go, go_on, logged, cut_back):
    carry = (*SCHEDULE, "rollout.carry=1", "rollout.quorum=0.5", "train.iterations=null", "train.epochs=2")
    config = make_run(*carry)
    assert logged(go(config)) == pytest.approx(last_rates(8), rel=1e-12)
    for step in (3, 4, 7):
        cut_back(config.run_dir, step, f"from{step}")
        again = make_run(*carry, root=f"from{step}")
        assert go_on(again) == [] and logged(again.run_dir) == logged(config.run_dir)


def test_another_number_of_updates_ends_elsewhere(make_run, go, go_on, outcome, cut_back, monkeypatch):
    """Negative control: an end that is one iteration off, in a run and where it goes on."""
    config = make_run(*SCHEDULE, "train.iterations=3")
    whole = outcome(go(config))
    cut_back(config.run_dir, 2, "wrong")
    right = build.num_updates
    monkeypatch.setattr(build, "num_updates", lambda config, total: right(config, total + 1))
    wrong = make_run(*SCHEDULE, "train.iterations=3", root="wrong")
    go_on(wrong)
    rows, bits = outcome(wrong.run_dir)
    assert rows[:2] == whole[0][:2] and bits != whole[1]
    assert rows[2]["policy/learning_rate"] != pytest.approx(last_rates(3)[2], rel=0.01)


def test_a_run_that_never_leaves_its_warm_up_says_so(make_run, go_on):
    found = go_on(make_run(*SCHEDULE, "train.iterations=1"))
    assert found == [
        "optimizer.schedule=cosine: the run's 2 updates are all among optimizer.warmup_steps=3, and the learning rate "
        "never falls; lower it"
    ]


def test_another_schedule_is_another_run(make_run, go, go_on):
    go(make_run(*SCHEDULE, "train.iterations=1"))
    with pytest.raises(
        build.UserError, match=r"--resume: .* in optimizer\.schedule, optimizer\.min_learning_rate; set"
    ):
        go_on(make_run("optimizer.schedule=linear", "optimizer.warmup_steps=3", "train.iterations=2"))

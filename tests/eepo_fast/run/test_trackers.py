"""Trackers get every number, and none of them can stop or hold up a run."""

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eepo_fast.cli import main
from eepo_fast.run import trackers
from eepo_fast.run.trackers import Trackers, chosen
from eepo_fast.types import UserError

ROOT = Path(__file__).parents[3]


class Recorder:
    def __init__(self, step):
        self.rows, self.closed = [], False

    def log(self, values, step):
        self.rows.append((step, values))

    def close(self):
        self.closed = True


def test_every_number_arrives_and_what_is_none_is_left_out():
    found, complaints = [], []

    def start(step):
        found.append(Recorder(step))
        return found[0]

    with Trackers({"one": start}, 0, complaints.append) as logged:
        for step in (1, 2):
            logged.log({"step": step, "reward/mean": 0.5, "entropy/stage2": math.nan, "reward/missing": None}, step)
    assert found[0].rows == [(s, {"step": float(s), "reward/mean": 0.5}) for s in (1, 2)]
    assert found[0].closed and not complaints


class Dead(Recorder):
    def log(self, values, step):
        raise ConnectionError("no route\nto the server")


class Leaver(Recorder):
    def __init__(self, step):
        raise SystemExit("not logged in")


class LateFailure(Recorder):
    def close(self):
        raise OSError("disk full")


@pytest.mark.parametrize(
    ("dead", "reason"),
    [(Dead, "ConnectionError: no route to the server"), (Leaver, "SystemExit: not logged in"), (LateFailure, "full")],
)
def test_a_dead_tracker_is_said_once(dead, reason):
    complaints, alive = [], Recorder(0)
    with Trackers({"dead": dead, "alive": lambda step: alive}, 0, complaints.append) as logged:
        for step in range(50):
            logged.log({"a": 1}, step)
    assert len(complaints) == 1 and reason in complaints[0] and "goes on without it" in complaints[0]
    assert len(alive.rows) == 50


def test_one_that_hangs_is_left_behind(monkeypatch):
    monkeypatch.setattr(trackers, "LAST_WORDS_S", 0.3)
    monkeypatch.setattr(trackers, "BEHIND", 5)
    released, complaints = threading.Event(), []

    class Hanging(Recorder):
        def log(self, values, step):
            released.wait(60)

    started = time.perf_counter()
    with Trackers({"slow": Hanging}, 0, complaints.append) as logged:
        for step in range(100):
            logged.log({"a": 1}, step)
    assert time.perf_counter() - started < 10 and "slow still hangs" in complaints[0]
    released.set()


def test_tensorboard_keeps_the_numbers_over_a_resumption(test_config, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = test_config(log={"tensorboard": True}, run={"root": str(tmp_path), "name": "r"})
    for first, values in ((0, {1: 0.1, 2: 0.2, 3: 0.3}), (2, {3: 0.35, 4: 0.4})):  # resumed after iteration 2
        with Trackers(chosen(config), first, pytest.fail) as logged:
            for step, value in values.items():
                logged.log({"reward/mean": value}, step)
    events = accumulator.EventAccumulator(str(tmp_path / "r/tensorboard")).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("reward/mean")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.35),
        (4, 0.4),
    ]


def test_a_package_that_is_missing_is_named(test_config, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for key, value in (("tensorboard", True), ("wandb", "project"), ("trackio", "project")):
        with pytest.raises(UserError, match=f"log.{key}: the package {key} is not installed; pip install {key}"):
            chosen(test_config(log={key: value}))


FAKE = """
import pathlib
seen = pathlib.Path(__file__).with_suffix(".log")
def init(**options):
    assert options["project"] == "mine" and options["resume"] == "allow", options
    seen.open("a").write("init " + options.get("id", "") + chr(10))
def log(values, step):
    seen.open("a").write(f"{step} {values['reward/mean'] >= 0}" + chr(10))
    if step == 2:
        raise RuntimeError("the server is gone")
def finish():
    seen.open("a").write("finish" + chr(10))
"""


def test_a_run_outlives_its_tracker(tmp_path):
    (tmp_path / "wandb.py").write_text(FAKE)
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from eepo_fast.cli import main; sys.exit(main())"
    small = ["train.prompts_per_iteration=4", "train.prompts_per_update=4", "rollout.group_size=4"]
    settings = [f"run.root={tmp_path / 'runs'}", "run.name=r", "log.wandb=mine", "train.iterations=4", *small]
    command = [sys.executable, "-c", script, "train", str(ROOT / "configs/demo.yaml"), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "wandb: RuntimeError: the server is gone; the run goes on without it" in done.stdout, done.stderr
    first, *rest = (tmp_path / "wandb.log").read_text().splitlines()
    assert first.split()[0] == "init" and first.split()[1] == (tmp_path / "runs/r/wandb_id").read_text().strip()
    assert rest == ["1 True", "2 True"]
    assert len((tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "runs/r/ended.json").read_text())["reason"] == "finished"


def test_a_missing_package_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = str(ROOT / "configs/demo.yaml")
    assert main(["train", config, f"run.root={tmp_path / 'runs'}", "log.trackio=p"]) == 2
    assert "log.trackio: the package trackio is not installed" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

"""The study in bench/results/study goes on from its committed runs."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "study"
PHASES = ("tune", "final", "targets", "targets_strong")


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "study"))
    return importlib.import_module("run")


@pytest.mark.parametrize("phase", PHASES)
def test_no_run_is_made_again(study, phase):
    jobs = study.plan(RESULTS, phase, list(study.METHODS))
    assert len(jobs) > 10
    assert [job for job in jobs if not study.is_done(RESULTS, phase, *job)] == []


def test_a_value_comes_through_the_command_line_as_it_was_swept(study, monkeypatch, tmp_path):
    made, commands = [], []
    monkeypatch.setattr(study, "study_base", lambda: None)
    monkeypatch.setattr(study, "one_run", lambda out, *job: made.append(job))
    monkeypatch.setattr(study.subprocess, "run", lambda command, **_: commands.append(command) or Done)
    jobs = [("more_rollouts", 10, 100), ("eepo", 0.003, 100), ("grpo", None, 16)]
    monkeypatch.setattr(study, "plan", lambda *_: jobs)
    study.run_phase(tmp_path, "tune", list(study.METHODS), workers=1)
    for command in commands:
        monkeypatch.setattr("sys.argv", command[1:])
        study.main()
    assert repr(made) == repr([("tune", *job) for job in jobs])


class Done:
    returncode = 0

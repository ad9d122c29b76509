"""`make gpu-check` on a CPU: all steps go through, small; one that fails or takes too long does not stop the next."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "bench/gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
sys.modules["gpu_check"] = gpu_check  # its dataclass looks for it
spec.loader.exec_module(gpu_check)


@pytest.mark.slow
def test_every_step_is_rehearsed(tmp_path):
    command = [sys.executable, str(ROOT / "bench/gpu_check.py"), "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    for step in gpu_check.STEPS:
        result = json.loads((tmp_path / f"{step.name}.result.json").read_text())
        assert result["outcome"] == "passed", result
    assert "no figure is a GPU's" in done.stdout and "goal" not in done.stdout


HANGS = """
import pathlib, subprocess, sys, time
deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf])
pathlib.Path({file!r}).write_text(str(child.pid))
time.sleep(60)
"""


def lives(pid):
    """Whether it does anything: an orphan may wait for ever for somebody to ask how it ended."""
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(") ")[2][0] != "Z"


def test_a_failing_or_hanging_step_has_its_result_and_stops_none(tmp_path):
    steps = {
        "fails": gpu_check.Step("fails", ["-c", "print('why'); raise SystemExit(3)"], 60, []),
        "hangs": gpu_check.Step("hangs", ["-c", HANGS.format(file=str(tmp_path / "child"))], 12, []),
        "passes": gpu_check.Step(
            "passes", ["-c", "import sys; open(sys.argv[1], 'w').write('{\"rows\": [{\"a\": 1}]}')", "OUT"], 60, []
        ),
    }
    outcomes = {name: gpu_check.run_step(step, tmp_path, rehearse=False) for name, step in steps.items()}
    assert outcomes["fails"]["outcome"] == "failed (exit code 3)" and outcomes["fails"]["last_line"] == "why"
    assert outcomes["hangs"]["outcome"] == "failed (not done within 12 s)"
    assert outcomes["hangs"]["last_line"] == "KeyboardInterrupt", "it was asked first"
    assert not lives(int((tmp_path / "child").read_text())), "what it had started has gone, too"
    assert outcomes["passes"]["outcome"] == "passed" and outcomes["passes"]["rows"] == [{"a": 1}]
    assert all(json.loads((tmp_path / f"{n}.result.json").read_text()) == r for n, r in outcomes.items())


def test_figures_are_held_against_their_goals():
    rows = [{"forget_kernel_ms": 7.5, "forget_ms": 13.0}]
    lines = gpu_check.figures([{"step": "weight_update", "rows": rows}])
    assert any("7.5 (goal 8: met)" in line for line in lines) and any("13 (goal 12: missed)" in line for line in lines)
    assert any("not measured" in line for line in lines)
    for found, met in ((0.95, "met"), (0.04, "missed"), (1.2, "missed")):
        lines = gpu_check.figures([{"step": "memory", "rows": [{"measured_over_estimate": found}]}])
        assert sum(f"goal 1.1: {met}" in line for line in lines) == 1


def test_all_steps_together_stay_within_five_minutes():
    assert sum(step.limit_s for step in gpu_check.STEPS) <= 300

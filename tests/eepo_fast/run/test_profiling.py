"""`eepo-fast profile`: the trace has phases, micro-batches and ops; off, the ranges cost nothing and do nothing."""

import gzip
import json
import mmap
import shutil
from pathlib import Path

import pytest
import torch
from eepo_kernels import forget, ranges, sync

from eepo_fast.cli import main
from eepo_fast.run import profiling

ROOT = Path(__file__).parents[3]
SMALL = ["train.prompts_per_iteration=4", "train.prompts_per_update=2", "rollout.group_size=4", "eepo.alpha=3.0"]


@pytest.fixture(autouse=True)
def off():
    yield
    ranges.enable(False)


def test_a_profile_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nsys" if name == "nsys" else None)
    monkeypatch.chdir(tmp_path)
    arguments = ["profile", str(ROOT / "configs/demo.yaml"), *SMALL, "--iterations", "2", "--out", "traces"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for part in ("mean of 2 iterations", "unlearn", "rollout_stage2", "peak MiB", "aten::", "tokens a second"):
        assert part in out, part
    assert "nsys profile" in out and "--capture-range=cudaProfilerApi" in out and "--nsys" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["traces"], "no run folder"
    events = json.loads(gzip.decompress(Path("traces/trace-rank0.json.gz").read_bytes()))["traceEvents"]
    counts = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            counts[event["name"]] = counts.get(event["name"], 0) + 1
    assert counts["iteration"] == 2 and counts["forget"] == 2 and counts["eepo_kernels.forget"] == 2
    assert counts["optimizer step"] == 4, "two updates an iteration"
    assert counts["micro-batch backward"] >= 6 and counts["micro-batch forward"] >= 6
    peaks = [line for line in out.splitlines() if line.startswith("update")]
    assert float(peaks[0].split()[-1].replace(",", "")) > 50, "MiB of this process"


def test_ranges_are_free_when_off():
    ranges.enable(False)
    assert ranges.named("a") is ranges.named("b"), "one object that does nothing"
    weights, gradient = torch.zeros(8), torch.ones(8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as quiet:
        sync([weights], [gradient])
    ranges.enable(True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as loud:
        forget([weights], [gradient], eta=0.5, keys=[1], offsets=[0])
    assert "eepo_kernels.sync" not in {e.key for e in quiet.key_averages()}
    assert "eepo_kernels.forget" in {e.key for e in loud.key_averages()}
    assert weights.tolist() == [1.5] * 8 and forget.__doc__, "and the function is what it was"


def test_a_phase_has_its_own_peak():
    peaks = profiling.Peaks()
    peaks.enter("small")
    peaks.enter("large")
    # pages of its own: an allocator may give a tensor memory that earlier tests have left with the process
    with mmap.mmap(-1, 256 * profiling.MIB) as block:
        block.write(bytes(256 * profiling.MIB))
    peaks.enter("small again")
    peaks.enter("")
    assert peaks.bytes["large"] - peaks.bytes["small"] > 200 * profiling.MIB
    assert peaks.bytes["large"] - peaks.bytes["small again"] > 200 * profiling.MIB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "0"], "--iterations: expected at least 1"),
        (["--nsys"], "--nsys: expected a CUDA device"),
        (["--out", "file"], "--out: file cannot be written"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_mistakes(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(["profile", str(ROOT / "configs/demo.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err

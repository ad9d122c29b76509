"""Estimates: counted weights against real models, what fits, and what a dry run says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from eepo_fast.cli import main
from eepo_fast.config import load_config
from eepo_fast.run.estimate import (
    MACHINES,
    Machine,
    estimate,
    find_machine,
    find_shape,
    needed,
    seconds,
    what_would_fit,
)
from eepo_fast.run.plan import batch_plan
from eepo_fast.types import UserError

ROOT = Path(__file__).parents[3]
MODELS = {
    "qwen2.5-3b": (Qwen2Config, Qwen2ForCausalLM),
    "llama-3.2-3b-instruct": (LlamaConfig, LlamaForCausalLM),
    "qwen3-8b-base": (Qwen3Config, Qwen3ForCausalLM),
    "smollm2-gsm8k": (LlamaConfig, LlamaForCausalLM),
}


def load(model, *overrides, machine=None):
    files = [ROOT / "configs" / f"{model}.yaml"]
    if machine:
        files.append(ROOT / "configs" / "machines" / f"{machine}.yaml")
    return load_config([str(f) for f in files], list(overrides))


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_counted_as_the_model_has_them(model):
    config = load(model)
    make_config, make_model = MODELS[model]
    with torch.device("meta"):
        real = make_model(make_config(**config.model.dimensions))
    count = sum(p.numel() for p in real.parameters())
    assert find_shape(config).weights == pytest.approx(count, rel=1e-3)  # biases and norms of heads are left out


@pytest.mark.parametrize("machine", ["8xA100-80GB", "8xB200"])
@pytest.mark.parametrize("model", [m for m in MODELS if "smol" not in m])
def test_the_paper_s_models_fit_with_room_to_spare(model, machine):
    for config in (load(model, machine=machine), *([load(model)] if "A100" in machine else [])):
        found = find_machine(machine, 1)
        assert max(needed(config, find_shape(config), found).values()) < 0.94 * found.memory_gib


def test_more_ranks_less_memory_and_time():
    config = load("qwen2.5-3b")
    shape = find_shape(config)
    one, eight = (Machine("x", n, *MACHINES["H200"]) for n in (1, 8))
    assert needed(config, shape, eight)["update"] < needed(config, shape, one)["update"]
    for phase, value in seconds(config, shape, eight).items():
        if phase in ("unlearn", "update", "reference", "rollout"):
            assert value < seconds(config, shape, one)[phase]


def test_aepo_s_extra_samples_are_counted():
    machine, plans, times = find_machine("8xH200", 1), {}, {}
    for name, more in {"none": [], "term": ["aepo.enabled=true"], "replace": ["aepo.mode=replace"]}.items():
        config = load("qwen2.5-3b", *more, *(["aepo.enabled=true"] if more else []))
        plans[name], times[name] = batch_plan(config), seconds(config, find_shape(config), machine)
    extra = "AEPO's samples an iteration"
    assert extra not in plans["none"] and plans["term"][extra] == 60 and plans["replace"][extra] == 32 * 8
    sampled = [plans[name]["sampled tokens an iteration, at most"] for name in ("none", "term")]
    assert sampled[1] == sampled[0] * (1024 + 60) // 1024
    assert "aepo" not in times["none"] and 0 < times["term"]["aepo"] < times["none"]["rollout"]
    assert times["none"]["update"] == times["replace"]["update"] < times["term"]["update"]
    assert times["none"]["rollout"] == times["term"]["rollout"]


def test_what_is_named_makes_it_fit():
    config = load("qwen3-8b-base", "train.zero_stage=2", "rollout.sleep=false")
    shape, machine = find_shape(config), find_machine("8xA100-80GB", 1)
    assert max(needed(config, shape, machine).values()) > machine.memory_gib
    changes = what_would_fit(config, shape, machine).split()
    changed = load("qwen3-8b-base", "train.zero_stage=2", "rollout.sleep=false", *changes)
    assert max(needed(changed, shape, machine).values()) <= machine.memory_gib
    assert any(
        f"does not fit into 79.1 GiB: with {' '.join(changes)} it would" in line for line in estimate(config, machine)
    )
    assert "take more ranks" in " ".join(estimate(config, find_machine("1xA100-80GB", 1)))


def test_names_of_machines():
    assert find_machine("16xB200", 1).ranks == 16
    for name in ("A100-80GB", "0xH200", "8xA10", "8x"):
        with pytest.raises(UserError, match="--machine: expected a number, x and one of A100-80GB"):
            find_machine(name, 1)


def test_a_dry_run_prints_the_estimate():
    command = [sys.executable, "-m", "eepo_fast.cli", "train", "configs/qwen2.5-3b.yaml", "--dry-run"]
    done = subprocess.run([*command, "--machine", "8xH200"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    for words in (
        "on 8xH200: 8 ranks of 139.8 GiB, assumed rates",
        "engine: cache",
        "fits, with",
        "rollout, s an iter",
    ):
        assert words in done.stdout
    found = estimate(load("smollm2-gsm8k"), find_machine(None, 1))
    assert "measured rates" in found[0] or torch.cuda.is_available()
    assert estimate(load("demo"), find_machine("8xH200", 1))[0].startswith("no estimate of memory and time: model.dim")


@pytest.mark.parametrize(
    "overrides, unlearning",
    [
        ([], "beside sampling"),
        (["train.zero_stage=3"], "after sampling: beside it with train.zero_stage=2 or less"),
        (["train.engine=torch"], "beside sampling"),
        (
            ["train.engine=torch", "rollout.sleep=true", "rollout.gpu_memory_utilization=0.55"],
            "after sampling: there is",
        ),
        ([str(ROOT / "configs/machines/1xH200.yaml"), "train.engine=torch"], "beside sampling"),
        (["eepo.enabled=false"], None),
    ],
)
def test_qwen_3b_fits_one_h200_and_is_told_when_unlearning_runs(capsys, overrides, unlearning):
    assert main(["train", str(ROOT / "configs/qwen2.5-3b.yaml"), "--dry-run", "--machine", "1xH200", *overrides]) == 0
    printed, said = capsys.readouterr()
    assert "  fits, with " in printed
    line = "eepo-fast: train.engine=torch: train.zero_stage of an earlier file left out\n"
    assert said == (line if "train.engine=torch" in overrides else "") and ("zero_stage" in printed) == (not said)
    assert f"  unlearning runs {unlearning}" in printed if unlearning else "unlearning runs" not in printed


def test_a_setting_that_has_to_change_is_named():
    """More of the GPU to the engine than the update leaves: it has to sleep."""
    machine, crowded = find_machine("1xH200", 1), "rollout.gpu_memory_utilization=0.55"
    (line,) = (line for line in estimate(load("qwen2.5-3b", crowded), machine) if "fit" in line)
    assert line == "  does not fit into 139.8 GiB: with rollout.sleep=true it would"
    assert any("  fits, with" in line for line in estimate(load("qwen2.5-3b", crowded, "rollout.sleep=true"), machine))


def test_what_was_traced_is_told_from_what_is_arithmetic():
    def last(*overrides, machine="8xA100-80GB"):
        return " ".join(estimate(load("qwen2.5-3b", *overrides), find_machine(machine, 1))[-3:])

    for settings in ([], ["train.gradient_checkpointing=false"]):
        assert "the policy's peaks: by formulas within 10% of traces" in last(*settings)
        assert "host memory and seconds are arithmetic" in last(*settings)
    assert "the policy's peaks: by formulas" in last("train.engine=torch", machine="1xH200")
    untraced = ("train.zero_stage=3", "train.zero_stage=1", "model.dtype=float32", "train.packing=false")
    for setting in untraced:
        assert last(setting).endswith(f"all of it is arithmetic: nothing was traced with {setting}")
    assert last("train.offload_optimizer=true").endswith("nothing was traced with train.offload_*")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--machine", "7xA100-80GB"], "train.prompts_per_iteration: expected a multiple of the 7 engines"),
        (["--machine", "8xB200", "rollout.tensor_parallel=3"], "rollout.tensor_parallel: expected a divisor of the 8"),
        (["rollout.engine=hf", "rollout.sleep=true"], "rollout.sleep: expected rollout.engine=vllm with it, found hf"),
        (["--machine", "8xB200", "train.engine=torch"], "train.engine: expected deepspeed with 8 processes"),
        (["--machine", "8xA100-80GB", "rollout.gpu_memory_utilization=0.05"], "expected room for its 5.7 GiB"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(capsys, overrides, message):
    assert main(["train", str(ROOT / "configs/qwen2.5-3b.yaml"), "--dry-run", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_a_dry_run_is_refused(capsys):
    assert main(["train", str(ROOT / "configs/demo.yaml"), "--machine", "8xB200"]) == 2
    assert "--machine: expected --dry-run" in capsys.readouterr().err


def test_unlearning_is_counted_beside_an_engine_that_is_awake():
    machine = find_machine("8xA100-80GB", 1)
    asleep, awake = (load("qwen3-8b-base", f"rollout.sleep={value}") for value in ("true", "false"))
    shape = find_shape(asleep)
    gap = needed(awake, shape, machine)["unlearning pass"] - needed(asleep, shape, machine)["unlearning pass"]
    assert gap == pytest.approx(0.4 * machine.memory_gib - 2, rel=0.01)
    assert "unlearning pass" not in needed(load("qwen3-8b-base", "eepo.enabled=false"), shape, machine)


def test_the_wire_is_counted_as_often_as_gradients_are_summed():
    """At every micro-batch in stages 2 and 3, once an update below: DeepSpeed's source, read."""
    machine = find_machine("8xH200", 1)
    slow = Machine("slow links", 8, *MACHINES["H200"][:3], link_bytes_per_s=1e9)

    def on_the_wire(stage, tokens):
        config = load("qwen2.5-3b", f"train.zero_stage={stage}", f"train.micro_batch_tokens={tokens}")
        shape = find_shape(config)
        per_weight = shape.weights * (1 / slow.link_bytes_per_s - 1 / machine.link_bytes_per_s)
        updates = config.train.prompts_per_iteration // config.train.prompts_per_update
        found = [seconds(config, shape, m)["update"] for m in (slow, machine)]
        return (found[0] - found[1]) / per_weight / updates  # bytes a weight and update

    assert on_the_wire(0, 16384) == pytest.approx(8) and on_the_wire(1, 16384) == pytest.approx(6)
    for stage, a_micro_batch, an_update in ((2, 4, 2), (3, 6, 0)):
        counts = [(on_the_wire(stage, tokens) - an_update) / a_micro_batch for tokens in (16384, 8192)]
        assert all(count == pytest.approx(round(count)) for count in counts)
        assert counts[0] > 1 and 1.5 * counts[0] < counts[1] <= 2 * counts[0]

"""The estimate's peaks of an iteration against traced ones, at the true sizes of the paper's models.

The policy on one device (train.engine: torch), with the reference, in fp32 under autocast, without Liger; the engine is
a storage as large as the estimate says. Two layers are played; what all take is counted on from there. ZeRO-2:
test_fake_cuda_zero.py.
"""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from eepo_fast.config import load_config
from eepo_fast.policy.footprint import AUTOCAST, CHUNK_BYTES, kept_bytes, pass_bytes
from eepo_fast.run.estimate import (
    CONTEXT_GIB,
    GIB,
    KEPT_GIB,
    engine_memory,
    find_machine,
    find_shape,
    needed,
    streamed_peak,
)

spec = importlib.util.spec_from_file_location("fake_device", Path(__file__).with_name("fake_device.py"))
fake_device = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_device)

ROOT = Path(__file__).parents[2]
MODELS = ("qwen2.5-3b", "llama-3.2-3b-instruct", "qwen3-8b-base")
TOKENS = 16_384
MACHINE = find_machine("1xH200", 1)
PHASES = {"update": "update", "optimizer's step": "optimizer's step", "rollout": "rollout"} | {
    "unlearning pass": "streamed"
}
BESIDE = CONTEXT_GIB + KEPT_GIB  # which no trace has


def load(model, *overrides):
    settings = ["data.train=unused", "train.engine=torch", "rollout.sleep=true", *overrides]
    return load_config([str(ROOT / "configs" / f"{model}.yaml")], settings)


def engine_gib(config):
    return sum(engine_memory(config, find_shape(config), MACHINE))


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    one = dict(model=MODELS[0], engine="torch", checkpointing=[True])
    requests = [
        ["after", "memory", one | {"engine_gib": engine_gib(load(MODELS[0])), "streamed": False}, None],
        ["no room", "memory", one | {"engine_gib": 130.0, "streamed": True}, None],
        ["foreach", "memory", one | {"engine_gib": 130.0, "streamed": True}, "foreach_adamw"],
    ]
    for model in MODELS:
        arguments = dict(model=model, checkpointing=[True, False], engine_gib=engine_gib(load(model)), streamed=True)
        requests.append([model, "memory", one | arguments, None])
    return fake_device.play(tmp_path_factory.getbasetemp().parent, requests)


def traced(played, model, checkpointing, phase):
    shape = find_shape(load(model))
    engine = engine_gib(load(model)) if phase == "unlearning pass" else 0.0
    found = played[model][str(checkpointing)]
    whole = fake_device.whole_model(found, phase, shape.weights, shape.num_hidden_layers, engine)
    if phase == "rollout":  # which begins without the engine, and ends with it
        whole["peak"] = whole["start"] + found[phase]["peak"] - found[phase]["start"]
    return whole


def estimated(model, checkpointing, layers=None):
    config = load(model, f"train.gradient_checkpointing={checkpointing}")
    shape = find_shape(config)
    shape = dataclasses.replace(shape, num_hidden_layers=layers or shape.num_hidden_layers)
    peaks = needed(config, shape, MACHINE)
    streamed = streamed_peak(config, shape, peaks, engine_gib(config))
    return {name: peak - BESIDE for name, peak in (peaks | {"streamed": streamed}).items()}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_the_peaks_of_an_iteration_are_what_the_estimate_says(played, model, checkpointing):
    """Unlearning is played beside the engine."""
    found, other = estimated(model, checkpointing), estimated(model, not checkpointing)
    for phase, name in PHASES.items():
        peak = traced(played, model, checkpointing, phase)["peak"]
        assert found[name] == pytest.approx(peak, rel=0.1), name
        if name in ("streamed", "update"):
            assert other[name] != pytest.approx(peak, rel=0.1), "another setting is another figure"


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_a_micro_batch_holds_what_the_estimate_says(played, model, checkpointing):
    shape, whole = find_shape(load(model)), traced(played, model, checkpointing, "update")
    found = pass_bytes(shape, TOKENS, AUTOCAST, "cuda", checkpointing=checkpointing) / GIB
    assert found == pytest.approx(whole["peak"] - whole["start"], rel=0.1)
    kept = kept_bytes(shape, TOKENS, AUTOCAST, checkpointing) + 4 * shape.vocab_size * shape.hidden_size
    assert kept / GIB == pytest.approx(whole["kept"] - whole["start"], rel=0.1)


def test_a_streamed_pass_holds_a_later_one_s_and_the_engine_s(played):
    beside, after = (played[name]["True"]["unlearning pass"]["peak"] for name in (MODELS[0], "after"))
    assert beside - after == pytest.approx(engine_gib(load(MODELS[0])), abs=0.01)
    assert after == pytest.approx(estimated(MODELS[0], True, layers=2)["unlearning pass"], rel=0.1)


def test_without_room_beside_the_engine_the_pass_waits(played):
    """The run decides by the estimate's figures: with an engine of 130 of 140 GiB both micro-batches are put off."""
    assert played[MODELS[0]]["True"]["put off"] == 0
    waiting = played["no room"]["True"]
    assert waiting["put off"] == 2 and waiting["unlearning pass"]["peak"] == waiting["unlearning pass"]["start"]


def test_another_optimizer_is_another_figure(played):
    """PyTorch's AdamW over lists of tensors, as it once was, holds in its step as much again as the weights."""
    found = estimated(MODELS[0], True, layers=2)["optimizer's step"]
    assert found == pytest.approx(played[MODELS[0]]["True"]["optimizer's step"]["peak"], rel=0.1)
    assert found < 0.9 * played["foreach"]["True"]["optimizer's step"]["peak"]


def test_the_head_s_chunk_is_its_own_default():
    torch = pytest.importorskip("torch")
    from eepo_kernels.linear_chunks import default_chunk_bytes

    assert {name: default_chunk_bytes(torch.device(name)) for name in CHUNK_BYTES} == CHUNK_BYTES

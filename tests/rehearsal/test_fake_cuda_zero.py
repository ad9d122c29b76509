"""The estimate's peaks against traced ones with DeepSpeed's ZeRO-2: one rank of eight, whose collectives move nothing.

DeepSpeed itself runs, on a GPU that is not there, at the true sizes of the paper's models in 16 bits, with the
reference and without Liger. Two layers are played, as in test_fake_cuda_estimate.py; the engine is left out. Stages 0,
1 and 3, and what is moved to the host, are arithmetic: nothing of them is played.
"""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from eepo_fast.config import load_config
from eepo_fast.run.estimate import CONTEXT_GIB, KEPT_GIB, engine_memory, find_machine, find_shape, needed

pytest.importorskip("deepspeed")
spec = importlib.util.spec_from_file_location("fake_device", Path(__file__).with_name("fake_device.py"))
fake_device = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_device)

ROOT = Path(__file__).parents[2]
MODELS = ("qwen2.5-3b", "llama-3.2-3b-instruct", "qwen3-8b-base")
ZERO_2 = ["train.zero_stage=2"]


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    requests = []
    for model in MODELS:
        arguments = dict(model=model, engine="deepspeed", checkpointing=[True, False], ranks=8, overrides=ZERO_2)
        requests.append([model, "memory", arguments, None])
    alone = arguments | dict(model=MODELS[0], ranks=1, checkpointing=[True])
    requests.append(["one rank", "memory", alone, None])
    return fake_device.play(tmp_path_factory.getbasetemp().parent, requests)


def estimated(model, *overrides, machine="8xH200", layers=None):
    """The policy's, of a model with so many layers: without the engine, and what no trace has."""
    settings = ["data.train=unused", *ZERO_2, "rollout.sleep=true", *overrides]
    config = load_config([str(ROOT / "configs" / f"{model}.yaml")], settings)
    shape, where = find_shape(config), find_machine(machine, 1)
    shape = dataclasses.replace(shape, num_hidden_layers=layers or shape.num_hidden_layers)
    peaks = {name: peak - CONTEXT_GIB - KEPT_GIB for name, peak in needed(config, shape, where).items()}
    peaks["rollout"] -= sum(engine_memory(config, shape, where))
    return peaks, shape


def check(found, model, checkpointing, **where):
    figures, shape = estimated(model, f"train.gradient_checkpointing={checkpointing}", **where)
    other, _ = estimated(model, f"train.gradient_checkpointing={not checkpointing}", **where)
    few, _ = estimated(model, f"train.gradient_checkpointing={checkpointing}", layers=fake_device.LAYERS, **where)
    # the step's peak has the largest weight in it, or what a rank has of it: not so many bytes a weight
    step = "optimizer's step"
    assert few[step] == pytest.approx(found[step]["peak"], rel=0.1)
    assert found["fused"], "one pass over the moments, and no lists of temporary tensors"
    for name in figures.keys() - {step, "forget step's check"}:
        peak = fake_device.whole_model(found, name, shape.weights, shape.num_hidden_layers)["peak"]
        assert figures[name] == pytest.approx(peak, rel=0.1), name
        if name != "rollout":
            assert other[name] != pytest.approx(peak, rel=0.1), "another setting is another figure"


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_a_rank_s_peaks_are_what_the_estimate_says(played, model, checkpointing):
    check(played[model][str(checkpointing)], model, checkpointing)


def test_a_rank_alone_is_what_the_estimate_says(played):
    """The config of Qwen2.5-3B on one GPU, where nothing is cut."""
    check(played["one rank"]["True"], MODELS[0], True, machine="1xH200")


def test_other_ranks_and_stages_are_other_figures(played):
    shape = estimated(MODELS[0])[1]
    found = played[MODELS[0]]["True"]
    peak = fake_device.whole_model(found, "update", shape.weights, shape.num_hidden_layers)["peak"]
    for machine, stage in (("1xH200", 2), ("8xH200", 1), ("8xH200", 0)):
        figures, _ = estimated(MODELS[0], f"train.zero_stage={stage}", machine=machine)
        assert figures["update"] > 1.1 * peak

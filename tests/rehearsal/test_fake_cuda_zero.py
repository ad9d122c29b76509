"""The estimate's peaks against traced ones with DeepSpeed's ZeRO-2: one rank of eight, whose collectives move nothing.

DeepSpeed itself runs, on a GPU that is not there, at the true sizes of the paper's models in 16 bits, with the
reference and without Liger. Two layers and three are played, as in test_fake_cuda_estimate.py; the engine is left out.
Stages 0, 1 and 3, and what is moved to the host, are arithmetic: nothing of them is played.
"""

import importlib.util
from pathlib import Path

import pytest

from eepo_fast.config import load_config
from eepo_fast.estimate import CONTEXT_GIB, KEPT_GIB, engine_memory, find_machine, find_shape, needed

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
        arguments = dict(model=model, engine="deepspeed", layers=[2, 3], ranks=8, overrides=ZERO_2)
        requests.append([model, "memory", arguments | {"checkpointing": [True, False]}, None])
    alone = arguments | dict(model=MODELS[0], ranks=1, checkpointing=[True])
    requests.append(["one rank", "memory", alone, None])
    return fake_device.play(tmp_path_factory.getbasetemp().parent, requests)


def estimated(model, checkpointing, machine="8xH200", *overrides):
    settings = [*ZERO_2, f"train.gradient_checkpointing={checkpointing}", "rollout.sleep=true", *overrides]
    config = load_config([str(ROOT / "configs" / f"{model}.yaml")], ["data.train=unused", *settings])
    shape, where = find_shape(config), find_machine(machine, 1)
    peaks = {name: peak - CONTEXT_GIB - KEPT_GIB for name, peak in needed(config, shape, where).items()}
    peaks["rollout"] -= sum(engine_memory(config, shape, where))
    return peaks, shape.num_hidden_layers


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_a_rank_s_peaks_are_what_the_estimate_says(played, model, checkpointing):
    found, layers = estimated(model, checkpointing)
    other, _ = estimated(model, not checkpointing)
    for name, figure in found.items():
        peak = fake_device.of_all_layers(played[model], checkpointing, name, "peak", layers)
        assert figure == pytest.approx(peak, rel=0.1), name
        if name in ("update", "unlearning pass"):
            assert other[name] != pytest.approx(peak, rel=0.1), "another setting is another figure"


def test_a_rank_alone_is_what_the_estimate_says(played):
    """The config of Qwen2.5-3B on one GPU: nothing is cut, and the largest peak is DeepSpeed's step."""
    found, layers = estimated(MODELS[0], True, "1xH200")
    for name, figure in found.items():
        peak = fake_device.of_all_layers(played["one rank"], True, name, "peak", layers)
        assert figure == pytest.approx(peak, rel=0.1), name
    assert max(found, key=found.get) == "optimizer's step"


def test_other_ranks_and_stages_are_other_figures(played):
    peak = fake_device.of_all_layers(played[MODELS[0]], True, "update", "peak", 36)
    for machine, stage in (("1xH200", 2), ("8xH200", 1), ("8xH200", 0)):
        found, _ = estimated(MODELS[0], True, machine, f"train.zero_stage={stage}")
        assert found["update"] > 1.1 * peak

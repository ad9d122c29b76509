"""The estimate's figures of a micro-batch against traced ones, at the true sizes of the paper's models.

A pass over two layers and one over three differ by a layer's share; what all layers take is counted on from there. On
one device, in fp32 under autocast, without Liger; ZeRO's shares are arithmetic.
"""

import importlib.util
from pathlib import Path

import pytest

from eepo_fast.config import load_config
from eepo_fast.estimate import GIB, find_shape
from eepo_fast.policy.footprint import AUTOCAST, CHUNK_BYTES, kept_bytes, pass_bytes

spec = importlib.util.spec_from_file_location("fake_device", Path(__file__).with_name("fake_device.py"))
fake_device = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_device)

ROOT = Path(__file__).parents[2]
MODELS = ("qwen2.5-3b", "llama-3.2-3b-instruct", "qwen3-8b-base")
TOKENS = 16_384


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    requests = []
    for model in MODELS:
        for checkpointing in (True, False):
            for layers in (2, 3):
                arguments = {"model": model, "layers": layers, "checkpointing": checkpointing}
                requests.append([f"{model} {layers} {checkpointing}", "passes", arguments, None])
    return fake_device.play(tmp_path_factory.getbasetemp().parent, requests)


def of_all_layers(played, model, checkpointing, key, layers):
    two, three = (played[f"{model} {n} {checkpointing}"][key] for n in (2, 3))
    return two + (layers - 2) * (three - two)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_a_micro_batch_holds_what_the_estimate_says(played, model, checkpointing):
    shape = find_shape(load_config([str(ROOT / "configs" / f"{model}.yaml")], ["data.train=unused"]))
    layers = shape.num_hidden_layers
    peak = max(of_all_layers(played, model, checkpointing, key, layers) for key in ("forward", "backward"))
    found = pass_bytes(shape, TOKENS, AUTOCAST, "cuda", checkpointing=checkpointing) / GIB
    assert found == pytest.approx(peak, rel=0.1)
    kept = kept_bytes(shape, TOKENS, AUTOCAST, checkpointing) + 4 * shape.vocab_size * shape.hidden_size
    assert kept / GIB == pytest.approx(of_all_layers(played, model, checkpointing, "kept", layers), rel=0.1)
    other = pass_bytes(shape, TOKENS, 2, "cuda", checkpointing=not checkpointing) / GIB
    assert other != pytest.approx(peak, rel=0.1), "another setting is another figure"


def test_weights_and_gradients_are_as_the_model_has_them(played):
    """8 bytes a weight of the layers that were played: fp32, and a gradient."""
    for model in MODELS:
        shape = find_shape(load_config([str(ROOT / "configs" / f"{model}.yaml")], ["data.train=unused"]))
        static = of_all_layers(played, model, True, "static", shape.num_hidden_layers)
        assert static == pytest.approx(8 * shape.weights / GIB, rel=0.01)


def test_the_head_s_chunk_is_its_own_default():
    torch = pytest.importorskip("torch")
    from eepo_kernels.linear_chunks import default_chunk_bytes

    assert {name: default_chunk_bytes(torch.device(name)) for name in CHUNK_BYTES} == CHUNK_BYTES

"""vLLM and families whose weights it has by other names, in other parts, or in a model of transformers'."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed; make test installs its CPU build")

from eepo_fast.rollout import updates, vllm
from eepo_fast.types import EngineError, WeightsVersion

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def load(name):
    spec = importlib.util.spec_from_file_location(f"vllm_families_{name}", HERE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


tiny, check = load("tiny"), load("check")


def wide_model(family):
    return tiny.tiny_model(family, config=tiny.small_config(family, wide=True))


@pytest.mark.parametrize(
    "family, how",
    [
        ("qwen3_moe", "reloaded"),  # its experts are stacked in the model, and one by one in checkpoints
        ("bloom", "reloaded"),
        ("arcee", "in place"),  # vLLM has none of its own
    ],
)
def test_a_family_samples_rightly_with_vllm(family, how):
    assert check.check_vllm(wide_model(family)) == how


def test_experts_as_the_loader_leaves_them_are_refused(monkeypatch):
    """The control: a CPU's kernels read another layout."""
    monkeypatch.setattr(updates.Reload, "_pack_experts", lambda self: None)
    assert check.check_vllm(wide_model("qwen3_moe")) == "refused: other log-probs"


def test_names_that_vllm_does_not_know_are_one_line(monkeypatch):
    """The control: the names that transformers has in the model."""
    monkeypatch.setattr(updates, "as_saved", lambda model, weights: weights)
    model = wide_model("deepseek_v3")
    engine = vllm.VllmEngine(model, dtype=torch.float32, max_sequences=8, max_model_len=256)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    try:
        with pytest.raises(EngineError, match=r"vLLM's loader stops at .* with KeyError.*; use rollout.engine=hf"):
            engine.sync([weights], WeightsVersion(0, False))
    finally:
        engine.close()

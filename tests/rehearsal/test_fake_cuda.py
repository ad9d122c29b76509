"""A run's passes on a GPU that is not there, at the true sizes of a model of 3B: memory, dtypes, kernels' launches,
what the host waits for. Each fault that was found so is put back, and seen.
"""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("fake_device", Path(__file__).with_name("fake_device.py"))
fake_device = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_device)

WEIGHTS = 11.496  # GiB of Qwen2.5-3B in fp32
FEW = {"layers": 2}  # for a fault that shows in any layer


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp().parent  # of the session: other workers find the device there
    return fake_device.play(
        folder,
        [
            ["head", "head", {}, None],
            ["head, unaligned", "head", {}, "unaligned"],
            ["policy", "policy", {}, None],
            ["few layers", "policy", FEW, None],
            ["foreach", "policy", FEW, "foreach_adamw"],
            ["cache", "policy", FEW, "autocast_cache"],
            ["two dtypes", "policy", FEW, "two_dtypes"],
            ["unlearning", "unlearning", FEW, None],
            ["whole gradients", "unlearning", FEW, "whole_gradients"],
            ["trainer", "trainer", {}, None],
            ["start", "start", {}, None],
            ["whole copy", "start", {}, "whole_copy"],
            ["unpinned", "trainer", {}, "unpinned"],
        ],
    )


def beyond(found, phase):
    return found["gib"][phase]["peak"] - found["gib"][phase]["start"]


def test_the_head_holds_its_chunk_its_gradients_and_no_logits(played):
    """3 GiB of chunk, dW in fp32, and the weight rounded to 16 bits; all the logits would be 9.3."""
    assert 4.5 < beyond(played["head"], "loss") < 3 + 1.5 * 1.16 + 0.2
    assert beyond(played["head"], "backward") < 0.01
    assert played["head"]["waits"] == {}


def test_the_head_s_kernels_are_compiled_once(played):
    """Also where the rows that have a gradient begin at an odd place: an address that is no multiple of 16 bytes is
    another program to Triton, compiled while a run waits."""
    found = played["head"]
    assert found["programs"] == {"row_stats_fwd_kernel": 1, "row_grad_kernel": 1}
    assert all(count > 8 for count in found["launches"].values())
    assert found["kernel_dtypes"]["row_grad_kernel"] == ["torch.bfloat16", "torch.float32", "torch.int64"]
    assert played["head, unaligned"]["programs"]["row_grad_kernel"] == 2
    assert played["head, unaligned"]["misaligned"]["row_grad_kernel"] > 0


def test_an_update_holds_one_gradient_and_its_step_nothing_more(played):
    found = played["policy"]
    assert found["gib"]["batch 0"]["start"] == pytest.approx(WEIGHTS, rel=1e-3)
    assert found["gib"]["batch 0"]["end"] == pytest.approx(2 * WEIGHTS, rel=1e-3)
    assert beyond(found, "step") == pytest.approx(2 * WEIGHTS, rel=1e-3)  # the moments, which stay
    assert beyond(played["foreach"], "step") > 1.5 * beyond(played["few layers"], "step")
    assert found["moments_on"] == found["moments_on, resumed"] == ["cuda"], "all of them, as a fused step asks for"


def test_no_16_bit_copy_of_all_weights_is_kept(played):
    """Under checkpointing a layer's copies go when it has been done: what a pass holds beside the gradients does not
    grow by 2 bytes a weight."""
    few, cached = played["few layers"], played["cache"]
    layers = 2 * 77_072_896 * 2 / 2**30  # 16-bit copies of two layers
    assert beyond(cached, "score") - beyond(few, "score") == pytest.approx(layers, rel=0.02)
    assert beyond(played["policy"], "score") < beyond(few, "score") + 0.01


def test_packed_attention_is_one_call_a_layer(played):
    """q and k come out of the rotary embedding in fp32, v of its product in 16 bits; a kernel takes one dtype."""
    passes = 2 + 1  # an update, forward and again in its backward pass; a scoring pass
    assert played["policy"]["attention"]["varlen"] == 36 * passes
    assert played["two dtypes"]["attention"]["varlen"] == 0


def test_the_host_waits_for_the_step_s_norm_and_for_scores_alone(played):
    waits = played["policy"]["waits"]
    assert waits.pop("item in plain.TorchPolicy.step") == 1
    assert set(waits) == {"copy in module.ModulePolicy.score"}


def test_the_gradient_of_unlearning_is_there_once(played):
    found, whole = played["unlearning"], played["whole gradients"]
    size = found["gradient_gib"]
    assert found["gib"]["batch 0"]["end"] - found["gib"]["batch 0"]["start"] == pytest.approx(size, rel=1e-2)
    assert beyond(found, "batch 1") < beyond(found, "batch 0") - 0.1 * size
    layers = size - 1.16  # of the rest is one embedding, which is made whole in any case
    assert whole["gib"]["batch 1"]["peak"] - found["gib"]["batch 1"]["peak"] > 0.3 * layers


def test_a_start_holds_one_model_on_the_host(played):
    """Eight ranks of a host do so at once: with a copy each it would be twice as much."""
    found, whole = played["start"], played["whole copy"]
    assert found["devices"] == ["cuda"] and not found["reference_requires_grad"]
    assert found["host_gib"] < 0.05 * found["model_gib"]
    assert whole["host_gib"] > 0.9 * whole["model_gib"]


def test_an_iteration_moves_what_it_moves_without_waiting(played):
    """Sync, stages, streamed unlearning, the forget step, scores of policy and reference, update: all on the device."""
    found = played["trainer"]
    read = {"copy in module.ModulePolicy.score", "copy in forget.GradientPass.result.<locals>.<genexpr>"}
    assert {where for where in found["waits"] if where.startswith("copy")} == read
    assert any(where.startswith("copy in micro_batches") for where in played["unpinned"]["waits"])
    assert found["misaligned"] == {"row_stats_fwd_kernel": 0, "row_grad_kernel": 0}
    assert found["programs"]["row_grad_kernel"] == 1
    assert found["attention"]["varlen"] > 0 and found["row"]["tokens/generated"] == 4 * 8 * 512

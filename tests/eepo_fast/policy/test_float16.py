"""float16 has no room for the gradient of a mean over many tokens: the loss is scaled up, and the gradient down."""

import copy

import pytest
import torch

from eepo_fast.algorithm.losses import reinforce_loss
from eepo_fast.config import OptimizerConfig
from eepo_fast.policy.plain import TorchPolicy

TOKENS = 3e7  # so many that each one's share is far below what float16 can hold


def make(model, dtype, **more):
    return TorchPolicy(
        copy.deepcopy(model), compute_dtype=dtype, temperature=1.0, micro_batch_tokens=64, pad_id=0, packed=True,
        optimizer=OptimizerConfig(**more),
    )  # fmt: skip


def loss_of(batch, share):
    count = len(batch.targets)
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return reinforce_loss(values, torch.full((count,), share))


def gradients(policy, rollouts, share):
    """(of the update, of a forget step), each of the layers as one vector, as if the share were 1: the head, which has
    a scale of its own, would hide them."""
    beside = policy.gradient()
    for batch in policy.micro_batches(rollouts):
        policy.backward(batch, loss_of(batch, share))
        beside.add(policy.loss(batch, loss_of(batch, share))[0])
    policy.scaler.unscale_(policy.optimizer)
    update = {name: p.grad for name, p in policy.model.named_parameters()}
    chosen = [[g.flatten() for name, g in found.items() if "layers" in name] for found in (update, beside.tensors)]
    return [torch.cat(parts) / share for parts in chosen]


def test_a_small_gradient_is_the_gradient(tiny_model, make_rollouts):
    rollouts = make_rollouts([4, 3])
    truth = gradients(make(tiny_model, torch.float32), rollouts, 1.0)
    scaled = make(tiny_model, torch.float16)
    for found, expected in zip(gradients(scaled, rollouts, 1 / TOKENS), truth, strict=True):
        assert torch.cosine_similarity(found, expected, dim=0) > 0.999
        assert 0.98 < found.norm() / expected.norm() < 1.02
    control = make(tiny_model, torch.float16)
    control.scaler = torch.amp.GradScaler("cpu", enabled=False)
    for found, expected in zip(gradients(control, rollouts, 1 / TOKENS), truth, strict=True):
        assert torch.cosine_similarity(found, expected, dim=0) < 0.9, "without the scale it is not"


def test_too_large_a_gradient_is_skipped_and_the_scale_halves(tiny_model, make_rollouts):
    policy = make(tiny_model, torch.float16, learning_rate=1e-3)
    (batch,) = policy.micro_batches(make_rollouts([4]))
    before, scale = [p.detach().clone() for p in policy.model.parameters()], policy.scaler.get_scale()
    policy.backward(batch, loss_of(batch, 1e6))
    assert policy.step()[1] is False and policy.scaler.get_scale() == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    policy.backward(batch, loss_of(batch, 1e-3))
    assert policy.step()[1] is True


def test_the_scale_is_part_of_the_state(tiny_model, make_rollouts):
    policy = make(tiny_model, torch.float16)
    (batch,) = policy.micro_batches(make_rollouts([4]))
    for share in (1e6, 1e-3):
        policy.backward(batch, loss_of(batch, share))
        policy.step()
    other = make(tiny_model, torch.float16)
    other.load_state(dict(policy.masters()), dict(policy.moments()), 1)
    assert other.scaler.get_scale() == policy.scaler.get_scale() != make(tiny_model, torch.float16).scaler.get_scale()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_know_nothing_of_it(tiny_model, dtype):
    policy = make(tiny_model, dtype)
    assert policy.scaler.get_scale() == 1.0 and not [key for key, _ in policy.moments()]

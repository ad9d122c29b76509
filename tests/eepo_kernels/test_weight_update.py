"""sync and forget: exact arithmetic, unbiased rounding, reproducible bits."""

import math

import pytest
import torch
from eepo_kernels import forget, sync, tensor_key
from eepo_kernels.reference import stochastic_round
from eepo_kernels.weight_update import fused_multiply_add, philox, random_bits, round_stochastic


def one(dst, gradient, eta=1.0, **kwargs):
    kwargs = {"keys": [7], "offsets": [0], **kwargs}
    return forget([dst], [gradient], eta=eta, **kwargs)


def ulp(weight):
    """Spacing of bf16 at each weight."""
    return 2.0 ** (torch.frexp(weight.float())[1].float() - 8)


def test_philox_known_answers():
    """The published test vectors of Philox-4x32-10."""
    zero = [w.item() for w in philox(torch.zeros(1, dtype=torch.int64), 0, 0, 0)]
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    # ctr = 243f6a88 85a308d3 13198a2e 03707344, key = a4093822 299f31d0
    counter = torch.tensor([0x243F6A88 | ((0x85A308D3 << 32) - (1 << 64))], dtype=torch.int64)
    key = 0xA4093822 | (0x299F31D0 << 32)
    found = [w.item() for w in philox(counter, key, 0x13198A2E, 0x03707344)]
    assert found == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_bits_depend_on_the_flat_index_alone():
    whole = random_bits(0, 1000, 5, 1, 2, torch.device("cpu"))
    assert torch.equal(whole[123:777], random_bits(123, 654, 5, 1, 2, torch.device("cpu")))
    for other in ((0, 1000, 6, 1, 2), (0, 1000, 5, 2, 2), (0, 1000, 5, 1, 3)):
        assert not torch.equal(whole, random_bits(*other, torch.device("cpu")))


def test_fused_multiply_add_rounds_once():
    """Against exact rational arithmetic, on sums built to fall near ties."""
    from fractions import Fraction

    g = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, generator=g)
    gradient = torch.randn(3000, generator=g) * 2.0 ** torch.randint(-30, 3, (3000,), generator=g)
    eta = torch.tensor(3e-3, dtype=torch.float32).item()
    found = fused_multiply_add(weight, gradient, eta)
    for w, d, f in zip(weight.tolist(), gradient.tolist(), found.tolist(), strict=True):
        exact = Fraction(w) + Fraction(eta) * Fraction(d)
        value = torch.tensor(f)
        for neighbour in (torch.nextafter(value, torch.tensor(sign * math.inf)) for sign in (-1, 1)):
            assert abs(Fraction(f) - exact) <= abs(Fraction(neighbour.item()) - exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_matches_the_reference(dtype):
    """The bit trick against neighbours and distances in float64, through both signs and the subnormals of fp16."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20_000, generator=g) * 2.0 ** torch.randint(-22, 10, (20_000,), generator=g)
    bits = torch.randint(0, 1 << 16, (20_000,), generator=g)
    found = round_stochastic(x, dtype, bits)
    if dtype == torch.bfloat16:  # "low bits + draw carries" is "draw ≥ 65536 - low bits"
        uniform = (65535 - bits).double() / 65536
        assert torch.equal(found, stochastic_round(x.double(), dtype, uniform))
    lower = stochastic_round(x.double(), dtype, torch.ones(()).double())
    upper = stochastic_round(x.double(), dtype, -torch.ones(()).double())
    assert torch.all((found == lower) | (found == upper) | (found.double() == x.double()))


@pytest.mark.parametrize("dtype, value", [(torch.bfloat16, 1.003), (torch.float16, 1.0003), (torch.float16, 3.3e-6)])
def test_rounding_is_unbiased(dtype, value):
    x = torch.full((1 << 18,), value)
    bits = random_bits(0, len(x), 3, 0, 0, torch.device("cpu"))
    for sign in (1, -1):
        rounded = round_stochastic(sign * x, dtype, bits).double()
        sigma = rounded.std().item() / math.sqrt(len(x))
        assert abs(rounded.mean().item() - sign * x[0].item()) < 4 * sigma + 1e-9 * abs(value)
        assert rounded.unique().numel() == 2


def test_a_hundredth_of_a_step_survives_stochastic_rounding_and_not_nearest():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(10_000_000, generator=g).bfloat16()
    gradient = ulp(weight) * 0.01 * torch.sign(torch.randn(10_000_000, generator=g))
    assert one(weight.clone(), gradient, rounding="nearest").retention == 0
    updated = weight.clone()
    stats = one(updated, gradient, rounding="stochastic", seed=1, step=3)
    assert abs(stats.retention - 1) < 0.01
    assert stats.intended_norm == pytest.approx(gradient.double().norm().item(), rel=1e-6)
    assert stats.applied_norm == pytest.approx((updated.double() - weight.double()).norm().item(), rel=1e-9)
    again = weight.clone()
    one(again, gradient, rounding="stochastic", seed=1, step=3)
    assert torch.equal(again, updated)
    one(other := weight.clone(), gradient, rounding="stochastic", seed=2, step=3)
    assert not torch.equal(other, updated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_element_without_gradient_keeps_its_bits(dtype):
    weight = torch.tensor([0.0, -0.0, 1.25, -3.0, 1e-7, 6e4]).repeat(1000).to(dtype)
    before = weight.clone()
    gradient = torch.zeros(weight.shape)
    gradient[2::12] = 1.0
    stats = one(weight, gradient, eta=0.1)
    untouched = gradient == 0
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(weight.view(as_bits)[untouched], before.view(as_bits)[untouched])
    assert torch.all(weight[~untouched] != before[~untouched]) and stats.applied_norm > 0


def test_a_slice_of_a_tensor_draws_the_bits_of_the_whole():
    g = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(5000, generator=g).bfloat16(), torch.randn(5000, generator=g) * 1e-4
    whole = weight.clone()
    one(whole, gradient, seed=3)
    parts = [weight[:1703].clone(), weight[1703:].clone()]
    forget(parts, [gradient[:1703], gradient[1703:]], eta=1.0, keys=[7, 7], offsets=[0, 1703], seed=3)
    assert torch.equal(torch.cat(parts), whole)


def test_fp32_takes_the_exact_sum():
    weight, gradient = torch.randn(1000), torch.randn(1000)
    expected = (weight.double() + gradient.double() * torch.tensor(0.003).double()).float()
    stats = one(weight, gradient, eta=0.003)
    assert torch.allclose(weight, expected, rtol=2e-7, atol=0)
    assert stats.retention == pytest.approx(1, abs=1e-6) and stats.noise_ratio < 1e-3


def test_nothing_intended_has_no_retention():
    stats = one(torch.ones(5), torch.zeros(5))
    assert math.isnan(stats.retention) and math.isnan(stats.noise_ratio) and stats.applied_norm == 0


def test_sync_rounds_to_nearest_in_place():
    master = torch.randn(257)
    dst = torch.zeros(257, dtype=torch.bfloat16)
    pointer = dst.data_ptr()
    sync([dst], [master])
    assert torch.equal(dst, master.bfloat16()) and dst.data_ptr() == pointer


def test_keys_differ_by_name():
    assert tensor_key("model.layers.0.mlp.up_proj.weight") != tensor_key("model.layers.1.mlp.up_proj.weight")
    assert 0 <= tensor_key("a") < 1 << 64


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="shaped like their gradient"):
        one(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="rounding"):
        one(torch.ones(3), torch.ones(3), rounding="up")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_gives_the_bits_of_the_cpu(dtype):
    g = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(100_003, generator=g).to(dtype), torch.randn(100_003, generator=g) * 1e-3
    there, here = weight.cuda(), weight.clone()
    one(there, gradient.cuda(), seed=3, step=4)
    one(here, gradient, seed=3, step=4)
    assert torch.equal(there.cpu(), here)

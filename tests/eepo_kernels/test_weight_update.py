"""sync and forget: exact arithmetic, unbiased rounding, reproducible bits."""

import ctypes
import importlib.machinery
import math
import subprocess
from pathlib import Path

import pytest
import torch
from eepo_kernels import checksums, forget, native, sync, tensor_key, weight_update
from eepo_kernels.reference import stochastic_round
from eepo_kernels.weight_update_torch import fused_multiply_add, philox, random_bits, round_stochastic


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


def test_a_hundredth_of_a_step_survives_stochastic_rounding_only():
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
    with pytest.raises(ValueError, match=r"pairs of one shape, found \(3,\) and \(4,\)"):
        one(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="rounding"):
        one(torch.ones(3), torch.ones(3), rounding="up")


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layouts():
    """name -> (dst, gradient, offset, row stride): every way the plan may hand out a matrix."""
    g = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, generator=g) * 2.0 ** torch.randint(-18, 4, shape, generator=g)

    whole = numbers(64, 96)
    return {
        "empty": (numbers(0), numbers(0), 0, None),
        "one element": (numbers(1), numbers(1), 5, None),
        "scalar": (numbers(1)[0], numbers(1)[0], 0, None),
        "longer than a piece, begins inside a Philox group": (numbers(70_001), numbers(70_001), 13, None),
        "whole vectors": (numbers(4096), numbers(4096), 1 << 34, None),
        "columns of the source, gradient a view of it": (numbers(64, 32), whole[:, 32:64], 32, 96),
        "odd columns of the source": (numbers(64, 31), whole[:, 5:36], 5, 96),
        "contiguous shard of columns": (numbers(64, 32), numbers(64, 32), 32, 96),
        "rows inside a wider destination": (numbers(40, 50)[:, 10:40], numbers(40, 30), 0, None),
        "three dimensions": (numbers(3, 5, 7), numbers(3, 5, 7), 11, None),
    }


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_and_pytorch_give_the_same_bits(dtype, gradient_dtype, rounding):
    updated, stats = {}, {}
    for backend in ("native", "torch"):
        dst, gradients, offsets, strides = [], [], [], []
        for weight, gradient, offset, stride in layouts().values():
            base = weight.to(dtype) if weight.is_contiguous() else weight._base.to(dtype)
            dst.append(base if weight.is_contiguous() else base[:, 10:40])
            gradients.append((gradient * 1e-3 * (gradient > -0.5)).to(gradient_dtype) if gradient._base is None
                             else _scaled_view(gradient, gradient_dtype))  # fmt: skip
            offsets.append(offset)
            strides.append(stride or (weight.shape[-1] if weight.dim() else 1))
        keys = [tensor_key(name) for name in layouts()]
        options = {"eta": 0.3, "rounding": rounding, "seed": -3, "step": 1 << 33 | 9, "backend": backend}
        stats[backend] = forget(dst, gradients, keys=keys, offsets=offsets, row_strides=strides, **options)
        updated[backend] = [t.contiguous() for t in dst]
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    for name, a, b in zip(layouts(), updated["native"], updated["torch"], strict=True):
        assert torch.equal(a.view(as_bits), b.view(as_bits)), name
    for field in ("retention", "noise_ratio", "intended_norm", "applied_norm"):
        found, expected = (getattr(stats[b], field) for b in ("native", "torch"))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), field


def _scaled_view(view, dtype):
    """A view of the same layout on a scaled copy of its base."""
    base = (view._base * 1e-3).to(dtype)
    return base.as_strided(view.shape, view.stride(), view.storage_offset())


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_compiled_sync_rounds_like_pytorch(source, target):
    """Ties, both zeros, subnormals, infinities and NaN included."""
    special = torch.tensor(
        [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 6e-8, -3e-5, 1e-40, 65519.0, 65520.0, torch.inf, torch.nan]
    )
    g = torch.Generator().manual_seed(0)
    ordinary = torch.randn(5000, generator=g) * 2.0 ** torch.randint(-20, 10, (5000,), generator=g)
    master = torch.cat([special, ordinary]).to(source)
    dst = torch.zeros(len(master), dtype=target)
    sync([dst], [master], backend="native")
    assert torch.equal(dst.nan_to_num(7), master.to(target).nan_to_num(7))
    number = ~dst.isnan()
    assert torch.equal(dst.signbit()[number], master.to(target).signbit()[number])


@pytest.mark.parametrize("as_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_checksums_are_those_of_pytorch(dtype, as_dtype):
    """And theirs are the sums written out: every layout, and values near ties of rounding."""
    tensors = [weight.to(dtype) for weight, _, _, _ in layouts().values()] + [torch.randn(700, 300).to(dtype)[:, 7:205]]
    found = checksums(tensors, [as_dtype] * len(tensors), backend="native")
    assert torch.equal(found, checksums(tensors, [as_dtype] * len(tensors), backend="torch"))
    bits = tensors[-1].to(as_dtype).contiguous().view(torch.int32 if as_dtype == torch.float32 else torch.int16)
    assert found[-1].item() == sum((r + 1) * sum(row) for r, row in enumerate(bits.tolist()))


def test_one_thread_or_many_give_the_same_sums():
    weight, gradient = torch.randn(1_000_003).bfloat16(), torch.randn(1_000_003) * 1e-4
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(one(weight.clone(), gradient, seed=1))
    torch.set_num_threads(threads)
    assert len({(s.retention, s.noise_ratio, s.applied_norm) for s in found}) == 1


def test_plain_and_vectorised_builds_give_the_same_bits(tmp_path):
    """The library picks AVX-512 or AVX2 where it runs; here it is compiled for neither."""
    root = Path(__file__).parents[2]
    flags = ["-O1", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-DEEPO_NO_CLONES"]
    plain = tmp_path / "plain.so"
    subprocess.run(["g++", *flags, "-o", str(plain), str(root / "csrc/weight_update_cpu.cpp")], check=True)
    weight, gradient = torch.randn(70_003).bfloat16(), torch.randn(70_003) * 1e-3
    vectorised, scalar = weight.clone(), weight.clone()
    one(vectorised, gradient, seed=4, backend="native")
    table = native.matrix_table([scalar], [gradient], [7], [0], [len(scalar)])
    update = native.Update.of(native.FORGET_STOCHASTIC, 1.0, 0, 4)
    sums = torch.zeros(4, dtype=torch.float64)
    pointers = (
        ctypes.c_void_p(table.data_ptr()),
        ctypes.c_int64(1),
        ctypes.byref(update),
        ctypes.c_void_p(sums.data_ptr()),
    )
    ctypes.CDLL(str(plain)).eepo_weight_update_cpu(*pointers, ctypes.c_int32(1))
    assert torch.equal(vectorised, scalar)


def test_without_a_compiled_part_pytorch_serves_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(native, "library", lambda device_type: None)
    weight_update._say_fallback.cache_clear()
    weight = torch.ones(100).bfloat16()
    for _ in range(3):
        stats = one(weight, torch.full((100,), 1e-3))
    assert stats.intended_norm > 0
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1 and "was built without its cpu part" in messages[0]
    with pytest.raises(ValueError, match="native cannot take these tensors"):
        one(weight, torch.ones(100), backend="native")


def test_tensors_that_csrc_cannot_take_are_updated_in_pytorch():
    master, dst = torch.randn(6, 8, dtype=torch.float64), torch.zeros(8, 6).t()
    sync([dst], [master])
    assert torch.equal(dst, master.float())


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_bits_of_the_cpu(dtype, rounding):
    weights, gradients = [], []
    for weight, gradient, _, _ in layouts().values():
        weights.append(weight.to(dtype) if weight.is_contiguous() else weight._base.to(dtype)[:, 10:40])
        gradients.append(gradient * 1e-3 if gradient._base is None else _scaled_view(gradient, torch.float32))
    there = [w.cuda() for w in weights]
    keys, offsets = [tensor_key(name) for name in layouts()], [offset for _, _, offset, _ in layouts().values()]
    options = {"eta": 0.3, "keys": keys, "offsets": offsets, "rounding": rounding, "seed": 3, "step": 4}
    on_gpu = forget(there, [g.cuda() for g in gradients], **options, backend="native")
    on_cpu = forget(weights, gradients, **options, backend="native")
    for a, b in zip(there, weights, strict=True):
        assert torch.equal(a.cpu(), b)
    assert on_gpu.retention == pytest.approx(on_cpu.retention, rel=1e-4)
    assert torch.equal(checksums(there, backend="native").cpu(), checksums(weights, backend="torch"))
    master = [torch.randn(w.shape) for w in weights]
    sync(there, [m.cuda() for m in master], backend="native")
    for a, m in zip(there, master, strict=True):
        assert torch.equal(a.cpu(), m.to(dtype))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_rows_that_overlap_are_read_as_they_are(rounding):
    """A gradient expanded along its rows has a stride of 0: one row of memory, not as many as it has rows."""
    gradient = torch.randn(8)
    found, expected = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(4, 8, dtype=torch.bfloat16)
    options = dict(eta=0.1, keys=[1], offsets=[0], rounding=rounding)
    forget([found], [gradient.expand(4, 8)], **options)
    forget([expected], [gradient.expand(4, 8).contiguous()], **options)
    assert torch.equal(found, expected)
    sync([found], [gradient.expand(4, 8)])
    assert torch.equal(found, gradient.expand(4, 8).bfloat16())


def test_a_library_that_cannot_be_loaded_is_said_and_not_used(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    spec = importlib.machinery.ModuleSpec("eepo_kernels._C", None, origin=str(broken))
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: spec)
    native.library.cache_clear()
    try:
        assert native.library("cpu") is None
        assert any("cannot be loaded" in record.getMessage() for record in caplog.records)
    finally:
        native.library.cache_clear()


def test_a_library_of_other_sources_is_said_and_left_out(monkeypatch, caplog):
    """After a `git pull` without a build."""
    native.library.cache_clear()
    monkeypatch.setitem(native.FUNCTIONS, "cpu", ("eepo_weight_update_cpu", "eepo_of_tomorrow"))
    found = native.library("cpu")
    native.library.cache_clear()
    assert found is None and "without eepo_of_tomorrow; `pip install -e .` builds it again" in caplog.text

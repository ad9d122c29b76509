"""The row kernels with the arithmetic of a GPU.

Triton's interpreter computes exp, log and quotients to half an ulp; the hardware does not. Here exp is 2^x of a rounded
product, exponentials, logarithms and quotients are off by up to 2 ulp, and exp2, which Triton compiles to
ex2.approx.ftz (its exp to a form that keeps subnormals), is zero where the result is subnormal. What
tests/eepo_kernels/test_linear_loss.py asks of the head has to hold all the same.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels run on the GPU itself here", allow_module_level=True)

import triton
import triton.language as tl
from eepo_kernels import row_stats
from triton.runtime import interpreter

TINY = np.finfo(np.float32).tiny  # the smallest normal number


def head_tests():
    path = Path(__file__).parents[1] / "eepo_kernels" / "test_linear_loss.py"
    spec = importlib.util.spec_from_file_location("rehearsed_linear_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HEAD = head_tests()
PLACE = HEAD.Place("cpu", "triton")


def off(exact: np.ndarray, how: str) -> np.ndarray:
    """fp32 of what float64 gives, and up to 2 ulp away: always up, always down, or each way by chance of its bits."""
    rounded = exact.astype(np.float32)
    if how == "mixed":
        hashed = (np.abs(exact).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(61)
        steps = hashed.astype(np.int64) % 5 - 2
    else:
        steps = np.full(rounded.shape, {"up": 2, "down": -2}[how])
    moved = (rounded.view(np.int32) + np.where(rounded.view(np.int32) < 0, -steps, steps)).astype(np.int32)
    ordinary = np.isfinite(rounded) & (np.abs(rounded) >= 2 * TINY) & (np.abs(rounded) < 1e38)
    return np.where(ordinary, moved.view(np.float32), rounded)


def hardware_exp2(x: np.ndarray, how: str) -> np.ndarray:
    found = power_of_two(x, how)
    return np.where(np.abs(found) < TINY, np.float32(0), found)


def hardware_exp(x: np.ndarray, how: str) -> np.ndarray:
    return power_of_two(x * np.float32(1.4426950408889634), how)


def power_of_two(x: np.ndarray, how: str) -> np.ndarray:
    """2^0 is 1 to the bit."""
    return np.where(x == 0, np.float32(1), off(np.exp2(x.astype(np.float64)), how))


@pytest.fixture(params=["up", "down", "mixed"])
def hardware(request, monkeypatch):
    """The interpreter's exp, exp2, log and division, in fp32, as a GPU has them. Counts what it was asked for."""
    how, counts = request.param, {"exp": 0, "log": 0, "div": 0}

    def replace(name: str, kind: str, of) -> None:
        real = getattr(interpreter.InterpreterBuilder, name)

        def op(self, *handles):
            if any(h.data.dtype != np.float32 for h in handles):
                return real(self, *handles)
            counts[kind] += 1
            with np.errstate(all="ignore"):
                found = np.asarray(of(*(np.asarray(h.data) for h in handles)), dtype=np.float32)
            return interpreter.TensorHandle(found, handles[0].dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, op)

    replace("create_exp", "exp", lambda x: hardware_exp(x, how))
    replace("create_exp2", "exp", lambda x: hardware_exp2(x, how))
    replace("create_log", "log", lambda x: np.where(x == 1, np.float32(0), off(np.log(x.astype(np.float64)), how)))
    for name in ("create_fdiv", "create_precise_divf"):
        replace(name, "div", lambda x, y: off(x.astype(np.float64) / y.astype(np.float64), how))
    return counts


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_stable_form(hardware, offset):
    HEAD.test_stable_form_from_tiny_p_to_a_target_far_ahead(PLACE, offset)
    assert all(hardware.values()), hardware


@pytest.mark.parametrize("name", ["logprobs", "entropy", "log1mp"])
def test_gradients_of_the_stable_form(hardware, name):
    HEAD.test_gradients_of_the_stable_form(PLACE, name)


@pytest.mark.parametrize("shape", [(13, 16, 50), (6, 8, 2101)], ids=["one block", "several"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0], ids=["flat", "random", "peaked"])
def test_error_is_bounded_by_plain_torch(hardware, shape, scale):
    batches = [HEAD.inputs(shape, scale=scale, bias=True, seed=seed) for seed in range(2)]
    HEAD.assert_as_good_as_plain_torch(PLACE, batches, (HEAD.ALL_ROWS,))


def test_peaked_to_one(hardware):
    HEAD.test_peaked_to_one(PLACE)


def test_large_offsets(hardware):
    HEAD.test_large_offset_does_not_cost_accuracy(PLACE, 1e4)


def test_rows_without_scale(hardware):
    HEAD.test_minus_infinity_contributes_nothing(PLACE)
    HEAD.test_the_only_word_there_is(PLACE)
    HEAD.test_nan_stays_in_its_row(PLACE)


@triton.jit
def log_of_a_sum(y):
    return tl.log(1.0 + y)


@triton.jit
def difference_of_logs(x):
    """log(1 - p) as it is written: fine in exact arithmetic."""
    p = 1.0 / (1.0 + tl.exp(-x))
    return -tl.log(1.0 - p)


@pytest.mark.parametrize("name, form", [("log1p_unit", log_of_a_sum), ("softplus", difference_of_logs)])
def test_a_form_that_is_not_stable_fails(hardware, monkeypatch, name, form):
    """Negative control: the same mathematics, written so that it cancels."""
    monkeypatch.setattr(row_stats, name, form)
    with pytest.raises(AssertionError):
        HEAD.test_stable_form_from_tiny_p_to_a_target_far_ahead(PLACE, 0.0)

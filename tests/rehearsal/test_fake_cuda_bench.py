"""Benches on a GPU that is not there, up to their first timing: what would stop them, and what they measure beside."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("fake_device", Path(__file__).with_name("fake_device.py"))
fake_device = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_device)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    return fake_device.play(
        tmp_path_factory.getbasetemp().parent,
        [
            ["iteration", "bench_iteration", {}, None],
            ["its counter", "bench_iteration", {}, "flops_by_pytorch_alone"],
            ["weight update", "bench_weight_update", {}, None],
            ["its baseline", "bench_weight_update", {}, "baseline_on_the_host"],
        ],
    )


def test_an_iteration_s_flops_are_counted(played):
    """A GPU alone has the product that takes 16 bits and gives 32, whose formula PyTorch does not know."""
    flops = played["iteration"]["flops"]
    assert 1.1 < flops["eepo"] / flops["grpo"] < 2
    assert played["iteration"]["attention"]["varlen"] > 0
    assert played["its counter"]["error"].startswith("TypeError")


def test_a_weight_update_is_compared_with_a_copy_on_its_device(played):
    assert played["weight update"]["host_gib"] < 0.01
    assert set(played["weight update"]["updates"]) == {"0", "1", "2"}, "sync, forget to nearest, forget stochastically"
    assert played["its baseline"]["host_gib"] > 1

"""setup.py without a working compiler: a warning and PyTorch in its place, or an error where CUDA was asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", reason="setuptools is not installed in this environment")

NVCC = {
    "too old for --list-gpu-code": "exit 1",
    "knows none of the chips": '[ "$1" = --list-gpu-code ] && echo sm_52 sm_70 && exit 0; exit 1',
    "fails to compile": '[ "$1" = --list-gpu-code ] && echo sm_80 sm_90 && exit 0; exit 1',
}


def build(tmp_path, nvcc, **variables):
    fake = tmp_path / "bin" / "nvcc"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(f"#!/bin/sh\n{nvcc}\n")
    fake.chmod(0o755)
    environment = os.environ | {"CC": "false", "CXX": "false", **variables}
    environment["PATH"] = f"{fake.parent}:{environment['PATH']}"
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}/lib", f"--build-temp={tmp_path}/temp"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("nvcc", NVCC)
def test_a_compiler_that_does_not_work_is_a_warning(tmp_path, nvcc):
    done = build(tmp_path, NVCC[nvcc])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "_C_cuda" in done.stdout + done.stderr and not list((tmp_path / "lib").rglob("*.so"))


@pytest.mark.parametrize("nvcc", NVCC)
def test_unless_cuda_was_asked_for(tmp_path, nvcc):
    assert build(tmp_path, NVCC[nvcc], EEPO_BUILD_CUDA="1").returncode != 0


def test_cuda_can_be_left_out(tmp_path):
    done = build(tmp_path, "exit 1", EEPO_BUILD_CUDA="0")
    assert done.returncode == 0 and "_C_cuda" not in done.stdout + done.stderr


def test_a_value_that_means_nothing_is_refused(tmp_path):
    done = build(tmp_path, "exit 1", EEPO_BUILD_CUDA="yes")
    assert done.returncode != 0 and "EEPO_BUILD_CUDA" in done.stderr + done.stdout


def test_make_lets_python_keep_what_it_has_compiled():
    """Many a container sets this; every process would compile PyTorch's Python anew."""
    command = ["make", "-s", "--eval", "seen:\n\t@env", "seen"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "PYTHONUNBUFFERED=1" in done.stdout and "PYTHONDONTWRITEBYTECODE" not in done.stdout

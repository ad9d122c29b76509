"""Packages live in two rooms: eepo_fast/ and kernels/eepo_kernels/.

kernels/ is a folder, never a package: transformers looks for the PyPI package `kernels`, and an __init__.py there
would shadow it. configs/ travels inside a wheel as eepo_fast/configs. This file must not import torch, so that isolated
builds work: csrc/ is free of torch's headers.

csrc/ becomes two plain shared libraries: eepo_kernels._C (CPU, any C++ compiler) and eepo_kernels._C_cuda, where a CUDA
toolkit is found. EEPO_BUILD_CUDA=1 fails without one, EEPO_BUILD_CUDA=0 leaves it out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPU_FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CUDA_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "--threads=0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHES = (80, 90, 100)  # those the toolkit knows; the last one also as PTX, for chips that come later


def find_nvcc() -> str | None:
    wanted = os.environ.get("EEPO_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"EEPO_BUILD_CUDA: expected 0 or 1, found {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None and wanted == "1":
        sys.exit("EEPO_BUILD_CUDA=1: expected nvcc on the PATH or under CUDA_HOME, found none; install a CUDA toolkit")
    return nvcc


class BuildLibraries(build_ext):
    """nvcc for .cu; and a failed CPU build is reported and left out, because PyTorch serves in its place."""

    def build_extension(self, extension):
        if not extension.name.endswith("_cuda"):
            super().build_extension(extension)
            return
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            command = [find_nvcc(), "-shared", *CUDA_FLAGS, *self.arch_flags(), "-o", str(target), *extension.sources]
            print(" ".join(command))
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError, LookupError) as error:
            if os.environ.get("EEPO_BUILD_CUDA") == "1":
                raise
            raise CompileError(f"{error}; EEPO_BUILD_CUDA=1 makes this an error") from error  # optional: a warning

    @staticmethod
    def arch_flags():
        known = subprocess.run([find_nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
        arches = [arch for arch in CUDA_ARCHES if f"sm_{arch}" in known.split()]
        if not arches:
            raise LookupError(f"nvcc compiles for none of sm_{', sm_'.join(map(str, CUDA_ARCHES))}")
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches]
        return [*code, f"-gencode=arch=compute_{arches[-1]},code=compute_{arches[-1]}"]


HEADERS = ["csrc/rounding.h", "csrc/weight_update.h"]
extensions = [
    Extension(
        "eepo_kernels._C",
        ["csrc/weight_update_cpu.cpp"],
        depends=HEADERS,
        extra_compile_args=CPU_FLAGS,
        extra_link_args=["-pthread"],
        optional=True,
    )
]
if find_nvcc() is not None:
    cuda = Extension("eepo_kernels._C_cuda", ["csrc/weight_update_cuda.cu"], depends=HEADERS, optional=True)
    extensions.append(cuda)

setup(
    packages=[*find_packages(include=["eepo_fast", "eepo_fast.*"]), "eepo_kernels", "eepo_fast.configs"],
    package_dir={"eepo_kernels": "kernels/eepo_kernels", "eepo_fast.configs": "configs"},
    package_data={"eepo_fast.configs": ["*.yaml", "*/*.yaml"], "eepo_fast.report": ["assets/*"]},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildLibraries},
)

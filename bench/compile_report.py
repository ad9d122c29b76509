"""Compile every Triton kernel and every kernel of csrc/ for the GPUs named, on a machine that may have none, and print
registers, shared memory, stack and spills a kernel. Exits with 1 on a compile error or a spill.

    python bench/compile_report.py --arch 80,90,100
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import eepo_kernels
import triton
from eepo_kernels import row_stats
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

CSRC = Path(__file__).parent.parent / "csrc"
CUDA_FLAGS = ["-O3", "-std=c++17", "-fmad=false"]  # as in setup.py
ARCHES = {80: "A100", 90: "H100, H200", 100: "B200"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Usage(NamedTuple):
    kernel: str
    variant: str
    arch: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    local_bytes: int
    """Local memory beside the stack: where the compiler spills to."""

    @property
    def spills(self) -> bool:
        return self.stack_bytes > 0 or self.local_bytes > 0


ROW_POINTERS = ["logits_ptr", "bias_ptr"]
STATS = ["logprobs_ptr", "entropy_ptr", "log1mp_ptr", "shift_ptr", "total_ptr"]
COEFFICIENTS = ["a_ptr", "b_ptr", "c_ptr"]


def triton_variants():
    """(kernel, name of the variant, signature, constants): what the launchers ask for, aligned as they align it. A V
    that 16 divides is a version of its own, as it is when launched."""
    for has_bias, even_v in itertools.product((False, True), (True, False)):
        constants = {"HAS_BIAS": has_bias, "BLOCK_V": row_stats.BLOCK_V, "even_v": even_v}
        name = f"{'bias' if has_bias else 'no bias'}, {'V % 16 = 0' if even_v else 'odd V'}"
        common = dict.fromkeys([*ROW_POINTERS, *STATS], "*fp32") | {"targets_ptr": "*i64", "V": "i32"}
        common |= {"inverse_temperature": "fp32", "stride_n": "i32"}
        for dtype in ("fp32", "bf16", "fp16"):
            yield row_stats.row_stats_fwd_kernel, f"{dtype}, {name}", common | {"logits_ptr": f"*{dtype}"}, constants
        for dtype in ("fp32", "bf16", "fp16"):
            types = common | dict.fromkeys(COEFFICIENTS, "*fp32")
            types |= {"index_ptr": "*i64", "grad_ptr": f"*{dtype}", "stride_k": "i32"}
            yield row_stats.row_grad_kernel, f"{dtype}, {name}", types, constants


def all_kernels() -> list[str]:
    """Names of all Triton kernels of the package."""
    modules = [importlib.import_module(f"eepo_kernels.{m.name}") for m in pkgutil.iter_modules(eepo_kernels.__path__)
               if not m.name.startswith("_")]  # fmt: skip
    jitted = {name for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)}
    return sorted(name for name in jitted if name.endswith("_kernel"))


def compile_triton(kernel, variant: str, types: dict, constants: dict, arch: int) -> Usage:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = dict(constants)
    divisible = ("V",) if constants.pop("even_v") else ()
    divisible += tuple(name for name in kernel.arg_names if name.endswith("_ptr") or name.startswith("stride"))
    aligned = [kernel.arg_names.index(name) for name in divisible]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes)
    options = {"num_warps": row_stats.NUM_WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (usage,) = resource_usage(Path(file.name), CUOBJDUMP, arch, variant)
    return usage._replace(shared_bytes=compiled.metadata.shared)


def resource_usage(cubin: Path, cuobjdump: Path | str, arch: int, variant: str) -> list[Usage]:
    command = [str(cuobjdump), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"Function ([^\n:]+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found = re.findall(pattern, text)
    assert found, f"no resource usage in the output of {' '.join(command)}"
    return [
        Usage(name, variant, arch, int(reg), int(shm), int(stack), int(loc)) for name, reg, stack, shm, loc in found
    ]


def compile_csrc(arch: int) -> list[Usage]:
    """Every csrc/*.cu with nvcc. RuntimeError with the compiler's words if one does not compile."""
    usages = []
    for file in sorted(CSRC.glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            command = ["nvcc", f"-arch=sm_{arch}", *CUDA_FLAGS, "-cubin", "-o", str(cubin), str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            usages += resource_usage(cubin, shutil.which("cuobjdump") or CUOBJDUMP, arch, file.name)
    return usages


def report(arches: list[int]) -> tuple[list[Usage], list[str]]:
    """What every kernel uses on every architecture, and what went wrong, a line each."""
    usages, errors = [], []
    covered = {kernel.__name__ for kernel, *_ in triton_variants()}
    errors += [f"{name} is in no variant of this report" for name in all_kernels() if name not in covered]
    for arch in arches:
        for variant in triton_variants():
            try:
                usages.append(compile_triton(*variant, arch))
            except Exception as error:
                errors.append(f"{variant[0].__name__} ({variant[1]}) does not compile for sm_{arch}: {error}")
        try:
            usages += compile_csrc(arch)
        except (RuntimeError, OSError) as error:
            errors.append(f"csrc does not compile for sm_{arch}: {error}")
    errors += [f"{u.kernel} ({u.variant}) spills on sm_{u.arch}" for u in usages if u.spills]
    return usages, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities without the point, as in 80,90,100")
    arches = [int(arch) for arch in parser.parse_args().arch.split(",")]
    usages, errors = report(arches)
    print(f"triton {triton.__version__}; nvcc {shutil.which('nvcc') or 'not found'}")
    print(f"{'kernel':28} {'variant':26} {'arch':18} {'registers':>9} {'shared B':>9} {'stack B':>8} {'spilled B':>9}")
    for u in usages:
        arch = f"sm_{u.arch} {ARCHES.get(u.arch, '')}"
        numbers = f"{u.registers:9} {u.shared_bytes:9} {u.stack_bytes:8} {u.local_bytes:9}"
        print(f"{u.kernel:28} {u.variant:26} {arch:18} {numbers}")
    if not any(CSRC.glob("*.cu")):
        print("csrc: no kernels yet")
    for error in errors:
        print(error, file=sys.stderr)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()

"""Compile every Triton kernel and every kernel of csrc/ for the GPUs named, on a machine that may have none, and print
registers, shared memory and spills a kernel, and what its inner loop costs: instructions and bytes a logit or weight.

    python bench/compile_report.py --arch 80,90,100
    pip install --no-deps --target /tmp/triton36 triton==3.6.0          # the one that CUDA's torch 2.11 brings
    python bench/compile_report.py --triton /tmp/triton36               # with that one in place of the installed one

Exits with 1 on a compile error, on a spill, and where a kernel needs more instructions or registers than compiled.json,
beside this file, has for the same compiler. --write puts what was found there.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import eepo_kernels
import sass
import triton
from eepo_kernels import row_stats
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

CSRC = Path(__file__).parent.parent / "csrc"
CUDA_FLAGS = ["-O3", "-std=c++17", "-fmad=false"]  # as in setup.py
ARCHES = {80: "A100", 90: "H100, H200", 100: "B200"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
FIGURES = Path(__file__).parent / "compiled.json"
TOLERANCE = 0.05  # instructions an element: what rounding hides
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class Usage(NamedTuple):
    kernel: str
    variant: str
    arch: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    local_bytes: int
    """Local memory beside the stack: where the compiler spills to."""
    instructions: float | None = None
    """Instructions of the inner loop, a logit or weight; None for a kernel whose elements are not known here."""
    moved_bytes: float | None = None

    @property
    def spills(self) -> bool:
        return self.stack_bytes > 0 or self.local_bytes > 0

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.variant}"

    def with_loop(self, loop: sass.Loop | None, elements: float) -> Usage:
        """Adds the loop's cost. elements: that a thread takes a turn of its inner loop."""
        if loop is None or not elements:
            return self
        moved = (loop.loaded_bytes + loop.stored_bytes) / elements
        return self._replace(instructions=round(loop.instructions / elements, 1), moved_bytes=round(moved, 2))


ROW_POINTERS = ["logits_ptr", "bias_ptr"]
STATS = ["logprobs_ptr", "entropy_ptr", "log1mp_ptr", "shift_ptr", "total_ptr"]
COEFFICIENTS = ["a_ptr", "b_ptr", "c_ptr"]


def triton_variants():
    """Yields (kernel, name of the variant, signature, constants): what the launchers ask for, aligned as they align it.
    A V that 16 divides is a version of its own, as it is when launched."""
    for before, even_v in itertools.product(("no bias", "bias", "softcap"), (True, False)):
        flags = {"HAS_BIAS": before == "bias", "HAS_CAP": before == "softcap"}
        constants = flags | {"BLOCK_V": row_stats.BLOCK_V, "even_v": even_v}
        name = f"{before}, {'V % 16 = 0' if even_v else 'odd V'}"
        common = dict.fromkeys([*ROW_POINTERS, *STATS], "*fp32") | {"targets_ptr": "*i64", "V": "i32"}
        common |= {"inverse_temperature": "fp32", "softcap": "fp32", "stride_n": "i32"}
        for dtype in ("fp32", "bf16", "fp16"):
            yield row_stats.row_stats_fwd_kernel, f"{dtype}, {name}", common | {"logits_ptr": f"*{dtype}"}, constants
        for dtype in ("fp32", "bf16", "fp16"):
            types = common | dict.fromkeys(COEFFICIENTS, "*fp32")
            types |= {"index_ptr": "*i64", "grad_ptr": f"*{dtype}", "stride_k": "i32"}
            yield row_stats.row_grad_kernel, f"{dtype}, {name}", types, constants


def all_kernels() -> list[str]:
    """Returns the names of all Triton kernels of the package."""
    modules = [importlib.import_module(f"eepo_kernels.{m.name}") for m in pkgutil.iter_modules(eepo_kernels.__path__)
               if not m.name.startswith("_")]  # fmt: skip
    jitted = {name for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)}
    return sorted(name for name in jitted if name.endswith("_kernel"))


def compile_triton(kernel, variant: str, types: dict, constants: dict, arch: int) -> Usage:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = dict(constants)
    divisible = ("V",) if constants.pop("even_v") else ()
    divisible += tuple(name for name in kernel.arg_names if name.endswith("_ptr") or name.startswith("stride"))
    aligned = [kernel.arg_names.index(name) for name in divisible if name not in row_stats.ANY_ALIGNMENT]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes)
    options = {"num_warps": row_stats.NUM_WARPS, "enable_fp_fusion": row_stats.LAUNCH["enable_fp_fusion"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    # a logit is read once, and its word's bias with it
    element_bytes = ITEM_BYTES[types["logits_ptr"].removeprefix("*")] + (4 if constants["HAS_BIAS"] else 0)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (usage,) = resource_usage(Path(file.name), arch, variant)
        loop = sass.main_loop(sass.disassemble(Path(file.name), tool("nvdisasm"))[usage.kernel])
    usage = usage._replace(shared_bytes=compiled.metadata.shared)
    return usage.with_loop(loop, loop.loaded_bytes / element_bytes if loop else 0)


def tool(name: str) -> str:
    """Returns the path of a CUDA toolkit's tool, else of the one that Triton brings."""
    return shutil.which(name) or str(TOOLS / name)


def resource_usage(cubin: Path, arch: int, variant: str) -> list[Usage]:
    command = [tool("cuobjdump"), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"Function ([^\n:]+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found = re.findall(pattern, text)
    assert found, f"no resource usage in the output of {' '.join(command)}"
    return [
        Usage(name, variant, arch, int(reg), int(shm), int(stack), int(loc)) for name, reg, stack, shm, loc in found
    ]


OPERATIONS = ("sync", "forget nearest", "forget stochastic")  # as in csrc/weight_update.h, and so are the dtypes
DTYPES = ("fp32", "bf16", "fp16")
MANGLED = re.compile(r"\d((?:[a-z]+_)+kernel)(?:I((?:Li\d+E)+)E)?")


def name_csrc(usage: Usage, lines: list[str]) -> Usage:
    """Names a kernel as the source does and by what its template was filled with, and adds the cost of its inner loop
    where its elements are known."""
    found = MANGLED.search(usage.kernel)
    if not found:
        return usage
    usage, loop = usage._replace(kernel=found[1]), sass.main_loop(lines)
    if found[1] != "weight_update_kernel" or not found[2]:
        return usage
    operation, dst, src = (int(number) for number in re.findall(r"Li(\d+)E", found[2]))
    usage = usage._replace(variant=f"{OPERATIONS[operation]}, {DTYPES[dst]} from {DTYPES[src]}")
    return usage.with_loop(loop, loop.stored_bytes / ITEM_BYTES[DTYPES[dst]] if loop else 0)


def compile_csrc(arch: int) -> list[Usage]:
    """Compiles every csrc/*.cu with nvcc. RuntimeError with the compiler's words if one does not compile."""
    usages = []
    for file in sorted(CSRC.glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            command = ["nvcc", f"-arch=sm_{arch}", *CUDA_FLAGS, "-cubin", "-o", str(cubin), str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            functions = sass.disassemble(cubin, tool("nvdisasm"))
            usages += [name_csrc(u, functions[u.kernel]) for u in resource_usage(cubin, arch, file.name)]
    return usages


def compilers() -> dict[str, str]:
    """Returns which compiler makes the Triton kernels, and which those of csrc/, as compiled.json names them."""
    found = {"triton": f"triton {triton.__version__}", "csrc": "nvcc not found"}
    if shutil.which("nvcc"):
        said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        found["csrc"] = "nvcc " + re.search(r"release (\S+),", said)[1]
    return found


def compiler_of(usage: Usage) -> str:
    return compilers_here["triton" if usage.kernel in all_kernels() else "csrc"]


compilers_here = compilers()


def compare(usages: Iterable[Usage], figures: dict) -> tuple[list[str], list[str]]:
    """Returns (kernels that have got worse than the committed figures of their compiler, compilers that have none)."""
    worse, unknown = [], set()
    for u in usages:
        known = figures.get(compiler_of(u), {}).get(f"sm_{u.arch}")
        if known is None:
            unknown.add(f"{compiler_of(u)} has no figures for sm_{u.arch} in {FIGURES.name}: nothing to compare with")
            continue
        if u.name not in known:
            worse.append(f"{u.name} on sm_{u.arch} is not in {FIGURES.name}; --write puts it there")
            continue
        registers, instructions = known[u.name]
        where = f"{u.name}, on sm_{u.arch} with {compiler_of(u)}"
        if u.registers > registers:
            worse.append(f"{where}: {u.registers} registers, {registers} before")
        if instructions is not None and (u.instructions is None or u.instructions > instructions + TOLERANCE):
            worse.append(f"{where}: {u.instructions} instructions an element, {instructions} before")
    return worse, sorted(unknown)


def write_figures(usages: Iterable[Usage], figures: dict) -> None:
    """Writes the figures of this report's compilers and GPUs in place of what was there for them."""
    found: dict = {}
    for u in usages:
        of_gpu = found.setdefault(compiler_of(u), {}).setdefault(f"sm_{u.arch}", {})
        of_gpu[u.name] = [u.registers, u.instructions]
    for compiler, gpus in found.items():
        figures.setdefault(compiler, {}).update(gpus)
    text = json.dumps(figures, indent=1, sort_keys=True)
    text = re.sub(r"\[\s+(\S+)\s+(\S+)\s+\]", r"[\1 \2]", text)  # a kernel a line
    FIGURES.write_text(text + "\n", encoding="utf-8")


def report(arches: list[int]) -> tuple[list[Usage], list[str]]:
    """Returns what every kernel uses on every architecture, and what went wrong, a line each."""
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


def print_table(usages: Iterable[Usage]) -> None:
    print(f"{'kernel':22} {'variant':32} {'arch':16} {'registers':>9} {'instructions':>12} {'bytes':>6} "
          f"{'shared B':>9} {'stack B':>8} {'spilled B':>9}")  # fmt: skip
    for u in usages:
        loop = "".join(f"{'-' if x is None else x:>{n}}" for x, n in ((u.instructions, 13), (u.moved_bytes, 7)))
        numbers = f"{u.registers:9}{loop} {u.shared_bytes:9} {u.stack_bytes:8} {u.local_bytes:9}"
        print(f"{u.kernel:22} {u.variant:32} {f'sm_{u.arch} {ARCHES.get(u.arch, str())}':16} {numbers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities without the point, as in 80,90,100")
    parser.add_argument("--triton", metavar="PATH", help="a folder that holds another Triton (pip install --target)")
    parser.add_argument("--write", action="store_true", help=f"keep what is found in {FIGURES.name}")
    args = parser.parse_args()
    if args.triton:  # another process: this one has imported the installed one
        again = [sys.executable, __file__, "--arch", args.arch, *(["--write"] if args.write else [])]
        path = os.pathsep.join(filter(None, [args.triton, os.environ.get("PYTHONPATH")]))
        sys.exit(subprocess.run(again, env=os.environ | {"PYTHONPATH": path}, check=False).returncode)
    usages, errors = report([int(arch) for arch in args.arch.split(",")])
    print("; ".join(compilers_here.values()))
    print("instructions, bytes: of the inner loop, a logit or weight")
    print_table(usages)
    if not any(CSRC.glob("*.cu")):
        print("csrc: no kernels yet")
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    if args.write and not errors:
        write_figures(usages, figures)
    worse, unknown = ([], []) if args.write else compare(usages, figures)
    print(*unknown, sep="\n", end="\n" if unknown else "")
    print(*errors, *worse, sep="\n", end="", file=sys.stderr)
    sys.exit(1 if errors or worse else 0)


if __name__ == "__main__":
    main()

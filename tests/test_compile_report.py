"""bench/compile_report.py as it is run: every kernel for every GPU, and what it does when one goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "compile_report.py"


def run(code_or_script, *args):
    """Outside the interpreter that the other tests run kernels in."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *([str(code_or_script)] if isinstance(code_or_script, Path) else ["-c", code_or_script])]
    return subprocess.run([*command, *args], capture_output=True, text=True, check=False, env=environment, timeout=500)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu_without_a_spill():
    done = run(SCRIPT, "--arch", "80,90,100")
    assert done.returncode == 0, done.stderr
    for arch in ("sm_80 A100", "sm_90 H100, H200", "sm_100 B200"):
        lines = [line for line in done.stdout.splitlines() if arch in line]
        assert sum("row_stats_fwd_kernel" in line for line in lines) == 18
        assert sum("row_grad_kernel" in line for line in lines) == 18
        assert sum("weight_update_kernel" in line for line in lines) == 24  # 3 operations on 3 dtypes from 3
        assert sum("checksum_kernel" in line for line in lines) == 1
        # the goals, instructions a logit; a weight of the forget step: from the 50 of a kernel that knew no dtypes
        assert most_instructions(lines, "row_stats_fwd_kernel", "no bias") <= 21
        assert most_instructions(lines, "row_grad_kernel", "no bias") <= 18
        assert most_instructions(lines, "weight_update_kernel", "forget stochastic, bf16 from fp32") <= 40


def most_instructions(lines, kernel, variant):
    """Of the lines that are meant: the fifth column from the right."""
    found = [line.split()[-5] for line in lines if line.startswith(kernel) and variant in line]
    assert found
    return max(map(float, found))


BREAK = """
import sys; sys.path.insert(0, {folder!r}); sys.argv = ["compile_report.py", "--arch", "90"]
import compile_report
{change}
compile_report.main()
"""


# One kernel in one variant, so that a control takes seconds.
ONE_OF_TRITON = "one = compile_report.triton_variants; compile_report.triton_variants = lambda: list(one())[:1]; "
ONE_OF_TRITON += "compile_report.all_kernels = lambda: ['row_stats_fwd_kernel']; "
ONE = ONE_OF_TRITON + "compile_report.compile_csrc = lambda arch: []; "


# Compiled once; then the report is made again and again, with what its figures say.
AGAIN = """
import contextlib, io, json, pathlib
compiled = compile_report.report([90])
compile_report.report = lambda arches: compiled
compile_report.FIGURES = figures = pathlib.Path({figures!r})

def made():
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            compile_report.main()
        except SystemExit as end:
            return end.code, said.getvalue()

sys.argv.append("--write")
found = {{"wrote": made()}}
sys.argv.pop()
found["right"] = made()
((compiler, gpus),) = json.loads(figures.read_text()).items()
((name, (registers, instructions)),) = gpus["sm_90"].items()
assert registers > 0 and instructions > 8
better = {{"registers": [registers - 1, instructions], "instructions": [registers, instructions - 1]}}
for case, then in {{**better, "no figure": None}}.items():
    figures.write_text(json.dumps({{compiler: {{"sm_90": {{name: then}} if then else {{}}}}}}))
    found[case] = made()
print("FOUND", json.dumps(found))
sys.exit()
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of one kernel: figures are written, and then say that it was better once."""
    change = ONE + AGAIN.format(figures=str(tmp_path_factory.mktemp("report") / "figures.json"))
    done = run(BREAK.format(folder=str(SCRIPT.parent), change=change))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("FOUND ")[2])


def test_a_kernel_as_good_as_its_figure_passes(reports):
    assert reports["wrote"][0] == reports["right"][0] == 0, reports


@pytest.mark.parametrize(
    "case, words",
    [
        ("registers", "registers, "),
        ("instructions", "instructions an element, "),
        ("no figure", "is not in figures.json"),
    ],
)
def test_a_kernel_that_got_worse_fails(reports, case, words):
    code, said = reports[case]
    assert code == 1 and words in said, said


@pytest.mark.parametrize(
    "change, words",
    [
        (
            ONE + "compile_report.row_stats.BLOCK_V, compile_report.row_stats.NUM_WARPS = 4096, 1",
            "row_stats_fwd_kernel (fp32, no bias, V % 16 = 0) spills on sm_90",
        ),
        (
            ONE + "compile_report.row_stats.BLOCK_V = 1000",
            "row_stats_fwd_kernel (fp32, no bias, V % 16 = 0) does not compile for sm_90",
        ),
        (ONE + "compile_report.all_kernels = lambda: ['new_kernel']", "new_kernel is in no variant of this report"),
        (
            ONE_OF_TRITON + "compile_report.CSRC = __import__('pathlib').Path({csrc!r})",
            "csrc does not compile for sm_90",
        ),
    ],
    ids=["spill", "triton error", "kernel left out", "csrc error"],
)
def test_a_spill_or_an_error_fails(tmp_path, change, words):
    (tmp_path / "broken.cu").write_text("__global__ void kernel(float *x) { x[0] = undeclared; }")
    code = BREAK.format(folder=str(SCRIPT.parent), change=change.format(csrc=str(tmp_path)))
    done = run(code)
    assert done.returncode == 1 and words in done.stderr


def test_csrc_kernels_are_in_the_report(tmp_path):
    if not any(Path(p, "nvcc").exists() for p in os.environ["PATH"].split(":")):
        pytest.skip("nvcc is not on the PATH")
    (tmp_path / "scale.cu").write_text("__global__ void scale(float *x, float a) { x[threadIdx.x] *= a; }")
    folder = f"__import__('pathlib').Path({str(tmp_path)!r})"
    change = ONE_OF_TRITON + f"compile_report.CSRC, compile_report.FIGURES = {folder}, {folder} / 'none.json'"
    done = run(BREAK.format(folder=str(SCRIPT.parent), change=change))
    assert done.returncode == 0 and "scale.cu" in done.stdout

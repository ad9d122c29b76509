"""What `make` installs, asked of pip's own resolver beside CUDA's torch, which pins triton: offline, on stand-ins that
have names, versions and pins alone. What the CUDA builds pin was read from their metadata."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRITON_OF_TORCH = {"2.11.0": "3.6.0", "2.12.0": "3.7.0", "2.13.0": "3.7.1"}
NEWEST_TRITON = "3.9.0"


def write_wheel(folder, name, version, requires=()):
    name = re.sub(r"[-_.]+", "_", name).lower()
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {r}\n" for r in requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def resolve(tmp_path, torch, constraints):
    """pip's verdict on eepo-fast[dev], with CUDA's `torch` as the only one there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["docs"]]
    wanted = [r for r in wanted if not r.startswith("eepo-fast")]
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", constraints, re.M))
    pinned = {name_of(name): version for name, version in pinned.items()}
    folder = tmp_path / "wheels"
    folder.mkdir()
    for requirement in wanted:
        name = name_of(requirement)
        floor = re.search(r"[>=]=\s*([\w.]+)", requirement)
        if name not in ("torch", "triton"):
            write_wheel(folder, name, pinned.get(name) or (floor.group(1) if floor else "1.0"))
    write_wheel(folder, "torch", torch, [f'triton=={TRITON_OF_TORCH[torch]}; platform_system == "Linux"'])
    for version in {*TRITON_OF_TORCH.values(), NEWEST_TRITON}:
        write_wheel(folder, "triton", version)
    write_wheel(folder, "eepo-fast", "0.1.0", wanted)
    (tmp_path / "constraints.txt").write_text(constraints)
    command = [sys.executable, "-m", "pip", "install", "--isolated", "--dry-run", "--ignore-installed", "--no-index"]
    command += ["--find-links", str(folder), "-c", str(tmp_path / "constraints.txt"), "eepo-fast"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def constraints_for(torch):
    text = (ROOT / "constraints.txt").read_text()
    return re.sub(r"^torch==.*$", f"torch=={torch}", text, flags=re.M)


@pytest.mark.parametrize("torch", TRITON_OF_TORCH)
def test_constraints_leave_to_torch_what_torch_pins(tmp_path, torch):
    done = resolve(tmp_path, torch, constraints_for(torch))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"triton-{TRITON_OF_TORCH[torch]}" in done.stdout


def test_a_pinned_triton_resolves_nowhere(tmp_path):
    """Negative control: the pin that was there."""
    done = resolve(tmp_path, "2.13.0", constraints_for("2.13.0") + f"triton=={NEWEST_TRITON}\n")
    assert done.returncode != 0 and "ResolutionImpossible" in done.stderr


def test_a_machine_with_a_gpu_is_asked_for_no_torch():
    """The Makefile names torch and triton where there is no GPU: torch's CPU build pins no triton. Where pip finds
    CUDA's alone, it asks again for that."""
    text = (ROOT / "Makefile").read_text()
    (line,) = [line for line in text.splitlines() if "$(CPU_TORCH)" in line]
    assert line.strip().endswith(
        '{ command -v nvidia-smi >/dev/null || $(PIP) $(CPU_TORCH) || $(PIP) "torch==2.13.0"; }'
    )
    assert len(re.findall("torch==|triton==", text)) == 3

"""Plays scenes on the fake CUDA device (fake_cuda/) in a process of their own: one for all that a test file asks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent / "fake_cuda"


def play(folder: Path, requests: list[list]) -> dict[str, dict]:
    """requests: [name, scene, its arguments, fault or None]; folder: where the compiled device is kept."""
    if torch.version.cuda is not None:
        pytest.skip("a build of PyTorch for CUDA has a device of its own; the fake one needs the CPU build")
    sys.path.insert(0, str(HERE))
    try:
        import device
    finally:
        sys.path.remove(str(HERE))
    command = [sys.executable, str(HERE / "run.py"), str(device.build(folder)), json.dumps(requests)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"exit {done.returncode}: " + done.stdout[-2000:] + done.stderr[-6000:]
    found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(found.removeprefix("FOUND "))


LAYERS = 2
"""Of the models that are played for their memory (fake_cuda/footprints.py)."""


def whole_model(found: dict, phase: str, weights: int, layers: int, constant: float = 0.0) -> dict[str, float]:
    """GiB of a phase as a model of so many weights and layers would have it. What stands is so many bytes a weight,
    but for `constant` GiB; each layer that was not played keeps what the second one does; what a peak has beyond what
    is kept does not grow. Phases without passes are bytes a weight."""
    of, grown = found[phase], weights / found["weights"]
    start = (of["start"] - constant) * grown + constant
    if not of["kept"]:
        return {"start": start, "peak": (of["peak"] - constant) * grown + constant}
    kept = start + of["kept"] - of["start"] + (layers - LAYERS) * of["layer"]
    return {"start": start, "kept": kept, "peak": kept + of["peak"] - of["kept"]}

"""Plays scenes on the fake CUDA device (fake_cuda/) in a process of their own: one for all that a test file asks."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent / "fake_cuda"


def play(folder: Path, requests: list[list]) -> dict[str, dict]:
    """requests: [name, scene, its arguments, fault or None]; folder: where the compiled device is kept."""
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


def of_all_layers(found: dict, checkpointing: bool, phase: str, key: str, layers: int) -> float:
    """GiB that a model of `layers` comes to, from plays of 2 and 3 (fake_cuda/footprints.py). What stands and what a
    micro-batch keeps grow by as much with each; what a peak has beyond that does not: the larger of the two."""
    two, three = (found[f"{count} {checkpointing}"][phase] for count in (2, 3))

    def on_a_line(key: str) -> float:
        return two[key] + (layers - 2) * (three[key] - two[key])

    if key != "peak" or not two["kept"]:
        return on_a_line(key)
    return on_a_line("kept") + max(p["peak"] - p["kept"] for p in (two, three))

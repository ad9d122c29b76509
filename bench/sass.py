"""Reads from a compiled kernel's machine code what is in its inner loop: instructions and bytes an element."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
FUNCTION = re.compile(r"^\.text\.(\w+):")
ACCESS = re.compile(r"\b(LD|ST)G?\.(E\S*)")  # by an address known to be global, or by any


class Loop(NamedTuple):
    instructions: int
    loaded_bytes: int
    """Bytes that a thread loads from global memory a turn."""
    stored_bytes: int
    wide: int
    """Accesses of 16 bytes."""


def disassemble(cubin: Path, nvdisasm: Path | str) -> dict[str, list[str]]:
    """Returns the lines of machine code, labels among them, of each function of a cubin."""
    command = [str(nvdisasm), "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if found := FUNCTION.match(line):
            lines = functions.setdefault(found[1], [])
        elif found := LABEL.match(line):
            lines.append(f"{found[1]}:")
        elif found := INSTRUCTION.match(line):
            lines.append(found[1])
    return functions


def _access_bytes(line: str, kind: str) -> int:
    found = ACCESS.search(line)
    if not found or found[1] != kind:
        return 0
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
    return next((size for part, size in sizes.items() if part in found[2].split(".")), 4)


def innermost_loops(lines: list[str]) -> list[Loop]:
    """Returns stretches from a label to the branch back to it that hold no other such stretch."""
    places = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    spans = []
    for i, line in enumerate(lines):
        found = BRANCH.search(line)
        if found and places.get(found[1], i) < i:
            spans.append((places[found[1]], i))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    loops = []
    for start, end in inner:
        body = [line for line in lines[start : end + 1] if not line.endswith(":")]
        moved = [sum(_access_bytes(line, kind) for line in body) for kind in ("LD", "ST")]
        wide = sum(16 in (_access_bytes(line, "LD"), _access_bytes(line, "ST")) for line in body)
        loops.append(Loop(len(body), *moved, wide))
    return loops


def main_loop(lines: list[str]) -> Loop | None:
    """Returns the innermost loop with the most 16-byte accesses, where the kernel's time goes; None without any."""
    return max((loop for loop in innermost_loops(lines) if loop.wide), key=lambda loop: loop.wide, default=None)

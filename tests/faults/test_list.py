"""The list of faults is kept: each number has a test that is marked with it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def marked():
    found = {}
    for path in ROOT.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                text = "\n".join(ast.unparse(d) for d in node.decorator_list)
                for number in re.findall(r"mark\.fault\((\d+)\)", text):
                    found.setdefault(int(number), []).append(f"{path.name}::{node.name}")
    return found


def test_every_fault_has_a_test():
    listed = [
        int(n) for n in re.findall(r"^\| (\d+) \|", (Path(__file__).parent / "README.md").read_text(), re.MULTILINE)
    ]
    assert listed == list(range(1, 27))
    from_data = {7, 8}  # marked by parameter: test_inputs.py, BROKEN
    assert set(listed) - set(marked()) - from_data == set()

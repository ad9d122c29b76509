"""Who may import whom, the ceilings, and how docstrings begin. Read from the syntax trees; nothing is imported."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (  # bottom up: a module imports from lower layers and from its own room
    ("eepo_kernels",),
    ("types",),
    ("own",),
    ("config", "console", "disk"),
    ("distributed", "data", "rewards"),
    ("rollout",),
    ("policy",),
    ("algorithm",),
    ("checkpoint", "evaluation"),
    ("report",),
    ("run",),
    ("compare",),
    ("cli",),
)
ALONE = {"rewards/answers"}  # knows nothing else of ours but types
PREPOSITION = re.compile(
    r"\W*(about|above|across|after|against|along|among|around|as|at|before|behind|below|beside|between|beyond|by|during|"
    r"except|for|from|in|inside|into|like|near|of|off|on|onto|out|outside|over|past|per|since|than|through|to|toward|"
    r"under|until|up|upon|via|when|where|while|with|within|without)\b", re.IGNORECASE,
)  # fmt: skip
FILES = sorted([*(ROOT / "eepo_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def imports(path):
    """(line, dotted module, names) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module, [alias.name for alias in node.names]


def modules_of_ours(path):
    """(line, room, dotted module) of every import of ours, lazy ones included; room: eepo_kernels, or the first name
    under eepo_fast."""
    for line, module, names in imports(path):
        if module.split(".")[0] == "eepo_kernels":
            yield line, "eepo_kernels", module
        elif module == "eepo_fast":
            yield from ((line, name, f"eepo_fast.{name}") for name in names)
        elif module.startswith("eepo_fast."):
            yield line, module.split(".")[1], module


def layer_of(room):
    """Every room and every module on the ground floor is in the list."""
    (found,) = [i for i, layer in enumerate(LAYERS) if room in layer]
    return found


def imports_upwards(path, room):
    """What a file of this room must not import."""
    for line, other, module in modules_of_ours(path):
        if other != room and layer_of(other) >= layer_of(room):
            yield f"{path}:{line}: {room} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    for line, module, _ in imports(path):
        top = module.split(".")[0]
        assert top not in ("kernels", "tests", "bench"), f"{path}:{line} imports {module}"
        if "kernels" in path.relative_to(ROOT).parts[:1]:
            assert top != "eepo_fast", f"{path}:{line}: eepo_kernels knows nothing of eepo_fast"
    if path.is_relative_to(ROOT / "eepo_fast"):
        place = path.relative_to(ROOT / "eepo_fast")
        if place.name != "__init__.py" or len(place.parts) > 1:
            assert not list(imports_upwards(path, place.parts[0].removesuffix(".py")))
        if place.parent.as_posix() in ALONE:
            own = f"eepo_fast.{place.parent.as_posix().replace('/', '.')}"
            assert all(m.startswith((own, "eepo_fast.types")) for _, _, m in modules_of_ours(path))


def test_the_import_rule_can_fail(tmp_path):
    """Lazy imports, too."""
    text = "import eepo_fast.algorithm.losses\nfrom eepo_fast import policy, run\nimport eepo_kernels\n"
    (tmp_path / "x.py").write_text(text + "def f():\n    from eepo_fast.evaluation.sets import load_set\n")
    assert [m.rpartition(" ")[2] for m in imports_upwards(tmp_path / "x.py", "checkpoint")] == [
        "eepo_fast.run", "eepo_fast.evaluation.sets",
    ]  # fmt: skip
    with pytest.raises(ValueError):
        layer_of("attic")


def test_setup_never_imports_torch():
    assert all(module.split(".")[0] != "torch" for _, module, _ in imports(ROOT / "setup.py"))


def test_kernels_is_a_folder_and_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_ceilings(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{path}:{node.lineno} {node.name}"


def fragments(text):
    """Lines of docstrings, those of fields and constants too, that begin with a preposition."""
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for part in body if isinstance(body, list) else ():
            said = getattr(part, "value", None) if isinstance(part, ast.Expr) else None
            if isinstance(said, ast.Constant) and isinstance(said.value, str) and PREPOSITION.match(said.value):
                yield part.lineno


def test_docstrings_begin_with_no_preposition():
    assert [f"{path}:{line}" for path in FILES for line in fragments(path.read_text("utf-8"))] == []


def test_a_docstring_that_begins_with_a_preposition_is_found():
    text = '"""Says."""\n"""By name."""\nclass A:\n  """Of b."""\n  c: int\n  """Until."""\n  def d(self): "`With`"\n'
    assert sorted(fragments(text + 'e = "of no docstring"\nf("by")\n')) == [2, 4, 6, 7]


def unexplained(text):
    """Lines that silence the type checker without a code, or without a reason after it."""
    for number, line in enumerate(text.splitlines(), 1):
        silent = re.search(r"#\s*(type:\s*ignore|pyrefly:)", line)
        if silent and not re.fullmatch(r"# type: ignore\[[a-z, -]+\]  # \w.+", line[silent.start() :]):
            yield number


def test_who_silences_the_type_checker_says_why():
    assert [f"{path}:{line}" for path in FILES for line in unexplained(path.read_text("utf-8"))] == []


def test_an_unexplained_silence_is_found():
    whole = "f()  # type: ignore[arg-type]  # their stubs\n"
    bare = "f()  # type: ignore\nf()  # type: ignore[misc]\nf()  #type:ignore[misc]  # why\n# pyrefly: ignore\n"
    assert list(unexplained(whole + bare)) == [2, 3, 4, 5]


def long_names(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > 60:
            yield node.name


def test_a_test_s_name_has_at_most_60_characters():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    assert [name for text in texts for name in long_names(text)] == []
    assert list(long_names(f"def test_{'a' * 55}(): pass\ndef test_{'b' * 56}(): pass")) == [f"test_{'b' * 56}"]


UNSAFE = """\
import pickle
from joblib import load
torch.load(path)
from torch import load; load(p)
import torch as t; t.load(p, weights_only=0)
x.load(path, allow_pickle=True)
AutoModel.from_pretrained(p, trust_remote_code=True)
transformers.AutoConfig.from_pretrained(p)
from transformers import AutoModel as A; A.from_config(c, **more)
f(trust_remote_code=flag)
f(weights_only=False)
yaml.load(text)
import yaml as y; y.unsafe_load_all(x)
import importlib; importlib.import_module('pickle')
subprocess.run(x, shell=True)
eval(x)
os.system(x)
"""


@pytest.mark.parametrize("line", UNSAFE.splitlines())
def test_unsafe_calls_are_found(line, tmp_path):
    script = str(ROOT / "tests" / "unsafe_calls.py")
    (tmp_path / "x.py").write_text(line + "\n")
    done = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "x.py:1" in done.stdout
    (tmp_path / "x.py").write_text(
        "model.eval()\nyaml.safe_load(x)\nAutoConfig.from_pretrained(p, trust_remote_code=False)\n"
    )
    assert subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True).returncode == 0


def test_constraints_name_versions_and_no_place():
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def test_what_is_slow_by_name_is_there(request):
    """Asked where all tests are collected."""
    assert getattr(request.config, "unmet", []) == [], "in SLOW of tests/conftest.py, and in no test's id"


def worlds_left_open(text):
    """Lines that join other processes outside a `with`, which closes the process groups whatever happens."""
    tree = ast.parse(text)
    within = {id(item.context_expr) for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "init_process_group" or (name == "start_world" and id(node) not in within):
                yield node.lineno


def test_whoever_joins_a_world_closes_it():
    everything = [p for room in ("eepo_fast", "kernels", "bench", "tests") for p in (ROOT / room).rglob("*.py")]
    opening = {p.relative_to(ROOT).as_posix() for p in everything if any(worlds_left_open(p.read_text("utf-8")))}
    assert opening == {"eepo_fast/distributed.py"}, "start_world and lone_group, which close_groups closes"
    assert list(
        worlds_left_open("with start_world() as w:\n    f(w)\nw = start_world()\ndist.init_process_group()")
    ) == [
        3,
        4,
    ]

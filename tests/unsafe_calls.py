"""Calls that could run what they read: `python tests/unsafe_calls.py FOLDER...` lists them, and exits with 1 if any.

ruff's rules (pyproject.toml) find exec, eval, pickle, marshal, unsafe YAML and shells; here is what they do not know.
"""

import ast
import sys
from pathlib import Path

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def name_of(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def is_true(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def imported(tree: ast.AST) -> dict[str, str]:
    """What names stand for: {"t": "torch"}, {"load": "torch.load"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def complaints(source: str, path: str):
    tree = ast.parse(source)
    aliases = imported(tree)
    for node in ast.walk(tree):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{where}: imports {m}" for m in modules if m.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            first, dot, rest = name_of(node.func).partition(".")
            name = aliases.get(first, first) + dot + rest
            options = {k.arg: k.value for k in node.keywords}
            if "trust_remote_code" in options and not is_false(options["trust_remote_code"]):
                yield f"{where}: trust_remote_code"
            loads = ".Auto" in f".{name}" and name.endswith((".from_pretrained", ".from_config"))
            if loads and "trust_remote_code" not in options:  # then it asks on stdin
                yield f"{where}: {name} without trust_remote_code=False"
            if "weights_only" in options and not is_true(options["weights_only"]):
                yield f"{where}: weights_only=False"
            if name == "torch.load" or (name.endswith(".load") and "allow_pickle" in options):
                yield f"{where}: {name} reads pickles; use safetensors"
            if name.startswith("yaml.") and "load" in name and "safe_load" not in name.replace("unsafe", ""):
                yield f"{where}: {name}; use yaml.safe_load"
            if name.startswith("subprocess.") and "shell" in options and not is_false(options["shell"]):
                yield f"{where}: a shell"
            first = getattr(node.args[0], "value", None) if node.args else None
            if name == "importlib.import_module" and str(first).split(".")[0] in MODULES:
                yield f"{where}: imports {first}"
            if name in ("os.system", "os.popen", "eval", "exec", "compile", "__import__"):
                yield f"{where}: {name}"


def main(folders: list[str]) -> int:
    found = [
        line
        for folder in folders
        for path in sorted(Path(folder).rglob("*.py"))
        for line in complaints(path.read_text(encoding="utf-8"), str(path))
    ]
    print("\n".join(found) or "no unsafe calls")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

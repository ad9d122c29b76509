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


def complaints(source: str, path: str):
    for node in ast.walk(ast.parse(source)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{where}: imports {m}" for m in modules if m.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            name, options = name_of(node.func), {k.arg: k.value for k in node.keywords}
            if "trust_remote_code" in options and not is_false(options["trust_remote_code"]):
                yield f"{where}: trust_remote_code"
            if "weights_only" in options and is_false(options["weights_only"]):
                yield f"{where}: weights_only=False"
            if name == "torch.load" or (name.endswith(".load") and "allow_pickle" in options):
                yield f"{where}: {name} reads pickles; use safetensors"
            if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
                yield f"{where}: {name}; use yaml.safe_load"
            if name.startswith("subprocess.") and "shell" in options and not is_false(options["shell"]):
                yield f"{where}: a shell"
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

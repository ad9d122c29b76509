"""Finds functions of the user's own that a key names: `module:function`, or `path/to/file.py:function`."""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from eepo_fast.types import UserError


def find_function(key: str, name: str) -> Callable[..., Any]:
    """Returns what `key` names; the working directory is searched, too. UserError where there is nothing to call. A
    file is read once a process."""
    module, _, attribute = name.rpartition(":")
    if not (module and attribute.isidentifier()):
        raise UserError(f"{key}: expected module:function or file.py:function, such as mine.py:fn, found {name!r}")
    try:
        function = getattr(_import_file(Path(module)) if module.endswith(".py") else _import(module), attribute)
    except (Exception, SystemExit) as error:  # a module that is imported may raise anything
        reason = f"{type(error).__name__}: {error}"
        remedy = (
            f"start in the folder of {module}, or give its whole path"
            if module.endswith(".py")
            else f"start in the folder of {module}.py, or put it on PYTHONPATH"
        )
        raise UserError(f"{key}: {name} cannot be imported ({reason}); {remedy}") from None
    if not callable(function):
        raise UserError(f"{key}: expected a function, found that {name} is a {type(function).__name__}")
    return function


def _import(module: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(module)


@functools.cache
def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path.expanduser().resolve(strict=True))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_own(name: str) -> bool:
    return ":" in name


def complaint(key: str, name: str, known: Collection[str]) -> str | None:
    """Returns what is wrong with a name that is neither known nor a function of the user's own."""
    if name in known or is_own(name):
        return None
    nearest = get_close_matches(name, known, 1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{key}: expected one of {', '.join(known)}, or file.py:function, found {name[:100]!r}{hint}"

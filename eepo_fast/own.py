"""Finds functions of the user's own that a key names: `module:function`, or `path/to/file.py:function`."""

import functools
import importlib
import importlib.util
import os
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eepo_fast.types import EngineError, Interrupted, UserError


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


def find_guarded(key: str, name: str) -> Callable[..., Any]:
    """Returns the same, for what training cannot go on without: what the function raises is a UserError, in one line.
    What the trainer itself raises inside of it is let through."""
    function = find_function(key, name)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (UserError, EngineError, Interrupted):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which is tried again with less
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{key}: {name} raises {type(error).__name__}: {error} ({Path(place.filename).name}, line "
                f"{place.lineno}); mend that, and go on with --resume"
            ) from error

    return call


def _import(module: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(module)


@functools.cache
def _import_file(path: Path) -> Any:
    path = path.expanduser().resolve(strict=True)
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"  # two files may be called alike
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def is_own(name: str) -> bool:
    return ":" in name

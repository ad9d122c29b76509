"""Keeps a grading process from running text, taking all memory, writing files, starting processes and connecting.

sympy turns strings into expressions with Python's `eval`, and math-verify's LaTeX parser reaches it through
`sympy.Number("42")`. Here that road takes digits and nothing else; and should there be another one, an audit hook of
the interpreter refuses to run any code that was not read from a module's file.
"""

import os
import re
import resource
import sys

import latex2sympy2_extended.latex2sympy2
import math_verify.parser
import sympy.parsing.sympy_parser
from sympy import Float, Integer

REFUSED = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.", "socket.", "os.remove", "os.rename",
           "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime",
           "os.setxattr", "os.removexattr", "shutil.", "ctypes.dlopen", "os.putenv", "os.kill")  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?")


def read_digits(text: str, *_args: object, **_options: object) -> Integer | Float:
    """Stands in for sympy's `parse_expr`, which evaluates Python; ValueError on all but a plain number."""
    if (match := NUMBER.fullmatch(text)) is None:
        raise ValueError("not a number")
    return Float(text) if match.group(1) else Integer(int(text))


def close_parsers() -> None:
    for module in (sympy.parsing.sympy_parser, math_verify.parser, latex2sympy2_extended.latex2sympy2):
        assert callable(module.parse_expr)
        module.parse_expr = read_digits


def refuse(event: str, arguments: tuple) -> None:
    """Refuses, as the audit hook, to make code of text, start a process, open a connection or change a file."""
    if event.startswith(REFUSED):
        raise PermissionError(event)
    if event == "open" and arguments[2] & WRITING:
        raise PermissionError("a file opened for writing")
    if event == "exec" and arguments[0].co_filename.startswith("<") and "frozen" not in arguments[0].co_filename:
        raise PermissionError("text as code")


def enter(memory_bytes: int) -> None:
    """Shuts the sandbox for the rest of the process."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(refuse)

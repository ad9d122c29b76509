"""Writes docs/configuration.md from the schema: `python docs/configuration.py`. `make docs` does; a test compares."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

from eepo_fast.config import Config
from eepo_fast.config.section import Section

INTRODUCTION = """# Configuration

Every key, made from the schema. A config file is YAML with these sections; several files may be given, later ones win,
and `key.sub=value` on the command line wins over all. Unknown keys are refused, with the nearest name. `eepo-fast train
CONFIG.yaml --dry-run` prints the resolved config; a run keeps it as `config.yaml`, without the keys that nothing reads.

A key that is said to be of vllm or deepspeed, and every key of a method that is off, does nothing without that choice.
Beside another choice in the same file, or given after it, such a key is refused. Where a later file or the command line
chooses another engine, what earlier files set for the first is left out, and a line says so; the keys of a method go
with it when it is turned off.

`configs/` has the paper's three models, the demo and SmolLM2; `configs/methods/` an overlay a method;
`configs/machines/` an overlay a machine.
"""


def configuration() -> str:
    parts = [INTRODUCTION]
    for name, field in Config.model_fields.items():
        section = field.annotation
        parts.append(f"## {name}\n")
        if section.__doc__ and "Usage docs" not in section.__doc__:
            parts.append(section.__doc__.strip() + "\n")
        lines = ["| key | default | takes | |", "| --- | --- | --- | --- |"]
        lines += [row(f"{name}.{key}", f) for key, f in fields(section)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def fields(section: type[Section], prefix: str = ""):
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def row(key: str, field: Any) -> str:
    default = "needed" if field.default is PydanticUndefined else f"`{shown(field.default)}`"
    text = (field.description or "").replace("|", "\\|")
    return f"| `{key}` | {default} | {takes(field.annotation)} | {text} |"


def shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f'"{value}"' if value == "" else str(value)


def takes(annotation: Any) -> str:
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if type(None) in arguments:
        return ", ".join(takes(a) for a in arguments if a is not type(None)) + " or null"
    if get_origin(annotation) is not None and hasattr(annotation, "__metadata__"):
        return takes(annotation.__origin__)
    if get_origin(annotation) is dict:
        return "names and values"
    if get_origin(annotation) is list:
        return "a list"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(annotation, str(annotation).replace("typing.", "").replace("|", "or"))


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(configuration(), encoding="utf-8")

"""Reads a configuration from YAML files, of which later ones win, and `key.sub=value` overrides; and writes it."""

import difflib
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from eepo_fast.config.schema import READ_WITH, RENAMED, Config, with_ratio, without_unread
from eepo_fast.types import UserError


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number (YAML 1.1 wants 1.0e-4), and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        self.flatten_mapping(node)
        keys = [self.construct_object(k, deep=deep) for k, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _construct_scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    if node.style is None and "e" in text.lower() and "_" not in text:
        try:
            number = float(text)
        except ValueError:
            return text
        return number if math.isfinite(number) else text
    return text


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_scalar)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError, OverflowError) as error:  # of bad tags
        raise UserError(f"{where}: not valid YAML: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from None


def read_yaml(
    path: str | Path, kind: str = "config file", shape: str = "sections like `run:` and `model:`"
) -> dict[str, Any]:
    """Returns what a YAML file holds; UserError, which says what kind of file it is, and what was expected in it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{kind} {path}: cannot be read: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{kind} {path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if (values := _parse_yaml(text, f"{kind} {path}")) is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{kind} {path}: expected {shape}, found a {type(values).__name__}")
    return values


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Returns both, section by section; `update` wins."""
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def under_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Returns what an older version has saved with renamed keys under their new names."""
    for old, new in RENAMED.items():
        (section, key), (other, name) = old.split("."), new.split(".")
        if key in values.get(section, {}):
            values = merge({other: {name: values[section][key]}}, values)
    return values


def is_file(argument: str) -> bool:
    """Returns whether an argument of the command line names a config file, and is no `key.sub=value`: a file that is
    there is one, whatever its name."""
    return "=" not in argument or Path(argument).expanduser().is_file()


def read_override(text: str) -> dict[str, Any]:
    """Returns `key.sub=value` as nested sections. The value of a key that is text is what was typed, without quotes
    around it; any other is YAML."""
    key, _, raw = text.partition("=")
    parts = key.split(".")
    if len(parts) < 2 or not all(parts):
        raise UserError(
            f"override {text!r}: expected key.sub=value, such as train.iterations=10, or a config file that is there"
        )
    value: Any = _read_text(raw, text) if _is_text(parts, raw) else _parse_yaml(raw, f"override {text!r}")
    for part in reversed(parts):
        value = {part: value}
    return value


def _is_text(parts: list[str], raw: str) -> bool:
    """Returns whether the config declares the value at this place as text, and it is not the null of what may be
    null."""
    kind: Any = Config
    for part in parts:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[part].annotation if part in kind.model_fields else None
        else:
            kind = get_args(kind)[1] if get_origin(kind) is dict else None
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if type(None) in kinds and raw.strip() in ("", "~", "null", "Null", "NULL"):
        return False
    kinds = tuple(k for k in kinds if k is not type(None))
    return bool(kinds) and all(k is str or (get_origin(k) is Literal and _are_text(get_args(k))) for k in kinds)


def _are_text(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, str) for value in values)


def _read_text(raw: str, override: str) -> str:
    """Returns text as it was typed; in quotes, what they quote."""
    if found := yaml.reader.Reader.NON_PRINTABLE.search(raw):
        raise UserError(f"override {override!r}: expected text, found the character {found.group()!r}; remove it")
    if raw.strip()[:1] in ("'", '"'):
        with suppress(UserError):
            if isinstance(quoted := _parse_yaml(raw, override), str):
                return quoted
    return raw


def _describe(error: ValidationError, *place: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in (*place, *first["loc"]))
    if first["type"] == "extra_forbidden" and key in RENAMED:
        return f"config key {key}: is {RENAMED[key]} now, found the old name; rename it"
    if first["type"] == "extra_forbidden":
        known = [*Config.model_fields]
        known += [f"{s}.{k}" for s in Config.model_fields for k in _class_of(s).model_fields]
        # a key's own name says more than its section: compare both ways
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        near = near or [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
        section = f"{key.partition('.')[0]}." if "." in key else ""
        beside = sorted({k.removeprefix(section).partition(".")[0] for k in known if k.startswith(section)})
        hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(beside)}"
        return f"config key {key}: unknown{hint}"
    if first["type"] == "missing":
        key = {"model": "model.path", "data": "data.train"}.get(key, key)
        return f"config key {key}: missing; give it in the YAML file or as {key}=VALUE"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"config key {key}: {first['msg'].replace('Input should be ', 'expected ')}, found {first['input']!r}"


def _class_of(section: str) -> Any:
    return Config.model_fields[section].annotation


def _default_of(section: str, key: str) -> Any:
    return _class_of(section).model_fields[key].get_default(call_default_factory=True)


def load_config(files: list[str], overrides: list[str], say: Callable[[str], Any] | None = None) -> Config:
    """Reads and validates a config; UserError with one line that names the file or key, what was expected and found.
    `say` is told, a line each, what of an earlier file is left out."""
    given: dict[str, Any] = {}
    try:
        for text in overrides:
            given = merge(given, read_override(text))
        return make_config(*(read_yaml(path) for path in files), given, say=say)
    except RecursionError:  # YAML's anchors can make a value that holds itself
        raise UserError(
            "config: expected values of a few levels, found one that holds itself, or too many levels; write it out"
        ) from None


def make_config(*sources: dict[str, Any], say: Callable[[str], Any] | None = None) -> Config:
    """Merges the sources section by section, where a later one wins, and validates what comes of it."""
    values: dict[str, Any] = {}
    for source in sources:
        values = merge(values, source)
    values = with_ratio({section: {} if content is None else content for section, content in values.items()})
    for section in dict.fromkeys(entry.section for entry in READ_WITH):  # what is left out, too
        try:
            _class_of(section).model_validate(values.get(section, {}))
        except ValidationError as error:
            raise UserError(_describe(error, section)) from None
    lines = _check_read(values, sources)
    try:
        config = Config.model_validate(without_unread(values))
    except ValidationError as error:
        raise UserError(_describe(error)) from None
    if say is not None:
        for line in lines:
            say(line)
    return config


def _plain(value: Any) -> Any:
    """Returns a value as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else value


def _with_implied(sources: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the sources with the `grpo.ratio` that goes with their `rollout.carry`, where none of them gives one; not
    with a carry of 0 that a later one turns on."""
    ratios = [s["grpo"] for s in sources if isinstance(s.get("grpo"), dict)]
    rollouts = [s["rollout"] for s in sources if isinstance(s.get("rollout"), dict)]
    if any("ratio" in one for one in ratios):
        return list(sources)
    last = next((one for one in reversed(rollouts) if "carry" in one), None)

    def counts(rollout: Any) -> bool:
        return isinstance(rollout, dict) and (rollout is last or bool(rollout.get("carry")))

    return [with_ratio(source) if counts(source.get("rollout")) else source for source in sources]


def _check_read(values: dict[str, Any], sources: Sequence[dict[str, Any]]) -> list[str]:
    """Raises a UserError for a key that a source gives beside a choice that does not read it, or after that choice; at
    its default only where it is the last source, the command line, for runs of older versions wrote all keys. Returns
    lines that say which keys of sources before the choices are left out."""
    lines, sources = [], _with_implied(sources)
    for section, chooser, choices, keys in READ_WITH:
        whole, *parts = (s[section] if isinstance(s.get(section), dict) else {} for s in (values, *sources))
        made = whole.get(chooser, _default_of(section, chooser))
        last = max((i for i, part in enumerate(parts) if chooser in part), default=-1)
        wanted = f"{section}.{chooser}={_plain(choices[0])}"
        for i, part in enumerate(parts):
            found = part.get(chooser, made if i > last else choices[0])
            given = [key for key in part if key in keys and found not in choices]
            if i + 1 < len(parts):
                given = [key for key in given if part[key] != _default_of(section, key)]
            if given:
                key, remedy = f"{section}.{given[0]}", f"remove the key, or set {wanted}"
                raise UserError(f"config key {key}: expected {wanted} with it, found {_plain(found)}; {remedy}")
        left_out = [key for key in whole if key in keys] if made not in choices else []
        if left_out and chooser != "enabled":  # the keys of a method go with it
            names = ", ".join(f"{section}.{key}" for key in left_out)
            lines.append(f"{section}.{chooser}={made}: {names} of an earlier file left out")
    return lines


def dump_config(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)

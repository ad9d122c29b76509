"""Reads a run's folder: its settings, its metrics, its evaluations, and where its rollouts lie."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eepo_fast.config.schema import READ_WITH
from eepo_fast.types import UserError

Values = list[float | None]
"""One value an iteration; None where there is none."""
NOT_SETTINGS = ("run.name", "run.root", "run.seed")  # runs that differ in these alone are seeds of one setting


@dataclass(frozen=True)
class Run:
    folder: Path
    name: str
    settings: dict[str, Any]
    """The value of each key, such as `eepo.alpha`."""
    rows: list[dict[str, Any]]
    """The rows of metrics.jsonl."""
    evaluations: dict[int, dict[str, Any]]
    """The content of results.json by iteration."""
    rollouts: dict[int, Path]
    """Rollout logs by iteration."""
    ending: dict[str, Any] | None

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows]

    def values(self, key: str) -> Values:
        return [number(row.get(key)) for row in self.rows]


@dataclass(frozen=True)
class Group:
    """Holds runs that differ in their seed alone."""

    name: str
    """The part that the runs' names have in common."""
    runs: list[Run]

    @property
    def label(self) -> str:
        return self.name if len(self.runs) == 1 else f"{self.name}, {len(self.runs)} seeds"

    def band(self, key: str) -> tuple[list[int], Values, Values, Values]:
        """Returns (steps, mean, lowest, highest) over the seeds that have a value."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            for step, value in zip(run.steps, run.values(key), strict=True):
                found.setdefault(step, []).extend([] if value is None else [value])
        steps = sorted(found)
        columns = [found[step] for step in steps]
        means = [sum(c) / len(c) if c else None for c in columns]
        return steps, means, [min(c, default=None) for c in columns], [max(c, default=None) for c in columns]


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def read_run(folder: Path) -> Run:
    """Reads a run; UserError where the folder is no run's, or nothing has been logged yet."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"report: expected a run's folder with a config.yaml in it, found {folder}; give runs/NAME")
    try:
        settings = flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        raise UserError(f"report: {folder / 'config.yaml'} is not a run's settings; is it cut off?") from None
    if not (rows := read_rows(folder / "metrics.jsonl")):
        raise UserError(f"report: no iteration is logged in {folder / 'metrics.jsonl'} yet; try again after the first")
    last = rows[-1]["step"]  # later files belong to an iteration that is still being logged
    return Run(
        folder=folder,
        name=str(settings.get("run.name", folder.name)),
        settings=settings,
        rows=rows,
        evaluations={
            step: read_results(path / "results.json")
            for step, path in by_step(folder / "evaluations", "").items()
            if step <= last and (path / "results.json").is_file()
        },
        rollouts={step: path for step, path in by_step(folder / "rollouts", ".jsonl").items() if step <= last},
        ending=read_ending(folder / "ended.json"),
    )


def read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for part in results["sets"].values():
            part["metrics"].items(), part["num_problems"]
        return results
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"report: {path} is not an evaluation's results; remove {path.parent}") from None


def read_ending(path: Path) -> dict[str, Any] | None:
    """Returns why the run ended; None where it goes on, was killed, or is just writing it."""
    try:
        ending = json.loads(path.read_text(encoding="utf-8"))
        return {"message": "", "total": None, **ending} if "reason" in ending else None
    except (OSError, ValueError, TypeError):
        return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows in their order; a last line that is still being written is left for the next time."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for place, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"]), **row})
        except (ValueError, KeyError, TypeError):
            if place < len(lines):
                raise UserError(
                    f"report: {path}, line {place}: expected an iteration's metrics as JSON, found {line[:60]!r}; "
                    "mend or remove the line"
                ) from None
    return rows


def by_step(folder: Path, suffix: str) -> dict[int, Path]:
    """Returns the paths named step_000012 and the like, by step and in order."""
    found = {}
    for path in folder.glob(f"step_*{suffix}"):
        digits = path.name.removeprefix("step_").removesuffix(suffix)
        if digits.isdecimal():
            found[int(digits)] = path
    return dict(sorted(found.items()))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differing(runs: Sequence[Run]) -> list[str]:
    """Returns the settings in which the runs that read them are not all alike, names apart."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in ("run.name", "run.root"))
    return [key for key in keys if len({repr(r.settings.get(key)) for r in runs if is_read(key, r.settings)}) > 1]


def is_read(key: str, settings: dict[str, Any]) -> bool:
    section, _, name = key.partition(".")
    needs = [(entry.chooser, entry.choices) for entry in READ_WITH if entry.section == section and name in entry.keys]
    return all(settings.get(f"{section}.{chooser}") in choices for chooser, choices in needs)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Puts the seeds of one setting together, labelled by the run's name, or by what their names share."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        read = {key: value for key, value in run.settings.items() if is_read(key, run.settings)}
        same = sorted((key, repr(value)) for key, value in read.items() if key not in NOT_SETTINGS)
        groups.setdefault(repr(same), []).append(run)
    names: list[str] = []
    for members in groups.values():
        name = shared_name([run.name for run in members])
        names.append(name if name not in names else f"{name} ({members[0].folder})")
    return [Group(name, members) for name, members in zip(names, groups.values(), strict=True)]


def shared_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    length = next((i for i, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), len(names[0]))
    return re.sub(r"[-_.=]*(seed)?[-_.=]*\d*$", "", names[0][:length]) or " / ".join(names)

"""Loads what is evaluated on: problems of files, of prepared hub data, or of the procedural task's held-out split."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eepo_fast.config import DataConfig
from eepo_fast.data.problems import Found, read_problems
from eepo_fast.data.tasks import ARITHMETIC, TASKS, task_problems
from eepo_fast.evaluation.prepare import find_prepared, is_prepared
from eepo_fast.types import Problem, Prompt, UserError

HELD_OUT = 200


@dataclass(frozen=True)
class EvalSet:
    name: str
    task: str
    """The procedural task, or `math`: which grader it takes."""
    problems: list[Problem]
    sha256: str
    """Checksum of its problems and answers, so that an evaluation goes on with the ones it began with."""
    left_out: tuple[str, ...] = ()
    """Why each row that is no problem is none."""


def load_set(name: str, spec: str, data: DataConfig) -> EvalSet:
    """Loads a set. spec: a file or folder of rows, the hub name of data that `eepo-fast data prepare` has fetched, or
    arithmetic[:NUMBERS:MAX_NUMBER[:ROWS]], by default as in `data`, 200 rows, or another procedural task as
    TASK[:SPLIT[:ROWS]], by default its test split, 200 rows or as many as there are."""
    task, _, shape = spec.partition(":")
    if task == ARITHMETIC:
        problems = _arithmetic(name, shape, data)
    elif task in TASKS:
        problems = _procedural(name, task, shape, data)
    else:
        found = _read(name, spec, data)
        found.checked(f"evaluation data {name}", data.max_bad)
        return EvalSet(name, "math", found.problems, _checksum(found.problems), tuple(found.left_out))
    return EvalSet(name, task, problems, _checksum(problems))


def _checksum(problems: Sequence[Problem]) -> str:
    return hashlib.sha256(repr([(p.id, p.problem, p.answer) for p in problems]).encode()).hexdigest()


def digest(prompts: Sequence[Prompt]) -> str:
    """Returns a digest of the problems as the model reads them: another template or tokenizer is another evaluation."""
    content = repr([(p.id, p.problem.problem, p.problem.answer, p.token_ids) for p in prompts])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _read(name: str, spec: str, data: DataConfig) -> Found:
    """Reads a file or a folder, by the columns that `data` names; what `eepo-fast data prepare` wrote by the ordinary
    ones."""
    path = Path(spec).expanduser()
    if not path.is_file() and (prepared := find_prepared(name, spec)) is not None:  # a folder may be prepared, too
        path = prepared
    if not path.exists():
        raise UserError(
            f"evaluation data {name}: no file {spec}, and no prepared data of that name; give a file or folder of "
            f"problems, or run `eepo-fast data prepare {name}={spec}` for a hub data set"
        )
    if is_prepared(path):
        data = DataConfig(train="unused")
    data = data.model_copy(update={"files": None})
    return read_problems(str(path), data, asked_by=f"evaluation data {name}", stem=name, split="test", marked=False)


def _arithmetic(name: str, shape: str, data: DataConfig) -> list[Problem]:
    parts = shape.split(":") if shape else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) not in (0, 2, 3):
        raise UserError(
            f"evaluation data {name}: expected {ARITHMETIC} or {ARITHMETIC}:NUMBERS:MAX_NUMBER[:ROWS], such as "
            f"{ARITHMETIC}:4:9:200, found {ARITHMETIC}:{shape}"
        )
    defaults = [data.numbers, data.max_number, HELD_OUT]
    numbers, largest, rows = [int(part) for part in parts] + defaults[len(parts) :]
    shaped = data.model_copy(update={"numbers": numbers, "max_number": largest})
    exact = len(parts) == 3
    return task_problems(ARITHMETIC, rows, shaped, 0, "test", exact=exact, asked_by=f"evaluation data {name}")


def _procedural(name: str, task: str, shape: str, data: DataConfig) -> list[Problem]:
    split, _, rows = (shape or "test").partition(":")
    if split not in ("train", "test", "out") or not (rows or "1").isdecimal() or int(rows or 1) < 1:
        raise UserError(
            f"evaluation data {name}: expected {task}, {task}:SPLIT or {task}:SPLIT:ROWS with one of train, test and "
            f"out, such as {task}:out:{HELD_OUT}, found {task}:{shape}"
        )
    size = int(rows or HELD_OUT)
    return task_problems(task, size, data, 0, split, exact=bool(rows), asked_by=f"evaluation data {name}")

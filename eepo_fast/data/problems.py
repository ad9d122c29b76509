"""Makes problems of rows (of files, folders, the hub, procedural tasks), and orders them for training."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eepo_fast.config import ColumnsConfig, DataConfig
from eepo_fast.data.rows import SUFFIXES, Place, Row, read_file, read_folder, read_hub, suffix_of
from eepo_fast.data.tasks import TASKS, task_problems
from eepo_fast.types import Cursor, Message, Problem, UserError

DEFAULT_ROWS = 10_000  # of a procedural task, or as many as it has
# A whole answer that is one number with thousands marks: the commas go, as graders of the data sets take them out.
THOUSANDS = re.compile(r"[-+]?\$?[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


class Found(NamedTuple):
    """Holds what rows have become."""

    problems: list[Problem]
    left_out: list[str]
    """Why each row that is no problem is none, beginning with where it stands."""
    numbered: int = 0
    """How many had no id of their own."""
    note: str = ""
    """What else there is to say of how they were read."""

    def without(self, indices: Iterable[int], why: Callable[[Problem], str]) -> "Found":
        """Returns the same without some of the problems."""
        out = set(indices)
        kept = [p for i, p in enumerate(self.problems) if i not in out]
        return self._replace(problems=kept, left_out=self.left_out + [why(self.problems[i]) for i in sorted(out)])

    def checked(self, where: str, max_bad: float) -> list[str]:
        """Returns lines to say; UserError where more is left out than `data.max_bad` allows, or nothing is left. One
        row is always allowed, unless none is."""
        lines, bad = [self.note] if self.note else [], len(self.left_out)
        total = len(self.problems) + bad
        if not total:
            raise UserError(f"{where}: expected problems, found none: it is empty")
        if bad > max(math.floor(max_bad * total), bool(max_bad)) or not self.problems:
            raise UserError(
                f"{where}: {bad} of {total} rows cannot be used, and data.max_bad allows {100 * max_bad:g}%; the "
                f"first: {self.left_out[0]}; repair them" + (", or raise data.max_bad" if self.problems else "")
            )
        if bad:
            lines.append(f"{where}: {bad} of {total} rows cannot be used: left out; the first: {self.left_out[0]}")
        if self.numbered:
            lines.append(f"{where}: {self.numbered} rows have no id of their own: they are numbered, from 000000 on")
        return lines


def load_problems(config: DataConfig, seed: int, *, for_function: bool = False) -> list[Problem]:
    """Returns the problems of `data.train`, whatever was left out; see `find_problems`."""
    return find_problems(config, seed, for_function=for_function).problems


def find_problems(config: DataConfig, seed: int, *, for_function: bool = False) -> Found:
    """Reads the problems of `data.train`; UserError naming file, line or column where they cannot be used.
    for_function: rows need no answer, and keep all columns."""
    if config.train in TASKS:
        size, exact = config.num_rows or DEFAULT_ROWS, config.num_rows is not None
        return Found(
            task_problems(config.train, size, config, seed, config.split, exact=exact, asked_by="data.num_rows"), []
        )
    if config.split != "train":
        raise UserError(
            f"data.split: expected train with data.train={config.train}, found {config.split}: only procedural tasks "
            f"({', '.join(TASKS)}) have splits; give a file of that split"
        )
    path = Path(config.train).expanduser()
    looks_local = suffix_of(path) in SUFFIXES or config.train.startswith((".", "/", "~"))
    if not path.exists() and (looks_local or config.train.count("/") > 1):
        raise UserError(
            f"data.train: no file {config.train}; give a file, a folder of files, a hub data set or one of "
            f"{', '.join(TASKS)}"
        )
    return read_problems(config.train, config, asked_by="data.train", for_function=for_function)


def read_problems(
    source: str,
    config: DataConfig,
    *,
    asked_by: str,
    stem: str = "row",
    revision: str | None = None,
    subset: str | None = None,
    split: str = "train",
    for_function: bool = False,
    marked: bool = True,
) -> Found:
    """Returns the problems of a file, a folder or a hub data set. config: its columns, file and answer marker; a file
    that has none of these columns, but a problem and an answer, is read by them. asked_by: what errors begin with.
    stem: what ids that are made begin with, whatever the file is called; of a hub data set, its name.
    marked: an answer without the marker is none; else it is one as it stands."""
    path = Path(source).expanduser()

    def read(config: DataConfig, marked: bool) -> Found:
        made_of = stem
        if path.is_file():
            rows = read_file(path)
        elif path.is_dir() and subset is None and not _describes_itself(path):
            rows = read_folder(path, config.files, split, asked_by)
        else:
            name, made_of = str(path) if path.is_dir() else source, source
            rows = read_hub(name, config.files, revision=revision, subset=subset, split=split, asked_by=asked_by)
        return make_problems(rows, config, made_of, own_ids=path.is_file(), for_function=for_function, marked=marked)

    try:
        return read(config, marked)
    except NoColumnError as error:
        if config.columns == ColumnsConfig() or not path.exists():
            raise
        try:
            found = read(config.model_copy(update={"columns": ColumnsConfig()}), False)
        except NoColumnError:
            raise error from None
        return found._replace(note=f"{source}: {error.reason}: read by its columns problem and answer instead")


def _describes_itself(folder: Path) -> bool:
    """Returns whether a folder's card says which of its files are what."""
    try:
        return "configs:" in (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:100_000]
    except OSError:
        return False


class NoColumnError(UserError):
    """No row has a column that was asked for."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class _Lacking(Exception):
    """A row has no such column. The message names what is at its place."""

    def __init__(self, column: str, at_that_place: Iterable[Any]):
        super().__init__(f"no column {column!r}; found at that place: {', '.join(map(str, at_that_place)) or 'none'}")
        self.column = column


def make_problems(
    rows: Iterable[tuple[Place, Row]],
    config: DataConfig,
    stem: str,
    *,
    own_ids: bool,
    for_function: bool = False,
    marked: bool = True,
) -> Found:
    """Makes a problem of each row that can be one. stem: what the ids of rows without one begin with; own_ids: rows
    have theirs, and an id that two have is an error; else all are numbered. See `read_problems` for the others."""
    problems: list[Problem] = []
    left_out: list[str] = []
    lacking: dict[str, list[str]] = {}
    places: dict[str, Place] = {}
    num_rows = numbered = 0
    for num_rows, (place, row) in enumerate(rows, 1):
        own = row.get("id") if own_ids else None
        own = "" if own is None or isinstance(own, bool | dict | list) else str(own).strip()
        try:
            problem = _problem(own or f"{stem}/{num_rows - 1:06d}", row, config, stem, for_function, marked)
        except (ValueError, _Lacking) as error:
            left_out.append(f"{place}: {error}")
            if isinstance(error, _Lacking):
                lacking.setdefault(error.column, []).append(left_out[-1])
            continue
        if problem.id in places:
            raise UserError(
                f"{place}: id {problem.id!r} was already used in {places[problem.id].kind} "
                f"{places[problem.id].number}; ids must be unique: repair it, or leave `id` out of all rows"
            )
        places[problem.id] = place
        numbered += own_ids and not own
        problems.append(problem)
    for column, complaints in lacking.items():
        if len(complaints) == num_rows:
            raise NoColumnError(f"data.columns: {complaints[0]}", f"no row has a column {column!r}")
    return Found(problems, left_out, numbered)


def _problem(id: str, row: Row, config: DataConfig, stem: str, for_function: bool, marked: bool) -> Problem:
    """Returns the row's problem; ValueError or _Lacking, with the reason, where it has none."""
    columns = config.columns
    given = _value(row, columns.problem)
    messages = _messages(given, columns.problem)
    text = _last_of_user(messages) if messages else _content(given, columns.problem)
    if not text.strip():
        raise ValueError(f"no text in {columns.problem!r}")
    try:
        answer = _text(_value(row, columns.answer), columns.answer)
        if config.answer_marker and (marked or config.answer_marker in answer):
            answer = _final(answer, config.answer_marker)
    except _Lacking:
        if not for_function:
            raise
        answer = ""
    if not answer.strip() and not for_function:
        behind = f", or no {config.answer_marker!r} before one" if config.answer_marker else ""
        raise ValueError(f"no answer in {columns.answer!r}{behind}")
    try:
        "".join((id, text, answer, *(m["content"] for m in messages))).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in its text, which is none") from None
    source = row.get("source")
    source = str(source) if isinstance(source, str | int) else stem if "/" in stem else ""
    return Problem(id, text, answer, source, messages, dict(row) if for_function else {})


def _final(answer: str, marker: str) -> str:
    """Returns what follows the last marker: a text without it has no final answer."""
    _, found, answer = answer.rpartition(marker)
    answer = answer.strip() if found else ""
    return answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer


def _value(row: Row, column: str) -> Any:
    """Returns what stands in a column; dots reach into records, numbers into lists."""
    if column in row:  # a name with a dot in it
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            raise _Lacking(column, value if isinstance(value, dict) else ())
    return value


def _text(value: Any, column: str) -> str:
    """Returns a value as people write it: text and numbers, and lists of them."""
    parts = value if isinstance(value, list) else [] if value is None else [value]
    for part in parts:
        if not isinstance(part, str | int | float | Decimal):
            found = type(part).__name__ if part is value else f"a list with a {type(part).__name__}"
            raise ValueError(f"column {column!r}: expected text, a number or a list of them, found {found}")
        if isinstance(part, float) and not math.isfinite(part):
            raise ValueError(f"column {column!r}: {part} is no number")
    return ", ".join(map(str, parts))


def _messages(value: Any, column: str) -> list[Message]:
    """Returns a conversation's messages; none where the value is none."""
    if not (isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value)):
        return []
    messages = [{"role": str(m["role"]), "content": _content(m.get("content"), column)} for m in value]
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"column {column!r}: the last message is the assistant's, and nothing is asked")
    return messages


def _content(value: Any, column: str) -> str:
    """Returns a message's text, which may be given in parts."""
    if not (isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value)):
        return _text(value, column)
    if other := {str(part["type"]) for part in value} - {"text"}:
        raise ValueError(f"column {column!r}: a message with {min(other)}, and only text can be read")
    return "".join(_text(part.get("text"), column) for part in value)


def _last_of_user(messages: Sequence[Message]) -> str:
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), messages[-1]["content"])


def cursor_after(iterations: int, num_prompts: int, prompts_per_iteration: int) -> Cursor:
    """Returns where a run is that has trained on whole batches of every epoch alone."""
    epoch, batch = divmod(iterations, num_prompts // prompts_per_iteration)
    return Cursor(epoch, batch * prompts_per_iteration)


def next_prompts(
    cursor: Cursor, count: int, num_prompts: int, seed: int, *, whole_batches: bool
) -> tuple[list[int], Cursor]:
    """Returns the next prompts, no one twice, and where they end; an epoch is a permutation. whole_batches: an epoch's
    last prompts are dropped where they are fewer than `count`; else a batch goes on into the next epoch."""
    assert count <= num_prompts
    (epoch, position, waiting), order = cursor, _permutation(cursor.epoch, num_prompts, seed)
    if whole_batches and num_prompts - position + len(waiting) < count:
        epoch, position, waiting, order = epoch + 1, 0, (), _permutation(epoch + 1, num_prompts, seed)
    taken, postponed = list(waiting[:count]), list(waiting[count:])
    while len(taken) < count:
        if position == num_prompts:
            epoch, position, order = epoch + 1, 0, _permutation(epoch + 1, num_prompts, seed)
        index = order[position]
        position += 1
        (postponed if index in taken else taken).append(index)
    return taken, Cursor(epoch, position, tuple(postponed))


def _permutation(epoch: int, num_prompts: int, seed: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(num_prompts).tolist()

"""`eepo-fast grade` reads rows of answers from JSON Lines, and writes their grades as such."""

import json
import math
from collections import Counter
from pathlib import Path

from eepo_fast.rewards.math import MathGrader
from eepo_fast.types import UserError


def grade_file(source: Path, target: Path, mode: str = "strict") -> Counter[str]:
    """Grades every line of `source` in order; a row that cannot be graded gets reward 0.0 and status `error`.

    The file is written beside `target` and renamed at the end, so that a target with that name is whole.
    """
    try:
        lines = source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"grade: {source} cannot be read: {error.strerror}") from None
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            counts = _grade_lines(lines, file, mode)
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"grade: {target} cannot be written: {error.strerror}") from None
    return counts


def _grade_lines(lines: list[bytes], file, mode: str) -> Counter[str]:
    grader = MathGrader(mode)
    rows = [_read(line, number, grader) for number, line in enumerate(lines, 1) if line.strip()]
    try:
        grades = grader.grade_answers([gold for _, gold, _ in rows], [answer for _, _, answer in rows])
    finally:
        grader.close()
    for (row_id, _, _), grade in zip(rows, grades, strict=True):
        result = {"id": row_id, "reward": grade.reward, "status": grade.status, "seconds": grade.seconds}
        file.write(json.dumps(result) + "\n")
    return Counter(grade.status for grade in grades)


def _read(line: bytes, number: int, grader: MathGrader) -> tuple[object, str, str | None]:
    """Returns (id, gold, answer) of a line. A row that cannot be graded has an empty gold, which grades as `error`; one
    without a readable id is called after its line. An answer of None is a response that holds none."""
    row_id: object = f"line {number}"
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=lambda name: None)
        row_id = row.get("id", row_id)
        answer = _text(row["answer"]) if "answer" in row else grader.extract(_text(row["response"]))
        return row_id, _text(row["gold"]), answer
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return row_id, "", None


def _text(value: object) -> str:
    """Returns a string, or a finite number as one; TypeError on anything else."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError
    return str(value)

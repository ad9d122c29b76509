"""`eepo-fast grade`: JSON Lines in, the same rows with their grades out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from eepo_fast.rewards.extract import extract_answer
from eepo_fast.rewards.math import MathGrader
from eepo_fast.types import UserError


def grade_file(source: Path, target: Path) -> Counter[str]:
    """Grade every line of `source` in order; a row that cannot be graded gets reward 0.0 and status `error`."""
    try:
        lines = source.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"grade: {source} cannot be read: {error.strerror}") from None
    rows = [_read(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    grader = MathGrader()
    try:
        grades = grader.grade_answers([gold for _, gold, _ in rows], [answer for _, _, answer in rows])
    finally:
        grader.close()
    counts: Counter[str] = Counter()
    try:
        with target.open("w", encoding="utf-8") as file:
            for (row_id, _, _), grade in zip(rows, grades, strict=True):
                counts[grade.status] += 1
                result = {"id": row_id, "reward": grade.reward, "status": grade.status, "seconds": grade.seconds}
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"grade: {target} cannot be written: {error.strerror}") from None
    return counts


def _read(line: bytes, number: int) -> tuple[object, str, str | None]:
    """(id, gold, answer) of a line; an unreadable one has an empty gold, which grades as `error`. None: no answer."""
    try:
        row = json.loads(line.decode("utf-8"))
        row_id, gold = row["id"], row["gold"]
        answer = row["answer"] if "answer" in row else extract_answer(row["response"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        row_id = row.get("id", number) if isinstance(locals().get("row"), dict) else number
        return row_id, "", None
    return row_id, str(gold), None if answer is None else str(answer)

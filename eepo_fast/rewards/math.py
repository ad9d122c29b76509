"""Grades exact mathematical answers: what strings and exact numbers can settle here, the rest in worker processes.

`strict` mode decides as compare.py and numbers.py say; `paper` mode as the recipe did (paper.py). Statuses: `ok`,
graded; `no_answer`, the completion has none; `too_large`, more than 2,000 characters, 50 brackets deep, an expression
far larger than the gold's, or out of a worker's memory; `timeout`, the answer's seconds or the call's are spent;
`error`, a gold that cannot be read, not even as text (empty, broken), or a worker that died.
"""

import re
import time
from collections.abc import Sequence
from contextlib import closing

from eepo_fast.rewards.answers.choices import chosen
from eepo_fast.rewards.answers.compare import compare
from eepo_fast.rewards.answers.extract import extract_answer
from eepo_fast.rewards.answers.normalise import THOUSANDS, normalise
from eepo_fast.rewards.paper import clean, extract_paper_answer
from eepo_fast.rewards.pool import Job, Pool
from eepo_fast.types import Grade, Problem, UserError

ANSWER_SECONDS = 4.5  # parse, verify and kill end within the 5 s that `grade` promises
MAX_CHARACTERS = 2000
MAX_NESTING = 50
MAX_EXPRESSION, MAX_DEEPER = 300, 12  # characters and brackets that an expression may have beyond the gold's
PROBES = ("\\sqrt{7919}\\zeta", "7919")  # answers that are never right, so that the gold has to be read
UNIT_BEHIND = re.compile(r"\\text\s*\{[^{}]*\}\s*$")
NAME_BEFORE = re.compile(r"^[a-z](?=[(\[][^()\[\]]*,[^()\[\]]*[)\]]$)")  # x(0,1), whose "in" was lost
MODES = ("strict", "paper")


class MathGrader:
    """Grades final answers, one call at a time. Workers start at the first answer that needs one, and stay."""

    beside_sampling = True

    def __init__(
        self,
        mode: str = "strict",
        step_seconds: float | None = None,
        num_workers: int | None = None,
        answer_seconds: float = ANSWER_SECONDS,
        **pool_options,
    ):
        """Takes `step_seconds`, which one call of `grade` may take; answers not graded by then are `timeout`."""
        assert mode in MODES, mode
        self.mode, self.step_seconds = mode, step_seconds
        self.pool = Pool(num_workers, answer_seconds, **pool_options)

    def start(self) -> None:
        """Starts a worker and sees its self-test pass; UserError where it does not."""
        grade = self.pool.run([Job(0, self.mode, "2\\sqrt{3}", "\\sqrt{12}")])[0]
        if grade.reward != 1.0:
            raise UserError(f"grader: its self-test gave {grade}; reinstall math-verify and its dependencies")

    def grade(
        self, problems: Sequence[Problem], completions: Sequence[str], *, seconds: float | None = None
    ) -> list[Grade]:
        """Extracts each completion's final answer and compares it with the problem's; the problem's text is unused."""
        return self.grade_answers([p.answer for p in problems], [self.extract(c) for c in completions], seconds)

    def extract(self, completion: str) -> str | None:
        return (extract_paper_answer if self.mode == "paper" else extract_answer)(completion)

    def grade_answers(
        self, golds: Sequence[str], answers: Sequence[str | None], seconds: float | None = None
    ) -> list[Grade]:
        """Returns one grade for each pair, in order. The same pair is graded once."""
        limits = [limit for limit in (self.step_seconds, seconds) if limit is not None]
        deadline = time.monotonic() + min(limits) if limits else None
        pairs = list(zip(golds, answers, strict=True))
        graded: dict[tuple[str, str | None], Grade] = {}
        jobs: dict[tuple[str, str | None], Job] = {}
        for pair in dict.fromkeys(pairs):
            start = time.perf_counter()
            settled = self._settle(*pair)
            if isinstance(settled, Job):
                settled.index = len(jobs)
                jobs[pair] = settled
            else:
                graded[pair] = Grade(*settled, time.perf_counter() - start)
        if jobs:
            from_workers = self.pool.run(list(jobs.values()), deadline)
            graded.update({pair: from_workers[job.index] for pair, job in jobs.items()})
        return [graded[pair] for pair in pairs]

    def _settle(self, gold: str, answer: str | None) -> tuple[float, str] | Job:
        """Returns (reward, status) where comparing strings and numbers is enough, a job where mathematics is needed."""
        if not gold.strip() or len(gold) > MAX_CHARACTERS:
            return 0.0, "error"
        if answer is None or not answer.strip():
            return 0.0, "no_answer"
        if len(answer) > MAX_CHARACTERS or _nesting(answer) > MAX_NESTING:
            return 0.0, "too_large"
        return self._settle_paper(gold, answer) if self.mode == "paper" else self._settle_strict(gold, answer)

    def _settle_strict(self, gold: str, answer: str) -> tuple[float, str] | Job:
        if (texts := chosen(gold, answer)) != (gold, answer):
            if compare(normalise(gold), normalise(answer), lambda *question: None):
                return 1.0, "ok"
            gold, answer = texts
        # 1,234 is one number, or a list of two: one reading that fits is enough
        readings = (True, False) if THOUSANDS.search(gold) or THOUSANDS.search(answer) else (True,)
        for thousands in readings:
            left, right = normalise(gold, thousands), normalise(answer, thousands)
            if not left:
                return 0.0, "error"
            right_or_not = compare(left, right, lambda *question: None)
            if right_or_not:
                return 1.0, "ok"
            if right_or_not is None:
                if len(right) > MAX_EXPRESSION + 4 * len(left) or _nesting(right) > MAX_DEEPER + _nesting(left):
                    return 0.0, "too_large"
                return Job(0, self.mode, left, right)
        return 0.0, "ok"

    def _settle_paper(self, gold: str, answer: str) -> tuple[float, str] | Job:
        if (cleaned := clean(answer)) is None:
            return 0.0, "no_answer"
        if all(text.isascii() and text.removeprefix("-").isdigit() for text in (gold, cleaned)):
            return float(int(gold) == int(cleaned)), "ok"
        return Job(0, self.mode, gold, cleaned)

    def unreadable(self, golds: Sequence[str]) -> list[int]:
        """Returns the indices of the golds that are neither numbers nor words nor mathematics nor text of any kind:
        empty or too long, with control characters, or broken, such as by a brace left open."""
        if self.mode != "strict":  # strict mode reads more golds than the recipe did
            with closing(MathGrader()) as strict:
                return strict.unreadable(golds)
        left = list(range(len(golds)))
        for change in (str, lambda gold: UNIT_BEHIND.sub("", gold), lambda gold: NAME_BEFORE.sub("", gold)):
            for probe in PROBES:
                grades = self.grade_answers([change(golds[i]) for i in left], [probe] * len(left))
                left = [i for i, grade in zip(left, grades, strict=True) if grade.status == "error"]
        return left

    def close(self) -> None:
        self.pool.close()


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest

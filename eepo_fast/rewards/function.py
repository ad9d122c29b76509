"""Grades by a function of one's own: (problem: Problem, completion: str) -> float, named by `reward.function` as
`module:name` or `file.py:name`.

It is called in the training process, one completion after the other; with several ranks each grades its share. A
problem has the row it was read from: `problem.columns["tolerance"]` is the field `tolerance` of a data file's line, or
the value of a data set's column of that name.

What it raises, or returns that is no finite number, is a missing reward, counted; the first of them is shown. Where all
of an iteration's rewards are missing, that is warned of, and the third time running it ends the run. A function that
ends the process (`sys.exit`) ends the run at once.
"""

import logging
import math
import time
from collections.abc import Sequence

from eepo_fast.own import find_function
from eepo_fast.types import Grade, Problem, UserError

log = logging.getLogger(__name__)


class FunctionGrader:
    beside_sampling = False  # it may use signals, as math-verify's own time limit does, which the main thread alone can

    def __init__(self, name: str):
        """Finds the function that `name` says, module:function; the working directory is searched, too."""
        self.name = name
        self.function = find_function("reward.function", name)
        self.complaint = ""
        """What the function did the first time that it gave no reward."""

    def start(self) -> None: ...

    def grade(
        self, problems: Sequence[Problem], completions: Sequence[str], *, seconds: float | None = None
    ) -> list[Grade]:
        return [self._grade(problem, text) for problem, text in zip(problems, completions, strict=True)]

    def _grade(self, problem: Problem, completion: str) -> Grade:
        started = time.perf_counter()
        try:
            reward = float(self.function(problem, completion))
            complaint = "" if math.isfinite(reward) else f"returned {reward}"
        except Exception as error:
            reward, complaint = 0.0, f"{type(error).__name__}: {error}"
            if isinstance(error, AttributeError) and error.obj is problem:
                complaint += " (the fields of its row are in problem.columns)"
        except (SystemExit, GeneratorExit) as error:
            raise UserError(
                f"reward.function: expected a number of {self.name}, found that it ends the process on problem "
                f"{problem.id} ({type(error).__name__}: {error}); let it raise an error, or return a number, and go on "
                "with --resume"
            ) from None
        if complaint and not self.complaint:
            self.complaint = f"reward.function {self.name}, on {problem.id}: {complaint}"
            log.warning("%s; counted as a missing reward", self.complaint)
        return Grade(0.0 if complaint else reward, "error" if complaint else "ok", time.perf_counter() - started)

    def unreadable(self, golds: Sequence[str]) -> list[int]:
        """Returns none: what an answer has to look like is the function's own affair."""
        return []

    def close(self) -> None: ...

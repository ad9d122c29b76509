"""Makes the problems of procedural tasks: any number of them, from a seed, in splits that no seed mixes.

- arithmetic: an expression over the given numbers, each used once, that reaches the target ("2,3,7=42:").
- progressions: the next term of an arithmetic progression ("56, 58, 60, 62,"); steps of 2 to 9, out of distribution 10
  to 15. A small pretrained language model knows half of it.
- two_ways: the sum of two numbers of two digits ("12+34:"), which in training need no carry in their units; out of
  distribution they do. An answer begins with the letter of its way: A adds digit by digit and knows no carry, B adds.
  The base of base_model.py takes A nearly always: it is right in all of training, and only there.

Every fifth problem of the training distribution, by its text, is held out as `test`; `out` is out of distribution.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from eepo_fast.config import DataConfig
from eepo_fast.types import Problem, UserError

ARITHMETIC, PROGRESSIONS, TWO_WAYS = "arithmetic", "progressions", "two_ways"
BASES = {"arithmetic-base": ARITHMETIC, "two-ways-base": TWO_WAYS}  # model.path of the bases that base_model.py teaches
TERMS = 4  # of a progression, in the problem
LARGEST = 99  # term of a progression, the answer included: two digits at most
IN_VAIN = 20_000  # draws without a new problem, after which there is taken to be none
STEPS = {"in": range(2, 10), "out": range(10, 16)}


@dataclass(frozen=True)
class Task:
    draw: Callable[[random.Random, DataConfig, bool], tuple[str, str]]
    """Draws (problem, one right answer) from the training distribution, or from outside of it."""
    has_out: bool
    """Whether it has a split out of distribution."""


def random_expression(rng: random.Random, numbers: list[int]) -> tuple[str, int, int]:
    """Returns (text, value, precedence) of a random tree over `numbers` with + - *; it has the fewest parentheses."""
    if len(numbers) == 1:
        return str(numbers[0]), numbers[0], 3
    cut = rng.randint(1, len(numbers) - 1)
    left, left_value, left_rank = random_expression(rng, numbers[:cut])
    right, right_value, right_rank = random_expression(rng, numbers[cut:])
    operator = rng.choice("+-*")
    rank = 2 if operator == "*" else 1
    left = f"({left})" if left_rank < rank else left
    right = f"({right})" if right_rank < rank or (operator == "-" and right_rank == 1) else right
    value = {"+": left_value + right_value, "-": left_value - right_value, "*": left_value * right_value}[operator]
    return f"{left}{operator}{right}", value, rank


def arithmetic_problem(rng: random.Random, count: int, max_number: int, max_target: int = 99) -> tuple[str, str]:
    """Returns (problem, one right answer), such as "2,3,7=42:" and "2*3*7"; the target is in [0, max_target]."""
    while True:
        numbers = [rng.randint(1, max_number) for _ in range(count)]
        answer, target, _ = random_expression(rng, numbers)
        if 0 <= target <= max_target:
            return f"{','.join(map(str, sorted(numbers)))}={target}:", answer


def _arithmetic(rng: random.Random, data: DataConfig, out: bool) -> tuple[str, str]:
    return arithmetic_problem(rng, data.numbers, data.max_number)


def _progression(rng: random.Random, data: DataConfig, out: bool) -> tuple[str, str]:
    step = rng.choice(STEPS["out" if out else "in"])
    first = rng.randint(1, LARGEST - TERMS * step)
    return "".join(f" {first + i * step}," for i in range(TERMS)).lstrip(), str(first + TERMS * step)


def two_ways_numbers(rng: random.Random, out: bool) -> tuple[int, int]:
    """Returns two numbers of two digits whose units need no carry; out of distribution, whose units do."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if (a % 10 + b % 10 > 9) == out:
            return a, b


def two_ways_answers(a: int, b: int) -> dict[str, str]:
    """Returns the completion of each way."""
    return {"A": f"A{a // 10 + b // 10}{(a + b) % 10}", "B": f"B{a + b}"}


def _two_ways(rng: random.Random, data: DataConfig, out: bool) -> tuple[str, str]:
    a, b = two_ways_numbers(rng, out)
    return f"{a}+{b}:", str(a + b)


TASKS = {
    ARITHMETIC: Task(_arithmetic, has_out=False),
    PROGRESSIONS: Task(_progression, has_out=True),
    TWO_WAYS: Task(_two_ways, has_out=True),
}


def is_held_out(problem: str) -> bool:
    """Returns whether a problem of the training distribution is of the test split: every fifth is, by its text."""
    return random.Random(problem).randrange(5) == 0


def task_problems(
    task: str, size: int, data: DataConfig, seed: int, split: str = "train", *, exact: bool = True, asked_by: str
) -> list[Problem]:
    """Returns `size` different problems of one split (train, test or out), or as many as there are; UserError,
    beginning with `asked_by`, where those are fewer and `exact`, or the task has no such split."""
    found = TASKS[task]
    if split == "out" and not found.has_out:
        raise UserError(f"{asked_by}: {task} has no split out of distribution; expected train or test")
    rng, in_vain = random.Random(f"{split}/{seed}"), 0
    problems: dict[str, Problem] = {}
    while len(problems) < size and in_vain < IN_VAIN:
        text, answer = found.draw(rng, data, split == "out")
        in_vain += 1
        if text not in problems and (split == "out" or is_held_out(text) == (split == "test")):
            problems[text] = Problem(f"{task}/{split}/{len(problems):06d}", text, answer, task)
            in_vain = 0
    if exact and len(problems) < size:
        source = f"{data.numbers} numbers up to {data.max_number}" if task == ARITHMETIC else task
        more = ", or for more or larger numbers" if task == ARITHMETIC else ""
        raise UserError(
            f"{asked_by}: {size} different problems were asked for, but {source} gave only {len(problems)} of the "
            f"{split} split; ask for fewer{more}"
        )
    return list(problems.values())

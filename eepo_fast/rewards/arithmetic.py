"""Verifies arithmetic. A parser of its own reads the expression: no text is ever evaluated."""

import re

from eepo_fast.rewards.procedural import ProceduralGrader
from eepo_fast.types import Problem

MAX_CHARACTERS = 200
TOKEN = re.compile(r"\d{1,9}|[-+*()]")


def evaluate(text: str) -> tuple[int, list[int]] | None:
    """Returns (value, numbers used) of an expression over + - * and parentheses; None where it is not one."""
    tokens = TOKEN.findall(text)
    if "".join(tokens) != text.replace(" ", "") or not tokens:
        return None
    used: list[int] = []
    position = 0

    def peek() -> str:
        return tokens[position] if position < len(tokens) else ""

    def take() -> str:
        nonlocal position
        position += 1
        return tokens[position - 1] if position <= len(tokens) else ""

    def atom() -> int:
        if (token := take()) == "(":
            value = total()
            if take() != ")":
                raise ValueError
            return value
        used.append(int(token))  # ValueError on an operator or at the end
        return used[-1]

    def product() -> int:
        value = atom()
        while peek() == "*":
            take()
            value *= atom()
        return value

    def total() -> int:
        value = product()
        while peek() in ("+", "-"):
            value = value + product() if take() == "+" else value - product()
        return value

    try:
        value = total()
    except ValueError:
        return None
    return (value, used) if position == len(tokens) else None


class ArithmeticGrader(ProceduralGrader):
    """Rewards a completion that is an expression which uses each given number exactly once and reaches the target."""

    def judge(self, problem: Problem, completion: str) -> tuple[float, str]:
        text = completion.strip()
        if not text:
            return 0.0, "no_answer"
        if len(text) > MAX_CHARACTERS:
            return 0.0, "too_large"
        numbers, _, target = problem.problem.rstrip(":").partition("=")
        wanted = sorted(int(n) for n in numbers.split(","))
        result = evaluate(text)
        return float(result is not None and result[0] == int(target) and sorted(result[1]) == wanted), "ok"

"""Answers graded a second: ours against math-verify in one process with its time-outs on, in turns on the same answers.

    python bench/bench_grading.py --out bench/results/cpu/bench_grading.json [--data FILE.jsonl ...]

The mix is what a policy writes to questions with exact answers: golds by kind (70% integers, 10% fractions, 5%
decimals, 5% roots and multiples of π, 5% polynomials, 5% intervals, pairs and lists), right in some spelling half
of the time and wrong otherwise, in a sentence or a box, no two alike. With --data the golds of these files in
place of these.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

from common import parser_with_defaults, record

from eepo_fast.rewards import MathGrader
from eepo_fast.types import Problem


def procedural_gold(draw: random.Random) -> tuple[str, list[str]]:
    """Returns (gold, the same in other spellings)."""
    a, b, c = draw.randint(2, 99), draw.randint(2, 99), draw.randint(1000, 99_999)
    kind = draw.random()
    if kind < 0.7:
        return draw.choice(
            [(str(a), [f"{a}.", f"x = {a}", f"{a}\\text{{ cm}}", f"{a}.0"]), (str(c), [f"{c:,}", f"\\${c}"])]
        )
    if kind < 0.8:
        return f"\\frac{{{a}}}{{{b}}}", [f"{a}/{b}", f"\\dfrac{{{2 * a}}}{{{2 * b}}}"]
    if kind < 0.85:
        return f"{a}.{b}5", [f"{a}.{b}50", f"{a}{b}5e-{len(str(b)) + 1}"]
    if kind < 0.9:
        return draw.choice([(f"{a}\\sqrt{{3}}", [f"\\sqrt{{{3 * a * a}}}"]), (f"{a}\\pi", [f"\\pi \\cdot {a}"])])
    if kind < 0.95:
        return f"{a}x^2-{b}x+7", [f"7-{b}x+{a}x^2", f"{a}x^{{2}} - {b}x + 7"]
    return draw.choice([(f"({a}, {b})", [f"\\left({a},{b}\\right)"]), (f"{a}, {c}", [f"{c} \\text{{ and }} {a}"])])


def make_mix(num: int, golds: list[str], seed: int) -> tuple[list[Problem], list[str]]:
    draw = random.Random(seed)
    problems, completions = [], []
    for i in range(num):
        gold, spellings = (draw.choice(golds), []) if golds else procedural_gold(draw)
        answer = draw.choice([gold, *spellings])
        if draw.random() < 0.5:
            digits = [k for k, character in enumerate(answer) if character.isdigit()]
            k = draw.choice(digits) if digits else 0
            answer = answer[:k] + str(draw.randint(0, 9)) + answer[k + 1 :]
        problems.append(Problem(str(i), "?", gold))
        completions.append(f"Step {i}: we add up. So the result is \\boxed{{{answer}}}.")
    return problems, completions


def plain_math_verify(problems: list[Problem], completions: list[str]) -> int:
    from math_verify import parse, verify

    return sum(bool(verify(parse(f"${p.answer}$"), parse(c))) for p, c in zip(problems, completions, strict=True))


def main() -> None:
    parser = parser_with_defaults(__doc__)
    parser.add_argument("--num", type=int, default=2000, help="answers in each turn")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="JSON Lines with `answer`: golds of the mix")
    args = parser.parse_args()
    golds = [json.loads(line)["answer"] for file in args.data for line in file.open(encoding="utf-8")]
    grader = MathGrader()
    grader.start()
    rows = []
    for turn in range(args.repeats + 1):  # the first turn warms both up
        problems, completions = make_mix(args.num, golds, seed=turn)
        start = time.perf_counter()
        grades = grader.grade(problems, completions)
        middle = time.perf_counter()
        right = plain_math_verify(problems, completions)
        end = time.perf_counter()
        if turn:
            ours, theirs = args.num / (middle - start), args.num / (end - middle)
            rows.append(
                {
                    "turn": turn, "answers_per_second": ours, "math_verify_per_second": theirs, "ratio": ours / theirs,
                    "right": sum(g.reward == 1 for g in grades), "right_math_verify": right,
                    "timeouts": sum(g.status == "timeout" for g in grades),
                }
            )  # fmt: skip
    middle = sorted(rows, key=lambda row: row["ratio"])[len(rows) // 2]
    rows.append({**middle, "turn": "median by ratio"})
    grader.close()
    record(rows, args.out)


if __name__ == "__main__":
    main()

"""Checks that every gold of a data set grades 1 against itself and its rewrites, and 0 against its mutations.

    python bench/check_grading.py --data math500.jsonl minerva_math.jsonl ... [--out FILE] [--limit N]

A rewrite is the same answer in another spelling; a mutation is wrong by one digit, sign, exponent, element or bracket.
Each rule applies where the gold has what it needs. Lists every gold that fails a rewrite or passes a mutation.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from eepo_fast.rewards import MathGrader

INTEGER, DECIMAL = re.compile(r"-?[0-9]+"), re.compile(r"-?[0-9]*\.[0-9]+")
E_NOTATION = re.compile(r"(-?[0-9.]+)[eE]([-+]?[0-9]+)")
FRACTION = re.compile(r"(-?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
PAIR = re.compile(r"[(\[][^()\[\]{}]*,[^()\[\]{}]*[)\]]")
LIST = re.compile(r"[^()\[\]{},]+(?:,[^()\[\]{},]+)+")


def rewrites(gold: str) -> Iterator[tuple[str, str]]:
    """Yields (rule, the same answer in another spelling)."""
    for name, text in (
        ("itself", gold), ("dollars", f"${gold}$"), ("display", f"\\[ {gold} \\]"), ("box", f"\\boxed{{{gold}}}"),
        ("point", f"{gold}."), ("bold", f"**{gold}**"), ("braces", "{" + gold + "}"),
    ):  # fmt: skip
        yield name, text
    if "frac{" in gold:
        for style in ("dfrac", "tfrac", "cfrac"):
            yield style, re.sub(r"\\[dtc]?frac(?![A-Za-z])", lambda m, style=style: "\\" + style, gold)
    match = FRACTION.fullmatch(gold)
    if match:
        sign, above, below = match.groups()
        yield "slash", f"{sign}{above}/{below}"
        yield "not reduced", f"{sign}\\frac{{{3 * int(above)}}}{{{3 * int(below)}}}"
        yield "sign above", f"\\frac{{{sign}{above}}}{{{below}}}"
        if int(above) > int(below) > 1:
            yield "mixed", f"{sign}{int(above) // int(below)}\\frac{{{int(above) % int(below)}}}{{{below}}}"
    if INTEGER.fullmatch(gold):
        yield "equation", f"x = {gold}"
        yield "point zero", f"{gold}.00"
        yield "unit", f"{gold}\\text{{ cm}}"
        yield "words", f"{gold} apples"
        yield "dollar sign", f"\\${gold}"
        yield "unicode minus", gold.replace("-", "−")
        if abs(int(gold)) >= 1000:
            grouped = f"{int(gold):,}"
            for mark in (",", "{,}", "\\,", " ", ",\\!"):
                yield f"thousands {mark}", grouped.replace(",", mark)
    match = E_NOTATION.fullmatch(gold)
    if match:
        mantissa, exponent = match.groups()
        yield "times", f"{mantissa} \\times 10^{{{int(exponent)}}}"
        yield "cdot", f"{mantissa}\\cdot 10^{{{int(exponent)}}}"
        yield "unicode", f"{mantissa} × 10^{int(exponent)}" if 0 <= int(exponent) < 10 else gold.replace("e", "E")
    if re.fullmatch(r"[^\\]*\^\{?\\circ\}?", gold):
        yield "no degrees", re.sub(r"\^\{?\\circ\}?", "", gold)
        yield "degrees in words", re.sub(r"\^\{?\\circ\}?", r"\\text{ degrees}", gold)
        yield "degree sign", re.sub(r"\^\{?\\circ\}?", "°", gold)
    if PAIR.fullmatch(gold):
        yield "left right", f"\\left{gold[:-1]} \\right{gold[-1]}"
        yield "spaces", gold.replace(",", " , ")
        yield "assigned", f"S = {gold}"
    if LIST.fullmatch(gold) and "\\text" not in gold and "=" not in gold and not re.search(r"\d,\\?!? ?\d{3}\b", gold):
        parts = [part.strip() for part in gold.split(",")]
        yield "reversed list", ", ".join(parts[::-1])
        yield "set", "\\{" + ", ".join(parts) + "\\}"
        yield "and", ", ".join(parts[:-1]) + " \\text{ and } " + parts[-1]
    if " \\cup " in gold:
        yield "union reversed", " \\cup ".join(gold.split(" \\cup ")[::-1])
    text = re.fullmatch(r"\\text\{([A-Za-z]+)\}", gold)
    if text:
        yield "bare text", text.group(1)
        if len(text.group(1)) > 2:  # a choice is its letter as written
            yield "lower case", text.group(1).lower()
    choice = re.fullmatch(r"\\text\{\(([A-Z])\)\}", gold)
    if choice:
        yield "letter", choice.group(1)
    if "pmatrix" in gold:
        yield "bmatrix", gold.replace("pmatrix", "bmatrix")
    if re.fullmatch(r"[-0-9a-zA-Z^+\s]+", gold) and "+" in gold and re.search("[a-z]", gold):
        yield "other order", " + ".join(reversed(re.split(r"\s*\+\s*", gold))).replace("+ -", "- ")


def mutations(gold: str) -> Iterator[tuple[str, str]]:
    """Yields (rule, an answer that is wrong)."""
    digits = [m.start() for m in re.finditer(r"[0-9]", gold)]
    for i in {digits[0], digits[-1], digits[len(digits) // 2]} if digits else ():
        other = "1" if gold[i] == "0" else str((int(gold[i]) + 1) % 10)
        yield "digit", gold[:i] + other + gold[i + 1 :]
        yield (
            "digit inserted",
            gold[:i] + gold[i] + "7" + gold[i + 1 :] if "." not in gold else gold[:i] + other + gold[i + 1 :],
        )
    if INTEGER.fullmatch(gold) or DECIMAL.fullmatch(gold) or FRACTION.fullmatch(gold) or E_NOTATION.fullmatch(gold):
        if re.search("[1-9]", gold):
            yield "sign", gold[1:] if gold.startswith("-") else "-" + gold
            yield "times 100", f"{gold} \\times 100"
        yield "two answers", f"{gold}, 987654321"
        yield "or", f"{gold} or 987654321"
        yield "pair", f"({gold}, 987654321)"
        yield "false equation", f"987654321 = {gold}"
    match = E_NOTATION.fullmatch(gold)
    if match:
        yield "exponent", f"{match.group(1)} \\times 10^{{{int(match.group(2)) + 1}}}"
        yield "exponent sign", f"{match.group(1)}e{-int(match.group(2))}"
    if PAIR.fullmatch(gold):
        swap = {"(": "[", "[": "(", ")": "]", "]": ")"}
        yield "opening bracket", swap[gold[0]] + gold[1:]
        yield "closing bracket", gold[:-1] + swap[gold[-1]]
        inner = [part.strip() for part in gold[1:-1].split(",")]
        yield "element more", f"{gold[:-1]},987654321{gold[-1]}"
        if len(set(inner)) > 1 and gold[0] == "(" and inner[0] != inner[-1]:
            yield "order", gold[0] + ",".join(inner[::-1]) + gold[-1] if inner != inner[::-1] else gold + "1"
    if LIST.fullmatch(gold) and "=" not in gold:
        yield "element less", ",".join(gold.split(",")[:-1])
        yield "list more", f"{gold}, 987654321"
        if not re.search(r"\d,\\?!? ?\d{3}\b", gold):
            yield "list as tuple", f"({gold})"
    if "+" in gold:
        i = gold.index("+")
        yield "inner sign", gold[:i] + "-" + gold[i + 1 :]
    if "\\cup" in gold:
        yield "part less", gold.rsplit("\\cup", 1)[0]


def run(files: list[Path], limit: int | None, mode: str) -> dict[str, object]:
    grader = MathGrader(mode)
    report: dict[str, object] = {"mode": mode, "files": {}, "failures": []}
    for file in files:
        golds = [json.loads(line)["answer"] for line in file.open(encoding="utf-8")]
        golds = list(dict.fromkeys(golds))[:limit]
        for wanted, rules in ((1.0, rewrites), (0.0, mutations)):
            cases = [(gold, rule, answer) for gold in golds for rule, answer in _cases(rules, gold)]
            grades = grader.grade_answers([c[0] for c in cases], [c[2] for c in cases])
            failed = [
                {"file": file.name, "rule": rule, "gold": gold, "answer": answer, "status": grade.status}
                for (gold, rule, answer), grade in zip(cases, grades, strict=True)
                if grade.reward != wanted
            ]
            report["files"][f"{file.name} {rules.__name__}"] = {"cases": len(cases), "failed": len(failed)}
            report["failures"] += failed
            print(f"{file.name:<24}{rules.__name__:<10}{len(cases):>7} cases, {len(failed)} wrong", flush=True)
            for row in failed:
                print(f"    {row['rule']:<16}gold {row['gold']}    answer {row['answer']}    {row['status']}")
    grader.close()
    print(Counter(row["rule"] for row in report["failures"]))
    return report


def _cases(rules: Callable[[str], Iterator[tuple[str, str]]], gold: str) -> Iterator[tuple[str, str]]:
    return ((rule, answer) for rule, answer in rules(gold) if rules is rewrites or answer != gold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSON Lines with `answer`")
    parser.add_argument("--limit", type=int, help="only so many different golds a file")
    parser.add_argument("--mode", choices=("strict", "paper"), default="strict")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = run(args.data, args.limit, args.mode)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

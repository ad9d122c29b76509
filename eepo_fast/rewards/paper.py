"""Grades as the recipe did (SimpleRL-Zoo, in training): the answer that Qwen2.5-Math's evaluation would take is put
into a box, and math-verify's `parse` and `verify` get that box and the gold's, with their defaults. It is
re-implemented from what that does, errors included (see tests/eepo_fast/rewards/grading/paper.jsonl): e-notation is
4.5·E·33, 2.9e-19 equals 2.8e-19, `5=7` is 7, a list of three answers may be a set, an empty box is nothing.

Known differences:
- math-verify's parser of plain expressions, which hands text to Python's `eval`, is not used: what only it could read
  (a box that is not LaTeX at all) is wrong here.
- Answers of more than 2,000 characters are `too_large`, time-outs `timeout`: there both were plain zeros, after 10 s.
- math-verify is the installed version; theirs was 0.5 or 0.6.
- The evaluation code's clean-up of the extracted answer is kept to its main steps: units in text, degrees, percent and
  dollar signs, fractions without braces, a leading `x=`, a trailing `.0`.
- Digits in scripts other than ASCII are no numbers.
"""

import re

from eepo_fast.rewards.answers.extract import extract_answer

NUMBER = re.compile(r"-?[0-9]{0,40}\.?[0-9]{1,40}")
SIMPLE_FRACTION = re.compile(r"\\frac\s?([0-9])\s?([0-9])")
HALF_FRACTION = re.compile(r"\\frac\s?([0-9])\s?\{")
SHORT_SQRT = re.compile(r"\\sqrt\s?([0-9A-Za-z])")
TEXT_AT_END = re.compile(r"\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\{?[23]\}?)?$")


def extract_paper_answer(completion: str) -> str | None:
    """Returns the last box, else what follows the last "he answer is", else the last number, cleaned up."""
    if "boxed" in completion:
        answer = extract_answer(completion[completion.rfind("boxed") - 1 :]) if "\\boxed" in completion else None
    elif "he answer is" in completion:
        answer = completion.rsplit("he answer is", 1)[1].strip()
    else:
        numbers = NUMBER.findall(completion.replace(",", ""))
        answer = numbers[-1] if numbers else None
    return clean(answer) if answer is not None else None


def clean(answer: str) -> str | None:
    text = answer.split("\n")[0].strip().lstrip(":").rstrip("./ ").strip()
    for command in ("\\left", "\\right", "\\!", "\\$", "$", "^{\\circ}", "^\\circ", "\\%", "%", "\\,"):
        text = text.replace(command, "")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("infinity", "\\infty")
    text = HALF_FRACTION.sub(r"\\frac{\1}{", SIMPLE_FRACTION.sub(r"\\frac{\1}{\2}", text))
    text = SHORT_SQRT.sub(r"\\sqrt{\1}", text)
    text = TEXT_AT_END.sub("", text).strip() or text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right.strip()
    text = re.sub(r"(?<=[0-9])\.0+$", "", text)
    text = "0" + text if text.startswith(".") else text
    return text or None


def verify_answer(gold: str, answer: str) -> bool:
    """Returns what math-verify says of both boxes, in a worker process: neither call has a time-out here."""
    from math_verify import LatexExtractionConfig, parse, verify

    from eepo_fast.rewards.answers.symbolic import NotMathematicsError

    configs = [LatexExtractionConfig()]
    if not (parsed_gold := parse(f"\\boxed{{{gold}}}", configs, parsing_timeout=None)):
        raise NotMathematicsError
    parsed = parse(f"\\boxed{{{answer}}}", configs, parsing_timeout=None)
    return bool(parsed) and bool(verify(parsed_gold, parsed, timeout_seconds=None))

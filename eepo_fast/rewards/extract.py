"""The final answer of a completion, and a common spelling for comparing it."""

from __future__ import annotations

import re

ANSWER_IS = re.compile(r"(?:final\s+answer|the\s+answer)\s*(?:is|:)\s*:?\s*", re.IGNORECASE)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
SPACES = re.compile(r"\\[,;:! ]|\s+|~")
WRAPPERS = re.compile(r"^\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}$")


def extract_answer(completion: str) -> str | None:
    """Last \\boxed{}, else what follows "the answer is", else the last number; None where there is none of them."""
    boxed = _last_boxed(completion)
    if boxed is not None:
        return boxed.strip() or None
    announced = list(ANSWER_IS.finditer(completion))
    if announced:
        rest = completion[announced[-1].end() :].split("\n")[0]
        rest = re.split(r"\.(?:\s|$)", rest)[0].strip().strip("$").strip()
        if rest:
            return rest
    numbers = NUMBER.findall(completion)
    return numbers[-1].rstrip(",") if numbers else None


def _last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} or \\fbox{...} whose braces close; None without one."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for i in range(match.end(), len(text)):
            if text[i] == "{" and text[i - 1] != "\\":
                depth += 1
            elif text[i] == "}" and text[i - 1] != "\\":
                depth -= 1
                if depth == 0:
                    return text[match.end() : i]
    return None


def normalise(answer: str) -> str:
    """A common spelling: no dollar signs, thousands marks, sizing commands, text wrappers or trailing point."""
    text = answer.strip().strip("$").strip()
    text = text.replace("\u2212", "-").replace("\\left", "").replace("\\right", "")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("{,}", ",").replace("\\$", "")
    text = THOUSANDS.sub("", text).rstrip(".").strip()
    text = WRAPPERS.sub(r"\1", text)
    return SPACES.sub("", text)

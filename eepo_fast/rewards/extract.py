"""The final answer of a completion, and a common spelling for comparing it."""

from __future__ import annotations

import re

ANSWER_IS = re.compile(r"(?:final\s+answer|the\s+answer)\s*(?:is|:)\s*:?\s*", re.IGNORECASE)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
SPACES = re.compile(r"\\[,;:! ]|\s+|~")
BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\[", "\\]"), ("\\(", "\\)"))
DIGIT_GAP = re.compile(r"(?<=\d)\s+(?=\d)")
MIXED = re.compile(r"^(-?)(\d+)\s+(\d+)\s*/\s*(\d+)$")
WORDS = re.compile(r"[A-Za-z]{2,}")
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
    """Content of the last \\boxed{...} or \\fbox{...} whose braces close; None without one. One pass over the text."""
    stack: list[int | None] = []  # for each open brace: where the content of its box starts, None for other braces
    last: tuple[int, int] | None = None
    for match in BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = stack.pop() if stack else None
            if start is not None and (last is None or start > last[0]):
                last = start, match.start()
        elif token not in ("\\{", "\\}"):
            stack.append(match.end() if len(token) > 1 else None)
    return None if last is None else text[last[0] : last[1]]


def normalise(answer: str) -> str:
    """A common spelling: no delimiters, thousands marks, sizing commands, text wrappers or trailing point."""
    text = answer.strip().strip("*").strip()
    for opening, closing in DELIMITERS:
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            text = text[len(opening) : len(text) - len(closing)].strip()
    text = text.replace("\u2212", "-").replace("\\left", "").replace("\\right", "")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("{,}", ",").replace("\\$", "")
    text = text.rstrip(".").strip()
    text = WRAPPERS.sub(r"\1", text)
    if not any(bracket in text for bracket in "()[]{}"):  # (2,100) is a pair
        text = THOUSANDS.sub("", text)
    text = MIXED.sub(r"\1(\2+\3/\4)", text)
    return DIGIT_GAP.sub(" ", SPACES.sub("", DIGIT_GAP.sub("\0", text)).replace("\0", " "))


def is_text(answer: str) -> bool:
    """Words alone, such as a name or a weekday: compared as they are, without mathematics."""
    return bool(WORDS.fullmatch(answer))


def has_digit_gap(answer: str) -> bool:
    """Two numbers with nothing but space between them, which is neither a product nor one number."""
    return DIGIT_GAP.search(answer) is not None
